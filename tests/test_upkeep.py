"""What `clean` may remove from a store: what nobody needs, and nothing that the store did not put there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import DATA, FakeHub, hang_up
from test_verification import catalog

from hubmodels import store
from hubmodels.errors import StoreError
from hubmodels.store.upkeep import removable, remove

HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub().running(monkeypatch) as hub:
        yield hub


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "store"


def fetch(file, root: Path, **options) -> Path:
    return store.fetch(file, cache_dir=root, progress=False, **options).path


def interrupted(hub: FakeHub, file, root: Path) -> store.Place:
    """A download that ended in the middle of the file."""
    place = store.Place(file, root)
    place.state.mkdir(parents=True)
    (place.state / "lock").touch()
    with store.Part(place.part, file.digest) as part:
        part.write(DATA[: len(DATA) // 2])
        part.flush()
    return place


def everything(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*")}


def told(root: Path, keep=()) -> dict[Path, tuple[int, str]]:
    return {each.path: (each.size, each.why) for each in removable(root, keep)}


# --- What is found


def test_a_store_with_what_is_kept_has_nothing_to_remove(hub, root):
    file, other = hub.add(), hub.publish()
    fetch(file, root), fetch(other, root)
    assert removable(root, [file, other]) == []


@pytest.mark.parametrize("made", [False, True])
def test_no_store_has_nothing_to_remove(root, made):
    if made:
        root.mkdir()
    assert removable(root, []) == []
    assert remove(root, []) == []
    assert root.exists() == made


def test_a_file_that_is_not_kept(hub, root):
    file, other = hub.add(), hub.add(DATA + b"more", "other.bin")
    paths = [fetch(each, root) for each in (file, other)]
    assert told(root, [file]) == {paths[1]: (len(DATA) + 4, "not among the weights to keep")}
    assert set(told(root)) == set(paths)


def test_a_download_that_did_not_finish(hub, root):
    """The part and the note beside it, though the file is one to be kept."""
    place = interrupted(hub, hub.add(), root)
    found = told(root, [place.file])
    assert set(found) == {place.part, place.part.with_name("part.json")}
    assert found[place.part] == (len(DATA) // 2, "a download that did not finish")
    assert found[place.part.with_name("part.json")][0] == place.part.with_name("part.json").stat().st_size


def test_a_real_interruption_leaves_what_is_found(hub, root, monkeypatch):
    monkeypatch.setattr(store.transfer, "TRIES", 1)
    file = hub.add(DATA * 40)  # more than comes at a time
    hub.answer = hang_up(99)
    with pytest.raises(StoreError):
        fetch(file, root)
    found = told(root, [file])
    assert found[store.Place(file, root).part][0] > 100_000
    assert remove(root, removable(root, [file])) == []
    assert everything(root) == set()


def test_what_the_hubs_library_left_behind(hub, root):
    """It downloads into a directory of its own, which a killed process does not clear: its bytes are counted."""
    file = hub.add()
    place = store.Place(file, root)
    fetch(file, root)
    inner = place.state / "hub" / ".cache" / "huggingface" / "download"
    inner.mkdir(parents=True)
    (inner / "x.incomplete").write_bytes(b"1234567")
    (place.state / "hub" / "model.safetensors").write_bytes(b"89")
    assert told(root, [file]) == {place.state / "hub": (9, "a download that did not finish")}


@pytest.mark.parametrize("name", ["archive", "archive.json", "compressed", "compressed.json", "link", "stamp.123"])
def test_what_else_may_be_left_on_the_way(hub, root, name):
    file = hub.add()
    place = store.Place(file, root)
    path = fetch(file, root)
    (place.state / name).write_bytes(b"12345")
    assert told(root, [file]) == {place.state / name: (5, "a download that did not finish")}
    assert remove(root, removable(root, [file])) == []
    assert path.read_bytes() == DATA
    assert place.is_stamped()
    assert sorted(each.name for each in place.state.iterdir()) == ["lock", "stamp.json"]


def test_a_link_to_a_file_that_is_gone(hub, root, tmp_path, monkeypatch):
    file = hub.add()
    theirs = fetch(file, tmp_path / "mirror")
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "mirror"))
    link = fetch(file, root)
    assert link.is_symlink()
    assert removable(root, [file]) == []
    theirs.unlink()
    assert told(root, [file]) == {link: (0, "a link to a file that is gone")}
    assert remove(root, removable(root, [file])) == []
    assert not link.is_symlink()
    assert everything(root) == set()


# --- What is never found


def test_a_stray_file_in_the_root_is_not_the_stores(hub, root):
    file = hub.add()
    path = fetch(file, root)
    strays = [root / "notes.txt", root / "huggingface.co" / "README", path.with_name("mine.safetensors")]
    for stray in strays:
        stray.write_text("mine")
    assert set(told(root)) == {path}
    assert remove(root, removable(root, [])) == []
    assert [stray.read_text() for stray in strays] == ["mine"] * 3
    assert not path.exists()


def test_a_home_directory_may_be_the_root(hub, root):
    """With files of programs that also have a directory .state, and locks in it."""
    mine = (".bashrc", "letters/one.txt", "other", "some/thing", ".state/lock", ".state/other/lock")
    for name in (*mine, ".state/other/settings", ".state/some/thing/lock", ".cache/lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    before = everything(root)
    path = fetch(hub.add(), root)
    assert set(told(root)) == {path}
    assert remove(root, removable(root, [])) == []
    assert everything(root) == before


def test_what_another_cache_has_stays_when_its_link_goes(hub, root, tmp_path, monkeypatch):
    file = hub.add()
    theirs = fetch(file, tmp_path / "mirror")
    monkeypatch.setenv("HUBMODELS_MIRROR", str(tmp_path / "mirror"))
    link = fetch(file, root)
    assert told(root) == {link: (0, "not among the weights to keep")}
    assert remove(root, removable(root, [])) == []
    assert theirs.read_bytes() == DATA
    assert everything(root) == set()


# --- Removed


def test_empty_directories_go_and_the_root_stays(hub, root):
    file, other = hub.add(), hub.add(DATA + b"more", "other.bin")
    kept, gone = fetch(file, root), fetch(other, root)
    alone = fetch(hub.publish(), root)
    assert remove(root, removable(root, [file])) == []
    assert kept.read_bytes() == DATA
    assert not gone.exists()
    assert store.Place(file, root).is_stamped()
    assert not store.Place(other, root).state.exists()
    assert not alone.parents[3].exists()
    assert removable(root, [file]) == []
    remove(root, removable(root, []))
    assert everything(root) == set()
    assert root.is_dir()


def test_nothing_is_removed_but_what_was_chosen(hub, root):
    paths = [fetch(hub.add(DATA + bytes([i]), f"{i}.bin"), root) for i in range(3)]
    found = {each.path: each for each in removable(root, [])}
    assert remove(root, [found[paths[1]]]) == []
    assert [path.exists() for path in paths] == [True, False, True]


def test_a_directory_behind_a_link_is_not_emptied(hub, root, tmp_path):
    """What lies in a state directory may be a link to anywhere."""
    place = interrupted(hub, hub.add(), root)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    (place.state / "hub").symlink_to(mine)
    assert told(root, [place.file])[place.state / "hub"][0] == 0
    assert remove(root, removable(root, [place.file])) == []
    assert (mine / "letter").read_text() == "dear"
    assert everything(root) == set()


def test_what_is_gone_already_is_no_error(hub, root):
    place = interrupted(hub, hub.add(), root)
    found = removable(root, [])
    place.part.unlink()
    assert remove(root, found) == []


def test_a_download_that_runs_stays(hub, root):
    """Its lock is held by another process; the other leftovers go."""
    place = interrupted(hub, hub.add(), root)
    done = fetch(hub.add(DATA + b"more", "other.bin"), root)
    command = [sys.executable, "-c", HOLD, str(place.state / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        found = removable(root, [])
        used = remove(root, found)
        assert {each.path for each in used} == {place.part, place.part.with_name("part.json")}
        assert place.part.stat().st_size == len(DATA) // 2
        assert not done.exists()
        other.stdin.close()
    assert remove(root, removable(root, [])) == []
    assert everything(root) == set()


def test_a_file_that_a_process_looks_at_stays(hub, root):
    path = fetch(hub.add(), root)
    state = root / ".hubmodels" / path.relative_to(root)
    command = [sys.executable, "-c", HOLD, str(state / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert [each.path for each in remove(root, removable(root, []))] == [path]
        assert path.read_bytes() == DATA
        assert (state / "stamp.json").is_file()
        other.stdin.close()


def test_what_was_removed_is_fetched_again(hub, root):
    file = hub.add()
    fetch(file, root)
    remove(root, removable(root, []))
    asked = len(hub.requests)
    assert fetch(file, root).read_bytes() == DATA
    assert len(hub.requests) > asked


def test_what_cannot_be_removed_is_an_error_of_ours(hub, root, monkeypatch):
    """A read-only file system, say."""

    def denied(self, *args, **options):
        raise PermissionError(13, "Permission denied", os.fspath(self))

    path = fetch(hub.add(), root)
    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(StoreError, match=path.name):
        remove(root, removable(root, []))


def test_a_file_is_kept_by_its_place_not_by_its_digest(hub, root):
    """The next version may pin the same place by more."""
    file = hub.add()
    fetch(file, root)
    again = catalog.File(file.source, file.revision, file.filename, None, None, "0" * 40)
    assert removable(root, [again]) == []
