"""The account of a load: what became of every tensor of the file, and where every parameter of the model comes from."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .tensors import LazyTensor


class Entry(NamedTuple):
    """One line of the account.

    ours, theirs: names, in the model and in the file. shape and dtype are the file's.
    operation: loaded, fused, transposed, "transposed and fused", tied, dropped or new.
    """

    ours: str | None
    theirs: str | None
    operation: str
    shape: tuple[int, ...]
    dtype: str
    because: str = ""

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


class Total(NamedTuple):
    """Names, and the numbers behind them."""

    names: int
    numbers: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]]) -> "Total":
        counts = [math.prod(shape) for shape in shapes]
        return cls(len(counts), sum(counts))


@dataclass(frozen=True)
class Report:
    """Every key of the file and every parameter of the model, accounted for. `print` shows it as a table.

    file, model: what there is on either side, counted there and not in the entries.
    """

    entries: tuple[Entry, ...]
    file: Total
    model: Total

    def count(self, operation: str) -> int:
        return sum(operation in entry.operation.split(" and ") for entry in self.entries)

    def of_the_file(self) -> Total:
        """What the entries account for of the file."""
        entries = [entry for entry in self.entries if entry.theirs is not None]
        return Total(len({entry.theirs for entry in entries}), sum(entry.numbers for entry in entries))

    def of_the_model(self) -> Total:
        """And of the model: what is tied repeats what another entry gives."""
        entries = [entry for entry in self.entries if entry.ours is not None and entry.operation != "tied"]
        return Total(len({entry.ours for entry in entries}), sum(entry.numbers for entry in entries))

    @property
    def is_complete(self) -> bool:
        return (self.of_the_file(), self.of_the_model()) == (self.file, self.model)

    @property
    def summary(self) -> str:
        """How many entries of each operation there are, in one line"""
        operations = dict.fromkeys(entry.operation for entry in self.entries)
        counts = {name: sum(entry.operation == name for entry in self.entries) for name in operations}
        return ", ".join(f"{count} {name}" for name, count in counts.items())

    def __str__(self) -> str:
        head = ("OURS", "THEIRS", "OPERATION", "SHAPE", "DTYPE", "WHY")
        rows = [
            (e.ours or "-", e.theirs or "-", e.operation, "x".join(map(str, e.shape)) or "1", e.dtype, e.because)
            for e in self.entries
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
        sides = (("file", self.of_the_file(), self.file), ("model", self.of_the_model(), self.model))
        return "\n".join([*lines, "", self.summary, *(_total(*side) for side in sides)])


def _total(side: str, found: Total, there: Total) -> str:
    share = "100 %" if found == there else f"NOT ALL, {found.numbers / max(there.numbers, 1):.4%}"
    names, numbers = (f"{one:,} of {whole:,}" for one, whole in zip(found, there, strict=True))
    return f"of the {side}: {names} names, {numbers} numbers: {share}"


class Origin(NamedTuple):
    """Where a tensor under a Hugging Face name stands in its file. turned: it was the other way round there."""

    key: str
    shape: tuple[int, ...]
    turned: bool = False


def origins_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Origin]:
    """Of tensors that are in their file as they are."""
    return {key: Origin(key, tuple(tensor.shape)) for key, tensor in tensors.items()}


def dtype_of(tensor: LazyTensor) -> str:
    """As reports say it: float32"""
    return str(tensor.dtype).removeprefix("torch.")
