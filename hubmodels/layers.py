"""What the families share: linear maps, attention, feed-forward, blocks, embeddings.

Shapes, here and in every other file:

    B  batch            T  packed tokens of the batch: the sum of its rows' real lengths
    S  padded length    D  hidden size
    H  attention heads  K  size of a head, D = H * K
    V  vocabulary       N  labels
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels, products
from .cache import LayerCache, Seen
from .errors import InputError
from .packing import Packing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # erf; Google's BERT code has the tanh form, published checkpoints say "gelu" and mean this one
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_OF_THEIR_INPUT = {"gelu", "gelu_new", "silu"}  # their gradient: it is kept for the way back, their output need not be


# Parameters are made without values: the loader fills them from a file, `initialise` draws them. torch's own
# initialisers would draw 110 million random numbers only for them to be overwritten.
class Linear(nn.Linear):
    start = 1.0  # the standard deviation of its starting weights, as a part of the model's

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return products.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    def reset_parameters(self) -> None:
        pass


@torch.no_grad()
def initialise(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Give every parameter of `module` its starting value: weights normal(0, std), biases 0, norms 1.

    A `Linear` may scale std by its `start`. The row of the padding token starts at zero. Numbers come from `generator`
    (default: torch's global one).
    Source: Devlin 2018, appendix A.2; the reference port's `_init_weights`.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif name == "bias":
                parameter.zero_()
            else:
                parameter.normal_(0.0, std * getattr(part, "start", 1.0), generator=generator)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it, forwards or backwards."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Where torch puts a module's hooks, now and later."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_plain(part: nn.Module, kind: type) -> bool:
    """Whether it does what its class does, and nobody looks."""
    return type(part) is kind and not has_hooks(part) and "forward" not in vars(part)


def check_ids(name: str, ids: Tensor, size: int, what: str) -> None:
    """Raise InputError unless all of `ids` are in 0 … size - 1.

    In a CUDA graph nothing can be raised, and nothing is checked.
    An embedding that is indexed out of range says nothing useful on a CPU and ends the CUDA context on a GPU.
    """
    if ids.is_floating_point():
        raise InputError(f"{name}: expected whole numbers, got {ids.dtype}")
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lowest, highest = (int(i) for i in ids.aminmax())
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"{name}: {wrong} is out of range; {what} has {size} entries, 0 to {size - 1}")


class Embeddings(nn.Module):
    """Word + position; a token type is one more word. Source: Radford 2018 §3.1; finetune-transformer-lm, train.py."""

    def __init__(self, words: int, positions: int, size: int, *, dropout: float, padding: int | None = None):
        super().__init__()
        self.word = Embedding(words, size, padding_idx=padding)
        self.position = Embedding(positions, size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, words: Tensor, token_types: Tensor | None, positions: Tensor | None, packing: Packing, begin: int = 0
    ) -> Tensor:
        """words: their vectors [T, D], as from `look_up`; token_types, positions [B, S] or None -> [T, D]

        positions None: the column, counted from `begin`, padding included.
        """
        x = words + self._positions(positions, packing, begin)
        if token_types is not None:
            check_ids("token_type_ids", token_types, self.word.num_embeddings, "the vocabulary")
            x = x + self.word(packing.pack(token_types.expand(packing.batch, packing.length)))
        return self.dropout(x)

    def look_up(self, words: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """ids [B, S] or vectors [B, S, D] -> vectors [T, D]; and the word table [V, D], as a head is to take it: see
        `products.look_up`.
        """
        words, word = packing.pack(words), self.word
        if words.is_floating_point():
            return words, word.weight
        check_ids("input_ids", words, word.num_embeddings, "the vocabulary")
        plain = not torch.compiler.is_compiling() and is_plain(word, Embedding)
        if not plain or word.sparse or word.max_norm or word.scale_grad_by_freq:
            return word(words), word.weight
        return products.look_up(words, word.weight, word.padding_idx)

    def _positions(self, positions: Tensor | None, packing: Packing, begin: int = 0) -> Tensor:
        """[B, S] or None -> [T, D]"""
        if positions is not None:
            check_ids("position_ids", positions, self.position.num_embeddings, "the position table")
            return self.position(packing.pack(positions.expand(packing.batch, packing.length)))
        if packing.indices is not None:
            return self.position(packing.indices % packing.length + begin)
        rows = self.position.weight[begin : begin + packing.length]  # [S, D]
        return rows.expand(packing.batch, *rows.shape).flatten(0, 1)


class NormalisedEmbeddings(Embeddings):
    """Word + token type + position, normalised. Source: Devlin 2018 §3, figure 2; google bert modeling.py."""

    def __init__(self, words: int, positions: int, types: int, size: int, *, padding: int, eps: float, dropout: float):
        super().__init__(words, positions, size, dropout=dropout, padding=padding)
        self.token_type = Embedding(types, size)
        self.norm = LayerNorm(size, eps=eps)

    def forward(
        self, words: Tensor, token_types: Tensor | None, positions: Tensor | None, packing: Packing, begin: int = 0
    ) -> Tensor:
        """As `Embeddings`; token_types None: all 0."""
        if token_types is None:
            x = words + self.token_type.weight[0]
        else:
            check_ids("token_type_ids", token_types, self.token_type.num_embeddings, "the token type table")
            x = words + self.token_type(packing.pack(token_types.expand(packing.batch, packing.length)))
        x = x + self._positions(positions, packing, begin)
        return self.dropout(self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention on packed tokens. Source: Vaswani 2017 §3.2; Devlin 2018 §3.

    scale: of the scores, beside the usual 1 / sqrt(K).
    """

    def __init__(self, size: int, heads: int, *, dropout: float, scale: float = 1.0):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(size, 3 * size)
        self.output: Any = Linear(size, size)
        self.dropout = dropout
        self.scale = scale

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        probs: list[Tensor] | None = None,
        past: LayerCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D], or of the packing's `kept` tokens [M, D]; the attention weights [B, H, S, columns] are
        appended to `probs` if it is given.

        residual: as many rows, to be added, if the output map is one that adds as it multiplies.
        """
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)
        seen = None if past is None else past.extend(qkv[:, 1:], packing)
        q, k, v = qkv.unbind(1)  # [T, H, K]
        if self.scale != 1.0:
            q = q * self.scale
        mixed = packing.kept_of(self.attend(q, k, v, packing, probs, seen).flatten(1))
        return self.output(mixed) if residual is None else self.output.plus(mixed, residual)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        probs: list[Tensor] | None,
        seen: Seen | None = None,
    ) -> Tensor:
        """[T, H, K] three times -> [T, H, K]: the one place that knows which kernel runs.

        seen: what the tokens look at, if there is more than themselves. A family with a score bias overrides this
        method alone.
        """
        dropout = self.dropout if self.training else 0.0
        if seen is not None:
            return kernels.seen_attention(q, seen, packing, dropout, probs)
        if probs is not None:
            return kernels.explicit_attention(q, k, v, packing, dropout, probs)
        if q.is_cpu and dropout > 0.0 and packing.pairwise is None:
            return kernels.dropped_attention(q, k, v, packing, dropout)
        plain = (
            dropout == 0.0 and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and q.requires_grad)
        )
        whole = packing.pairwise is None and not packing.causal  # each token looks at all of its row
        if q.is_cpu and plain and whole and kernels.products_are_faster(q.dtype):
            return kernels.product_attention(q, k, v, packing)
        ragged = packing.offsets is not None and dropout == 0.0
        may_widen = packing.pairwise is None and not torch.compiler.is_compiling()
        if q.is_cpu and (ragged or (may_widen and not products.multiplies(q.dtype))):
            kernel = kernels._ragged_attention if plain else kernels.ragged_attention
            return kernel(q, k, v, packing.ends(q.device), packing.causal)[0]
        if ragged and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and kernels.has_varlen(q.device):
            return kernels.varlen_attention(q, k, v, packing)
        return kernels.padded_attention(q, k, v, packing, dropout)


class WordScores(nn.Module):
    """States -> a score for every word. The matrix is the word table itself, handed in: nothing of its own."""

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, D], [V, D], [V] or None -> [T, V]"""
        return products.linear(states, table, bias)


class FeedForward(nn.Module):
    """Wide, bent, narrow again. Source: Vaswani 2017 §3.3."""

    def __init__(self, size: int, inner: int, activation: str):
        super().__init__()
        self.inner = Linear(size, inner)
        self.output = Linear(inner, size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        bend = partial(ACTIVATIONS[self.activation], self.inner(x))
        bent = bend()  # [T, inner]
        with products.made_again(bent, bend) if self.activation in _OF_THEIR_INPUT else nullcontext():
            return self.output(bent)


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input. What is normalised, and when, the kind of block says.

    `forward`: [T, D] -> [T, D], or of the packing's `kept` tokens [M, D]. probs, past: as for `Attention`.
    """

    def __init__(self, attention: Attention, feed_forward: FeedForward, size: int, *, eps: float, dropout: float):
        super().__init__()
        self.attention = attention
        self.attention_norm = LayerNorm(size, eps=eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(dropout)


class PostNormBlock(Block):
    """Normalised after adding. Source: Vaswani 2017 §3.1."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = self.attention_norm(packing.kept_of(x) + self.dropout(self.attention(x, packing, probs, past)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class PreNormBlock(Block):
    """Normalised before each part; what is added up never is. Source: Radford 2019 §2.3."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = packing.kept_of(x) + self.dropout(self.attention(self.attention_norm(x), packing, probs, past))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
