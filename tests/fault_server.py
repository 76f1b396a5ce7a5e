"""Web servers on this machine that misbehave as they are told, and count what they send."""

import hashlib
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

REVISION = "0123456789abcdef" * 2 + "01234567"
SIZE = 2_000_003
DATA, OTHER = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))  # OTHER: another version, of the same size
FLIPPED = bytes([DATA[0] ^ 1]) + DATA[1:]
PIECE = 1 << 14  # bytes that are written at once
MOST_SECONDS = 60.0  # for one connection; for one fetch too, after which it hangs


@dataclass
class Request:
    """sent: bytes of body that were handed to the socket."""

    method: str
    path: str
    range: str | None
    if_range: str | None
    status: int | None = None
    sent: int = 0


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self) -> None:
        self.request_seen = Request(self.command, self.path, self.headers["Range"], self.headers["If-Range"])
        self.connection.settimeout(MOST_SECONDS)
        self.close_connection = True
        if REVISION not in self.path:  # huggingface_hub asks for other things too
            return status(404)(self)
        self.server.requests.append(self.request_seen)
        with suppress(OSError):  # the client has hung up
            self.server.answer(self)
        return None

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    @property
    def asked(self) -> slice:
        """The bytes the client wants, if it means this version of the file."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        stale = self.server.knows_versions and self.headers["If-Range"] not in (None, self.server.etag)
        if not found or stale:
            return slice(0, None)
        return slice(int(found[1]), int(found[2]) + 1 if found[2] else None)

    def head(self, status: int, fields: Mapping[str, object]) -> None:
        """What a file of the hub has; fields: beside or instead of it, None: without."""
        self.request_seen.status = status
        self.send_response_only(status)
        usual = {"Date": formatdate(usegmt=True), "ETag": self.server.etag, "X-Repo-Commit": REVISION}
        for name, value in {**usual, "Connection": "close", **fields}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        for begin in range(0, len(data) if self.command == "GET" else 0, self.server.piece):
            piece = data[begin : begin + self.server.piece]
            self.wfile.write(piece)
            self.request_seen.sent += len(piece)
            self.server.count()
            time.sleep(self.server.gap)


Answer = Callable[[Exchange], None]


class Site(ThreadingHTTPServer):
    """A web server with one file, at every path with the revision, which is a Hugging Face endpoint too."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str = "127.0.0.1", listening: bool = True) -> None:
        super().__init__((host, 0), Exchange, bind_and_activate=False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)  # what counts as sent has nearly come
        self.server_bind()
        self.data, self.answer, self.requests = DATA, honest, list[Request]()
        self.piece, self.gap, self.knows_versions = PIECE, 0.0, True
        self.alarm: tuple[int, Callable[[], object]] | None = None  # what to do once so many bytes were sent
        self.url = f"http://{host}:{self.server_port}"
        self._thread: Thread | None = None
        if listening:
            self.listen()

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.data).hexdigest()}"'

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def count(self) -> None:
        if self.alarm and self.sent >= self.alarm[0]:
            _, act = self.alarm
            self.alarm = None
            act()

    def listen(self) -> None:
        if self._thread is None:
            self.server_activate()
            self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            self._thread.start()

    def close(self) -> None:
        if self._thread:
            self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A connection that was reset, by either side, is what this is about."""


# --- Answers


def serving(
    data: bytes | None = None,
    *,
    begin: int | None = None,
    stop: int | None = None,
    fields: Mapping[str, object] | None = None,
    ending: Answer = lambda exchange: None,
) -> Answer:
    """As an honest server, but for the bytes, where they begin and stop, header fields, and what it does at the end."""

    def answer(exchange: Exchange) -> None:
        body = exchange.server.data if data is None else data
        first = (exchange.asked.start if begin is None else begin) or 0
        last = exchange.asked.stop or len(body)
        if first >= len(body) > 0:
            return exchange.head(416, {"Content-Length": 0, "Content-Range": f"bytes */{len(body)}"})
        place = {"Content-Range": f"bytes {first}-{last - 1}/{len(body)}"} if first else {}
        exchange.head(206 if first else 200, {"Content-Length": last - first, **place, **(fields or {})})
        exchange.body(body[first : last if stop is None else min(stop, last)])
        return ending(exchange)

    return answer


honest = serving()


def first(times: int, fault: Answer, then: Answer = honest, methods: tuple[str, ...] = ("GET",)) -> Answer:
    """`fault` for so many requests by these methods. A hub is asked by HEAD before, which it answers honestly."""
    left = [times]

    def answer(exchange: Exchange) -> None:
        if exchange.command not in methods:
            return honest(exchange)
        left[0] -= 1
        return (fault if left[0] >= 0 else then)(exchange)

    return answer


def status(code: int, fields: Mapping[str, object] | None = None, body: bytes = b"") -> Answer:
    """No file. The hub says in a header of its own that a file is not there."""

    def answer(exchange: Exchange) -> None:
        missing = {"X-Error-Code": "EntryNotFound"} if code == 404 else {}
        exchange.head(code, {"Content-Length": len(body), **missing, **(fields or {})})
        exchange.body(body)

    return answer


def busy_until(seconds: float, skew: float) -> Answer:
    """Retry-After as a date, on a clock that is `skew` seconds ahead of ours."""

    def answer(exchange: Exchange) -> None:
        dates = {"Date": time.time() + skew, "Retry-After": time.time() + skew + seconds}
        status(503, {name: formatdate(date, usegmt=True) for name, date in dates.items()})(exchange)

    return answer


def silent(exchange: Exchange) -> None:
    """Not a byte, until the client hangs up."""
    exchange.connection.recv(1)


def reset(exchange: Exchange) -> None:
    """The connection ends as by a router that has forgotten it: closing sends RST."""
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.connection.close()


def redirect(to: Callable[[Exchange], str]) -> Answer:
    return lambda exchange: status(302, {"Location": to(exchange)})(exchange)


def redirect_once(exchange: Exchange) -> None:
    there = exchange.path.startswith("/elsewhere/")
    (honest if there else redirect(lambda exchange: f"/elsewhere{exchange.path}"))(exchange)


def chunked(stop: int | None = None) -> Answer:
    """No length is said; without `stop` the end is."""

    def answer(exchange: Exchange) -> None:
        exchange.head(200, {"Transfer-Encoding": "chunked"})
        for begin in range(0, stop or SIZE, PIECE):
            piece = DATA[begin : min(begin + PIECE, stop or SIZE)]
            exchange.wfile.write(b"%x\r\n" % len(piece))
            exchange.body(piece)
            exchange.wfile.write(b"\r\n")
        if stop is None:
            exchange.wfile.write(b"0\r\n\r\n")

    return answer


def endless(exchange: Exchange) -> None:
    exchange.head(200, {})
    for _ in range(16):  # enough to tell
        exchange.body(DATA)


def no_http(exchange: Exchange) -> None:
    exchange.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
