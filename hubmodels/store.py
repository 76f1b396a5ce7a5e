"""A pinned file -> a path to bytes that were verified, whatever they came through."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .catalog import File, embedded_path
from .errors import StoreError


def fetch(file: File, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The path of `file`, its bytes verified now: size, then SHA-256 over all of it.

    A file of this repository is read in place. Others come from the user's Hugging Face cache, or through
    huggingface_hub into it (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and proxies hold). With the file in the
    cache nothing touches the network.
    cache_dir: another Hugging Face cache. progress: show a bar while downloading.
    Raises StoreError if the file cannot be had or is not the one that was pinned.
    """
    path = embedded_path(file) if file.is_embedded else _from_hugging_face(file, cache_dir, progress)
    verify(path, file)
    return path


def verify(path: Path, file: File) -> None:
    """Raise StoreError unless the bytes at `path` are the pinned ones."""
    if not path.is_file():
        raise StoreError(f"{path}: missing from this copy of the repository; check out its tag again")
    size = path.stat().st_size
    if size != file.size:
        raise StoreError(f"{path}: expected {file.size} bytes, got {size}. {_what_to_do(path, file)}")
    digest = sha256_of(path)
    if digest != file.sha256:
        raise StoreError(f"{path}: expected SHA-256 {file.sha256}, got {digest}. {_what_to_do(path, file)}")


def sha256_of(path: Path) -> str:
    """64 hex digits"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def url_of(file: File) -> str:
    """Where the public can see the file."""
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
