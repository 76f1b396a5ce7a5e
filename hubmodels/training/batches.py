"""Samples -> the batches of a run, on one rank or many: which samples are in a step does not depend on who computes it.

A step is so many rows, or as many as fit into so many tokens: a packed model computes no padding, so short rows fill a
step as long ones do, and none looks at another. The ranks share a step, each cuts its part into micro-batches, and
every rank has as many of those as the others. Shape letters: see `layers.py`.
"""

import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from ..heads import IGNORED
from .chance import permutation
from .objectives import count_labels
from .samples import Epoch, Sample, Samples

STOPS = (signal.SIGINT, signal.SIGTERM)  # what asks a run to stop


class MicroBatch(NamedTuple):
    """inputs: arguments of a model's forward, labels among them. counts: what each loss is a mean over. tokens: those
    that are no padding."""

    inputs: dict[str, Tensor]
    counts: dict[str, int]
    tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`"""
        inputs = {name: x.to(device, non_blocking=True) for name, x in self.inputs.items()}
        return self._replace(inputs=inputs)


def collate(samples: Sequence[Sample], padding: int) -> MicroBatch:
    """Rows -> a batch [B, S], padded on the right, rows of one length side by side; without a mask if all are."""
    samples = sorted(samples, key=lambda sample: len(sample.ids))
    shape = (len(samples), len(samples[-1].ids))
    ids, labels = np.full(shape, padding, np.int64), np.full(shape, IGNORED, np.int64)
    types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        real = slice(len(sample.ids))
        ids[row, real], labels[row, real], mask[row, real] = sample.ids, sample.labels, 1
        if sample.token_types is not None:
            types[row, real] = sample.token_types
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    tokens = int(mask.sum())
    if tokens < mask.size:
        columns["attention_mask"] = mask
    if samples[0].token_types is not None:
        columns["token_type_ids"] = types
    if samples[0].next_sentence is not None:
        columns["next_sentence_label"] = np.array([sample.next_sentence for sample in samples])
    inputs = {name: torch.from_numpy(column) for name, column in columns.items()}
    return MicroBatch(inputs, count_labels(inputs), tokens)


class Batches:
    """The steps of a run over `samples`.

    padding: the id of the token that fills rows up. rows, tokens: what a step holds at most, over all ranks; exactly
    one of them. most: tokens of a micro-batch, what a rank has memory for. workers: processes that make batches ahead.
    Raises InputError for sizes that do not fit.
    """

    def __init__(
        self,
        samples: Samples,
        padding: int,
        *,
        rows: int | None = None,
        tokens: int | None = None,
        most: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ):
        if (rows is None) == (tokens is None) or min(most, *(n for n in (rows, tokens) if n is not None)) < 1:
            raise InputError(
                f"rows = {rows}, tokens = {tokens}, most = {most}: expected one of the first two, at least 1"
            )
        self.samples, self.padding, self.seed = samples, padding, seed
        self.rows, self.tokens, self.most = rows, tokens, most
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self._plan: _Plan | None = None

    def steps(self, epoch: int) -> int:
        """In an epoch; the last may be smaller than the others."""
        return len(self.plan(epoch))

    def epoch(self, number: int, begin: int = 0) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step, from step `begin` of the epoch on."""
        plan = self.plan(number)
        loader = DataLoader(
            plan,
            batch_size=None,  # a step is made whole
            sampler=range(begin, len(plan)),
            num_workers=self.workers,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else it draws from the global one
        )
        with _blocked(STOPS):  # a worker is born with what its parent blocks: it may not be told before it is ready
            return iter(loader)

    def plan(self, epoch: int) -> "_Plan":
        """Which samples are in which step; the last one asked for is kept."""
        if self._plan is None or self._plan.number != epoch:
            self._plan = _Plan(self, epoch)
        return self._plan


@contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(worker: int) -> None:
    """A process group is told to stop as a whole: a worker that did would take its rank's step with it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class _Plan(Dataset):
    """One epoch: number of a step -> this rank's micro-batches."""

    def __init__(self, batches: Batches, number: int):
        self.number, self.batches = number, batches
        self.epoch: Epoch = batches.samples.epoch(number)
        self.order = permutation(len(self.epoch.sizes), batches.seed, number)
        if batches.rows is not None:
            self.begins = np.append(np.arange(0, len(self.order), batches.rows), len(self.order))
        else:
            self.begins = np.array(_filled(self.epoch.sizes[self.order], batches.tokens or 0))

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, step: int) -> list[MicroBatch]:
        chosen = self.order[self.begins[step] : self.begins[step + 1]]
        sizes = self.epoch.sizes[chosen]
        parts = _shared(sizes, self.batches.ranks)
        cuts = [_filled(sizes[part], self.batches.most) for part in parts]
        mine, borders = chosen[parts[self.batches.rank]], cuts[self.batches.rank]
        made = [self._made(mine[a:b]) for a, b in pairwise(borders)]
        blank = max(len(cut) for cut in cuts) - 1 - len(made)
        return made + [self._blank(int(chosen[0]))] * blank

    def _made(self, chosen: np.ndarray) -> MicroBatch:
        return collate([self.epoch.sample(int(index)) for index in chosen], self.batches.padding)

    def _blank(self, index: int) -> MicroBatch:
        """A row that nothing is learned from, for a rank that has nothing left while others have."""
        sample = self.epoch.sample(index)
        follows = None if sample.next_sentence is None else IGNORED
        nothing = sample._replace(labels=np.full_like(sample.labels, IGNORED), next_sentence=follows)
        return collate([nothing], self.batches.padding)._replace(tokens=0)


def _filled(sizes: np.ndarray, most: int) -> list[int]:
    """Neighbours of at most `most` tokens together, or one of more: where each group begins, and the end."""
    ends = np.cumsum(sizes, dtype=np.int64)
    begins = [0]
    while begins[-1] < len(sizes):
        before = ends[begins[-1] - 1] if begins[-1] else 0
        begins.append(max(begins[-1] + 1, int(np.searchsorted(ends, before + most, "right"))))
    return begins


def _shared(sizes: np.ndarray, ranks: int) -> list[slice]:
    """Neighbours for each rank, about as many tokens for each."""
    ends = np.cumsum(sizes, dtype=np.int64)
    middles = ends - sizes / 2
    cuts = [int(np.searchsorted(middles, ends[-1] * rank / ranks)) for rank in range(ranks + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]
