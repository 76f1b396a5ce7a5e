"""Embeddings and blocks as one encoder: a padded batch in, packed tokens inside, a padded batch out.

Shape letters: see `layers.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypedDict, Unpack

from .errors import InputError
from .layers import Embeddings, Linear, PostNormBlock
from .packing import Packing, packing_of


class EncoderOutput(NamedTuple):
    """last_hidden_state [B, S, D], zeros at padding; pooler_output [B, D] or None; hidden_states: L + 1 of [B, S, D],
    embeddings first, if asked for; attentions: L of [B, H, S, S] if asked for."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Encoded(NamedTuple):
    """What a head gets: states [T, D], where they stand, and the extras of `EncoderOutput`."""

    states: Tensor
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class EncoderOptions(TypedDict, total=False):
    """Keyword arguments that every model passes on to its encoder: see `Encoder.encode`."""

    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    output_hidden_states: bool
    output_attentions: bool


class Encoder(nn.Module):
    """Embeddings, blocks and, if there is one, a pooler.

    `gradient_checkpointing = True` keeps only each block's input in training and computes the rest again on the way
    back (Chen 2016): less memory, about a third more time.
    """

    family: ClassVar[Any]  # set by the family: its `checkpoint.config.Family`
    own_parts: ClassVar[tuple[str, ...]] = ("pooler",)  # may be missing from a checkpoint, and then starts anew
    provenance: Any  # set by loading: its `Provenance`

    def __init__(self, config: Any, embeddings: Embeddings, layers: list[PostNormBlock], pooler: Linear | None):
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.pooler = pooler
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> EncoderOutput:
        """Arguments as for `encode`; everything comes back in the padded batch's shape."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, **options)
        states, packing, hidden_states, attentions = encoded
        pooled = None if self.pooler is None else self.pool(states, packing)
        return EncoderOutput(packing.unpack(states), pooled, hidden_states, attentions)

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
    ) -> Encoded:
        """The encoder's work, on packed tokens.

        input_ids: [B, S]; or else inputs_embeds: [B, S, D].
        attention_mask: [B, S], 1 = token, 0 = padding, which may stand anywhere; or [B, S, S], 1 = row may look at
            column; None: no padding.
        token_type_ids: [B, S] or [1, S], 0 for the first sentence, 1 for the second; None: 0.
        position_ids: [B, S] or [1, S]; None: the column.
        Raises InputError for a shape that does not fit, an id out of range, or a batch longer than the position table.
        """
        words = input_ids if inputs_embeds is None else inputs_embeds
        if words is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give either input_ids [B, S] or inputs_embeds [B, S, D], not both and not neither")
        packing = self._packing(words, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids)
        x = self.embeddings(words, token_type_ids, position_ids, packing)  # [T, D]
        states: list[Tensor] = [x] if output_hidden_states else []  # kept alive only if they are asked for
        probs: list[Tensor] | None = [] if output_attentions else None
        for layer in self.layers:
            run: Callable[..., Tensor] = layer
            if self.gradient_checkpointing and self.training:
                run = partial(checkpoint, layer, use_reentrant=False)
            x = run(x, packing, probs)
            if output_hidden_states:
                states.append(x)
        hidden_states = tuple(packing.unpack(s) for s in states) if output_hidden_states else None
        return Encoded(x, packing, hidden_states, None if probs is None else tuple(probs))

    def pool(self, states: Tensor, packing: Packing) -> Tensor:
        """[T, D] -> [B, D]: tanh of a linear map of each row's first real token"""
        if self.pooler is None:
            raise InputError("this encoder was built without a pooler")
        return torch.tanh(self.pooler(packing.first(states)))

    def _packing(self, words: Tensor, mask: Tensor | None, **companions: Tensor | None) -> Packing:
        if words.dim() != (3 if words.is_floating_point() else 2):
            raise InputError(f"input: expected ids [B, S] or vectors [B, S, D], got shape {tuple(words.shape)}")
        size = self.embeddings.word.embedding_dim
        if words.dim() == 3 and words.shape[2] != size:
            raise InputError(f"inputs_embeds: expected vectors of {size} numbers, got shape {tuple(words.shape)}")
        batch, length = words.shape[:2]
        longest = self.embeddings.position.num_embeddings
        if length > longest:
            raise InputError(
                f"input: {length} tokens in a row, but this model has positions for {longest}; "
                f"shorten the text, for example with tokenizer(texts, max_length={longest})"
            )
        for name, companion in companions.items():
            if companion is not None and tuple(companion.shape) not in ((batch, length), (1, length)):
                raise InputError(
                    f"{name}: expected shape {(batch, length)}, as the input, got {tuple(companion.shape)}"
                )
        return packing_of(batch, length, mask)
