"""Checkpoints of a run: written whole or not at all, checked before they are believed, and few.

    checkpoints/step-00001000/    tensors, as torch.distributed.checkpoint writes them: any number of ranks reads them
        checkpoint.json           what is no tensor; size and SHA-256 of every file, and of itself

The ranks of a run on several machines need a file system in common.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, InputError
from ..store.digests import sha256_of
from ..store.place import sync_directory
from .distributed import World

ABOUT = "checkpoint.json"
Tensors = Mapping[str, Any]  # name -> a tensor, or such a mapping


class Found(NamedTuple):
    """A whole checkpoint. about: what was saved beside tensors; passed_over: what is wrong with each newer one."""

    path: Path
    step: int
    about: dict[str, Any]
    passed_over: tuple[str, ...]


def newest(directory: Path, world: World) -> Found | None:
    """The newest whole checkpoint in `directory`, None if there never was one; on all ranks the same.

    Raises CheckpointError if there are some and all are damaged.
    """
    found = world.broadcast(_newest(directory) if world.is_main else None)
    if isinstance(found, str):
        raise CheckpointError(found)
    return found


def _newest(directory: Path) -> Found | str | None:
    """Or what is wrong with all of them."""
    passed_over: list[str] = []
    for step, path in reversed(_steps(directory)):
        try:
            return Found(path, step, _read(path), tuple(passed_over))
        except (OSError, ValueError) as error:
            passed_over.append(f"{path} is damaged: {error}")
    if not passed_over:
        return None
    return f"no checkpoint is whole; remove {directory} to begin anew:\n" + "\n".join(passed_over)


def save(directory: Path, step: int, tensors: Tensors, about: Mapping[str, Any], world: World) -> Path:
    """Write a checkpoint, all ranks together: JSON in `about`. Whatever happens meanwhile, the others stay as they are.

    Raises CheckpointError if it cannot be written.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = directory / f"step-{step:08d}"
    partial = directory / f".{path.name}.partial"
    try:
        if world.is_main:
            _clear(directory)
            partial.mkdir(parents=True)
        world.barrier()
        writer = dcp.FileSystemWriter(partial, sync_files=False)
        with _quiet():
            written = dcp.save(dict(tensors), storage_writer=writer, process_group=world.group)
        names = {info.relative_path for info in written.storage_data.values()}
        mine = sorted(names, key=lambda name: (len(name), name))[world.rank :: world.ranks]  # those that it wrote
        mine += [".metadata"] if world.is_main else []
        parts = world.gather({name: _entry(partial / name) for name in mine})
        files = {name: entry for part in parts for name, entry in part.items()}
        if world.is_main:
            _write(partial / ABOUT, {"step": step, "about": about, "files": files})
            _replace(partial, path)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{path}: cannot be written, the older ones are as they were: {_cause(error)}") from error
    world.barrier()
    return path


def load(path: Path, tensors: Tensors, world: World) -> None:
    """Fill `tensors`, in place, with those that were saved, on however many ranks, under the same names.

    Raises CheckpointError for a name or a shape that is not in the checkpoint.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), process_group=world.group)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{path}: it is of another model or optimiser: {_cause(error)}") from error


def prune(directory: Path, step: int, keep: int, best: int | None) -> None:
    """Keep the last `keep` up to `step`, and `best`. Later ones are what a run that went on from here passed over."""
    steps = _steps(directory)
    last = [number for number, _ in steps if number <= step][-keep:]
    for number, path in steps:
        if number not in last and number != best:
            shutil.rmtree(path)  # killed half-way: it is damaged, and older than one that is whole


@contextmanager
def locked(directory: Path, world: World) -> Iterator[None]:
    """Only one run at a time writes into a directory; one that is killed lets go. Raises InputError, on all ranks."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        is_free = True
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(directory / ".lock", timeout=0))
            except Timeout:
                is_free = False
        if not world.broadcast(is_free):
            raise InputError(f"{directory}: another run is writing there; end it, or take another directory")
        yield


def _steps(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint, whole or not, the oldest first; nothing else that a directory is called."""
    if not directory.is_dir():
        return []
    matches = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _entry(path: Path) -> list[Any]:
    """[bytes, SHA-256] of a file, which then is on the disk: torch's own writer syncs before it has flushed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return [path.stat().st_size, sha256_of(path)]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**content, "sha256": _digest(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    """What was saved beside tensors. Raises OSError or ValueError, which says what is damaged."""
    content = json.loads((path / ABOUT).read_bytes())
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{ABOUT} is not what was written")
    for name, (size, digest) in content["files"].items():
        if (got := (path / name).stat().st_size) != size:
            raise ValueError(f"{name}: expected {size} bytes, got {got}")
        if (sha256 := sha256_of(path / name)) != digest:
            raise ValueError(f"{name}: expected sha256 {digest}, got {sha256}")
    return content["about"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _replace(partial: Path, path: Path) -> None:
    """Give a directory its final name, once it and its names are on the disk."""
    sync_directory(partial)
    if path.exists():  # a damaged one, which the run went on from before
        shutil.rmtree(path)
    os.rename(partial, path)
    sync_directory(path.parent)


def _clear(directory: Path) -> None:
    """What processes that were killed have left."""
    for path in directory.glob(".step-*.partial"):
        shutil.rmtree(path)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first, without the tracebacks of all ranks in which torch wraps it."""
    for first, _ in getattr(error, "failures", {}).values():
        while first.__context__ is not None:
            first = first.__context__
        return first
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
