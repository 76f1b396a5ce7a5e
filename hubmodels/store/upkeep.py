"""What the store holds that nobody needs."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..catalog import File
from ..errors import StoreError
from .place import STATE, lock, relative_path


@dataclass(frozen=True)
class Removable:
    """A file of the store, or what has come of one. size: bytes on the disk; of a link none."""

    path: Path
    size: int
    why: str


def removable(root: Path, keep: Iterable[File]) -> list[Removable]:
    """Downloads that did not finish, and files that are none of `keep`. Only what the store itself put there counts."""
    kept = {Path(relative_path(file)) for file in keep}
    found = []
    for state in _states(root):
        relative = state.relative_to(root / STATE)
        path = root / relative
        for part in sorted(state.iterdir()):
            if part.name not in ("lock", "stamp.json"):
                found.append(Removable(part, _size(part), "a download that did not finish"))
        if path.is_symlink() or path.is_file():
            if not path.exists():
                found.append(Removable(path, 0, "a link to a file that is gone"))
            elif relative not in kept:
                found.append(Removable(path, _size(path), "not among the weights to keep"))
    return found


def remove(root: Path, chosen: Iterable[Removable]) -> list[Removable]:
    """Remove them, and directories that become empty. Returns those that a running download uses, which stay.

    Raises StoreError for what cannot be removed.
    """
    try:
        return _remove(root, chosen)
    except OSError as error:
        raise StoreError(f"{error.filename or root}: cannot be removed: {error.strerror or error}") from error


def _remove(root: Path, chosen: Iterable[Removable]) -> list[Removable]:
    used = []
    for each in chosen:
        inside = each.path.relative_to(root)
        state = each.path.parent if inside.parts[0] == STATE else root / STATE / inside
        with lock(state) as free:
            if not free:
                used.append(each)
            elif each.path.is_dir() and not each.path.is_symlink():
                shutil.rmtree(each.path)
            else:
                each.path.unlink(missing_ok=True)
    for state in list(_states(root)):
        path = root / state.relative_to(root / STATE)
        if not path.exists() and {part.name for part in state.iterdir()} <= {"lock", "stamp.json"}:
            with lock(state) as free:
                if free:
                    shutil.rmtree(state)
            _remove_empty(state.parent, root)
            _remove_empty(path.parent, root)
    return used


def _states(root: Path) -> Iterator[Path]:
    """The state directory of each file that the store has, or had, to do with."""
    for path in sorted((root / STATE).rglob("lock")):
        if path.is_file():
            yield path.parent


def _size(path: Path) -> int:
    if path.is_symlink():
        return 0
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.lstat().st_size for each in files)


def _remove_empty(directory: Path, root: Path) -> None:
    with suppress(OSError):  # the first that is not empty
        while directory != root:
            directory.rmdir()
            directory = directory.parent
