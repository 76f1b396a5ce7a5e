"""One model written in every dialect that loads, and how much memory loading it takes.

A writer is given a state dict under Hugging Face's names and a directory that has a config.json; it returns the path
to load. tests/test_dialects.py loads them all, benchmarks/formats.py measures them on files of full size.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

State = dict[str, Tensor]
Writer = Callable[[State, Path], Path]


def _safetensors(state: State, directory: Path) -> Path:
    safetensors.torch.save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


def _bin(state: State, directory: Path) -> Path:
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def _old_bin(state: State, directory: Path) -> Path:
    """pytorch-pretrained-bert: TensorFlow's words for a norm's parameters, torch's first format, Google's config."""
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {key: tensor for key, tensor in state.items() if not key.endswith(tuple(words))}
    renamed |= {k.replace(a, b): t for k, t in state.items() for a, b in words.items() if k.endswith(a)}
    torch.save(renamed, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "bert_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    (directory / "config.json").unlink()
    return directory


def _sharded(stem: str, end: str, save: Callable[[State, Path], object]) -> Writer:
    def write(state: State, directory: Path) -> Path:
        places = {}
        for number in range(3):
            part = dict(sorted(state.items())[number::3])
            name = f"{stem}-{number + 1:05d}-of-00003.{end}"
            save(part, directory / name)
            places |= dict.fromkeys(part, name)
        (directory / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return directory

    return write


def _wrapped(prefix: str) -> Writer:
    return lambda state, directory: _bin({prefix + key: tensor for key, tensor in state.items()}, directory)


class _Settings(dict):
    """What a Lightning module may keep as its hyper-parameters: an object of the user's own."""


def _lightning(state: State, directory: Path) -> Path:
    moments = {0: {"step": torch.tensor(700.0), "exp_avg": torch.zeros(3)}}
    content = {
        **{"epoch": 3, "global_step": 700, "pytorch-lightning_version": "2.5.1", "loops": {"fit_loop": {"state": {}}}},
        "state_dict": {f"model.{key}": tensor for key, tensor in state.items()},
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_model_score": torch.tensor(2.0), "mode": "min"}},
        "optimizer_states": [{"state": moments, "param_groups": []}],
        **{"lr_schedulers": [{"last_epoch": 3}], "hparams_name": "kwargs", "hyper_parameters": _Settings(lr=1e-4)},
    }
    torch.save(content, directory / "epoch=3.ckpt")
    return directory / "epoch=3.ckpt"


def _training(state: State, directory: Path) -> Path:
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, directory / "last.pt")
    return directory / "last.pt"


def _tensorflow(state: State, directory: Path) -> Path:
    """Google's names and one data file, as its release has them."""
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    ends |= {"cls.predictions.bias": "cls.predictions.output_bias"}
    ends |= {f"seq_relationship.{wb}": f"seq_relationship.output_{wb}" for wb in ("bias", "weight")}
    ends |= {"_embeddings.weight": "_embeddings", "output_weight": "output_weights"}
    numbers = {}
    for key, tensor in state.items():
        for theirs, googles in ends.items():
            key = key.removesuffix(theirs) + googles if key.endswith(theirs) else key
        kernel = key.endswith(".weight")
        name = (key.removesuffix("weight") + "kernel" if kernel else key).replace(".layer.", ".layer_")
        numbers[name.replace(".", "/")] = (tensor.t().contiguous() if kernel else tensor).numpy()
    write_bundle(directory / "bert_model.ckpt", {**numbers, "global_step": np.array(7, dtype=np.int64)})
    (directory / "config.json").rename(directory / "bert_config.json")
    return directory


def _zip(state: State, directory: Path) -> Path:
    """As Google's release comes."""
    _tensorflow(state, directory)
    path = directory.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"uncased_L-2/{file.name}")
    for file in directory.iterdir():
        file.unlink()
    return path


def _openai(state: State, directory: Path) -> Path:
    """GPT as OpenAI published it: a list of numbers, cut into ten wherever it happens. Its order is the modules'."""
    layer = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    count = len({key.split(".")[1] for key in bare if key.startswith("h.")})
    names = [f"h.{i}.{part}.{wb}" for i in range(count) for part in layer for wb in ("weight", "bias")]
    ordered = [bare[name] for name in ("positions_embed.weight", "tokens_embed.weight", *names)]
    shapes = [[1, *t.shape] if t.dim() == 2 and place > 1 else list(t.shape) for place, t in enumerate(ordered)]
    (directory / "params_shapes.json").write_text(json.dumps(shapes))
    for number, part in enumerate(torch.cat([tensor.flatten() for tensor in ordered]).tensor_split(10)):
        np.save(directory / f"params_{number}.npy", part.numpy())
    return directory


def _native(state: State, directory: Path) -> Path:
    import hubmodels

    _safetensors(state, directory)
    hubmodels.convert(directory, directory, form="native")
    return directory


BERT: dict[str, Writer] = {
    "safetensors": _safetensors,
    "safetensors in three files": _sharded("model", "safetensors", safetensors.torch.save_file),
    ".bin": _bin,
    ".bin in three files": _sharded("pytorch_model", "bin", torch.save),
    "pytorch-pretrained-bert": _old_bin,
    "DataParallel": _wrapped("module."),
    "torch.compile": _wrapped("_orig_mod."),
    "Lightning": _lightning,
    "a training's checkpoint": _training,
    "TensorFlow": _tensorflow,
    "TensorFlow, zipped": _zip,
    "native": _native,
}
GPT: dict[str, Writer] = {"safetensors": _safetensors, ".bin": _bin, "OpenAI": _openai, "native": _native}


# --- TensorFlow's bundle. Sources: see hubmodels/checkpoint/tensorflow_file.py


def write_bundle(prefix: Path, numbers: dict[str, np.ndarray]) -> None:
    """PREFIX.index, in one block, and PREFIX.data-00000-of-00001."""
    from crc32c import crc32c

    def masked(data: bytes | memoryview) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    def block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
        rows = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        whole = rows + struct.pack("<II", 0, 1) + b"\0"
        return whole + masked(whole)

    kinds = {np.dtype(np.float32): 1, np.dtype(np.int64): 9, np.dtype(np.float16): 19}
    entries = [(b"", field(1, 1) + field(3, field(1, 1)))]
    at = 0
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name, array in sorted(numbers.items()):
            data = array.tobytes()
            file.write(data)
            shape = b"".join(field(2, field(1, size)) for size in array.shape)
            crc = varint(6 << 3 | 5) + masked(data)
            place = (field(4, at) if at else b"") + field(5, len(data))
            entries.append((name.encode(), field(1, kinds[array.dtype]) + field(2, shape) + place + crc))
            at += len(data)
    first = block(entries)
    second = block([(b"~", varint(0) + varint(len(first) - 5))])
    footer = (varint(0) + varint(0) + varint(len(first)) + varint(len(second) - 5)).ljust(40, b"\0")
    Path(f"{prefix}.index").write_bytes(first + second + footer + struct.pack("<Q", 0xDB4775248B80FB57))


def field(number: int, value: int | bytes) -> bytes:
    """Of a protobuf"""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


# --- Memory

_PROGRAM = """
import sys, time
import torch, hubmodels

def resident(what):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(what))) * 1024

entry = getattr(hubmodels, sys.argv[1])
entry(sys.argv[2])  # a small one: whatever is imported only then
before = resident("VmRSS")
begun = time.perf_counter()
model = entry(sys.argv[3])
seconds = time.perf_counter() - begun
for parameter in model.parameters():  # what is mapped counts too, once it is used
    parameter.detach().flatten()[::512].sum()
print(resident("VmHWM") - before, seconds, sum(p.nbytes for p in model.parameters()))
"""


def memory_of(entry: str, small: Path, path: Path) -> tuple[int, float, int]:
    """The peak of memory that loading takes beyond what stood before, in bytes; seconds; the parameters' bytes.

    entry: an entry point's name. small: a checkpoint of the same dialect. All in a process of its own.
    """
    command = [sys.executable, "-c", _PROGRAM, entry, str(small), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    peak, seconds, size = done.stdout.split()
    return int(peak), float(seconds), int(size)
