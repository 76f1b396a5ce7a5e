"""What a model learns from a batch: each loss as a sum, beside the number that it is a mean over.

Sums are what adds up: over micro-batches, over ranks, over a held-out text. A mean of means would weigh a word of a
short batch more than one of a long batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import IGNORED

WORDS, PAIRS = "words", "pairs"  # what is counted: hidden or following words, and pairs of sentences


class Answers(NamedTuple):
    """losses: the sum of each, in nats. right: how many labels are the model's first guess."""

    losses: dict[str, float]
    right: dict[str, int]


def count_labels(inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """How many labels of each kind a micro-batch has."""
    kinds = {WORDS: inputs["labels"], PAIRS: inputs.get("next_sentence_label")}
    return {name: int((labels != IGNORED).sum()) for name, labels in kinds.items() if labels is not None}


def losses(model: nn.Module, inputs: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The sum of each loss over what `counts` says it is counted over, in nats, with gradients.

    inputs: arguments of the model's forward; `next_sentence_label` makes a loss of its own.
    """
    return _losses(*_forward(model, inputs), counts)


@torch.inference_mode()
def answers(model: nn.Module, inputs: Mapping[str, Tensor], counts: Mapping[str, int]) -> Answers:
    """As `losses`, without gradients; and what was guessed right."""
    output, follows = _forward(model, inputs)
    logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    labels = inputs["labels"]
    if logits.dim() == 2:  # [M, V]: of the hidden words alone, in reading order
        labels = labels[labels != IGNORED]
    else:  # [B, S, V]: each place says which word comes next
        logits, labels = logits[:, :-1], labels[:, 1:]
    right = {WORDS: int((logits.argmax(-1) == labels).sum())}
    if follows is not None:
        right[PAIRS] = int((output.seq_relationship_logits.argmax(-1) == follows).sum())
    return Answers({name: float(loss) for name, loss in _losses(output, follows, counts).items()}, right)


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor | None]:
    """What the model makes of the inputs, and the labels of pairs, which it is not told: it would add up both means."""
    return model(**{name: x for name, x in inputs.items() if name != "next_sentence_label"}), inputs.get(
        "next_sentence_label"
    )


def _losses(output: Any, follows: Tensor | None, counts: Mapping[str, int]) -> dict[str, Tensor]:
    found = {WORDS: output.loss * counts[WORDS]}
    if follows is not None:
        relation = output.seq_relationship_logits
        relation = relation.to(torch.promote_types(relation.dtype, torch.float32))
        found[PAIRS] = F.cross_entropy(relation, follows, ignore_index=IGNORED, reduction="sum")
    return found
