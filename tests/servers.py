"""A web server on this machine that does as a test tells it and remembers what it was asked; pins of what it has."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any, NamedTuple

import pytest

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
REPO, REVISION, NAME = "someone/some-bert", "0123456789abcdef" * 2 + "01234567", "model.safetensors"
SITE, SHARD = "openai/some-gpt", "model/params_0.npy"
DATA = bytes(range(256)) * 40
OTHER = DATA[:-1] + b"!"  # of the same size
MODIFIED = formatdate(1_000_000_000, usegmt=True)


class Asked(NamedTuple):
    """A request for a file. headers: by their names in small letters."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class Exchange(BaseHTTPRequestHandler):
    """One request, and what is answered."""

    server: Any

    def do_GET(self) -> None:
        hub, path = self.server.hub, self.path.lstrip("/")
        self.connection.settimeout(20)
        if path.startswith("api/"):  # what huggingface_hub wants to know besides the file
            return self.head(404, Content_Length=0)
        hub.asked.append(Asked(self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        with suppress(OSError):  # the client has hung up
            if path in hub.files:
                hub.answer(self, hub.files[path])
            else:
                fail(404, X_Error_Code="EntryNotFound")(self, b"")
        return None

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        """headers: with _ for -; None is left out. The date is sent only when it is given."""
        self.send_response_only(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        for begin in range(0, len(data) if self.command == "GET" else 0, 1 << 16):
            piece = data[begin : begin + (1 << 16)]
            self.wfile.write(piece)
            self.server.hub.sent += len(piece)


Answer = Callable[[Exchange, bytes], None]


def etag_of(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()}"'


def asked_of(exchange: Exchange, data: bytes, etag: str | None) -> tuple[int, int] | None:
    """begin and end of the range that is asked for, if what is here is what the client has a part of"""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", exchange.headers.get("Range", ""))
    if not found or exchange.headers.get("If-Range", etag) not in (etag, MODIFIED):
        return None
    return int(found[1]), min(int(found[2]) + 1 if found[2] else len(data), len(data))


def serving(stop: int | None = None, **changes: object) -> Answer:
    """Honest, with ranges. stop: hang up before that byte of the file; changes: of the headers."""

    def answer(exchange: Exchange, data: bytes) -> None:
        etag = etag_of(data)
        headers = {"ETag": etag, "X_Repo_Commit": REVISION, "Accept_Ranges": "bytes", "Last_Modified": MODIFIED}
        span = asked_of(exchange, data, str(changes.get("ETag", etag)))
        if span and span[0] >= len(data):
            return exchange.head(416, Content_Length=0, Content_Range=f"bytes */{len(data)}")
        begin, end = span or (0, len(data))
        headers["Content_Length"] = str(end - begin)
        if span:
            headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        exchange.head(206 if span else 200, **{**headers, **changes})
        return exchange.body(data[begin : end if stop is None else min(end, stop)])

    return answer


serve = serving()


def without_ranges(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, Content_Length=len(data), ETag=etag_of(data))
    exchange.body(data)


def fail(status: int, **headers: object) -> Answer:
    return lambda exchange, data: exchange.head(status, X_Repo_Commit=REVISION, Content_Length=0, **headers)


def redirect(url: str, status: int = 302) -> Answer:
    return fail(status, Location=url)


def page(exchange: Exchange, data: bytes) -> None:
    """A captive portal answers everything with a page of its own."""
    exchange.head(200, Content_Length=6)
    exchange.body(b"<html>")


def endless(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, ETag=etag_of(data))
    while exchange.command == "GET":
        exchange.body(data)


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last goes on for ever. HEAD, which asks for no bytes, takes no turn."""
    left = list(answers)

    def answer(exchange: Exchange, data: bytes) -> None:
        if exchange.command == "HEAD":
            return serve(exchange, data)
        return (left.pop(0) if len(left) > 1 else left[0])(exchange, data)

    return answer


def break_off(exchange: Exchange, data: bytes) -> None:
    """The connection ends in the middle of the file."""
    serving(stop=len(data) // 2)(exchange, data)


def hang_up(times: int) -> Answer:
    """The connection ends in the middle, `times` times; what is left comes when it is asked for."""
    return in_turn(*[break_off] * times, serve)


class FakeHub:
    """A server on this machine that answers as the Hugging Face hub answers hf_hub_download, or as any other site.

    files: path -> bytes. asked: every request; requests: the method and path of each. sent: bytes of bodies.
    answer: what to do instead of serving a file; it is given the exchange and the file's bytes.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.answer: Answer = serve
        self.sent = 0
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        return [(asked.method, asked.path) for asked in self.asked]

    def add(self, data: bytes = DATA, filename: str = NAME, repo: str = REPO, served: bytes | None = None):
        """Publish `served` (default: data) under the pin of `data`; returns the pin."""
        self.files[f"{repo}/resolve/{REVISION}/{filename}"] = data if served is None else served
        return catalog.File(repo, REVISION, filename, len(data), hashlib.sha256(data).hexdigest())

    def publish(self, data: bytes = DATA, filename: str = SHARD, served: bytes | None = None):
        """As `add`, but as a plain file under an address, of which only git's own digest was ever published."""
        self.files[f"{SITE}/{REVISION}/{filename}"] = data if served is None else served
        digest = hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()
        return catalog.File(f"{self.url}/{SITE}", REVISION, filename, None, None, digest)

    def put(self, path: str, data: bytes) -> str:
        """Any file; returns its address."""
        self.files[path] = data
        return f"{self.url}/{path}"

    @contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Iterator["FakeHub"]:
        """huggingface_hub talks to this server, nobody waits long before he tries again, and nothing of the user's
        settings counts."""
        import huggingface_hub
        from huggingface_hub import constants

        sleep = time.sleep
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("NETRC", os.devnull)
        for name in ("HUBMODELS_MIRROR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.002)))
        huggingface_hub.close_session()
        with self.listening():
            yield self
        huggingface_hub.close_session()

    @contextmanager
    def listening(self) -> Iterator["FakeHub"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
