"""Where a file can be had: other caches on this machine, the Hugging Face hub, addresses, members of archives."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch

from ..catalog import File, is_address
from ..errors import StoreError
from .archive import download_member
from .place import Place, relative_path, root_of
from .transfer import LONGEST_WAIT_SECONDS, Client, Part, Unavailable, WrongBytes, seconds_asked

MIRROR = "HUBMODELS_MIRROR"  # addresses or directories laid out as the store is, with spaces between


@dataclass(frozen=True)
class Source:
    """bring: puts the bytes anywhere below the place's state directory and says where and what their SHA-256 is.

    site: two sources of one site give the same bytes by different ways. resumes: it goes on with the place's part.
    """

    name: str
    site: str
    resumes: bool
    bring: Callable[[Place, "Watch"], tuple[Path, str | None]]


@dataclass(frozen=True)
class Watch:
    """What a person sees of a download. shown: whether to show it."""

    shown: bool

    def say(self, text: str) -> None:
        if self.shown:
            print(f"hubmodels: {text}", file=sys.stderr, flush=True)

    def bar(self, name: str) -> Any:
        """A bar on standard error, if that is a terminal."""
        from tqdm import tqdm

        return tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1000, disable=None if self.shown else True)


def url_of(file: File) -> str:
    """Where the public can see the file; of a member of an archive, the archive."""
    if file.is_member:
        return file.source
    if file.is_url:
        return f"{file.source}/{file.revision}/{file.filename}"
    return f"https://huggingface.co/{file.source}/resolve/{file.revision}/{file.filename}"


def sources_of(file: File) -> Iterator[Source]:
    """Over the network, in the order in which they are tried."""
    if file.is_member:
        yield Source(f"{file.source} ({file.filename})", file.source, True, _member)
    elif file.is_url:
        yield _address(url_of(file))
    else:
        from huggingface_hub import constants, hf_hub_url

        endpoint = constants.ENDPOINT
        yield Source(f"hf_hub_download from {endpoint}", endpoint, False, _hub)
        yield _address(hf_hub_url(file.source, file.filename, revision=file.revision), endpoint)
    for url in file.mirrors:
        yield _address(url)
    for base in _mirrors():
        if "://" in base:
            yield _address(f"{base.rstrip('/')}/{relative_path(file)}")


def elsewhere(place: Place, cache_dir: str | Path | None) -> Iterator[Path]:
    """Files on this machine that may be the one: under its name in another cache, or under its digest or size."""
    from huggingface_hub import constants

    file = place.file
    for cache in dict.fromkeys(Path(c).expanduser() for c in (cache_dir, constants.HF_HUB_CACHE) if c):
        repository = file.source.replace("/", "--")
        if not file.is_url:
            yield cache / f"models--{repository}" / "snapshots" / str(file.revision) / file.filename
            yield from cache.glob(f"models--{escape(repository)}/snapshots/*/{escape(file.filename)}")
        yield from cache.glob(f"models--*/blobs/{file.sha256 or file.git_sha1}")
    for root in (root_of(None), *(Path(base).expanduser() for base in _mirrors() if "://" not in base)):
        if root != place.root:
            yield root / relative_path(file)
    if file.size is not None:
        checkpoints = Path(torch.hub.get_dir(), "checkpoints")  # torch.hub names files after the end of their URL
        yield from (path for path in sorted(checkpoints.glob("*")) if _size(path) == file.size)


def _size(path: Path) -> int | None:
    """In bytes; None of what is no file, or none that may be looked at."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _mirrors() -> list[str]:
    bases = os.environ.get(MIRROR, "").split()
    for base in bases:
        if "://" in base and not is_address(base.rstrip("/")):
            raise StoreError(f"{MIRROR}: {base}: expected an https address, or a directory")
    return bases


def _address(url: str, site: str | None = None) -> Source:
    def bring(place: Place, watch: Watch) -> tuple[Path, str | None]:
        with _connection(place, watch, site) as (client, part, bar):
            client.download(url, part, place.file.size, bar=bar)
            return part.path, part.sha256.hexdigest()

    return Source(url, site or url, True, bring)


def _member(place: Place, watch: Watch) -> tuple[Path, str | None]:
    file = place.file
    with _connection(place, watch) as (client, part, bar):
        download_member(client, file.source, file.filename, part, file.size, place.state, bar)
        return part.path, part.sha256.hexdigest()


@contextmanager
def _connection(place: Place, watch: Watch, hub: str | None = None) -> Iterator[tuple[Client, Part, Any]]:
    """hub: the Hugging Face endpoint, which wants to know who asks."""
    headers = {}
    if hub:
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(library_name="hubmodels")
    name = place.file.filename.rpartition("/")[2]
    with Client(headers, watch.say) as client, Part(place.part, place.file.digest) as part, watch.bar(name) as bar:
        yield client, part, bar


def _hub(place: Place, watch: Watch) -> tuple[Path, str | None]:
    """Through huggingface_hub, which knows its own storage, its token and its proxies; into a directory of ours."""
    from huggingface_hub import constants, hf_hub_download

    if not is_address(constants.ENDPOINT):
        raise Unavailable("expected an https address as HF_ENDPOINT")
    directory, file = place.state / "hub", place.file
    shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed; it does not resume across processes
    try:
        with progress_bars(watch.shown), _no_long_waits():
            path = hf_hub_download(
                file.source,
                file.filename,
                revision=file.revision,
                local_dir=directory,
                cache_dir=directory,  # else it would copy the user's file, which is known to be wrong
                tqdm_class=_bar_that_ends_at(file.size),
            )
    except Unavailable:
        raise
    except Exception as error:  # the library raises errors of three HTTP stacks, of its own and of the system
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise Unavailable(f"{type(error).__name__}: {reason}") from error
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    return Path(path), None


def _bar_that_ends_at(size: int | None) -> type:
    """huggingface_hub tells its bar of every chunk, and would write a body without an end until the disk is full."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        come = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.come += int(n or 0)
            if size is not None and self.come > size + size // 4:  # Xet may fetch a little twice
                raise WrongBytes("more bytes came than the file has")
            return super().update(n)

    return Bar


@contextmanager
def _no_long_waits() -> Iterator[None]:
    """huggingface_hub sleeps for as long as it is told to, five times."""
    from huggingface_hub import get_session

    def refuse(response: Any) -> None:
        asked = seconds_asked(response.headers) or 0
        if asked > LONGEST_WAIT_SECONDS:
            raise Unavailable(f"HTTP {response.status_code}; it asks to be left alone for {asked:.0f} s")

    hooks = get_session().event_hooks["response"]
    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's switch for its bars is global: put it back afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
