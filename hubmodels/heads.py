"""What stands on an encoder: the eight model classes of the original port, less their family, and their losses.

Every class takes input_ids, attention_mask, token_type_ids and the options of `Transformer.encode`, and returns a named
tuple. With labels it also computes the loss, as the reference does (transformers, modeling_bert.py); -100 marks what
is not labelled.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .errors import InputError
from .layers import ACTIVATIONS, LayerNorm, Linear, WordScores, check_ids
from .transformer import Encoded, Encoder, EncoderOptions, Transformer

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
    """A transformer and something on it. `own_parts`: modules a base checkpoint lacks and that may start fresh."""

    own_parts: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str] = ""  # what config.json calls the class, if it is not the class's name
    provenance: Any  # set by loading: its `Provenance`

    def __init__(self, transformer: Transformer):
        super().__init__()
        self.transformer = transformer

    @property
    def family(self) -> Any:
        return self.transformer.family

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def gradient_checkpointing(self) -> bool:
        """See `Transformer`."""
        return self.transformer.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.transformer.gradient_checkpointing = enabled


class LogitsModel(Model):
    """A model with one kind of logits: what `answer` makes of the encoder's states.

    reads_all: of the tokens' states; else of those with a label, if there are labels.
    """

    reads_all: ClassVar[bool] = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """Inputs and options as for `Transformer.encode`; shapes of labels and logits as the class says."""
        wanted = None if self.reads_all else labelled(labels)
        encoded = self.transformer.encode(input_ids, attention_mask, token_type_ids, **options, wanted=wanted)
        loss, logits = self.answer(encoded, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def answer(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Loss, if there are labels, and logits."""
        raise TypeError(f"{type(self).__name__} does not say what it answers")


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
        self.scores = WordScores()

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """[T, D], [V, D] -> [T, V]"""
        return self.scores(self.norm(ACTIVATIONS[self.activation](self.dense(states))), table, self.bias)

    def predict(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Loss and logits: all positions [B, S, V] without labels [B, S], the labelled ones [M, V] with them."""
        states, packing, table = encoded.states, encoded.packing, encoded.table
        if labels is None:
            return None, packing.unpack(self(states, table))
        check_labels("labels", labels, (packing.batch, packing.length))
        labels = packing.pack(labels)  # [T]
        chosen = (labels != IGNORED).nonzero().squeeze(1)  # [M]
        logits = self(states[chosen], table)
        return cross_entropy(logits, labels[chosen]), logits


class MaskedLM(LogitsModel):
    """Fill in masked words. Adds `head`.

    Without labels: logits [B, S, V], zeros at padding. labels: [B, S], the word to predict, -100 where none; labels at
    padding count as -100. With labels only labelled positions are projected on the vocabulary: logits [M, V], for the M
    labelled positions in reading order.
    """

    own_parts = ("head",)
    reads_all = False

    def __init__(self, encoder: Encoder, head: WordPrediction):
        super().__init__(encoder)
        self.head = head

    def answer(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        return self.head.predict(encoded, labels)


class NextSentencePrediction(LogitsModel):
    """Does the second sentence follow the first? Adds `next_sentence`.

    logits [B, 2]; labels [B]: 0, it does; 1, it is a random one.
    """

    own_parts = ("pooler", "next_sentence")
    transformer: Encoder

    def __init__(self, encoder: Encoder, size: int):
        super().__init__(encoder)
        self.next_sentence = Linear(size, 2)

    def answer(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        return sequence_loss(self.next_sentence(self.transformer.pool(encoded.states, encoded.packing)), labels)


class PreTraining(Model):
    """Both tasks of BERT's pretraining. Adds `head` and `next_sentence`."""

    own_parts = ("pooler", "head", "next_sentence")
    transformer: Encoder

    def __init__(self, encoder: Encoder, head: WordPrediction, size: int):
        super().__init__(encoder)
        self.head = head
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
        """labels as for `MaskedLM`, next_sentence_label [B] as for `NextSentencePrediction`; losses are summed."""
        wanted = labelled(labels)
        encoded = self.transformer.encode(input_ids, attention_mask, token_type_ids, **options, wanted=wanted)
        loss, words = self.head.predict(encoded, labels)
        pooled = self.transformer.pool(encoded.states, encoded.packing)
        follows, relation = sequence_loss(self.next_sentence(pooled), next_sentence_label)
        losses = [part for part in (loss, follows) if part is not None]
        total = torch.stack(losses).sum() if losses else None
        return PreTrainingOutput(total, words, relation, encoded.hidden_states, encoded.attentions)


class SequenceClassification(LogitsModel):
    """One answer per text or pair of texts. Adds `classifier` on the pooled first token.

    logits [B, N]. labels: a class [B]; floats [B, N], a yes or no per class; floats [B] if N = 1, regression.
    """

    own_parts = ("pooler", "classifier")
    transformer: Encoder

    def __init__(self, encoder: Encoder, size: int, num_labels: int, dropout: float):
        super().__init__(encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(size, num_labels)

    def answer(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        pooled = self.transformer.pool(encoded.states, encoded.packing)
        return sequence_loss(self.classifier(self.dropout(pooled)), labels)


class MultipleChoice(SequenceClassification):
    """Which of C candidates? A classifier with one output scores each.

    Inputs have one dimension more, [B, C, S]; so inputs_embeds is [B, C, S, D]. logits [B, C]; labels [B], the right
    candidate. hidden_states and attentions come back for the B * C rows.
    """

    def __init__(self, encoder: Encoder, size: int, dropout: float):
        super().__init__(encoder, size, 1, dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **options: Unpack[EncoderOptions],
    ) -> LogitsOutput:
        """Inputs and options as for `Transformer.encode`, with a dimension of candidates after the batch."""
        inputs, shape = flatten_choices(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **options
        )
        encoded = self.transformer.encode(**inputs)
        logits = self.answer(encoded, None)[1].view(shape)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.shape[:1])
            loss = cross_entropy(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class TokenClassification(LogitsModel):
    """One answer per token. Adds `classifier`. logits [B, S, N], zeros at padding; labels [B, S], -100 where none."""

    own_parts = ("classifier",)

    def __init__(self, encoder: Encoder, size: int, num_labels: int, dropout: float):
        super().__init__(encoder)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(size, num_labels)

    def answer(self, encoded: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        packing = encoded.packing
        logits = self.classifier(self.dropout(encoded.states))  # [T, N]
        if labels is None:
            return None, packing.unpack(logits)
        check_labels("labels", labels, (packing.batch, packing.length))
        return cross_entropy(logits, packing.pack(labels)), packing.unpack(logits)


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
        encoded = self.transformer.encode(input_ids, attention_mask, token_type_ids, **options)
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
        check_labels("start_positions and end_positions", positions.flatten(), (batch,))
        positions = positions.flatten().clamp(0, length)
        at_padding = F.pad(logits, (0, 1)).gather(1, positions[:, None])[:, 0] == torch.finfo(logits.dtype).min
        return cross_entropy(logits, positions.masked_fill((positions == length) | at_padding, IGNORED))


def labelled(labels: Tensor | None) -> Tensor | None:
    """Where there is a label, bool; None where there are none at all."""
    return None if labels is None else labels != IGNORED


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """[M, N], [M] -> mean over the labelled rows; 0 where none is labelled (the reference's mean of nothing is NaN)."""
    known = labels != IGNORED
    check_ids(name, labels.masked_fill(~known, 0), logits.shape[-1], "the head")
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum") / known.sum().clamp(min=1)


def flatten_choices(**inputs: Any) -> tuple[dict[str, Any], torch.Size]:
    """Inputs of C candidates each, [B, C, ...] -> the same as B * C rows, and [B, C]."""
    words = inputs["input_ids"] if inputs["input_ids"] is not None else inputs.get("inputs_embeds")
    if words is None or words.dim() != (4 if words.is_floating_point() else 3):
        got = None if words is None else tuple(words.shape)
        raise InputError(f"input: expected ids [batch, choices, length] or vectors with one more, got shape {got}")
    rows = {}
    for name, x in inputs.items():
        candidates = isinstance(x, Tensor) and not (x.dim() == 2 and len(x) == 1)  # [1, S] holds for every row
        if candidates and x.shape[:3] != words.shape[:3]:
            raise InputError(f"{name}: expected shape {tuple(words.shape[:3])}, as the input, got {tuple(x.shape)}")
        rows[name] = x.flatten(0, 1) if candidates else x
    return rows, words.shape[:2]


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless `labels` has the shape that the head needs."""
    if tuple(labels.shape) != tuple(shape):
        raise InputError(f"{name}: expected shape {tuple(shape)}, got {tuple(labels.shape)}")


def sequence_loss(logits: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Loss and logits [B, N]. N = 1: regression on labels [B]; float labels [B, N]: a yes or no per class; else [B]."""
    batch, classes = logits.shape
    if labels is None:
        return None, logits
    if classes == 1:
        check_labels("labels (num_labels=1: regression)", labels.flatten(), (batch,))
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype)), logits
    if labels.is_floating_point():
        check_labels("labels (float: a yes or no per class)", labels, (batch, classes))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)), logits
    check_labels("labels", labels.flatten(), (batch,))
    return cross_entropy(logits, labels.flatten()), logits
