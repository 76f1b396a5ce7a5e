"""How well a model knows a text that it did not learn from: figures that two runs, or two batch sizes, can compare.

Masks and pairs are those of seed 0 and epoch 0, a function of the text alone; every figure is a sum over the whole text
divided once, so that it does not depend on how rows are batched or on how many ranks share them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..heads import IGNORED
from .batches import Batches, collate
from .distributed import World
from .objectives import PAIRS, WORDS, answers
from .samples import Sample, Samples


def evaluate(model: nn.Module, samples: Samples, padding: int, *, most: int, world: World) -> dict[str, float]:
    """Held-out figures over one epoch of `samples`, the same on every rank; `most`: tokens of a batch on one.

    loss: the sum of the mean losses, nats. word_loss, perplexity, word_accuracy: of the hidden words, or of those that
    follow; commonest_accuracy: of always guessing the commonest of them; pair_accuracy: of pairs of sentences.
    """
    batches = Batches(
        samples, padding, tokens=most * world.ranks, most=most, seed=0, rank=world.rank, ranks=world.ranks
    )
    totals: dict[str, float] = {}
    labels = np.zeros(0, np.int64)  # how often each word is the right one
    was_training = model.training
    model.eval()
    for step in batches.epoch(0):
        for batch in step:
            inputs = batch.to(world.device).inputs
            losses, right = answers(model, inputs, batch.counts)
            kinds: dict[str, Mapping[str, float]] = {"loss": losses, "right": right, "count": batch.counts}
            for kind, found in kinds.items():
                for name, value in found.items():
                    totals[f"{name} {kind}"] = totals.get(f"{name} {kind}", 0.0) + value
            labels = _counted(labels, batch.inputs["labels"])
    model.train(was_training)
    return _figures(world.sum(totals), float(world.sum_array(labels).max(initial=0)))


def _counted(before: np.ndarray, labels: torch.Tensor) -> np.ndarray:
    found = np.bincount(labels[labels != IGNORED].numpy(), minlength=len(before))
    found[: len(before)] += before
    return found


def _figures(totals: dict[str, float], commonest: float) -> dict[str, float]:
    words = max(totals[f"{WORDS} count"], 1)
    loss = totals[f"{WORDS} loss"] / words
    figures = {
        "loss": loss,
        "word_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "word_accuracy": totals[f"{WORDS} right"] / words,
        "commonest_accuracy": commonest / words,
        "words": words,
    }
    if pairs := totals.get(f"{PAIRS} count"):
        figures["loss"] += totals[f"{PAIRS} loss"] / pairs
        figures["pair_accuracy"] = totals[f"{PAIRS} right"] / pairs
        figures["pairs"] = pairs
    return figures


def pseudo_perplexity(model: nn.Module, samples: Samples, padding: int, mask: int, *, rows: int, most: int) -> float:
    """Each word of `rows` samples hidden alone, all others in sight: exp of the mean loss of a word.

    samples: whole rows, of which `rows` from all over the text are read; most: tokens of a batch.
    Source: Salazar 2020, Masked language model scoring, §2.3.
    """
    device = next(model.parameters()).device
    epoch = samples.epoch(0)
    chosen = np.linspace(0, len(epoch.sizes) - 1, min(rows, len(epoch.sizes))).astype(int)
    loss, words = 0.0, 0
    model.eval()
    for index in chosen:
        sample = epoch.sample(int(index))
        ids = np.where(sample.labels == IGNORED, sample.ids, sample.labels)  # what was hidden comes back
        hidden = [_hidden_at(place, ids, mask) for place in range(1, len(ids) - 1)]
        at_once = max(1, most // len(ids))
        for begin in range(0, len(hidden), at_once):
            batch = collate(hidden[begin : begin + at_once], padding).to(device)
            loss += answers(model, batch.inputs, batch.counts).losses[WORDS]
            words += batch.counts[WORDS]
    return math.exp(min(loss / max(words, 1), 700))


def _hidden_at(place: int, ids: np.ndarray, mask: int) -> Sample:
    labels = np.full_like(ids, IGNORED)
    labels[place] = ids[place]
    return Sample(np.where(labels == IGNORED, ids, mask), labels, None, None)
