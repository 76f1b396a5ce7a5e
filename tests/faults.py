"""The fault table: what goes wrong on the way to a file, really injected, and a judge of what the store makes of it.

Faults come from web servers on this machine, from the kernel (a full disk, a read-only one, SIGKILL), or lie in the
cache beforehand. The store runs in processes of its own, under a limit on time. It is judged by the bytes on the disk
and by what the servers counted, with no code of the store. After each fault the file is fetched once more, with the
fault gone: what loaded must be a hit, what was refused must load. test_faults.py asserts on the table, docs/faults.py
writes it down.
"""

import gzip
import hashlib
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from fault_case import NAME, SHA256, SILENCE_SECONDS, Case, Outcome, bytes_at, fetch, make_read_only, mount_disk
from fault_server import (
    DATA,
    FLIPPED,
    MOST_SECONDS,
    OTHER,
    REVISION,
    SIZE,
    Answer,
    Exchange,
    busy_until,
    chunked,
    endless,
    first,
    honest,
    no_http,
    redirect,
    redirect_once,
    reset,
    serving,
    silent,
    status,
)

PAGE = b"<!DOCTYPE html><title>Log in to the wireless network</title>"
HALF = SIZE // 2
LOST = (1.15, 1.15)  # with a connection that breaks goes what is in the buffers on the way
REST = (0.57, 0.57)
DAY = 24 * 3600
MODES = ("plain", "hub")


# --- How faults are injected

Inject = Callable[[Case], Outcome]


def answering(make: Callable[[Case], Answer]) -> Inject:
    """The server's fault."""

    def inject(case: Case) -> Outcome:
        case.site.answer = make(case)
        return case.fetch()

    return inject


def always(answer: Answer) -> Inject:
    return answering(lambda case: answer)


def at_first(fault: Answer, times: int = 1, then: Answer = honest, heads: bool = False) -> Inject:
    """heads: a hub gives it in answer to HEAD too."""
    return answering(lambda case: first(times, fault, then, ("HEAD", "GET") if heads else ("GET",)))


def damaged(damage: Callable[[Case], object]) -> Inject:
    """The file was in the store, and then this happened to it."""

    def inject(case: Case) -> Outcome:
        case.have()
        damage(case)
        return case.fetch()

    return inject


def partly(change: Callable[[Case], object] = lambda case: None, data: bytes = DATA) -> Inject:
    """Half of `data` was in the store, and then this happened."""

    def inject(case: Case) -> Outcome:
        case.have_part(data)
        change(case)
        return case.fetch()

    return inject


def killed(after: Callable[[Case], float] | None = None) -> Inject:
    """SIGKILL at the case's point of the body; after: not there, but so many seconds after its last byte."""

    def inject(case: Case) -> Outcome:
        child = case.process()
        wait = after(case) if after else 0.0
        case.site.gap = 0.0005
        case.site.alarm = (SIZE if after else case.offset, lambda: (time.sleep(wait), child.process.kill()))
        child.start(fetch, case.file, case.root, case.final)
        child.process.join(MOST_SECONDS)
        if (there := bytes_at(case.final)) not in ("nothing", "the file"):
            return Outcome("died", "SIGKILL", final=there)
        return case.fetch()

    return inject


def at_once(case: Case, count: int = 8) -> Outcome:
    """The worst of what came to so many processes."""
    children = [case.process() for _ in range(count)]
    for child in children:
        child.start(fetch, case.file, case.root, case.final)
    return max((child.result() for child in children), key=lambda outcome: outcome.kind != "loaded")


def at_once_and_one_killed(case: Case) -> Outcome:
    case.site.gap = 0.002
    downloading, begun = case.process(), Event()
    case.site.alarm = (1, begun.set)
    downloading.start(fetch, case.file, case.root, case.final)
    begun.wait(MOST_SECONDS)
    case.site.alarm = (case.offset, downloading.process.kill)
    return at_once(case, 7)


def no_space(case: Case) -> Outcome:
    case.child = case.process()
    case.child.do(mount_disk, case.root, SIZE // 2)
    case.cure.append(lambda: setattr(case, "child", None))  # the next one has the disk below
    return case.fetch()


def disk_fills_up(case: Case) -> Outcome:
    """Another program takes the rest of the disk."""
    child = case.child = case.process()
    child.do(mount_disk, case.root, 32 << 20)
    filler = Path(f"/proc/{child.process.pid}/root{case.root}/filler")  # as that process sees the disk

    def fill() -> None:
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(DATA)

    case.site.alarm = (case.offset, fill)
    case.site.gap = 0.0005  # the client takes up what is sent
    case.cure.append(filler.unlink)
    return case.fetch()


def limited(case: Case) -> Outcome:
    """The kernel lets this process write half the file."""
    case.child = case.process()
    case.child.do(resource.setrlimit, resource.RLIMIT_FSIZE, (HALF, HALF))
    case.cure.append(lambda: setattr(case, "child", None))
    return case.fetch()


def read_only(there: bool) -> Inject:
    def inject(case: Case) -> Outcome:
        child = case.child = case.process()
        child.do(mount_disk, case.root, 32 << 20)
        if there:
            case.have()
        child.do(make_read_only, case.root)
        if not there:
            case.cure.append(lambda: child.do(make_read_only, case.root, False))
        return case.fetch()

    return inject


def down(*mirrors: Answer) -> Inject:
    """Nobody listens at the source; the mirrors that the pin names answer."""

    def inject(case: Case) -> Outcome:
        case.site = case.another_site(listening=False)
        addresses = []
        for answer in mirrors:
            mirror = case.another_site()
            mirror.answer = answer
            addresses.append(f"{mirror.url}/mirror/{REVISION}/{NAME}")
        case.file = replace(case.pin_at(case.site), mirrors=tuple(addresses))
        return case.fetch()

    return inject


def down_with_users_mirror(case: Case) -> Outcome:
    case.environment["HUBMODELS_MIRROR"] = f"{case.another_site().url}/mirror"
    return down()(case)


def poisoned_and_down(case: Case) -> Outcome:
    case.have()
    flip(case)
    case.site.answer = status(500)
    return case.fetch()


def flip(case: Case) -> None:
    """One bit, with size and time of change as before."""
    before = case.final.stat()
    with open(case.final, "r+b") as file:
        file.write(FLIPPED[:1])
    os.utime(case.final, ns=(before.st_atime_ns, before.st_mtime_ns))


def become_directory(case: Case) -> None:
    case.final.unlink()
    case.final.mkdir()
    case.cure.append(case.final.rmdir)


def become_link(case: Case, to: Path) -> None:
    case.final.unlink()
    case.final.symlink_to(to)


def become_link_to_other(case: Case) -> None:
    (case.folder / "other").write_bytes(OTHER)
    become_link(case, case.folder / "other")


def garble_state(case: Case) -> None:
    for path in (case.root / ".hubmodels").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00{garbage")


def dated(seconds: float) -> Callable[[Case], None]:
    """Everything in the store says that it was changed so long from now."""

    def change(case: Case) -> None:
        when = time.time() + seconds
        for path in case.root.rglob("*"):
            os.utime(path, (when, when))

    return change


def change_part(change: Callable[[bytes], bytes]) -> Callable[[Case], None]:
    def do(case: Case) -> None:
        for part in case.parts():
            part.write_bytes(change(part.read_bytes()))

    return do


def part_of_another_pin(case: Case) -> Outcome:
    pin = case.file
    case.file = replace(pin, sha256=hashlib.sha256(OTHER).hexdigest())
    case.have_part(OTHER)
    case.file = pin
    return case.fetch()


def users_copy(data: bytes, change: Callable[[Path], object] | None = None) -> Inject:
    """In the user's own cache; change: what its owner does to it after it was adopted. It is left as it is."""

    def inject(case: Case) -> Outcome:
        path = case.lay_out(data)
        if change:
            case.have()
            change(path)
        before = path.read_bytes() if path.exists() else None
        outcome = case.fetch()
        after = path.read_bytes() if path.exists() else None
        return outcome if before == after else replace(outcome, kind="raised", text="the user's own file was changed")

    return inject


def dangling_link(case: Case) -> Outcome:
    path = case.lay_out(b"")
    path.unlink()
    path.symlink_to(case.folder / "nothing")
    return case.fetch()


def slow_drip(case: Case) -> Outcome:
    """Never silent for as long as the limit, though much longer in all."""
    case.site.piece, case.site.gap = SIZE // 7, 0.4 * SILENCE_SECONDS
    return case.fetch()


def to_another_host(case: Case) -> Outcome:
    there = case.another_site(host="127.0.0.2")
    case.site.answer = redirect(lambda exchange: there.url + exchange.path)
    return case.fetch()


def poisoned_at_once(case: Case) -> Outcome:
    case.have()
    flip(case)
    return at_once(case)


def another_range(case: Case) -> Outcome:
    case.site.answer = first(1, serving(stop=HALF), then=first(1, serving(begin=HALF // 2)))
    return case.fetch()


def lie_about_range(case: Case) -> None:
    case.site.answer = first(1, serving(OTHER))


def other_size(case: Case) -> None:
    case.site.answer = serving(DATA + b"!")


def not_satisfiable(case: Case) -> None:
    case.site.answer = first(1, status(416))


def short_lived(exchange: Exchange) -> None:
    serving(stop=exchange.asked.start + 100_000)(exchange)


def reset_mid_stream(case: Case) -> Outcome:
    case.site.answer = first(1, serving(stop=case.offset, ending=reset))
    return case.fetch()


def no_versions(case: Case) -> None:
    """The server takes no notice of If-Range."""
    case.site.knows_versions = False


# --- The table


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    words: what the error must say; None: the file must load in spite of it. points: more than once, where that is
    in the file at random. For plain and hub: most, how many times the file may be sent; waits, the least and the most
    seconds of the longest wait.
    """

    name: str
    inject: Inject
    words: tuple[str, ...] | None = None
    most: tuple[float, float] = (1.0, 1.0)
    waits: tuple[tuple[float, float], tuple[float, float]] = ((0, 600), (0, 600))
    points: bool = False
    modes: tuple[str, ...] = MODES


def of_body() -> Iterator[Fault]:
    """What comes is not the file, or not all of it."""
    gzipped = gzip.compress(DATA)
    yield Fault("nothing is wrong", always(honest))
    yield Fault("truncated body", at_first(serving(stop=HALF)), most=LOST)
    yield Fault("truncated body, each time", always(serving(stop=HALF)), ("6 tries in a row",), most=(1, 2))
    yield Fault("truncated body, after 100 kB each time", always(short_lived), most=(2, 2))
    yield Fault("empty body", always(serving(b"")), (f"expected {SIZE} bytes",))
    yield Fault("flipped byte", at_first(serving(FLIPPED)), most=(2, 2))
    yield Fault("flipped byte, each time", always(serving(FLIPPED)), (f"expected SHA-256 {SHA256}", "got"), most=(2, 2))
    yield Fault(
        "HTML instead of bytes", always(serving(PAGE, fields={"Content-Type": "text/html"})), (f"{SIZE} bytes",)
    )
    yield Fault("gzip'd body", at_first(serving(gzipped, fields={"Content-Encoding": "gzip"})), most=(1.01, 1.01))
    yield Fault("gzip'd body that does not say so", always(serving(gzipped)), ("bytes",), most=(2.01, 2.01))


def of_length() -> Iterator[Fault]:
    """The server does not say how long the file is, or not the truth."""
    for name, length in {"too large": SIZE + 100, "too small": SIZE - 100}.items():
        lie = serving(fields={"Content-Length": length})
        yield Fault(f"wrong length header: {name}", always(lie), (str(length),), most=(2, 8))
    yield Fault("wrong length header: 5000 digits", always(serving(fields={"Content-Length": "9" * 5000})))
    yield Fault("no length header", always(serving(fields={"Content-Length": None})))
    yield Fault("chunked body", always(chunked()))
    yield Fault("chunked body, truncated", at_first(chunked(HALF)), most=LOST)
    yield Fault("endless body", always(endless), ("bytes",), most=(3, 3))


def of_connection() -> Iterator[Fault]:
    yield Fault("connection refused", down(), ("refused",))
    yield Fault("reset mid-stream", reset_mid_stream, most=(LOST[0], 2), points=True)
    yield Fault("reset before the first byte", always(reset), ("reset",))
    yield Fault("silence", at_first(silent))
    yield Fault("silence, each time", always(silent), ("timed out",))
    yield Fault("silence mid-stream", at_first(serving(stop=HALF, ending=silent)), most=LOST)
    yield Fault("slow drip", slow_drip)
    yield Fault("another protocol", always(no_http), ("SSH",))


def of_status() -> Iterator[Fault]:
    """The server says no, or where else, or when."""
    soon, in_a_day, nonsense = ({"Retry-After": value} for value in (7, DAY, f"Mon, 01 Jan {'9' * 12} 00:00:00 GMT"))
    yield Fault("429 with Retry-After", at_first(status(429, soon), 3, heads=True), waits=((7, 9), (7, 9)))
    yield Fault("503 with Retry-After of a day", always(status(503, in_a_day)), ("503",))
    yield Fault("503 with Retry-After of nonsense", always(status(503, nonsense)), ("503",))
    for name, skew in {"a day ahead": DAY, "a day behind": -DAY}.items():
        yield Fault(
            f"clock skew: the server's is {name}, Retry-After as a date",
            at_first(busy_until(7, skew), 3, heads=True),
            waits=((6, 9), (0, 9)),  # huggingface_hub does not read dates, and asks again by its own rule
        )
    yield Fault("500 then fine", at_first(status(500), 2, heads=True))
    for code in (500, 403, 404):
        yield Fault(f"{code}{', each time' if code == 500 else ''}", always(status(code)), (str(code),))
    yield Fault("redirect", always(redirect_once))
    yield Fault("redirect loop", always(redirect(lambda exchange: exchange.path)), ("redirects",))
    yield Fault("redirect to a file", always(redirect(lambda _: "file:///etc/passwd")), ())
    yield Fault("redirect to no address", always(redirect(lambda _: "http://[")), ())
    yield Fault("redirect to http on another host", to_another_host, ("plain http",), modes=("plain",))
    yield Fault("redirect to http on another host", to_another_host, modes=("hub",))  # as it does for its storage


def of_range() -> Iterator[Fault]:
    """The second half is asked for."""
    yield Fault("Range is ignored", at_first(serving(stop=HALF), then=serving(begin=0)), most=(1.5, 1.5))
    yield Fault("another range than asked for", another_range, most=(2.3, 2.3))
    yield Fault("another range, said to be the one asked for", partly(lie_about_range), most=(1.6, 1.6))
    yield Fault("range of a file of another size", partly(other_size), (f"{SIZE + 1}",), most=(2, 2))
    yield Fault("range not satisfiable", partly(not_satisfiable))


def of_mirrors() -> Iterator[Fault]:
    yield Fault("source down, a mirror takes over", down(honest))
    yield Fault("source down, the user's own mirror takes over", down_with_users_mirror)
    yield Fault("source down, one mirror has wrong bytes", down(serving(FLIPPED), honest), most=(3, 3))
    yield Fault("source down, all mirrors have", down(serving(FLIPPED)), ("refused", SHA256), most=(2, 2))


def of_machine() -> Iterator[Fault]:
    yield Fault("disk full: too small from the beginning", no_space, ("free",), most=(0, 0))
    yield Fault("disk full: in the middle", disk_fills_up, ("make room",))
    yield Fault("disk full: no file may be larger (ulimit -f)", limited, ("too large",), most=(1, 2))
    yield Fault("read-only cache, the file in it", read_only(True), most=(0, 0))
    yield Fault("read-only cache, without the file", read_only(False), ("cannot be written",), most=(0, 0))
    yield Fault("SIGKILL mid-stream, then restart", killed(), most=(1.5, 2), points=True)
    after = killed(lambda case: 0.02 * case.point)
    yield Fault("SIGKILL after the last byte, then restart", after, most=(1, 2), points=True)
    yield Fault("8 processes at once", at_once, points=True)
    yield Fault("8 processes at once, the downloading one killed", at_once_and_one_killed, most=(1.5, 2))
    yield Fault("clock skew: the cache is from the future", damaged(dated(365 * DAY)), most=(0, 0))
    yield Fault("clock skew: the cache is from the past", damaged(dated(-20000 * DAY)), most=(0, 0))


def of_part() -> Iterator[Fault]:
    """Half a file is there already."""
    yield Fault("partial from this version", partly(), most=REST)
    yield Fault("partial from the future", partly(dated(365 * DAY)), most=REST)
    yield Fault("partial from another version, by its pin", part_of_another_pin)
    yield Fault("partial from another version, by its ETag", partly(data=OTHER))
    yield Fault("partial from another version, unnoticed by the server", partly(no_versions, OTHER), most=(1.6, 1.6))
    yield Fault("partial with a flipped byte", partly(change_part(lambda part: FLIPPED[: len(part)])), most=(1.6, 1.6))
    yield Fault("partial longer than the file", partly(change_part(lambda part: DATA + part)))


def of_cache() -> Iterator[Fault]:
    poison = "poisoned cache hit:"
    yield Fault(f"{poison} flipped byte", damaged(flip))
    yield Fault(f"{poison} truncated", damaged(lambda case: os.truncate(case.final, HALF)))
    yield Fault(f"{poison} another version", damaged(lambda case: case.final.write_bytes(OTHER)))
    yield Fault(f"{poison} link to another file", damaged(become_link_to_other))
    yield Fault(f"{poison} link to nothing", damaged(lambda case: become_link(case, case.folder / "nothing")))
    yield Fault(f"{poison} directory", damaged(become_directory), (NAME,), most=(0, 0))
    yield Fault(f"{poison} flipped byte, and the source is down", poisoned_and_down, ("500", SHA256), most=(0, 0))
    yield Fault(f"{poison} flipped byte, 8 processes at once", poisoned_at_once, points=True)
    yield Fault("state of the store garbled", damaged(garble_state), most=(0, 0))
    yield Fault("state of the store gone", damaged(lambda case: shutil.rmtree(case.root / ".hubmodels")), most=(0, 0))
    yield Fault("user's own cache: right bytes", users_copy(DATA), most=(0, 0))
    yield Fault("user's own cache: wrong bytes", users_copy(FLIPPED))
    yield Fault("user's own cache: link to nothing", dangling_link)
    yield Fault(
        "user's own cache: changed after it was adopted", users_copy(DATA, lambda path: path.write_bytes(FLIPPED))
    )
    yield Fault("user's own cache: gone after it was adopted", users_copy(DATA, Path.unlink))


FAULTS = tuple(
    fault
    for kind in (of_body, of_length, of_connection, of_status, of_range, of_mirrors, of_machine, of_part, of_cache)
    for fault in kind()
)


@dataclass(frozen=True)
class Result:
    """complaints: why this is a failure. sent: times the file. again: with the fault gone."""

    outcome: Outcome
    requests: int
    sent: float
    again: Outcome
    sent_again: float
    complaints: tuple[str, ...]

    @property
    def wrong_loads(self) -> int:
        return sum(outcome.kind == "loaded" and not outcome.right for outcome in (self.outcome, self.again))


def complaints_on(outcome: Outcome, words: tuple[str, ...] | None) -> list[str]:
    """Whether the final state is correct or the error clear."""
    found = []
    if outcome.kind == ("refused" if words is None else "loaded") or outcome.kind in ("raised", "hung", "died"):
        found.append(f"{outcome.kind}: {outcome.text}")
    if outcome.kind == "loaded" and not outcome.right:
        found.append("WRONG LOAD")
    if outcome.final == "WRONG BYTES":
        found.append("wrong bytes under the final name")
    if outcome.kind == "refused":
        missing = [word for word in (*(words or ()), "curl") if word.lower() not in outcome.text.lower()]
        found += [f"the error does not say {word!r}: {outcome.text}" for word in missing]
    return found


def run(fault: Fault, mode: str, folder: Path, point: float = 0.5) -> Result:
    """Inject it, let it be, and judge."""
    with Case(mode, folder, point) as case:
        outcome = fault.inject(case)
        requests, sent = case.requests, case.sent
        complaints = complaints_on(outcome, fault.words)
        most, (shortest, longest) = fault.most[MODES.index(mode)], fault.waits[MODES.index(mode)]
        if sent > most:
            complaints.append(f"sent {sent:.2f} times the file, expected at most {most}")
        if not shortest <= max(outcome.waits, default=0) <= longest:
            complaints.append(f"waited {outcome.waits} s, expected {shortest} to {longest}")
        case.heal()
        case.forget()
        again = case.fetch()
        complaints += [f"with the fault gone: {text}" for text in complaints_on(again, None)]
        if outcome.kind == "loaded" and case.sent:
            complaints.append("with the fault gone: loaded once more, from the server")
        return Result(outcome, requests, sent, again, case.sent, tuple(complaints))


def points(fault: Fault, mode: str, count: int) -> list[float]:
    """Where in the file it happens: at `count` random places, the same each time, or in the middle."""
    numbers = random.Random(f"{fault.name} {mode}")
    return [numbers.random() for _ in range(count)] if fault.points else [0.5]
