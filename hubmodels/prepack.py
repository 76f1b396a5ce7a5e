"""A model laid out for inference on a CPU: weights packed once, additions and activations done with the products.

torch's own product with a matrix as it stands in a file is not the fastest that torch has. Two packed layouts do
better: oneDNN's, which is quickly made and serves rows of any number, and FBGEMM's for half precision, which takes a
second or two and reads fastest where one token a row is bound by reading the weights (a language model's `accelerate`).
"""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .cache import LayerCache
from .errors import InputError
from .graphs import GraphedBlocks, Record, record_on_cuda
from .kernels import has_varlen
from .layers import (
    ACTIVATIONS,
    Attention,
    Embeddings,
    FeedForward,
    Linear,
    PostNormBlock,
    PreNormBlock,
    WordScores,
    has_hooks,
)
from .packing import Packing

M = TypeVar("M", bound=nn.Module)
_FBGEMM = ("x86", "fbgemm")  # torch's quantised engines that are it
_LEAST = 1e-30  # what the largest number of a row of zeros is taken to be
_TOKENS = 16  # oneDNN's layout is the same for more; that for a single one is 5 % faster for it, and slow for 8


class PackedLinear(nn.Module):
    """`Linear` on a weight in oneDNN's layout, for inputs of about `rows` rows. What inductor uses in frozen models."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = 1):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias, self.rows = bias, rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}  # nothing else of that layout can be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        x = _as(self.weight.dtype, x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """[T, in] -> [T, out], and the activation of that"""
        if activation not in _ACTIVATIONS:
            return ACTIVATIONS[activation](self(x))
        x = _as(self.weight.dtype, x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *_ACTIVATIONS[activation])

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, in], [T, out] -> [T, out], added to `residual`"""
        x, residual = _as(self.weight.dtype, x), _as(self.weight.dtype, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """What a packed product takes: no other dtype, as autocast may make it, and nothing that waits for a gradient."""
    return (x.detach() if x.requires_grad else x).to(dtype)


# What oneDNN calls them, their parameters and their kind.
_ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "gelu_new": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
}


class FusedPostNormBlock(PostNormBlock):
    """`PostNormBlock` of packed maps, without dropout."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = self.attention_norm(self.attention(x, packing, probs, past, packing.kept_of(x)))
        return self.feed_forward_norm(_fed(self.feed_forward, x, x))


class FusedPreNormBlock(PreNormBlock):
    """`PreNormBlock` of packed maps, without dropout."""

    def forward(
        self, x: Tensor, packing: Packing, probs: list[Tensor] | None = None, past: LayerCache | None = None
    ) -> Tensor:
        """As `Block` says."""
        x = self.attention(self.attention_norm(x), packing, probs, past, packing.kept_of(x))
        return _fed(self.feed_forward, self.feed_forward_norm(x), x)


def _fed(feed_forward: Any, x: Tensor, residual: Tensor) -> Tensor:
    """[T, D] twice -> [T, D]"""
    return feed_forward.output.plus(feed_forward.inner.bent(x, feed_forward.activation), residual)


class _FbgemmLinear(nn.Module):
    """What FBGEMM multiplies; additions and activations come after, in float32."""

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """[T, in] -> [T, out], and the activation of that"""
        return ACTIVATIONS[activation](self(x))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, in], [T, out] -> [T, out], added to `residual`"""
        return self(x).add_(_as(torch.float32, residual))


class HalfLinear(_FbgemmLinear):
    """`Linear` on a half precision weight in FBGEMM's layout; inputs, sums and outputs are float32.

    FBGEMM keeps float16: of a bfloat16 weight, numbers below 6e-5 lose digits, at most 3e-8 of their value.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = None if bias is None else bias.detach().float()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        return torch.ops.quantized.linear_dynamic_fp16(_as(torch.float32, x), self.weight)


class Int8Linear(_FbgemmLinear):
    """`Linear` in whole numbers of 8 bits, in FBGEMM's layout: a scale for each row of the weight, and one for each
    token as it comes, so that what becomes of a token does not depend on the others.

    Inputs and outputs are float32. A weight's numbers go from -127 to 127. A token's do too if the CPU has VNNI, else
    from -63 to 63: FBGEMM then adds up two products in 16 bits, which hold 2 * 127 * 127 and cut off what is more.
    Source: Zafrir 2019 (Q8BERT) §3.1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp_(min=_LEAST) / 127  # [out]
        whole = torch.quantize_per_channel(weight, scales.double(), torch.zeros(len(weight)).long(), 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(whole, None)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        self.steps = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        x = _as(torch.float32, x)
        if len(x) == 0:
            return x.new_empty(0, len(self.bias))
        largest = x.abs().amax(1, keepdim=True).clamp_(min=_LEAST)  # [T, 1]: every token is scaled to -1 … 1
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return torch.addcmul(self.bias, product(x / largest, 1 / self.steps, self.steps + 1, self.weight), largest)


_ADDS = (PackedLinear, HalfLinear, Int8Linear)  # maps that have `plus` and `bent`
_FUSED: dict[type, type] = {PostNormBlock: FusedPostNormBlock, PreNormBlock: FusedPreNormBlock}


class PackedWordScores(nn.Module):
    """`WordScores` on the packed table; the one that is handed in is the one that was packed."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear: Any = linear

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, V]"""
        return self.linear(states) if bias is None else self.linear.plus(states, bias.expand(len(states), -1))


def prepacked(model: M, rows: int) -> M:
    """A copy of a model for inference, its linear maps packed by oneDNN for inputs of about `rows` tokens.

    Where that is not possible it is the model itself. The copy costs as much memory as the maps, shares everything else
    with the model, and does not see what becomes of the model's weights afterwards. A part that has hooks, or is of
    another class than those of `layers`, goes on as it is. Dropout is left out where a block's additions are fused.
    """
    if not _onednn_packs(_table(model)) or torch.is_autocast_enabled("cpu"):  # it would cast inputs, no packed weight
        return model
    return _twin(model, lambda weight, bias: PackedLinear(weight, bias, rows))


def accelerate(model: M, dtype: torch.dtype | None = None) -> M:
    """A copy of a model for inference on this CPU, packed once: `accelerate(bertModel("bert-base-uncased"))`.

    It is called as the model is, equals it to the rounding of its dtype, and `acceleration` says what was done. Of a
    language model in half precision, and of any other where the CPU has no products of its dtype, it computes in
    float32 on the half precision weights, and is both faster and nearer to the model in float32 than the model itself.
    Otherwise as `prepacked`. It is in eval mode, has no dropout and gives no gradients.
    dtype: of the packed weights; None: as they are; torch.int8: a quarter of float32's bytes, rounded to 255 steps for
    each row of a weight and each token, everything else in float32; for a token 127 steps where the CPU has no VNNI.
    Best where few tokens read all the weights.
    On a GPU nothing is packed: an encoder in half precision runs its blocks, and a language model the steps of its
    generation, as CUDA graphs.
    Raises InputError for what is no model of this library, is elsewhere, or a dtype that cannot be packed here.
    """
    table = _table(model)
    if not (table.is_cpu or table.is_cuda):
        raise InputError(f"accelerate: expected a model on a CPU or a GPU, got one on {table.device}")
    generates = "scores" in model._modules
    if table.is_cuda:
        if dtype is not None:
            raise InputError(f"accelerate: dtype = {dtype}: expected None on {table.device}, where nothing is packed")
        fast = graphed(model)
    elif dtype is not None:
        _check_int8(model, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deprecated")  # torch has no other way yet to FBGEMM's layout
            fast = _in_float32(_twin(model, Int8Linear))
    elif (generates or not _onednn_packs(table)) and _fbgemm_packs(model):
        fast = _in_float32(_twin(model, HalfLinear))
    else:
        fast = prepacked(model, _TOKENS)
    if fast is model:
        fast = _twin(model, None)
    if dtype is not None and not any(isinstance(part, Int8Linear) for part in fast.modules()):
        raise InputError("accelerate: there is no map left to pack; accelerate the model that this one was made of")
    own = set(model.modules())  # the copy shares those with hooks
    for part in fast.modules():
        if part not in own:
            part.training = False
            kept = part._parameters.items()
            part._parameters = {key: None if p is None else nn.Parameter(p.detach(), False) for key, p in kept}
    fast.acceleration = _told(fast, table)  # type: ignore[assignment]
    return fast


def graphed(model: M, record: Record = record_on_cuda) -> M:
    """A copy that shares everything, and runs as graphs where it can."""
    fast: Any = _twin(model, None)
    if hasattr(fast, "recorder"):
        fast.recorder = record
    transformer, table = getattr(fast, "transformer", fast), _table(model)
    if not transformer.causal and table.itemsize == 2 and has_varlen(table.device):
        transformer.shortcut = GraphedBlocks(transformer.layers, record)
    return fast


def _table(model: nn.Module) -> Tensor:
    """[V, D]"""
    embeddings = getattr(getattr(model, "transformer", model), "embeddings", None)
    if not isinstance(embeddings, Embeddings):
        raise InputError(f"accelerate: expected a model of this library, got a {type(model).__name__}")
    return embeddings.word.weight


def _told(model: nn.Module, table: Tensor) -> str:
    kinds = (PackedLinear, HalfLinear, Int8Linear)
    counts = {kind: sum(isinstance(part, kind) for part in model.modules()) for kind in kinds}
    fused = sum(type(part) in _FUSED.values() for part in model.modules())
    dtype = str(table.dtype).removeprefix("torch.")
    if getattr(model, "recorder", None):
        return "steps of generation without beams are a CUDA graph, from 32 words on and until a row ends"
    if getattr(getattr(model, "transformer", model), "shortcut", None):
        return f"the blocks are CUDA graphs, for numbers of tokens that are at most an eighth apart, in {dtype}"
    if counts[Int8Linear]:
        return f"{counts[Int8Linear]} linear maps packed by FBGEMM in int8 from {dtype}, the rest computed in float32"
    if counts[HalfLinear]:
        return f"{counts[HalfLinear]} linear maps packed by FBGEMM from {dtype}, computed in float32"
    if counts[PackedLinear]:
        return f"{counts[PackedLinear]} linear maps packed by oneDNN in {dtype}, {fused} blocks fused"
    why = "autocast is on" if torch.is_autocast_enabled("cpu") else f"torch has no packed layout of {dtype} here"
    return f"nothing: {why}"


def _twin(model: M, pack: Callable[[Tensor, Tensor | None], nn.Module] | None) -> M:
    """A copy that shares all but its modules and the weights of linear maps; those are packed side by side. None: they
    stay.
    """
    table = _table(model)
    maps: dict[nn.Module, tuple[Any, Any]] = {}
    for part in model.modules() if pack else ():
        if _is_plain(part, Linear):  # not an adapter that was made of one
            maps[part] = (part.weight, part.bias)
        elif _is_plain(part, WordScores):
            maps[part] = (table, None)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        packed = dict(zip(maps, pool.map(lambda part: pack(*maps[part]), maps), strict=True))  # type: ignore[misc]

    def twin(module: nn.Module) -> nn.Module:
        if module in packed:
            return PackedWordScores(packed[module]) if isinstance(module, WordScores) else packed[module]
        if has_hooks(module) and module not in (model, getattr(model, "transformer", model)):
            return module
        copied = copy.copy(module)
        copied.__dict__ |= {key: copy.copy(held) for key, held in vars(module).items() if isinstance(held, dict)}
        copied._modules = {name: part and twin(part) for name, part in module._modules.items()}
        if type(module) in _FUSED and _fuses(copied):
            copied.__class__ = _FUSED[type(module)]
        return copied

    return twin(model)  # type: ignore[return-value]


def _fuses(block: Any) -> bool:
    """Whether a block's parts are as its fused forward calls them: nothing of them replaced or hooked."""
    attention, feed = block.attention, block.feed_forward
    plain = (
        type(attention).forward is Attention.forward and not has_hooks(attention) and "forward" not in vars(attention)
    )
    plain = plain and _is_plain(feed, FeedForward) and _is_plain(block.dropout, nn.Dropout)
    return plain and all(type(m) in _ADDS for m in (attention.output, feed.inner, feed.output))


def _is_plain(part: nn.Module, kind: type) -> bool:
    """Whether it does what its class does, and nobody looks."""
    return type(part) is kind and not has_hooks(part) and "forward" not in vars(part)


def _in_float32(model: M) -> M:
    """A twin with float32 parameters, but for a word table of less: its rows are added to float32 positions."""
    for name, module in model.named_modules():
        if not (name.endswith("embeddings.word") and _table(model).itemsize <= 4) and not has_hooks(module):
            wide = {
                key: None if p is None else nn.Parameter(p.detach().float()) for key, p in module._parameters.items()
            }
            module._parameters = wide
    return model


def _check_int8(model: nn.Module, dtype: torch.dtype) -> None:
    if dtype != torch.int8:
        raise InputError(f"accelerate: dtype = {dtype}: expected None, the model's own, or torch.int8")
    if _table(model).dtype != torch.float32 and any(map(_goes_on, model.modules())):
        raise InputError(
            "accelerate: dtype = torch.int8: parts with hooks or of other classes go on as they are, the rest would be "
            f"float32: expected a model in float32, got one in {_table(model).dtype}"
        )
    if torch.backends.quantized.engine not in _FBGEMM:
        raise InputError(
            f"accelerate: dtype = torch.int8: expected torch.backends.quantized.engine to be {' or '.join(_FBGEMM)}, "
            f"which this CPU may not have; it is {torch.backends.quantized.engine}"
        )


def _goes_on(part: nn.Module) -> bool:
    """Whether a twin's part would stay in the model's dtype."""
    return has_hooks(part) or "forward" in vars(part) or (isinstance(part, nn.Linear) and type(part) is not Linear)


def _fbgemm_packs(model: nn.Module) -> bool:
    """Whether the model is in half precision, fits into float16, and nothing in it goes on as it is."""
    table, parts = _table(model), list(model.modules())
    if table.itemsize != 2 or torch.backends.quantized.engine not in _FBGEMM:
        return False
    if any(map(_goes_on, parts)):
        return False
    return all(float(p.detach().abs().max()) < torch.finfo(torch.float16).max for p in model.parameters())


def _onednn_packs(weight: Tensor) -> bool:
    if not (weight.is_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or half
