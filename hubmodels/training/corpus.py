"""Sentences -> token ids in a file that is mapped, made once for a text, a vocabulary and options.

    DIGEST/ids.npy          [tokens] uint16, or int32 for a vocabulary that needs it
        sentences.npy       [sentences + 1] int64: where each begins in ids, and the end
        documents.npy       [documents + 1] int64: where each begins in sentences, and the end
        about.json          what they were made of, how much they are, and the size of each file

The digest is of the bytes of the text and of the vocabulary: neither, once edited, meets ids that it did not make.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..store.digests import sha256_of
from ..store.place import sync_directory
from ..tokenizers import END_OF_TEXT, SEP, BytePairTokenizer, Tokenizer
from .arrays import MappedArray, array_file
from .text import TextOptions, kind_of, read_sentences

VERSION = 1  # of what is in a directory: another one does not read what this one wrote
ABOUT = "about.json"
PART = 1 << 19  # characters that are encoded together
_SENTENCE = 64  # characters that a sentence counts for beside its own, where it is a text to the library
_JOINED = 1 << 12  # characters of sentences that are one text to the library, about
_AHEAD = 2  # parts that are encoded at once: while one becomes an array, the other has all cores


class Corpus:
    """The tokens of a text, mapped when they are first looked at. `prepare` makes one. It pickles as its directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    @classmethod
    def open(cls, directory: str | Path) -> "Corpus":
        """The one in `directory`. Raises InputError if there is none, or a part of it is missing."""
        if damage := _damage(Path(directory)):
            raise InputError(f"{directory}: expected a corpus, as `prepare` makes it: {damage}")
        return cls(Path(directory))

    @cached_property
    def about(self) -> dict[str, Any]:
        """digest, of all that follows; files, each with name, size and sha256; tokenizer, its SHA-256; options.

        tokens, sentences, documents: how many. text_bytes: of the sentences, as they were encoded, in UTF-8. dropped:
        sentences without a token, which are left out, and are counted among nothing else but text_bytes.
        """
        return json.loads((self.directory / ABOUT).read_text(encoding="utf-8"))

    @cached_property
    def ids(self) -> np.ndarray:
        """[tokens] uint16 or int32"""
        return MappedArray(self.directory / "ids.npy").rows

    @cached_property
    def sentences(self) -> np.ndarray:
        """[sentences + 1] int64, offsets into ids"""
        return MappedArray(self.directory / "sentences.npy").rows

    @cached_property
    def documents(self) -> np.ndarray:
        """[documents + 1] int64, offsets into sentences"""
        return MappedArray(self.directory / "documents.npy").rows

    def tokens(self, first: int, end: int) -> np.ndarray:
        """Ids of the sentences first … end - 1."""
        return self.ids[self.sentences[first] : self.sentences[end]]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory,)


def prepare(
    files: Iterable[str | Path],
    tokenizer: Tokenizer,
    options: TextOptions,
    cache_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Corpus:
    """The tokens of `files`, one after another, from cache_dir if they are there, else made by all cores and kept.

    A BytePairTokenizer reads each sentence with the line feed after it, and if it has an end_token_id, a document ends
    in that, as a sentence of its own. Of several processes one makes the tokens and the others wait; one that is killed
    leaves nothing that would be taken for them. overwrite: make them anew. progress: show a bar, on a terminal.
    Raises InputError for files that cannot be read or that have no token, and where nothing can be kept.
    """
    from filelock import FileLock

    options.check()
    text = _Text(files, tokenizer, options)
    cache = Path(cache_dir).expanduser()
    directory = cache / text.about["digest"]
    if not overwrite and not _damage(directory):
        return Corpus(directory)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _clear(cache)
        with FileLock(cache / _lock_of(directory.name)):
            if overwrite or _damage(directory):
                with _new(directory) as place:
                    text.write(place, progress)
    except OSError as error:
        raise InputError(f"{directory}: tokens cannot be kept there: {error}; name another cache directory") from error
    return Corpus(directory)


class _Text:
    """What is to become tokens; `about` says what it is, by digests."""

    def __init__(self, files: Iterable[str | Path], tokenizer: Tokenizer, options: TextOptions):
        self.files, self.tokenizer, self.options = [Path(file) for file in files], tokenizer, options
        if not self.files:
            raise InputError("files: expected at least one file of text, got none")
        self.stamps = [_stamp(file) for file in self.files]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_digest_of, self.files))
        described = zip(self.files, self.stamps, digests, strict=True)
        facts = {
            "files": [{"name": str(file), "size": size, "sha256": sha256} for file, (size, _), sha256 in described],
            "tokenizer": _sha256(tokenizer.inner.to_str()),
            "options": options._asdict(),
        }
        kinds = [(digest, kind_of(file)) for file, digest in zip(self.files, digests, strict=True)]
        digest = _sha256(json.dumps([VERSION, kinds, facts["tokenizer"], facts["options"]]))
        self.about: dict[str, Any] = {"version": VERSION, "digest": digest, **facts}

    def write(self, directory: Path, progress: bool) -> None:
        """Fill a directory. Raises InputError for a text that has no token, or that was edited meanwhile."""
        from tqdm import tqdm

        size = sum(size for size, _ in self.stamps)
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, disable=None if progress else True))
            encoder = _Encoder(self.tokenizer)
            writer = _Writer(stack, directory, encoder)
            for encoded in _ahead(encoder.encode, _parts(self.files, self.options, bar.update)):
                writer.add(encoded)
        if changed := [str(file) for file, stamp in zip(self.files, self.stamps, strict=True) if _stamp(file) != stamp]:
            raise InputError(f"{', '.join(changed)}: changed while it was read; prepare it again")
        if not writer.tokens:
            names = ", ".join(map(str, self.files[:9]))
            raise InputError(f"{names}: expected text of at least one token, got none, read with {self.options}")
        sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
        with open(directory / ABOUT, "w", encoding="utf-8") as file:
            json.dump({**self.about, **writer.counts(), "sizes": sizes}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


class _Part(NamedTuple):
    """Sentences that are encoded together. ends: of documents, each as how many of these sentences come before it"""

    sentences: list[str]
    ends: list[int]


class _Encoded(NamedTuple):
    """ids: of all sentences; lengths: of each; ends: as of the part; text_bytes: of all sentences in UTF-8"""

    ids: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    text_bytes: int


def _parts(files: Sequence[Path], options: TextOptions, watch: Callable[[int], Any]) -> Iterator[_Part]:
    sentences: list[str] = []
    ends: list[int] = []
    size = 0
    for file in files:
        for sentence in read_sentences(file, options, watch):
            if sentence is None:
                ends.append(len(sentences))
                continue
            sentences.append(sentence)
            size += len(sentence) + _SENTENCE
            if size >= PART:
                yield _Part(sentences, ends)
                sentences, ends, size = [], [], 0
    yield _Part(sentences, ends)


class _Encoder:
    """Sentences -> ids, on all cores: the library's threads do not hold Python's lock.

    Many sentences are one text to the library, parted by a token that it looks for before it looks at words: a text has
    a cost of its own, an eighth of the whole for sentences of English. Where that would show, each is a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.inner, self.line_end, self.end_token = tokenizer.inner, "", None
        self.separator, self.separator_id = SEP, self.inner.token_to_id(SEP)
        if isinstance(tokenizer, BytePairTokenizer):
            self.line_end, self.end_token = "\n", tokenizer.end_token_id
            self.separator, self.separator_id = END_OF_TEXT, self.end_token
        self.parts = self._keeps_apart()
        self.dtype = np.dtype(np.uint16 if max(self.inner.get_vocab().values()) < 2**16 else np.int32)

    def _keeps_apart(self) -> bool:
        """Whether what is beside the separator is to this tokenizer as a text of its own"""
        known = type(self.inner.normalizer).__name__ in ("BertNormalizer", "NoneType")
        known = known and type(self.inner.pre_tokenizer).__name__ in ("BertPreTokenizer", "ByteLevel")
        alone, parted = (self._encode([text])[0].ids for text in ("a", f"a{self.separator}a{self.separator}"))
        return known and parted == [*alone, self.separator_id] * 2

    def encode(self, part: _Part) -> _Encoded:
        texts = [sentence + self.line_end for sentence in part.sentences] if self.line_end else part.sentences
        whole = "".join(texts)
        joined = self._joined(texts, len(whole)) if self.parts and self.separator not in whole else None
        ids, lengths = joined or self._each(texts)
        return _Encoded(ids, lengths, np.array(part.ends, np.int64), len(whole.encode()))

    def _joined(self, texts: list[str], size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """ids, lengths; None if the separator came out of a text after all."""
        step = max(1, _JOINED * len(texts) // max(1, size))
        begins = range(0, len(texts), step)
        groups = [self.separator.join([*texts[begin : begin + step], ""]) for begin in begins]
        ids = self._ids(self._encode(groups))
        ends = np.flatnonzero(ids == self.separator_id)
        return (np.delete(ids, ends), np.diff(ends, prepend=-1) - 1) if len(ends) == len(texts) else None

    def _each(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._encode(texts)
        return self._ids(encodings), np.fromiter(map(len, encodings), np.int64, len(encodings))

    def _encode(self, texts: list[str]) -> list[Any]:
        return self.inner.encode_batch_fast(texts, add_special_tokens=False)

    def _ids(self, encodings: list[Any]) -> np.ndarray:
        return np.fromiter(chain.from_iterable(e.ids for e in encodings), self.dtype, sum(map(len, encodings)))


class _Writer:
    """The arrays of a corpus, written as they come."""

    def __init__(self, stack: ExitStack, directory: Path, encoder: _Encoder):
        kinds = {"ids": encoder.dtype, "sentences": np.dtype(np.int64), "documents": np.dtype(np.int64)}
        self._add = {name: stack.enter_context(array_file(directory / f"{name}.npy", kinds[name])) for name in kinds}
        self._add["sentences"](np.zeros(1))
        self._add["documents"](np.zeros(1))
        self._end_token = encoder.end_token
        self._open = 0  # sentences of a document whose end has not come yet
        self.tokens = self.sentences = self.documents = self.text_bytes = self.dropped = 0

    def add(self, encoded: _Encoded) -> None:
        """The next sentences. Those without a token are left out, and documents that have no others."""
        ids, kept = encoded.ids, encoded.lengths > 0
        lengths = encoded.lengths[kept]
        ends = np.append(0, kept.cumsum())[encoded.ends]
        ends = ends[np.diff(ends, prepend=-self._open) > 0]
        self._open = len(lengths) - int(ends[-1]) if len(ends) else self._open + len(lengths)
        if self._end_token is not None:
            ids = np.insert(ids, np.append(0, lengths.cumsum())[ends], self._end_token)
            lengths = np.insert(lengths, ends, 1)
            ends = ends + np.arange(1, len(ends) + 1)
        self._add["ids"](ids)
        self._add["sentences"](self.tokens + lengths.cumsum())
        self._add["documents"](self.sentences + ends)
        self.tokens += len(ids)
        self.sentences += len(lengths)
        self.documents += len(ends)
        self.text_bytes += encoded.text_bytes
        self.dropped += int((~kept).sum())

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("tokens", "sentences", "documents", "text_bytes", "dropped")}


def _ahead(function: Callable[[_Part], _Encoded], parts: Iterable[_Part]) -> Iterator[_Encoded]:
    """function of each, in order, by threads, while the next parts are read."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[_Encoded]] = deque()
        for part in parts:
            waiting.append(pool.submit(function, part))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _damage(directory: Path) -> str | None:
    """What is wrong with the corpus in it; None if it is whole."""
    try:
        sizes = json.loads((directory / ABOUT).read_text(encoding="utf-8"))["sizes"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{ABOUT}: {error!r}"
    found = {path.name: path.stat().st_size for path in directory.iterdir()}
    wrong = [f"{name}: {found.get(name, 0)} bytes, not {size}" for name, size in sizes if found.get(name) != size]
    return ", ".join(wrong) or None


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file"""
    with _readable(file):
        found = file.stat()
        return found.st_size, found.st_mtime_ns


def _digest_of(file: Path) -> str:
    with _readable(file):
        return sha256_of(file)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{file}: expected a file of text that can be read: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lock_of(name: str) -> str:
    return f".{name}.lock"


@contextmanager
def _new(directory: Path) -> Iterator[Path]:
    """A directory to fill. What is in it is on the disk before it gets the name of `directory`, all at once."""
    place = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    gone = place.with_suffix(".gone")
    place.mkdir()
    try:
        yield place
        sync_directory(place)
        with suppress(FileNotFoundError):
            os.rename(directory, gone)
        _rename(place, directory)
        sync_directory(directory.parent)
    finally:
        for path in (place, gone):
            shutil.rmtree(path, ignore_errors=True)


def _rename(place: Path, directory: Path) -> None:
    """Unless another process was sooner: on some file systems locks hold nobody up."""
    try:
        os.rename(place, directory)
    except OSError:
        if _damage(directory):
            raise


def _clear(cache: Path) -> None:
    """Remove what processes that were killed have left; one that lives holds the lock of its own."""
    from filelock import FileLock, Timeout

    for path in [*cache.glob(".*.partial"), *cache.glob(".*.gone")]:
        with suppress(Timeout), FileLock(cache / _lock_of(path.name.split(".")[1]), timeout=0):
            shutil.rmtree(path, ignore_errors=True)
