"""TensorFlow's checkpoints, without TensorFlow: PREFIX.index has the names, PREFIX.data-00000-of-00001 … the numbers.

Sources: tensorflow/core/util/tensor_bundle and tensorflow/core/protobuf for what is in them, LevelDB's table_format.md
for the index, snappy's format_description.txt. What a file says is checked against its size before it is used, and
every tensor against its checksum when it is read.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import LONGEST_HEADER, MappedTensor, bytes_of, is_shape

# Source: tensorflow/core/framework/types.proto.
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
_STRING = 7
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"  # of TensorFlow 2: what the variables behind its own keys are called
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of a protobuf


@dataclass(frozen=True)
class BundledTensor:
    """A tensor in a data file. Both ways of reading it compare its checksum."""

    name: str
    tensor: MappedTensor
    checksum: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        tensor = self.tensor.read()
        self._check(tensor)
        return tensor

    def read_into(self, target: Tensor) -> None:
        self.tensor.read_into(target)
        self._check(target)

    def _check(self, tensor: Tensor) -> None:
        found = _masked_crc(bytes_of(tensor))
        if found != self.checksum:
            raise CheckpointError(
                f"{self.tensor.path}: {self.name}: expected checksum {self.checksum:08x}, got {found:08x}; the file is "
                "damaged, fetch it again"
            )


def read_tensorflow(index: Path) -> dict[str, BundledTensor]:
    """The variables of a checkpoint of TensorFlow 1 or 2, by TensorFlow's names, without those that are strings.

    Raises CheckpointError. A tensor's own checksum is compared when it is read.
    """
    try:
        if index.stat().st_size > LONGEST_HEADER:
            raise ValueError(f"it has more than {LONGEST_HEADER} bytes")
        entries = dict(_table(memoryview(index.read_bytes())))
        header = _message(entries.pop(b"", b""))
        found = {name.decode(): _message(entry) for name, entry in entries.items()}
        if header.get(2, 0):
            raise ValueError("its numbers are big-endian")
        bundle = _Bundle(index, header.get(1, 0))
        names = bundle.names(found[_OBJECTS]) if _OBJECTS in found else {}
        numbers = {key: entry for key, entry in found.items() if entry.get(1) != _STRING}
        tensors = {names.get(key, key): bundle.tensor(key, entry) for key, entry in numbers.items()}
        if len(tensors) < len(numbers):
            raise ValueError("two of its variables have one name")
        return tensors
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes the parsers stumble in a dozen ways
        reason = str(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{index}: not the index of a TensorFlow checkpoint, or a damaged one: {reason}. Fetch it again"
        ) from None


class _Bundle:
    """The data files of an index, mapped."""

    def __init__(self, index: Path, shards: Any) -> None:
        if not isinstance(shards, int) or not 0 < shards < 100_000:
            raise ValueError(f"it has {shards!r} data files")
        self._prefix, self._shards = index.with_suffix(""), shards
        self._storages: dict[int, tuple[Path, Any]] = {}

    def tensor(self, name: str, entry: dict[int, Any]) -> BundledTensor:
        if 7 in entry:
            raise CheckpointError(f"{self._prefix}.index: {name} is cut into slices; save the model unpartitioned")
        dtype, shape = _DTYPES.get(entry.get(1, 0)), _shape(entry.get(2, b""))
        if dtype is None:
            raise CheckpointError(f"{self._prefix}.index: {name} has TensorFlow's data type {entry.get(1)}, not known")
        if entry.get(5, 0) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} {list(shape)} of {dtype} has {entry.get(5, 0)} bytes")
        path, storage, begin = self._place(name, entry)
        return BundledTensor(name, MappedTensor(path, storage, begin, shape, dtype), entry.get(6, 0))

    def names(self, entry: dict[int, Any]) -> dict[str, str]:
        """The checkpoint's keys -> the names that its variables had. Source: trackable_object_graph.proto"""
        path, storage, begin = self._place(_OBJECTS, entry)
        text = bytes(storage[begin : begin + entry.get(5, 0)])
        length, at = _varint(text, 0)
        if at + 4 + length != len(text):
            raise ValueError(f"{_OBJECTS} in {path} is not one string")
        found = {}
        for node in _fields(text[at + 4 :], 1):
            for attribute in map(_message, _fields(node, 2)):
                if 2 in attribute and 3 in attribute:
                    found[attribute[3].decode()] = attribute[2].decode()
        return found

    def _place(self, name: str, entry: dict[int, Any]) -> tuple[Path, Any, int]:
        shard, begin, size = entry.get(3, 0), entry.get(4, 0), entry.get(5, 0)
        if not 0 <= shard < self._shards:
            raise ValueError(f"{name} is in data file {shard} of {self._shards}")
        if shard not in self._storages:
            path = Path(f"{self._prefix}.data-{shard:05d}-of-{self._shards:05d}")
            if not path.is_file():
                raise CheckpointError(f"{path}: missing beside {self._prefix.name}.index")
            self._storages[shard] = (path, torch.UntypedStorage.from_file(str(path), False, path.stat().st_size))
        path, storage = self._storages[shard]
        if not 0 <= begin <= begin + size <= storage.nbytes():
            raise CheckpointError(
                f"{path}: {name} ends at byte {begin + size}, the file has {storage.nbytes()}; it is truncated, "
                "fetch it again"
            )
        return path, storage, begin


def _shape(message: bytes) -> tuple[int, ...]:
    shape = tuple(_message(size).get(1, 0) for size in _fields(message, 2))
    if not is_shape(shape):
        raise ValueError(f"a shape is {list(shape)[:9]}")
    return shape


def _masked_crc(data: Any) -> int:
    """As TensorFlow and LevelDB store a CRC32C, which is not to look like data."""
    try:
        from crc32c import crc32c
    except ModuleNotFoundError:
        raise CheckpointError("TensorFlow's checkpoints have checksums of their own kind: pip install crc32c") from None
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table(data: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """A LevelDB table: a footer that leads to an index block, which leads to blocks of pairs."""
    footer = data[-48:]
    if len(footer) < 48 or footer[40:] != _MAGIC:
        raise ValueError("it does not end as one does")
    _, at = _handle(footer, 0)  # of the metaindex, which TensorFlow leaves empty
    for _, value in _block(data, _handle(footer, at)[0]):
        yield from _block(data, _handle(value, 0)[0])


def _handle(data: Any, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: memoryview, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs in order; a key has only what it does not share with the one before."""
    offset, size = handle
    block, kind, crc = data[offset : offset + size], data[offset + size], data[offset + size + 1 : offset + size + 5]
    if len(crc) != 4 or _masked_crc(data[offset : offset + size + 1]) != int.from_bytes(crc, "little"):
        raise ValueError(f"the block at byte {offset} does not have its checksum")
    if kind not in (0, 1):
        raise ValueError(f"the block at byte {offset} is compressed with method {kind}; known is snappy, 1")
    if kind == 1:
        block = memoryview(_unsnappy(block))
    end, at, key = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little"), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + fresh + length > end:
            raise ValueError(f"the block at byte {offset} has a pair that does not fit")
        key = key[:shared] + bytes(block[at : at + fresh])
        yield key, bytes(block[at + fresh : at + fresh + length])
        at += fresh + length


def _unsnappy(data: memoryview) -> bytes:
    """Literals, and copies of what came before."""
    length, at = _varint(data, 0)
    if length > LONGEST_HEADER:
        raise ValueError(f"a block becomes {length} bytes")
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        kind, size = tag & 3, tag >> 2
        if kind == 0:
            if size >= 60:
                wide = size - 59
                size, at = int.from_bytes(data[at : at + wide], "little"), at + wide
            out += data[at : at + size + 1]
            at += size + 1
        else:
            wide = (1, 2, 4)[kind - 1]
            back, at = int.from_bytes(data[at : at + wide], "little"), at + wide
            if kind == 1:
                back, size = back | (size >> 3) << 8, (size & 7) + 3
            if not 0 < back <= len(out):
                raise ValueError("a block copies what is not there")
            for _ in range(size + 1):  # it may copy what it has just written
                out.append(out[-back])
        if len(out) > length:
            raise ValueError("a block becomes longer than it says")
    if len(out) != length:
        raise ValueError("a block becomes shorter than it says")
    return bytes(out)


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _pairs(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf: number and value."""
    at = 0
    value: Any
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise ValueError(f"a message has a field of wire type {kind}")
        if at > len(message):
            raise ValueError("a message ends within a field")
        yield tag >> 3, value


def _message(message: bytes) -> dict[int, Any]:
    """The last value of each field."""
    return dict(_pairs(message))


def _fields(message: bytes, number: int) -> list[bytes]:
    """All values of a field that is repeated."""
    return [value for field, value in _pairs(message) if field == number]
