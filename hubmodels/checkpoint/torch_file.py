"""A .bin of PyTorch, of either format -> named tensors, without running anything that it holds."""

import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..errors import CheckpointError
from .tensors import LONGEST_HEADER, MappedTensor, extent, is_shape


class _Storage(NamedTuple):
    """What a .bin says of one of its storages."""

    dtype: torch.dtype
    key: str
    numbers: int


class _Saved(NamedTuple):
    """What a .bin says of one of its tensors. first: the number in its storage at which it begins."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Stranger:
    """Where an object stood that is no part of a tensor, and that only code would make. name: of its class or function.

    Nothing is called, and what would have been put into it is dropped.
    """

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name


class _Refused(Exception):
    """Why a file that may well be whole is not read."""


# What stands beside the model in the dict of a training's checkpoint.
OF_THE_TRAINING = re.compile(
    r"(optim|optimizers?|optimizer_states?|(last_)?optimizer_state(_dict)?|lr_schedulers?|scheduler(_state_dict)?|scaler"
    r"|callbacks|checkpoint_callback_best_model_score|loops|native_amp_scaling_state|((cuda|torch)_)?rng_states?"
    r"|loss|(datamodule_)?hyper_parameters)(\..*)?",
    re.DOTALL,
)
_MOST_LETTERS = 1 << 24  # of all names together: with its memo a pickle repeats a long one in two bytes
_WAY_OUT = "If you trust where it comes from, load it there and save its state_dict() alone"


def read_torch(path: Path) -> dict[str, MappedTensor]:
    """The tensors that torch.save saved, in today's zip format or the one before torch 1.6.

    Of dicts and lists in dicts, such as a training's checkpoint, a tensor's name is its path: state_dict.pooler.weight.
    What else there is beside tensors is left out. The pickle is not given to torch.load: under `weights_only` too,
    there are files that make it crash, hang, ask for any amount of memory, or take one tensor's bytes for another's.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content, places = _zipped(file, data) if data[:4] == b"PK\3\4" else _legacy(data)
        tensors = _flat(content) if isinstance(content, dict) else {}
    except _Refused as refused:
        raise CheckpointError(f"{path}: refused, because {refused}. {_WAY_OUT}") from None
    except Exception as error:  # a damaged file makes the parsers stumble in a dozen ways
        reason = str(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or a truncated one: {reason}. Fetch it again"
        ) from None
    if isinstance(content, _Stranger):
        raise CheckpointError(
            f"{path}: refused, because it holds a whole object, a {content.name}, whose code would have to run. "
            f"{_WAY_OUT}"
        )
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, _Saved) else type(content).__name__
        raise CheckpointError(f"{path}: expected a state dict, name -> tensor, got a {kind}")
    if content and all(OF_THE_TRAINING.fullmatch(name) for name in tensors):
        kinds = [(name, getattr(value, "name", type(value).__name__)) for name, value in content.items()]
        found = ", ".join(f"{name}, a {kind}" for name, kind in kinds[:9])
        raise CheckpointError(f"{path}: expected a state dict, name -> tensor; got no tensor, but {found}. {_WAY_OUT}")
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    return {name: _mapped(path, storage, name, saved, places) for name, saved in tensors.items()}


def _flat(content: dict[Any, Any]) -> dict[str, _Saved]:
    """Tensors by their paths. A dict or list counts once: a short file could hold the same one a million times, or
    itself.
    """
    tensors: dict[str, _Saved] = {}
    waiting: list[tuple[str, Any]] = [("", content)]
    seen, letters = {id(content)}, 0
    for path, value in waiting:  # it grows on the way
        if isinstance(value, _Saved):
            if path in tensors:
                raise ValueError(f"two of its tensors are called {path}")
            tensors[path] = value
            continue
        if isinstance(value, dict) and all(isinstance(each, _Saved | _Stranger) for each in value.values()):
            _check_state_dict(path, value)
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, _Stranger) or not isinstance(each, _Saved | dict | list) or id(each) in seen:
                continue
            if not isinstance(each, _Saved):
                seen.add(id(each))
            waiting.append((f"{path}.{name}" if path else str(name), each))
            letters += len(waiting[-1][0])
            if letters > _MOST_LETTERS:
                raise ValueError(f"the names of its tensors have more than {_MOST_LETTERS} letters")
    return tensors


def _check_state_dict(path: str, content: dict[Any, Any]) -> None:
    """An object among tensors, and nothing else, is likely to be a tensor too, of a kind that is not read."""
    strangers = [(name, value.name) for name, value in content.items() if isinstance(value, _Stranger)]
    if strangers and len(strangers) < len(content) and not OF_THE_TRAINING.fullmatch(path):
        name, kind = strangers[0]
        where = f"{path}.{name}" if path else str(name)
        raise _Refused(f"{where} is a {kind}, whose code would have to run")


def _mapped(path: Path, storage: Any, name: str, saved: _Saved, places: dict[str, tuple[int, int]]) -> MappedTensor:
    """A tensor where its storage stands in the file. Repeated numbers (stride 0) must not make it larger than that."""
    of, first, shape, stride, dtype = saved
    begin, size = places.get(of.key, (0, 0))
    needed = (first + extent(shape, stride)) * dtype.itemsize
    large = math.prod(shape) * dtype.itemsize > storage.nbytes()
    if of.numbers * of.dtype.itemsize != size or needed > size or large:
        raise CheckpointError(
            f"{path}: {name} {list(shape)} of {dtype} with stride {list(stride)} needs {needed} bytes of storage "
            f"{of.key}, said to hold {of.numbers} {of.dtype}; it has {size} bytes. The file is truncated or damaged; "
            "fetch it again"
        )
    contiguous = 0 in shape or torch.empty(shape, device="meta").stride() == stride
    return MappedTensor(path, storage, begin + first * dtype.itemsize, shape, dtype, None if contiguous else stride)


def _zipped(file: IO[bytes], data: mmap.mmap) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What data.pkl says, and where each storage stands: as it is, not compressed, and under a name of its own."""
    places: dict[str, tuple[int, int]] = {}
    texts = {"byteorder": b"little"}
    for info in zipfile.ZipFile(file).infolist():
        start, name = info.header_offset + 30, info.filename.partition("/")[2]
        length, extra = (int.from_bytes(data[at : at + 2], "little") for at in (start - 4, start - 2))
        begin, end = start + length + extra, start + length + extra + info.file_size
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        there = 30 <= start <= end <= len(data) and data[start : start + length] == info.orig_filename.encode()
        if not stored or info.flag_bits & 1 or not there or name in places:  # flag 1: encrypted
            raise ValueError(f"{info.filename} does not stand in it as torch.save writes it")
        places[name] = begin, info.file_size
        if name in ("data.pkl", "byteorder"):
            texts[name] = data[begin:end]
            if zlib.crc32(texts[name]) != info.CRC:
                raise ValueError(f"{info.filename} is damaged")
    if "data.pkl" not in texts or texts["byteorder"] != b"little":
        raise ValueError("there is no data.pkl in it, or its numbers are big-endian")
    content = _unpickle(io.BytesIO(texts["data.pkl"]), [])
    return content, {name.removeprefix("data/"): place for name, place in places.items()}


def _legacy(data: mmap.mmap) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Five pickles, of which the fourth is the content, then the storages, each after the count of its numbers."""
    storages: list[_Storage] = []
    magic, version, _machine, content, keys = (_unpickle(data, storages) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise ValueError("it does not begin as one does")
    widths = {storage.key: storage.dtype.itemsize for storage in storages}
    at, places = data.tell(), {}
    for key in keys:
        if not isinstance(key, str) or key not in widths:  # a stranger's: where it ends is not known, nor of use
            break
        places[key] = at + 8, struct.unpack("<q", data[at : at + 8])[0] * widths[key]
        at = sum(places[key])
        if not places[key][0] <= at <= len(data):
            raise ValueError(f"storage {key} ends at byte {at} of {len(data)}")
    return content, places


# Operations that take from the stack all that is above a mark.
_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS", "ADDITEMS", "FROZENSET", "POP_MARK"}
_TAKEN = {
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BINPERSID": 1},
    **{"REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "POP": 1, "STACK_GLOBAL": 2},
}
_ARGUMENTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_MADE: dict[str, Callable[[], Any]] = {
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple},
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), lambda: _Stranger("set")),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _unpickle(stream: Any, storages: list[_Storage]) -> Any:
    """The object of the stream's next pickle. Only what is in `_NAMES` is called, so no code of the file's runs; what
    else it would make is a `_Stranger`. storages: to be filled with those that it names.

    The operations are those that torch.save writes, of its own and of newer protocols. Source: Python's pickletools,
    which parts and describes them.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for operation, argument, at in pickletools.genops(stream):
        name = operation.name
        if (at or 0) > LONGEST_HEADER:
            raise ValueError(f"its pickle has more than {LONGEST_HEADER} bytes")
        if name in _TO_MARK:
            items, stack = stack, marks.pop()
        else:
            items = [stack.pop() for _ in range(_TAKEN.get(name, 0))][::-1]
        match name:
            case "MARK":
                marks.append(stack)
                stack = []
            case _ if name in _ARGUMENTS:
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[name])
            case _ if name in _MADE:
                stack.append(_MADE[name]())
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case _ if name in _FILLED and isinstance(stack[-1], _Stranger):
                pass
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GLOBAL" | "STACK_GLOBAL":
                argument = argument or " ".join(items)
                stack.append(_NAMES.get(str(argument)) or _Stranger(str(argument).replace(" ", ".")[:200]))
            case "BINPERSID":
                stack.append(_storage(*items[0]))
                storages += [stack[-1]] if isinstance(stack[-1], _Storage) else []
            case "REDUCE" | "NEWOBJ" if isinstance(items[0], _Stranger):
                stack.append(_Stranger(items[0].name))
            case "REDUCE" if callable(items[0]):  # else Python's error would print it, and it may have 2^60 leaves
                stack.append(items[0](*items[1]))
            case "BUILD" if isinstance(stack[-1], dict):
                pass  # attributes of a dict: a state dict's _metadata
            case "POP" | "POP_MARK" | "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(f"its pickle has {name}, which torch.save does not write there")
    return stack.pop()


def _dict(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Names and numbers are the keys of tensors. Another stays a stranger: a deep tuple could take for ever to hash, or
    end the stack.
    """
    pairs = list(pairs)
    if any(isinstance(value, _Saved) and not isinstance(key, str | int) for key, value in pairs):
        raise ValueError("a tensor's key is neither a name nor a number")
    return {key if isinstance(key, str | int) else _Stranger(type(key).__name__): value for key, value in pairs}


def _ordered(pairs: Any = None) -> dict[Any, Any]:
    """Python 2 saved the pairs in a list. It is emptied: from a long one a short file could have many dicts made."""
    if pairs is None:
        return {}
    made = _dict(pairs)
    pairs.clear()
    return made


def _storage(kind: str, dtype: Any, key: Any, _location: str, count: Any = None, view: None = None) -> Any:
    """Of a class that is not known, and of a whole module, whose class the format before torch 1.6 keeps here, none."""
    if isinstance(dtype, _Stranger):
        return dtype
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or view is not None:
        raise ValueError("a storage is not described as torch.save describes one")
    if not is_shape([count]):
        raise ValueError("a storage's size is no natural number")
    return _Storage(dtype, key, count)


def _rebuild(storage: Any, first: Any, shape: Any, stride: Any, _grad=None, _hooks=None, flags=None) -> Any:
    """`flags` would say that the numbers are to be negated or conjugated."""
    if isinstance(storage, _Stranger):
        return storage
    right = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(stride, tuple) and not flags
    if not right or len(shape) != len(stride) or not all(map(is_shape, (shape, [first], *([n] for n in stride)))):
        raise ValueError("a tensor is not described as torch.save describes one")
    return _Saved(storage, first, shape, stride, storage.dtype)


def _rebuild_as(storage: Any, first: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, flags=None):
    """The same with a dtype that has no class of storages."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor's dtype is none")
    saved = _rebuild(storage, first, shape, stride, grad, hooks, flags)
    return saved if isinstance(saved, _Stranger) else saved._replace(dtype=dtype)


def _parameter(tensor: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Any:
    return tensor


_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}
_NAMES: dict[str, Any] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor": _rebuild,
    "torch._utils _rebuild_tensor_v2": _rebuild,
    "torch._utils _rebuild_tensor_v3": _rebuild_as,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch.storage UntypedStorage": torch.uint8,
    **{f"torch {kind}Storage": dtype for kind, dtype in _STORAGES.items()},
    **{f"torch {dtype}": getattr(torch, dtype) for dtype in ("uint16", "uint32", "uint64")},
    **{f"torch {dtype}": getattr(torch, dtype) for dtype in ("float8_e4m3fn", "float8_e5m2")},
}
