"""Embeddings and blocks as one model: a padded batch in, packed tokens inside, a padded batch out.

Shape letters: see `layers.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypedDict, Unpack

from .cache import Cache
from .errors import InputError
from .layers import Block, Embeddings, LayerNorm, Linear, has_hooks
from .packing import Packing, packing_of

# Bytes of the widest tensor between the two maps of a feed-forward, in inference on a CPU; of a larger batch, rows go
# through the blocks in parts. glibc keeps freed memory of up to 32 MiB for the next tensor: larger ones come anew from
# the system, page by page, in each block, which costs a tenth of the whole.
_AT_ONCE = 24 * 2**20


class EncoderOutput(NamedTuple):
    """last_hidden_state [B, S, D], zeros at padding; pooler_output [B, D] or None; hidden_states: L + 1 of [B, S, D],
    embeddings first, if asked for; attentions: L of [B, H, S, S] if asked for."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DecoderOutput(NamedTuple):
    """As `EncoderOutput`, without a pooler's. With a cache, attentions look at all its columns: [B, H, S, columns]."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Encoded(NamedTuple):
    """What a head gets: states [T, D], where they stand, the extras of `EncoderOutput`, and the word table [V, D], for
    one that scores every word."""

    states: Tensor
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    table: Tensor


class EncoderOptions(TypedDict, total=False):
    """Keyword arguments that every model passes on to its transformer: see `Transformer.encode`."""

    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    output_hidden_states: bool
    output_attentions: bool


class DecoderOptions(EncoderOptions, total=False):
    """Those of a decoder."""

    cache: Cache | None


class Shortcut(Protocol):
    """Who takes tokens through all blocks of a transformer at once: set by `accelerate`, asked where nobody sees what
    is between them.
    """

    @property
    def blocks(self) -> nn.ModuleList: ...

    def __call__(self, x: Tensor, packing: Packing) -> Tensor | None:
        """[T, D] -> [T, D]; None: these tokens are to go block by block."""


class Transformer(nn.Module):
    """Embeddings, blocks and, if there is one, a norm after the last.

    `gradient_checkpointing = True` keeps only each block's input in training and computes the rest again on the way
    back (Chen 2016): less memory, about a third more time.
    """

    family: ClassVar[Any]  # set by the family: its `checkpoint.config.Family`
    own_parts: ClassVar[tuple[str, ...]] = ()  # may be missing from a checkpoint, and then start anew
    architecture: ClassVar[str] = ""  # what config.json calls the class, if it is not the class's name
    causal: ClassVar[bool] = False
    provenance: Any  # set by loading: its `Provenance`
    shortcut: Shortcut | None = None

    def __init__(self, config: Any, embeddings: Embeddings, layers: Sequence[Block], norm: LayerNorm | None = None):
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.gradient_checkpointing = False

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Encoded:
        """The work between ids and states, on packed tokens.

        input_ids: [B, S]; or else inputs_embeds: [B, S, D].
        attention_mask: [B, S], 1 = token, 0 = padding, anywhere; or [B, S, S], 1 = row sees column; None: no padding.
        token_type_ids: [B, S] or [1, S]; BERT: 0 for the first sentence, 1 for the second, None: 0; GPT: one more word
            at each place, None: none.
        position_ids: [B, S] or [1, S]; None: the column.
        cache: of a decoder, from its `new_cache`. What it holds comes before the input, and the input is added to it;
            input and masks are those of the new columns alone. Gradients do not reach what it holds.
        wanted: [B, S] bool, whose states are read, beside each row's first. In training the last block makes no others,
            which spares it most of its work, and states and packing are those.
        Raises InputError for a shape that does not fit, an id out of range, or a batch longer than the position table.
        """
        words = _either(input_ids, inputs_embeds)
        begin = 0 if cache is None else self._begin_of(cache)
        packing = self._packing(words, attention_mask, begin, token_type_ids=token_type_ids, position_ids=position_ids)
        words, table = self.embeddings.look_up(words, packing)
        x = self.embeddings(words, token_type_ids, position_ids, packing, begin)  # [T, D]
        if cache is not None:
            cache.begin(packing)
        states: list[Tensor] | None = [x] if output_hidden_states else None  # kept alive only if they are asked for
        probs: list[Tensor] | None = [] if output_attentions else None
        done: list[Tensor] = []
        parts, fewer = [(slice(None), packing)], None
        if cache is None and states is None and probs is None:
            parts, done, fewer = self._unseen(x, packing, wanted)
        kept, packing = (None, packing) if fewer is None else fewer
        again = self.gradient_checkpointing and self.training
        for where, part in parts:
            y = x[where]
            for number, layer in enumerate(self.layers):
                run: Callable[..., Tensor] = partial(checkpoint, layer, use_reentrant=False) if again else layer
                past = None if cache is None else cache.layers[number]
                is_cut = kept is not None and number == len(self.layers) - 1
                y = run(y, part._replace(kept=kept) if is_cut else part, probs, past)
                if states is not None:
                    states.append(y)
            done.append(y)
        x = done[0] if len(done) == 1 else torch.cat(done)
        if self.norm is not None:
            x = self.norm(x)
            if states is not None:
                states[-1] = x
        if cache is not None:
            cache.length += packing.length
        hidden_states = None if states is None else tuple(packing.unpack(s) for s in states)
        return Encoded(x, packing, hidden_states, None if probs is None else tuple(probs), table)

    def _unseen(
        self, x: Tensor, packing: Packing, wanted: Tensor | None
    ) -> tuple[list[tuple[slice, Packing]], list[Tensor], tuple[Tensor, Packing] | None]:
        """Where nobody sees what is between the blocks: what goes through them, and what went by the shortcut instead;
        and which tokens the last block finishes."""
        if (cut := self.shortcut) and cut.blocks is self.layers and (short := cut(x, packing)) is not None:
            return [], [short], None
        if self._may_part(x, most := _AT_ONCE // (4 * x.shape[1] * x.itemsize)):
            return packing.parts(most), [], None
        fewer = None if wanted is None or not self._may_leave_out(wanted, packing) else packing.keep(wanted)
        return [(slice(None), packing)], [], fewer

    def _may_part(self, x: Tensor, most: int) -> bool:
        """Whether a batch of more than `most` tokens may go through the blocks row by row and nobody sees it."""
        if not x.is_cpu or x.requires_grad or self.training or torch.compiler.is_compiling():
            return False
        return len(x) > most and not any(has_hooks(part) for part in self.layers.modules())

    def _may_leave_out(self, wanted: Tensor, packing: Packing) -> bool:
        """Whether the last block may make no more than the states that are wanted."""
        fits = wanted.shape == (packing.batch, packing.length)
        return self.training and fits and len(self.layers) > 0 and not torch.compiler.is_compiling()

    def _begin_of(self, cache: Cache) -> int:
        if not self.causal:
            raise InputError("cache: an encoder's tokens look at those after them too, so nothing of them can be kept")
        if self.gradient_checkpointing and self.training:
            raise InputError("cache: gradient_checkpointing would fill it twice; switch one of them off")
        heads, size = self.config.num_attention_heads, self.embeddings.word.embedding_dim
        if [layer.kept.shape[2::2] for layer in cache.layers] != [(heads, size // heads)] * len(self.layers):
            raise InputError("cache: it was made for a model of another shape; take new_cache(batch, room) of this one")
        return cache.length

    def _packing(self, words: Tensor, mask: Tensor | None, begin: int, **companions: Tensor | None) -> Packing:
        if words.dim() != (3 if words.is_floating_point() else 2):
            raise InputError(f"input: expected ids [B, S] or vectors [B, S, D], got shape {tuple(words.shape)}")
        size = self.embeddings.word.embedding_dim
        if words.dim() == 3 and words.shape[2] != size:
            raise InputError(f"inputs_embeds: expected vectors of {size} numbers, got shape {tuple(words.shape)}")
        batch, length = words.shape[:2]
        longest = self.embeddings.position.num_embeddings
        if begin + length > longest:
            held = f", {begin} of them in the cache" if begin else ""
            raise InputError(
                f"input: {begin + length} tokens in a row{held}, but this model has positions for {longest}; "
                f"shorten the text, for example with tokenizer(texts, max_length={longest})"
            )
        for name, companion in companions.items():
            if companion is not None and tuple(companion.shape) not in ((batch, length), (1, length)):
                raise InputError(
                    f"{name}: expected shape {(batch, length)}, as the input, got {tuple(companion.shape)}"
                )
        return packing_of(batch, length, mask, self.causal)


class Encoder(Transformer):
    """Every token sees every other. `pooler`: makes one vector of a row, if there is one."""

    own_parts = ("pooler",)

    def __init__(self, config: Any, embeddings: Embeddings, layers: Sequence[Block], pooler: Linear | None):
        super().__init__(config, embeddings, layers)
        self.pooler = pooler

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> EncoderOutput:
        """Arguments as for `encode`; everything comes back in the padded batch's shape."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, **options)
        states, packing, hidden_states, attentions, _ = encoded
        pooled = None if self.pooler is None else self.pool(states, packing)
        return EncoderOutput(packing.unpack(states), pooled, hidden_states, attentions)

    def pool(self, states: Tensor, packing: Packing) -> Tensor:
        """[T, D] -> [B, D]: tanh of a linear map of each row's first real token"""
        if self.pooler is None:
            raise InputError("this encoder was built without a pooler")
        return torch.tanh(self.pooler(packing.first(states)))


class Decoder(Transformer):
    """Every token sees those before it and itself."""

    causal = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Unpack[DecoderOptions],
    ) -> DecoderOutput:
        """Arguments as for `encode`; everything comes back in the padded batch's shape."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, **options)
        return DecoderOutput(encoded.packing.unpack(encoded.states), encoded.hidden_states, encoded.attentions)

    def new_cache(self, batch: int, room: int) -> Cache:
        """An empty cache for `batch` rows of at most `room` tokens, on the model's device.

        On a CPU half precision is kept as float32: torch's attention of one token on many is several times faster so.
        """
        if any(type(number) is not int or number < 0 for number in (batch, room)):
            raise InputError(f"new_cache({batch!r}, {room!r}): expected two whole numbers, rows and tokens")
        table, heads = self.embeddings.word.weight, self.config.num_attention_heads
        dtype = torch.float32 if table.is_cpu and table.itemsize == 2 else table.dtype
        size = table.shape[1] // heads
        return Cache(len(self.layers), batch, heads, room, size, device=table.device, dtype=dtype)


def _either(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    words = input_ids if inputs_embeds is None else inputs_embeds
    if words is None or (input_ids is not None and inputs_embeds is not None):
        raise InputError("give either input_ids [B, S] or inputs_embeds [B, S, D], not both and not neither")
    return words
