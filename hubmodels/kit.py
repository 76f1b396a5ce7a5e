"""Air-gapped machines: code, weights and manifest in one tar, verified when it is made and when it is unpacked.

The tar begins with kit.json, which has the size and SHA-256 of every other member; then comes `repository/`, a copy of
this repository that runs by itself, then `files/`, laid out as the store is.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import torch

from . import store
from .catalog import File, Record, lookup, manifest, repository_root
from .errors import CatalogError, InputError, StoreError

SCHEMA = 1
_LISTING = "kit.json"
_LARGEST_LISTING = 16 << 20  # bytes
_REPOSITORY = ("hubconf.py", "weights_manifest.json", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Unbundled:
    """names: the weights that can be loaded now. repository: the copy of the code that came along."""

    names: tuple[str, ...]
    version: str
    repository: Path
    files: tuple[Path, ...]


def bundle(
    names: Iterable[str], output: Path, version: str, *, cache_dir: str | Path | None = None, progress: bool = True
) -> str:
    """Write the kit of these weights, fetching what is not here. The same kit has the same bytes.

    Returns its SHA-256. Raises CatalogError, StoreError; then there is no kit.
    """
    names = list(dict.fromkeys(names))
    members = {f"repository/{path}": root / path for root, path in _repository_files()}
    pinned = {file: None for name in names for file in lookup(name).files if not file.is_embedded}
    for file in pinned:
        path = store.fetch(file, cache_dir=cache_dir, progress=progress).path
        members[f"files/{store.relative_path(file)}"] = path
    sizes = {name: path.stat().st_size for name, path in members.items()}
    digests = {name: store.sha256_of(path) for name, path in members.items()}
    facts = {name: {"size": sizes[name], "sha256": digests[name]} for name in members}
    listing = {"schema": SCHEMA, "version": version, "names": names, "members": facts}
    partial = output.with_name(f"{output.name}.{uuid4().hex}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            content = json.dumps(listing, indent=1).encode()
            tar.addfile(_member(_LISTING, len(content)), io.BytesIO(content))
            for name, path in members.items():
                with open(path, "rb") as source:
                    packed = _Packed(source, path)
                    tar.addfile(_member(name, sizes[name]), packed)  # type: ignore[arg-type]  # it only reads
                if packed.sha256.hexdigest() != digests[name]:
                    raise StoreError(f"{path}: changed while it was bundled; do it again")
        digest = store.sha256_of(partial)
        os.replace(partial, output)
        return digest
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{output}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def unbundle(kit: Path, *, owner: str | None = None, cache_dir: str | Path | None = None) -> Unbundled:
    """Put a kit's files into the store and its repository beside those that torch.hub has downloaded.

    Every member is compared with kit.json, every weights file with the manifest that came along, and that with ours
    where both pin a file. Links, other paths and members that are not listed are refused.
    owner: of the repository on GitHub; with it torch.hub.load("OWNER/hubmodels:TAG", ...) finds the copy.
    Raises StoreError; then there is no new repository, and of the files only such as were right.
    """
    if owner is not None and not re.fullmatch(r"[A-Za-z0-9-]+", owner):
        raise InputError(f"owner = {owner!r}: expected the name of a GitHub account")
    hub_dir = Path(torch.hub.get_dir()).expanduser().absolute()
    with _opened(kit) as tar:
        listing = _read_listing(kit, tar)
        directory = hub_dir / f"{owner + '_' if owner else ''}hubmodels_v{listing['version']}"
        known = directory.exists()
        if known:
            _compare(kit, directory, listing["members"])
        staging = hub_dir / f".unbundle-{uuid4().hex}"
        try:
            files = _unpack(kit, tar, listing, staging, cache_dir)
            if not known:
                os.replace(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Unbundled(tuple(listing["names"]), listing["version"], directory, tuple(files))


def _compare(kit: Path, directory: Path, members: Mapping[str, Any]) -> None:
    """A repository that is there already has to be the same: a version is one code."""
    for name, facts in members.items():
        path = directory / name.removeprefix("repository/")
        if name.startswith("repository/") and not (path.is_file() and store.sha256_of(path) == facts["sha256"]):
            raise StoreError(f"{path}: is not the one of {kit}; remove {directory}, or name another owner")


def _unpack(
    kit: Path, tar: tarfile.TarFile, listing: Mapping[str, Any], staging: Path, cache_dir: str | Path | None
) -> list[Path]:
    missing, placed = dict(listing["members"]), []
    pins: dict[str, File] | None = None
    staging.mkdir(parents=True)
    for member in iter(tar.next, None):  # after kit.json
        expected = missing.pop(member.name, None)
        if expected is None or not _is_plain(member) or member.size != expected["size"]:
            raise StoreError(
                f"{kit}: {member.name}: not a plain file that kit.json lists with {member.size} bytes, once"
            )
        kind, _, path = member.name.partition("/")
        source = tar.extractfile(member)
        assert source is not None  # it is a plain file
        if kind == "repository":
            _copy(kit, source, staging / path, expected["sha256"])
        else:
            pins = pins or _pins(kit, staging)
            placed.append(_place(kit, source, path, expected["sha256"], pins, cache_dir))
    if missing:
        raise StoreError(f"{kit}: ends before {', '.join(sorted(missing)[:3])}; copy it again")
    if unknown := set(listing["names"]) - _manifest(kit, staging).keys():
        raise StoreError(f"{kit}: {', '.join(sorted(unknown))}: the kit's own manifest has no such name")
    return placed


def _place(
    kit: Path, source: Any, path: str, sha256: str, pins: Mapping[str, File], cache_dir: str | Path | None
) -> Path:
    """A weights file into the store, under the name that its pin has there."""
    if path not in pins:
        raise StoreError(f"{kit}: files/{path}: the kit's own manifest pins no such file")
    if (pinned := pins[path].sha256) not in (None, sha256):
        raise StoreError(
            f"{kit}: files/{path}: expected SHA-256 {pinned}, as its manifest pins, got {sha256} in {_LISTING}"
        )
    place = store.Place(pins[path], store.root_of(cache_dir))
    with place.locked(lambda text: None) as writable:
        if not writable:
            raise StoreError(f"{place.root}: cannot be written; name another directory with cache_dir= or TORCH_HOME")
        if place.holds():
            return place.path
        with store.Part(place.part, place.file.digest) as part:
            part.copy(source)
        wrong = store.mismatch(part.path, place.file, got := part.sha256.hexdigest())
        if wrong or got != sha256:
            part.remove()
            raise StoreError(f"{kit}: files/{path}: {wrong or f'expected SHA-256 {sha256}, got {got}'}; copy it again")
        place.keep(part.path)
        place.clear()
    return place.path


def _copy(kit: Path, source: Any, path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    hashing = hashlib.sha256()
    with open(path, "wb") as target:
        while data := source.read(_CHUNK):
            hashing.update(data)
            target.write(data)
    if (got := hashing.hexdigest()) != sha256:
        raise StoreError(f"{kit}: {path.name}: expected SHA-256 {sha256}, got {got}; copy the kit again")


def _manifest(kit: Path, repository: Path) -> dict[str, Record]:
    """The one that came along; it stands before the files that it pins."""
    try:
        return manifest(repository / "weights_manifest.json")
    except CatalogError as error:
        reason = str(error).replace(f"{repository}{os.sep}", "")
        raise StoreError(f"{kit}: its manifest is missing or not valid: {reason}") from None


def _pins(kit: Path, repository: Path) -> dict[str, File]:
    """Path in the store -> file, of the manifest in the kit. What ours pins too must be the same bytes."""
    theirs, ours = (
        {str(store.relative_path(f)): f for record in records.values() for f in record.files if not f.is_embedded}
        for records in (_manifest(kit, repository), manifest())
    )
    for name in theirs.keys() & ours.keys():
        if theirs[name].digest != ours[name].digest:
            raise StoreError(f"{kit}: {name}: our manifest pins {ours[name].digest}, the kit's {theirs[name].digest}")
    return theirs


@contextmanager
def _opened(kit: Path) -> Iterator[tarfile.TarFile]:
    try:
        with _Bounded(kit) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error)[:200] or type(error).__name__
        raise StoreError(f"{kit}: not a kit, or a damaged one: {reason}; copy it again") from None
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{kit}: {error}") from error


def _read_listing(kit: Path, tar: tarfile.TarFile) -> dict[str, Any]:
    """kit.json, checked: nothing of it is used as a path before."""
    first = tar.next()
    if first is None or first.name != _LISTING or not _is_plain(first) or first.size > _LARGEST_LISTING:
        raise StoreError(f"{kit}: expected {_LISTING} first, got {first.name if first else 'nothing'}; it is not a kit")
    source = tar.extractfile(first)
    assert source is not None  # it is a plain file
    try:
        listing = json.loads(source.read())
        if listing["schema"] != SCHEMA:
            raise ValueError(f"its schema is {listing['schema']!r}, this version reads {SCHEMA}")
        if not re.fullmatch(r"\d+\.\d+\.\d+", listing["version"]):
            raise ValueError(f"its version is {listing['version']!r}")
        for name, facts in listing["members"].items():
            kind, *parts = name.split("/")
            plain = parts and not {"..", ".", ""} & {*parts} and not {"\\", "\0", ":"} & {*name}
            if kind not in ("repository", "files") or not plain or type(facts["size"]) is not int:
                raise ValueError(f"a member is called {name!r}")
            str.encode(facts["sha256"])
        names = listing["names"]
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise ValueError(f"its names are {names!r}")
        if lacking := {f"repository/{name}" for name in _REPOSITORY} - listing["members"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{kit}: {_LISTING} is not valid: {error!r}") from None
    return dict(listing)


def _repository_files() -> Iterator[tuple[Path, PurePosixPath]]:
    """What the code needs to run from a directory, through torch.hub or pip."""
    root = repository_root()
    for name in _REPOSITORY:
        if not (root / name).is_file():
            raise StoreError(f"{root}: has no {name}; bundle from a clone, or from what torch.hub has downloaded")
        yield root, PurePosixPath(name)
    for path in sorted((root / "hubmodels").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield root, PurePosixPath(path.relative_to(root).as_posix())


def _is_plain(member: tarfile.TarInfo) -> bool:
    """A file, and its bytes in the tar: tarfile counts more kinds among the regular ones."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Without a time or an owner."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


class _Packed:
    """A file that is hashed while tarfile reads it."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path, self.sha256 = file, path, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        if len(data) < size:
            raise StoreError(f"{self._path}: changed while it was bundled; do it again")
        self.sha256.update(data)
        return data


class _Bounded(io.FileIO):
    """A kit that tarfile cannot be made to read into memory: a header of it may claim any size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_LISTING:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""
