"""TensorFlow's checkpoints: what TensorFlow 2.21 wrote (make_tensorflow.py), and what is said of damage."""

import hashlib
import importlib
import io
import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dialects import varint
from make_tensorflow import CONFIG, weights
from servers import FakeHub

import hubmodels
from hubmodels.checkpoint import tensorflow_file
from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError

FIXTURES = Path(__file__).resolve().parent / "fixtures"
KINDS = ("one", "three", "objects")
INDEX, DATA = "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"
QUERY = "bert/encoder/layer_1/attention/self/query/kernel"


@pytest.fixture
def copy(tmp_path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(FIXTURES / "tensorflow" / kind, tmp_path / kind))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    return str(caught.value)


def read_all(path: Path) -> None:
    for tensor in read_checkpoint(path).values():
        tensor.read()


# --- What TensorFlow wrote


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_read_both_ways(kind):
    found = read_checkpoint(FIXTURES / "tensorflow" / kind / INDEX)
    for name, numbers in weights().items():
        assert (found[name].shape, found[name].dtype) == (numbers.shape, torch.float32)
        assert np.array_equal(found[name].read().numpy(), numbers)
        target = torch.empty(numbers.shape)
        found[name].read_into(target)
        assert np.array_equal(target.numpy(), numbers)


def test_what_else_there_is_has_its_name_and_type():
    found = read_checkpoint(FIXTURES / "tensorflow" / "one" / INDEX)
    others = found.keys() - weights().keys()
    assert {name.rsplit("/", 1)[-1] for name in others} == {"adam_m", "adam_v", "global_step"}
    assert (found["global_step"].dtype, int(found["global_step"].read())) == (torch.int64, 7)


def test_objects_have_the_names_of_their_variables_and_no_strings():
    """TensorFlow 2's own keys are paths of attributes."""
    found = read_checkpoint(FIXTURES / "tensorflow" / "objects" / INDEX)
    assert found.keys() == {*weights(), "global_step"}


def theirs(name: str) -> torch.Tensor:
    return torch.from_numpy(weights()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_them_where_they_belong(kind):
    model = hubmodels.bertForPreTraining(FIXTURES / "tensorflow" / kind)
    assert model.provenance.dialect == "tensorflow"
    ours = dict(model.named_parameters())
    assert torch.equal(ours["transformer.embeddings.word.weight"], theirs("bert/embeddings/word_embeddings"))
    assert torch.equal(ours["transformer.embeddings.norm.bias"], theirs("bert/embeddings/LayerNorm/beta"))
    for number in range(CONFIG["num_hidden_layers"]):
        layer, path = f"transformer.layers.{number}", f"bert/encoder/layer_{number}"
        parts = [theirs(f"{path}/attention/self/{part}/kernel").t() for part in ("query", "key", "value")]
        assert torch.equal(ours[f"{layer}.attention.qkv.weight"], torch.cat(parts))
        inner = theirs(f"{path}/intermediate/dense/kernel")
        assert torch.equal(ours[f"{layer}.feed_forward.inner.weight"], inner.t())
        assert torch.equal(ours[f"{layer}.feed_forward_norm.weight"], theirs(f"{path}/output/LayerNorm/gamma"))
    assert torch.equal(ours["transformer.pooler.weight"], theirs("bert/pooler/dense/kernel").t())
    assert torch.equal(ours["head.bias"], theirs("cls/predictions/output_bias"))
    assert torch.equal(ours["next_sentence.weight"], theirs("cls/seq_relationship/output_weights"))


def test_it_computes_what_transformers_computes_of_the_same_numbers(tmp_path):
    """Of our export: that the names mean what they mean there."""
    transformers = pytest.importorskip("transformers")
    ours = hubmodels.bertForPreTraining(FIXTURES / "tensorflow" / "one", dtype=torch.float64)
    hubmodels.export(ours, tmp_path)
    reference = transformers.BertForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).prediction_logits, reference(ids).prediction_logits, atol=1e-12, rtol=0)


def test_the_account_has_every_key_of_the_file():
    found = read_checkpoint(FIXTURES / "tensorflow" / "one" / INDEX)
    report = hubmodels.bertForPreTraining(FIXTURES / "tensorflow" / "one").provenance.report
    training = {entry.theirs for entry in report.entries if entry.because == "of the training, not of the model"}
    assert training == {key for key in found if key.endswith(("adam_m", "adam_v", "global_step"))}
    assert sum(entry.theirs is not None for entry in report.entries) == len(found)


@pytest.mark.parametrize("name", ["", INDEX, "bert_model.ckpt.data-00001-of-00003"])
def test_any_of_its_files_stands_for_the_checkpoint(name):
    model = hubmodels.bertModel(FIXTURES / "tensorflow" / "three" / name)
    assert [file.path.name for file in model.provenance.files] == [
        INDEX,
        *(f"bert_model.ckpt.data-{number:05d}-of-00003" for number in range(3)),
    ]


def test_of_several_checkpoints_one_has_to_be_named(copy):
    directory = copy("one")
    for path in directory.glob("bert_model.ckpt.*"):
        shutil.copy(path, directory / path.name.replace("bert_model.ckpt", "model.ckpt-1000"))
    with pytest.raises(CheckpointError, match=r"got bert_model\.ckpt\.index, model\.ckpt-1000\.index"):
        hubmodels.bertModel(directory)
    assert hubmodels.bertModel(directory / "model.ckpt-1000.index").provenance.dialect == "tensorflow"


# --- Damage


def test_a_wrong_number_is_noticed_when_it_is_read(copy):
    path = copy("one") / DATA
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    text = refusal(path.with_name(INDEX))
    assert text.startswith(f"{path}: ")
    assert "expected checksum" in text


def test_a_wrong_byte_of_the_index_is_noticed(copy):
    path = copy("one") / INDEX
    content = path.read_bytes()
    for at in range(0, len(content) - 48, 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "does not have its checksum" in refusal(path)


def test_a_short_data_file_is_noticed(copy):
    path = copy("three") / "bert_model.ckpt.data-00001-of-00003"
    path.write_bytes(path.read_bytes()[:-1])
    text = refusal(path.with_name(INDEX))
    assert text.startswith(f"{path}: ")
    assert "truncated" in text


def test_a_missing_data_file_is_named(copy):
    path = copy("three") / "bert_model.ckpt.data-00002-of-00003"
    path.unlink()
    assert refusal(path.with_name(INDEX)) == f"{path}: missing beside bert_model.ckpt.index"


@pytest.mark.parametrize("content", [b"x", bytes(48), b"x" * 1000])
def test_what_is_no_index_is_told(tmp_path, content):
    (tmp_path / "x.index").write_bytes(content)
    assert "not the index of a TensorFlow checkpoint" in refusal(tmp_path / "x.index")


def test_without_the_library_for_checksums_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "crc32c", None)
    assert "pip install crc32c" in refusal(FIXTURES / "tensorflow" / "one" / INDEX)


# --- Blocks that TensorFlow does not write by default


def repacked(index: Path, kind: int, pack: Callable[[bytes], bytes]) -> None:
    """The same index with its pairs in one block, packed."""
    pairs = tensorflow_file._table(memoryview(index.read_bytes()))
    plain = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)

    def block(content: bytes, kind: int) -> bytes:
        whole = content + bytes([kind])
        return whole + struct.pack("<I", tensorflow_file._masked_crc(whole))

    ends = struct.pack("<II", 0, 1)
    first = pack(plain + ends)
    content = block(first, kind)
    handle = varint(0) + varint(len(first))
    second = b"\0" + varint(1) + varint(len(handle)) + b"~" + handle + ends
    footer = (varint(0) + varint(0) + varint(len(content)) + varint(len(second))).ljust(40, b"\0")
    index.write_bytes(content + block(second, 0) + footer + struct.pack("<Q", 0xDB4775248B80FB57))


def snappy(data: bytes) -> bytes:
    """Literals of every width, and copies of every kind where something repeats."""
    out, at = bytearray(varint(len(data))), 0
    while at < len(data):
        back = next(
            (b for b in (1, 2, 7, 300, 70_000) if b <= at and data[at - b : at - b + 4] == data[at : at + 4]), 0
        )
        if back:
            size = 4
            while size < 11 and at + size < len(data) and data[at + size] == data[at + size - back]:
                size += 1
            if back < 2048:
                out += bytes([1 | (size - 4) << 2 | (back >> 8) << 5, back & 0xFF])
            elif back < 1 << 16:
                out += bytes([2 | (size - 1) << 2]) + struct.pack("<H", back)
            else:
                out += bytes([3 | (size - 1) << 2]) + struct.pack("<I", back)
        else:
            size = min((1, 70, 300)[at % 3], len(data) - at)
            wide = 0 if size <= 60 else 1 if size <= 256 else 2
            out += bytes([(size - 1 if not wide else 59 + wide) << 2]) + (size - 1).to_bytes(wide, "little")
            out += data[at : at + size]
        at += size
    return bytes(out)


@pytest.mark.parametrize(("kind", "pack"), [(0, bytes), (1, snappy)], ids=["plain", "snappy"])
def test_a_block_may_be_compressed(copy, kind, pack):
    path = copy("one") / INDEX
    repacked(path, kind, pack)
    found = read_checkpoint(path)
    assert np.array_equal(found[QUERY].read().numpy(), weights()[QUERY])


@pytest.mark.parametrize("data", [b"", b"a", b"ab" * 5000, bytes(100_000), bytes(range(256)) * 300])
def test_snappy_gives_back_what_was_packed(data):
    assert tensorflow_file._unsnappy(memoryview(snappy(data))) == data


def test_an_unknown_compression_is_told(copy):
    path = copy("one") / INDEX
    repacked(path, 7, bytes)
    assert "is compressed with method 7" in refusal(path)


# --- By name, as members of an archive


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A server that has the archive as Google published its own, and a manifest that pins its members."""
    catalog = importlib.import_module("hubmodels.catalog")
    fake = FakeHub()
    content = {path.name: path.read_bytes() for path in (FIXTURES / "tensorflow" / "three").iterdir()}
    content["vocab.txt"] = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sea"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"tiny_L-2/{name}", data)
    url = fake.put("bert_models/tiny_L-2.zip", buffer.getvalue())
    names = [INDEX, *sorted(name for name in content if ".data-" in name), "vocab.txt"]
    files = (catalog.File(url, None, f"tiny_L-2/{n}", None, hashlib.sha256(content[n]).hexdigest()) for n in names)
    record = catalog.Record(
        name="tiny-bert",
        family="bert",
        config=json.loads(content["bert_config.json"]),
        tokenizer={"file": "tiny_L-2/vocab.txt", "lower_case": True},
        files=tuple(files),
        dialect="tensorflow",
        licence="MIT",
        homepage="h",
        citation="c",
        parameters=3172 - 37,
        check={"none": "made for this test"},
    )
    monkeypatch.setattr(catalog, "manifest", lambda path=None: {"tiny-bert": record})
    with fake.running(monkeypatch):
        yield fake


def test_members_of_googles_archive_are_fetched_and_loaded_by_name(published):
    model = hubmodels.bertForPreTraining("tiny-bert", progress=False)
    want = dict(hubmodels.bertForPreTraining(FIXTURES / "tensorflow" / "one").named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in model.named_parameters())
    names = [file.path.name for file in model.provenance.files]
    assert names == [INDEX, *(f"bert_model.ckpt.data-{number:05d}-of-00003" for number in range(3))]
    assert all(file.pinned for file in model.provenance.files)
    assert hubmodels.bertTokenizer("tiny-bert", progress=False)("sea")["input_ids"].tolist() == [[2, 5, 3]]
    requests = len(published.requests)
    hubmodels.bertModel("tiny-bert", progress=False)
    assert len(published.requests) == requests
