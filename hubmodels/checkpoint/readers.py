"""Checkpoint files -> named tensors, each read from the file only when it is asked for.

Nothing here trusts the file: what it says of a tensor is checked against its size before any byte is mapped, and the
pickle of a .bin is read as data, of which nothing is called. tests/fuzz.py holds these readers to that.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .tensorflow_file import read_tensorflow
from .tensors import LONGEST_HEADER, MOST_DIMENSIONS, LazyTensor, MappedTensor, Shard, ShardedTensor, is_shape
from .torch_file import read_torch

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


def read_checkpoint(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors by name: of a .safetensors, of TensorFlow's .index, of the .index.json of a checkpoint in several
    files, or else of a PyTorch file; or of a directory of OpenAI's shards.

    Raises CheckpointError if it cannot be read.
    """
    if path.is_dir():
        return read_openai(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; it was not written to the end. Fetch or save it again")
    readers: dict[str, Callable[[Path], Mapping[str, LazyTensor]]]
    readers = {".safetensors": read_safetensors, ".index": read_tensorflow, ".json": read_sharded}
    return readers.get(path.suffix, read_torch)(path)


def read_sharded(index: Path) -> dict[str, LazyTensor]:
    """What transformers cuts into files: the index says which tensor is in which of the files beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its files are not named as files beside it")
        if any(name.endswith((".json", ".index")) for name in names):
            raise ValueError("one of its files is an index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected a weight_map, name of a tensor -> name of a file: {error!r}"
        ) from None
    shards = {name: read_checkpoint(index.with_name(name)) for name in names}
    for key, name in places.items():
        if key not in shards[name]:
            raise CheckpointError(f"{index.with_name(name)}: has no {key}, which {index.name} says is in it")
    strays = sorted(f"{key} in {name}" for name, held in shards.items() for key in held if places.get(key) != name)
    if strays:
        raise CheckpointError(f"{index}: does not name {', '.join(strays[:9])}")
    return {key: shards[name][key] for key, name in places.items()}


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
        if length > min(LONGEST_HEADER, size - 8):
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
        if not is_shape(shape) or not is_shape([first]) or not is_shape([end]):
            raise ValueError("shape and data_offsets must be natural numbers of 63 bits, multiplied too")
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


_SHARD = re.compile(r"params_\d+\.npy")
_ROW = re.compile(r"{'descr': '<f4', 'fortran_order': (?:True|False) *, 'shape': \(([0-9]{1,18}),\),? *}\s*")


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
        if not all(len(shape) <= MOST_DIMENSIONS for shape in shapes):
            raise ValueError(f"a shape has at most {MOST_DIMENSIONS} dimensions")
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
        described = first if first < 2**63 else "over 2^63"  # Python refuses to print very long numbers
        raise CheckpointError(
            f"{directory}: {listing.name} describes {described} numbers, the {count} files params_*.npy hold {total}; "
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
            header = file.read(length).decode("latin-1")
        row = _ROW.fullmatch(header)
        if row is None:
            raise ValueError(f"its header is {header.strip()[:200]!r}")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing among the shards beside it") from None
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: expected a .npy of one row of float32: {error}") from None
    begin, size, count = 10 + length, path.stat().st_size, int(row[1])
    if size != (expected := begin + 4 * count):
        raise CheckpointError(f"{path}: expected {expected} bytes for {count} numbers, got {size}; fetch it again")
    return begin, count
