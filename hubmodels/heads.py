"""What stands on an encoder: the eight model classes of the original port, less their family, and their losses.

Every class takes input_ids, attention_mask, token_type_ids and the options of `Encoder.encode`, and returns a named
tuple. With labels it also computes the loss, as the reference does (transformers, modeling_bert.py); -100 marks what
is not labelled.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .errors import InputError
from .layers import ACTIVATIONS, Encoder, EncoderOptions, LayerNorm, Linear, check_ids

IGNORED = -100  # the label that says: no label here


class LogitsOutput(NamedTuple):
    """loss [] or None; logits, shape by class; hidden_states and attentions as in `EncoderOutput`."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PreTrainingOutput(NamedTuple):
    """prediction_logits as `MaskedLM`'s logits, seq_relationship_logits [B, 2]."""

    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QuestionAnsweringOutput(NamedTuple):
    """start_logits, end_logits [B, S]; the dtype's lowest number at padding, so that no answer begins or ends there."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Model(nn.Module):
    """An encoder and something on it. `own_parts`: modules a base checkpoint lacks and that may start fresh."""

    own_parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    @property
    def family(self) -> Any:
        return self.encoder.family

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def gradient_checkpointing(self) -> bool:
        """See `Encoder`."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.encoder.gradient_checkpointing = enabled


class WordPrediction(nn.Module):
    """States -> a score for every word. The output matrix is the word table itself, handed in, not a tied copy.

    Source: Devlin 2018 §3.1, task 1; google run_pretraining.py, get_masked_lm_output.
    """

    def __init__(self, size: int, words: int, activation: str, eps: float):
        super().__init__()
        self.dense = Linear(size, size)
        self.norm = LayerNorm(size, eps=eps)
        self.bias = nn.Parameter(torch.empty(words))
        self.activation = activation

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """[T, D], [V, D] -> [T, V]"""
        return F.linear(self.norm(ACTIVATIONS[self.activation](self.dense(states))), table, self.bias)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[M, N], [M] -> mean over the labelled rows; 0 where none is labelled (the reference's mean of nothing is NaN)."""
    labelled = labels != IGNORED
    check_ids("labels", labels[labelled], logits.shape[-1], "the head")
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labelled.sum().clamp(min=1)


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless `labels` has the shape that the head needs."""
    if tuple(labels.shape) != tuple(shape):
        raise InputError(f"{name}: expected shape {tuple(shape)}, got {tuple(labels.shape)}")


class MaskedLM(Model):
    """Fill in masked words. Adds `head`."""

    own_parts = ("head",)

    def __init__(self, encoder: Encoder, head: WordPrediction):
        super().__init__(encoder)
        self.head = head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """Without labels: logits [B, S, V], zeros at padding.

        labels: [B, S], the word to predict, -100 where none; labels at padding count as -100. Only labelled positions
        are projected on the vocabulary: logits [M, V], M labelled positions in reading order.
        """
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        loss, logits = self._predict(encoded.states, encoded.packing, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def _predict(self, states, packing, labels):
        table = self.encoder.embeddings.word.weight
        if labels is None:
            return None, packing.unpack(self.head(states, table))
        check_labels("labels", labels, (packing.batch, packing.length))
        labels = packing.pack(labels)
        chosen = (labels != IGNORED).nonzero().squeeze(1)  # [M]
        logits = self.head(states[chosen], table)
        return cross_entropy(logits, labels[chosen]), logits


class NextSentencePrediction(Model):
    """Does the second sentence follow the first? Adds `next_sentence`. Class 0: it does; 1: it is a random one."""

    own_parts = ("pooler", "next_sentence")

    def __init__(self, encoder: Encoder, size: int):
        super().__init__(encoder)
        self.next_sentence = Linear(size, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """logits [B, 2]; labels [B], 0 = is next, 1 = is random"""
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        logits = self.next_sentence(self.encoder.pool(encoded.states, encoded.packing))
        loss = None if labels is None else sequence_loss(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class PreTraining(MaskedLM):
    """Both tasks of BERT's pretraining. Adds `head` and `next_sentence`."""

    own_parts = ("pooler", "head", "next_sentence")

    def __init__(self, encoder: Encoder, head: WordPrediction, size: int):
        super().__init__(encoder, head)
        self.next_sentence = Linear(size, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> PreTrainingOutput:
        """labels as for `MaskedLM`, next_sentence_label [B] as for `NextSentencePrediction`; the losses are summed."""
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        loss, words = self._predict(encoded.states, encoded.packing, labels)
        relation = self.next_sentence(self.encoder.pool(encoded.states, encoded.packing))
        if next_sentence_label is not None:
            follows = sequence_loss(relation, next_sentence_label)
            loss = follows if loss is None else loss + follows
        return PreTrainingOutput(loss, words, relation, encoded.hidden_states, encoded.attentions)


def sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, N]. N = 1: regression on labels [B]; float labels [B, N]: one yes or no per class; else a class [B]."""
    batch, classes = logits.shape
    if classes == 1:
        check_labels("labels (num_labels=1: regression)", labels.view(-1), (batch,))
        return F.mse_loss(logits.view(-1), labels.view(-1).to(logits.dtype))
    if labels.is_floating_point():
        check_labels("labels (float: a yes or no per class)", labels, (batch, classes))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    check_labels("labels", labels.view(-1), (batch,))
    return cross_entropy(logits, labels.view(-1))


class SequenceClassification(Model):
    """One answer per text or pair of texts. Adds `classifier` on the pooled first token."""

    own_parts = ("pooler", "classifier")

    def __init__(self, encoder: Encoder, size: int, num_labels: int, dropout: float):
        super().__init__(encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(size, num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """logits [B, N]; labels: class [B], or floats [B, N] for several classes at once, or floats [B] if N = 1"""
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        logits = self.classifier(self.dropout(self.encoder.pool(encoded.states, encoded.packing)))
        loss = None if labels is None else sequence_loss(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class MultipleChoice(Model):
    """Which of C candidates? Adds `classifier`, which scores each."""

    own_parts = ("pooler", "classifier")

    def __init__(self, encoder: Encoder, size: int, dropout: float):
        super().__init__(encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(size, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """input_ids and its companions [B, C, S], inputs_embeds [B, C, S, D]; logits [B, C]; labels [B], the right one

        hidden_states and attentions come back for the B * C rows.
        """
        words = input_ids if input_ids is not None else inputs_embeds
        if words is None or words.dim() != (4 if words.is_floating_point() else 3):
            got = None if words is None else tuple(words.shape)
            raise InputError(f"input: expected ids [batch, choices, length] or vectors with one more, got shape {got}")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ids, mask, types, positions, vectors = (None if t is None else t.flatten(0, 1) for t in inputs)
        encoded = self.encoder.encode(ids, mask, types, position_ids=positions, inputs_embeds=vectors, **options)
        scores = self.classifier(self.dropout(self.encoder.pool(encoded.states, encoded.packing)))
        logits = scores.view(words.shape[:2])
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.shape[:1])
            loss = cross_entropy(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class TokenClassification(Model):
    """One answer per token. Adds `classifier`."""

    own_parts = ("classifier",)

    def __init__(self, encoder: Encoder, size: int, num_labels: int, dropout: float):
        super().__init__(encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(size, num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """logits [B, S, N], zeros at padding; labels [B, S], -100 where none"""
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        packing = encoded.packing
        logits = self.classifier(self.dropout(encoded.states))  # [T, N]
        loss = None
        if labels is not None:
            check_labels("labels", labels, (packing.batch, packing.length))
            loss = cross_entropy(logits, packing.pack(labels))
        return LogitsOutput(loss, packing.unpack(logits), encoded.hidden_states, encoded.attentions)


class QuestionAnswering(Model):
    """Where in the text does the answer begin and end? Adds `qa_outputs`. Source: Devlin 2018 §4.2."""

    own_parts = ("qa_outputs",)

    def __init__(self, encoder: Encoder, size: int):
        super().__init__(encoder)
        self.qa_outputs = Linear(size, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> QuestionAnsweringOutput:
        """start_positions, end_positions: [B], columns of the padded batch.

        As in the reference a position below 0 counts as 0, one of S or more as no label; here one at padding too.
        """
        encoded = self.encoder.encode(input_ids, attention_mask, token_type_ids, **options)
        packing = encoded.packing
        scores = self.qa_outputs(encoded.states)  # [T, 2]
        start, end = packing.unpack(scores, fill=torch.finfo(scores.dtype).min).unbind(-1)  # [B, S]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (self._loss(start, start_positions) + self._loss(end, end_positions)) / 2
        return QuestionAnsweringOutput(loss, start, end, encoded.hidden_states, encoded.attentions)

    @staticmethod
    def _loss(logits: Tensor, positions: Tensor) -> Tensor:
        batch, length = logits.shape
        check_labels("start_positions and end_positions", positions.view(-1), (batch,))
        positions = positions.view(-1).clamp(0, length)
        at_padding = F.pad(logits, (0, 1)).gather(1, positions[:, None])[:, 0] == torch.finfo(logits.dtype).min
        return cross_entropy(logits, positions.masked_fill((positions == length) | at_padding, IGNORED))
