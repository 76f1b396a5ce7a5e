"""One address -> bytes in a file: what is kept, what is asked again, what is waited for, and what is refused."""

import errno
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import (
    DATA,
    MODIFIED,
    OTHER,
    Answer,
    Exchange,
    FakeHub,
    endless,
    etag_of,
    fail,
    hang_up,
    in_turn,
    page,
    redirect,
    serve,
    serving,
    without_ranges,
)

from hubmodels.errors import StoreError
from hubmodels.store import transfer
from hubmodels.store.transfer import Client, NoRanges, Part, Unavailable, WrongBytes

PIN, HALF = "SHA-256 of something", len(DATA) // 2
CHUNK, PIECE = transfer._CHUNK, 512


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub().running(monkeypatch) as hub:
        yield hub


@pytest.fixture
def url(hub) -> str:
    return hub.put("a/file", DATA)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """For how long the client would have waited; no share of it is left to chance."""
    waits: list[float] = []
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(transfer, "random", SimpleNamespace(uniform=lambda low, high: high))
    return waits


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """What comes is written in pieces that are small beside the files of these tests: connections break after some."""
    monkeypatch.setattr(transfer, "_CHUNK", PIECE)


@pytest.fixture
def part(tmp_path) -> Iterator[Part]:
    with Part(tmp_path / "part", PIN) as part:
        yield part


def assert_agrees(part: Part, data: bytes | None = None) -> None:
    """What it says of itself is what is on the disk."""
    there = part.path.read_bytes()
    assert (part.length, part.sha256.hexdigest()) == (len(there), hashlib.sha256(there).hexdigest())
    assert data is None or there == data


def begin(part: Part, url: str, length: int = HALF, version: str | None = None) -> None:
    """As after a download of `url` that was cut."""
    part.write(DATA[:length])
    part.is_from(url, version or etag_of(DATA))


def download(url: str, part: Part, size: int | None = len(DATA), **options) -> None:
    with Client() as client:
        client.download(url, part, size, **options)


def refused(url: str, part: Part, size: int | None = len(DATA), kind: type[Exception] = Unavailable) -> str:
    with pytest.raises(kind) as caught:
        download(url, part, size)
    assert_agrees(part)
    return str(caught.value)


# --- A part


def test_a_new_part_is_empty_and_says_what_it_is_to_become(tmp_path):
    with Part(tmp_path / "part", PIN) as part:
        assert_agrees(part, b"")
    assert json.loads((tmp_path / "part.json").read_text())["pin"] == PIN


def test_a_part_is_gone_on_with(tmp_path):
    with Part(tmp_path / "part", PIN) as part:
        part.write(DATA[:1000])
    with Part(tmp_path / "part", PIN) as part:
        assert_agrees(part, DATA[:1000])
        part.write(DATA[1000:])
        assert_agrees(part, DATA)


def test_a_part_of_something_else_is_begun_anew(tmp_path):
    with Part(tmp_path / "part", PIN) as part:
        part.write(DATA)
    with Part(tmp_path / "part", "another pin") as part:
        assert_agrees(part, b"")
    with Part(tmp_path / "part", PIN) as part:
        assert_agrees(part, b"")


@pytest.mark.parametrize(
    "note", [None, b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"pin": 7}', b'"pin"'], ids=repr
)
def test_a_part_without_a_note_of_its_pin_is_begun_anew(tmp_path, note):
    (tmp_path / "part").write_bytes(DATA)
    if note is not None:
        (tmp_path / "part.json").write_bytes(note)
    with Part(tmp_path / "part", PIN) as part:
        assert_agrees(part, b"")
        part.write(DATA[:10])
    with Part(tmp_path / "part", PIN) as part:
        assert_agrees(part, DATA[:10])


def test_a_part_agrees_with_the_disk_after_whatever_is_done_with_it(tmp_path):
    draw = random.Random(3)
    (tmp_path / "other").write_bytes(DATA * 30)
    for _ in range(20):
        with Part(tmp_path / "part", draw.choice([PIN, PIN, PIN, "another"])) as part:
            for _ in range(10):
                step = draw.choice(["write"] * 6 + ["restart", "copy", "flush", "is_from"])
                match step:
                    case "write":
                        part.write(draw.randbytes(draw.choice([0, 1, 7, 5000, 300_000])))
                    case "copy":
                        with open(tmp_path / "other", "rb") as other:
                            part.copy(other)
                    case "is_from":
                        part.is_from("http://localhost/a", draw.choice([None, '"1"', '"2"']))
                    case _:
                        getattr(part, step)()
                assert_agrees(part)


def test_a_copy_is_all_of_the_other_file_and_nothing_else(part, tmp_path):
    (tmp_path / "other").write_bytes(DATA)
    part.write(b"before")
    with open(tmp_path / "other", "rb") as other:
        part.copy(other)
    assert_agrees(part, DATA)


def test_a_part_takes_little_memory_however_long_it_is(tmp_path):
    with open(tmp_path / "other", "wb") as file:
        file.truncate(16 << 20)
    tracemalloc.start()
    try:
        with Part(tmp_path / "part", PIN) as part:
            with open(tmp_path / "other", "rb") as other:
                part.copy(other)
        with Part(tmp_path / "part", PIN) as part:
            assert part.length == 16 << 20
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_part_knows_which_version_of_which_address_it_is_of(tmp_path):
    with Part(tmp_path / "part", PIN) as part:
        assert part.version("http://localhost/a") is None
        begin(part, "http://localhost/a", version='"1"')
        assert part.version("http://localhost/a") == '"1"'
        assert part.version("http://localhost/b") is None
    with Part(tmp_path / "part", PIN) as part:
        assert part.version("http://localhost/a") == '"1"'
        part.restart()
        assert part.version("http://localhost/a") is None
        part.is_from("http://localhost/b", '"2"')
        assert (part.version("http://localhost/a"), part.version("http://localhost/b")) == (None, '"2"')


def test_a_removed_part_leaves_nothing(tmp_path):
    part = Part(tmp_path / "part", PIN)
    part.write(DATA)
    part.remove()
    assert list(tmp_path.iterdir()) == []


class Full:
    """A file on a disk with room for so many more bytes."""

    def __init__(self, file, room: int, number: int) -> None:
        self._file, self.room, self._number = file, room, number

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(self._number, os.strerror(self._number))
        count = self._file.write(data[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full_is_told_and_what_came_is_gone_on_with(hub, url, tmp_path, number):
    with Part(tmp_path / "part", PIN) as part:
        part._file = Full(part._file, 3000, number)
        text = refused(url, part, kind=StoreError)
        assert text.startswith(f"{tmp_path / 'part'}: {os.strerror(number)}; ")
        assert "make room" in text
        assert "cache_dir=" in text
        assert_agrees(part, DATA[:3000])
    assert len(hub.asked) == 1
    with Part(tmp_path / "part", PIN) as part:
        download(url, part)
        assert_agrees(part, DATA)
    assert hub.asked[-1].range == f"bytes=3000-{len(DATA) - 1}"


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(part, url):
    part._file = Full(part._file, 0, errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        download(url, part)
    assert not isinstance(caught.value, StoreError)


def test_what_was_downloaded_is_on_the_disk(part, url, monkeypatch):
    """So that a name given to it afterwards never has less."""
    lengths = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (lengths.append(os.fstat(number).st_size), sync(number)))
    download(url, part)
    assert lengths[-1] == len(DATA)


# --- What is asked for


def test_a_whole_file_is_asked_for_once_and_plainly(hub, url, part, waits):
    download(url, part)
    assert_agrees(part, DATA)
    (asked,) = hub.asked
    assert (asked.method, asked.path, asked.range, asked.headers.get("if-range")) == ("GET", "a/file", None, None)
    assert (asked.headers["user-agent"], asked.headers["accept-encoding"]) == ("hubmodels", "identity")
    assert waits == []


@pytest.mark.parametrize("size", [len(DATA), None], ids=["known size", "unknown size"])
def test_a_part_is_completed_with_what_it_lacks(hub, url, part, size):
    begin(part, url)
    download(url, part, size)
    assert_agrees(part, DATA)
    (asked,) = hub.asked
    assert asked.range == f"bytes={HALF}-{'' if size is None else size - 1}"
    assert asked.headers["if-range"] == etag_of(DATA)
    assert hub.sent == len(DATA) - HALF


def test_a_connection_that_breaks_is_gone_on_with_where_it_broke(hub, url, part, waits):
    hub.answer = hang_up(1)
    download(url, part)
    assert_agrees(part, DATA)
    assert [asked.range for asked in hub.asked] == [None, f"bytes={HALF}-{len(DATA) - 1}"]
    assert hub.asked[1].headers["if-range"] == etag_of(DATA)
    assert hub.sent == len(DATA)
    assert waits == [1.0]


def test_a_complete_part_needs_no_server(part, hub, url):
    begin(part, url, len(DATA))
    hub.stop()
    download(url, part)
    assert_agrees(part, DATA)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, etag_of(DATA)),
        ({"ETag": 'W/"1"'}, MODIFIED),
        ({"ETag": "bare"}, MODIFIED),
        ({"ETag": None}, MODIFIED),
        ({"ETag": 'W/"1"', "Last_Modified": None}, None),
        ({"ETag": None, "Last_Modified": None}, None),
    ],
    ids=["strong", "weak", "without quotes", "only a date", "only a weak one", "nothing"],
)
def test_a_version_is_named_by_what_can_name_it(hub, url, part, waits, changes, named):
    """A weak ETag may be the same for other bytes, so that RFC 9110 forbids it here."""
    hub.answer = in_turn(serving(stop=HALF, **changes), serving(**changes))
    download(url, part)
    assert_agrees(part, DATA)
    assert hub.asked[1].range == f"bytes={HALF}-{len(DATA) - 1}"
    assert hub.asked[1].headers.get("if-range") == named


def test_the_version_of_one_address_is_not_asked_of_another(hub, url, part):
    begin(part, url)
    download(hub.put("a/mirror", DATA), part)
    assert_agrees(part, DATA)
    assert (hub.asked[0].range, hub.asked[0].headers.get("if-range")) == (f"bytes={HALF}-{len(DATA) - 1}", None)


def test_the_bytes_that_follow_from_a_mirror_are_noted_as_its_own(hub, url, part):
    begin(part, url, version='"of the first"')
    mirror = hub.put("a/mirror", DATA)
    download(mirror, part)
    assert (part.version(url), part.version(mirror)) == (None, etag_of(DATA))


# --- What is answered


def test_a_server_without_ranges_begins_again(hub, url, part):
    begin(part, url)
    hub.answer = without_ranges
    download(url, part)
    assert_agrees(part, DATA)
    assert hub.asked[0].range is not None
    assert len(hub.asked) == 1


def test_another_version_is_not_appended_to_the_old_one(hub, url, part, waits):
    other = bytes(reversed(DATA))
    hub.answer = in_turn(serving(stop=HALF), lambda exchange, data: serve(exchange, other))
    download(url, part)
    assert_agrees(part, other)


@pytest.mark.parametrize("begins", [0, HALF - 1, HALF + 1])
def test_another_range_than_the_one_asked_for_is_not_used(hub, url, part, waits, begins):
    begin(part, url)

    def shifted(exchange: Exchange, data: bytes) -> None:
        rest = data[begins:]
        exchange.head(206, Content_Length=len(rest), Content_Range=f"bytes {begins}-{len(data) - 1}/{len(data)}")
        exchange.body(rest)

    hub.answer = in_turn(shifted, serve)
    download(url, part)
    assert_agrees(part, DATA)
    assert [asked.range for asked in hub.asked] == [f"bytes={HALF}-{len(DATA) - 1}", None]


def test_a_range_of_a_file_of_another_size_is_not_used(hub, url, part):
    begin(part, url)
    total = len(DATA) + 1
    hub.answer = serving(Content_Range=f"bytes {HALF}-{len(DATA) - 1}/{total}")
    assert refused(url, part, kind=WrongBytes) == f"expected {len(DATA)} bytes, it offers {total}"
    assert_agrees(part, DATA[:HALF])


@pytest.mark.parametrize("says", [f"bytes {HALF}-{len(DATA) - 1}/*", "nonsense", None])
def test_a_server_that_does_not_say_which_range_it_gives_still_gives_the_file(hub, url, part, waits, says):
    """With `*` for the whole it is even allowed. What is here already must not stay in the way for ever."""
    begin(part, url)
    hub.answer = lambda exchange, data: serving(**({"Content_Range": says} if exchange.headers["Range"] else {}))(
        exchange, data
    )
    download(url, part)
    assert_agrees(part, DATA)


def test_a_part_that_is_longer_than_the_file_is_begun_anew(hub, url, part):
    part.write(DATA + DATA)
    part.is_from(url, etag_of(DATA))
    download(url, part)
    assert_agrees(part, DATA)
    assert hub.asked[0].range is None


@pytest.mark.parametrize("length", [len(DATA), 2 * len(DATA)], ids=["complete", "longer"])
def test_a_part_of_unknown_size_with_nothing_after_it_is_begun_anew(hub, url, part, waits, length):
    part.write((DATA + DATA)[:length])
    part.is_from(url, etag_of(DATA))
    download(url, part, None)
    assert_agrees(part, DATA)
    assert [asked.range for asked in hub.asked] == [f"bytes={length}-", None]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_waited_out(hub, url, part, waits, status):
    hub.answer = in_turn(fail(status), fail(status), serve)
    download(url, part)
    assert_agrees(part, DATA)
    assert (len(hub.asked), waits) == (3, [1.0, 2.0])


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 405, 410, 418, 451, 501, 505])
def test_a_status_that_stays_is_not_asked_again(hub, url, part, waits, status):
    hub.answer = fail(status)
    assert re.match(rf"HTTP {status}\b", refused(url, part))
    assert (len(hub.asked), waits) == (1, [])


def test_a_status_comes_with_its_words(hub, url, part):
    hub.files.clear()
    assert refused(url, part) == "HTTP 404 Not Found"


# --- How long it is waited


def test_each_failure_doubles_the_wait_until_it_is_enough(hub, url, part, waits):
    hub.answer = fail(503)
    assert refused(url, part) == "HTTP 503 Service Unavailable; 6 tries in a row brought nothing"
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert len(hub.asked) == 6


def test_not_all_clients_come_back_at_the_same_moment(hub, url, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=waits.append))
    hub.answer = fail(503)
    for number in range(4):
        with Part(tmp_path / str(number), PIN) as part:
            refused(url, part)
    assert all(2**n / 2 <= wait <= 2**n for n, wait in zip([0, 1, 2, 3, 4] * 4, waits, strict=True))
    assert len(set(waits)) == len(waits)


def test_each_new_byte_makes_the_failures_forgotten(hub, url, part, waits):
    """Nine connections, each broken after a little more: none of them was in vain."""
    stops = [len(DATA) * n // 10 for n in range(1, 10)]  # multiples of a piece
    hub.answer = in_turn(*(serving(stop=stop) for stop in stops), serve)
    download(url, part)
    assert_agrees(part, DATA)
    assert waits == [1.0] * 9
    assert hub.sent == len(DATA)


def test_what_came_before_a_break_is_kept_however_soon_it_broke(hub, part, waits, monkeypatch):
    """Some proxies end every connection after a while: one that brought 50 kB was not in vain."""
    monkeypatch.setattr(transfer, "_CHUNK", CHUNK)
    data = random.Random(5).randbytes(500_000)
    hub.answer = lambda exchange, data: serving(stop=asked_begin(exchange) + 50_000)(exchange, data)
    download(hub.put("a/long", data), part, len(data))
    assert_agrees(part, data)


def test_failures_between_new_bytes_are_counted_anew(hub, url, part, waits):
    hub.answer = in_turn(*[fail(503)] * 5, serving(stop=HALF), *[fail(503)] * 4, serve)
    download(url, part)
    assert_agrees(part, DATA)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_there_is_an_end_to_connections_that_bring_a_little_each(hub, url, part, waits, monkeypatch):
    monkeypatch.setattr(transfer, "MOST_CONNECTIONS", 7)
    hub.answer = lambda exchange, data: serving(stop=asked_begin(exchange) + PIECE)(exchange, data)
    assert refused(url, part) == "not there after 7 connections"
    assert len(hub.asked) == 7
    assert_agrees(part, DATA[: 7 * PIECE])


def asked_begin(exchange: Exchange) -> int:
    return int(exchange.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])


def test_a_file_that_is_shorter_than_its_pin_is_not_brought_again_and_again(hub, url, part, waits):
    """No length is said, so that each time the end looks like a connection that broke; beyond it there is nothing."""

    def short(exchange: Exchange, data: bytes) -> None:
        serving(Content_Length=None)(exchange, data[:HALF])

    hub.answer = short
    refused(url, part)
    assert len(hub.asked) <= 2 * transfer.TRIES
    assert hub.sent <= transfer.TRIES * HALF


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("0", 1.0), ("300", 300.0), (" 12 ", 12.0)])
def test_a_server_that_says_when_is_asked_then(hub, url, part, waits, asked, waited):
    hub.answer = in_turn(fail(429, Retry_After=asked), serve)
    download(url, part)
    assert waits == [waited]


@pytest.mark.parametrize("skew", [0, -86400, 86400], ids=["right", "a day late", "a day early"])
def test_a_date_to_come_back_at_is_one_of_the_servers_clock(hub, url, part, waits, skew):
    now = datetime.now(UTC) + timedelta(seconds=skew)
    later = format_datetime(now + timedelta(seconds=90), usegmt=True)
    hub.answer = in_turn(fail(503, Date=format_datetime(now, usegmt=True), Retry_After=later), serve)
    download(url, part)
    assert waits == [90.0]


def test_without_the_servers_clock_it_is_this_machines(hub, url, part, waits):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    hub.answer = in_turn(fail(503, Retry_After=later), serve)
    download(url, part)
    assert waits[0] == pytest.approx(90, abs=10)


@pytest.mark.parametrize("asked", ["", "-5", "soon", "1.5", "Fri, 32 Foo 2020 00:00:00 GMT", "9" * 40 + "x", MODIFIED])
def test_a_time_to_come_back_at_that_makes_no_sense_is_not_waited_for(hub, url, part, waits, asked):
    hub.answer = in_turn(fail(503, Retry_After=asked), serve)
    download(url, part)
    assert waits == [1.0]


@pytest.mark.parametrize("asked", ["301", "86400", "9" * 400])
def test_a_server_that_wants_to_be_left_alone_for_long_is_given_up(hub, url, part, waits, asked):
    hub.answer = fail(429, Retry_After=asked)
    text = refused(url, part)
    assert text.startswith("HTTP 429 Too Many Requests; it asks to be left alone for ")
    assert len(asked) > 10 or text.endswith(f" {asked} s")
    assert (len(hub.asked), waits) == (1, [])


def test_a_person_is_told_what_is_waited_for(hub, url, part, waits):
    said: list[str] = []
    hub.answer = in_turn(fail(503), serving(stop=HALF), serve)
    with Client(say=said.append) as client:
        client.download(url, part, len(DATA))
    assert said[0] == "HTTP 503 Service Unavailable; trying again in 1 s"
    assert said[1].endswith("; trying again in 1 s")
    assert f"IncompleteRead({HALF} bytes read" in said[1]
    assert len(said) == 2


def test_what_broke_a_connection_is_said_once_and_in_words(hub, url, part, waits):
    """The library's errors hold others, which print as tuples of themselves."""
    hub.answer = serving(stop=0)
    text = refused(url, part)
    assert text.count("IncompleteRead") <= 1
    assert "('" not in text


# --- A network that does not work


def test_nobody_listens(hub, url, part, waits):
    hub.stop()
    text = refused(url, part)
    assert "refused" in text
    assert "6 tries in a row brought nothing" in text
    assert len(waits) == 5


@pytest.mark.parametrize("after", [None, HALF], ids=["from the beginning", "in the middle"])
def test_silence_is_not_listened_to_for_ever(hub, url, part, waits, monkeypatch, after):
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.2)
    heard = threading.Event()

    def silent(exchange: Exchange, data: bytes) -> None:
        if after is not None:
            serving(stop=after)(exchange, data)
        heard.wait(20)

    hub.answer = in_turn(silent, serve)
    said: list[str] = []
    with Client(say=said.append) as client:
        client.download(url, part, len(DATA))
    heard.set()
    assert_agrees(part, DATA)
    assert "timed out" in said[0]
    assert hub.asked[1].range == (None if after is None else f"bytes={after}-{len(DATA) - 1}")


@pytest.mark.parametrize("spoken", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 100, b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_what_is_not_http_is_a_broken_connection(part, hub, waits, spoken):
    """Of the machine behind a port; the next connection may lead to the right one."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def speak() -> None:
            for _ in range(transfer.TRIES):
                connection, _ = listener.accept()
                connection.settimeout(20)
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(spoken)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        text = refused(f"http://127.0.0.1:{listener.getsockname()[1]}/a", part)
        thread.join(20)
    assert "6 tries in a row brought nothing" in text or "HTTP" in text or "bytes" in text
    assert part.length == 0


def test_https_that_is_none_is_not_asked_again(hub, url, part, waits):
    text = refused(url.replace("http:", "https:"), part)
    assert text.startswith("its certificate is not accepted: ")
    assert waits == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": "9" * 5000},
        {"Content_Range": f"bytes 0-{'9' * 5000}/{'9' * 5000}"},
        {"Content_Length": "-1"},
        {"Content_Length": "12, 13"},
        {"Content_Length": "a"},
        {"Retry_After": "9" * 5000},
        {"ETag": '"' + "\xe4" * 3 + '"'},
    ],
    ids=lambda headers: next(iter(headers)),
)
@pytest.mark.parametrize("status", [200, 206, 416, 503])
def test_a_header_that_makes_no_sense_is_survived(hub, url, part, waits, headers, status):
    def senseless(exchange: Exchange, data: bytes) -> None:
        usual = {"Content_Length": len(data), "Content_Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        exchange.head(status, **{**usual, **headers})
        exchange.body(data)

    hub.answer = in_turn(senseless, serve)
    try:
        download(url, part)
    except Unavailable:
        assert_agrees(part)
    else:
        assert_agrees(part, DATA)


# --- Redirects, and who may be spoken with


def test_a_redirect_is_followed(hub, url, part):
    hub.answer = lambda exchange, data: (redirect("/a/elsewhere") if exchange.path == "/a/file" else serve)(
        exchange, data
    )
    hub.put("a/elsewhere", DATA)
    download(url, part)
    assert_agrees(part, DATA)
    assert [asked.path for asked in hub.asked] == ["a/file", "a/elsewhere"]


def test_a_part_is_gone_on_with_behind_a_redirect(hub, url, part):
    begin(part, url)
    hub.answer = lambda exchange, data: (redirect("/a/elsewhere") if exchange.path == "/a/file" else serve)(
        exchange, data
    )
    hub.put("a/elsewhere", DATA)
    download(url, part)
    assert_agrees(part, DATA)
    assert (hub.asked[1].range, hub.sent) == (f"bytes={HALF}-{len(DATA) - 1}", len(DATA) - HALF)


def test_plain_http_is_spoken_with_this_machine_only(part, waits):
    text = refused("http://example.org/a", part)
    assert "plain http is for this machine only, not http://example.org/a" in text
    assert waits == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_http_elsewhere_is_not_followed(hub, url, part, waits, status):
    hub.answer = redirect("http://127.0.0.1.example.org/a", status)
    assert "plain http is for this machine only, not http://127.0.0.1.example.org/a" in refused(url, part)
    assert (len(hub.asked), waits) == (1, [])


@pytest.mark.parametrize(
    "to",
    ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://[", "http:///", "//", "http://\xff/", "http://127.0.0.1:x/"],
)
def test_a_redirect_to_nowhere_is_not_followed(hub, url, part, waits, to):
    hub.answer = redirect(to)
    refused(url, part)
    assert part.length == 0
    assert {asked.path for asked in hub.asked} <= {"a/file", ""}


def test_a_redirect_in_a_circle_has_an_end(hub, url, part, waits):
    hub.answer = redirect(url)
    assert refused(url, part) == "TooManyRedirects: Exceeded 10 redirects."
    assert (len(hub.asked), waits) == (11, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_secret_is_told_to_the_host_it_is_for_and_no_other(hub, url, part, host):
    """Another port is another host's too."""
    with FakeHub().listening() as other:
        there = other.put("b/file", DATA).replace("127.0.0.1", host)
        hub.answer = redirect(there)
        with Client({"authorization": "Bearer secret"}) as client:
            client.download(url, part, len(DATA))
        assert_agrees(part, DATA)
        assert hub.asked[0].headers["authorization"] == "Bearer secret"
        assert [asked.path for asked in other.asked] == ["b/file"]
        assert "secret" not in str(other.asked)


def test_a_client_cannot_be_told_to_take_encoded_bodies(hub, url, part):
    with Client({"Accept-Encoding": "gzip", "User-Agent": "mine"}) as client:
        client.download(url, part, len(DATA))
    assert (hub.asked[0].headers["accept-encoding"], hub.asked[0].headers["user-agent"]) == ("identity", "mine")


# --- Bodies that are not the file


def gzipped(stop: int | None = None, length: bool = True) -> Answer:
    def answer(exchange: Exchange, data: bytes) -> None:
        body = gzip.compress(data)
        exchange.head(200, Content_Encoding="gzip", Content_Length=len(body) if length else None, ETag=etag_of(data))
        exchange.body(body[:stop])

    return answer


@pytest.mark.parametrize("length", [True, False])
def test_an_encoded_body_is_the_file_all_the_same(hub, url, part, length):
    hub.answer = gzipped(length=length)
    download(url, part)
    assert_agrees(part, DATA)


def test_an_encoded_body_that_breaks_is_never_appended_to(hub, tmp_path, waits):
    """What is here is decoded, what a server counts is not."""
    data = random.Random(4).randbytes(400_000)
    url = hub.put("a/random", data)

    def ranges_of_the_encoded(exchange: Exchange, data: bytes) -> None:
        serving(Content_Encoding="gzip")(exchange, gzip.compress(data))

    hub.answer = in_turn(gzipped(stop=300_000), ranges_of_the_encoded, gzipped())
    with Part(tmp_path / "part", PIN) as part:
        download(url, part, len(data))
        assert_agrees(part, data)
    assert "if-range" not in hub.asked[1].headers


def test_a_body_that_is_not_encoded_as_it_says_is_refused(hub, url, part):
    hub.answer = serving(Content_Encoding="gzip")
    assert refused(url, part).startswith("ContentDecodingError: ")


def test_an_encoded_body_that_grows_is_cut_off(hub, part, url):
    hub.files["a/file"] = bytes(200 << 20)
    tracemalloc.start()
    try:
        hub_body = gzip.compress(hub.files["a/file"], 1)
        hub.answer = lambda exchange, data: (
            exchange.head(200, Content_Encoding="gzip", Content_Length=len(hub_body)),
            exchange.body(hub_body),
        )
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert refused(url, part, kind=WrongBytes) == "more bytes came than the file has"
        assert tracemalloc.get_traced_memory()[1] - before < 16 << 20
    finally:
        tracemalloc.stop()
    assert part.length <= len(DATA)


def test_a_body_without_an_end_is_cut_off(hub, url, part):
    hub.answer = endless
    assert refused(url, part, kind=WrongBytes) == "more bytes came than the file has"
    assert part.length <= len(DATA)


def test_a_rest_without_an_end_is_cut_off(hub, url, part):
    begin(part, url)

    def rest(exchange: Exchange, data: bytes) -> None:
        exchange.head(206, Content_Range=f"bytes {HALF}-{len(data) - 1}/{len(data)}")
        while True:
            exchange.body(data)

    hub.answer = rest
    assert refused(url, part, kind=WrongBytes) == "more bytes came than the file has"
    assert part.length <= len(DATA)


def test_a_body_of_unknown_size_has_an_end_too(hub, url, part, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_UNKNOWN", 300_000)
    hub.answer = endless
    refused(url, part, None, WrongBytes)
    assert part.length <= 300_000


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 1, 10**15])
def test_a_file_of_another_size_is_refused_before_a_byte_of_it_is_kept(hub, url, part, size):
    assert refused(url, part, size, WrongBytes) == f"expected {size} bytes, it offers {len(DATA)}"
    assert (part.length, len(hub.asked)) == (0, 1)


def test_a_file_of_unknown_size_that_is_too_large_is_refused_before_a_byte_of_it_is_kept(hub, url, part, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_UNKNOWN", len(DATA) - 1)
    assert refused(url, part, None, WrongBytes) == f"expected at most {len(DATA) - 1} bytes, it offers {len(DATA)}"
    assert (part.length, len(hub.asked)) == (0, 1)


def test_a_page_instead_of_the_file_is_refused(hub, url, part):
    hub.answer = page
    assert refused(url, part, kind=WrongBytes) == f"expected {len(DATA)} bytes, it offers 6"


def test_bytes_of_the_right_length_are_for_whoever_asked_to_judge(hub, url, part):
    hub.answer = lambda exchange, data: serve(exchange, OTHER)
    download(url, part)
    assert_agrees(part, OTHER)
    assert part.sha256.hexdigest() == hashlib.sha256(OTHER).hexdigest()


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_body_in_chunks(hub, url, part, waits, size):
    """No length stands above it, but its end is told from a break."""

    def chunked(exchange: Exchange, data: bytes, whole: bool = True) -> None:
        exchange.protocol_version = "HTTP/1.1"
        exchange.close_connection = True
        exchange.head(200, Transfer_Encoding="chunked", ETag=etag_of(data))
        exchange.body(b"%x\r\n" % len(data) + (data + b"\r\n0\r\n\r\n" if whole else data[:HALF]))

    hub.answer = in_turn(lambda exchange, data: chunked(exchange, data, whole=False), chunked)
    download(url, part, size)
    assert_agrees(part, DATA)
    assert len(hub.asked) == 2


@pytest.mark.parametrize("size", [b"zz", b"-5", b"", b"\0" * 70_000, b"f" * 40, b"5;" + b"x" * 70_000], ids=len)
def test_chunks_that_make_no_sense_are_survived(hub, url, part, waits, size):
    def senseless(exchange: Exchange, data: bytes) -> None:
        exchange.protocol_version = "HTTP/1.1"
        exchange.close_connection = True
        exchange.head(200, Transfer_Encoding="chunked")
        exchange.body(b"a\r\n" + data[:10] + b"\r\n" + size + b"\r\n" + data)

    hub.answer = in_turn(senseless, serve)
    try:
        download(url, part)
    except WrongBytes:  # of a chunk without an end
        assert_agrees(part)
    else:
        assert_agrees(part, DATA)


# --- Room


@pytest.fixture
def free(monkeypatch) -> SimpleNamespace:
    """How many bytes the disk has left."""
    disk = SimpleNamespace(total=10**12, used=0, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    return disk


@pytest.mark.parametrize("size", [len(DATA), None], ids=["known size", "unknown size"])
def test_room_is_looked_for_before_a_byte_is_written(hub, url, part, free, size):
    free.free = len(DATA) + transfer.SPARE_BYTES - 1
    text = refused(url, part, size, StoreError)
    assert text.startswith(
        f"{part.path.parent}: 17 MB are needed on this disk, 17 are free; make room, or name another"
    )
    assert "cache_dir=" in text
    assert part.length == 0
    free.free += 1
    download(url, part, size)
    assert_agrees(part, DATA)


def test_room_is_needed_only_for_what_is_not_here_yet(url, part, free):
    begin(part, url)
    free.free = len(DATA) - HALF + transfer.SPARE_BYTES
    download(url, part)
    assert_agrees(part, DATA)


def test_a_server_cannot_ask_for_more_room_than_the_file_needs(hub, url, part, free):
    """It says that the whole has a huge size: that is its fault, not the disk's."""
    begin(part, url)
    hub.answer = serving(Content_Range=f"bytes {HALF}-{len(DATA) - 1}/{10**15}")
    refused(url, part, kind=WrongBytes)


# --- Spans and small pieces


SPAN = (100, 3000)


def test_a_span_is_only_that_part_of_the_file(hub, url, part):
    download(url, part, None, span=SPAN)
    assert_agrees(part, DATA[100:3100])
    assert ([asked.range for asked in hub.asked], hub.sent) == (["bytes=100-3099"], 3000)


def test_a_span_that_breaks_is_gone_on_with(hub, url, part, waits):
    hub.answer = in_turn(serving(stop=100 + PIECE), serve)
    download(url, part, None, span=SPAN)
    assert_agrees(part, DATA[100:3100])
    assert [asked.range for asked in hub.asked] == ["bytes=100-3099", f"bytes={100 + PIECE}-3099"]
    assert hub.asked[1].headers["if-range"] == etag_of(DATA)
    assert hub.sent == 3000


def test_a_span_of_a_server_without_ranges_is_refused_before_the_file_is_read(hub, url, part):
    hub.answer = without_ranges
    with pytest.raises(NoRanges):
        download(url, part, None, span=SPAN)
    assert part.length == 0


def test_a_span_of_another_version_begins_again(hub, url, part, waits):
    """A server that has another answers If-Range with all of it, which does not mean that it knows no ranges."""
    part.write(b"x" * 1000)
    part.is_from(url, '"of yesterday"')
    download(url, part, None, span=SPAN)
    assert_agrees(part, DATA[100:3100])


def test_a_span_beyond_the_end_is_not_asked_for_again_and_again(hub, url, part, waits):
    with pytest.raises(Unavailable):
        download(url, part, None, span=(100, 1 << 32))
    assert len(hub.asked) <= 2 * transfer.TRIES
    assert hub.sent <= transfer.TRIES * len(DATA)


def test_a_span_of_a_file_that_is_larger_than_any_we_would_take_whole(hub, url, part):
    """Of an archive of many checkpoints one member."""
    total = transfer.LARGEST_UNKNOWN + 1
    hub.answer = serving(Content_Range=f"bytes 100-3099/{total}")
    download(url, part, None, span=SPAN)
    assert_agrees(part, DATA[100:3100])


@pytest.mark.parametrize(("first", "length"), [(0, 1), (0, 100), (5000, 240), (len(DATA) - 10, 100)])
def test_a_small_piece(hub, url, first, length):
    with Client() as client:
        assert client.read(url, first, length) == (DATA[first : first + length], len(DATA))
    assert hub.asked[0].range == f"bytes={first}-{first + length - 1}"


def test_a_small_piece_that_breaks_is_read_again(hub, url, waits):
    hub.answer = in_turn(serving(stop=50), fail(503), serve)
    with Client() as client:
        assert client.read(url, 0, 100) == (DATA[:100], len(DATA))
    assert len(waits) == 2


@pytest.mark.parametrize(
    "answer", [without_ranges, fail(416), serving(Content_Range=None), serving(Content_Range="bytes 0-99/*")]
)
def test_no_small_piece_without_ranges(hub, url, answer):
    hub.answer = answer
    with Client() as client, pytest.raises(NoRanges):
        client.read(url, 0, 100)
    assert len(hub.asked) == 1


def test_another_piece_than_the_one_asked_for_is_not_taken(hub, url, waits):
    def shifted(exchange: Exchange, data: bytes) -> None:
        exchange.head(206, Content_Length=100, Content_Range=f"bytes 1-100/{len(data)}")
        exchange.body(data[1:101])

    hub.answer = shifted
    with Client() as client, pytest.raises(Unavailable, match="asked for 100 bytes from 0 on, got 100 from 1 on"):
        client.read(url, 0, 100)


def test_more_than_the_piece_asked_for_is_not_read(hub, url):
    def generous(exchange: Exchange, data: bytes) -> None:
        exchange.head(206, Content_Range=f"bytes 0-99/{len(data)}")
        while True:
            exchange.body(data)

    hub.answer = generous
    with Client() as client, pytest.raises(WrongBytes):
        client.read(url, 0, 100)


# --- The bar


class Bar:
    """What a progress bar was told."""

    def __init__(self) -> None:
        self.total, self.n, self.states = None, 0, []

    def refresh(self) -> None:
        self.states.append((self.n, self.total))

    def update(self, count: int) -> None:
        self.n += count


@pytest.mark.parametrize("size", [len(DATA), None], ids=["known size", "unknown size"])
def test_a_bar_shows_what_is_here_of_what_there_will_be(hub, url, part, waits, size):
    bar = Bar()
    begin(part, url, PIECE)
    hub.answer = in_turn(serving(stop=HALF), serve)
    download(url, part, size, bar=bar)
    assert bar.states == [(PIECE, len(DATA)), (HALF, len(DATA))]
    assert bar.n == len(DATA)


def test_a_bar_of_a_span_is_about_the_span(url, part):
    bar = Bar()
    download(url, part, None, span=SPAN, bar=bar)
    assert (bar.n, bar.total) == (3000, 3000)


def test_where_the_part_lies_is_all_that_is_written(url, tmp_path):
    before = set(Path(tmp_path).iterdir())
    with Part(tmp_path / "part", PIN) as part:
        download(url, part)
    assert {path.name for path in set(Path(tmp_path).iterdir()) - before} == {"part", "part.json"}
