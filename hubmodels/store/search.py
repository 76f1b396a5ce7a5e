"""One file, looked for in one place after another until its bytes are found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..catalog import File
from ..errors import StoreError
from .digests import mismatch
from .place import Place, Stamp
from .sources import Source, Watch, elsewhere, sources_of, url_of
from .transfer import NoRoom, Part, Unavailable, WrongBytes, require_room


class Fetched(NamedTuple):
    """A verified file. how: what was done for it, in words."""

    path: Path
    how: str


@dataclass
class Search:
    """own: a link to another cache will not do. account: what was tried in vain, and why; a line each."""

    place: Place
    cache_dir: str | Path | None
    watch: Watch
    own: bool = False
    account: list[str] = field(default_factory=list)

    def on_this_machine(self) -> Fetched:
        """Raises StoreError if the file is not here."""
        return self._guarded(self._refuse)

    def anywhere(self) -> Fetched:
        """Raises StoreError if the file cannot be had."""
        return self._guarded(self._download)

    def _guarded(self, otherwise: Callable[[], Fetched]) -> Fetched:
        try:
            if found := self._in_store():
                return found
            with self.place.locked(self.watch.say) as writable:
                return self._in_store() or self._in_other_caches(writable) or otherwise()
        except NoRoom as error:
            self.account.append(str(error))
            raise self._refusal() from error
        except StoreError:
            raise
        except OSError as error:
            self.account.append(f"{type(error).__name__}: {error}")
            raise self._refusal() from error

    def _in_store(self) -> Fetched | None:
        if self.own and self.place.path.is_symlink():
            return None
        how = self.place.holds()
        return Fetched(self.place.path, how) if how else None

    def _in_other_caches(self, writable: bool) -> Fetched | None:
        """With the lock, if the place can be locked. What the store holds is not the file, or a link to it."""
        place = self.place
        if place.path.is_file() and not (self.own and place.path.is_symlink()):
            removed = "; it was removed" if writable else ""
            self.account.append(f"{place.path}: {mismatch(place.path, place.file)}{removed}")
            if writable:
                place.remove()
        linked = [place.path.resolve()] if place.path.is_symlink() else []
        if writable and linked and not place.path.exists():
            place.remove()
        for path in dict.fromkeys([*linked, *elsewhere(place, self.cache_dir)]):
            try:
                if not path.is_file():
                    continue
                stamp = place.stamp_of(path)
                wrong = mismatch(path, place.file)
            except OSError as error:
                wrong = f"{type(error).__name__}: {error.strerror}"
            if wrong is None:
                return self._adopt(path, stamp, writable)
            self.account.append(f"{path}: {wrong}; it was left alone")
            if writable and path in linked:
                place.remove()
        if not writable:
            self.account.append(
                f"{place.root}: cannot be written; name another directory with cache_dir= or TORCH_HOME"
            )
            raise self._refusal()
        return None

    def _adopt(self, path: Path, stamp: Stamp, writable: bool) -> Fetched:
        """A copy of the file, a link to it, or just its path where nothing can be written."""
        place, how = self.place, f"adopted from {path}"
        if not self.own:
            if not writable or not place.link(path, stamp):
                return Fetched(path, how)
            place.clear()
            return Fetched(place.path, how)
        require_room(place.state, path.stat().st_size)
        with open(path, "rb", buffering=0) as source, Part(place.part, place.file.digest) as part:
            part.copy(source)
        if wrong := mismatch(part.path, place.file, part.sha256.hexdigest()):
            raise StoreError(f"{path}: {wrong}; it changed while it was copied")
        place.keep(part.path)
        place.clear()
        return Fetched(place.path, f"copied from {path}")

    def _refuse(self) -> Fetched:
        raise self._refusal()

    def _download(self) -> Fetched:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            self.account.append("the network: HF_HUB_OFFLINE is set")
            raise self._refusal()
        self.place.prepare()
        here = self.place.part.stat().st_size if self.place.part.is_file() else 0
        require_room(self.place.state, (self.place.file.size or 0) - here)
        sources = list(sources_of(self.place.file))
        if here:  # first those that go on with it
            sources.sort(key=lambda source: not source.resumes)
        wrong: set[str] = set()
        for source in sources:
            if source.site in wrong:
                continue
            try:
                self._bring(source)
            except WrongBytes as error:
                wrong.add(source.site)
                self.account.append(f"{source.name}: {error}, twice")
            except Unavailable as error:
                self.account.append(f"{source.name}: {error}")
            else:
                self.place.clear()
                return Fetched(self.place.path, f"downloaded: {source.name}")
        raise self._refusal()

    def _bring(self, source: Source) -> None:
        """Wrong bytes may be an accident, of a proxy say: they are fetched once more, from the first."""
        for last in (False, True):
            try:
                path, sha256 = source.bring(self.place, self.watch)
                if wrong := mismatch(path, self.place.file, sha256):
                    raise WrongBytes(wrong)
                return self.place.keep(path)
            except WrongBytes as error:
                self.place.clear()
                if last:
                    raise
                self.watch.say(f"{source.name}: {error}; fetching it once more from the beginning")
        raise AssertionError("the second time returns or raises")

    def _refusal(self) -> StoreError:
        file = self.place.file
        tried = "".join(f"\n  {line}" for line in self.account)
        return StoreError(f"{file.filename} ({file.digest}) could not be had:{tried}\n{by_hand(file, self.place.path)}")


def by_hand(file: File, path: Path) -> str:
    """How a person brings the file to `path`, where it is looked for."""
    if file.is_member:
        return (
            f"Fetch it by hand: curl -L -o archive.zip {file.source} && mkdir -p {_quoted(path.parent)} && "
            f"unzip -p archive.zip {_quoted(file.filename)} > {_quoted(path)}"
        )
    text = f"Fetch it by hand: curl -L --create-dirs -o {_quoted(path)} {url_of(file)}"
    if not file.is_url:
        text += (
            f"; or into the Hugging Face cache: hf download {file.source} {file.filename} --revision {file.revision}"
        )
    return text


def _quoted(text: object) -> str:
    """For a shell."""
    return "'" + str(text).replace("'", "'\\''") + "'"
