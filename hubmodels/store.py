"""A pinned file -> a path to bytes that were verified, whatever they came through."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from .catalog import File, embedded_path
from .errors import StoreError


def fetch(file: File, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The path of `file`, its bytes verified now: size, then SHA-256 over all of it.

    A file of this repository is read in place. One of a Hugging Face repository comes from the user's cache, or through
    huggingface_hub into it (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and proxies hold); one of an https address
    from the directory `hubmodels` in torch.hub's cache (TORCH_HOME), or through torch.hub into it. With the file in the
    cache nothing touches the network.
    cache_dir: instead of either cache. progress: show a bar while downloading.
    Raises StoreError if the file cannot be had or is not the one that was pinned.
    """
    if file.is_url:
        return _from_address(file, cache_dir, progress)
    path = embedded_path(file) if file.is_embedded else _from_hugging_face(file, cache_dir, progress)
    verify(path, file)
    return path


def verify(path: Path, file: File, place: Path | None = None) -> None:
    """Raise StoreError unless the bytes at `path` are the pinned ones. place: where they belong, if not there."""
    place = place or path
    if not path.is_file():
        raise StoreError(f"{path}: missing from this copy of the repository; check out its tag again")
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise StoreError(f"{place}: expected {file.size} bytes, got {size}. {_what_to_do(place, file)}")
    digest = sha256_of(path) if file.sha256 else git_sha1_of(path)
    if digest != (file.sha256 or file.git_sha1):
        raise StoreError(f"{place}: expected {file.digest}, got {digest}. {_what_to_do(place, file)}")


def sha256_of(path: Path) -> str:
    """64 hex digits"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_of(path: Path) -> str:
    """40 hex digits: the name that git gives to a file of these bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def url_of(file: File) -> str:
    """Where the public can see the file."""
    if file.is_url:
        return f"{file.source}/{file.revision}/{file.filename}"
    return f"https://huggingface.co/{file.source}/resolve/{file.revision}/{file.filename}"


def _what_to_do(path: Path, file: File) -> str:
    path = path.resolve()  # of a link in the cache it is the blob behind it that is wrong
    if file.is_embedded:
        return "This copy of the repository was altered: check out its tag again"
    return (
        f"It is not the file that was pinned, so it was not opened. Delete '{path}' and load again, "
        f"or fetch it yourself: curl -L -o '{path}' {url_of(file)}"
    )


def _from_hugging_face(file: File, cache_dir: str | Path | None, progress: bool) -> Path:
    from huggingface_hub import constants, hf_hub_download

    root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    path = root / f"models--{file.source.replace('/', '--')}" / "snapshots" / str(file.revision) / file.filename
    if path.is_file():
        return path
    try:
        with _progress_bars(progress):
            return Path(hf_hub_download(file.source, file.filename, revision=file.revision, cache_dir=cache_dir))
    except Exception as error:  # the library raises errors of three HTTP stacks, of its own and of the system
        where = f" --cache-dir '{root}'" if cache_dir else ""
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise StoreError(
            f"{file.source} {file.filename} is not in {root} and could not be downloaded: "
            f"{type(error).__name__}: {reason}. "
            "On a machine that reaches the hub run: "
            f"hf download {file.source} {file.filename} --revision {file.revision}{where}; "
            f"or fetch it by hand: curl -L --create-dirs -o '{path}' {url_of(file)}"
        ) from error


def _from_address(file: File, cache_dir: str | Path | None, progress: bool) -> Path:
    import torch
    from huggingface_hub import constants

    url = url_of(file)
    root = Path(cache_dir or torch.hub.get_dir()).expanduser() / "hubmodels"
    path = root.joinpath(*urlsplit(url).netloc.split(":"), *urlsplit(url).path.strip("/").split("/"))
    if path.is_file():
        verify(path, file)
        return path
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # nothing unverified has the file's own name
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), progress=progress)
        verify(partial, file, path)
        os.replace(partial, path)
    except StoreError:
        raise
    except Exception as error:  # of urllib, of its HTTP stack and of the system
        raise StoreError(
            f"{url} is not in {root} and could not be downloaded: {type(error).__name__}: {str(error).rstrip('.')}. "
            f"Fetch it by hand: curl -L --create-dirs -o '{path}' {url}"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
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
