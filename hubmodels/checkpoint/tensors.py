"""Tensors in files: what is known of them before they are read, and two ways to read them."""

import ctypes
import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError

LONGEST_HEADER = 100_000_000  # bytes of description in one file; the limit of safetensors' own reader
_scratch = threading.RLock()  # a tensor that is turned and of another dtype wants it twice
MOST_DIMENSIONS = 64  # as torch has for most of what it does; a product of millions would take for ever


class LazyTensor(Protocol):
    """A tensor still in its file: shape and dtype are known, bytes are read on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor: ...

    def read_into(self, target: Tensor) -> None: ...


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a part of a file. `read` maps its bytes, and a write goes to a private copy; `read_into` copies."""

    path: Path
    storage: Any  # torch.UntypedStorage of the whole file
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None  # None: contiguous

    def read(self) -> Tensor:
        if self.begin % self.dtype.itemsize and self.stride is None:  # no format promises alignment
            target = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(target)
            return target
        part = self.storage[self.begin : self.begin + extent(self.shape, self.stride) * self.dtype.itemsize]
        if self.begin % self.dtype.itemsize:
            part = part.clone()
        numbers = torch.empty(0, dtype=self.dtype).set_(part)
        return numbers.view(self.shape) if self.stride is None else numbers.as_strided(self.shape, self.stride)

    def read_into(self, target: Tensor) -> None:
        """Fill a contiguous tensor from the file itself: mapped pages would stay in memory beside the copy."""
        if self.stride is None:
            read_bytes(self.path, self.begin, bytes_of(target))
        else:
            target.copy_(self.read())


def fill(target: Tensor, tensor: LazyTensor) -> None:
    """Read a tensor into a contiguous one of its shape, whatever its dtype."""
    if tensor.dtype == target.dtype:
        tensor.read_into(target)
    else:
        with scratch(tensor.shape, tensor.dtype) as theirs:
            tensor.read_into(theirs)
            target.copy_(theirs)


@contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Memory for a moment, in a mapping of its own that goes back to the system at once. A freed piece of the heap
    would stay as a hole between the parameters. One thread at a time has some: tensors are read side by side, and
    however many threads read, no more than one tensor is in memory twice.
    """
    count = math.prod(shape)
    with _scratch:
        if count * dtype.itemsize < mmap.PAGESIZE:
            yield torch.empty(shape, dtype=dtype)
        else:
            yield torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def extent(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> int:
    """How many numbers of memory a tensor spans."""
    if stride is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def is_shape(shape: Any) -> bool:
    """Whether these are natural numbers, not too many, of which 63 bits hold the product."""
    natural = len(shape) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    return natural and math.prod(n or 1 for n in shape) < 2**63


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def read_bytes(path: Path, begin: int, buffer: memoryview) -> None:
    """Fill `buffer` from the file's byte `begin` on."""
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise CheckpointError(f"{path}: the file became shorter while it was read")
            buffer = buffer[count:]


@dataclass(frozen=True)
class Shard:
    """A file that holds a part of one long list of numbers: those from `first` to `end`, the first at byte `begin`."""

    path: Path
    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor whose numbers stand at `first` and after in a list that is cut into files, at any place."""

    shards: tuple[Shard, ...]
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, target: Tensor) -> None:
        buffer, size = bytes_of(target), self.dtype.itemsize
        end = self.first + math.prod(self.shape)
        for shard in self.shards:
            first, last = max(self.first, shard.first), min(end, shard.end)
            if first < last:
                part = buffer[(first - self.first) * size : (last - self.first) * size]
                read_bytes(shard.path, shard.begin + (first - shard.first) * size, part)


@dataclass(frozen=True)
class TurnedTensor:
    """A matrix that its file has the other way round."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        target = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(target)
        return target

    def read_into(self, target: Tensor) -> None:
        """Not by way of a mapped file, whose pages would stay beside the turned copy."""
        with scratch(self.tensor.shape, self.dtype) as theirs:
            self.tensor.read_into(theirs)
            target.copy_(theirs.t())


@dataclass(frozen=True)
class PartTensor:
    """One of `count` equal parts of a tensor, along its first dimension."""

    tensor: LazyTensor
    number: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0] // self.count, *self.tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        rows = self.shape[0]
        return self.tensor.read()[self.number * rows : (self.number + 1) * rows]

    def read_into(self, target: Tensor) -> None:
        target.copy_(self.read())
