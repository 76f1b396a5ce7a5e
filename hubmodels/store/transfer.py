"""A URL -> bytes in a file, over as many connections as it takes.

What has come stays, with a note of what it is, so that the next process goes on where this one was killed. Whether the
bytes are right is not decided here: whoever asked compares their SHA-256.
"""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from ..catalog import LOOPBACK
from ..errors import StoreError

CONNECT_SECONDS = 10.0  # for a connection
SILENCE_SECONDS = 30.0  # without a byte
FIRST_WAIT_SECONDS = 1.0  # after the first failure; each further one doubles it
LONGEST_WAIT_SECONDS = 300.0  # that a server may ask for
TRIES = 6  # in a row without a new byte
MOST_CONNECTIONS = 200  # for one file
LARGEST_UNKNOWN = 4 << 30  # bytes of a file whose size was never published
SPARE_BYTES = 16 << 20  # that the disk must have left
_CHUNK = 1 << 17
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be another a moment later
T = TypeVar("T")


class Unavailable(Exception):
    """This source does not give the bytes; the text says why."""


class WrongBytes(Unavailable):
    """It gives others."""


class NoRoom(StoreError):
    """On this disk."""


class NoRanges(Unavailable):
    """It gives the whole file only."""


class _Broken(Exception):
    """This connection has failed; the next may not. asked: for how many seconds the server wants to be left alone."""

    def __init__(self, reason: str, asked: float | None = None) -> None:
        super().__init__(reason)
        self.asked = asked


class Part:
    """A file that grows: how much there is of it, and the SHA-256 of that much.

    pin: what it is to become. A part without a note that says the same is not gone on with.
    """

    def __init__(self, path: Path, pin: str) -> None:
        self.path, self._pin = path, pin
        self._note_path = path.with_name(path.name + ".json")
        self._note = self._read_note()
        self._file = open(path, "r+b" if path.is_file() else "w+b", buffering=0)  # noqa: SIM115
        self.length, self.sha256 = 0, hashlib.sha256()
        if self._note.get("pin") != pin:
            self.restart()
        while data := self._file.read(_CHUNK):
            self.sha256.update(data)
            self.length += len(data)

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.length, self.sha256 = 0, hashlib.sha256()
        self._write_note({"pin": self._pin})

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with _disk_errors(self.path):
            while view:
                count = self._file.write(view)
                self.sha256.update(view[:count])
                self.length += count
                view = view[count:]

    def copy(self, source: IO[bytes]) -> None:
        """All that is left of an open file, in place of what is here."""
        self.restart()
        while data := source.read(_CHUNK):
            self.write(data)
        self.flush()

    def flush(self) -> None:
        """Returns when the disk has it all."""
        with _disk_errors(self.path):
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)

    def version(self, url: str) -> str | None:
        """What the server calls the version of `url` that this is a part of, for If-Range."""
        return self._note.get("version") if self._note.get("url") == url else None

    def is_from(self, url: str, version: str | None) -> None:
        if version != self.version(url):
            self._write_note({"pin": self._pin, "url": url, "version": version})

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note_path.read_text())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _write_note(self, note: dict[str, Any]) -> None:
        self._note = note
        with _disk_errors(self._note_path):
            self._note_path.write_text(json.dumps(note))


class Client:
    """Speaks https, and http with this machine only.

    headers: of every request, though no secret of them goes to another host. say: tells a person why it takes long.
    """

    def __init__(
        self, headers: Mapping[str, str] | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        class Loopback(HTTPAdapter):
            """Each request in a chain of redirects passes here."""

            def send(self, request, *args, **kwargs):
                if urlsplit(request.url).hostname not in LOOPBACK:
                    raise requests.exceptions.InvalidSchema(f"plain http is for this machine only, not {request.url}")
                return super().send(request, *args, **kwargs)

        self._session = requests.Session()
        self._session.mount("http://", Loopback())
        self._session.max_redirects = 10
        self._session.headers.update({"User-Agent": "hubmodels", **(headers or {}), "Accept-Encoding": "identity"})
        self._say = say

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def download(
        self, url: str, part: Part, size: int | None, *, span: tuple[int, int] | None = None, bar: Any = None
    ) -> None:
        """Bring the bytes of `url`, or of its `span` (first, length), into `part`, going on where that ends.

        size: how many bytes `url` has, if that is known.
        Raises Unavailable; StoreError if the disk is full. What has come stays in `part`.
        """
        whole = span[1] if span else size

        def receive() -> None:
            if whole is not None and part.length > whole:
                part.restart()
            if whole is None or part.length < whole:
                self._receive(url, part, size, span, bar)

        self._patiently(receive, lambda: part.length)
        part.flush()

    def read(self, url: str, first: int, length: int) -> tuple[bytes, int]:
        """At most `length` bytes from `first` on, and how many `url` has. Raises NoRanges and other Unavailable."""

        def receive() -> tuple[bytes, int]:
            with self._get(url, {"Range": f"bytes={first}-{first + length - 1}"}) as response:
                if response.status_code != 206:
                    raise NoRanges("it gives the whole file only")
                begin, total = _range_of(response.headers)
                if begin is None or total is None:
                    raise NoRanges(f"it does not say which range it gives: {response.headers.get('Content-Range')!r}")
                data = b"".join(_at_most(length, _body(response)))
                if begin != first or len(data) != min(length, total - first):
                    raise _Broken(f"asked for {length} bytes from {first} on, got {len(data)} from {begin} on")
                return data, total

        return self._patiently(receive)

    def _patiently(self, work: Callable[[], T], length: Callable[[], int] = lambda: 0) -> T:
        """The result of `work`, done again after each broken connection, as long as some of them bring something."""
        failures, reached = 0, length()
        for _ in range(MOST_CONNECTIONS):
            try:
                with _requests_errors():
                    return work()
            except _Broken as broken:
                failures = 1 if length() > reached else failures + 1
                reached = max(reached, length())  # what comes a second time is no progress
                if failures == TRIES:
                    raise Unavailable(f"{broken}; {TRIES} tries in a row brought nothing") from None
                self._wait(broken, failures)
        raise Unavailable(f"not there after {MOST_CONNECTIONS} connections")

    def _wait(self, broken: _Broken, failures: int) -> None:
        seconds = FIRST_WAIT_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1)  # not all clients at the same time
        seconds = max(seconds, broken.asked or 0)
        if seconds > LONGEST_WAIT_SECONDS:
            raise Unavailable(f"{broken}; it asks to be left alone for {seconds:.0f} s")
        self._say(f"{broken}; trying again in {seconds:.0f} s")
        time.sleep(seconds)

    def _receive(self, url: str, part: Part, size: int | None, span: tuple[int, int] | None, bar: Any) -> None:
        """What one connection gives."""
        first, length = (span[0], span[1]) if span else (0, size)
        headers = {}
        if part.length or span:
            end = first + length - 1 if length is not None else ""
            headers["Range"] = f"bytes={first + part.length}-{end}"
            if version := part.version(url):
                headers["If-Range"] = version
        with self._get(url, headers) as response:
            if response.status_code == 416:  # there is nothing after what is here
                part.restart()
                raise _Broken("it has fewer bytes than are here already")
            encoded = _is_encoded(response)
            if response.status_code == 206:
                begin, offered = _range_of(response.headers)
                if begin != first + part.length or encoded:
                    part.restart()
                    raise _Broken("it answered with another range than the one asked for")
            elif span and not part.length:
                raise NoRanges("it gives the whole file only")
            else:  # all of it, asked for or because it is another version than before
                part.restart()
                if span:
                    raise _Broken("it has another version than before")
                offered = None if encoded else _natural(response.headers.get("Content-Length"))
            if size is not None and offered not in (None, size):
                raise WrongBytes(f"expected {size} bytes, it offers {offered}")
            if length is None and (offered or 0) > LARGEST_UNKNOWN:
                raise WrongBytes(f"expected at most {LARGEST_UNKNOWN} bytes, it offers {offered}")
            part.is_from(url, None if encoded else _version(response.headers))
            require_room(part.path.parent, (length if length is not None else offered or 0) - part.length)
            if bar is not None:
                bar.total, bar.n = length if length is not None else offered, part.length
                bar.refresh()
            _fill(part, _body(response), length, bar)
        if length is not None and part.length < length:
            raise _Broken(f"the connection ended after {part.length} of {length} bytes")

    def _get(self, url: str, headers: Mapping[str, str]) -> Any:
        """A response of status 200, 206 or 416, its body not yet read."""
        from requests import exceptions

        limits = (CONNECT_SECONDS, SILENCE_SECONDS)
        try:
            response = self._session.get(url, headers=headers, stream=True, timeout=limits)
        except ValueError as error:
            if isinstance(error, exceptions.RequestException):
                raise
            raise Unavailable(f"it redirects to what is no address: {error}") from None
        status = f"HTTP {response.status_code} {response.reason or ''}".rstrip()
        if response.status_code in (200, 206, 416):
            return response
        response.close()
        if response.status_code in _PASSING:
            raise _Broken(status, seconds_asked(response.headers))
        raise Unavailable(status)


def _range_of(headers: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Where the body begins in the file, and how long the file is, as far as that is said."""
    found = re.fullmatch(r"bytes (\d{1,18})-\d+/(?:(\d{1,18})|\*)", headers.get("Content-Range", ""))
    return (int(found[1]), int(found[2]) if found[2] else None) if found else (None, None)


def _is_encoded(response: Any) -> bool:
    """Compressed on the way, though that was not asked for: its ranges are of something else."""
    return bool(response.headers.get("Content-Encoding", "identity") != "identity")


def _body(response: Any) -> Iterator[bytes]:
    """As it comes: what came before the connection broke is not lost."""
    if _is_encoded(response):
        yield from response.iter_content(_CHUNK)
        return
    while data := response.raw.read1(_CHUNK):
        yield data


def _fill(part: Part, chunks: Iterator[bytes], length: int | None, bar: Any) -> None:
    for chunk in _at_most((LARGEST_UNKNOWN if length is None else length) - part.length, chunks):
        part.write(chunk)
        if bar is not None:
            bar.update(len(chunk))


def _at_most(length: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whoever sends more sends something else."""
    for chunk in chunks:
        length -= len(chunk)
        if length < 0:
            raise WrongBytes("more bytes came than the file has")
        yield chunk


def require_room(directory: Path, size: int) -> None:
    """Raise StoreError before a byte is written of what would not fit."""
    needed = max(size, 0) + SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NoRoom(
            f"{directory}: {needed / 1e6:,.0f} MB are needed on this disk, {free / 1e6:,.0f} are free; "
            "make room, or name another directory with cache_dir= or TORCH_HOME"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoRoom(
            f"{path}: {error.strerror}; what came is kept: make room and do it again, or name another directory with "
            "cache_dir= or TORCH_HOME"
        ) from error


@contextmanager
def _requests_errors() -> Iterator[None]:
    """Those of `requests`, told apart: what may pass, and what stays."""
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    try:
        yield
    except exceptions.SSLError as error:
        raise Unavailable(f"its certificate is not accepted: {_innermost(error)}") from error
    except (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError, HTTPError) as error:
        raise _Broken(_innermost(error)) from error
    except exceptions.RequestException as error:
        raise Unavailable(_innermost(error)) from error


def _innermost(error: BaseException) -> str:
    """What went wrong, without the wrappers of two libraries."""
    name = type(error).__name__
    while inner := getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, Exception)), None):
        if not isinstance(inner, BaseException):
            break
        error = inner
    return f"{name}: {error}"


def _version(headers: Mapping[str, str]) -> str | None:
    """What If-Range can name: a strong ETag, else the date."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def seconds_asked(headers: Mapping[str, str]) -> float | None:
    """Retry-After: seconds, or a date, which is one of the server's own clock."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    with suppress(TypeError, ValueError, OverflowError):
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return (parsedate_to_datetime(asked) - now).total_seconds()
    return None


def _natural(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) < 19 else None
