"""Kits: made, carried to a machine without a network, unpacked there; and damaged on the way, in every way."""

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPOSITORY
from servers import REVISION, FakeHub, serve
from test_verification import (
    IDS,
    NO_CHECK,
    Small,
    catalog,
    embedded_in,
    pinned_at,
    small_repository,
    tiny_bert,
    tiny_check,
    tiny_entry,
    tiny_output,
)

import hubmodels
from hubmodels import kit, store
from hubmodels.errors import CatalogError, InputError, StoreError

ROOT_FILES = ("hubconf.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
VERSION = "1.2.3"
DIRECTORY = f"hubmodels_v{VERSION}"
BLOCK = 512  # bytes; tar's unit


def write_code(root: Path) -> None:
    """What a kit takes along, besides the manifest and the weights."""
    (root / "hubmodels" / "inner").mkdir(parents=True)
    for name in (*ROOT_FILES, "hubmodels/__init__.py", "hubmodels/inner/one.py"):
        (root / name).write_text(f"this is {name}\n")


@pytest.fixture
def small(monkeypatch, tmp_path) -> Iterator[Small]:
    """The small repository with its code."""
    with small_repository(monkeypatch, tmp_path / "repository") as small:
        write_code(small.root)
        yield small


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Iterator[Path]:
    """The root of a repository as light as it can be: one name, a few bytes that are no model but are here already,
    and a disk that is not waited for."""
    root, files = tmp_path / "repository", []
    write_code(root)
    for name, content in (("model.safetensors", b"weights " * 9), ("vocab.txt", b"[PAD]\n")):
        files.append(catalog.File("someone/some-bert", REVISION, name, len(content), digest(content)))
        place = store.Place(files[-1], tmp_path / "packing")
        place.path.parent.mkdir(parents=True, exist_ok=True)
        place.path.write_bytes(content)
    content = {"schema": 1, "weights": {"some-bert": tiny_entry([as_pin(file) for file in files], check=NO_CHECK)}}
    (root / "weights_manifest.json").write_text(json.dumps(content))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(catalog, "_PACKAGE", root / "hubmodels")
    monkeypatch.setattr(catalog, "_MANIFESTS", (root / "weights_manifest.json",))
    catalog.manifest.cache_clear()
    yield root
    catalog.manifest.cache_clear()


def as_pin(file) -> dict[str, Any]:
    pin = {"source": file.source, "revision": file.revision, "filename": file.filename, "size": file.size}
    return {**pin, **({"sha256": file.sha256} if file.sha256 else {"git_sha1": file.git_sha1})}


class Machine(NamedTuple):
    """Where a kit is unpacked: without a network, with its own torch.hub directory and store."""

    home: Path

    @property
    def hub(self) -> Path:
        return self.home / "hub"

    def unbundle(self, path: Path, **options: Any) -> kit.Unbundled:
        def refuse(*_: object) -> None:
            raise AssertionError("there is no network here")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(socket.socket, "connect", refuse)
            return kit.unbundle(path, **options)

    def refusal(self, path: Path, **options: Any) -> str:
        """What is said of a kit that is not taken, after which nothing is here that was not, but right weights."""
        before = self.repositories()
        with pytest.raises(StoreError) as caught:
            self.unbundle(path, **options)
        assert str(path) in str(caught.value)
        assert self.repositories() == before
        return str(caught.value)

    def repositories(self) -> dict[str, bytes]:
        """The files in torch.hub's directory, less the store's; empty directories too."""
        found = [path for path in self.home.rglob("*") if not path.is_relative_to(self.hub / "hubmodels")]
        return {str(p.relative_to(self.home)): p.read_bytes() if p.is_file() else b"" for p in found if p != self.hub}

    def weights(self) -> dict[str, bytes]:
        """What has a final name in the store."""
        root = self.hub / "hubmodels"
        found = [path for path in root.rglob("*") if not path.is_dir() and ".hubmodels" not in path.parts]
        return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.fixture
def other(monkeypatch, own_caches, tmp_path) -> Iterator[Machine]:
    """Another machine; in memory where there is such a file system: thousands of directories come and go."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        monkeypatch.setenv("TORCH_HOME", f"{directory}/other")
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        yield Machine(Path(directory, "other"))


def pack(path: Path, *names: str, **options: Any) -> str:
    """The SHA-256 of a kit of these names, or of "some-bert". Its files are not where it will be unpacked."""
    options = {"cache_dir": path.parent / "packing", "progress": False, **options}
    return kit.bundle(names or ["some-bert"], path, VERSION, **options)


@pytest.fixture
def made(small, other, tmp_path) -> Path:
    """A kit of the tiny checkpoint, on the other machine."""
    pack(tmp_path / "kit.tar")
    small.hub.stop()
    return tmp_path / "kit.tar"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- Made


def test_a_kit_says_what_it_has_before_it_has_it(small, tmp_path):
    sha256 = pack(tmp_path / "kit.tar", "some-bert", "tiny")
    assert sha256 == digest((tmp_path / "kit.tar").read_bytes())
    with tarfile.open(tmp_path / "kit.tar", "r:") as tar:
        members = tar.getmembers()
        contents = {member.name: tar.extractfile(member).read() for member in members}
    listing = json.loads(contents.pop("kit.json"))
    facts = {name: {"size": len(content), "sha256": digest(content)} for name, content in contents.items()}
    assert listing == {"schema": 1, "version": VERSION, "names": ["some-bert", "tiny"], "members": facts}
    assert members[0].name == "kit.json"
    assert list(contents) == list(listing["members"])
    kinds = [name.partition("/")[0] for name in contents]
    assert kinds == sorted(kinds, reverse=True)  # the repository, and with it the manifest, before the files
    assert {name for name in contents if name.startswith("files/")} == {
        f"files/huggingface.co/someone/some-bert/{REVISION}/{name}" for name in ("model.safetensors", "vocab.txt")
    }
    weights = {f"hubmodels/weights/tiny/{name}" for name in ("model.safetensors", "vocab.txt")}
    code = {*ROOT_FILES, "weights_manifest.json", "hubmodels/__init__.py", "hubmodels/inner/one.py", *weights}
    assert {name for name in contents if name.startswith("repository/")} == {f"repository/{name}" for name in code}


def test_the_same_kit_has_the_same_bytes(small, tmp_path, monkeypatch):
    """Whoever made it, and when: times, owners, modes and the order of directories are not in it."""
    first = pack(tmp_path / "first.tar")
    for path in small.root.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (small.root / "hubconf.py").chmod(0o755)
    (small.root / "hubmodels" / "__pycache__").mkdir()
    (small.root / "hubmodels" / "__pycache__" / "one.pyc").write_text("of this machine")
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(found(self, pattern))))
    second = kit.bundle(
        ["some-bert", "some-bert"], tmp_path / "2.tar", VERSION, cache_dir=tmp_path / "x", progress=False
    )
    assert first == second
    with tarfile.open(tmp_path / "2.tar", "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_a_file_of_several_names_is_in_it_once(small, tmp_path, other):
    small.change(twin=small.entry("some-bert") | {"licence": "Apache-2.0"})
    single = pack(tmp_path / "single.tar")
    assert pack(tmp_path / "kit.tar", "some-bert", "twin") != single
    with tarfile.open(tmp_path / "kit.tar", "r:") as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    assert len([name for name in names if name.startswith("files/")]) == 2
    found = other.unbundle(tmp_path / "kit.tar")
    assert (found.names, len(found.files)) == (("some-bert", "twin"), 2)
    assert hubmodels.verify("twin").difference < 1e-5


def test_what_is_here_is_not_fetched_again(small, tmp_path):
    small.fetch(cache_dir=tmp_path / "packing")
    small.hub.stop()
    pack(tmp_path / "kit.tar")


@pytest.mark.parametrize("there", [False, True])
def test_a_kit_that_cannot_be_made_leaves_nothing(small, tmp_path, there):
    """Nor does it take the place of one that is there."""
    path = tmp_path / "kits" / "kit.tar"
    path.parent.mkdir()
    if there:
        path.write_bytes(b"the last one")
    small.hub.answer = lambda exchange, data: serve(exchange, data[:-1] + b"!")
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        pack(path, cache_dir=tmp_path / "x")
    with pytest.raises(CatalogError, match="did you mean some-bert"):
        pack(path, "some-brt")
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == (
        {"kit.tar": b"the last one"} if there else {}
    )


@pytest.mark.parametrize("content", ["", "another text, longer than the one that was there before it"])
def test_a_file_that_changes_while_it_is_packed_is_no_part_of_a_kit(small, tmp_path, monkeypatch, content):
    """Between the two times that it is read: the first says what kit.json has to say."""

    def hashed(path: Path) -> str:
        found = sha256_of(path)
        if path.name == "one.py":
            path.write_text(content)
        return found

    sha256_of = store.sha256_of
    monkeypatch.setattr(store, "sha256_of", hashed)
    with pytest.raises(StoreError, match=r"one\.py: changed while it was bundled"):
        pack(tmp_path / "kit.tar")
    assert not list(tmp_path.glob("kit.tar*"))


@pytest.mark.parametrize("where", ["gone/kit.tar", "directory", "file/kit.tar"])
def test_a_place_that_cannot_be_written_is_named(small, tmp_path, where):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as caught:
        pack(tmp_path / where, cache_dir=tmp_path / "x")
    assert f"{tmp_path / where}: cannot be written" in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_without_a_repository_there_is_no_kit(small, tmp_path):
    """Installed from a wheel, the package has no hubconf.py beside it."""
    (small.root / "hubconf.py").unlink()
    with pytest.raises(StoreError, match=r"has no hubconf\.py; bundle from a clone") as caught:
        pack(tmp_path / "kit.tar")
    assert str(small.root) in str(caught.value)
    assert small.hub.requests == []
    assert not list(tmp_path.glob("kit.tar*"))


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "weights_manifest.json"])
def test_a_repository_that_lacks_a_file_is_an_error_of_ours(small, tmp_path, name):
    (small.root / name).unlink()
    with pytest.raises((StoreError, CatalogError), match=name):
        pack(tmp_path / "kit.tar")


def test_a_kit_of_this_repository_has_all_of_its_code(other, tmp_path):
    path = tmp_path / "kit.tar"
    kit.bundle(["bert-nano"], path, hubmodels.__version__, progress=False)
    found = other.unbundle(path)
    assert (found.names, found.files) == (("bert-nano",), ())
    package = REPOSITORY / "hubmodels"
    code = {p.relative_to(REPOSITORY) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    there = {path.relative_to(found.repository) for path in found.repository.rglob("*") if path.is_file()}
    assert there == code | {Path("hubconf.py"), Path("weights_manifest.json"), *map(Path, ROOT_FILES)}
    assert all((found.repository / name).read_bytes() == (REPOSITORY / name).read_bytes() for name in there)


# --- Unpacked


def test_a_kit_brings_code_and_weights(small, made, other):
    found = other.unbundle(made)
    assert (found.names, found.version) == (("some-bert",), VERSION)
    assert found.repository == other.hub / DIRECTORY
    assert found.files == tuple(small.place(number=number).path for number in range(2))
    assert [path.read_bytes() for path in found.files] == [tiny_bert()["model.safetensors"], tiny_bert()["vocab.txt"]]
    assert all(small.place(number=number).is_stamped() for number in range(2))
    code = [path.relative_to(small.root) for path in small.root.rglob("*") if path.is_file()]
    assert all((found.repository / name).read_bytes() == (small.root / name).read_bytes() for name in code)
    assert {path.name for path in other.hub.iterdir()} == {DIRECTORY, "hubmodels"}


def test_what_came_can_be_loaded(small, made, other):
    other.unbundle(made)
    got = hubmodels.bertModel("some-bert")(torch.tensor(IDS)).last_hidden_state
    torch.testing.assert_close(got.double(), tiny_output(), atol=1e-5, rtol=0)
    assert hubmodels.verify("some-bert").difference < 1e-5
    assert hubmodels.bertTokenizer("some-bert")("a b!")["input_ids"].tolist() == [[2, 5, 6, 35, 3]]


def test_with_an_owner_it_is_where_torch_hub_looks(made, other):
    assert other.unbundle(made, owner="me").repository == other.hub / f"me_{DIRECTORY}"


@pytest.mark.parametrize("owner", ["", "me/hubmodels", "..", "me_", "a b", "mé", "me\n"])
def test_an_owner_is_a_github_account(made, other, owner):
    with pytest.raises(InputError, match="expected the name of a GitHub account"):
        other.unbundle(made, owner=owner)
    assert other.repositories() == {}


def test_the_store_may_be_another(made, other, tmp_path):
    found = other.unbundle(made, cache_dir=tmp_path / "mine")
    assert all(path.is_relative_to(tmp_path / "mine") for path in found.files)
    assert other.weights() == {}
    assert hubmodels.verify("some-bert", cache_dir=tmp_path / "mine").difference < 1e-5


def test_a_file_that_only_git_has_a_digest_of(small, other, tmp_path):
    """Its size is nowhere but in kit.json."""
    shard = small.hub.publish(tiny_bert()["model.safetensors"], "model.safetensors")
    files = [as_pin(shard), *pinned_at(small.hub)[1:]]
    small.change(by_git=tiny_entry(files))
    pack(tmp_path / "kit.tar", "by-git")
    found = other.unbundle(tmp_path / "kit.tar")
    assert found.files[0].read_bytes() == tiny_bert()["model.safetensors"]
    assert hubmodels.verify("by-git").difference < 1e-5


def test_a_second_time_changes_nothing(made, other):
    first = other.unbundle(made)
    (first.repository / "hubmodels" / "__pycache__").mkdir()
    (first.repository / "hubmodels" / "__pycache__" / "one.pyc").write_text("what Python made of it")
    times = {path: path.stat().st_mtime_ns for path in other.home.rglob("*.*")}
    assert other.unbundle(made) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {path.name for path in other.hub.iterdir()} == {DIRECTORY, "hubmodels"}


def test_another_repository_of_the_version_stays(made, other):
    """A version is one code; which is right, a person has to say. Nothing is unpacked before."""
    for change in (lambda path: path.write_text("another"), Path.unlink):
        path = other.hub / DIRECTORY / "hubmodels" / "inner" / "one.py"
        other.unbundle(made)
        shutil.rmtree(other.hub / "hubmodels")
        change(path)
        text = other.refusal(made)
        assert f"{path}: is not the one of {made}; remove {other.hub / DIRECTORY}" in text
        assert other.weights() == {}
        shutil.rmtree(other.hub / DIRECTORY)


def test_wrong_bytes_in_the_store_are_replaced(small, made, other):
    other.unbundle(made)
    right = other.weights()
    small.place().path.write_bytes(b"wrong")
    other.unbundle(made)
    assert other.weights() == right


def test_a_link_in_the_store_gives_way_to_the_file(small, made, other, tmp_path):
    """It leads to another cache, whose bytes are not the right ones any more."""
    place = small.place()
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"wrong")
    place.path.parent.mkdir(parents=True)
    place.path.symlink_to(theirs)
    other.unbundle(made)
    assert not place.path.is_symlink()
    assert place.path.read_bytes() == tiny_bert()["model.safetensors"]
    assert theirs.read_bytes() == b"wrong"


def test_a_store_that_cannot_be_written_is_named(made, other, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written; name another directory") as caught:
        other.unbundle(made, cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert other.repositories() == {}


def test_someone_who_loses_patience_leaves_no_repository(made, other, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kit, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.unbundle(made)
    assert other.repositories() == {}


# --- Damaged, or made by someone who wants something else


class Member(NamedTuple):
    """A member of a tar; changes: of its header."""

    name: str
    content: bytes = b""
    changes: dict[str, Any] = {}  # noqa: RUF012


FORMATS = {tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE}


def read(path: Path) -> list[Member]:
    with tarfile.open(path, "r:") as tar:
        return [Member(member.name, tar.extractfile(member).read()) for member in tar]


def write(path: Path, members: list[Member], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = len(member.content), 0o644
            for name, value in member.changes.items():
                setattr(info, name, value)
            data = member.content if info.type not in FORMATS else None
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return path


def listed(members: list[Member], /, **changes: Any) -> list[Member]:
    """With a kit.json first that lists them all, as someone would make it who knows how."""
    facts = {name: {"size": len(content), "sha256": digest(content)} for name, content, _ in members}
    listing = {"schema": 1, "version": VERSION, "names": ["some-bert"], "members": facts, **changes}
    return [Member("kit.json", json.dumps(listing).encode()), *members]


@pytest.fixture
def parts(bare, other, tmp_path) -> list[Member]:
    """The members of a good kit, kit.json left out. The weights are the last but one."""
    pack(tmp_path / "good.tar")
    members = read(tmp_path / "good.tar")[1:]
    assert [member.name.rpartition("/")[2] for member in members[-2:]] == ["model.safetensors", "vocab.txt"]
    return members


@pytest.fixture
def refused(other, tmp_path) -> Callable[..., str]:
    """Members -> what is said of a kit of them, which has to be refused"""

    def call(members: list[Member], format: int = tarfile.PAX_FORMAT) -> str:
        return other.refusal(write(tmp_path / "bad.tar", members, format))

    return call


def replaced(members: list[Member], name: str, **changes: Any) -> list[Member]:
    assert name in [member.name for member in members]
    return [member._replace(**changes) if member.name == name else member for member in members]


CODE = "repository/hubmodels/inner/one.py"
WEIGHTS = f"files/huggingface.co/someone/some-bert/{REVISION}/model.safetensors"
MANIFEST = "repository/weights_manifest.json"


def test_a_kit_that_is_made_by_hand_is_as_good(parts, other, tmp_path):
    """What the tests below change is the only thing that is wrong with their kits."""
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        other.unbundle(write(tmp_path / "hand.tar", listed(parts), format))
        assert len(other.weights()) == 2
        shutil.rmtree(other.home)


@pytest.mark.parametrize("name", [CODE, WEIGHTS, "repository/hubconf.py", MANIFEST])
def test_a_flipped_byte_is_found(parts, refused, other, name):
    content = next(member.content for member in parts if member.name == name)
    wrong = content[:-2] + bytes([content[-2] ^ 4]) + content[-1:]
    good = listed(parts)
    text = refused(replaced(good, name, content=wrong))
    assert digest(wrong) in text
    assert digest(content) in text
    assert "copy" in text
    assert other.weights() == {}


def test_bytes_that_are_listed_but_not_pinned_are_found(parts, refused, other):
    """kit.json can be made to fit; the manifest decides."""
    text = refused(listed(replaced(parts, WEIGHTS, content=b"WEIGHTS " * 9)))
    assert f"got {digest(b'WEIGHTS ' * 9)}" in text
    assert other.weights() == {}


def test_a_weights_file_that_kit_json_has_another_digest_of(parts, refused):
    """Every member is compared with kit.json: this one was not made by bundle, whatever its bytes are."""
    facts = {m.name: {"size": len(m.content), "sha256": digest(m.content)} for m in parts}
    facts[WEIGHTS]["sha256"] = "0" * 64
    assert "model.safetensors" in refused(listed(parts, members=facts))


def test_a_wrong_file_does_not_take_the_right_ones_along(parts, refused, other):
    """The first was right and may stay; the second is not there."""
    vocabulary = parts[-1].name
    refused(replaced(listed(parts), vocabulary, content=b"[PAX]\n"))
    assert other.weights() == {WEIGHTS.removeprefix("files/"): b"weights " * 9}
    assert not list((other.hub / "hubmodels").rglob("part*"))


@pytest.mark.parametrize("name", [CODE, WEIGHTS, "vocab.txt"])
def test_a_member_that_is_missing_is_named(parts, refused, name):
    good = listed(parts)
    [gone] = [member for member in good if member.name.endswith(name)]
    assert f"ends before {gone.name}; copy it again" in refused([member for member in good if member is not gone])


def test_the_manifest_comes_before_what_it_pins(parts, refused, other):
    moved = sorted(parts, key=lambda member: member.name)
    assert moved[0].name.startswith("files/")
    refused(listed(moved))
    refused(listed([member for member in parts if member.name != MANIFEST]))
    assert other.weights() == {}


def test_no_member_may_come_twice(parts, refused):
    for name in (CODE, WEIGHTS, "kit.json"):
        good = listed(parts)
        twice = next(member for member in good if member.name == name)
        assert f"{name}: not a plain file that kit.json lists" in refused([*good, twice])


def test_no_member_may_come_unlisted(parts, refused):
    for name in ("repository/more.py", "more.py", f"{CODE}x", "files/more", "repository", "/etc/passwd", "../x"):
        assert f"{name}: not a plain file that kit.json lists" in refused([*listed(parts), Member(name, b"more")])


@pytest.mark.parametrize("name", [CODE, WEIGHTS])
def test_no_member_may_be_longer_than_listed(parts, refused, other, name):
    """It is refused before a byte of it is on the disk, not when the disk is full."""
    content = next(member.content for member in parts if member.name == name)
    text = refused(replaced(listed(parts), name, content=content + b"\0" * 99))
    assert f"{name}: not a plain file that kit.json lists with {len(content) + 99} bytes" in text


@pytest.mark.parametrize("type", sorted(FORMATS), ids=lambda type: type.decode())
def test_what_is_no_plain_file_is_refused(parts, refused, type):
    """Even if kit.json lists it, and the bytes that it leads to would be the right ones."""
    for linkname in ("kit.json", "/etc/passwd", "../../../secret", CODE):
        changes = {"type": type, "linkname": linkname}
        assert "not a plain file" in refused(listed([*parts, Member("repository/link.py", changes=changes)]))
        refused(listed([parts[0]._replace(content=b"", changes=changes), *parts[1:]]))
        refused(replaced(listed(parts), WEIGHTS, content=b"", changes=changes))


@pytest.mark.parametrize("type", [tarfile.CONTTYPE, b"S", b"D", b"M", b"V", b"Z", b"\x01"], ids=repr)
def test_a_kind_that_nobody_uses_is_refused(parts, refused, type):
    members = listed(parts)
    refused([*members[:3], members[3]._replace(changes={"type": type}), *members[4:]])
    refused([members[0]._replace(changes={"type": type, "linkname": "x"}), *members[1:]])


PATHS = [
    "/tmp/evil",
    "//evil",
    "../evil",
    "..",
    "evil",
    "repository",
    "repository/",
    "repository/..",
    "repository/../evil",
    "repository/../../evil",
    "repository/a/../../../evil",
    "repository/./evil",
    "repository//evil",
    "repository//tmp/evil",
    "repository/evil/",
    "repository/a\\..\\..\\evil",
    "repository/..\\evil",
    "repository/evil\0.py",
    "files/../evil",
    "files/../repository/hubconf.py",
    "files//tmp/evil",
    "files/evil\0",
    "files/evil",
    "Repository/evil",
    "",
]


@pytest.mark.parametrize("name", PATHS, ids=repr)
def test_a_path_that_leads_elsewhere_is_refused(parts, refused, other, name):
    """Listed or not; in the header, or in a record of pax or GNU, which may say another than the header."""
    evil, good = Member(name, b"evil"), Member("repository/good.py", b"evil")
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        refused(listed([*parts, evil]), format)
        refused([*listed(parts), evil], format)
        refused(listed([evil, *parts]), format)
    hidden = good._replace(changes={"pax_headers": {"path": name}})
    refused([*listed([*parts, good])[:-1], hidden])
    refused([*listed([*parts, evil])[:-1], hidden])
    assert not list(other.home.parent.rglob("evil*"))
    assert other.weights().keys() <= {member.name.removeprefix("files/") for member in parts}


def test_a_long_path_is_a_path(bare, other, tmp_path):
    """Beyond the 100 bytes of a header, pax has to be understood."""
    deep = bare / "hubmodels"
    for _ in range(8):
        deep = deep / ("long" * 10)
    deep.mkdir(parents=True)
    (deep / "é.py").write_text("deep")
    pack(tmp_path / "kit.tar")
    found = other.unbundle(tmp_path / "kit.tar")
    assert (found.repository / deep.relative_to(bare) / "é.py").read_text() == "deep"


def test_a_file_where_a_directory_is_needed_is_refused(parts, refused):
    refused(listed([*parts, Member("repository/hubconf.py/more.py", b"more")]))
    refused(listed([*parts, Member("repository/hubmodels", b"more")]))


# Records that a tar may have before a member. What they say is the archive's own word.


def record(type: bytes, content: bytes, size: int | None = None) -> bytes:
    """A header of such a kind, with the content after it, whatever size it claims to have."""
    info = tarfile.TarInfo("./PaxHeaders/x")
    info.type, info.size = type, len(content) if size is None else size
    head = info.tobuf(tarfile.GNU_FORMAT)
    return head + content + b"\0" * (-len(content) % BLOCK)


def pax(**values: str) -> bytes:
    lines = []
    for key, value in values.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + len(str(len(text)))
        length = len(text) + len(str(length))
        lines.append(str(length).encode() + text)
    return b"".join(lines)


HUGE = 1 << 50
RECORDS = {
    "names of names of names": record(tarfile.GNUTYPE_LONGNAME, b"x") * 3000,
    "headers of headers of headers": record(tarfile.XHDTYPE, pax(comment="x")) * 3000,
    "pax header of a huge size": record(tarfile.XHDTYPE, b"", HUGE),
    "global pax header of a huge size": record(tarfile.XGLTYPE, b"", HUGE),
    "GNU name of a huge size": record(tarfile.GNUTYPE_LONGNAME, b"", HUGE),
    "GNU link of a huge size": record(tarfile.GNUTYPE_LONGLINK, b"", HUGE),
    "pax header of a negative size": record(tarfile.XHDTYPE, b"", -BLOCK),
    "GNU name of a negative size": record(tarfile.GNUTYPE_LONGNAME, b"", -BLOCK),
    "pax header that is none": record(tarfile.XHDTYPE, b"\xff" * 300),
    "pax record of no length": record(tarfile.XHDTYPE, b"0 path=x\n"),
    "pax record of a huge length": record(tarfile.XHDTYPE, b"99999999999999999999 path=x\n"),
    "pax record of endless digits": record(tarfile.XHDTYPE, b"9" * 6000 + b" path=x\n"),
    "path": record(tarfile.XHDTYPE, pax(path="../../evil")),
    "path of all": record(tarfile.XGLTYPE, pax(path="../../evil")),
    "path that is not text": record(tarfile.XHDTYPE, b"13 path=\xff\xfe\xfd\n"),
    "size": record(tarfile.XHDTYPE, pax(size=str(HUGE))),
    "size that is none": record(tarfile.XHDTYPE, pax(size="x")),
    "size below zero": record(tarfile.XHDTYPE, pax(size="-512")),
    "size of endless digits": record(tarfile.XHDTYPE, pax(size="9" * 6000)),
    "time that is none": record(tarfile.XHDTYPE, pax(mtime="nan", size="inf")),
    "charset": record(tarfile.XHDTYPE, pax(hdrcharset="BINARY", path="../evil")),
    "sparse 0.0": record(
        tarfile.XHDTYPE, pax(GNU__sparse__size="x", GNU__sparse__offset="0", GNU__sparse__numbytes="1")
    ),
    "sparse 0.0, offset": record(tarfile.XHDTYPE, b"29 GNU.sparse.size=123456789\n" + pax(GNU__sparse__offset="x")),
    "sparse 0.1": record(tarfile.XHDTYPE, pax(GNU__sparse__map="0,x")),
    "sparse 0.1, endless": record(tarfile.XHDTYPE, pax(GNU__sparse__map=f"0,{'9' * 6000}", GNU__sparse__size="9")),
    "sparse 0.1, odd": record(tarfile.XHDTYPE, pax(GNU__sparse__map="0,1,2", GNU__sparse__size="72")),
    "sparse 0.1, far": record(
        tarfile.XHDTYPE, pax(GNU__sparse__map=f"{HUGE},72", GNU__sparse__size="72", GNU__sparse__realsize="72")
    ),
    "sparse 0.1, name": record(tarfile.XHDTYPE, pax(GNU__sparse__map="0,72", GNU__sparse__name="../evil")),
    "sparse 1.0": record(
        tarfile.XHDTYPE, pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="72")
    ),
    "sparse 1.0, size": record(
        tarfile.XHDTYPE, pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="x")
    ),
}


HARMLESS = ("pax header that is none", "time that is none", "path that is not text")  # they need not be understood


def insert(path: Path, name: str, content: bytes) -> None:
    """Put bytes before the header of a member."""
    with tarfile.open(path, "r:") as tar:
        at = tar.getmember(name).offset
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + content + whole[at:])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_makes_a_member_something_else_is_refused(parts, other, tmp_path, name):
    for before in ("kit.json", CODE, WEIGHTS):
        path = write(tmp_path / "bad.tar", listed(parts), tarfile.GNU_FORMAT)
        insert(path, before, RECORDS[name])
        assert assert_refused_or_right(other, path, parts) or name in HARMLESS
    assert not list(other.home.parent.rglob("evil*"))


@pytest.mark.parametrize("size", [HUGE, 1 << 34, -1, -BLOCK, -(1 << 40)])
def test_a_size_that_the_kit_does_not_have_is_refused(parts, other, tmp_path, size):
    """Listed as large as it claims to be: nothing is set aside for it, nothing is read twice."""
    for name in ("kit.json", CODE, WEIGHTS):
        path = sized(tmp_path / "bad.tar", parts, name, size)
        with tarfile.open(path, "r:") as tar:
            member = tar.getmember(name)
        member.size = size
        rewrite_header(path, member.offset, member.tobuf(tarfile.GNU_FORMAT))
        other.refusal(path)


def sized(path: Path, parts: list[Member], name: str, size: int) -> Path:
    """A kit whose kit.json says that one member has such a size."""
    facts = {m.name: {"size": size if m.name == name else len(m.content), "sha256": digest(m.content)} for m in parts}
    return write(path, listed(parts, members=facts), tarfile.GNU_FORMAT)


def rewrite_header(path: Path, at: int, header: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + header[:BLOCK] + whole[at + BLOCK :])


def test_a_sparse_file_is_refused(parts, other, tmp_path):
    """GNU's old kind: a map in the header, and a size that is not on the disk."""
    contents = {member.name: member.content for member in listed(parts)}
    for name, real in itertools.product(("kit.json", CODE, WEIGHTS), (None, 1 << 40)):
        real = real or len(contents[name])
        path = sized(tmp_path / "bad.tar", parts, name, real)
        with tarfile.open(path, "r:") as tar:
            member = tar.getmember(name)
        header = bytearray(path.read_bytes()[member.offset : member.offset + BLOCK])
        header[156:157] = tarfile.GNUTYPE_SPARSE
        header[386:410] = b"%011o\0%011o\0" % (0, member.size)
        header[482:495] = b"\0" + tarfile.itn(real, 12, tarfile.GNU_FORMAT)
        rewrite_header(path, member.offset, with_checksum(header))
        with tarfile.open(path, "r:") as tar:
            assert tar.getmember(name).issparse()
        other.refusal(path)


def with_checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


# kit.json


def test_kit_json_comes_first(parts, refused):
    good = listed(parts)
    assert "expected kit.json first, got repository/" in refused([*good[1:], good[0]])
    assert "expected kit.json first, got ./kit.json" in refused([Member("./kit.json", good[0].content), *good[1:]])
    assert "expected kit.json first, got nothing" in refused([])


def test_kit_json_has_its_limit(parts, refused):
    good = listed(parts)
    large = good[0].content + b" " * (16 << 20)
    assert "it is not a kit" in refused([Member("kit.json", large), *good[1:]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"kit"',
        b"{}",
        b"[" * 200_000,
        b'{"schema":' * 100_000,
        b'{"schema": 1, "version": "1.2.3", "names": [], "members": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema": 1, "version": "1.2.3", "names": [], "members": {"repository/a": {"size": ' + b"9" * 5000 + b"}}}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_kit_json_is_json_of_the_right_kind(parts, refused, content):
    assert "kit.json is not valid" in refused([Member("kit.json", content), *parts])


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": None},
        {"schema": "1"},
        {"version": None},
        {"version": 1},
        {"version": ""},
        {"version": "1.2"},
        {"version": "1.2.3/../../evil"},
        {"version": "../1.2.3"},
        {"version": "1.2.3\n"},
        {"version": ["1.2.3"]},
        {"names": None},
        {"names": 3},
        {"names": [3]},
        {"names": "some-bert"},
        {"names": {"some-bert": 1}},
        {"names": ["another"]},
        {"members": None},
        {"members": []},
        {"members": "repository/hubconf.py"},
        {"members": {"repository/hubconf.py": None}},
        {"members": {"repository/hubconf.py": []}},
        {"members": {"repository/hubconf.py": {}}},
        {"members": {"repository/hubconf.py": {"size": "25", "sha256": "0" * 64}}},
        {"members": {"repository/hubconf.py": {"size": 25.0, "sha256": "0" * 64}}},
        {"members": {"repository/hubconf.py": {"size": True, "sha256": "0" * 64}}},
        {"members": {"repository/hubconf.py": {"size": -1, "sha256": "0" * 64}}},
        {"members": {"repository/hubconf.py": {"size": 25}}},
        {"members": {"repository/hubconf.py": {"size": 25, "sha256": None}}},
        {"members": {"repository/hubconf.py": {"size": 25, "sha256": 7}}},
        {"members": {"repository/\ud800": {"size": 25, "sha256": "\ud800"}}},
        {"members": {}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_wrong_types_in_kit_json_are_refused(parts, refused, changes):
    refused(listed(parts, **changes))


def test_a_kit_of_nothing_is_none(refused):
    """It would leave an empty directory where torch.hub looks for the code."""
    refused(listed([]))


# The kit's own manifest


def test_what_the_kits_manifest_does_not_pin_is_refused(bare, parts, refused, other):
    stray = Member(f"files/huggingface.co/someone/else/{REVISION}/model.safetensors", b"else")
    text = refused(listed([*parts[:-2], stray, *parts[-2:]]))
    assert f"{stray.name}: the kit's own manifest pins no such file" in text
    assert other.weights() == {}


def pins_other_bytes(content: bytes, sha256: str) -> bytes:
    """The manifest with another digest of the weights."""
    manifest = json.loads(content)
    manifest["weights"]["some-bert"]["files"][0]["sha256"] = sha256
    return json.dumps(manifest).encode()


def test_a_manifest_that_contradicts_ours_is_refused(parts, refused, other):
    """The same place in the store cannot be two files; ours was tagged."""
    evil = b"WEIGHTS " * 9
    manifest = next(member.content for member in parts if member.name == MANIFEST)
    changed = replaced(parts, MANIFEST, content=pins_other_bytes(manifest, digest(evil)))
    text = refused(listed(replaced(changed, WEIGHTS, content=evil)))
    assert f"our manifest pins SHA-256 {digest(b'weights ' * 9)}, the kit's SHA-256 {digest(evil)}" in text
    assert other.weights() == {}


def test_what_only_the_kits_manifest_pins_is_taken(bare, parts, other, tmp_path):
    """A kit of another version has other weights; they cannot clash with ours."""
    path = write(tmp_path / "kit.tar", listed(parts))
    (bare / "weights_manifest.json").write_text(json.dumps({"schema": 1, "weights": {}}))
    catalog.manifest.cache_clear()
    assert len(other.unbundle(path).files) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"schema": 9, "weights": {}}',
        b'{"schema": 1, "weights": {"some-bert": {}}}',
        b'{"schema": 1, "weights": {"some-bert": 7}}',
        b'{"schema": 1, "weights": ' + b"[" * 200_000,
    ],
    ids=lambda content: repr(content[:50]),
)
def test_a_manifest_that_is_none_is_refused(parts, refused, other, content):
    """Whoever reads about it has a kit, and never heard of the directory in which it was unpacked."""
    text = refused(listed(replaced(parts, MANIFEST, content=content)))
    assert ".unbundle-" not in text
    assert other.weights() == {}


# Not a tar, half a tar


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_no_kit(parts, other, tmp_path, mode):
    """What it would become is nowhere said; and a kit's digest is that of the tar."""
    good = write(tmp_path / "good.tar", listed(parts))
    with tarfile.open(tmp_path / "bad.tar", mode) as tar:
        for member in listed(parts):
            info = tarfile.TarInfo(member.name)
            info.size = len(member.content)
            tar.addfile(info, io.BytesIO(member.content))
    assert "not a kit, or a damaged one" in other.refusal(tmp_path / "bad.tar")
    other.unbundle(good)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\0", b"PK\3\4" + b"x" * 999, b"text\n" * 999, b"\0" * 20480, b"\xff" * 20480]
)
def test_what_is_no_tar_is_no_kit(other, tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    assert "kit" in other.refusal(tmp_path / "bad.tar").removeprefix(str(tmp_path / "bad.tar"))


def test_what_is_no_file_is_no_kit(other, tmp_path):
    assert "No such file" in other.refusal(tmp_path / "gone.tar")
    (tmp_path / "bad.tar").mkdir()
    assert "directory" in other.refusal(tmp_path / "bad.tar")


def right_ones(parts: list[Member]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """name -> bytes in the repository, and in the store"""
    names = {member.name: member.content for member in parts}
    return (
        {n.removeprefix("repository/"): c for n, c in names.items() if n.startswith("repository/")},
        {n.removeprefix("files/"): c for n, c in names.items() if n.startswith("files/")},
    )


def assert_refused_or_right(other: Machine, path: Path, parts: list[Member]) -> bool:
    """A damaged kit is refused, with nothing left of it but what is right; or all that came of it is right."""
    code, weights = right_ones(parts)
    outside = {each for each in other.home.parent.iterdir() if each != other.home}
    try:
        found = other.unbundle(path)
    except StoreError as error:
        refused = str(error)
        assert other.repositories() == {}
    else:
        there = {
            p.relative_to(found.repository).as_posix(): p.read_bytes()
            for p in found.repository.rglob("*")
            if p.is_file()
        }
        assert there == code
        assert other.weights() == weights
        assert found.repository.parent == other.hub
        assert [each.name for each in other.hub.iterdir() if each.name.startswith(".")] == []
        refused = ""
    assert not refused or str(path) in refused
    assert {name: content for name, content in other.weights().items() if weights.get(name) != content} == {}
    assert {each for each in other.home.parent.iterdir() if each != other.home} == outside
    shutil.rmtree(other.home, ignore_errors=True)
    return bool(refused)


def test_a_kit_that_was_cut_off_is_refused_wherever_it_ends(parts, other):
    path = write(other.home.parent / "bad.tar", listed(parts))
    whole = path.read_bytes()
    with tarfile.open(path, "r:") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    for length in sorted({*range(0, end, 331), *range(0, end, BLOCK), end - 1}):
        path.write_bytes(whole[:length])
        other.refusal(path)
        shutil.rmtree(other.home, ignore_errors=True)
    for length in range(end, len(whole) + 1, 101):  # only the padding is not all there
        path.write_bytes(whole[:length])
        assert_refused_or_right(other, path, parts)


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """One accident, or a few."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        length = rng.choice((1, 2, 7, 100, BLOCK, 3 * BLOCK))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b"\0\xff 09/.\\7xLKSgx\x80" + bytes([rng.randrange(256)]))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            data[at : at + length] = data[other : other + length]
        elif kind == 5:
            at, other = at // BLOCK * BLOCK, other // BLOCK * BLOCK
            data[at : at + BLOCK], data[other : other + BLOCK] = data[other : other + BLOCK], data[at : at + BLOCK]
        elif kind == 6:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            at = at // BLOCK * BLOCK + rng.choice((0, 100, 124, 148, 156, 157, 257, 345, 386, 482, 483))
            data[at : at + 1] = rng.choice((b"\x80", b"\xff", b"0", b"7", b"\0", b"x", b"S", b"L", b"-"))
        if not data:
            return b""
    return bytes(data)


def with_checksums(data: bytes) -> bytes:
    """Every block that was a header has a right checksum again, so that what it says is read."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - BLOCK + 1, BLOCK):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at : at + BLOCK] = with_checksum(fixed[at : at + BLOCK])
    return bytes(fixed)


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_damaged_kits(parts, other, seed):
    rng, path = random.Random(seed), other.home.parent / "bad.tar"
    whole = write(path, listed(parts), (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[seed % 2]).read_bytes()
    refused = 0
    for number in range(700):
        data = mutated(whole, rng)
        path.write_bytes(with_checksums(data) if number % 2 else data)
        refused += assert_refused_or_right(other, path, parts)
    assert refused > 300


# --- From one machine to the other, as people do it

WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*_):
    raise SystemExit("there is no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
flag, *sys.argv = sys.argv[1:]
assert flag == "-m"
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
LOAD = """
import os, socket, sys
def refuse(*_):
    raise SystemExit("there is no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import torch
where, options = sys.argv[1], eval(sys.argv[2])
ids = torch.tensor(eval(sys.argv[3]))
for name in ("some-bert", "tiny"):
    model = torch.hub.load(where, "bertModel", name, verbose=False, **options)
    tokenizer = torch.hub.load(where, "bertTokenizer", name, verbose=False, **options)
    print(model(ids).last_hidden_state[0, 1, :4].tolist(), tokenizer("a b!")["input_ids"].tolist())
print(sys.modules["hubmodels"].__file__)
"""


class Carried(NamedTuple):
    """home: TORCH_HOME of the machine without a network. told: what was printed there."""

    home: Path
    environment: dict[str, str]
    told: str


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1", "NO_PROXY": "127.0.0.1", **more}


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> Carried:
    """`bundle` here, from a copy of this repository with tiny weights; there the line that it prints, as it stands."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    tree, hub = here / "tree", FakeHub()
    shutil.copytree(
        REPOSITORY / "hubmodels", tree / "hubmodels", ignore=shutil.ignore_patterns("__pycache__", "weights")
    )
    for name in ROOT_FILES:
        shutil.copyfile(REPOSITORY / name, tree / name)
    weights = {"some-bert": tiny_entry(pinned_at(hub)), "tiny": tiny_entry(embedded_in(tree), check=tiny_check(7))}
    (tree / "weights_manifest.json").write_text(json.dumps({"schema": 1, "weights": weights}))
    command = [sys.executable, "-m", "hubmodels", "bundle", "--all", "-o", str(there / "kit.tar")]
    with hub.listening():
        environment = clean_environment(here / "home", HF_ENDPOINT=hub.url)
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    line = done.stdout.splitlines()[-1].strip()

    python = there / "bin" / "python"
    python.parent.mkdir()
    (there / "bin" / "offline.py").write_text(WITHOUT_NETWORK)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{there / "bin" / "offline.py"}" "$@"\n')
    python.chmod(0o755)
    environment = clean_environment(there / "home")
    path = f"{python.parent}{os.pathsep}{environment['PATH']}"
    told = []
    for owner in ("", " --owner me"):
        done = subprocess.run(
            line + owner,
            shell=True,
            cwd=there,
            env=environment | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        told.append(done.stdout)
        shutil.rmtree(there / "repository")
    return Carried(there / "home", environment, "".join(told))


@pytest.mark.parametrize("owner", ["", "me"])
def test_what_was_carried_is_loaded_through_torch_hub(carried, tmp_path, owner):
    directory = carried.home / "hub" / f"{'me_' if owner else ''}hubmodels_v{hubmodels.__version__}"
    where = f"me/hubmodels:v{hubmodels.__version__}" if owner else str(directory)
    options = {"trust_repo": True} if owner else {"source": "local"}
    said = "trust_repo=True" if owner else 'source="local"'
    assert f'torch.hub.load("{where}", ENTRY_POINT, "some-bert", {said})' in carried.told
    done = subprocess.run(
        [sys.executable, "-c", LOAD, where, repr(options), repr(IDS)],
        cwd=tmp_path, env=carried.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *rows, loaded = done.stdout.splitlines()
    for row, seed in zip(rows, (0, 7), strict=True):
        vector, ids = row.split("] [[")
        expected = tiny_output(seed)[0, 1, :4].tolist()
        assert json.loads(vector + "]") == pytest.approx(expected, abs=1e-5)
        assert ids == "2, 5, 6, 35, 3]]"
    assert Path(loaded) == directory / "hubmodels" / "__init__.py"
