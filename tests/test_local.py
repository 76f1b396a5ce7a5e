"""Paths: archives as they were published, directories, and TensorFlow's way to name a checkpoint."""

import bz2
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, SHARED

import hubmodels
from hubmodels import local
from hubmodels.errors import CatalogError, CheckpointError, ConfigError, HubModelsError
from hubmodels.loading import model_type_of
from hubmodels.tokenizers import WordPieceTokenizer

GOOGLE = REPOSITORY / "tests" / "fixtures" / "tensorflow" / "one"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c", "paris"]
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where archives are unpacked. Whatever a test does, nothing is left there."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture(scope="module")
def model():
    return hubmodels.bertForPreTraining(GOOGLE)


@pytest.fixture
def google() -> Files:
    files = {path.name: path.read_bytes() for path in GOOGLE.iterdir()}
    return {**files, "vocab.txt": "\n".join(WORDS).encode()}


@pytest.fixture(scope="module")
def old(model, tmp_path_factory) -> Files:
    """What pytorch-pretrained-bert had: torch's format of then, LayerNorm's gamma and beta, Google's config."""
    directory = tmp_path_factory.mktemp("old")
    hubmodels.export(model, directory)
    state = safetensors.torch.load_file(directory / "model.safetensors")
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    spelled = {re.sub(r"LayerNorm\.\w+", lambda found: ends[found[0]], key): state[key] for key in state}
    torch.save(spelled, directory / "x.bin", _use_new_zipfile_serialization=False)
    config = (GOOGLE / "bert_config.json").read_bytes()
    weights = (directory / "x.bin").read_bytes()
    return {"bert_config.json": config, "pytorch_model.bin": weights, "vocab.txt": "\n".join(WORDS).encode()}


@pytest.fixture(scope="module")
def today(old, model, tmp_path_factory) -> Files:
    """The same in torch's zip format."""
    path = tmp_path_factory.mktemp("today") / "x.bin"
    torch.save(torch.load(io.BytesIO(old["pytorch_model.bin"]), weights_only=True), path)
    return {**old, "pytorch_model.bin": path.read_bytes()}


def zipped(path: Path, files: Files, top: str = "", how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return path


def tarred(path: Path, files: Files, top: str = "", mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def assert_same(path: Path | str, model) -> torch.nn.Module:
    """Loaded from an archive, or a file: the same numbers, which are of use afterwards too."""
    found, want = hubmodels.bertForPreTraining(path), dict(model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in found.named_parameters())
    assert found.provenance.report.is_complete
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(found(ids).prediction_logits, model(ids).prediction_logits)
        for parameter in found.parameters():
            parameter.add_(1)
    return found


def refused(path: Path, error: type[HubModelsError] = CheckpointError, load: Callable = hubmodels.bertModel) -> str:
    """The text of the error."""
    with pytest.raises(error) as caught:
        load(path)
    return str(caught.value)


def damaged(path: Path) -> str:
    """The text with which the archive itself is refused."""
    text = refused(path)
    assert text.startswith(f"{path}: not an archive, or a damaged one: ")
    assert text.endswith(". Fetch it again")
    return text


def outcome(path: Path, model) -> str | None:
    """The text of the error; None if there is none, and then all numbers are right."""
    try:
        assert_same(path, model)
    except CheckpointError as error:
        return str(error)
    return None


# --- Archives as they were published

JUNK = {
    "__MACOSX/._uncased": b"\0\5\x16\7",
    "__MACOSX/uncased/._bert_config.json": b"\0\5\x16\7",
    "__MACOSX/uncased/._bert_model.ckpt.index": b"\0\5\x16\7",
    "__MACOSX/uncased/._vocab.txt": b"\0\5\x16\7",
    "uncased/.DS_Store": b"\0",
    "uncased/.ipynb_checkpoints": b"\0",
    "uncased/checkpoint": b'model_checkpoint_path: "bert_model.ckpt"',
    "uncased/bert_model.ckpt.meta": b"\x0a",
    "uncased/LICENSE": b"Apache",
}


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("top", ["", "uncased/", "./", "a/b c/d é/"])
def test_googles_zip(top, how, google, model, tmp_path):
    path = zipped(tmp_path / "uncased_L-2_H-12_A-3.zip", google, top, how)
    provenance = assert_same(path, model).provenance
    (file,) = provenance.files
    assert file.path == path
    assert file.digest == f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert (provenance.weights, provenance.dialect) == (str(path), "tensorflow")
    assert f"  {path}\n  {path.name} {file.digest}, tensorflow" in str(provenance)
    assert "temporary" not in str(provenance)
    assert_same(str(path), model)
    tokenizer = hubmodels.bertTokenizer(path)
    assert tokenizer("A bc Paris")["input_ids"].tolist() == [[2, 5, 6, 7, 8, 3]]
    assert model_type_of(path) == "bert"


def test_a_zip_from_a_mac(google, model, tmp_path):
    files = {f"uncased/{name}": data for name, data in google.items()}
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("uncased")
        archive.mkdir("uncased/config.json.d")
        for name, data in {**JUNK, **files, **{f"{name} ": b"" for name in files}}.items():
            archive.writestr(name, data)
    assert_same(path, model)
    assert hubmodels.bertTokenizer(path).vocab_size == len(WORDS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.tar.gz", "w:gz"),
        ("x.tgz", "w:gz"),
        ("x.tar", "w"),
        ("x.tar", "w:gz"),
        ("x.tar", "w:bz2"),
        ("x.tar", "w:xz"),
    ],
)
@pytest.mark.parametrize("top", ["", "./", "bert-base-uncased/"])
def test_pytorch_pretrained_berts_archive(top, name, mode, old, model, tmp_path):
    path = tarred(tmp_path / name, old, top, mode)
    provenance = assert_same(path, model).provenance
    assert [file.path for file in provenance.files] == [path]
    assert provenance.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance.dialect == "huggingface-gamma-beta"
    assert hubmodels.bertTokenizer(path)("b a")["input_ids"].tolist() == [[2, 6, 5, 3]]


@pytest.mark.parametrize("last", ["pytorch_model.bin", "vocab.txt"])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_an_archive_of_torchs_zip_is_not_taken_for_it(name, last, today, model, tmp_path):
    """Not compressed, a .tar ends with the bytes that a .zip ends with: those of its own last file."""
    files = {key: today[key] for key in sorted(today, key=lambda key: key == last)}
    make = zipped if name == "x.zip" else tarred
    options = {"mode": "w"} if name == "x.tar" else {}
    assert_same(make(tmp_path / name, files, **options), model)


@pytest.mark.parametrize("when", ["old", "today"])
@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "checkpoint.tar", "model.zip"])
def test_a_file_of_torch_that_is_called_an_archive(name, when, model, tmp_path, request):
    """Source: PyTorch's tutorial on saving, by whose convention a training's checkpoint ends in .tar."""
    files = request.getfixturevalue(when)
    (tmp_path / "config.json").write_bytes(files["bert_config.json"])
    (tmp_path / name).write_bytes(files["pytorch_model.bin"])
    assert_same(tmp_path / name, model)


def test_an_archive_without_its_weights_and_an_export_of_it(google, tmp_path):
    path = zipped(tmp_path / "x.zip", google, "uncased/")
    hubmodels.export(hubmodels.bertForPreTraining(path), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    made = hubmodels.bertForPreTraining(path, pretrained=False, head_seed=0)
    assert made.provenance.weights == f"{path}, not pretrained"
    assert made.provenance.files == ()


# --- Archives that are refused


def test_names_never_become_paths(old, model, tmp_path):
    """Whatever stands before the last name is not looked at."""
    before = {path for path in tmp_path.rglob("*") if path.name != "temporary"}
    outside = {
        "../../../bert_config.json": old["bert_config.json"],
        f"{tmp_path}/pytorch_model.bin": old["pytorch_model.bin"],
        "a/../../vocab.txt": old["vocab.txt"],
        "..": b"",
        "../": b"",
        "C:\\x\\y.json": b"{}",
        "..\\..\\z.json": b"{}",
        "/": b"",
    }
    for path in (zipped(tmp_path / "x.zip", outside), tarred(tmp_path / "x.tar.gz", outside)):
        assert_same(path, model)
        assert hubmodels.bertTokenizer(path).vocab_size == len(WORDS)
        path.unlink()
    assert {path for path in tmp_path.rglob("*") if path.name != "temporary"} == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_no_plain_file_in_a_tar_is_not_there(kind, old, tmp_path):
    (tmp_path / "secret.json").write_bytes(old["bert_config.json"])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("bert_config.json", "vocab.txt"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.json")
            archive.addfile(info)
        info = tarfile.TarInfo("pytorch_model.bin")
        info.size = len(old["pytorch_model.bin"])
        archive.addfile(info, io.BytesIO(old["pytorch_model.bin"]))
    assert "config.json" in refused(tmp_path / "x.tar.gz")
    assert "found none" in refused(tmp_path / "x.tar.gz", load=hubmodels.bertTokenizer)


def test_a_link_in_a_zip_is_the_text_of_where_it_leads(old, tmp_path):
    (tmp_path / "secret.json").write_bytes(old["bert_config.json"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("bert_config.json")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(tmp_path / "secret.json"))
        archive.writestr("pytorch_model.bin", old["pytorch_model.bin"])
    assert "not JSON" in refused(tmp_path / "x.zip", ConfigError)


@pytest.mark.parametrize("make", [zipped, tarred])
def test_two_checkpoints_in_one_archive_are_both_named(make, old, tmp_path):
    path = tmp_path / ("x.zip" if make is zipped else "x.tar.gz")
    make(path, {f"{size}/{name}": data for size in ("base", "large") for name, data in old.items()})
    want = f"{path}: base/bert_config.json and large/bert_config.json are of two checkpoints; unpack it and name one"
    for load in (hubmodels.bertModel, hubmodels.bertTokenizer, model_type_of):
        assert refused(path, load=load) == f"{want} directory"


def test_two_checkpoints_of_tensorflow_in_one_archive(google, tmp_path):
    more = {name.replace("bert_model.ckpt", "model.ckpt-100"): data for name, data in google.items()}
    path = zipped(tmp_path / "x.zip", google | more)
    assert "expected one checkpoint, got bert_model.ckpt.index, model.ckpt-100.index; name one" in refused(path)


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_encrypted_zip(how, google, tmp_path):
    """What a password protects says so in the first of its flags, before each file and in the list at the end."""
    path = zipped(tmp_path / "x.zip", google, how=how)
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for found in re.finditer(re.escape(mark), bytes(data)):
            data[found.start() + place] |= 1
    path.write_bytes(data)
    assert "is encrypted, password required for extraction" in damaged(path)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_a_wrong_byte(how, google, tmp_path):
    path = zipped(tmp_path / "x.zip", google, how=how)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        big = archive.getinfo("bert_model.ckpt.data-00000-of-00001")
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(changed(data, big.header_offset + 100 + int(part * (big.compress_size - 100))))
        damaged(path)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_tar_with_a_wrong_bit_is_refused_or_the_same(mode, today, model, tmp_path):
    """The sum that tells stands at the end of a .gz, where a reader of tars has no need to go."""
    name = "x.tar.gz" if mode == "w:gz" else "x.tar"
    data = tarred(tmp_path / name, today, "bert/", mode).read_bytes()
    rng, texts = random.Random(0), []
    for _ in range(12):
        (tmp_path / name).write_bytes(changed(data, rng.randrange(30, len(data))))
        texts.append(outcome(tmp_path / name, model))
    texts = [text for text in texts if text is not None]
    assert len(texts) > 6
    assert all(text.startswith(f"{tmp_path / name}: not an archive, or a damaged one: ") for text in texts)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
def test_a_truncated_tar(mode, keep, old, tmp_path):
    """The very end of one that is not compressed is nothing but zeros."""
    path = tarred(tmp_path / ("x.tar.gz" if mode == "w:gz" else "x.tar"), old, "bert/", mode)
    size = path.stat().st_size if mode != "w" else len(old["pytorch_model.bin"])
    os.truncate(path, int(size * keep))
    damaged(path)


@pytest.mark.parametrize("keep", [0, 1, 30, 0.3, 0.99])
def test_a_truncated_zip(keep, google, tmp_path):
    path = zipped(tmp_path / "x.zip", google)
    os.truncate(path, int(path.stat().st_size * keep) if isinstance(keep, float) else keep)
    damaged(path)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tar", "x.tgz"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"<!DOCTYPE html><html>Not found",
        b"version https://git-lfs",
        bytes(2000),
        b"\x1f\x8b",
        b"PK\3\4",
        b"PK\5\6",
    ],
)
def test_what_is_no_archive(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    text = refused(tmp_path / name)
    assert "not an archive, or a damaged one" in text or "config.json" in text  # 2000 zeros are a tar of nothing


@pytest.mark.parametrize("damage", ["xz", "zip", "bz2"])
def test_a_stream_that_its_own_reader_stumbles_over(damage, today, tmp_path):
    """Each library of Python's has its own class of errors."""
    plain = tarred(tmp_path / "plain", today, mode="w").read_bytes()
    if damage == "zip":
        path = zipped(tmp_path / "x.zip", today, how=zipfile.ZIP_LZMA)
        data = path.read_bytes()
    else:
        path, data = tmp_path / "x.tar", {"xz": lzma, "bz2": bz2}[damage].compress(plain)
    path.write_bytes(data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :])
    damaged(path)


def test_a_zip_whose_names_are_no_text(google, tmp_path):
    path = zipped(tmp_path / "x.zip", {"é.json": b"{}", **google})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    damaged(path)


@pytest.mark.parametrize("name", ["a\0b.json", "a" * 300 + ".json", "\udcff.json", "bert_config.json\n", "a\nb.json"])
def test_a_tar_with_an_odd_name(name, old, model, tmp_path):
    """It is passed over, unpacked or refused."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in {"odd": b"{}", **old}.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            info.pax_headers = {"path": name} if member == "odd" else {}
            archive.addfile(info, io.BytesIO(data))
    assert (outcome(path, model) or f"{path}: ").startswith(f"{path}: ")


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize("files", [{}, {"readme.md": b"#"}, {".config.json": b"{}"}])
def test_an_archive_of_nothing(files, make, tmp_path):
    path = make(tmp_path / ("x.zip" if make is zipped else "x.tar.gz"), files)
    assert "config.json" in refused(path)
    assert "expected one of tokenizer.json, vocab.txt, " in refused(path, load=hubmodels.bertTokenizer)


@pytest.mark.parametrize(
    "missing", ["bert_config.json", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"]
)
def test_an_archive_with_a_part_missing_is_named(missing, google, tmp_path):
    """And not the place where it was unpacked, which is gone."""
    del google[missing]
    path = zipped(tmp_path / "x.zip", google, "uncased/")
    text = refused(path)
    assert str(path) in text
    assert str(tmp_path / "temporary") not in text


@pytest.mark.parametrize("make", [zipped, tarred])
def test_an_archive_larger_than_the_disk(make, old, tmp_path, monkeypatch, temporary):
    """By what it says of itself, before anything is written."""
    path = make(tmp_path / ("x.zip" if make is zipped else "x.tar.gz"), old)
    needed = sum(map(len, old.values()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=needed - 1))
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("something was written"))
    said = (
        rf"{path}: cannot be unpacked into {temporary}/hubmodels-\S+: it needs {needed} bytes, {needed - 1} are free; "
    )
    assert re.fullmatch(said + "TMPDIR names another place, or unpack it yourself", refused(path))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=needed))
    assert hubmodels.bertModel(path).config.hidden_size == 12


def test_a_zip_bomb_is_no_larger_than_it_says(google, tmp_path, temporary, monkeypatch):
    """A file of 64 MB that says it has 100 bytes: no more is written, and its sum is wrong."""
    path = zipped(tmp_path / "x.zip", {**google, "bomb.json": bytes(64 << 20)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    assert data[at + 46 : at + 55] == b"bomb.json"
    data[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    sizes, copy = [], shutil.copyfileobj

    def watched(source, target, *more):
        try:
            copy(source, target, *more)
        finally:
            sizes.append(target.tell())

    monkeypatch.setattr(shutil, "copyfileobj", watched)
    assert "Bad CRC-32 for file 'bomb.json'" in damaged(path)
    assert max(sizes[-1:]) <= 100


@pytest.mark.parametrize("make", [zipped, tarred])
def test_a_tokenizer_needs_no_room_for_weights(make, old, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_LONGEST_TEXT", 1000)
    assert len(old["pytorch_model.bin"]) > 1000
    path = make(tmp_path / ("x.zip" if make is zipped else "x.tar.gz"), old)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=1000))
    assert hubmodels.bertTokenizer(path).vocab_size == len(WORDS)
    assert model_type_of(path) == "bert"
    assert "are free" in refused(path)


def test_a_vocabulary_that_is_too_long_is_not_unpacked(google, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_LONGEST_TEXT", len(google["vocab.txt"]))
    path = zipped(tmp_path / "x.zip", google)
    assert hubmodels.bertTokenizer(path).vocab_size == len(WORDS)
    monkeypatch.setattr(local, "_LONGEST_TEXT", len(google["vocab.txt"]) - 1)
    assert "expected one of tokenizer.json, vocab.txt, " in refused(path, load=hubmodels.bertTokenizer)


def test_an_error_while_an_archive_is_read_is_not_taken_for_one_of_it(google, tmp_path):
    """And the place where it was unpacked is gone then too: see `temporary`."""
    path = zipped(tmp_path / "x.zip", google)
    found: list[Path] = []

    def fail() -> None:
        with local.unpacked(path) as directory:
            found.append(directory)
            assert sorted(each.name for each in directory.iterdir()) == sorted(google)
            raise OSError("mine")

    with pytest.raises(OSError, match=r"^mine$"):
        fail()
    assert not found[0].exists()
    with pytest.raises(HubModelsError, match="unknown option"):
        hubmodels.bertModel(path, rate=3)
    with pytest.raises(HubModelsError, match="num_labels"):
        hubmodels.bertModel(path, num_labels=3)
    google["bert_config.json"] = json.dumps({"vocab_size": 38}).encode()
    with pytest.raises(HubModelsError):
        hubmodels.bertModel(zipped(path, google))


def test_a_directory_is_no_archive_whatever_its_name(old, model, tmp_path):
    directory = tmp_path / "bert.zip"
    directory.mkdir()
    for name, data in old.items():
        (directory / name).write_bytes(data)
    assert_same(directory, model)
    with local.unpacked(directory) as found:
        assert found == directory


# --- TensorFlow's names


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["bert_model.ckpt", "model.ckpt-1000"])
def test_a_prefix_names_tensorflows_checkpoint(name, kind, google, model, tmp_path):
    for member, data in google.items():
        (tmp_path / member.replace("bert_model.ckpt", name)).write_bytes(data)
    found = assert_same(kind(tmp_path / name), model)
    want = [tmp_path / f"{name}.index", tmp_path / f"{name}.data-00000-of-00001"]
    assert [file.path for file in found.provenance.files] == want
    assert found.provenance.weights == str(tmp_path / f"{name}.index")


def test_a_prefix_in_the_working_directory(model, monkeypatch):
    monkeypatch.chdir(GOOGLE)
    assert_same("bert_model.ckpt", model)
    assert_same(Path("bert_model.ckpt"), model)


def test_a_prefix_of_one_checkpoint_among_several(google, model, tmp_path):
    for member, data in google.items():
        (tmp_path / member).write_bytes(data)
        if member.startswith("bert_model"):
            (tmp_path / member.replace("bert_model.ckpt", "model.ckpt-7")).write_bytes(data)
    with pytest.raises(CheckpointError, match="name one"):
        hubmodels.bertModel(tmp_path)
    assert_same(tmp_path / "model.ckpt-7", model)


def test_a_prefix_of_nothing(google, tmp_path):
    path = tmp_path / "bert_model.ckpt"
    with pytest.raises(CatalogError, match=re.escape(f"{path}: no such file or directory; a name of the manifest")):
        hubmodels.bertModel(path)
    (tmp_path / "bert_model.ckpt.index").write_bytes(google["bert_model.ckpt.index"])
    (tmp_path / "bert_config.json").write_bytes(google["bert_config.json"])
    with pytest.raises(CheckpointError, match=r"missing beside bert_model\.ckpt\.index"):
        hubmodels.bertModel(path)


def test_a_file_of_a_prefixs_name_is_that_file(google, old, model, tmp_path):
    """A .ckpt is Lightning's too."""
    for member, data in google.items():
        (tmp_path / member).write_bytes(data)
    (tmp_path / "bert_model.ckpt").write_bytes(old["pytorch_model.bin"])
    assert assert_same(tmp_path / "bert_model.ckpt", model).provenance.dialect == "huggingface-gamma-beta"


# --- A vocab.txt and its case


def vocabulary(directory: Path, words: list[str], **settings: object) -> Path:
    (directory / "vocab.txt").write_text("\n".join([*WORDS[:5], *words]) + "\n", encoding="utf-8")
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["paris", "##s"], [5]),
        (["paris", "Paris"], [6]),
        (["paris", "##S"], [1]),
        (["paris", "A"], [1]),
        (["paris", "[unused1]", "<S>", "[UNUSED]", "<MASK>"], [5]),
        (["paris", "", "É", "Ω", "東"], [5]),  # Google's have some, of languages without lower case or by mistake
        (["paris", "##[A]"], [1]),
    ],
    ids=["lower", "capital", "piece", "letter", "special", "foreign", "bracket in a piece"],
)
def test_a_vocabulary_with_capitals_keeps_them(words, want, tmp_path):
    directory = vocabulary(tmp_path, words)
    for path in (directory, directory / "vocab.txt"):
        assert hubmodels.bertTokenizer(path)("Paris")["input_ids"].tolist() == [[2, *want, 3]]
    archive = zipped(tmp_path / "x.zip", {"vocab.txt": (directory / "vocab.txt").read_bytes()})
    assert hubmodels.bertTokenizer(archive)("Paris")["input_ids"].tolist() == [[2, *want, 3]]


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize("words", [["paris"], ["paris", "Paris"]])
def test_a_tokenizer_config_decides_over_the_vocabulary(words, lower_case, tmp_path):
    directory = vocabulary(tmp_path, words, do_lower_case=lower_case)
    want = 5 if lower_case else 6 if "Paris" in words else 1
    assert hubmodels.bertTokenizer(directory)("Paris")["input_ids"].tolist() == [[2, want, 3]]
    path = directory / "vocab.txt"
    assert WordPieceTokenizer.from_vocab(path, lower_case=lower_case)("Paris")["input_ids"].tolist() == [[2, want, 3]]


@pytest.mark.parametrize(
    ("name", "lower_case"),
    [
        ("bert-base-uncased", True),
        ("bert-base-cased", False),
        ("bert-base-chinese", True),
        ("bert-base-multilingual-cased", False),
    ],
)
def test_the_case_of_the_published_vocabularies(name, lower_case, google, tmp_path):
    path = SHARED / "data" / "vocab" / name / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    archive = zipped(tmp_path / "x.zip", {**google, "vocab.txt": path.read_bytes()}, f"{name}/")
    texts = ["The Louvre in PARIS, Déjà vu", "Ein Haus", "ABC 東京 ÄÖ"]
    want = WordPieceTokenizer.from_vocab(path, lower_case=lower_case)(texts)["input_ids"]
    other = WordPieceTokenizer.from_vocab(path, lower_case=not lower_case)(texts)["input_ids"]
    assert want.shape != other.shape or not torch.equal(want, other)
    for given in (path.parent, path, archive):
        assert torch.equal(hubmodels.bertTokenizer(given)(texts)["input_ids"], want)
