"""Checkpoint files -> named tensors, each read from the file only when it is asked for.

Nothing here trusts the file: a safetensors header is checked before any byte is mapped, a .bin is unpickled with
`weights_only`, which builds tensors and runs no code.
"""

import ast
import ctypes
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .keymap import LazyTensor

# Source: the format's description in the safetensors repository.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's limit


def read_checkpoint(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a .safetensors, or else PyTorch, file, or of a directory of OpenAI's shards, by name.

    Raises CheckpointError if it cannot be read.
    """
    if path.is_dir():
        return read_openai(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; it was not written to the end. Fetch or save it again")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a safetensors file. `read` maps its bytes, and a write goes to a private copy; `read_into` copies."""

    path: Path
    storage: Any  # torch.UntypedStorage of the whole file
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        part = self.storage[self.begin : self.begin + math.prod(self.shape) * self.dtype.itemsize]
        if part.data_ptr() % self.dtype.itemsize:  # the format promises no alignment
            part = part.clone()
        return torch.empty(0, dtype=self.dtype).set_(part).view(self.shape)

    def read_into(self, target: Tensor) -> None:
        """Fill a contiguous tensor from the file itself: mapped pages would stay in memory beside the copy."""
        _read_bytes(self.path, self.begin, _bytes_of(target))


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _read_bytes(path: Path, begin: int, buffer: memoryview) -> None:
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
        buffer, size = _bytes_of(target), self.dtype.itemsize
        end = self.first + math.prod(self.shape)
        for shard in self.shards:
            first, last = max(self.first, shard.first), min(end, shard.end)
            if first < last:
                part = buffer[(first - self.first) * size : (last - self.first) * size]
                _read_bytes(shard.path, shard.begin + (first - shard.first) * size, part)


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory, or mapped by torch, already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.detach()

    def read_into(self, target: Tensor) -> None:
        target.copy_(self.tensor.detach())


def read_safetensors(path: Path) -> dict[str, MappedTensor]:
    """Parse and check the header; the tensors themselves stay in the file."""
    size = os.path.getsize(path)
    header, begin = _header(path, size)
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, first, end = _entry(path, name, entry)
        if not 0 <= first <= end <= size - begin or end - first != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {name} {list(shape)} of {entry['dtype']} needs {math.prod(shape) * dtype.itemsize} bytes and "
                f"stands at {first} to {end}, in a file with {size - begin} bytes of tensors. The file is truncated or "
                "damaged; fetch it again"
            )
        spans.append((first, end, name))
        found[name] = (begin + first, shape, dtype)
    _check_spans(path, sorted(spans), size - begin)
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return {n: MappedTensor(path, storage, first, shape, dtype) for n, (first, shape, dtype) in found.items()}


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's content, and where it ends."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or a truncated one: it says its header has {length} bytes, the file "
                f"has {size}. Fetch or save it again"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: the safetensors header is not JSON ({error}); fetch or save it again"
            ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object as the safetensors header, got a {type(header).__name__}"
        )
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, end)):
            raise ValueError("shape and data_offsets must be natural numbers of 63 bits")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name} is not valid: {error!r}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; known are {', '.join(_DTYPES)}")
    return _DTYPES[dtype], shape, first, end


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Tensors stand one after another, without overlap or gap, and fill the file."""
    end = 0
    for first, last, name in spans:
        if first != end:
            raise CheckpointError(
                f"{path}: {name} begins at byte {first}, where {end} was expected; the file is damaged"
            )
        end = last
    if end != size:
        raise CheckpointError(
            f"{path}: the header describes {end} bytes of tensors, the file has {size}; fetch it again"
        )


def read_torch(path: Path) -> dict[str, HeldTensor]:
    """A state dict saved by torch.save, in today's zip format (mapped) or the one before torch 1.6 (read whole)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle makes torch's unpickler stumble in a dozen ways
        # torch's text advises to run what the file says; of it only the name of what it refused is of use.
        stranger = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if stranger:
            raise CheckpointError(
                f"{path}: refused, because it holds more than tensors and would have to run code to load "
                f"({stranger[1]}). If you trust where it comes from, load it there and save its state_dict() alone"
            ) from None
        reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or a truncated one: {reason}. Fetch it again"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, name -> tensor, got a {type(content).__name__}")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(
            f"{path}: expected a state dict, name -> tensor; not tensors: {', '.join(strangers[:9])}. If one of them "
            "is the model's state dict, load the file and save that one alone"
        )
    return {str(name): HeldTensor(tensor) for name, tensor in content.items()}


_SHARD = re.compile(r"params_\d+\.npy")


def read_openai(directory: Path) -> dict[str, ShardedTensor]:
    """OpenAI's GPT: params_0.npy, params_1.npy … are one list of float32, params_shapes.json says how it is cut.

    The arrays have no names there; here they are params.0, params.1 … A leading 1 in a shape, the width of what was a
    convolution, is left out.
    """
    listing = directory / "params_shapes.json"
    try:
        shapes = json.loads(listing.read_text(encoding="utf-8"))
        if not isinstance(shapes, list) or not all(isinstance(shape, list) for shape in shapes):
            raise ValueError("it is none")
        if not all(type(n) is int and n > 0 for shape in shapes for n in shape):
            raise ValueError("a shape is a list of whole numbers above 0")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{listing}: expected a list of shapes: {error}") from None
    count = sum(_SHARD.fullmatch(path.name) is not None for path in directory.iterdir())
    shards: list[Shard] = []
    for number in range(count):
        path, first = directory / f"params_{number}.npy", shards[-1].end if shards else 0
        begin, length = _npy_header(path)
        shards.append(Shard(path, begin, first, first + length))
    found, first = {}, 0
    for number, shape in enumerate(shapes):
        kept = tuple(shape[1:] if len(shape) == 3 and shape[0] == 1 else shape)
        found[f"params.{number}"] = ShardedTensor(tuple(shards), first, kept, torch.float32)
        first += math.prod(shape)
    total = shards[-1].end if shards else 0
    if total != first:
        raise CheckpointError(
            f"{directory}: {listing.name} describes {first} numbers, the {count} files params_*.npy hold {total}; "
            "fetch them again"
        )
    return found


def _npy_header(path: Path) -> tuple[int, int]:
    """Where the numbers of a one-dimensional float32 .npy begin, and how many there are. Source: numpy.lib.format."""
    try:
        with open(path, "rb") as file:
            start = file.read(10)
            if start[:6] != b"\x93NUMPY" or start[6] != 1:
                raise ValueError("it does not begin as one of version 1 does")
            length = struct.unpack("<H", start[8:])[0]
            header = ast.literal_eval(file.read(length).decode("latin-1"))
        (count,) = header["shape"]
        if header["descr"] != "<f4" or type(count) is not int:
            raise ValueError(f"it holds {header['descr']} of shape {header['shape']}")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing among the shards beside it") from None
    except Exception as error:  # a damaged header makes Python's parser stumble in several ways
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path}: expected a .npy of one row of float32: {reason}") from None
    begin, size = 10 + length, path.stat().st_size
    if size != (expected := begin + 4 * count):
        raise CheckpointError(f"{path}: expected {expected} bytes for {count} numbers, got {size}; fetch it again")
    return begin, count
