"""One member of a .zip at a URL, without the rest where the server gives ranges.

The archive itself is not trusted: its directory only says where to look, the member's name is compared with the one
that is asked for and never becomes a path, and no more is inflated than the member may have.
"""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .transfer import LARGEST_UNKNOWN, Client, NoRanges, Part, Unavailable, WrongBytes, require_room

_LARGEST_DIRECTORY = 16 << 20  # bytes of a .zip's own table of contents
_CHUNK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and of the extra field


def download_member(client: Client, url: str, member: str, part: Part, size: int | None, work: Path, bar: Any) -> None:
    """Bring the member, inflated, into `part`. work: a directory for what comes on the way, which is resumed there.

    Raises Unavailable if there is no such member, or it is not a plain file of `size` bytes; StoreError.
    """
    try:
        archive = _Archive(client.read(url, 0, 1)[1], lambda first, length: client.read(url, first, length)[0])
        info, first = _find(archive, member, size)
    except NoRanges:
        with Part(work / "archive", url) as whole:
            client.download(url, whole, None, bar=bar)
            with open(whole.path, "rb") as file:
                archive = _Archive(whole.length, lambda first, length: (file.seek(first), file.read(length))[1])
                info, first = _find(archive, member, size)
                file.seek(first)
                _inflate(file, info, part)
        return
    with Part(work / "compressed", f"{url} {member} {first} {info.compress_size}") as compressed:
        client.download(url, compressed, None, span=(first, info.compress_size), bar=bar)
        with open(compressed.path, "rb") as file:
            _inflate(file, info, part)


class _Archive(io.IOBase):
    """Bytes that `zipfile` can read here and there. get: those from a place on, as many as asked for."""

    def __init__(self, length: int, get: Callable[[int, int], bytes]) -> None:
        self._length, self._get, self._at = length, get, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("a place before the beginning")  # as of a file: zipfile expects it
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        length = left if length < 0 else min(length, left)
        if length > _LARGEST_DIRECTORY:
            raise Unavailable(f"a damaged archive: a directory of {length} bytes")
        data = self._get(self._at, length) if length else b""
        self._at += len(data)
        return data


def _find(archive: _Archive, member: str, size: int | None) -> tuple[zipfile.ZipInfo, int]:
    """What the directory says of the member, and where its data begin: behind a header of its own."""
    try:
        with zipfile.ZipFile(archive) as directory:  # type: ignore[call-overload]  # it reads, seeks and tells, no more
            info = directory.getinfo(member)
        archive.seek(info.header_offset)
        header = archive.read(_LOCAL_HEADER.size)
    except KeyError:
        raise Unavailable(f"the archive has no member {member}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OSError) as error:
        raise Unavailable(f"not a zip archive, or a damaged one: {error}") from None
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG) or info.is_dir():
        raise Unavailable(f"{member} is not a plain file in the archive")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unavailable(f"{member} is encrypted, or compressed with method {info.compress_type}")
    if size is not None and info.file_size != size:
        raise WrongBytes(f"expected {size} bytes, the archive has {info.file_size} under {member}")
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise Unavailable(f"a damaged archive: {member} is not where its directory says")
    most = min(info.file_size, LARGEST_UNKNOWN)
    if info.file_size > most or info.compress_size > most + most // 1000 + 1024:  # deflate adds less than that
        raise WrongBytes(f"more than {most} bytes come out of {member}")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    return info, info.header_offset + _LOCAL_HEADER.size + name + extra


def _inflate(source: Any, info: zipfile.ZipInfo, part: Part) -> None:
    """`source` stands where the member's data begin."""
    require_room(part.path.parent, info.file_size)
    part.restart()
    left = info.compress_size
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if info.compress_type == zipfile.ZIP_DEFLATED else None
    try:
        while left and (data := source.read(min(left, _CHUNK))):
            left -= len(data)
            while given := inflater.decompress(data, _CHUNK) if inflater else data:
                data = inflater.unconsumed_tail if inflater else b""
                if part.length + len(given) > info.file_size:
                    raise WrongBytes(f"more than {info.file_size} bytes come out of {info.filename}")
                part.write(given)
    except zlib.error as error:
        raise WrongBytes(f"{info.filename} cannot be inflated: {error}") from None
    part.flush()
