"""Whether a file is the one that was pinned."""

import hashlib
from pathlib import Path

from ..catalog import File


def sha256_of(path: Path) -> str:
    """64 hex digits"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_of(path: Path) -> str:
    """40 hex digits: the name that git gives to a file of these bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def mismatch(path: Path, file: File, sha256: str | None = None) -> str | None:
    """What is wrong with the bytes at `path`: "expected …, got …"; None if they are the pinned ones.

    sha256: theirs, if it was computed while they came.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"expected {file.size} bytes, got {size}"
    if file.sha256:
        sha256 = sha256 or sha256_of(path)
        return None if sha256 == file.sha256 else f"expected {file.digest}, got {sha256}"
    digest = git_sha1_of(path)
    return None if digest == file.git_sha1 else f"expected {file.digest}, got {digest}"
