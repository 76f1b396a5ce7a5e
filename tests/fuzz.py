"""Mutated checkpoint files: each has to give an error of ours or a correct load, never a crash, a hang or much memory.

    python tests/fuzz.py --cases 100000 --seed 0 [--kind safetensors ...]
    python tests/fuzz.py --replay FILE

A case is a pure function of (kind, seed, number). It is read in a forked worker with little memory to spare; the parent
watches the clock, and knows which case a worker died of. A case that goes wrong is saved, and the exit status is 1.
"""

import argparse
import base64
import ctypes
import faulthandler
import gc
import io
import json
import math
import multiprocessing
import os
import pickle
import pickletools
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import HubModelsError

Files = dict[str, bytes]
Tensors = dict[str, Tensor]
Reader = Callable[[Path], Mapping[str, Any]]
Cases = Callable[[int], Files]

SPARE = 512 * 2**20  # bytes of address space that a worker may take beside what it has at its start
GROWTH = 64 * 2**20  # bytes of memory that one case may touch; its files have a few thousand
SECONDS = 20.0  # for one case, which takes a millisecond on a free machine, or half a second if it is long
BATCH = 2000  # cases of one worker
MOST_FAULTS = 100  # of a kind, then the run ends


class Fault(Exception):
    """What must not be: its sort, and what was seen."""


INTEGERS = [0, 1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1]


# --- Mutators that any format bears


def word(number: int, width: int) -> bytes:
    return (number % 256**width).to_bytes(width, "little")


def mutate_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    """Bits, ranges, ends and words of one input, or a splice of two."""
    content, at = bytearray(data), rng.randrange(len(data) + 1)
    end = min(at + rng.choice((1, 1, 2, 4, 8, 8, 40, 300)), len(data))
    match rng.randrange(9):
        case 0:
            for bit in (rng.randrange(8 * len(data) or 1) for _ in data[: rng.choice((1, 1, 2, 8))]):
                content[bit // 8] ^= 1 << bit % 8
        case 1:
            content[at:end] = bytes(end - at)
        case 2:
            content[at:end] = rng.randbytes(end - at)
        case 3:
            content[at:at] = content[at:end]
        case 4:
            del content[at:end]
        case 5:
            del content[at:]
        case 6:
            content += rng.choice((bytes(end - at), rng.randbytes(8), data))
        case 7:
            content[at:] = other[rng.randrange(len(other) + 1) :]
        case 8:
            width = rng.choice((1, 2, 4, 8, 8))
            content[at : at + width] = word(rng.choice(INTEGERS), width)
    return bytes(content)


def mutate_tokens(rng: Random, tokens: Sequence[bytes], others: Callable[[bytes], Sequence[bytes]]) -> bytes:
    """Tokens lost, repeated, moved, or replaced by one that could stand there."""
    tokens = list(tokens) or [b""]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(tokens))
        match rng.randrange(9):
            case 0:
                tokens[at : at + rng.choice((1, 1, 3))] = [b""]
            case 1:
                tokens[at:at] = tokens[at : at + rng.choice((1, 2, 8, 20))]
            case 2:
                tokens.insert(at, rng.choice(tokens))
            case _:
                at = rng.choice([place for place, token in enumerate(tokens) if others(token)] or [0])
                tokens[at] = rng.choice(others(tokens[at]) or [b""])
    return b"".join(tokens)


TEXT = re.compile(rb'"[^"]*"|\'[^\']*\'|-?\d+|\w+|.', re.DOTALL)
NUMBERS = b'1.0 1e400 -0 NaN Infinity true null "1" [] {} 00'.split() + [b"%d" % n for n in (*INTEGERS, 10**30)]
NUMBERS += [b"9" * 4300, b"9" * 5000, b",".join([b"%d" % 2**62] * 300), b"0,%d" % 2**62]
WORDS = b"dtype shape data_offsets __metadata__ a.weight F64 F32 BF16 I64 BOOL F31 F8_E4M3 <f4 >f4 |O \\ud800".split()
WORDS += [b"", b"\xff\xfe", b"\0", b"n" * 9000]
SIGNS = [*b"[ ] {} { } ( ) , : \xff \xef\xbb\xbf __import__('os').mkdir('canary')".split(), b"", b"\n"]
SIGNS += [b"[" * 9000, b"[" * 9000 + b"]" * 9000, b'{"a":' * 9000, b"(" * 150, b"-" * 9000, b"1+" * 5000]


NESTED = [b"[" * depth + b"]" * depth for depth in range(960, 1000, 3)]  # near Python's limit of recursion
NUMBERS += NESTED


def other_text(token: bytes) -> Sequence[bytes]:
    if token[:1] in (b'"', b"'"):
        return [token[:1] + text + token[:1] for text in WORDS] + NESTED
    return NUMBERS if token.lstrip(b"-").isalnum() else SIGNS if token.strip() else []


def mutate_text(rng: Random, text: bytes) -> bytes:
    """JSON or a Python literal, most of which stays what it is."""
    return mutate_tokens(rng, TEXT.findall(text), other_text)


# --- What is saved


def sample(dtypes: Sequence[torch.dtype], seed: int) -> Tensors:
    """Tensors of every shape that is special, each with 64 bytes of its own.

    They are in the order of where these lie: so does torch's old format order what it writes, as text.
    """
    rng, found = torch.Generator().manual_seed(seed), {}
    memories = [torch.empty(64, dtype=torch.uint8) for _ in range(6)]
    memories.sort(key=lambda memory: str(memory.untyped_storage()._cdata))
    for number, shape in enumerate([(2, 3), (), (0, 4), (4,), (1, 2, 2), (1, 1)]):
        dtype = dtypes[number % len(dtypes)]
        numbers = memories[number].view(dtype)
        numbers.copy_(torch.randint(0, 2 if dtype == torch.bool else 99, numbers.shape, generator=rng))
        found[f"{'abcdef'[number]}.weight"] = numbers[number % 2 :][: math.prod(shape)].view(shape)
    return found


@cache
def samples() -> list[Tensors]:
    half, whole = (torch.float16, torch.bfloat16, torch.bool), (torch.float64, torch.int64, torch.uint8)
    return [sample((torch.float32,), 0), sample(half, 1), sample(whole, 2), {"only": torch.arange(3.0)}, {}]


Seed = tuple[Tensors, Files]  # what a valid file holds, and the file


def bytes_of(tensor: Tensor) -> bytes:
    """Of truths 0 and 1, as any other byte is a truth too and may be copied as 1."""
    numbers = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return (numbers.ne(0) if tensor.dtype == torch.bool else numbers).numpy().tobytes()


# --- safetensors


def safetensors_seed(tensors: Tensors) -> Seed:
    return tensors, {"model.safetensors": safetensors.torch.save(tensors, {"format": "pt"})}


def mutate_safetensors(rng: Random, files: Files) -> Files:
    (data,) = files.values()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, rest = data[8:end], rng.choice((data[end:], data[end:], data[end:], bytes(4096)))
    if rng.random() < 0.1:
        return {"model.safetensors": word(rng.choice([*INTEGERS, len(header) + 1, len(data)]), 8) + data[8:]}
    header = mutate_text(rng, header) if rng.random() < 0.8 else b" " * rng.randrange(9) + header
    return {"model.safetensors": word(len(header), 8) + header + rest}


def safetensors_oracle(files: Files) -> dict[str, bytes]:
    """The reference implementation."""
    return {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(files["model.safetensors"])}


# --- PyTorch, both formats. Pickles are put together here as they are written, operation by operation


def text(value: bytes) -> bytes:
    return b"X" + word(len(value), 4) + value


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(full: bytes) -> bytes:
    return b"c" + b"\n".join(full.rpartition(b".")[::2]) + b"\n"


def call(function: bytes, *items: bytes) -> bytes:
    return name(function) + row(*items) + b"R"


STORAGES = [b"torch.%bStorage" % kind for kind in b"Float Long Bool Half Byte BFloat16 QInt8 ComplexFloat".split()]
STORAGES += b"torch.storage.UntypedStorage torch.storage.TypedStorage torch.cuda.FloatStorage".split()
REBUILDS = b"tensor tensor_v2 tensor_v3 parameter parameter_with_state qtensor sparse_tensor nested_tensor".split()
REBUILDS += b"meta_tensor_no_storage wrapper_subclass device_tensor_from_cpu_tensor".split()
CALLED = [b"torch._utils._rebuild_" + kind for kind in REBUILDS]
CALLED += (
    b"torch._tensor._rebuild_from_type_v2 torch.serialization._get_layout torch.Size torch.device torch.nope".split()
)
CALLED += b"torch.Tensor torch.FloatTensor torch.sparse.FloatTensor torch.nn.parameter.Parameter torch.float32".split()
CALLED += b"builtins.bytearray builtins.set builtins.complex collections.OrderedDict collections.Counter".split()
CALLED += b"_codecs.encode torch.uint16 torch.storage.UntypedStorage torch.per_tensor_affine".split()
CODE = [
    call(b"os.system", text(b"touch canary")),
    call(b"posix.mkdir", text(b"canary")),
    call(b"builtins.eval", text(b"__import__('os').mkdir('canary')")),
    call(b"__builtin__.exec", text(b"open('canary', 'w')")),
    call(b"io.open", text(b"canary"), text(b"w")),
    call(b"torch.save", number(1), text(b"canary")),
]
BOMBS = [b")" + b"\x85" * depth for depth in (10, 2000)]
BOMBS += [b"]" * 2000 + b"a" * 1999, b"]q\x07h\x07a", b"}q\x07" + text(b"a") + b"h\x07s", b")" * 5000, b"(" * 5000]
BOMBS += [b"\x8a\xff" + b"\x7f" * 255, b"\x8b" + word(2**31 - 1, 4) + b"\1", b"L" + b"9" * 5000 + b"L\n"]
BOMBS += [b"X" + word(-1, 4) + b"a", b"\x8d" + word(2**40, 8) + b"a", b"\x96" + word(2**33, 8), b"\x95" + word(-9, 8)]
BOMBS += [b")r" + word(2**31 - 1, 4), b"j" + word(-1, 4)]  # the memo's last places
DEEP = b")" + b"\x85" * 160_000  # ends a stack that is walked without a count
LEAVES = b")" + b"q\x07h\x07\x86" * 60  # 2^60 of them


def storage(rng: Random, legacy: bool) -> bytes:
    """A persistent identifier, as torch.save writes it or nearly so."""
    size, key = number(rng.choice([4, 8, 16, 64, *INTEGERS])), rng.choice((b"0", b"0", b"0", b"1", b"9", b"../x"))
    items = [text(b"storage"), name(rng.choice([STORAGES[0], *STORAGES])), text(key), text(b"cpu"), size]
    items += [rng.choice((b"N", b"N", row(text(b"v"), size, size)))] if legacy else []
    return row(*items[: rng.choice((9, 9, 9, 3))]) + b"Q"


def sizes(rng: Random) -> bytes:
    numbers = [rng.choice((1, 2, 3, 4, rng.choice(INTEGERS))) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 4, 99)))]
    return row(*map(number, numbers))


def anything(rng: Random, legacy: bool, depth: int = 3) -> bytes:
    """Any object that a pickle can hold, tensors first."""
    which = rng.randrange(10) if depth else rng.randrange(6, 10)
    inner = (
        [anything(rng, legacy, depth - 1) for _ in range(rng.choice((1, 1, 2, 3, 7)))] if which in range(2, 6) else []
    )
    match which:
        case 0 | 1:
            place = storage(rng, legacy), number(rng.choice([0, 0, 0, 1, *INTEGERS])), sizes(rng), sizes(rng)
            return call(rng.choice(CALLED[:3]), *place, b"\x89", b"}", *[name(b"torch.float32")] * rng.randrange(2))
        case 2 | 3:
            return call(rng.choice(CALLED), *inner)
        case 4:
            return name(rng.choice(CALLED)) + row(*inner) + b"\x81"
        case 5:
            return rng.choice((row(*inner), b"".join(inner) + rng.choice((b"b", b"R", b"Q", b"\x86"))))
        case 6:
            return rng.choice([*BOMBS, *CODE, LEAVES, *([DEEP] if rng.random() < 0.05 else [])])
        case 7:
            return rng.choice((storage(rng, legacy), sizes(rng), b"]", b"}", b")", b"N", b"\x88"))
        case 8:
            return number(rng.choice(INTEGERS))
    return rng.choice((text(b"cpu"), text(b"storage"), b"G" + rng.randbytes(8), name(b"torch.float32")))


OTHER_TEXTS = list(map(text, b"storage module 0 1 99 cpu meta ../../x a.weight \xed\xa0\x80 \xff".split()))
OTHER_NAMES = [name(full) for full in (*STORAGES, *CALLED, b"builtins.eval", b"os.system", b"a" * 3000)]
OTHER_NUMBERS = [number(n) for n in (*INTEGERS, 2**64, -(2**63), 2**2000)] + [b"J" + word(-9, 4), b"N", text(b"1")]
OTHER_PLACES = [b"h\0", b"h\1", b"h\5", b"h\xff", b"q\0", b"r" + word(-1, 4), b"", *BOMBS]
ANY_OPERATION = [*b"t ) N R Q b \x81 ( . \x85 \x86 0".split(), *BOMBS, *CODE, LEAVES]


def other_operation(operation: bytes) -> Sequence[bytes]:
    match operation[:1]:
        case b"J" | b"K" | b"M" | b"\x8a":
            return OTHER_NUMBERS
        case b"h" | b"q":
            return OTHER_PLACES
    return {b"X": OTHER_TEXTS, b"c": OTHER_NAMES}.get(operation[:1], ANY_OPERATION)


def operations(stream: io.BytesIO) -> list[bytes]:
    """The next pickle of a stream, cut into its operations."""
    places = [place for _, _, place in pickletools.genops(stream)] + [stream.tell()]
    return [stream.getvalue()[a:b] for a, b in pairwise(places)]


def mutate_pickle(rng: Random, data: bytes, legacy: bool) -> bytes:
    """Its operations, or a dict made from nothing, with names as keys or else with anything."""
    if rng.random() < 0.6:
        return mutate_tokens(rng, operations(io.BytesIO(data)), other_operation)
    pickled = b"\x80\x02}("
    for place in range(rng.choice((1, 1, 2, 3))):
        odd = rng.choice((DEEP, LEAVES)) if rng.random() < 0.1 else anything(rng, legacy, 1)
        pickled += (odd if rng.random() < 0.2 else text(b"k%d" % place)) + anything(rng, legacy)
    return pickled + b"u."


def turned(tensors: Tensors) -> Tensors:
    """With tensors that are not contiguous and share their storage."""
    return {**tensors, **{f"{name} turned": tensor.t() for name, tensor in tensors.items() if tensor.ndim == 2}}


def zip_seed(tensors: Tensors) -> Seed:
    file = io.BytesIO()
    torch.save(turned(tensors), file)
    return turned(tensors), {"pytorch_model.bin": file.getvalue()}


def nested_seed(tensors: Tensors) -> Seed:
    """A training's checkpoint: the state dict among objects, and the whole in itself."""
    step, moment = torch.tensor(3.0), torch.ones(3)
    content: dict[str, Any] = {
        **{"epoch": 3, "state_dict": {"one": torch.ones(2), **turned(tensors)}, "settings": argparse.Namespace(a=1)},
        **{"path": PurePosixPath("/x"), "device": torch.device("cpu"), "dtype": torch.float16, "s": {1, 2}},
        "optimizer_states": [{"state": {0: {"step": step, "exp_avg": moment}}, "param_groups": [{"lr": 1e-3}]}],
    }
    content["itself"] = content
    held = {f"state_dict.{name}": tensor for name, tensor in content["state_dict"].items()}
    state = {"optimizer_states.0.state.0.step": step, "optimizer_states.0.state.0.exp_avg": moment}
    file = io.BytesIO()
    torch.save(content, file)
    return {**held, **state}, {"pytorch_model.bin": file.getvalue()}


def mutate_zip(rng: Random, files: Files) -> Files:
    """The pickle inside, the records, or what the archive says of them."""
    (data,) = files.values()
    if rng.random() < 0.2:
        at, width = rng.randrange(data.index(b"PK\1\2"), len(data)), rng.choice((1, 2, 4, 8))
        return {"pytorch_model.bin": data[:at] + word(rng.choice(INTEGERS), width) + data[at + width :]}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()]
    place = rng.choice((0, 0, 0, 0, rng.randrange(len(records))))
    path, content, how = records[place]
    match rng.randrange(8) if rng.random() < 0.3 or not path.endswith(".pkl") else 8:
        case 0 | 1:
            content, how = bytes(rng.choice((len(content), 2_000_000))), zipfile.ZIP_DEFLATED
        case 2:
            how = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case 3:
            path = rng.choice(("../../x", "/canary", path.upper(), "", "archive/data/0", "x/data.pkl", "a" * 9000))
        case 4:
            records.append((path, mutate_bytes(rng, content, data), how))
        case 5:
            content = mutate_bytes(rng, content, data)
        case 6:
            content = rng.choice((b"", b"big", b"0", b"-1", b"9" * 30, b"\xff", bytes(100)))
        case 7:
            records.append(records.pop(0))
        case 8:
            content = mutate_pickle(rng, content, False)
    records[place], file = (path, content, how), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path, content, how in records:
            archive.writestr(zipfile.ZipInfo(path), content, how)
    return {"pytorch_model.bin": file.getvalue()}


def parts_of_legacy(data: bytes) -> tuple[list[list[bytes]], bytes]:
    """Five pickles (magic number, version, machine, content, keys), and the storages after them."""
    stream = io.BytesIO(data)
    return [operations(stream) for _ in range(5)], data[stream.tell() :]


def legacy_seed(tensors: Tensors) -> Seed:
    """Storages are named by number, where torch names them by where they lie in memory."""
    file, keys = io.BytesIO(), {}
    torch.save(turned(tensors), file, _use_new_zipfile_serialization=False)
    pickles, storages = parts_of_legacy(file.getvalue())
    for tokens in pickles[3:]:
        for place, token in enumerate(tokens):
            if token[:1] == b"X" and token[5:].isdigit():
                tokens[place] = keys.setdefault(token, text(b"%d" % len(keys)))
    return turned(tensors), {"pytorch_model.bin": b"".join(map(b"".join, pickles)) + storages}


def mutate_legacy(rng: Random, files: Files) -> Files:
    (data,) = files.values()
    parts, storages = parts_of_legacy(data)
    pickles = list(map(b"".join, parts))
    place = rng.choice((3, 3, 3, 3, 3, 0, 1, 2, 4, 5))
    if place < 5:
        pickles[place] = mutate_pickle(rng, pickles[place], True)
    else:
        at = rng.choice((0, rng.randrange(len(storages) or 1)))
        storages = storages[:at] + word(rng.choice(INTEGERS), 8) + storages[at + 8 :]
    return {"pytorch_model.bin": b"".join(pickles) + storages}


class Plain(pickle._Unpickler):
    """Python's own unpickler, in which a call gives its arguments back: an account of what the file says."""

    def find_class(self, module: str, name: str) -> Any:
        calls = {"OrderedDict": dict, "_rebuild_tensor_v2": lambda *of: of[:4], "_rebuild_parameter": lambda of, *_: of}
        return calls.get(name, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid[1:]


WIDTHS = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1}


def torch_oracle(files: Files) -> dict[str, bytes]:
    """Each tensor's bytes from the record that its storage names; a Fault where the record has not got them."""
    data = files["pytorch_model.bin"]
    if DEEP[:2000] in data or LEAVES in data:
        raise ValueError("Python's own unpickler would hash it")
    stream, records, found = io.BytesIO(data), {}, {}
    if data[:4] == b"PK\3\4":
        with zipfile.ZipFile(stream) as archive:
            records = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
        content = Plain(io.BytesIO(records["data.pkl"])).load()
    else:
        content, keys = [Plain(stream).load() for _ in range(5)][3:]
        keys = [key for key in keys if isinstance(key, str)]  # not to hash what has 2^60 leaves
        width = {key: WIDTHS[kind.removesuffix("Storage")] for (kind, key, *_), *_ in content.values()}
        records = {f"data/{key}": stream.read(struct.unpack("<q", stream.read(8))[0] * width[key]) for key in keys}
    for title, ((kind, key, *_), first, shape, steps) in content.items():
        width = WIDTHS[kind.removesuffix("Storage")]
        numbers = np.frombuffer(records[f"data/{key}"], f"V{width}")
        last = first + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if math.prod(shape) and not 0 <= first <= last < len(numbers):
            raise Fault("wrong tensors", f"{title} takes number {last} of {len(numbers)}")
        strides = [step * width for step in steps]
        found[title] = np.lib.stride_tricks.as_strided(numbers[first:], shape, strides).tobytes()
    return found


# --- OpenAI's directory


def openai_seed(tensors: Tensors) -> Seed:
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float32 and tensor.numel()}
    held = {f"params.{place}": t[0] if t.ndim == 3 else t for place, t in enumerate(tensors.values())}
    shapes = [[1, *t.shape] if t.ndim == 2 else list(t.shape) for t in held.values()]
    files, numbers = {"params_shapes.json": json.dumps(shapes).encode()}, b"".join(map(bytes_of, held.values()))
    for place, part in enumerate(np.array_split(np.frombuffer(numbers, np.float32), 3)):
        np.save(file := io.BytesIO(), part)
        files[f"params_{place}.npy"] = file.getvalue()
    return held, files


def mutate_openai(rng: Random, files: Files) -> Files:
    path = rng.choice(sorted(files))
    data = files[path]
    if path.endswith(".json"):
        return {**files, path: mutate_text(rng, data)}
    end = 10 + struct.unpack("<H", data[8:10])[0]
    match rng.randrange(8):
        case 0:
            return {other: content for other, content in files.items() if other != path}
        case 1:
            return {**files, rng.choice(("params_3.npy", "params_00.npy", "params_x.npy", "params_1.npy")): data}
        case 2:
            return {**files, path: data[:6] + bytes([rng.choice((0, 1, 2, 3, 255)), 0]) + data[8:]}
    header = mutate_text(rng, data[10:end])[: 2**16 - 1]
    return {**files, path: data[:8] + word(len(header), 2) + header + data[end:]}


def openai_oracle(files: Files) -> dict[str, bytes]:
    """NumPy."""
    shards = [np.load(io.BytesIO(files[f"params_{place}.npy"])) for place in range(len(files) - 1)]
    numbers, found = np.concatenate(shards), {}
    for place, shape in enumerate(json.loads(files["params_shapes.json"])):
        found[f"params.{place}"], numbers = numbers[: math.prod(shape)].tobytes(), numbers[math.prod(shape) :]
    return found


# --- TensorFlow's .index, a LevelDB table of protocol buffers, and .data


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def crc32c(data: bytes) -> bytes:
    """Masked, as LevelDB stores it."""
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 2**32 - 1
    return word((crc >> 15 | crc << 17) + 0xA282EAD8, 4)


def table(pairs: Sequence[tuple[bytes, bytes]], twist: Callable[[bytes], bytes] = bytes) -> bytes:
    """A block of entries, which `twist` may alter before its checksum is taken; no meta data; the index; the footer."""

    def block(pairs: Sequence[tuple[bytes, bytes]], twist: Callable[[bytes], bytes] = bytes) -> bytes:
        entries = (b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        content = twist(b"".join(entries) + word(0, 4) + word(1, 4)) + b"\0"
        return content + crc32c(content)

    data, meta = block(pairs, twist), block([])
    index = block([(b"\x7f", varint(0) + varint(len(data) - 5))])
    handles = varint(len(data)) + varint(len(meta) - 5) + varint(len(data + meta)) + varint(len(index) - 5)
    return data + meta + index + handles.ljust(40, b"\0") + word(0xDB4775248B80FB57, 8)


DTYPES = {torch.float32: 1, torch.float64: 2, torch.uint8: 4, torch.int64: 9, torch.bool: 10, torch.bfloat16: 14}


def bundle(tensors: Tensors) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """BundleHeaderProto (one shard, version 1), a BundleEntryProto for each tensor, and the numbers."""
    pairs, data = [(b"", b"\x08\x01\x1a\x02\x08\x01")], b""
    for title, tensor in tensors.items():
        content = bytes_of(tensor)
        shape = b"".join(b"\x12" + varint(len(size)) + size for n in tensor.shape for size in [b"\x08" + varint(n)])
        entry = b"\x08" + varint(DTYPES[tensor.dtype]) + b"\x12" + varint(len(shape)) + shape
        entry += b"\x20" + varint(len(data)) + b"\x28" + varint(len(content)) + b"\x35" + crc32c(content)
        pairs.append((title.encode(), entry))
        data += content
    return pairs, data


def tensorflow_seed(tensors: Tensors) -> Seed:
    held = {name: tensor for name, tensor in tensors.items() if tensor.dtype in DTYPES}
    pairs, data = bundle(held)
    return held, {"model.ckpt.index": table(pairs), "model.ckpt.data-00000-of-00001": data}


def mutate_tensorflow(rng: Random, files: Files) -> Files:
    """The footer; or an entry or the block around it, with checksums that are right again."""
    index = files["model.ckpt.index"]
    pairs, _ = bundle({name: tensor for name, tensor in rng.choice(samples()).items() if tensor.dtype in DTYPES})
    odd, place = varint(rng.choice(INTEGERS) % 2**64), rng.randrange(len(pairs))
    key, entry = pairs[place]
    at = rng.randrange(len(entry))
    match rng.randrange(5):
        case 0:
            at = len(index) - rng.randrange(1, 49)
            return {**files, "model.ckpt.index": index[:at] + odd + index[at + 1 :]}
        case 1:
            return {**files, "model.ckpt.index": table(pairs, lambda content: mutate_bytes(rng, content, index))}
        case 2:
            pairs[place] = mutate_bytes(rng, key, entry), entry
        case 3:
            pairs[place] = key, mutate_bytes(rng, entry, index)
        case 4:
            pairs[place] = key, entry[:at] + odd + entry[at + 1 :]
    return {**files, "model.ckpt.index": table(pairs + pairs[: rng.choice((0, 0, 1))])}


# --- Cases


@dataclass(frozen=True)
class Kind:
    """A format. `path` in a case's directory is what the reader is given."""

    path: str
    seed: Callable[[Tensors], Seed]
    mutate: Callable[[Random, Files], Files]
    oracle: Callable[[Files], dict[str, bytes]] | None = None


KINDS = {
    "safetensors": Kind("model.safetensors", safetensors_seed, mutate_safetensors, safetensors_oracle),
    "bin": Kind("pytorch_model.bin", zip_seed, mutate_zip, torch_oracle),
    "legacy": Kind("pytorch_model.bin", legacy_seed, mutate_legacy, torch_oracle),
    "nested": Kind("pytorch_model.bin", nested_seed, mutate_zip),
    "openai": Kind(".", openai_seed, mutate_openai, openai_oracle),
    "tensorflow": Kind("model.ckpt.index", tensorflow_seed, mutate_tensorflow),
}


@cache
def seeds(kind: str) -> list[Seed]:
    return [KINDS[kind].seed(tensors) for tensors in samples()]


def case(kind: str, seed: int, number: int) -> Files:
    """The files of one case; the first are the valid ones."""
    if number < len(seeds(kind)):
        return seeds(kind)[number][1]
    rng = Random(f"{seed} {kind} {number}")
    (_, files), (_, other) = rng.choice(seeds(kind)), rng.choice(seeds(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a record whose name an archive has already
        for _ in range(rng.choice((1, 1, 1, 2))):
            with suppress(Exception):  # what is mutated already may have no structure left
                files = KINDS[kind].mutate(rng, files)
    if rng.random() < 0.3:
        path = rng.choice(sorted(files))
        files = {**files, path: mutate_bytes(rng, files[path], other.get(path, b""))}
    return files


def contents(found: Mapping[str, Any], most: int) -> dict[str, bytes]:
    """Every tensor's bytes, read in both ways and twice. `most`: the bytes that there are."""
    content = {}
    for title, lazy in found.items():
        size = math.prod(lazy.shape) * lazy.dtype.itemsize
        if size > most:
            raise Fault("memory", f"{title} {list(lazy.shape)} takes {size} bytes, its file has {most}")
        tensor, target = lazy.read(), torch.empty(lazy.shape, dtype=lazy.dtype)
        lazy.read_into(target)
        if not isinstance(title, str) or (tuple(tensor.shape), tensor.dtype) != (tuple(lazy.shape), lazy.dtype):
            raise Fault("wrong tensors", f"{title} is not what was said of it: {tensor.shape} {tensor.dtype}")
        content[title] = bytes_of(tensor)
        if not content[title] == bytes_of(target) == bytes_of(lazy.read()):
            raise Fault("wrong tensors", f"{title} is not the same when it is read again")
    return content


def check(kind: str, files: Files, reader: Reader) -> str:
    """Read all of a case whose files are in the working directory: "refused" or "loaded", or a Fault is raised."""
    valid = next((tensors for tensors, seed in seeds(kind) if seed == files), None)
    try:
        found = reader(Path(KINDS[kind].path))
        content = contents(found, sum(map(len, files.values())))
    except HubModelsError as error:
        refuse_exhaustion(error)
        if valid is not None:
            raise Fault("valid file refused", str(error)) from None
        return "refused"
    oracle, want = KINDS[kind].oracle, content
    if valid is not None:
        want = {title: bytes_of(tensor) for title, tensor in valid.items()}
    elif oracle:
        try:
            want = oracle(files)
            truths = [title for title in want if title in found and found[title].dtype == torch.bool]
            want |= {title: bytes(map(bool, want[title])) for title in truths}
        except Fault:
            raise
        except Exception:  # the reference refuses more than we do: it says nothing then
            pass
    if content != want:
        wrong = [title for title in {**content, **want} if content.get(title) != want.get(title)]
        raise Fault("wrong tensors", f"not as the reference reads them: {wrong}")
    said = {title: (tuple(lazy.shape), lazy.dtype) for title, lazy in found.items()}
    if valid is not None and said != {title: (tuple(tensor.shape), tensor.dtype) for title, tensor in valid.items()}:
        raise Fault("wrong tensors", f"not of the shapes and dtypes that were saved: {said}")
    return "loaded"


def refuse_exhaustion(error: BaseException | None) -> None:
    """An allocation that fails in a worker would succeed on a larger machine, whatever error was made of it."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise Fault("memory", f"could not be had: {type(error).__name__} {str(error)[:200]}")
        error = error.__cause__ or error.__context__


# --- Workers


def peak() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(kind: str, files: Files, reader: Reader) -> tuple[str, str]:
    """What came of a case (refused, loaded or the sort of fault), and what was seen."""
    for path, data in files.items():
        Path(path).write_bytes(data)
    before = peak()
    try:
        try:
            result = check(kind, files, reader), ""
        except Exception as error:
            if not isinstance(error, Fault):
                refuse_exhaustion(error)
                raise Fault("foreign exception", f"{type(error).__name__}: {str(error)[:200]}") from None
            raise
    except Fault as fault:
        result = fault.args
    if peak() - before > GROWTH:
        result = "memory", f"{(peak() - before) / 2**20:.0f} MiB for one case"
    for path in files:
        os.unlink(path)  # not to be written over: an error may hold a tensor that is mapped
    if rest := os.listdir():
        result = "code ran", f"there is a new file: {rest}"
        shutil.rmtree(rest[0], ignore_errors=True)
        Path(rest[0]).unlink(missing_ok=True)
    return result


def confine(kind: str, directory: str) -> None:
    """Little memory, no output, no core, and a crash that is one."""
    os.chdir(directory)
    faulthandler.disable()
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    judge(kind, seeds(kind)[0][1], read_checkpoint)  # brings in torch's own pages
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what the parent has freed would be room for a case that takes much, and nobody would see it
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(pipe: Any, kind: str, cases: Cases, numbers: range, reader: Reader, directory: str) -> None:
    """Tells each case's number before it is read, and afterwards what came of it."""
    confine(kind, directory)
    start = peak()
    for number in numbers:
        files = cases(number)
        pipe.send(number)
        began = time.process_time()
        pipe.send((*judge(kind, files, reader), time.process_time() - began, peak() - start))


@dataclass
class Result:
    """What came of a kind's cases. slowest: of a case, in processor seconds; peak: bytes beyond a start, of all."""

    counts: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[int, str, str]] = field(default_factory=list)  # number, sort, what was seen
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0

    def note(self, number: int, sort: str, seen: str) -> None:
        self.counts[sort] = self.counts.get(sort, 0) + 1
        if sort not in ("refused", "loaded"):
            self.faults.append((number, sort, seen))


def run(kind: str, cases: Cases, count: int, reader: Reader | None = None, seconds: float = SECONDS) -> Result:
    """Read `count` cases of a kind in workers. After one that dies another goes on with the case that follows."""
    result, fork, number, began = Result(), multiprocessing.get_context("fork"), 0, time.perf_counter()
    while number < count and len(result.faults) < MOST_FAULTS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
            ours, theirs = fork.Pipe(duplex=False)
            numbers = range(number, min(number + BATCH, count))
            arguments = theirs, kind, cases, numbers, reader or read_checkpoint, directory
            worker = fork.Process(target=work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            number = follow(worker, ours, result, numbers, seconds)
    result.seconds = time.perf_counter() - began
    return result


def follow(worker: Any, pipe: Any, result: Result, numbers: range, seconds: float) -> int:
    """Listen to a worker until it has ended; the number of the case to go on with."""
    number, done = numbers.start, numbers.start  # the case it is at, and the one after the last that is done
    try:
        while pipe.poll(seconds):
            match pipe.recv():
                case int() as number:
                    pass
                case sort, seen, slow, most:
                    result.note(number, sort, seen)
                    result.slowest, result.peak, done = max(result.slowest, slow), max(result.peak, most), number + 1
        worker.kill()
        worker.join()
        result.note(number, "hang", f"not done after {seconds:.0f} s")
        return number + 1
    except EOFError:
        worker.join()
    if done < numbers.stop:
        result.note(number, "crash", f"the worker ended with exit code {worker.exitcode}")
        return number + 1
    return done


# --- The program


def save(path: Path, kind: str, files: Files) -> None:
    """The files themselves, so that a case outlives a change of the mutators."""
    encoded = {name: base64.b64encode(data).decode() for name, data in files.items()}
    path.write_text(json.dumps({"kind": kind, "files": encoded}))


def replay(path: Path) -> Result:
    saved = json.loads(path.read_text())
    files = {name: base64.b64decode(data) for name, data in saved["files"].items()}
    return run(saved["kind"], lambda number: files, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, the same number of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read a case that was saved")
    options = parser.parse_args(arguments)
    if options.replay:
        result = replay(options.replay)
        print(*result.counts, *result.faults)
        return min(len(result.faults), 1)
    failed = False
    print(f"{'kind':12}{'cases':>8}{'refused':>9}{'loaded':>8}{'faults':>8}{'seconds':>9}{'slowest':>9}{'MiB':>6}")
    for kind in options.kind:
        count = options.cases // len(options.kind)
        result = run(kind, lambda number, kind=kind: case(kind, options.seed, number), count)
        print(f"{kind:12}{sum(result.counts.values()):8}{result.counts.get('refused', 0):9}", end="")
        print(f"{result.counts.get('loaded', 0):8}{len(result.faults):8}{result.seconds:9.0f}", end="")
        print(f"{result.slowest:9.3f}{result.peak / 2**20:6.0f}", flush=True)
        for number, sort, seen in result.faults:
            path, failed = Path(f"fuzz-{kind}-{options.seed}-{number}.json"), True
            save(path, kind, case(kind, options.seed, number))
            print(f"  {sort}: {seen}\n    python tests/fuzz.py --replay {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
