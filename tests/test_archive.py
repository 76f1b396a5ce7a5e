"""A member of a .zip at an address: brought without the rest, and only if it is what was pinned."""

import hashlib
import io
import random
import stat
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import FakeHub, catalog, endless, etag_of, fail, in_turn, page, serve, serving, without_ranges

from hubmodels import store
from hubmodels.errors import StoreError
from hubmodels.store import archive, transfer
from hubmodels.store.archive import download_member
from hubmodels.store.transfer import Client, Part, Unavailable, WrongBytes

MEMBER = "model/bert_model.ckpt.data"
DATA = b"".join(b"%d bottles of beer on the wall\n" % n for n in range(3000))
DEFLATED = len(zlib.compress(DATA, 6)[2:-4])
FILLER = random.Random(6).randbytes(1 << 20)
PATH = "archives/bert.zip"


def zipped(
    data: bytes = DATA,
    method: int = zipfile.ZIP_DEFLATED,
    *,
    comment: bytes = b"",
    member: str | zipfile.ZipInfo = MEMBER,
    filler: bytes = FILLER,
    into: io.RawIOBase | io.BytesIO | None = None,
) -> bytes:
    """An archive with something before and behind the member."""
    buffer = into or io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as writer:
        writer.writestr("before.bin", filler)
        writer.writestr(member, data, method, 6)
        writer.writestr("behind.bin", filler)
        writer.comment = comment
    return buffer.getvalue() if isinstance(buffer, io.BytesIO) else b""


def changed(content: bytes, **fields: tuple[str, int]) -> bytes:
    """The archive with other fields in its directory's entry of the member: (format, value)"""
    places = {"flags": 8, "method": 10, "crc": 16, "compressed": 20, "size": 24, "name": 28, "extra": 30, "offset": 42}
    begin = content.rindex(b"PK\1\2", 0, content.rindex(MEMBER.encode()))
    changed = bytearray(content)
    for field, (form, value) in fields.items():
        struct.pack_into(form, changed, begin + places[field], value)
    return bytes(changed)


def ended(content: bytes, **fields: tuple[str, int]) -> bytes:
    """The archive with other fields in the record at its end."""
    places = {"entries": 10, "size": 12, "offset": 16, "comment": 20}
    begin = content.rindex(b"PK\5\6")
    changed = bytearray(content)
    for field, (form, value) in fields.items():
        struct.pack_into(form, changed, begin + places[field], value)
    return bytes(changed)


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub().running(monkeypatch) as hub:
        yield hub


def pin_of(hub: FakeHub, content: bytes, data: bytes = DATA, member: str = MEMBER, size: bool = True):
    """Put the archive on the server; returns the pin of `data` as its member."""
    url = hub.put(PATH, content)
    return catalog.File(url, None, member, len(data) if size else None, hashlib.sha256(data).hexdigest())


def member_of(hub: FakeHub, content: bytes, work: Path, *, member: str = MEMBER, size: int | None = None) -> bytes:
    """What comes of it, unverified."""
    url = hub.put(PATH, content)
    with Client() as client, Part(work / "part", "pin") as part:
        download_member(client, url, member, part, size, work, None)
        there = part.path.read_bytes()
        assert (part.length, part.sha256.hexdigest()) == (len(there), hashlib.sha256(there).hexdigest())
        return there


def refused(hub: FakeHub, content: bytes, work: Path, kind: type[Exception] = Unavailable, **options) -> str:
    with pytest.raises(kind) as caught:
        member_of(hub, content, work, **options)
    return str(caught.value)


def refusal(file, **options) -> str:
    with pytest.raises(StoreError) as caught:
        store.fetch(file, progress=False, **options)
    return str(caught.value)


def outcome(file) -> bytes | StoreError:
    try:
        return store.fetch(file, progress=False).path.read_bytes()
    except StoreError as error:
        return error


def files_below(root: Path) -> dict[str, int]:
    """name -> size, of those that hold anything of a download"""
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.name not in ("lock", "stamp.json")
    }


# --- A member without the rest


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("size", [True, False], ids=["size known", "size unknown"])
def test_a_member_costs_little_more_than_itself(hub, method, size):
    content = zipped(method=method)
    file = pin_of(hub, content, size=size)
    path, how = store.fetch(file, progress=False)
    assert path.read_bytes() == DATA
    assert how == f"downloaded: {file.source} ({MEMBER})"
    compressed = DEFLATED if method == zipfile.ZIP_DEFLATED else len(DATA)
    assert hub.sent < compressed + 3 * (1 << 16) + 2000
    assert hub.sent < len(content) / 5
    assert all(asked.range for asked in hub.asked)
    assert store.fetch(file, progress=False) == (path, "in the store, unchanged since it was hashed")


def test_a_member_lies_under_its_archives_address_and_nothing_else_stays(hub, tmp_path):
    path = store.fetch(pin_of(hub, zipped()), cache_dir=tmp_path / "mine", progress=False).path
    host, port = hub.url.removeprefix("http://").split(":")
    assert path == tmp_path / "mine" / host / port / PATH / MEMBER
    assert files_below(tmp_path / "mine") == {str(path.relative_to(tmp_path / "mine")): len(DATA)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_server_without_ranges_gives_it_too_with_the_rest(hub, method, tmp_path):
    content = zipped(method=method)
    file = pin_of(hub, content)
    hub.answer = without_ranges
    path = store.fetch(file, cache_dir=tmp_path / "mine", progress=False).path
    assert path.read_bytes() == DATA
    assert [asked.range for asked in hub.asked] == ["bytes=0-0", None]
    assert files_below(tmp_path / "mine") == {str(path.relative_to(tmp_path / "mine")): len(DATA)}


def test_two_members_of_one_archive_do_not_share_a_place(hub):
    content = zipped()
    first, second = pin_of(hub, content), pin_of(hub, content, FILLER, "before.bin")
    assert store.fetch(first, progress=False).path.read_bytes() == DATA
    assert store.fetch(second, progress=False).path.read_bytes() == FILLER
    assert store.fetch(first, progress=False).path.read_bytes() == DATA


def test_an_empty_member(hub, tmp_path):
    assert member_of(hub, zipped(b""), tmp_path) == b""


@pytest.mark.parametrize("more", [0, 1, 257, 5000, 12_345, 100_000])
def test_the_last_bytes_are_not_forgotten_in_the_inflater(hub, tmp_path, more):
    """A few bits stand for many bytes here: all the data may be taken up when not all that it means has come out."""
    data = bytes((2 << 20) + more)
    assert member_of(hub, zipped(data), tmp_path) == data


# --- All kinds of zip


class Pipe(io.RawIOBase):
    """Where nobody can go back: sizes then follow the data."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.content += data
        return len(data)


def test_sizes_that_follow_the_data(hub, tmp_path):
    pipe = Pipe()
    zipped(into=pipe)
    with zipfile.ZipFile(io.BytesIO(pipe.content)) as written:
        assert written.getinfo(MEMBER).flag_bits & 8
    assert member_of(hub, bytes(pipe.content), tmp_path) == DATA


def test_an_archive_of_the_large_kind(hub, tmp_path, monkeypatch):
    """zip64: sizes, offsets and the end have other places."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    content = zipped()
    assert b"PK\6\6" in content
    assert member_of(hub, content, tmp_path, size=len(DATA)) == DATA


@pytest.mark.parametrize("length", [1, 1000, 65535])
def test_an_archive_with_a_comment(hub, tmp_path, length):
    comment = (b"PK\1\2, PK\3\4 and so on. " * 3000)[:length]
    assert member_of(hub, zipped(comment=comment), tmp_path) == DATA


def test_an_archive_behind_a_program_that_unpacks_it(hub, tmp_path):
    assert member_of(hub, b"#!/bin/sh\n" * 1000 + zipped(), tmp_path) == DATA


def test_a_member_that_stands_in_the_archive_twice_is_the_last_one(hub, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as writer:
        writer.writestr(MEMBER, b"old")
        with pytest.warns(UserWarning, match="Duplicate"):
            writer.writestr(MEMBER, DATA)
    assert member_of(hub, buffer.getvalue(), tmp_path) == DATA


# --- What is no plain file


def test_a_member_that_is_not_there(hub, tmp_path):
    assert refused(hub, zipped(), tmp_path, member="model/other") == "the archive has no member model/other"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR])
def test_a_member_that_is_a_link_or_a_device(hub, tmp_path, kind):
    info = zipfile.ZipInfo(MEMBER)
    info.external_attr = (kind | 0o777) << 16
    text = refused(hub, zipped(b"/etc/passwd", member=info), tmp_path)
    assert text == f"{MEMBER} is not a plain file in the archive"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("modes", [True, False], ids=["of unix", "of a system without modes"])
def test_a_member_that_is_a_directory(hub, tmp_path, modes):
    info = zipfile.ZipInfo("model/")
    info.external_attr = (stat.S_IFDIR | 0o755) << 16 if modes else 0x10
    text = refused(hub, zipped(b"", member=info), tmp_path, member="model/")
    assert text == "model/ is not a plain file in the archive"


def test_a_member_of_a_system_without_modes_is_a_plain_file(hub, tmp_path):
    info = zipfile.ZipInfo(MEMBER)
    info.create_system, info.external_attr, info.compress_type = 0, 0x20, zipfile.ZIP_DEFLATED
    assert member_of(hub, zipped(member=info), tmp_path) == DATA


@pytest.mark.parametrize("flags", [0x1, 0x41, 0x9])
def test_an_encrypted_member(hub, tmp_path, flags):
    assert "is encrypted" in refused(hub, changed(zipped(), flags=("<H", flags)), tmp_path)


@pytest.mark.parametrize("method", [1, 6, 9, 12, 14, 93, 99])
def test_a_member_compressed_in_another_way(hub, tmp_path, method):
    text = refused(hub, changed(zipped(), method=("<H", method)), tmp_path)
    assert text == f"{MEMBER} is encrypted, or compressed with method {method}"


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..\\evil", "a/../../evil", "C:\\evil"])
def test_a_name_in_an_archive_never_becomes_a_path(hub, tmp_path, name):
    """Neither of a member that is not asked for, nor, were a manifest to name it, of one that is."""
    before = set(tmp_path.parent.iterdir())
    root = tmp_path / "deep" / "work"
    root.mkdir(parents=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as writer:
        writer.writestr(name, b"evil")
        writer.writestr(MEMBER, DATA)
    assert member_of(hub, buffer.getvalue(), root) == DATA
    assert member_of(hub, buffer.getvalue(), root, member=name) == b"evil"
    assert {path.name for path in root.iterdir()} <= {"part", "part.json", "compressed", "compressed.json"}
    assert {path.name for path in tmp_path.iterdir()} <= {"deep", "hf", "torch"}
    assert set(tmp_path.parent.iterdir()) == before


# --- Bombs


def bomb(declared: int) -> bytes:
    """50 MB of zeros in 50 kB, of which the directory says that they are `declared` bytes."""
    return changed(zipped(bytes(50 << 20)), size=("<L", declared))


@pytest.mark.parametrize("declared", [0, 10, 100_000])
def test_no_more_is_inflated_than_the_archive_says(hub, tmp_path, declared):
    content = bomb(declared)
    hub.put(PATH, content)
    tracemalloc.start()
    try:
        text = refused(hub, content, tmp_path, WrongBytes)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert text == f"more than {declared} bytes come out of {MEMBER}"
    assert (tmp_path / "part").stat().st_size <= declared


def test_no_more_is_inflated_than_any_file_may_have(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST_UNKNOWN", 3 << 20)
    refused(hub, bomb(50 << 20), tmp_path, WrongBytes)
    assert (tmp_path / "part").stat().st_size <= 3 << 20


def test_a_bomb_is_inflated_in_little_memory(hub, tmp_path):
    """Where the archive tells the truth, and no size was pinned."""
    url = hub.put(PATH, bomb(50 << 20))
    tracemalloc.start()
    try:
        with Client() as client, Part(tmp_path / "part", "pin") as part:
            download_member(client, url, MEMBER, part, None, tmp_path, None)
            assert part.length == 50 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_another_size_than_the_pinned_one_is_refused_before_the_data_is_asked_for(hub, tmp_path):
    text = refused(hub, bomb(50 << 20), tmp_path, WrongBytes, size=len(DATA))
    assert text == f"expected {len(DATA)} bytes, the archive has {50 << 20} under {MEMBER}"
    assert [path.name for path in tmp_path.iterdir() if path.name == "compressed"] == []


@pytest.mark.parametrize("declared", [DEFLATED + 4_000_000, 2**32 - 2])
def test_data_that_would_end_behind_the_archive_is_not_asked_for_again_and_again(hub, tmp_path, declared):
    content = changed(zipped(), compressed=("<L", declared))
    with pytest.raises((Unavailable, StoreError)):
        member_of(hub, content, tmp_path)
    assert hub.sent < transfer.TRIES * 2 * len(content)


def test_a_size_that_no_disk_has_is_the_archives_fault_and_not_the_disks(hub, monkeypatch, tmp_path):
    """Else a person would be told to make room, and the mirrors would not be asked."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    content = bytearray(zipped())
    begin = content.rindex(b"PK\1\2", 0, content.rindex(MEMBER.encode()))
    extra = content.index(b"\1\0", begin + 46 + len(MEMBER))
    struct.pack_into("<Q", content, extra + 4 + 8, 2**62)  # the compressed size
    text = refusal(pin_of(hub, bytes(content)))
    assert "make room" not in text
    assert "could not be had" in text


def test_room_is_looked_for_before_a_byte_is_inflated(hub, monkeypatch, tmp_path):
    """For the data as it comes and for the file that it becomes."""
    room = transfer.SPARE_BYTES + DEFLATED + len(DATA) - 1
    content = zipped()

    def usage(path: Path) -> SimpleNamespace:
        there = sum(f.stat().st_size for f in tmp_path.iterdir() if f.is_file())
        return SimpleNamespace(free=room - there)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert "make room" in refused(hub, content, tmp_path, StoreError)
    assert (tmp_path / "part").stat().st_size == 0


# --- Damage


def test_a_page_instead_of_the_archive(hub, tmp_path):
    hub.answer = page
    assert refused(hub, zipped(), tmp_path).startswith("not a zip archive, or a damaged one: ")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\5\6" + bytes(17), b"<html>" * 1000, bytes(100_000)], ids=len)
def test_what_is_no_archive(hub, tmp_path, content):
    assert refused(hub, content, tmp_path).startswith("not a zip archive, or a damaged one: ")


def test_an_archive_that_is_cut_off(hub, tmp_path):
    content = zipped(filler=FILLER[:3000])
    for length in range(0, len(content), 997):
        assert "archive" in refused(hub, content[:length], tmp_path)


def test_a_directory_that_points_beside_the_member(hub, tmp_path):
    text = refused(hub, changed(zipped(), offset=("<L", 17)), tmp_path)
    assert text == f"a damaged archive: {MEMBER} is not where its directory says"


@pytest.mark.parametrize("offset", [2**32 - 2, len(FILLER) * 2 - 10])
def test_a_directory_that_points_behind_the_end(hub, tmp_path, offset):
    text = refused(hub, changed(zipped(), offset=("<L", offset)), tmp_path)
    assert "a damaged archive" in text or "damaged one" in text


def test_a_directory_that_points_before_the_beginning(hub, tmp_path):
    """The end says that the directory is further on than it is, and so everything is taken to be further back."""
    content = zipped(filler=b"")
    content = ended(content, offset=("<L", content.rindex(b"PK\5\6") + 5000))
    assert "damaged" in refused(hub, content, tmp_path)


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_a_directory_that_points_further_than_any_file_reaches(hub, tmp_path, offset, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    content = bytearray(zipped())
    begin = content.rindex(b"PK\1\2", 0, content.rindex(MEMBER.encode()))
    extra = content.index(b"\1\0", begin + 46 + len(MEMBER))
    assert struct.unpack_from("<Q", content, extra + 4 + 16)[0] < len(content)
    struct.pack_into("<Q", content, extra + 4 + 16, offset)
    assert "damaged" in refused(hub, bytes(content), tmp_path)


@pytest.mark.parametrize("total", [1 << 34, 1 << 62], ids=["16 GB", "more than there is"])
def test_a_directory_that_is_said_to_be_huge_is_not_read(hub, tmp_path, total):
    """The server says that the archive is huge, and the archive's end, that nearly all of it is its directory."""
    end = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, total - 1000, 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, total - 98, 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)

    def liar(exchange, data: bytes) -> None:
        first, last = map(int, exchange.headers["Range"].removeprefix("bytes=").split("-"))
        asked = range(first, min(last + 1, total))
        body = bytes(0 if at < total - len(end) else end[at - total + len(end)] for at in asked)
        exchange.head(206, Content_Range=f"bytes {first}-{first + len(body) - 1}/{total}", Content_Length=len(body))
        exchange.body(body)

    hub.answer = liar
    tracemalloc.start()
    try:
        refused(hub, b"", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert hub.sent < 17 << 20


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_damaged_it_is_the_file_or_an_error_of_ours(hub, tmp_path, seed):
    draw = random.Random(seed)
    content = bytearray(zipped(filler=FILLER[:500]))
    begin = content.index(MEMBER.encode()) - 30 if seed % 2 else content.index(b"PK\1\2")
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(begin, min(begin + 200, len(content)))
        content[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1 << draw.randrange(8)])
    hub.answer = serve if seed % 3 else without_ranges
    found = outcome(pin_of(hub, bytes(content), size=bool(seed % 5)))
    assert found == DATA or "could not be had" in str(found)


def test_data_that_cannot_be_inflated(hub, tmp_path):
    content = bytearray(zipped())
    content[content.index(MEMBER.encode()) + len(MEMBER)] = 0xFF
    assert refused(hub, bytes(content), tmp_path, WrongBytes).startswith(f"{MEMBER} cannot be inflated: ")


def test_wrong_bytes_are_brought_twice_and_refused(hub, tmp_path):
    other = DATA[:-2] + b"!\n"
    file = pin_of(hub, zipped(other))
    root = tmp_path / "mine"
    text = refusal(file, cache_dir=root)
    got = hashlib.sha256(other).hexdigest()
    assert f"{file.source} ({MEMBER}): expected SHA-256 {file.sha256}, got {got}, twice" in text
    assert f"curl -L -o archive.zip {file.source} && " in text
    first, length = span_of(hub)
    spans = [asked for asked in hub.asked if asked.range == f"bytes={first}-{first + length - 1}"]
    assert len(spans) == 2
    assert files_below(root) == {}


def test_wrong_bytes_by_accident_are_brought_once_more(hub):
    file = pin_of(hub, zipped())
    damaged = bytearray(hub.files[PATH])
    damaged[damaged.index(MEMBER.encode()) + len(MEMBER) + 5000] ^= 1
    answers = [4]  # requests of the first round

    def sometimes(exchange, data: bytes) -> None:
        answers[0] -= 1
        serving(ETag=None)(exchange, bytes(damaged) if answers[0] >= 0 else data)

    hub.answer = sometimes
    assert store.fetch(file, progress=False).path.read_bytes() == DATA


# --- Breaks


def span_of(hub: FakeHub) -> tuple[int, int]:
    """Where the member's data is."""
    with zipfile.ZipFile(io.BytesIO(hub.files[PATH])) as there:
        info = there.getinfo(MEMBER)
    return info.header_offset + 30 + len(MEMBER), info.compress_size


def cut_at(place: int, then: Callable) -> Callable:
    """Connections that are to bring that byte end before it; afterwards the server does as `then`."""
    cut = []

    def answer(exchange, data: bytes) -> None:
        first, last = map(int, exchange.headers["Range"].removeprefix("bytes=").split("-"))
        if not cut and first < place <= last and last - first > 1 << 16:
            cut.append(True)
            return serving(stop=place)(exchange, data)
        return (then if cut else serve)(exchange, data)

    return answer


@pytest.fixture
def big(hub, monkeypatch):
    """A member of 300 kB that cannot be compressed, in an archive of 2 MB; it comes in small pieces."""
    monkeypatch.setattr(transfer, "_CHUNK", 1000)
    data = random.Random(7).randbytes(300_000)
    return pin_of(hub, zipped(data), data), data


def test_a_break_costs_no_byte_again(hub, big):
    file, data = big
    first, length = span_of(hub)
    hub.answer = cut_at(first + 200_000, serve)
    assert store.fetch(file, progress=False).path.read_bytes() == data
    ranges = [asked.range for asked in hub.asked]
    assert f"bytes={first + 200_000}-{first + length - 1}" in ranges
    assert hub.asked[-1].headers["if-range"] == etag_of(hub.files[PATH])
    assert hub.sent < length + 3 * (1 << 16) + 2000


def test_the_next_process_goes_on_where_this_one_ended(hub, big):
    file, data = big
    first, length = span_of(hub)
    hub.answer = cut_at(first + 200_000, fail(404))
    assert "HTTP 404" in refusal(file)
    hub.answer, hub.sent = serve, 0
    assert store.fetch(file, progress=False).path.read_bytes() == data
    assert f"bytes={first + 200_000}-{first + length - 1}" in [asked.range for asked in hub.asked]
    assert hub.sent < 100_000 + 3 * (1 << 16) + 2000


def test_a_part_of_another_member_is_not_gone_on_with(hub, big):
    """The archive is another one when the next process comes; the member has the same size and another place."""
    file, data = big
    first, _ = span_of(hub)
    hub.answer = cut_at(first + 200_000, fail(404))
    refusal(file)
    hub.answer = serve
    hub.files[PATH] = zipped(data, filler=FILLER[:5000])
    assert store.fetch(file, progress=False).path.read_bytes() == data
    assert len([asked for asked in hub.asked if asked.headers.get("if-range")]) <= 1


def test_an_archive_with_a_new_name_for_its_version_is_no_obstacle(hub, big):
    """The same bytes, from another machine of the same service: If-Range then brings all of it, not the rest."""
    file, data = big
    first, _ = span_of(hub)
    hub.answer = cut_at(first + 200_000, fail(404))
    refusal(file)
    hub.answer = serving(ETag='"of another machine"')
    assert store.fetch(file, progress=False).path.read_bytes() == data


def test_an_archive_without_ranges_is_gone_on_with_nevertheless(hub, big, tmp_path):
    """From the beginning, but then it is there."""
    file, data = big
    hub.answer = in_turn(without_ranges, lambda exchange, data: exchange.head(200, Content_Length=9), without_ranges)
    assert store.fetch(file, progress=False).path.read_bytes() == data


@pytest.mark.parametrize("requests", [1, 2, 3, 4, 5])
def test_an_archive_that_changes_while_it_is_read(hub, requests):
    """Another release is put in its place: what then comes together is refused, or happens to be right."""
    data = random.Random(8).randbytes(100_000)
    file = pin_of(hub, zipped(data), data)
    later = zipped(data, comment=b"a new release", filler=FILLER[:700_001])

    def answer(exchange, data: bytes) -> None:
        serve(exchange, data if len(hub.asked) <= requests else later)

    hub.answer = answer
    found = outcome(file)
    assert found == data or "could not be had" in str(found)
    assert outcome(file) == data


def test_a_server_that_forgets_its_ranges_between_requests(hub, big):
    file, data = big
    hub.answer = lambda exchange, content: (serve if len(hub.asked) <= 3 else without_ranges)(exchange, content)
    found = outcome(file)
    assert found == data or "it gives the whole file only" in str(found)
    assert outcome(file) == data


def test_an_endless_archive(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST_UNKNOWN", 3 << 20)
    hub.answer = endless
    refused(hub, FILLER, tmp_path, WrongBytes)
    assert (tmp_path / "archive").stat().st_size <= 3 << 20
