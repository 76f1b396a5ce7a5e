"""Bytes: every file format, and every way in which a file can be wrong. Nothing in a file is trusted."""

import json
import os
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError, HubModelsError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": (torch.randn(5, 3, generator=generator) * 9).to(dtype),
        "deep": (torch.randn(2, 3, 4, generator=generator) * 9).to(dtype),
        "vector": (torch.randn(7, generator=generator) * 9).to(dtype),
        "scalar": torch.tensor(3.0).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }


def assert_holds(path: Path, want: dict[str, Tensor]) -> None:
    found = read_checkpoint(path)
    assert found.keys() == want.keys()
    for name, lazy in found.items():
        assert (tuple(lazy.shape), lazy.dtype) == (tuple(want[name].shape), want[name].dtype), name
        assert torch.equal(lazy.read(), want[name]), name
        target = torch.zeros_like(want[name])
        lazy.read_into(target)
        assert torch.equal(target, want[name]), name


def by_hand(path: Path, header: object, data: bytes, pad: int = 0) -> Path:
    """A safetensors file around any header; `pad` spaces after it move the data."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    return {name: lazy.read() for name, lazy in read_checkpoint(path).items()}


def refusal(path: Path) -> str:
    """The text with which the file is refused. Every one of them names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- Files as they should be


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_reads_what_was_saved(dtype, tmp_path):
    save_file(tensors(dtype), tmp_path / "model.safetensors", {"format": "pt"})
    assert_holds(tmp_path / "model.safetensors", tensors(dtype))


@pytest.mark.parametrize("pad", range(9))
def test_safetensors_at_every_alignment(pad, tmp_path):
    first, second = torch.arange(3, dtype=torch.float32), torch.tensor([7, -7])
    header = {
        "first": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "second": {"dtype": "I64", "shape": [2], "data_offsets": [13, 29]},
    }
    data = b"\x05" + first.numpy().tobytes() + second.numpy().tobytes()
    path = by_hand(tmp_path / "model.safetensors", header, data, pad)
    assert_holds(path, {"first": first, "odd": torch.tensor([5], dtype=torch.uint8), "second": second})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bin_reads_what_was_saved(dtype, zipped, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(dtype), path, _use_new_zipfile_serialization=zipped)
    assert_holds(path, tensors(dtype))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_with_shared_strided_and_parameter_tensors(zipped, tmp_path):
    table = torch.randn(4, 3)
    content = {"table": table, "again": table, "turned": table.t(), "parameter": nn.Parameter(table + 1)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "x.pt")
    assert all(torch.equal(found[name].read(), content[name]) for name in content)
    assert found["turned"].shape == (3, 4)


@pytest.mark.parametrize("name", ["model.safetensors", "zip.bin", "legacy.bin"])
def test_writing_into_a_loaded_tensor_leaves_the_file_alone(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=name.startswith("zip"))
    before = path.read_bytes()
    for lazy in read_checkpoint(path).values():
        lazy.read().fill_(42)
    assert path.read_bytes() == before
    assert_holds(path, tensors())


def _resident() -> int:
    """bytes of this process that are in memory"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_safetensors_stays_in_its_file_until_it_is_used(tmp_path):
    """A file with a hole of 400 MB: what is not touched is not read."""
    size = 400 * 2**20
    header = {"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    pad = -len(json.dumps(header)) % 8  # as the reference writes it; without it a tensor has to be copied to be aligned
    path = by_hand(tmp_path / "model.safetensors", header, b"", pad)
    os.truncate(path, path.stat().st_size + size)
    before = _resident()
    tensor = read_checkpoint(path)["big"].read()
    assert tensor.shape == (size // 4,)
    assert tensor[-1] == tensor[0] == 0
    assert _resident() - before < 50 * 2**20


# --- Files that are refused


def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_empty_file(name, tmp_path):
    (tmp_path / name).touch()
    text = refusal(tmp_path / name)
    assert "the file is empty" in text
    assert "Fetch or save it again" in text


@pytest.mark.parametrize(
    "content", [b"x", b"garbage" * 99, b"<!DOCTYPE html><html>Not found", b"version https://git-lfs"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_garbage(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name)
    assert f"not a {'safetensors file' if name == 'model.safetensors' else 'PyTorch checkpoint'}" in text
    assert "etch" in text
    assert "weights_only" not in text  # torch's advice to run what the file says is not ours


def _saved(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / {"safetensors": "model.safetensors"}.get(kind, "pytorch_model.bin")
    content = {name: tensor for name, tensor in tensors().items() if name != "empty"}
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_truncated_file(kind, keep, tmp_path):
    path = _saved(tmp_path, kind)
    os.truncate(path, min(int(path.stat().st_size * keep), path.stat().st_size - 1))
    text = refusal(path)
    assert "truncated" in text or "fetch it again" in text
    assert "etch" in text


def test_bytes_after_the_end_of_a_safetensors_file(tmp_path):
    path = _saved(tmp_path, "safetensors")
    size = sum(tensor.nbytes for tensor in tensors().values())
    with open(path, "ab") as file:
        file.write(b"more")
    text = refusal(path)
    assert f"the header describes {size} bytes of tensors, the file has {size + 4}" in text


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_header_length(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    text = refusal(path)
    assert f"has {length} bytes, the file has 74" in text if length > 74 else "not JSON" in text


def _f32(first: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}


BAD_HEADERS = {
    "overlap": ({"a": _f32(0, 8, [2]), "b": _f32(4, 12, [2])}, 12, "b begins at byte 4, where 8 was expected"),
    "gap": ({"a": _f32(0, 8, [2]), "b": _f32(12, 20, [2])}, 20, "b begins at byte 12, where 8 was expected"),
    "gap at the start": ({"a": _f32(4, 12, [2])}, 12, "a begins at byte 4, where 0 was expected"),
    "past the end": ({"a": _f32(0, 16, [4])}, 12, "stands at 0 to 16, in a file with 12 bytes of tensors"),
    "far past the end": ({"a": _f32(2**62, 2**62 + 8, [2])}, 12, "in a file with 12 bytes"),
    "backwards": ({"a": _f32(8, 0, [2])}, 8, "stands at 8 to 0"),
    "negative": ({"a": _f32(-8, 0, [2])}, 8, "natural numbers"),
    "shape and span differ": ({"a": _f32(0, 8, [3])}, 8, "a [3] of F32 needs 12 bytes and stands at 0 to 8"),
    "negative shape": ({"a": _f32(0, 8, [-1, -2])}, 8, "entry for a is not valid"),
    "fractional shape": ({"a": _f32(0, 8, [2.0])}, 8, "entry for a is not valid"),
    "boolean shape": ({"a": _f32(0, 4, [True])}, 4, "entry for a is not valid"),
    "shape of text": ({"a": _f32(0, 8, "ab")}, 8, "entry for a is not valid"),
    "shape is a number": ({"a": _f32(0, 8, 2)}, 8, "entry for a is not valid"),
    "three offsets": ({"a": {**_f32(0, 8, [2]), "data_offsets": [0, 4, 8]}}, 8, "entry for a is not valid"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "entry for a is not valid"),
    "entry is a number": ({"a": 3}, 0, "entry for a is not valid"),
    "unknown dtype": ({"a": {**_f32(0, 8, [2]), "dtype": "F31"}}, 8, "a has dtype F31; known are F64, F32, F16, BF16"),
    "dtype is a list": ({"a": {**_f32(0, 8, [2]), "dtype": ["F32"]}}, 8, "a"),
    "dtype is missing": ({"a": {**_f32(0, 8, [2]), "dtype": None}}, 8, "a has dtype None"),
    "a list": ([1, 2], 0, "expected a JSON object as the safetensors header, got a list"),
    "not JSON": (b"{'a': 1}", 8, "the safetensors header is not JSON"),
    "not text": (b"\xff\xfe\xff\xff", 8, "the safetensors header is not JSON"),
    "nested without end": (b"[" * 200_000, 8, "header"),
    "empty and immense": ({"a": _f32(0, 0, [0, 2**70])}, 0, "a"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_safetensors_header(case, tmp_path):
    header, size, expected = BAD_HEADERS[case]
    assert expected in refusal(by_hand(tmp_path / "model.safetensors", header, bytes(size)))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = _saved(tmp_path, "safetensors")
    lazy = read_checkpoint(path)["matrix"]
    os.truncate(path, 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file became shorter while it was read"):
        lazy.read_into(torch.empty(5, 3))


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    torch.save({"weight": torch.ones(2), "payload": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    text = refusal(path)
    assert not marker.exists()
    assert "refused, because it holds more than tensors and would have to run code" in text
    assert "state_dict()" in text
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload does work where it is let


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_module_is_refused_with_the_way_out(zipped, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(nn.Linear(2, 3), path, _use_new_zipfile_serialization=zipped)
    text = refusal(path)
    assert "Linear" in text
    assert "load it there and save its state_dict() alone" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("content", "kind"), [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), (None, "NoneType"), (3, "int")]
)
def test_a_bin_that_is_not_a_dict(content, kind, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    text = refusal(tmp_path / "x.bin")
    assert f"expected a state dict, name -> tensor, got a {kind}" in text


def test_a_bin_with_more_than_tensors_names_the_strangers(tmp_path):
    """A training checkpoint: the state dict is one level down."""
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3, "bias": torch.ones(2)}, tmp_path / "x.bin")
    text = refusal(tmp_path / "x.bin")
    assert "expected a state dict" in text
    assert "not tensors: state_dict, epoch" in text
    assert "bias" not in text
    assert "save" in text  # what to do about it


def test_safetensors_bytes_under_the_name_bin(tmp_path):
    path = _saved(tmp_path, "safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "PyTorch checkpoint" in refusal(path)


# --- Files that are wrong in ways nobody thought of


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: other bytes, a piece lost, a piece twice, bytes put in, cut off."""
    content, at = bytearray(data), rng.randrange(len(data))
    width = rng.choice([1, 1, 2, 8, 40])
    match rng.randrange(6):
        case 0 | 1:
            for _ in range(rng.choice([1, 1, 3])):
                content[rng.randrange(len(content))] = rng.randrange(256)
        case 2:
            del content[at : at + width]
        case 3:
            content[at:at] = content[at : at + width]
        case 4:
            content[at:at] = rng.randbytes(width)
        case 5:
            del content[at:]
    return bytes(content)


def survive(path: Path) -> dict[str, Tensor] | None:
    """What is read, or None if the file is refused by name; any other exception ends the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_all(path)
    except HubModelsError as error:
        if str(path) not in str(error):
            raise
        return None
    return {name: tensor.clone() for name, tensor in found.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; NaN is not equal to itself."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_a_damaged_safetensors_file_is_refused_or_read_as_the_reference_reads_it(start, tmp_path):
    whole = {"a.weight": torch.randn(3, 2), "b": torch.arange(4), "e": torch.empty(0, 2), "s": torch.tensor(1.5)}
    save_file(whole, tmp_path / "whole.safetensors", {"format": "pt"})
    data = (tmp_path / "whole.safetensors").read_bytes()
    read = 0
    for seed in range(start, start + 100):
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(mutate(data, random.Random(seed)))
        try:
            reference = load_file(path)
        except Exception:  # the reference has one class of its own and some of Python's
            reference = None
        got = survive(path)
        if got is not None and reference is not None:
            read += 1
            assert got.keys() == reference.keys(), seed
            assert all(same(got[name], reference[name]) for name in got), seed
        path.unlink()
    assert read > 0


@pytest.mark.parametrize("start", range(0, 300, 100))
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_damaged_bin_is_refused_or_read(kind, start, tmp_path):
    data = _saved(tmp_path, kind).read_bytes()
    outcomes = set()
    for seed in range(start, start + 100):
        path = tmp_path / f"{seed}.bin"
        path.write_bytes(mutate(data, random.Random(seed)))
        outcomes.add(survive(path) is None)
        path.unlink()
    assert outcomes == {True, False}


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_a_damaged_shard_is_refused_or_read_as_numpy_reads_it(start, tmp_path):
    (tmp_path / "params_shapes.json").write_text("[[3, 2], [1, 2, 4], [6]]")
    for number, part in enumerate(np.split(np.arange(20, dtype=np.float32), [9])):
        np.save(tmp_path / f"params_{number}.npy", part)
    path = tmp_path / "params_1.npy"
    data = path.read_bytes()
    read = 0
    for seed in range(start, start + 100):
        path.write_bytes(mutate(data, random.Random(seed)))
        got = survive(tmp_path)
        try:
            numbers = np.concatenate([np.load(tmp_path / f"params_{number}.npy") for number in range(2)])
        except Exception:  # numpy stumbles in several ways
            continue
        if got is not None:
            read += 1
            assert list(got) == ["params.0", "params.1", "params.2"], seed
            found = np.concatenate([tensor.numpy().ravel() for tensor in got.values()])
            assert found.tobytes() == numbers.tobytes(), seed
    assert read > 0
