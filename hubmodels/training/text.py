"""Files of text -> sentences, one after another, in memory that does not grow with the text.

A file is text, or by its name .jsonl; either also as .gz or .xz; always UTF-8. A line ends in a line feed, with or
without a carriage return before it, and in nothing else: U+2028 and its like, which `str.splitlines` also cuts at, are
white space inside a line.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError

FORMS = ("sentences", "paragraphs", "lines", "running")
LONGEST = 1 << 20  # bytes of a line, about: a longer one is read as several
LARGEST = 100 << 20  # bytes of an object in a .jsonl, which is in memory as a whole
_BUFFER = 1 << 18  # bytes

_OPENING, _CLOSING = map(re.escape, ("\"'“‘«([（「『《【", "\"'”’»)]）」』》】"))
_LOWER = "a-zß-öø-ÿα-ωа-џ"
# What ends a sentence: stops, and the quotes that close behind them. Chinese ones anywhere; others before white space,
# unless it goes on in lower case ("Where?" he asked), or the stop belongs to a title.
_SENTENCE_END = re.compile(
    rf"[.!?…。！？]++(?:(?<=[。！？])[{_CLOSING}]*"
    rf"|(?<!\b(?:Mr|Ms|Dr|St)\.)(?<!\bMrs\.)[{_CLOSING}]*(?=\s)(?!\s+[{_OPENING}]*[{_LOWER}]))"
)


class TextOptions(NamedTuple):
    """How sentences and documents are found in a file.

    form: sentences, each line is one, and a blank line ends a document; paragraphs, the same, but a line is cut into
    sentences; lines, each is a document of one sentence; running, lines up to a blank one are joined and cut into
    sentences, and a file is one document.
    key: of a .jsonl, where each line is an object, that which has the text. It is one document, whatever is blank in
    it; or with form lines as many as it has lines.
    separator: a regular expression; a line in which it is found ends a document, and is itself left out.
    share: of the documents that are held out, from 0; which ones depends on the first sentence of each alone, so that
    those which begin alike are all on one side. held_out: read only those; else only the others.
    """

    form: str = "sentences"
    key: str = "text"
    separator: str | None = None
    share: float = 0.0
    held_out: bool = False

    def check(self) -> None:
        """Raises InputError for what cannot be."""
        if self.form not in FORMS:
            raise InputError(f"form = {self.form!r}: expected {', '.join(FORMS[:-1])} or {FORMS[-1]}")
        if not 0 <= self.share < 1:
            raise InputError(f"share = {self.share}: expected 0 or more, and less than 1")
        if self.held_out and not self.share:
            raise InputError("held_out: expected a share of the documents to hold out, got share = 0")
        try:
            re.compile(self.separator or "")
        except re.error as error:
            raise InputError(f"separator = {self.separator!r}: expected a regular expression: {error}") from None


def find_files(patterns: Iterable[str | Path]) -> list[Path]:
    """The files that names and globs, also ** and ~, stand for: sorted, each once.

    Raises InputError for one that stands for none.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        place = os.path.expanduser(pattern)
        names = [place] if os.path.isfile(place) else filter(os.path.isfile, glob.iglob(place, recursive=True))
        files = {os.path.realpath(name): Path(name) for name in names}
        if not files:
            raise InputError(f"{pattern}: expected a file, or a pattern of some like texts/**/*.txt; there is none")
        found = {**files, **found}
    return sorted(found.values())


def kind_of(path: str | Path) -> tuple[bool, str]:
    """What a file is by its name: whether it has objects, and .gz, .xz or nothing"""
    name = str(path).lower()
    packed = next((suffix for suffix in _OPENERS if suffix and name.endswith(suffix)), "")
    return name.removesuffix(packed).endswith(".jsonl"), packed


def read_sentences(
    path: str | Path, options: TextOptions, watch: Callable[[int], None] | None = None
) -> Iterator[str | None]:
    """Each sentence of a file, as it stands there; None after the last of a document. The file's end ends one.

    A line of more than 1 MB is read as several, cut at white space. watch: is told of bytes of the file that were read.
    Raises InputError for options that cannot be, and where the file cannot be read: it names the line and the byte.
    """
    options.check()
    return _whole_documents(_read(Path(path), options, watch), options)


def _whole_documents(sentences: Iterable[str | None], options: TextOptions) -> Iterator[str | None]:
    """Those that are asked for; without empty sentences and empty documents"""
    inside = wanted = False
    for sentence in sentences:
        if sentence:
            if not inside:
                inside, wanted = True, not options.share or _is_held_out(sentence, options.share) == options.held_out
            if wanted:
                yield sentence
        elif sentence is None:
            if inside and wanted:
                yield None
            inside = False


def _is_held_out(first: str, share: float) -> bool:
    number = int.from_bytes(hashlib.sha256(first.encode()).digest()[:8])
    return number < share * 2**64


def _read(path: Path, options: TextOptions, watch: Callable[[int], None] | None) -> Iterator[str | None]:
    has_objects, _ = kind_of(path)
    with _opened(path, watch) as file:
        if has_objects:
            for where, text in _objects(file, path, options.key):
                yield from _sentences(_lines(io.BytesIO(text), where), options, blank="")
                yield None
        else:
            yield from _sentences(_lines(file, str(path)), options, blank="" if options.form == "running" else None)
            yield None


class _Watched(io.FileIO):
    """A file that tells how many bytes of it are read"""

    watch: Callable[[int], None]

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.watch(count or 0)
        return count


_OPENERS: dict[str, Callable[[Any], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER),
    ".xz": lambda file: io.BufferedReader(lzma.LZMAFile(file), _BUFFER),  # noqa: SIM115
}


@contextmanager
def _opened(path: Path, watch: Callable[[int], None] | None) -> Iterator[io.BufferedReader]:
    """What is in it, unpacked, behind any byte order mark"""
    _, packed = kind_of(path)
    try:
        with _Watched(str(path)) as bare:
            bare.watch = watch or (lambda count: None)
            file = _OPENERS[packed](io.BufferedReader(bare, _BUFFER))
            if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: expected {packed or 'a file'} that can be read: {error}") from error


def _blocks(file: io.BufferedReader | io.BytesIO) -> Iterator[bytes]:
    """What is in it, some lines at a time; of a line of more than LONGEST a part."""
    rest = b""
    while block := file.read(_BUFFER):
        block = rest + block
        end = block.rfind(b"\n") + 1
        if not end and len(block) >= LONGEST:
            end = _place_to_cut(block)
        if end:
            yield block[:end]
        rest = block[end:]
    if rest:
        yield rest


def _place_to_cut(line: bytes) -> int:
    """Behind the last white space that has text before it, or else before the last character."""
    end = max(line.rfind(b" "), line.rfind(b"\t")) + 1
    if not line[:end].strip():
        end = len(line) - 1
        while line[end] & 0xC0 == 0x80 and end > len(line) - 4:
            end -= 1
    return end


def _lines(file: io.BufferedReader | io.BytesIO, source: str) -> Iterator[str]:
    """Without their ends. source: what errors call it"""
    number, place, is_rest = 1, file.tell(), False
    for block in _blocks(file):
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            line = number + block.count(b"\n", 0, error.start)
            raise _not_text(f"{source}: line {line}, byte {place + error.start}", block[error.start]) from None
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        if is_rest and (not lines[0] or lines[0].isspace()):
            del lines[0]  # the end of a long line is not a blank one
        yield from lines
        number, place, is_rest = number + block.count(b"\n"), place + len(block), not block.endswith(b"\n")


def _not_text(where: str, byte: int) -> InputError:
    return InputError(
        f"{where}: expected UTF-8, got the byte {byte:#04x}; convert the file, as by iconv -f LATIN1 -t UTF-8"
    )


def _objects(file: io.BufferedReader, path: Path, key: str) -> Iterator[tuple[str, bytes]]:
    """(where it stands, its text in UTF-8) of each object"""
    number = 0
    while line := file.readline(LARGEST + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > LARGEST:
            raise InputError(f"{where}: expected an object of at most {LARGEST:,} bytes on a line of its own, got more")
        if line.isspace():
            continue
        try:
            yield where, _text_of(json.loads(line.decode()), key, where).encode()
        except UnicodeDecodeError as error:
            place = file.tell() - len(line) + error.start
            raise _not_text(f"{where}, byte {place}", line[error.start]) from None
        except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
            raise InputError(f"{where}: expected an object as JSON, got {line.strip()[:40]!r}: {error}") from None


def _text_of(found: Any, key: str, where: str) -> str:
    if isinstance(found, dict) and isinstance(text := found.get(key), str):
        return text
    if isinstance(found, dict) and key not in found:
        got = f"only {', '.join(map(repr, found)) or 'nothing'}; name the one to read"
    else:
        got = f"{found.get(key) if isinstance(found, dict) else found!r:.40}"
    raise InputError(f"{where}: expected an object with text as {key!r}, got {got}")


def _sentences(lines: Iterator[str], options: TextOptions, blank: str | None) -> Iterator[str | None]:
    """None where a document ends; some may be empty. blank: what stands for a blank line, "" or None"""
    marked = _marked(lines, options.separator, blank)
    if options.form == "running":
        return _joined(marked)
    if options.form == "paragraphs":
        return (sentence for line in marked for sentence in (_split(line) if line else [line]))
    if options.form == "lines":
        return (part for line in marked for part in (line, None))
    return marked


def _marked(lines: Iterator[str], separator: str | None, blank: str | None) -> Iterator[str | None]:
    ends = re.compile(separator).search if separator else None
    for line in lines:
        if ends and ends(line):
            yield None
        else:
            yield blank if not line or line.isspace() else line


def _joined(lines: Iterator[str | None]) -> Iterator[str | None]:
    """The sentences of lines up to an empty one or None, read together."""
    held: list[str] = []
    size = 0
    for line in chain(lines, [""]):
        if line:
            held.append(line.strip())
            size += len(line)
            if size < LONGEST:
                continue
        found = _split(" ".join(held))
        held = [found.pop()] if line and len(found) > 1 else []  # the rest of it may be still to come
        size = sum(map(len, held))
        yield from found
        if line is None:
            yield None


def _split(text: str) -> list[str]:
    begin, found = 0, []
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        found.append(text[begin:end].strip())
        begin = end
    return [*found, rest] if (rest := text[begin:].strip()) else found
