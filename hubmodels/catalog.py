"""The manifest as typed records: every published checkpoint, which bytes it is, and where they are."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from .errors import CatalogError

# Beside the package in a checkout, inside it in a wheel.
_PACKAGE = Path(__file__).resolve().parent
_MANIFESTS = (_PACKAGE.parent / "weights_manifest.json", _PACKAGE / "weights_manifest.json")
SCHEMA = 1


@dataclass(frozen=True)
class File:
    """One pinned file.

    source: a Hugging Face repo id; an https address, to which revision and filename are added; or "." for this
        repository, where `filename` is a path from its root.
    revision: the commit, 40 hex digits; None for a file of this repository, whose tag pins it.
    size: bytes; None if it was not published. sha256: of the bytes, 64 hex digits.
    git_sha1: where no SHA-256 was ever published: of the bytes as a git blob, 40 hex digits.
    """

    source: str
    revision: str | None
    filename: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def is_embedded(self) -> bool:
        return self.source == "."

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    @property
    def is_weights(self) -> bool:
        return self.filename.endswith((".safetensors", ".bin", ".npy", "params_shapes.json"))

    @property
    def digest(self) -> str:
        """The kind of digest that pins the file, and its digits."""
        return f"SHA-256 {self.sha256}" if self.sha256 else f"git blob SHA-1 {self.git_sha1}"


@dataclass(frozen=True)
class Record:
    """One checkpoint. The fields are the manifest's: see docs/manifest.md."""

    name: str
    family: str
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    files: tuple[File, ...]
    dialect: str
    licence: str
    homepage: str
    citation: str
    parameters: int
    check: dict[str, Any]
    notes: str = ""

    @property
    def weights(self) -> tuple[File, ...]:
        """The files that hold the tensors; all are of one revision."""
        return tuple(file for file in self.files if file.is_weights)

    @property
    def revision(self) -> str | None:
        return self.weights[0].revision

    @property
    def megabytes(self) -> float:
        """Of the weights; where a size was not published, four bytes a parameter."""
        sizes = [file.size for file in self.weights]
        return (self.parameters * 4 if None in sizes else sum(size or 0 for size in sizes)) / 1e6

    @property
    def vocabulary(self) -> tuple[File, ...]:
        """The tokenizer's files: the vocabulary and, for byte pairs, the merges."""
        names = [self.tokenizer[key] for key in ("file", "merges") if key in self.tokenizer]
        return tuple(next(file for file in self.files if file.filename == name) for name in names)


@cache
def manifest(path: Path | None = None) -> dict[str, Record]:
    """name -> record. Raises CatalogError if the file is missing or not valid."""
    path = path or next((m for m in _MANIFESTS if m.is_file()), _MANIFESTS[0])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path}: cannot be read: {error}; install or check out this version again") from None
    if not isinstance(content, dict):
        raise CatalogError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    if content.get("schema") != SCHEMA:
        raise CatalogError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')!r}; check out one version's")
    if not isinstance(content.get("weights"), dict):
        raise CatalogError(f"{path}: expected an object of entries under weights, got {content.get('weights')!r}")
    return {name: _record(path, name, entry) for name, entry in content["weights"].items()}


def lookup(name: str) -> Record:
    """Raises CatalogError naming what is near if there is no such record."""
    records = manifest()
    if name in records:
        return records[name]
    near = difflib.get_close_matches(name, records, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(records)}"
    raise CatalogError(f"no weights are called {name!r}, and there is no such file or directory; {hint}")


def embedded_path(file: File) -> Path:
    """Where a file of this repository is."""
    return _PACKAGE.parent / file.filename


def _record(path: Path, name: str, entry: dict[str, Any]) -> Record:
    try:
        files = tuple(File(**file) for file in entry["files"])
        record = Record(name=name, **{**entry, "files": files})
        if not all(isinstance(text, str) for file in files for text in (file.source, file.filename)):
            raise TypeError("a file's source and filename are strings")
        named = {record.tokenizer.get("file"), record.tokenizer.get("merges", record.tokenizer.get("file"))}
        complete = record.weights and named <= {file.filename for file in files}
    except (AttributeError, KeyError, TypeError) as error:
        raise CatalogError(f"{path}: the entry {name} is not valid: {error}") from None
    for file in files:
        _check_file(path, name, file)
    if not complete:
        raise CatalogError(f"{path}: the entry {name} lacks a weights file or its tokenizer's file")
    if len({(file.source, file.revision) for file in record.weights}) > 1:
        raise CatalogError(f"{path}: the entry {name}: its weights files must be of one source and revision")
    return record


def _check_file(path: Path, name: str, file: File) -> None:
    """A manifest must not be able to name a moving revision, or a place outside of the repository or the cache."""
    pinned = file.is_embedded or _is_hex(file.revision, 40)
    where = PurePosixPath(file.filename)
    by_git = file.sha256 is None and _is_hex(file.git_sha1, 40)
    digested = by_git or (_is_hex(file.sha256, 64) and file.size is not None)
    if not pinned or not digested or where.is_absolute() or ".." in where.parts:
        raise CatalogError(
            f"{path}: the entry {name}: {file.filename} must be a relative path pinned by a SHA-256 of 64 hex digits "
            f"and a revision of 40, got sha256 {file.sha256!r} and revision {file.revision!r}; only where no SHA-256 "
            f"and size were published a git blob's SHA-1 of 40 digits stands for them, got git_sha1 {file.git_sha1!r}"
        )
    if file.is_url and not _is_address(file.source):
        raise CatalogError(
            f"{path}: the entry {name}: {file.source}: expected an https address with a host, without .. or a query"
        )


def _is_address(source: str) -> bool:
    """https, or http on this machine. The path becomes a directory of the cache."""
    try:
        address = urlsplit(source)
    except ValueError:
        return False
    local = address.scheme == "http" and address.hostname in ("127.0.0.1", "localhost")
    parts = [address.netloc, *address.path.split("/")]
    plain = not {".", ".."} & set(parts) and not address.query and not address.fragment
    return bool(address.hostname) and plain and (address.scheme == "https" or local)


def _is_hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and set(text) <= set("0123456789abcdef")
