"""A pinned file -> a path to bytes that were verified, whatever they came through.

Every way is good as long as the bytes are: this repository, another cache of the user's, the Hugging Face hub, an
address, a mirror, a member of an archive. Only what has the pinned digest gets the file's name; see `Place`.
"""

from contextlib import suppress
from pathlib import Path

from ..catalog import File, embedded_path
from ..errors import StoreError
from .digests import git_sha1_of, mismatch, sha256_of
from .place import Place, relative_path, root_of
from .search import Fetched, Search
from .sources import Watch, elsewhere, progress_bars, url_of
from .transfer import Part

__all__ = [
    "Fetched",
    "Part",
    "Place",
    "fetch",
    "find",
    "git_sha1_of",
    "mismatch",
    "progress_bars",
    "rehash",
    "relative_path",
    "root_of",
    "sha256_of",
    "state_of",
    "url_of",
    "verify",
]


def fetch(file: File, *, cache_dir: str | Path | None = None, progress: bool = True, own: bool = False) -> Fetched:
    """The file, verified: its size and the digest over all of it when it came, and nothing changed since.

    It is looked for in this repository; in the store; in the user's Hugging Face and torch caches and the directories
    of HUBMODELS_MIRROR, and read there, in place, if its digest is right; on the Hugging Face hub or at its address;
    at its mirrors. With the file on this machine nothing touches the network; HF_HUB_OFFLINE forbids it always.
    cache_dir: the store, instead of the directory `hubmodels` in torch.hub's (TORCH_HOME).
    progress: show a bar, on a terminal, and say what is waited for. own: copy a file of another cache.
    Raises StoreError, which says what was tried and how to fetch the file by hand.
    """
    if file.is_embedded:
        return _embedded(file)
    return Search(Place(file, root_of(cache_dir)), cache_dir, Watch(progress), own).anywhere()


def find(file: File, *, cache_dir: str | Path | None = None) -> Fetched:
    """As `fetch`, but only on this machine."""
    if file.is_embedded:
        return _embedded(file)
    return Search(Place(file, root_of(cache_dir)), cache_dir, Watch(False)).on_this_machine()


def rehash(file: File, *, cache_dir: str | Path | None = None) -> Fetched:
    """As `find`, but every byte is hashed, whatever is known of the file; what is known of a wrong one is forgotten."""
    found = find(file, cache_dir=cache_dir)
    try:
        verify(found.path, file)
    except StoreError:
        if not file.is_embedded:
            with suppress(OSError):
                Place(file, root_of(cache_dir)).forget()
        raise
    return found


def verify(path: Path, file: File) -> None:
    """Hash the bytes at `path`: raises StoreError unless they are the pinned ones."""
    if not path.is_file():
        where = "this copy of the repository; check out its tag again" if file.is_embedded else "the store"
        raise StoreError(f"{path}: missing from {where}")
    wrong = mismatch(path, file)
    if wrong is None:
        return
    if file.is_embedded:
        advice = "This copy of the repository was altered: check out its tag again"
    else:
        advice = f"It is not the file that was pinned; delete '{path.resolve()}' and fetch {url_of(file)} again"
    raise StoreError(f"{path}: {wrong}. {advice}")


def state_of(file: File, *, cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """Where the file is or would be, and in words what is known of it. Nothing is hashed, fetched or written."""
    if file.is_embedded:
        return embedded_path(file), "in this repository" if embedded_path(file).is_file() else "missing"
    place = Place(file, root_of(cache_dir))
    if place.path.is_file():
        link = f", a link to {place.path.resolve()}" if place.path.is_symlink() else ""
        return place.path, ("verified" if place.is_stamped() else "here, to be hashed when it is used") + link
    others = (path for path in elsewhere(place, cache_dir) if path.is_file())
    other = next((path for path in others if file.size in (None, path.stat().st_size)), None)
    if other:
        return other, "in another cache, to be hashed when it is used"
    come = place.part.stat().st_size if place.part.is_file() else 0
    return place.path, f"not here; {come:,} bytes have come" if come else "not here"


def _embedded(file: File) -> Fetched:
    path = embedded_path(file)
    verify(path, file)
    return Fetched(path, "in this repository, hashed now")
