"""Bytes: every file format, and every way in which a file can be wrong. Nothing in a file is trusted."""

import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import DEEP, LEAVES, call, row, text
from fuzz import number as integer
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


def pickled(count: int, shape: tuple, stride: tuple = (1,), kind=b"Float", first: int = 0, legacy=False) -> bytes:
    """The pickle of a tensor in storage 0, which is said to have `count` numbers."""
    items = [text(b"storage"), b"ctorch\n%bStorage\n" % kind, text(b"0"), text(b"cpu"), integer(count)]
    place = row(*items, *[b"N"] * legacy) + b"Q", integer(first), row(*map(integer, shape)), row(*map(integer, stride))
    return call(b"torch._utils._rebuild_tensor_v2", *place, b"\x89", b"}")


def legacy(content: bytes) -> bytes:
    """A file of the format before torch 1.6, up to its storage 0."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(start) + content + pickle.dumps(["0"], 2)


def saved(path: Path, zipped: bool, pairs: bytes, numbers: bytes = bytes(64), how: int = zipfile.ZIP_STORED) -> Path:
    """A .bin of a dict with these keys and values; storage 0 is float32."""
    content = b"\x80\x02}(" + pairs + b"u."
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/data/0", numbers, how)
    else:
        path.write_bytes(legacy(content) + struct.pack("<q", len(numbers) // 4) + numbers)
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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_of_a_module_with_the_dtypes_that_have_no_storages_of_their_own(zipped, tmp_path):
    """A module's state_dict carries _metadata; uint16 and its like are saved in another way."""
    module = nn.BatchNorm1d(3)
    for dtype in (torch.uint16, torch.uint32, torch.complex64):
        module.register_buffer(str(dtype)[6:], torch.arange(4).to(dtype).view(2, 2).t())
    torch.save(module.state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert_holds(tmp_path / "x.bin", module.state_dict())


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
@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_a_file_is_not_read_until_it_is_used(kind, tmp_path):
    """A file with a hole of 400 MB: what is not touched is not read."""
    size = 400 * 2**20
    if kind == "safetensors":
        header = {"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        pad = -len(json.dumps(header)) % 8  # as the reference writes it; else a tensor has to be copied to be aligned
        path = by_hand(tmp_path / "model.safetensors", header, b"", pad)
    else:
        path = tmp_path / "pytorch_model.bin"
        names = [text(b"n" * length + b"big") for length in range(4)]  # one of them aligns the numbers
        big = pickled(size // 4, (size // 4,), legacy=True)
        data = next(d for name in names if len(d := legacy(b"\x80\x02}(" + name + big + b"u.")) % 4 == 0)
        path.write_bytes(data + struct.pack("<q", size // 4))
    os.truncate(path, path.stat().st_size + size)
    before = _resident()
    (lazy,) = read_checkpoint(path).values()
    big = lazy.read()
    assert big.shape == (size // 4,)
    assert big[-1] == big[0] == 0
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
    "too long to print": ({"a": _f32(0, 0, [2**62] * 300)}, 0, "entry for a is not valid"),
    "too long to multiply": ({"a": _f32(0, 0, [2**62] * 1_000_000)}, 0, "entry for a is not valid"),
    "a product of 64 bits": ({"a": _f32(0, 0, [0, 2**62, 2])}, 0, "entry for a is not valid"),
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
    assert "refused, because payload is a posix.mkdir, whose code would have to run" in text
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


def test_a_tensor_of_a_training_checkpoint_is_called_by_its_path(tmp_path):
    state = {0: {"step": 3, "exp_avg": torch.ones(2)}}
    content = {"state_dict": {"a.weight": torch.ones(3)}, "epoch": 3, "optimizer_states": [{"state": state}]}
    torch.save(content, tmp_path / "x.ckpt")
    found = read_checkpoint(tmp_path / "x.ckpt")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "state_dict.a.weight": (3,),
        "optimizer_states.0.state.0.exp_avg": (2,),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_protocol_is_read(protocol, tmp_path):
    content = {"state_dict": {"a.weight": torch.arange(3.0)}, "raw": b"x", "big": 2**3000, "kinds": {1, 2}}
    torch.save(content, tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "x.bin")
    assert torch.equal(found["state_dict.a.weight"].read(), torch.arange(3.0))


def test_a_bin_without_a_tensor_says_what_is_in_it(tmp_path):
    torch.save({"model": nn.Linear(2, 3), "epoch": 3}, tmp_path / "x.bin")
    text = refusal(tmp_path / "x.bin")
    assert "got no tensor, but model, a torch.nn.modules.linear.Linear, epoch, a int" in text
    assert "save its state_dict() alone" in text


A = text(b"a")
BAD_PICKLES = {  # the pairs of a dict, and the reason
    "a key that ends the stack": (DEEP + pickled(16, (16,)), "key is neither a name nor a number"),
    "a key that takes for ever to hash": (LEAVES + pickled(16, (16,)), "key is neither a name nor a number"),
    "the same in an OrderedDict": (
        A + call(b"collections.OrderedDict", b"](" + row(DEEP, A) + b"e"),
        "got no tensor, but a, a dict",
    ),
    "an immense storage": (A + pickled(2**40, (16,)), "said to hold 1099511627776 torch.float32; it has 64 bytes"),
    "a storage of few numbers": (A + pickled(4, (4,)), "said to hold 4 torch.float32; it has 64 bytes"),
    "no storage": (A + pickled(16, (16,)).replace(text(b"0"), text(b"1")), "torch.float32; it has 0 bytes"),
    "a tensor past its storage": (A + pickled(16, (17,)), "a [17] of torch.float32 with stride [1] needs 68 bytes"),
    "strides past its storage": (A + pickled(16, (2, 3), (8, 4)), "stride [8, 4] needs 68 bytes of storage 0"),
    "a tensor larger than its file": (A + pickled(16, (10**6, 10**6), (0, 0)), "[1000000, 1000000] of torch.float32"),
    "an empty tensor past its storage": (A + pickled(16, (0,), first=2**63 - 1), "needs 36893488147419103228 bytes"),
    "an immense product": (A + pickled(16, (2**62,) * 64, (0,) * 64), "a tensor is not described as"),
    "a negative stride": (A + pickled(16, (2,), (-1,)), "a tensor is not described as"),
    "a negative storage": (A + pickled(-16, (16,)), "a storage's size is no natural number"),
    "memory": (A + call(b"builtins.bytearray", integer(2**40)), "got no tensor, but a, a builtins.bytearray"),
    "a storage from nothing": (A + call(b"torch.storage.UntypedStorage", integer(2**40)), "its pickle has REDUCE"),
    "a tuple that is called": (A + LEAVES + b"NR", "its pickle has REDUCE, which torch.save does not write there"),
    "a sparse tensor": (
        A + call(b"torch._utils._rebuild_sparse_tensor"),
        "a, a torch._utils._rebuild_sparse_tensor",
    ),
    "a quantised tensor": (A + pickled(16, (16,), kind=b"QInt8"), "got no tensor, but a, a torch.QInt8Storage"),
    "pairs in a list, as Python 2 saved them": (
        A + call(b"collections.OrderedDict", b"](" + row(A, A) + b"e"),
        "got no tensor, but a, a dict",
    ),
    "an OrderedDict of what is no list": (A + call(b"collections.OrderedDict", row(row(A, A))), "no attribute 'clear'"),
    "a parameter of too much": (A + call(b"torch._utils._rebuild_parameter", *[b"N"] * 5), "takes from 3 to 4"),
    "a text of 4 GB": (A + b"X\xff\xff\xff\xffabc", "or a truncated one: expected 4294967295"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_bad_pickle(case, zipped, tmp_path):
    """torch.load with `weights_only` crashes or hangs on some of these, takes the memory, or reads past a record."""
    pairs, reason = BAD_PICKLES[case]
    if not zipped:
        pairs = pairs.replace(b"tQ", b"NtQ")
    assert reason in refusal(saved(tmp_path / "x.bin", zipped, pairs))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_by_hand_is_read(zipped, tmp_path):
    """So the cases above fail for what is wrong with them alone. Numbers may repeat, if the file is as large."""
    numbers = torch.arange(16.0)
    first, second = (pickled(16, *of, legacy=not zipped) for of in (((2, 3), (5, 2)), ((4, 2), (0, 1))))
    path = saved(tmp_path / "x.bin", zipped, A + first + text(b"b") + second, numbers.numpy().tobytes())
    assert_holds(path, {"a": numbers.as_strided((2, 3), (5, 2)), "b": numbers[:2].expand(4, 2)})


def test_keys_that_end_the_stack_in_the_list_of_an_old_files_storages(tmp_path):
    """The list stands after the content, in a pickle of its own."""
    path = saved(tmp_path / "x.bin", False, A + pickled(16, (16,), legacy=True))
    path.write_bytes(path.read_bytes().replace(pickle.dumps(["0"], 2), b"\x80\x02]" + DEEP + b"a."))
    assert "said to hold 16 torch.float32; it has 0 bytes" in refusal(path)


def test_a_compressed_storage_is_not_taken_for_numbers(tmp_path):
    """An archive that somebody unpacked and packed again: torch.load maps the compressed bytes."""
    path = saved(tmp_path / "x.bin", True, A + pickled(16, (16,)), how=zipfile.ZIP_DEFLATED)
    assert "archive/data/0 does not stand in it as torch.save writes it" in refusal(path)


def test_a_record_that_is_there_twice(tmp_path):
    path = saved(tmp_path / "x.bin", True, A + pickled(16, (16,)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(64))
    assert "archive/data/0 does not stand in it as torch.save writes it" in refusal(path)


@pytest.mark.parametrize(("field", "said"), [(42, 0), (42, 10**9), (42, -1), (20, 0), (24, 1), (24, 10**9), (8, 1)])
def test_a_directory_that_does_not_fit_its_records(field, said, tmp_path):
    """42: where a record begins. 20 and 24: its size, compressed and not. 8: its flags, of which 1 is encryption."""
    path = saved(tmp_path / "x.bin", True, A + pickled(16, (16,)))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    data[at + field : at + field + 4] = said.to_bytes(4, "little", signed=True)
    path.write_bytes(data)
    assert "archive/data/0 does not stand in it as torch.save writes it" in refusal(path)


def test_an_archive_whose_pickle_is_damaged(tmp_path):
    path = saved(tmp_path / "x.bin", True, A + pickled(16, (4, 3), (3, 1)))
    path.write_bytes(path.read_bytes().replace(integer(4) + integer(3), integer(3) + integer(3)))
    assert "archive/data.pkl is damaged" in refusal(path)


@pytest.mark.parametrize(("record", "content"), [("archive/byteorder", b"big"), ("archive/data/data.pkl", b"")])
def test_an_archive_of_big_endian_numbers_or_without_a_pickle(record, content, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr(record, content)
    assert "there is no data.pkl in it, or its numbers are big-endian" in refusal(tmp_path / "x.bin")


def test_safetensors_bytes_under_the_name_bin(tmp_path):
    path = _saved(tmp_path, "safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "PyTorch checkpoint" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [([10**99] * 64, "describes over 2^63 numbers"), ([1] * 65, "a shape has at most 64 dimensions")],
    ids=["too long to print", "too many"],
)
def test_shapes_that_python_cannot_count(shape, reason, tmp_path):
    (tmp_path / "params_shapes.json").write_text(json.dumps([shape]))
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("count", [b"-" * 60_000 + b"1", b"9" * 4300], ids=["an expression", "a long number"])
def test_a_shards_header_is_not_given_to_pythons_parser(count, tmp_path):
    """A long expression exhausts its memory, and a number of 4300 digits may not be printed four times as large."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%b,), }" % count
    (tmp_path / "params_shapes.json").write_text("[]")
    (tmp_path / "params_0.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    assert "expected a .npy of one row of float32: its header is " in refusal(tmp_path)


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
