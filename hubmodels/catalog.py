"""The manifest as typed records: every published checkpoint, which bytes it is, and where they are."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CatalogError

# Beside the package in a checkout, inside it in a wheel.
_PACKAGE = Path(__file__).resolve().parent
_MANIFESTS = (_PACKAGE.parent / "weights_manifest.json", _PACKAGE / "weights_manifest.json")
SCHEMA = 1


@dataclass(frozen=True)
class File:
    """One pinned file.

    source: a Hugging Face repo id, or "." for this repository, where `filename` is a path from its root.
    revision: the commit, 40 hex digits; None for a file of this repository, whose tag pins it.
    size: bytes. sha256: of the bytes, 64 hex digits.
    """

    source: str
    revision: str | None
    filename: str
    size: int
    sha256: str

    @property
    def is_embedded(self) -> bool:
        return self.source == "."

    @property
    def is_weights(self) -> bool:
        return self.filename.endswith((".safetensors", ".bin"))


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
    def weights(self) -> File:
        return next(file for file in self.files if file.is_weights)

    @property
    def vocabulary(self) -> File:
        return next(file for file in self.files if file.filename == self.tokenizer["file"])


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
    except (KeyError, TypeError) as error:
        raise CatalogError(f"{path}: the entry {name} is not valid: {error}") from None
    for file in files:
        _check_file(path, name, file)
    if not any(file.is_weights for file in files) or record.tokenizer.get("file") not in {f.filename for f in files}:
        raise CatalogError(f"{path}: the entry {name} lacks a weights file or its tokenizer's file")
    return record


def _check_file(path: Path, name: str, file: File) -> None:
    """A manifest must not be able to name a moving revision, or a place outside of the repository or the cache."""
    pinned = file.is_embedded or _is_hex(file.revision, 40)
    where = PurePosixPath(file.filename)
    if not pinned or not _is_hex(file.sha256, 64) or where.is_absolute() or ".." in where.parts:
        raise CatalogError(
            f"{path}: the entry {name}: {file.filename} must be a relative path pinned by a SHA-256 of 64 hex digits "
            f"and a revision of 40, got sha256 {file.sha256!r} and revision {file.revision!r}"
        )


def _is_hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and set(text) <= set("0123456789abcdef")
