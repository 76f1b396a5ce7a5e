"""What stands on a decoder: the next word, and with it the choice between texts. Their losses, and generation.

With labels every class also computes the loss, as the reference does (transformers, modeling_openai.py): a label is the
word at its own place, compared with what was predicted one place before; -100 marks what is not labelled.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from . import generation
from .cache import Cache
from .errors import InputError
from .generation import Ending, Generated, GenerationOptions
from .heads import IGNORED, LogitsOutput, Model, check_labels, cross_entropy, flatten_choices
from .layers import Linear, WordScores, check_ids
from .packing import Packing
from .steps import Steps
from .transformer import Decoder, DecoderOptions


class DoubleHeadsOutput(NamedTuple):
    """loss, mc_loss [] or None; logits [B, C, S, V]; mc_logits [B, C]; the rest as `LogitsOutput`, for B * C rows."""

    loss: Tensor | None
    mc_loss: Tensor | None
    logits: Tensor
    mc_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LanguageModel(Model):
    """Which word comes next? logits [B, S, V], zeros at padding; labels [B, S]: as a rule the input_ids themselves."""

    transformer: Decoder
    steps: Steps | None = None  # set by `accelerate`: who takes the steps of generation

    def __init__(self, decoder: Decoder):
        super().__init__(decoder)
        self.scores = WordScores()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[DecoderOptions],
    ) -> LogitsOutput:
        """Inputs and options as for `Transformer.encode`. The loss is the mean over labels but each row's first."""
        encoded = self.transformer.encode(input_ids, attention_mask, token_type_ids, **options)
        logits = self.scores(encoded.states, encoded.table)  # [T, V]
        loss = None if labels is None else next_word_loss(logits, labels, encoded.packing)
        return LogitsOutput(loss, encoded.packing.unpack(logits), encoded.hidden_states, encoded.attentions)

    def word_scores(self, states: Tensor) -> Tensor:
        """[T, D] -> at least float32 [T, V]"""
        scores = self.scores(states, self.transformer.embeddings.word.weight)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def next_scores(self, tokens: Tensor, positions: Tensor | None, cache: Cache) -> Tensor:
        """Of one more token a row [B], at its position [B, 1], None: the column -> at least float32 [B, V]"""
        encoded = self.transformer.encode(tokens[:, None], position_ids=positions, cache=cache)
        return self.word_scores(encoded.states)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, ending: Ending | None = None, **options: Any
    ) -> list[Generated]:
        """Go on from each prompt: what was added to each, all samples of the first prompt first.

        input_ids [B, S], attention_mask [B, S] with padding anywhere; what is added to a row does not depend on the
        others, unless it is drawn. ending: is given a row's new ids after each and says whether they end there.
        Options: see `GenerationOptions`. No gradients; in train mode dropout is on.
        Raises InputError for a bad option, an empty prompt, or more tokens than the model has positions.
        """
        return generation.generate(self, input_ids, attention_mask, generation_options(options), ending)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, ending: Ending | None = None, **options: Any
    ) -> Iterator[tuple[int, int, bool]]:
        """As `generate`, each token as it comes: (row, id, whether it ends the row)."""
        return generation.stream(self, input_ids, attention_mask, generation_options(options), ending)


class DoubleHeads(LanguageModel):
    """A language model that also chooses between C candidates. Adds `choice` on one token of each.

    Inputs have one dimension more, [B, C, S]. mc_token_ids [B, C]: the column of each candidate's deciding token;
    None: its last real one. labels [B, C, S]; mc_labels [B], the right candidate.
    Source: Radford 2018 §3.2 and §3.3; openai finetune-transformer-lm train.py, clf.
    """

    own_parts = ("choice",)

    def __init__(self, decoder: Decoder, size: int, dropout: float):
        super().__init__(decoder)
        self.dropout = nn.Dropout(dropout)
        self.choice = Linear(size, 1)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        **options: Unpack[DecoderOptions],
    ) -> DoubleHeadsOutput:
        """The two losses come apart: Radford 2018 §3.2 trains on mc_loss + 0.5 * loss."""
        inputs, shape = flatten_choices(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **options
        )
        encoded = self.transformer.encode(**inputs)
        states, packing = encoded.states, encoded.packing
        logits = self.scores(states, encoded.table)  # [T, V]
        loss = None
        if labels is not None:
            check_labels("labels", labels, (*shape, packing.length))
            loss = next_word_loss(logits, labels.flatten(0, 1), packing)
        if mc_token_ids is None:
            deciding = packing.last(states)  # [B * C, D]
        else:
            check_labels("mc_token_ids", mc_token_ids, shape)
            check_ids("mc_token_ids", mc_token_ids, packing.length, "a row")
            real, rows = packing.real(), torch.arange(packing.batch, device=states.device)
            if real is not None and not real[rows, mc_token_ids.flatten()].all():
                raise InputError("mc_token_ids: expected columns of tokens, but some are padding")
            deciding = packing.unpack(states)[rows, mc_token_ids.flatten()]
        mc_logits = self.choice(self.dropout(deciding)).view(shape)
        mc_loss = None
        if mc_labels is not None:
            check_labels("mc_labels", mc_labels, shape[:1])
            mc_loss = cross_entropy(mc_logits, mc_labels, "mc_labels")
        words = packing.unpack(logits).unflatten(0, shape)
        return DoubleHeadsOutput(loss, mc_loss, words, mc_logits, encoded.hidden_states, encoded.attentions)


def generation_options(options: dict[str, Any]) -> GenerationOptions:
    """Keyword arguments -> options. Raises InputError for one that does not exist."""
    known = {field.name for field in dataclasses.fields(GenerationOptions)}
    if unknown := sorted(set(options) - known):
        raise InputError(f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(known))}")
    return GenerationOptions(**options)


def next_word_loss(logits: Tensor, labels: Tensor, packing: Packing) -> Tensor:
    """[T, V], [B, S] -> the mean of what each label's token before it, padding skipped, makes of it."""
    check_labels("labels", labels, (packing.batch, packing.length))
    if packing.offsets is None:
        following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()  # [T]
    else:
        following = F.pad(packing.pack(labels), (0, 1), value=IGNORED)[1:]
        ends = (packing.offsets[1:] - 1)[packing.offsets.diff() > 0].long()
        following = following.index_fill(0, ends, IGNORED)  # a row's last token has nobody to foresee
    return cross_entropy(logits, following)
