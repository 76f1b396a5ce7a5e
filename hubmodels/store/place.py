"""Where a file belongs on this machine, and what is known of it there."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch

from ..catalog import File
from .digests import mismatch

STATE = ".hubmodels"
Stamp = dict[str, Any]  # what pins a file, and what the file system says about it


def root_of(cache_dir: str | Path | None) -> Path:
    """The directory of the store: `cache_dir`, else `hubmodels` in torch.hub's (TORCH_HOME)."""
    return Path(cache_dir or Path(torch.hub.get_dir()) / "hubmodels").expanduser().absolute()


def relative_path(file: File) -> PurePosixPath:
    """host/path/revision/filename: the same below every store and every mirror."""
    address = urlsplit(file.source if file.is_url else f"https://huggingface.co/{file.source}")
    host = [address.hostname or "", *([str(address.port)] if address.port else [])]
    return PurePosixPath(*host, *address.path.strip("/").split("/"), file.revision or "", file.filename)


@contextmanager
def lock(state: Path, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """The lock of a state directory. wait: called before waiting for another process; without it False means one."""
    from filelock import FileLock, Timeout

    held = FileLock(state / "lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        if wait is None:
            yield False
            return
        wait()
        held.acquire()
    try:
        yield True
    finally:
        held.release()


@dataclass(frozen=True)
class Place:
    """The place of `file` in the store at `root`: its final name, which only verified bytes get, and its state.

    The state directory has the lock, what has come of the file so far, and the stamp: what the file system said about
    the file when it was last hashed. As long as it says the same, the bytes are taken to be the same.
    """

    file: File
    root: Path

    @property
    def path(self) -> Path:
        return self.root / relative_path(self.file)

    @property
    def state(self) -> Path:
        return self.root / STATE / relative_path(self.file)

    @property
    def part(self) -> Path:
        return self.state / "part"

    def is_stamped(self) -> bool:
        """Whether the file, which is here, is the one that was hashed."""
        return self._read_stamp() == self.stamp_of(self.path)

    def holds(self) -> str | None:
        """How it is known that the file is here and right; None if it is not."""
        if not self.path.is_file():
            return None
        try:
            if self.is_stamped():
                return "in the store, unchanged since it was hashed"
            stamp = self.stamp_of(self.path)
            if mismatch(self.path, self.file):
                return None
        except FileNotFoundError:  # a wrong one, which another process has just removed
            return None
        self._write_stamp(stamp)
        return "in the store, hashed now"

    def prepare(self) -> None:
        """Raise OSError before a byte comes that could not get its final name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a directory, where a file belongs; remove it")

    def keep(self, part: Path) -> None:
        """Give verified bytes, which the disk has, their final name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part.chmod(0o644)
        os.replace(part, self.path)
        sync_directory(self.path.parent)
        self._write_stamp(self.stamp_of(self.path))

    def link(self, verified: Path, stamp: Stamp) -> bool:
        """Take a file of another cache, verified when it had that stamp, for this one. False if it cannot be linked."""
        link = self.state / "link"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(verified.resolve())
            os.replace(link, self.path)
        except OSError:
            return False
        self._write_stamp(stamp)
        return True

    def remove(self) -> None:
        """The file, not what a link leads to, and what is known of it."""
        self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """That the file was ever hashed."""
        (self.state / "stamp.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[bool]:
        """One process at a time. False where nothing can be written, and so nobody else writes either."""
        with ExitStack() as stack:
            try:
                self.state.mkdir(parents=True, exist_ok=True)
                text = f"another process is fetching {self.file.filename}; waiting for it"
                stack.enter_context(lock(self.state, lambda: say(text)))
            except OSError:
                yield False
                return
            yield True

    def clear(self) -> None:
        """Everything that came on the way to the file."""
        for path in self.state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("lock", "stamp.json"):
                path.unlink(missing_ok=True)  # one who waits may be writing a stamp

    def stamp_of(self, path: Path) -> Stamp:
        status = path.stat()
        facts = ("size", "mtime_ns", "ctime_ns", "ino", "dev")
        return {"pin": self.file.digest, **{fact: getattr(status, f"st_{fact}") for fact in facts}}

    def _read_stamp(self) -> Any:
        try:
            return json.loads((self.state / "stamp.json").read_text())
        except (OSError, ValueError):
            return None

    def _write_stamp(self, stamp: Stamp) -> None:
        """Where it cannot be written the file is hashed each time."""
        with suppress(OSError):
            self.state.mkdir(parents=True, exist_ok=True)
            path = self.state / "stamp.json"
            partial = path.with_name(f"stamp.{os.getpid()}")
            partial.write_text(json.dumps(stamp))
            os.replace(partial, path)


def sync_directory(directory: Path) -> None:
    """The names in it are on the disk; some systems cannot open a directory."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
