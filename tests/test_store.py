"""Files: had once, verified always, found where they are; and what is said when they cannot be had."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from servers import (
    DATA,
    NAME,
    OTHER,
    REPO,
    REVISION,
    SHARD,
    SITE,
    Exchange,
    FakeHub,
    break_off,
    fail,
    hang_up,
    in_turn,
    page,
    redirect,
    serve,
    serving,
)

from hubmodels import store
from hubmodels.errors import StoreError
from hubmodels.store import transfer

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
UNCHANGED, HASHED = "in the store, unchanged since it was hashed", "in the store, hashed now"
LONG = DATA * 40  # of several pieces


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub().running(monkeypatch) as hub:
        yield hub


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that were read to be hashed."""
    names: list[str] = []
    digest = hashlib.file_digest

    def noted(file, kind):
        names.append(str(file.name))
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    return names


def fetch(file, **options) -> Path:
    return store.fetch(file, progress=False, **options).path


def how(file, **options) -> str:
    return store.fetch(file, progress=False, **options).how


def refusal(file, **options) -> str:
    with pytest.raises(StoreError) as caught:
        store.fetch(file, progress=False, **options)
    return str(caught.value)


def root() -> Path:
    """The store, unless a test names another."""
    return Path(os.environ["TORCH_HOME"]) / "hub" / "hubmodels"


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def place_of(file, below: Path | None = None) -> Path:
    """Where the file belongs, said once more and in other words than the store's."""
    folder = re.sub("^https?://", "", file.source if "://" in file.source else f"https://huggingface.co/{file.source}")
    return (below or root()).joinpath(*folder.replace(":", "/").split("/"), file.revision or "", file.filename)


def state_dir(file, below: Path | None = None) -> Path:
    below = below or root()
    return below / ".hubmodels" / place_of(file, below).relative_to(below)


def stamp_path(file) -> Path:
    return state_dir(file) / "stamp.json"


def left(file, below: Path | None = None) -> set[str]:
    """What there is of the file besides the lock and the stamp."""
    found = {path.name for path in state_dir(file, below).glob("*")} - {"lock", "stamp.json"}
    return found | {"the file"} if os.path.lexists(place_of(file, below)) else found


def tick(path: Path) -> None:
    """Returns when whatever is changed now has another time than the file has."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        later = probe.stat().st_ctime_ns > path.stat().st_ctime_ns
        probe.unlink()
        if later:
            return


def lay_out(cache: Path, file, data: bytes = DATA, *, folder: str | None = None, revision: str | None = None) -> Path:
    """The file in a Hugging Face cache, as huggingface_hub lays it out: a blob, and a link to it."""
    repository = cache / (folder or f"models--{file.source.replace('/', '--')}")
    blob = repository / "blobs" / (file.sha256 or file.git_sha1)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    path = repository / "snapshots" / (revision or file.revision) / file.filename
    path.parent.mkdir(parents=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def write(path: Path, data: bytes = DATA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- Had


def test_a_file_is_downloaded_once(hub):
    file = hub.add()
    path, done = store.fetch(file, progress=False)
    assert path == root() / "huggingface.co" / REPO / REVISION / NAME == place_of(file)
    assert path.read_bytes() == DATA
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert done == f"downloaded: hf_hub_download from {hub.url}"
    assert [method for method, _ in hub.requests] == ["HEAD", "GET"]
    assert {where for _, where in hub.requests} == {f"{REPO}/resolve/{REVISION}/{NAME}"}
    assert store.fetch(file, progress=False) == (path, UNCHANGED)
    assert len(hub.requests) == 2


def test_an_address_is_downloaded_once(hub):
    file = hub.publish()
    path, done = store.fetch(file, progress=False)
    host, port = hub.url.removeprefix("http://").split(":")
    assert path == root() / host / port / SITE / REVISION / SHARD == place_of(file)
    assert path.read_bytes() == DATA
    assert done == f"downloaded: {hub.url}/{SITE}/{REVISION}/{SHARD}"
    assert hub.requests == [("GET", f"{SITE}/{REVISION}/{SHARD}")]
    assert store.fetch(file, progress=False) == (path, UNCHANGED)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_file_in_the_store_needs_no_server_at_all(hub, kind):
    file = getattr(hub, kind)()
    path = fetch(file)
    hub.stop()
    assert fetch(file) == path


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_nothing_of_a_download_stays_but_the_file(hub, kind):
    file = getattr(hub, kind)()
    path = fetch(file)
    assert left(file) == {"the file"}
    assert list(path.parent.iterdir()) == [path]
    assert sorted(p.name for p in root().rglob("*") if p.is_file()) == sorted([path.name, "lock", "stamp.json"])
    assert not hub_cache().exists()


@pytest.mark.parametrize("kind", ["add", "publish", "own"])
def test_a_file_may_be_read_by_whoever_may_look_into_the_store(hub, kind):
    """Whatever the libraries or the user's umask make of new files."""
    file = hub.publish() if kind == "publish" else hub.add()
    if kind == "own":
        lay_out(hub_cache(), file)
    mask = os.umask(0o077)
    try:
        path = fetch(file, own=kind == "own")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o644


@pytest.mark.parametrize("kind", [str, Path])
def test_cache_dir_is_the_store(hub, kind, tmp_path):
    for file in (hub.add(), hub.publish()):
        path = fetch(file, cache_dir=kind(tmp_path / "mine"))
        assert path == place_of(file, tmp_path / "mine")
        requests = len(hub.requests)
        assert store.fetch(file, cache_dir=kind(tmp_path / "mine"), progress=False) == (path, UNCHANGED)
        assert len(hub.requests) == requests
    assert not hub_cache().exists()
    assert not root().exists()


def test_a_home_directory_in_cache_dir(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = hub.publish()
    for _ in range(2):
        assert fetch(file, cache_dir="~/mine") == place_of(file, tmp_path / "mine")
    assert len(hub.requests) == 1


def test_a_cache_dir_that_is_relative(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = hub.publish()
    path = fetch(file, cache_dir="mine")
    assert (path, path.is_absolute()) == (place_of(file, tmp_path / "mine"), True)


def test_the_directory_that_torch_was_told(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir(str(tmp_path / "told"))
    file = hub.publish()
    assert fetch(file) == place_of(file, tmp_path / "told" / "hubmodels")


@pytest.mark.parametrize("second", ["filename", "revision", "source", "port"])
def test_two_files_do_not_share_a_place(hub, second):
    """torch.hub's downloader names a file after the end of its address."""
    first = hub.publish()
    with FakeHub().listening() as other:
        changes = {
            "filename": {"filename": "other/params_0.npy"},
            "revision": {"revision": "f" * 40},
            "source": {"source": f"{hub.url}/openai/other-gpt"},
            "port": {"source": f"{other.url}/{SITE}"},
        }[second]
        file = replace(first, git_sha1=other.publish(OTHER).git_sha1, **changes)
        hub.files[store.url_of(file).removeprefix(f"{hub.url}/")] = OTHER
        assert fetch(first) != fetch(file)
        assert (fetch(first).read_bytes(), fetch(file).read_bytes()) == (DATA, OTHER)


def test_relative_path_is_host_path_revision_and_filename():
    def path(source: str, revision: str | None = REVISION, filename: str = "a/b.bin") -> str:
        return str(store.relative_path(catalog.File(source, revision, filename, 1, "0" * 64)))

    assert path("owner/name") == f"huggingface.co/owner/name/{REVISION}/a/b.bin"
    assert path("https://example.org") == f"example.org/{REVISION}/a/b.bin"
    assert path("https://example.org:8443/x/y") == f"example.org/8443/x/y/{REVISION}/a/b.bin"
    assert path("https://example.org/x/y.zip", None) == "example.org/x/y.zip/a/b.bin"


def test_a_connection_that_breaks_is_gone_on_with(hub, monkeypatch):
    monkeypatch.setattr(transfer, "_CHUNK", 512)
    file = hub.publish()
    hub.answer = hang_up(1)
    assert fetch(file).read_bytes() == DATA
    assert [asked.range for asked in hub.asked] == [None, f"bytes={len(DATA) // 2}-"]


def test_a_connection_that_breaks_is_gone_on_with_by_the_hubs_library(hub):
    file = hub.add()
    hub.answer = hang_up(1)
    assert fetch(file).read_bytes() == DATA
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(hub, kind):
    file = getattr(hub, kind)()
    hub.answer = in_turn(fail(429), fail(503), serve)
    assert fetch(file).read_bytes() == DATA


def test_a_hub_that_the_library_cannot_read_is_asked_plainly(hub):
    """Without the header that names the commit huggingface_hub refuses; the bytes are right all the same."""
    file = hub.add()
    hub.answer = serving(X_Repo_Commit=None, ETag=None)
    path, done = store.fetch(file, progress=False)
    assert path.read_bytes() == DATA
    assert done == f"downloaded: {hub.url}/{REPO}/resolve/{REVISION}/{NAME}"
    assert left(file) == {"the file"}


def test_nothing_unverified_ever_has_the_files_name(hub, monkeypatch):
    monkeypatch.setattr(transfer, "_CHUNK", 512)
    seen = []
    for file in (hub.add(), hub.publish()):

        def watched(exchange: Exchange, data: bytes, file=file) -> None:
            seen.append(os.path.lexists(place_of(file)))
            serving(stop=len(DATA) // 2)(exchange, data) if len(seen) % 4 else serve(exchange, OTHER)
            seen.append(os.path.lexists(place_of(file)))

        hub.answer = watched
        refusal(file)
        assert not place_of(file).exists()
    assert len(seen) > 4
    assert not any(seen)


def test_a_file_of_this_repository_is_read_in_place(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "hubmodels")
    (tmp_path / "w.bin").write_bytes(DATA)
    file = catalog.File(".", None, "w.bin", len(DATA), sha256(DATA))
    for function in (store.fetch, store.find, store.rehash):
        assert function(file) == (tmp_path / "w.bin", "in this repository, hashed now")
    assert store.state_of(file) == (tmp_path / "w.bin", "in this repository")
    assert hub.requests == []
    assert not root().exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [(None, "missing from this copy"), (DATA[1:], f"expected {len(DATA)} bytes"), (OTHER, "expected SHA-256")],
    ids=["missing", "short", "altered"],
)
def test_a_file_of_this_repository_that_is_not_the_tags(monkeypatch, tmp_path, data, expected):
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "hubmodels")
    if data is not None:
        (tmp_path / "w.bin").write_bytes(data)
    text = refusal(catalog.File(".", None, "w.bin", len(DATA), sha256(DATA)))
    assert text.startswith(f"{tmp_path / 'w.bin'}: {expected}")
    assert "check out its tag again" in text
    assert "huggingface.co" not in text


def test_a_store_error_is_an_os_error():
    assert issubclass(StoreError, OSError)


# --- Stamps


def test_a_hit_does_not_read_the_bytes(hub, hashed):
    file = hub.add()
    fetch(file)
    hashed.clear()
    for _ in range(3):
        assert how(file) == UNCHANGED
    assert hashed == []


def test_a_file_that_was_put_there_by_hand_is_hashed_once(hub, hashed):
    file = hub.add()
    path = write(place_of(file))
    assert store.fetch(file, progress=False) == (path, HASHED)
    assert how(file) == UNCHANGED
    assert hashed == [str(path)]
    assert hub.requests == []


@pytest.mark.parametrize("fact", ["pin", "size", "mtime_ns", "ctime_ns", "ino", "dev"])
def test_a_stamp_counts_only_if_all_of_it_is_as_it_was(hub, hashed, fact):
    file = hub.add()
    fetch(file)
    stamp = json.loads(stamp_path(file).read_text())
    for changed in ({**stamp, fact: "another" if fact == "pin" else stamp[fact] + 1}, {**stamp, fact: None}):
        stamp_path(file).write_text(json.dumps(changed))
        assert how(file) == HASHED
        assert json.loads(stamp_path(file).read_text()) == stamp
    del stamp[fact]
    stamp_path(file).write_text(json.dumps(stamp))
    assert how(file) == HASHED


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b'{"pin": ', b"\0" * 100], ids=repr)
def test_a_torn_stamp_means_hashing_once_more(hub, text):
    file = hub.add()
    fetch(file)
    stamp_path(file).write_bytes(text)
    assert how(file) == HASHED
    assert how(file) == UNCHANGED


def change_size(path: Path) -> None:
    path.write_bytes(DATA[1:])


def change_bytes(path: Path) -> None:
    path.write_bytes(OTHER)


def change_bytes_and_hide_it(path: Path) -> None:
    """With the size and the time of the last change as before; only the time of the change of the entry tells."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def replace_by_another(path: Path) -> None:
    status = path.stat()
    other = write(path.with_name("other"), OTHER)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


CHANGES = [change_size, change_bytes, change_bytes_and_hide_it, replace_by_another]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_file_that_changed_in_the_store_is_noticed_and_had_again(hub, kind, change):
    file = getattr(hub, kind)()
    path = fetch(file)
    tick(path)
    change(path)
    requests = len(hub.requests)
    assert how(file).startswith("downloaded: ")
    assert path.read_bytes() == DATA
    assert len(hub.requests) > requests
    assert how(file) == UNCHANGED


def test_a_touched_file_is_hashed_and_kept(hub):
    file = hub.add()
    path = fetch(file)
    os.utime(path, ns=(1, 1))
    requests = len(hub.requests)
    assert (how(file), how(file)) == (HASHED, UNCHANGED)
    assert len(hub.requests) == requests


def test_a_stamp_for_another_pin_does_not_count(hub):
    """Two manifests may pin other bytes under one name."""
    file = hub.add()
    path = fetch(file)
    other = hub.add(OTHER)
    assert store.relative_path(other) == store.relative_path(file)
    assert fetch(other) == path
    assert path.read_bytes() == OTHER
    assert f"{path}: expected {file.digest}, got {sha256(OTHER)}; it was removed" in refusal(file)


def test_a_stamp_that_cannot_be_written_means_hashing_each_time(hub, hashed):
    file = hub.add()
    path = fetch(file)
    stamp_path(file).unlink()
    write(stamp_path(file) / "in the way")
    hashed.clear()
    assert [how(file), how(file)] == [HASHED, HASHED]
    assert hashed == [str(path)] * 2


def test_a_wrong_file_gets_no_stamp(hub):
    file = hub.add()
    write(place_of(file), OTHER)
    hub.files.clear()
    refusal(file)
    assert not stamp_path(file).exists()
    assert not place_of(file).exists()


# --- Adopted


def in_the_snapshot(file, tmp_path: Path) -> Path:
    return lay_out(hub_cache(), file)


def in_another_snapshot(file, tmp_path: Path) -> Path:
    return lay_out(hub_cache(), file, revision="e" * 40)


def in_a_snapshot_without_links(file, tmp_path: Path) -> Path:
    folder = f"models--{file.source.replace('/', '--')}"
    return write(hub_cache() / folder / "snapshots" / file.revision / file.filename)


def in_another_repository(file, tmp_path: Path) -> Path:
    return lay_out(hub_cache(), file, folder="models--else--where").resolve()


def in_the_repository_of_its_old_name(file, tmp_path: Path) -> Path:
    return lay_out(hub_cache(), file, folder="models--bert-base-uncased", revision="d" * 40).resolve()


def in_a_cache_given_as_cache_dir(file, tmp_path: Path) -> Path:
    return lay_out(tmp_path / "mine", file)


def among_torchs_checkpoints(file, tmp_path: Path) -> Path:
    write(root().parent / "checkpoints" / "a.pth", OTHER)
    write(root().parent / "checkpoints" / "b.pth", DATA[1:])
    return write(root().parent / "checkpoints" / "whatever-1a2b3c4d.pth")


def in_a_directory_of_the_users(file, tmp_path: Path) -> Path:
    os.environ["HUBMODELS_MIRROR"] = f"{tmp_path / 'nothing'} {tmp_path / 'stick'}"
    return write(place_of(file, tmp_path / "stick"))


def in_a_directory_of_the_users_home(file, tmp_path: Path) -> Path:
    os.environ["HOME"], os.environ["HUBMODELS_MIRROR"] = str(tmp_path), "~/stick"
    return write(place_of(file, tmp_path / "stick"))


def in_the_usual_store(file, tmp_path: Path) -> Path:
    return write(place_of(file))


ELSEWHERE = [
    in_the_snapshot,
    in_another_snapshot,
    in_a_snapshot_without_links,
    in_another_repository,
    in_the_repository_of_its_old_name,
    in_a_cache_given_as_cache_dir,
    among_torchs_checkpoints,
    in_a_directory_of_the_users,
    in_a_directory_of_the_users_home,
    in_the_usual_store,
]
elsewhere = pytest.mark.parametrize("where", ELSEWHERE, ids=lambda where: where.__name__)


@pytest.fixture
def mine(monkeypatch, tmp_path) -> Path:
    """A store beside the usual one. What HOME and HUBMODELS_MIRROR are set to is put back."""
    for name in ("HOME", "HUBMODELS_MIRROR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return tmp_path / "mine"


@elsewhere
def test_a_file_that_the_user_has_is_adopted(hub, hashed, where, mine, tmp_path):
    file = hub.add()
    theirs = where(file, tmp_path)
    path, done = store.fetch(file, cache_dir=mine, progress=False)
    assert (path, done) == (place_of(file, mine), f"adopted from {theirs}")
    assert path.is_symlink()
    assert path.readlink() == theirs.resolve()
    assert path.read_bytes() == theirs.read_bytes() == DATA
    hashed.clear()
    assert store.fetch(file, cache_dir=mine, progress=False) == (path, UNCHANGED)
    assert (hashed, hub.requests) == ([], [])


@elsewhere
def test_a_copy_of_ones_own_needs_the_users_file_no_more(hub, where, mine, tmp_path):
    file = hub.add()
    theirs = where(file, tmp_path)
    path, done = store.fetch(file, cache_dir=mine, progress=False, own=True)
    assert (path, done) == (place_of(file, mine), f"copied from {theirs}")
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    theirs.resolve().unlink()
    assert store.fetch(file, cache_dir=mine, progress=False, own=True) == (path, UNCHANGED)
    assert path.read_bytes() == DATA
    assert left(file, mine) == {"the file"}
    assert hub.requests == []


def test_a_link_becomes_a_copy_when_one_is_asked_for(hub):
    file = hub.add()
    theirs = lay_out(hub_cache(), file)
    path = fetch(file)
    assert path.is_symlink()
    assert store.fetch(file, progress=False, own=True) == (path, f"copied from {theirs.resolve()}")
    assert not path.is_symlink()
    assert how(file) == how(file, own=True) == UNCHANGED
    assert theirs.read_bytes() == DATA
    assert hub.requests == []


def test_a_link_becomes_a_copy_even_if_nothing_but_the_link_leads_there_any_more(hub, monkeypatch, tmp_path):
    """The stick is still plugged in, but HUBMODELS_MIRROR is not set in this shell, and there is no network."""
    file = hub.add()
    write(place_of(file, tmp_path / "stick"))
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "stick"))
    path = fetch(file)
    monkeypatch.delenv("HUBMODELS_MIRROR")
    hub.stop()
    assert fetch(file, own=True) == path
    assert not path.is_symlink()
    assert path.read_bytes() == DATA


def test_a_link_that_cannot_become_a_copy_stays(hub, monkeypatch, tmp_path):
    """Another link is no copy, but it is better than nothing."""
    file = hub.add()
    write(place_of(file, tmp_path / "stick"))
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "stick"))
    path = fetch(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "make room" in refusal(file, own=True)
    assert path.read_bytes() == DATA


def test_a_file_pinned_by_git_is_adopted_by_its_blob(hub):
    """huggingface_hub names the blob of a small file as git does."""
    file = replace(hub.publish(), source=REPO)
    theirs = lay_out(hub_cache(), file, folder="models--else--where").resolve()
    assert how(file) == f"adopted from {theirs}"
    address = hub.publish()
    assert how(address) == f"adopted from {theirs}"
    assert hub.requests == []


def test_a_file_in_this_store_comes_before_all_others(hub):
    file = hub.add()
    lay_out(hub_cache(), file)
    path = write(place_of(file))
    assert store.fetch(file, progress=False) == (path, HASHED)
    assert not path.is_symlink()


@elsewhere
def test_wrong_bytes_of_the_users_are_left_alone_and_told(hub, where, mine, tmp_path):
    file = hub.add()
    theirs = where(file, tmp_path)
    theirs.resolve().write_bytes(OTHER)
    hub.files.clear()
    text = refusal(file, cache_dir=mine)
    assert f"{theirs}: expected {file.digest}, got {sha256(OTHER)}; it was left alone\n" in text
    assert theirs.read_bytes() == OTHER
    hub.add()
    path = fetch(file, cache_dir=mine)
    assert path.read_bytes() == DATA
    assert not path.is_symlink()
    assert theirs.read_bytes() == OTHER


def test_among_several_of_the_users_files_the_right_one_is_found(hub):
    file = hub.add()
    lay_out(hub_cache(), file, OTHER)
    lay_out(hub_cache(), file, folder="models--else--where", data=DATA[1:])
    theirs = lay_out(hub_cache(), file, folder="models--some--thing").resolve()
    assert how(file) == f"adopted from {theirs}"


def test_the_users_file_that_changes_after_it_was_adopted_is_noticed(hub):
    file = hub.add()
    theirs = lay_out(hub_cache(), file).resolve()
    path = fetch(file)
    tick(theirs)
    change_bytes_and_hide_it(theirs)
    changed = theirs.read_bytes()
    assert how(file).startswith("downloaded: ")
    assert path.read_bytes() == DATA
    assert not path.is_symlink()
    assert theirs.read_bytes() == changed


def test_an_adopted_file_that_its_owner_deletes_is_had_again(hub):
    file = hub.add()
    lay_out(hub_cache(), file)
    path = fetch(file)
    shutil.rmtree(hub_cache())
    assert path.is_symlink()
    assert not path.exists()
    assert how(file).startswith("downloaded: ")
    assert path.read_bytes() == DATA
    assert not path.is_symlink()


def test_an_adopted_file_that_is_gone_is_not_written_where_it_was(hub):
    """Neither by a download nor by a copy does the link lead us into another cache."""
    file = hub.add()
    theirs = lay_out(hub_cache(), file).resolve()
    fetch(file)
    theirs.unlink()
    fetch(file, own=True)
    assert not theirs.exists()


def test_adopting_leaves_no_part_of_a_download_behind(hub):
    file = hub.publish(LONG)
    hub.answer = in_turn(serving(stop=300_000), fail(404))
    refusal(file)
    assert "part" in left(file)
    lay_out(hub_cache(), file, LONG, folder="models--else--where")
    assert how(file).startswith("adopted from ")
    assert left(file) == {"the file"}


def test_where_no_links_can_be_made_the_users_file_itself_is_given(hub, monkeypatch):
    file = hub.add()
    theirs = lay_out(hub_cache(), file)

    def no_links(*_, **__):
        raise OSError(errno.EPERM, "no links on this file system")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    for _ in range(2):
        assert store.fetch(file, progress=False) == (theirs, f"adopted from {theirs}")
    assert left(file) == set()
    assert hub.requests == []


def test_what_is_no_file_in_the_users_caches_is_passed_by(hub):
    file = hub.add()
    checkpoints = root().parent / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "gone.pth").symlink_to(checkpoints / "nowhere")
    (checkpoints / "circle.pth").symlink_to(checkpoints / "circle.pth")
    (checkpoints / "folder").mkdir()
    folder = hub_cache() / f"models--{REPO.replace('/', '--')}"
    (folder / "snapshots" / REVISION / NAME).mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / file.sha256).symlink_to("nowhere")
    assert fetch(file).read_bytes() == DATA


def test_the_users_file_that_vanishes_while_it_is_looked_at_is_passed_by(hub, monkeypatch):
    """Another program tidies up its cache."""
    file = hub.add()
    theirs = lay_out(hub_cache(), file, OTHER)
    is_file = Path.is_file

    def and_gone(path: Path) -> bool:
        there = is_file(path)
        if path == theirs.resolve():
            path.unlink(missing_ok=True)
        return there

    monkeypatch.setattr(Path, "is_file", and_gone)
    assert fetch(file).read_bytes() == DATA
    assert not theirs.exists()


def test_the_store_by_another_name_is_no_other_cache(hub, monkeypatch, tmp_path):
    """A link to the store, or its path with a detour, in HUBMODELS_MIRROR."""
    file = hub.add()
    (tmp_path / "alias").symlink_to(root())
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "alias"))
    path = fetch(file)
    tick(path)
    change_bytes(path)
    assert how(file).startswith("downloaded: ")
    assert not path.is_symlink()
    assert path.read_bytes() == DATA


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not write what others own: root may write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(monkeypatch) -> Iterator[Path]:
    """A directory that everybody may look into, with the caches in it."""
    directory = Path(tempfile.mkdtemp(prefix="hubmodels-")).resolve()
    directory.chmod(0o755)
    monkeypatch.setenv("TORCH_HOME", str(directory / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory / "hf"))
    yield directory
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(directory)


@contextmanager
def read_only(directory: Path, mode: int = 0o555) -> Iterator[None]:
    directories = [path for path in [directory, *directory.rglob("*")] if path.is_dir() and not path.is_symlink()]
    for path in directories[::-1]:
        path.chmod(mode)
    try:
        with nobody():
            yield
    finally:
        for path in directories:
            path.chmod(0o755)


def test_a_cache_that_may_not_be_looked_into_is_passed_by(hub, public):
    """Another user's, by a wrong HF_HOME or in a shared checkpoints directory."""
    file = hub.add()
    lay_out(public / "hf", file)
    (public / "torch" / "hub" / "hubmodels").mkdir(parents=True)
    (public / "torch" / "hub" / "hubmodels").chmod(0o777)
    with read_only(public / "hf", 0o000):
        path = fetch(file)
        assert path.read_bytes() == DATA
    assert not path.is_symlink()


def test_the_users_file_that_may_not_be_read_is_passed_by(hub, public):
    file = hub.add()
    theirs = lay_out(public / "hf", file).resolve()
    (public / "torch" / "hub" / "hubmodels").mkdir(parents=True)
    (public / "torch" / "hub" / "hubmodels").chmod(0o777)
    theirs.chmod(0o000)
    with nobody():
        path = fetch(file)
        assert path.read_bytes() == DATA
    assert not path.is_symlink()


# --- A store that cannot be written


def test_a_store_that_cannot_be_written_is_read(hub, public, hashed):
    file = hub.add()
    path = fetch(file)
    hashed.clear()
    with read_only(root()):
        assert store.fetch(file, progress=False) == (path, UNCHANGED)
    assert hashed == []


def test_without_a_stamp_a_store_that_cannot_be_written_is_hashed_each_time(hub, public, hashed):
    file = hub.add()
    path = fetch(file)
    shutil.rmtree(root() / ".hubmodels")
    hashed.clear()
    with read_only(root()):
        for _ in range(2):
            assert store.fetch(file, progress=False) == (path, HASHED)
    assert hashed == [str(path)] * 2


def test_from_a_store_that_cannot_be_written_the_users_own_file_is_given(hub, public):
    file = hub.add()
    theirs = lay_out(public / "hf", file)
    root().mkdir(parents=True)
    with read_only(root()):
        for _ in range(2):
            assert store.fetch(file, progress=False) == (theirs, f"adopted from {theirs}")
        assert list(root().iterdir()) == []
    assert hub.requests == []


def test_into_a_store_that_cannot_be_written_nothing_is_downloaded(hub, public):
    file = hub.add()
    root().mkdir(parents=True)
    with read_only(root()):
        text = refusal(file)
    assert f"\n  {root()}: cannot be written; name another directory with cache_dir= or TORCH_HOME\n" in text
    assert hub.requests == []


def test_wrong_bytes_in_a_store_that_cannot_be_written_are_told_and_stay(hub, public):
    file = hub.add()
    path = fetch(file)
    tick(path)
    change_bytes(path)
    requests = len(hub.requests)
    with read_only(root()):
        text = refusal(file)
        assert path.read_bytes() == OTHER
    assert f"\n  {path}: expected {file.digest}, got {sha256(OTHER)}\n" in text
    assert f"\n  {root()}: cannot be written" in text
    assert len(hub.requests) == requests


def test_another_process_that_may_write_the_same_store_is_not_needed(hub, public, tmp_path):
    """Filled by an administrator, read by everybody: also what the administrator once adopted."""
    file = hub.add()
    theirs = lay_out(public / "hf", file)
    path = fetch(file)
    with read_only(public):
        assert store.fetch(file, progress=False) == (path, UNCHANGED)
    assert path.readlink() == theirs.resolve()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_file_where_a_directory_of_the_store_belongs(hub, depth):
    file = hub.publish()
    write(place_of(file).parents[len(place_of(file).relative_to(root()).parts) - 1 - depth], b"in the way")
    text = refusal(file)
    assert "cannot be written" in text or "Not a directory" in text
    assert "curl -L" in text
    assert hub.requests == []


def test_a_directory_where_the_file_belongs(hub):
    """It is not ours: nothing in it is removed."""
    file = hub.publish()
    write(place_of(file) / "something", b"of somebody's")
    text = refusal(file)
    assert f"{place_of(file)} is a directory, where a file belongs; remove it\n" in text
    assert (place_of(file) / "something").read_bytes() == b"of somebody's"
    assert hub.requests == []


# --- Not had


def test_every_source_that_was_tried_stands_in_the_error_with_its_reason(hub, monkeypatch, tmp_path):
    file = replace(hub.add(), mirrors=(f"{hub.url}/mirrored/one", f"{hub.url}/mirrored/two"))
    monkeypatch.setenv("HUBMODELS_MIRROR", f"{tmp_path / 'stick'} {hub.url}/store/")
    write(place_of(file, tmp_path / "stick"), DATA[1:])
    theirs = lay_out(hub_cache(), file, OTHER)
    write(place_of(file), b"short")
    resolve = f"{REPO}/resolve/{REVISION}/{NAME}"
    hub.files |= {resolve: OTHER, "mirrored/two": DATA[2:]}
    wrong = f"expected {file.digest}, got {sha256(OTHER)}"
    assert refusal(file).splitlines() == [
        f"{NAME} ({file.digest}) could not be had:",
        f"  {place_of(file)}: expected {len(DATA)} bytes, got 5; it was removed",
        f"  {theirs}: {wrong}; it was left alone",
        f"  {theirs.resolve()}: {wrong}; it was left alone",
        f"  {place_of(file, tmp_path / 'stick')}: expected {len(DATA)} bytes, got {len(DATA) - 1}; it was left alone",
        f"  hf_hub_download from {hub.url}: {wrong}, twice",
        f"  {hub.url}/mirrored/one: HTTP 404 Not Found",
        f"  {hub.url}/mirrored/two: expected {len(DATA)} bytes, it offers {len(DATA) - 2}, twice",
        f"  {hub.url}/store/{store.relative_path(file)}: HTTP 404 Not Found",
        f"Fetch it by hand: curl -L --create-dirs -o '{place_of(file)}' https://huggingface.co/{resolve}; "
        f"or into the Hugging Face cache: hf download {REPO} {NAME} --revision {REVISION}",
    ]


def test_wrong_bytes_of_the_hub_are_fetched_twice_and_refused(hub):
    file = hub.add(served=OTHER)
    text = refusal(file)
    assert f"hf_hub_download from {hub.url}: expected {file.digest}, got {sha256(OTHER)}, twice" in text
    assert [method for method, _ in hub.requests] == ["HEAD", "GET"] * 2
    assert left(file) == set()


def test_wrong_bytes_of_an_address_are_fetched_twice_and_refused(hub):
    file = hub.publish(served=OTHER)
    text = refusal(file)
    got = hashlib.sha1(b"blob 10240\0" + OTHER).hexdigest()
    assert len(OTHER) == 10240
    assert f"{store.url_of(file)}: expected git blob SHA-1 {file.git_sha1}, got {got}, twice" in text
    assert hub.requests == [("GET", f"{SITE}/{REVISION}/{SHARD}")] * 2
    assert left(file) == set()


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_wrong_bytes_by_accident_are_fetched_once_more(hub, kind):
    file = getattr(hub, kind)()
    hub.answer = in_turn(lambda exchange, data: serve(exchange, OTHER), serve)
    assert fetch(file).read_bytes() == DATA


@pytest.mark.parametrize("pin", ["git_sha1", "sha256", "both"])
def test_what_pins_an_address_is_looked_at(hub, pin):
    """With a SHA-256 that decides, and the size with it."""
    by_git = hub.publish()
    file = {
        "git_sha1": by_git,
        "sha256": replace(by_git, size=len(DATA), sha256=sha256(DATA), git_sha1=None),
        "both": replace(by_git, size=len(DATA), sha256=sha256(DATA)),
    }[pin]
    fetch(file)
    kind = "git blob SHA-1" if pin == "git_sha1" else "SHA-256"
    hub.files[f"{SITE}/{REVISION}/{SHARD}"] = OTHER
    write(place_of(file), OTHER)
    assert refusal(file).count(f"expected {kind} ") == 2
    write(place_of(file), DATA[1:])
    expected = f"expected {kind} " if pin == "git_sha1" else f"expected {len(DATA)} bytes, got {len(DATA) - 1}"
    assert f"{place_of(file)}: {expected}" in refusal(file)


@pytest.mark.parametrize("served", [DATA[:-100], DATA + b"!", b""], ids=["short", "long", "empty"])
@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_file_of_another_size(hub, kind, served):
    file = getattr(hub, kind)(served=served)
    text = refusal(file)
    expected = f"{len(DATA)} bytes" if kind == "add" else file.digest
    assert f"expected {expected}, " in text
    assert left(file) == set()


def test_a_body_of_the_hubs_without_an_end_is_cut_off(hub, monkeypatch):
    """The library itself writes whatever comes."""
    file = hub.add()
    written = [0]

    def endless(exchange: Exchange, data: bytes) -> None:
        exchange.head(200, ETag='"1"', X_Repo_Commit=REVISION, X_Linked_Size=len(DATA), X_Linked_ETag='"1"')
        while exchange.command == "GET" and written[0] < 64 << 20:
            exchange.body(bytes(1 << 16))
            written[0] += 1 << 16

    hub.answer = endless
    refusal(file)
    assert written[0] < 64 << 20
    assert left(file) == set()


def test_a_connection_that_always_breaks(hub):
    file = hub.add()
    hub.answer = break_off
    refusal(file)
    assert not place_of(file).exists()
    hub.answer = serve
    assert fetch(file).read_bytes() == DATA


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_file_that_is_not_there(hub, kind):
    file = getattr(hub, kind)()
    hub.files.clear()
    text = refusal(file)
    assert "HTTP 404 Not Found" in text
    assert f"curl -L --create-dirs -o '{place_of(file)}' {store.url_of(file)}" in text
    assert not place_of(file).exists()


@pytest.mark.parametrize("kind", ["add", "publish"])
@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_server_that_refuses(hub, kind, status):
    file = getattr(hub, kind)()
    hub.answer = fail(status)
    assert f"HTTP {status} " in refusal(file)
    assert not place_of(file).exists()
    assert len(hub.requests) < 20


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_server_that_wants_to_be_left_alone_for_a_day_is(hub, kind):
    """huggingface_hub by itself would sleep, five times."""
    from huggingface_hub import get_session

    file = getattr(hub, kind)()
    hub.answer = fail(429, Retry_After=86400)
    hooks = list(get_session().event_hooks["response"])
    assert "HTTP 429" in refusal(file)
    assert "it asks to be left alone for 86400 s" in refusal(file)
    assert len(hub.requests) <= 2 * (2 if kind == "add" else 1)
    assert get_session().event_hooks["response"] == hooks


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_page_instead_of_the_file(hub, kind):
    file = getattr(hub, kind)()
    hub.answer = page
    text = refusal(file)
    expected = f"{len(DATA)} bytes" if kind == "add" else file.digest
    assert f"expected {expected}, " in text

    assert left(file) == set()


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_nobody_answers(hub, kind):
    file = getattr(hub, kind)()
    hub.stop()
    text = refusal(file)
    assert "refused" in text
    assert f"curl -L --create-dirs -o '{place_of(file)}' {store.url_of(file)}" in text


def test_a_file_is_looked_for_in_the_store_that_was_asked_for(hub, tmp_path):
    file = hub.add()
    hub.files.clear()
    assert f"curl -L --create-dirs -o '{place_of(file, tmp_path / 'mine')}' " in refusal(
        file, cache_dir=tmp_path / "mine"
    )


def test_what_has_come_before_an_interruption_is_gone_on_with(hub, monkeypatch):
    """Ctrl+C in the middle."""
    monkeypatch.setattr(transfer, "_CHUNK", 512)
    file = hub.publish()

    def interrupted(self, data: bytes) -> None:
        if self.length >= 2048:
            raise KeyboardInterrupt
        write(self, data)

    with monkeypatch.context() as patch:
        write = transfer.Part.write
        patch.setattr(transfer.Part, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(file)
    assert left(file) == {"part", "part.json"}
    hub.asked.clear()
    assert fetch(file).read_bytes() == DATA
    assert [asked.range for asked in hub.asked] == ["bytes=2048-"]
    assert left(file) == {"the file"}


def test_a_part_of_the_hubs_file_is_gone_on_with_before_anything_else(hub, monkeypatch):
    monkeypatch.setattr(transfer, "_CHUNK", 512)
    file = hub.add()
    hub.answer = lambda exchange, data: (
        fail(404) if exchange.command == "HEAD" else in_turn(serving(stop=5120), fail(404))
    )(exchange, data)
    refusal(file)
    assert "part" in left(file)
    hub.answer = serve
    hub.asked.clear()
    assert how(file) == f"downloaded: {hub.url}/{REPO}/resolve/{REVISION}/{NAME}"
    assert [(asked.method, asked.range) for asked in hub.asked] == [("GET", f"bytes=5120-{len(DATA) - 1}")]
    assert left(file) == {"the file"}


def test_a_part_of_another_version_is_not_gone_on_with(hub):
    """Of the same place, under an older manifest."""
    file = hub.publish(LONG)
    hub.answer = in_turn(serving(stop=300_000), fail(404))
    refusal(file)
    later = hub.publish(LONG[::-1])
    hub.answer = serve
    hub.asked.clear()
    assert fetch(later).read_bytes() == LONG[::-1]
    assert [asked.range for asked in hub.asked] == [None]


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_a_part_with_wrong_bytes_costs_one_more_download(hub, kind):
    """Its note is right, and so it is gone on with; all of it together is not what was pinned."""
    file = getattr(hub, kind)(LONG)
    write(state_dir(file) / "part", b"!" + LONG[1:300_000])
    (state_dir(file) / "part.json").write_text(json.dumps({"pin": file.digest}))
    assert fetch(file).read_bytes() == LONG
    assert left(file) == {"the file"}


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_leftovers_of_a_killed_download_are_no_obstacle(hub, kind):
    file = getattr(hub, kind)()
    state = state_dir(file)
    write(state / "hub" / ".cache" / "huggingface" / "download" / f"{NAME}.incomplete", OTHER)
    write(state / "hub" / NAME, OTHER)
    write(state / "part", OTHER)
    write(state / "part.json", b"{")
    write(state / "compressed", OTHER)
    write(state / "lock", b"")
    (state / "link").symlink_to("nowhere")
    write(state / "stamp.4711", b"{")
    assert fetch(file).read_bytes() == DATA
    assert left(file) == {"the file"}


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_room_is_looked_for_before_anything_is_asked_for(hub, monkeypatch, kind):
    """Where the size is known; else when the server has said it."""
    file = getattr(hub, kind)()
    disk = SimpleNamespace(free=len(DATA) + transfer.SPARE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    text = refusal(file)
    assert "make room, or name another directory with cache_dir= or TORCH_HOME" in text
    assert len(hub.requests) == (0 if kind == "add" else 1)
    disk.free += 1
    assert fetch(file).read_bytes() == DATA


# --- By hand


def follow(text: str, hub: FakeHub, directory: Path) -> None:
    """As a person does who copies the line of the message; the hub is the one on this machine."""
    if not shutil.which("curl") or not shutil.which("unzip"):
        pytest.skip("curl and unzip are not installed")
    line = re.search(r"Fetch it by hand: (curl .*?)(; or into .*)?$", text)[1]
    line = line.replace("https://huggingface.co", hub.url).replace("curl ", "curl -sS ")
    subprocess.run(["bash", "-c", line], cwd=directory, check=True, timeout=30)


@pytest.mark.parametrize("folder", ["mine", "of mine", "it's mine", 'a "quoted" $HOME'])
@pytest.mark.parametrize("kind", ["add", "publish", "member"])
def test_who_does_as_the_error_says_has_the_file(hub, kind, folder, tmp_path):
    import io
    import zipfile

    if kind == "member":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a dir/of the file.bin", DATA)
        url = hub.put("archives/a.zip", buffer.getvalue())
        file = catalog.File(url, None, "a dir/of the file.bin", len(DATA), sha256(DATA))
    else:
        file = getattr(hub, kind)()
    hub.answer = fail(404)
    text = refusal(file, cache_dir=tmp_path / folder)
    hub.answer = serve
    follow(text, hub, tmp_path)
    hub.stop()
    assert store.fetch(file, cache_dir=tmp_path / folder, progress=False) == (place_of(file, tmp_path / folder), HASHED)


def test_who_puts_the_file_where_the_link_was_has_it(hub, tmp_path):
    """The link leads into a cache that is gone; curl would write through it."""
    file = hub.publish()
    lay_out(hub_cache(), file, folder="models--else--where")
    fetch(file)
    shutil.rmtree(hub_cache())
    hub.answer = fail(404)
    text = refusal(file)
    hub.answer = serve
    follow(text, hub, tmp_path)
    hub.stop()
    assert fetch(file).read_bytes() == DATA
    assert not hub_cache().exists()


# --- Without the network


@pytest.fixture
def offline(hub, monkeypatch) -> FakeHub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_offline_nothing_is_asked_for_and_what_to_do_is_said(offline, kind):
    file = replace(getattr(offline, kind)(), mirrors=(f"{offline.url}/mirrored",))
    text = refusal(file)
    assert "\n  the network: HF_HUB_OFFLINE is set\n" in text
    assert f"curl -L --create-dirs -o '{place_of(file)}' {store.url_of(file)}" in text
    assert offline.requests == []


@elsewhere
def test_offline_a_file_on_this_machine_is_enough(offline, where, mine, tmp_path):
    file = offline.add()
    theirs = where(file, tmp_path)
    assert how(file, cache_dir=mine) == f"adopted from {theirs}"
    assert how(file, cache_dir=mine) == UNCHANGED
    assert offline.requests == []


# --- Other addresses


def test_a_mirror_of_the_manifest_is_asked_when_the_source_has_failed(hub):
    with FakeHub().listening() as mirror:
        file = hub.add()
        file = replace(file, mirrors=(mirror.put("nothing", b""), mirror.put("a/b.bin", DATA)))
        del mirror.files["nothing"]
        assert how(file).startswith("downloaded: hf_hub_download")
        assert mirror.requests == []
        place_of(file).unlink()
        hub.files.clear()
        assert how(file) == f"downloaded: {mirror.url}/a/b.bin"
        assert mirror.requests == [("GET", "nothing"), ("GET", "a/b.bin")]


def test_a_mirror_of_the_users_is_laid_out_as_the_store_is(hub, monkeypatch):
    with FakeHub().listening() as mirror:
        monkeypatch.setenv("HUBMODELS_MIRROR", f"{hub.url}/nothing  {mirror.url}/store/")
        for file in (hub.add(), hub.publish(), catalog.File(f"{hub.url}/a.zip", None, "b/c", len(DATA), sha256(DATA))):
            mirror.put(f"store/{place_of(file).relative_to(root())}", DATA)
            hub.files.clear()
            assert how(file) == f"downloaded: {mirror.url}/store/{store.relative_path(file)}"
            assert place_of(file).read_bytes() == DATA


def test_a_mirror_goes_on_with_what_the_source_began(hub, monkeypatch):
    monkeypatch.setattr(transfer, "_CHUNK", 512)
    file = hub.publish()
    file = replace(file, mirrors=(hub.put("mirrored", DATA),))
    hub.answer = lambda exchange, data: (
        serve if exchange.path == "/mirrored" else fail(404) if exchange.headers["Range"] else serving(stop=5120)
    )(exchange, data)
    assert fetch(file).read_bytes() == DATA
    assert (hub.asked[-1].path, hub.asked[-1].range) == ("mirrored", "bytes=5120-")


def test_a_mirror_with_wrong_bytes_is_not_the_end(hub):
    file = hub.publish()
    file = replace(file, mirrors=(hub.put("wrong", OTHER), hub.put("right", DATA)))
    del hub.files[f"{SITE}/{REVISION}/{SHARD}"]
    assert how(file) == f"downloaded: {hub.url}/right"
    assert [path for _, path in hub.requests].count("wrong") == 2


@pytest.mark.parametrize(
    "base", ["http://example.org/a", "http://127.0.0.1.example.org", "ftp://127.0.0.1/a", "https://"]
)
def test_a_mirror_of_the_users_must_be_https_or_a_directory(hub, monkeypatch, base):
    monkeypatch.setenv("HUBMODELS_MIRROR", f"/nothing {base}")
    file = hub.add()
    assert refusal(file) == f"HUBMODELS_MIRROR: {base}: expected an https address, or a directory"
    assert hub.requests == []
    write(place_of(file))
    assert how(file) == HASHED  # what is here needs none


def test_an_endpoint_must_be_https(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.org")
    template = "http://hub.example.org/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    text = refusal(hub.add())
    assert "\n  hf_hub_download from http://hub.example.org: expected an https address as HF_ENDPOINT\n" in text
    assert "plain http is for this machine only, not http://hub.example.org/" in text


@pytest.fixture
def plainly(hub) -> Callable:
    """The hub's own library gets nowhere, so that the same endpoint is asked by our client."""

    def answer(then: Callable) -> None:
        hub.answer = lambda exchange, data: (fail(404) if exchange.command == "HEAD" else then)(exchange, data)

    return answer


def test_a_token_is_told_to_the_endpoint(hub, monkeypatch, plainly):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = hub.add()
    plainly(serve)
    assert how(file) == f"downloaded: {hub.url}/{REPO}/resolve/{REVISION}/{NAME}"
    assert {asked.headers.get("authorization") for asked in hub.asked} == {"Bearer hf_secret"}
    assert "hubmodels" in hub.asked[-1].headers["user-agent"]


@pytest.mark.parametrize("way", ["by the library", "plainly"])
def test_a_token_is_not_told_to_where_the_endpoint_sends(hub, monkeypatch, plainly, way):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = hub.add()
    with FakeHub().listening() as other:
        there = other.put("elsewhere", DATA).replace("127.0.0.1", "localhost")
        sent = lambda exchange, data: exchange.head(  # noqa: E731
            302, Location=there, X_Repo_Commit=REVISION, X_Linked_ETag='"1"', X_Linked_Size=len(DATA), Content_Length=0
        )
        hub.answer = sent
        if way == "plainly":
            plainly(sent)
        assert fetch(file).read_bytes() == DATA
        assert {asked.headers.get("authorization") for asked in hub.asked} == {"Bearer hf_secret"}
        assert "GET" in {asked.method for asked in other.asked}
        assert "hf_secret" not in str(other.asked)


def test_a_token_is_not_told_to_mirrors_and_addresses(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FakeHub().listening() as other:
        monkeypatch.setenv("HUBMODELS_MIRROR", other.url)
        file = replace(hub.add(), mirrors=(f"{other.url}/mirrored",))
        hub.files.clear()
        refusal(file)
        refusal(replace(other.publish(), filename="nothing"))
        assert len(other.asked) >= 3
        assert "hf_secret" not in str(other.asked)


def test_no_token_is_asked_for_where_the_user_wants_none_told(hub, monkeypatch, plainly):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    file = hub.add()
    plainly(serve)
    fetch(file)
    assert "hf_secret" not in str(hub.asked)


def test_a_redirect_to_the_file_is_followed(hub):
    file = hub.publish()
    hub.put("elsewhere", DATA)
    hub.answer = lambda exchange, data: (serve if exchange.path == "/elsewhere" else redirect("/elsewhere"))(
        exchange, data
    )
    assert fetch(file).read_bytes() == DATA


# --- Several at once


class Listening:
    """A standard error that calls when somebody says that he waits."""

    def __init__(self, heard: threading.Event) -> None:
        self.heard, self.text = heard, ""

    def write(self, text: str) -> None:
        self.text += text
        if "waiting for it" in text:
            self.heard.set()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@pytest.fixture
def waited(hub) -> Listening:
    """The server answers only when somebody waits for somebody else's download, or after a while."""
    heard = threading.Event()
    hub.answer = lambda exchange, data: (heard.wait(20), serve(exchange, data))
    return Listening(heard)


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_two_threads_download_once(hub, waited, kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", waited)
    file = getattr(hub, kind)()
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(store.fetch(file))
        except Exception as error:  # judged below, in the test's own thread
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.how.split(":")[0] for outcome in outcomes) == ["downloaded", UNCHANGED]
    assert {outcome.path for outcome in outcomes} == {place_of(file)}
    assert [method for method, _ in hub.requests] == (["HEAD", "GET"] if kind == "add" else ["GET"])
    assert f"hubmodels: another process is fetching {file.filename}; waiting for it\n" in waited.text
    assert left(file) == {"the file"}


def another_process(file, **options) -> subprocess.Popen:
    """That fetches the file."""
    package = Path(store.__file__).parents[2]
    script = (
        "import sys, json; from importlib import import_module; from hubmodels import store; "
        "File = import_module('hubmodels.catalog').File; "
        "print(store.fetch(File(**json.loads(sys.argv[1]))).how)"
    )
    command = [sys.executable, "-c", script, json.dumps(asdict(file))]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.Popen(command, cwd=package, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_two_processes_download_once(hub, waited, monkeypatch):
    monkeypatch.setattr(sys, "stderr", waited)
    file = hub.publish()
    with another_process(file) as other:
        while not hub.asked and other.poll() is None:
            time.sleep(0.01)
        here = store.fetch(file)
        there = other.communicate(timeout=60)[0]
    assert (here, there) == ((place_of(file), UNCHANGED), f"downloaded: {store.url_of(file)}\n")
    assert len(hub.requests) == 1
    assert f"hubmodels: another process is fetching {SHARD}; waiting for it\n" in waited.text


def test_what_a_killed_process_began_is_gone_on_with_at_once(hub):
    """Its lock is gone with it, and what had come is kept."""
    file = hub.publish(LONG)
    half, killed = threading.Event(), threading.Event()

    def stop_in_the_middle(exchange: Exchange, data: bytes) -> None:
        serving(stop=300_000)(exchange, data)
        half.set()
        killed.wait(60)

    hub.answer = in_turn(stop_in_the_middle, serve)
    part = state_dir(file) / "part"
    with another_process(file) as other:
        assert half.wait(60)
        while other.poll() is None and (not part.exists() or part.stat().st_size < 100_000):
            time.sleep(0.01)
        other.kill()
    killed.set()
    there = part.stat().st_size
    assert 0 < there <= 300_000
    assert not place_of(file).exists()
    assert fetch(file).read_bytes() == LONG
    assert hub.asked[-1].range == f"bytes={there}-"
    assert left(file) == {"the file"}


# --- What a person sees


@contextmanager
def terminal(monkeypatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; gives what stands on it. No fixture: pytest sets sys.stderr after those."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)

        def shown() -> str:
            stream.flush()
            os.set_blocking(ours, False)
            text = b""
            while True:
                try:
                    text += os.read(ours, 1 << 16)
                except OSError:
                    return text.decode()

        yield shown
    os.close(ours)


def test_on_a_terminal_there_is_a_bar(hub, monkeypatch, capfd):
    with terminal(monkeypatch) as shown:
        store.fetch(hub.publish(LONG), progress=True)
        text = shown()
    assert "params_0.npy" in text
    assert "100%" in text
    assert "410k/410k" in text
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_progress_false_prints_nothing_even_on_a_terminal(hub, monkeypatch, capfd, kind):
    file = getattr(hub, kind)()
    hub.answer = in_turn(fail(503), lambda exchange, data: serve(exchange, OTHER), serve)
    with terminal(monkeypatch) as shown:
        store.fetch(file, progress=False)
        assert shown() == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_without_a_terminal_there_is_no_bar(hub, capfd, kind):
    store.fetch(getattr(hub, kind)(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_what_takes_long_is_told_on_standard_error(hub, capfd):
    file = hub.publish()
    hub.answer = in_turn(fail(503), lambda exchange, data: serve(exchange, OTHER), serve)
    store.fetch(file, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    got = hashlib.sha1(b"blob 10240\0" + OTHER).hexdigest()
    assert err.splitlines() == [
        "hubmodels: HTTP 503 Service Unavailable; trying again in 1 s",
        f"hubmodels: {store.url_of(file)}: expected {file.digest}, got {got}; fetching it once more from the beginning",
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("shown", [False, True], ids=["hidden", "shown"])
@pytest.mark.parametrize("disabled", [False, True], ids=["enabled", "disabled"])
def test_the_librarys_switch_stays_as_it_was(hub, shown, disabled, fails):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    seen = []
    file = hub.add()
    if fails:
        hub.files.clear()
    hub.answer = lambda exchange, data: (seen.append(are_progress_bars_disabled()), serve(exchange, data))
    (disable_progress_bars if disabled else enable_progress_bars)()
    try:
        if fails:
            with pytest.raises(StoreError):
                store.fetch(file, progress=shown)
        else:
            store.fetch(file, progress=shown)
            assert set(seen) == {disabled or not shown}
        assert are_progress_bars_disabled() == disabled
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


# --- Looked at without being fetched


def test_find_takes_what_is_on_this_machine_and_asks_nobody(hub):
    file = hub.add()
    with pytest.raises(StoreError, match="could not be had") as caught:
        store.find(file)
    assert f"curl -L --create-dirs -o '{place_of(file)}' " in str(caught.value)
    theirs = lay_out(hub_cache(), file)
    assert store.find(file) == (place_of(file), f"adopted from {theirs}")
    assert store.find(file) == (place_of(file), UNCHANGED)
    assert hub.requests == []


def test_rehash_reads_every_byte_whatever_the_stamp_says(hub, hashed):
    file = hub.add()
    path = fetch(file)
    hashed.clear()
    assert store.rehash(file).path == path
    assert hashed == [str(path)]
    path.write_bytes(OTHER)
    stamp = {f"{fact}": getattr(path.stat(), f"st_{fact}") for fact in ("size", "mtime_ns", "ctime_ns", "ino", "dev")}
    stamp_path(file).write_text(json.dumps({"pin": file.digest, **stamp}))
    assert how(file) == UNCHANGED  # a stamp can be forged, or a disk err
    with pytest.raises(StoreError, match=f"expected {file.digest}, got {sha256(OTHER)}"):
        store.rehash(file)
    assert not stamp_path(file).exists()
    assert path.read_bytes() == OTHER
    assert how(file).startswith("downloaded: ")
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("kind", ["add", "publish"])
def test_state_of_says_what_is_known_and_does_nothing(hub, hashed, kind):
    file = getattr(hub, kind)(LONG)
    path = place_of(file)
    assert store.state_of(file) == (path, "not here")
    assert not root().exists()
    write(state_dir(file) / "part", DATA)
    assert store.state_of(file) == (path, "not here; 10,240 bytes have come")
    theirs = lay_out(hub_cache(), file, LONG, folder="models--else--where").resolve()
    assert store.state_of(file) == (theirs, "in another cache, to be hashed when it is used")
    assert (hashed, hub.requests) == ([], [])
    fetch(file)
    assert store.state_of(file) == (path, f"verified, a link to {theirs}")
    fetch(file, own=True)
    assert store.state_of(file) == (path, "verified")
    os.utime(path, ns=(1, 1))
    hashed.clear()
    assert store.state_of(file) == (path, "here, to be hashed when it is used")
    assert hashed == []


# --- Digests


def test_sha256_of(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert store.sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("data", [b"", b"abc", b"blob 3\0abc", DATA], ids=["empty", "abc", "a blob's", "bytes"])
def test_git_sha1_of(tmp_path, data):
    """The digests of the empty file and of "abc" are known to every git."""
    path = tmp_path / "f"
    path.write_bytes(data)
    digest = store.git_sha1_of(path)
    assert digest == hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    known = {b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", b"abc": "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"}
    assert digest == known.get(data, digest)
    if git := shutil.which("git"):
        hashed = subprocess.run([git, "hash-object", "--no-filters", path], capture_output=True, text=True, check=True)
        assert digest == hashed.stdout.strip()


def test_verify_says_where_the_wrong_file_is_and_whence_the_right_one_comes(hub):
    file = hub.add()
    theirs = lay_out(hub_cache(), file, OTHER)
    with pytest.raises(StoreError) as caught:
        store.verify(theirs, file)
    assert str(caught.value) == (
        f"{theirs}: expected {file.digest}, got {sha256(OTHER)}. It is not the file that was pinned; "
        f"delete '{theirs.resolve()}' and fetch {store.url_of(file)} again"
    )
    with pytest.raises(StoreError, match="nowhere: missing from the store"):
        store.verify(theirs.with_name("nowhere"), file)
    theirs.resolve().write_bytes(DATA)
    store.verify(theirs, file)


def test_url_of():
    file = catalog.File("a/b", REVISION, "c/d.txt", 1, "0" * 64)
    assert store.url_of(file) == f"https://huggingface.co/a/b/resolve/{REVISION}/c/d.txt"
    assert store.url_of(replace(file, source="https://example.org/x")) == f"https://example.org/x/{REVISION}/c/d.txt"
    assert store.url_of(replace(file, source="https://example.org/x.zip", revision=None)) == "https://example.org/x.zip"
