"""`verify`: every byte hashed again, the model loaded, its stored output replayed; and what it says of the rest.

A tiny checkpoint and a manifest that pins it are made here; other tests take them from here.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from servers import FakeHub

import hubmodels
from hubmodels import store, verification
from hubmodels.errors import CatalogError, CheckpointError, StoreError
from hubmodels.families import bert
from hubmodels.verification import Verification, verify

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
SIZES = {  # pairwise distinct, so that no swap of two sizes goes unseen
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "type_vocab_size": 4,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##s", "##t", ".", ",", "!", "?"]
IDS, SLICE = [[2, 5, 9, 36, 17, 3]], [[0, 1], [1, 4], [1, 4]]
NO_CHECK = {"none": "made up for a test, so nobody published it"}


@cache
def tiny_bert(seed: int = 0) -> MappingProxyType[str, bytes]:
    """Name -> bytes of the files of a tiny checkpoint, and its config.json."""
    model = bert.BertModel(bert.BertConfig(**SIZES))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    with TemporaryDirectory() as directory:
        hubmodels.export(model, directory)
        files = {name: Path(directory, name).read_bytes() for name in ("model.safetensors", "config.json")}
    return MappingProxyType(files | {"vocab.txt": "\n".join([*WORDS, ""]).encode()})


@cache
def tiny_output(seed: int = 0) -> torch.Tensor:
    """[1, 6, D], its last hidden state for IDS in float64"""
    with TemporaryDirectory() as directory:
        for name, content in tiny_bert(seed).items():
            Path(directory, name).write_bytes(content)
        with torch.no_grad():
            return hubmodels.bertModel(Path(directory), dtype=torch.float64)(torch.tensor(IDS)).last_hidden_state


@cache
def tiny_parameters() -> int:
    return sum(parameter.numel() for parameter in bert.BertModel(bert.BertConfig(**SIZES)).parameters())


def tiny_check(seed: int = 0, **changes: Any) -> dict[str, Any]:
    expected = tiny_output(seed)[tuple(slice(*bounds) for bounds in SLICE)].tolist()
    check = {"input_ids": IDS, "output": "last_hidden_state", "slice": SLICE, "expected": expected, "atol": 1e-4}
    return {**check, "source": "computed in float64 for this test", **changes}


def tiny_entry(files: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The manifest's entry for such files, the vocabulary last."""
    entry = {
        "family": "bert",
        "config": dict(SIZES),
        "tokenizer": {"file": files[-1]["filename"], "lower_case": True},
        "files": files,
        "dialect": "huggingface",
        "licence": "MIT",
        "homepage": "https://example.org/tiny",
        "citation": "nobody",
        "parameters": tiny_parameters(),
        "check": tiny_check(),
    }
    return {**entry, **changes}


def pinned_at(hub: FakeHub, repo: str = "someone/some-bert", seed: int = 0) -> list[dict[str, Any]]:
    """The tiny checkpoint, published on a hub: the manifest's `files`."""
    files = [hub.add(tiny_bert(seed)[name], name, repo) for name in ("model.safetensors", "vocab.txt")]
    return [{k: getattr(f, k) for k in ("source", "revision", "filename", "size", "sha256")} for f in files]


def embedded_in(root: Path, seed: int = 7) -> list[dict[str, Any]]:
    """The tiny checkpoint as a part of the repository at `root`: the manifest's `files`."""
    files = []
    for name in ("model.safetensors", "vocab.txt"):
        content, path = tiny_bert(seed)[name], root / "hubmodels" / "weights" / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files.append({"source": ".", "revision": None, "filename": path.relative_to(root).as_posix(), **facts})
    return files


class Small(NamedTuple):
    """A repository with a manifest of two tiny checkpoints: "tiny" is a part of it, a hub has "some-bert"."""

    root: Path
    hub: FakeHub

    @property
    def content(self) -> dict[str, Any]:
        return json.loads((self.root / "weights_manifest.json").read_text())

    def change(self, **entries: dict[str, Any]) -> None:
        """Write entries into the manifest: name, with _ for -, = its entry."""
        weights = {name.replace("_", "-"): entry for name, entry in entries.items()}
        content = {"schema": 1, "weights": {**self.content["weights"], **weights}}
        (self.root / "weights_manifest.json").write_text(json.dumps(content))
        catalog.manifest.cache_clear()

    def entry(self, name: str) -> dict[str, Any]:
        return copy.deepcopy(self.content["weights"][name])

    def place(self, name: str = "some-bert", number: int = 0, cache_dir: Path | None = None) -> store.Place:
        """Where the store has a file of a checkpoint."""
        return store.Place(catalog.lookup(name).files[number], store.root_of(cache_dir))

    def fetch(self, name: str = "some-bert", **options: Any) -> list[Path]:
        files = catalog.lookup(name).files
        return [store.fetch(file, progress=False, **options).path for file in files]


@contextmanager
def small_repository(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[Small]:
    """What this package takes for its own repository, while the context lasts."""
    root.mkdir(parents=True)
    fake = FakeHub()
    weights = {
        "tiny": tiny_entry(embedded_in(root), check=tiny_check(7)),
        "some-bert": tiny_entry(pinned_at(fake)),
    }
    (root / "weights_manifest.json").write_text(json.dumps({"schema": 1, "weights": weights}))
    with monkeypatch.context() as patched, fake.running(monkeypatch) as hub:
        patched.setattr(catalog, "_PACKAGE", root / "hubmodels")
        patched.setattr(catalog, "_MANIFESTS", (root / "weights_manifest.json",))
        catalog.manifest.cache_clear()
        yield Small(root, hub)
    catalog.manifest.cache_clear()


def spoil(place: store.Place) -> None:
    """Other bytes of the same size behind a stamp that says they were hashed, as if the disk had changed them."""
    path = place.path.resolve()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (place.state / "stamp.json").write_text(json.dumps(place.stamp_of(place.path)))
    assert place.is_stamped()


@pytest.fixture
def small(monkeypatch, tmp_path) -> Iterator[Small]:
    with small_repository(monkeypatch, tmp_path / "repository") as small:
        yield small


def refusal(name: str, error: type[Exception], **options: Any) -> str:
    with pytest.raises(error) as caught:
        verify(name, **options)
    return str(caught.value)


# --- Right


@pytest.mark.parametrize("name", ["bert-nano", "gpt-nano"])
def test_what_comes_with_this_repository_is_right(name):
    record = catalog.lookup(name)
    found = verify(name)
    assert found.name == name
    assert found.files == tuple((catalog.embedded_path(file), file) for file in record.files)
    assert found.size == sum(file.size for file in record.files)
    assert found.allowed == record.check["atol"]
    assert 0 <= found.difference <= found.allowed / 10
    assert found.no_check is None


def test_the_package_has_it_by_its_name():
    assert hubmodels.verify is verify
    assert "verify" in hubmodels.__all__


def test_what_was_downloaded_is_right(small):
    paths = small.fetch()
    small.hub.stop()
    found = verify("some-bert")
    assert [path for path, _ in found.files] == paths
    assert found.size == sum(len(tiny_bert()[name]) for name in ("model.safetensors", "vocab.txt"))
    assert found.tensors == len(hubmodels.bertModel("some-bert").provenance.report.entries)
    assert 0 < found.difference <= 1e-5


def test_what_another_store_has_is_right(small, tmp_path):
    small.fetch(cache_dir=tmp_path / "mine")
    found = verify("some-bert", cache_dir=tmp_path / "mine")
    assert all(path.is_relative_to(tmp_path / "mine") for path, _ in found.files)
    assert "could not be had" in refusal("some-bert", StoreError)


def test_a_file_of_another_cache_is_found_and_hashed(small, monkeypatch, tmp_path):
    small.fetch(cache_dir=tmp_path / "mirror")
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "mirror"))
    asked = len(small.hub.requests)
    found = verify("some-bert")
    assert [path.resolve().is_relative_to(tmp_path / "mirror") for path, _ in found.files] == [True, True]
    assert len(small.hub.requests) == asked


def test_without_a_published_output_the_rest_is_verified(small):
    small.change(some_bert={**small.entry("some-bert"), "check": NO_CHECK})
    small.fetch()
    found = verify("some-bert")
    assert (found.difference, found.allowed, found.no_check) == (None, None, NO_CHECK["none"])
    assert found.output == f"nothing to compare with: {NO_CHECK['none']}"
    assert found.tensors > 0
    spoil(small.place())
    refusal("some-bert", StoreError)


def test_a_check_has_its_mask_and_its_types(small):
    """Both change the output: a check that loses one of them on the way does not replay."""
    mask, types = [[1, 1, 1, 1, 0, 0]], [[0, 0, 1, 1, 2, 3]]
    small.fetch()
    model = hubmodels.bertModel("some-bert", dtype=torch.float64)
    inputs = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        output = model(**{key: torch.tensor(value) for key, value in inputs.items()}).pooler_output
    check = {**tiny_check(), **inputs, "output": "pooler_output", "slice": [[0, 1], [0, 5]]}
    small.change(some_bert={**small.entry("some-bert"), "check": check | {"expected": output[:, :5].tolist()}})
    assert verify("some-bert").difference < 1e-5
    for key in ("attention_mask", "token_type_ids"):
        fewer = {name: value for name, value in check.items() if name != key} | {"expected": output[:, :5].tolist()}
        small.change(some_bert={**small.entry("some-bert"), "check": fewer})
        assert "pooler_output differs by" in refusal("some-bert", CheckpointError)


def test_the_result_can_be_printed(small):
    small.fetch()
    found = verify("some-bert")
    first, *files = str(found).splitlines()
    difference = f"{found.difference:.1e}"
    assert first == (
        f"some-bert: {found.tensors} tensors accounted for; output as published, to {difference} of 1.0e-04 allowed"
    )
    record = catalog.lookup("some-bert")
    assert files == [f"  {small.place(number=i).path}: {file.digest}" for i, file in enumerate(record.files)]
    without = Verification("a", (), 3, None, None, "nobody published one")
    assert str(without) == "a: 3 tensors accounted for; output nothing to compare with: nobody published one"


# --- Wrong bytes


def test_other_bytes_behind_a_good_stamp_are_found_and_fetched_anew(small):
    """A stamp says when a file was hashed; a disk that changes bytes by itself leaves it as it was."""
    [path, _] = small.fetch()
    right = path.read_bytes()
    spoil(small.place())
    assert store.fetch(small.place().file).how == "in the store, unchanged since it was hashed"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = refusal("some-bert", StoreError)
    file = small.place().file
    assert all(part in text for part in (str(path), f"expected {file.digest}", digest, store.url_of(file)))
    asked = len(small.hub.requests)
    assert small.fetch()[0].read_bytes() == right
    assert len(small.hub.requests) > asked
    assert verify("some-bert").difference < 1e-5


def test_other_bytes_in_the_vocabulary_are_found(small):
    small.fetch()
    spoil(small.place(number=1))
    assert str(small.place(number=1).path) in refusal("some-bert", StoreError)


def test_wrong_bytes_are_not_loaded(small, monkeypatch):
    small.fetch()
    spoil(small.place())
    entry = verification.ENTRY_POINTS["bert"]._replace(model=lambda *_, **__: pytest.fail("the file was loaded"))
    monkeypatch.setitem(verification.ENTRY_POINTS, "bert", entry)
    refusal("some-bert", StoreError)


def test_other_bytes_behind_a_link_are_found_and_left_alone(small, monkeypatch, tmp_path):
    """The file is another cache's: what is wrong with it is said, and it stays."""
    [theirs, _] = small.fetch(cache_dir=tmp_path / "mirror")
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "mirror"))
    small.fetch()
    assert small.place().path.is_symlink()
    spoil(small.place())
    wrong = theirs.read_bytes()
    assert str(theirs) in refusal("some-bert", StoreError)
    assert theirs.read_bytes() == wrong
    assert store.fetch(small.place().file, progress=False).how.startswith("downloaded: ")
    assert verify("some-bert").difference < 1e-5
    assert theirs.read_bytes() == wrong


def test_a_repository_that_was_altered_is_found(small):
    path = small.root / "hubmodels" / "weights" / "tiny" / "model.safetensors"
    assert verify("tiny").difference < 1e-5
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    text = refusal("tiny", StoreError)
    assert str(path) in text
    assert "check out its tag again" in text
    path.unlink()
    assert "missing" in refusal("tiny", StoreError)


# --- Not here


def test_nothing_is_downloaded(small):
    text = refusal("some-bert", StoreError)
    assert store.url_of(small.place().file) in text
    assert small.hub.requests == []
    assert not small.place().path.exists()


def test_one_file_is_not_all(small):
    small.fetch()
    small.place(number=1).remove()
    asked = len(small.hub.requests)
    assert "vocab.txt" in refusal("some-bert", StoreError)
    assert len(small.hub.requests) == asked


def test_an_unknown_name_lists_near_names(small):
    assert "did you mean some-bert" in refusal("some-brt", CatalogError)


# --- The right bytes, and something else comes out


def changed(small: Small, **changes: Any) -> str:
    """What is said of the same files under an entry with such changes of its check."""
    small.fetch()
    small.change(some_bert={**small.entry("some-bert"), "check": tiny_check() | changes})
    return refusal("some-bert", CheckpointError)


def test_an_output_that_differs_is_told_in_numbers(small):
    expected = tiny_check()["expected"]
    expected[0][1][2] += 0.25
    text = changed(small, expected=expected)
    for part in ("some-bert: last_hidden_state differs by 2.5e-01", "1.0e-04 is allowed", "computed in float64"):
        assert part in text


def test_the_tolerance_decides(small):
    expected = tiny_check()["expected"]
    expected[0][0][0] += 0.25
    changed(small, expected=expected, atol=0.249)
    small.change(some_bert={**small.entry("some-bert"), "check": tiny_check(expected=expected, atol=0.251)})
    assert verify("some-bert").difference == pytest.approx(0.25, abs=1e-5)


def test_what_is_no_number_is_not_right(small):
    """nan is neither more nor less than what is allowed."""
    expected = tiny_check()["expected"]
    expected[0][0][0] = float("nan")
    assert "differs by nan" in changed(small, expected=expected)


def test_a_model_that_gives_nan_is_not_right(small, monkeypatch):
    def broken(*args: Any, **options: Any) -> Any:
        model = hubmodels.bertModel(*args, **options)
        model.get_parameter("embeddings.word.weight").data.fill_(float("nan"))
        return model

    small.fetch()
    monkeypatch.setitem(verification.ENTRY_POINTS, "bert", verification.ENTRY_POINTS["bert"]._replace(model=broken))
    assert "differs by nan" in refusal("some-bert", CheckpointError)


@pytest.mark.parametrize(
    "changes",
    [{"slice": [[0, 1], [1, 4], [1, 5]]}, {"slice": [[0, 1], [1, 4], [10, 20]]}, {"expected": [0.1, 0.2, 0.3]}],
    ids=str,
)
def test_a_check_of_another_shape_is_not_right(small, changes):
    """Numbers are not spread over others, as a subtraction would."""
    assert "some-bert: the check expects [" in changed(small, **changes)


@pytest.mark.parametrize("by", [-1, 1])
def test_another_number_of_parameters_is_not_right(small, by):
    entry = small.entry("some-bert")
    small.fetch()
    small.change(some_bert={**entry, "parameters": entry["parameters"] + by})
    got = entry["parameters"]
    assert refusal("some-bert", CheckpointError) == f"some-bert: expected {got + by:,} parameters, got {got:,}"


def test_tensors_that_do_not_fit_the_config_are_not_right(small):
    small.fetch()
    small.change(some_bert={**small.entry("some-bert"), "config": SIZES | {"intermediate_size": 24}})
    text = refusal("some-bert", CheckpointError)
    assert str(small.place().path) in text
    assert "[24, 12]" in text
    assert "[20, 12]" in text


def test_a_tokenizer_that_cannot_be_made_is_not_right(small):
    """The model may be right; without its vocabulary it is of no use."""
    small.hub.files = {}
    bad = b"only\na few\nwords\n"
    files = pinned_at(small.hub)[:1]
    file = small.hub.add(bad, "vocab.txt", "someone/some-bert")
    facts = {key: getattr(file, key) for key in ("source", "revision", "filename", "size", "sha256")}
    small.change(some_bert=tiny_entry([*files, facts]))
    small.fetch()
    assert "the vocabulary lacks [PAD]" in refusal("some-bert", CheckpointError)
