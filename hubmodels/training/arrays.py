"""Arrays too large for memory: written to a .npy as they come, mapped when they are read."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError


class MappedArray:
    """The array in a .npy. It is mapped when it is first looked at, and pickles as its path."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def rows(self) -> np.ndarray:
        """The whole of it; what is looked at is read. A plain array: slices of numpy's memmap are ten times slower."""
        return np.load(self.path, mmap_mode="r").view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


@contextmanager
def array_file(path: Path, dtype: DTypeLike, columns: int = 0) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds rows [n], or [n, columns], to the .npy made at `path`, which is on the disk at the end."""
    kind, tail = np.dtype(dtype), (columns,) if columns else ()
    rows = 0

    def write_header() -> None:  # as long for any number of rows: numpy leaves room for it
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows, *tail)}
        np.lib.format.write_array_header_1_0(file, header)

    def add(block: np.ndarray) -> None:
        nonlocal rows
        file.write(np.ascontiguousarray(block, kind).data)
        rows += len(block)

    with open(path, "wb") as file:
        write_header()
        yield add
        file.seek(0)
        write_header()
        file.flush()
        os.fsync(file.fileno())


def kept_array(path: Path, dtype: DTypeLike, columns: int, make: Callable[[], Iterable[np.ndarray]]) -> MappedArray:
    """The array at `path`, made block by block if it is not there. Of many processes one makes it, the others wait.

    Raises InputError where nothing can be kept.
    """
    from filelock import FileLock

    if not _is_whole(path):
        try:
            with FileLock(f"{path}.lock"):
                if not _is_whole(path):
                    partial = path.with_name(path.name + ".partial")
                    with array_file(partial, dtype, columns) as add:
                        for block in make():
                            add(block)
                    os.replace(partial, path)
        except OSError as error:
            raise not_kept(path, error) from error
    return MappedArray(path)


def not_kept(path: Path, error: OSError) -> InputError:
    """The error of a cache that cannot be written."""
    return InputError(f"{path}: cannot be kept there: {error}; make room, or name another cache directory")


def _is_whole(path: Path) -> bool:
    """A disk that was full or failed may have left less."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True
