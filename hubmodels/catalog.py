"""The manifest as typed records: every published checkpoint, which bytes it is, and where they are."""

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CatalogError

# Beside the package in a checkout, inside it in a wheel.
_PACKAGE = Path(__file__).resolve().parent
_MANIFESTS = (_PACKAGE.parent / "weights_manifest.json", _PACKAGE / "weights_manifest.json")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HOST = r"https://[A-Za-z0-9][A-Za-z0-9.-]*|http://(127\.0\.0\.1|localhost|\[::1\])"
_ADDRESS = re.compile(rf"({_HOST})(:\d{{1,5}})?(/[\w.%+~-]+)*", re.ASCII)
_WEIGHTS = re.compile(r"\.safetensors$|\.bin$|\.npy$|params_shapes\.json$|\.index$|\.data-\d{5}-of-\d{5}$")
SCHEMA = 1
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # the only hosts that plain http is spoken with


@dataclass(frozen=True)
class File:
    """One pinned file.

    source: a Hugging Face repo id; an https address, to which revision and filename are added; that of a .zip, of
        which `filename` is a member; or "." for this repository, where `filename` is a path from its root.
    revision: the commit, 40 hex digits; None for a member of a .zip, which its digest pins, and for a file of this
        repository, whose tag pins it.
    size: bytes; None if it was not published. sha256: of the bytes, 64 hex digits.
    git_sha1: where no SHA-256 was ever published: of the bytes as a git blob, 40 hex digits.
    mirrors: other https addresses of the same bytes.
    """

    source: str
    revision: str | None
    filename: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    mirrors: tuple[str, ...] = ()

    @property
    def is_embedded(self) -> bool:
        return self.source == "."

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    @property
    def is_member(self) -> bool:
        return self.is_url and self.source.endswith(".zip")

    @property
    def is_weights(self) -> bool:
        return _WEIGHTS.search(self.filename) is not None

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


def manifest_path() -> Path:
    """Where this version's manifest is."""
    return next((path for path in _MANIFESTS if path.is_file()), _MANIFESTS[0])


@cache
def manifest(path: Path | None = None) -> dict[str, Record]:
    """name -> record. Raises CatalogError if the file is missing or not valid."""
    path = path or manifest_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def other_version(version: str, hub_dir: str) -> Path:
    """The root of another copy of this repository: a directory, or the tag of one that torch.hub has in `hub_dir`.

    Raises CatalogError if there is none, or several.
    """
    tagged = Path(hub_dir).glob(f"*_hubmodels_{escape(version.replace('/', '_'))}")  # as torch.hub calls it
    named = [path for path in (Path(version), *sorted(tagged)) if (path / "weights_manifest.json").is_file()]
    found = named[:1] if named[:1] == [Path(version)] else named
    if len(found) != 1:
        there = ", ".join(map(str, found)) or "none"
        raise CatalogError(
            f"{version}: expected one copy of this repository, got {there} in {hub_dir}; "
            f'torch.hub.load("OWNER/hubmodels:{version}", "catalog") brings it, and a directory may be named too'
        )
    return found[0]


def repository_root() -> Path:
    """Where this copy of the repository is."""
    return _PACKAGE.parent


def embedded_path(file: File) -> Path:
    """Where a file of this repository is."""
    return repository_root() / file.filename


def _record(path: Path, name: str, entry: dict[str, Any]) -> Record:
    try:
        files = tuple(File(**{**file, "mirrors": tuple(file.get("mirrors", ()))}) for file in entry["files"])
        record = Record(name=name, **{**entry, "files": files})
        if not all(isinstance(text, str) for f in files for text in (f.source, f.filename, *f.mirrors)):
            raise TypeError("a file's source, filename and mirrors are strings")
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
    pinned = file.is_embedded or (file.revision is None if file.is_member else _is_hex(file.revision, 40))
    where = PurePosixPath(file.filename)
    by_git = file.sha256 is None and _is_hex(file.git_sha1, 40) and not file.is_member
    digested = by_git or (_is_hex(file.sha256, 64) and (file.size is not None or file.is_member))
    inside = where.parts and not where.is_absolute() and not {"..", "\\", "\0"} & {*where.parts, *file.filename}
    if not pinned or not digested or not inside:
        raise CatalogError(
            f"{path}: the entry {name}: {file.filename} must be a relative path pinned by a SHA-256 of 64 hex digits "
            f"and a revision of 40, got sha256 {file.sha256!r} and revision {file.revision!r}; only where no SHA-256 "
            f"and size were published a git blob's SHA-1 of 40 digits stands for them, got git_sha1 {file.git_sha1!r}"
        )
    if not file.is_embedded and not file.is_url and not _REPOSITORY.fullmatch(file.source):
        raise CatalogError(f"{path}: the entry {name}: {file.source}: expected a Hugging Face repository, owner/name")
    for address in (*([file.source] if file.is_url else []), *file.mirrors):
        if not is_address(address):
            raise CatalogError(
                f"{path}: the entry {name}: {address}: expected an https address with a host, without .. or a query"
            )


def is_address(source: str) -> bool:
    """https, or http on this machine; a host, no user, no query. The path becomes a directory of the store."""
    return _ADDRESS.fullmatch(source) is not None and not {".", ".."} & {*source.split("/")}


def _is_hex(text: Any, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and set(text) <= set("0123456789abcdef")
