"""A corpus -> the samples of an epoch: rows of tokens with what is to be learned from them.

Each sample is a function of (seed, epoch, index) and nothing else, so it does not matter who makes it, or when.
Source: Devlin 2018 §3.1; Lan 2019, arXiv 1909.11942, §3.1 (order of sentences). Google's own procedure, whose pairs
differ from these, is in google_pairs.py.
"""

from bisect import bisect_left
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import InputError
from ..tokenizers import WordPieceTokenizer
from .chance import generator
from .chunks import chunk_table, piece_end
from .corpus import Corpus
from .masking import Masker

SHORTEST = 8  # tokens in a row of a pair
_TRIES = 8  # to find a second part as long as the one it stands for
_PLACE = 2  # a purpose of chance: where the rows of an epoch of running text begin

Span = tuple[int, int]  # tokens of a corpus: the first, and the one after the last


class Sample(NamedTuple):
    """A row. labels: what stood there, -100 where that is not asked; next_sentence: 0 or 1, as the samples say."""

    ids: np.ndarray  # [S] int64
    labels: np.ndarray  # [S] int64
    token_types: np.ndarray | None = None  # [S] int64
    next_sentence: int | None = None


class Epoch(Protocol):
    """The samples of one epoch, in the order of the text."""

    @property
    def sizes(self) -> np.ndarray:
        """[n] int32, the most tokens that each sample can have"""

    def sample(self, index: int) -> Sample:
        """Number `index`, counted from 0."""


class Samples(Protocol):
    """What a run learns from. dropped: what no epoch has of the corpus: how many, by what they are."""

    dropped: dict[str, int]

    def epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0."""


class _Chunked:
    """Samples each of which is made from a chunk: there are as many in every epoch, and at the same places."""

    dropped: dict[str, int]

    def __init__(self, corpus: Corpus, tokenizer: WordPieceTokenizer, masker: Masker, length: int, seed: int):
        self.corpus, self.masker, self.length, self.seed = corpus, masker, length, seed
        self.cls_token_id, self.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.dropped = {}

    def epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0."""
        return _Epoch(self, number)

    @cached_property
    def sizes(self) -> np.ndarray:
        """As in `Epoch`"""
        raise NotImplementedError

    def make(self, epoch: int, index: int) -> Sample:
        """A sample of an epoch."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sizes"}  # workers need none


class _Epoch:
    """One of `_Chunked`."""

    def __init__(self, samples: _Chunked, number: int):
        self._samples, self._number = samples, number

    @property
    def sizes(self) -> np.ndarray:
        return self._samples.sizes

    def sample(self, index: int) -> Sample:
        return self._samples.make(self._number, index)


class MaskedText(_Chunked):
    """[CLS] text [SEP], words hidden: neighbouring sentences of one document, as many as fit into `length`.

    A longer sentence is cut into several. Every token of the corpus is in exactly one sample of an epoch; the next
    epoch hides others. Raises InputError for a length that leaves no room, and for a corpus without a token.
    """

    def __init__(self, corpus: Corpus, tokenizer: WordPieceTokenizer, masker: Masker, length: int, seed: int):
        super().__init__(corpus, tokenizer, masker, length, seed)
        check_length(length, 3)
        check_text(corpus)
        self.chunks = chunk_table(corpus, length - 2)

    @cached_property
    def sizes(self) -> np.ndarray:
        return _lengths(self.chunks.rows) + np.int32(2)

    def make(self, epoch: int, index: int) -> Sample:
        begin, end = self.chunks.rows[index].tolist()
        ids = np.empty(end - begin + 2, np.int64)
        ids[0], ids[1:-1], ids[-1] = self.cls_token_id, self.corpus.ids[begin:end], self.sep_token_id
        return Sample(*self.masker(ids, generator(self.seed, epoch, index)))


class SentencePairs(_Chunked):
    """[CLS] a [SEP] b [SEP], words hidden, and how the two belong together.

    A chunk of neighbouring sentences of one document is parted between two of them, anew in every epoch; one that is a
    single sentence is parted inside it. next_sentence 0: b follows a. 1, half of the time: b is from another document,
    each as likely as it is long; or, with order=True, a and b have changed places. Pairs of both kinds are about as
    long, and cut at the same ends, else these would give the answer away. short: the share of pairs that are cut to a
    random length.

    Raises InputError for a length that leaves no room, and for a corpus with fewer than two documents of two tokens or
    more (order=True: with none).
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: WordPieceTokenizer,
        masker: Masker,
        length: int,
        seed: int,
        order: bool = False,
        short: float = 0.1,
    ):
        super().__init__(corpus, tokenizer, masker, length, seed)
        check_length(length, SHORTEST)
        check_short(short)
        check_text(corpus)
        self.order, self.short = order, short
        # One token less than there is room for: the sentence that fills a chunk fits in whole, if little of a is kept.
        self._enough = length - 4
        self.chunks = chunk_table(corpus, self._enough, reach=True)
        self._check_documents()
        alone = len(corpus.ids) - int(_lengths(self.chunks.rows).sum(dtype=np.int64))
        if alone:
            self.dropped = {"tokens of documents of one token, of which there is no pair": alone}

    def _check_documents(self) -> None:
        rows = self.chunks.rows
        found = 0 if not len(rows) else 1 if self._document(rows[0, 0]) == self._document(rows[-1, 0]) else 2
        if found < (1 if self.order else 2):
            wanted = "a document" if self.order else "at least two documents, to take random sentences from,"
            raise InputError(
                f"{self.corpus.directory}: expected {wanted} of two tokens or more, got {found}; the form of the text "
                "says what ends a document"
            )

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.minimum(_lengths(self.chunks.rows) + np.int32(3), np.int32(self.length))

    def make(self, epoch: int, index: int) -> Sample:
        rng = generator(self.seed, epoch, index)
        begin, end = self.chunks.rows[index].tolist()
        seam, inside = self._seam(begin, end, rng)
        first, second = (begin, seam), (seam, end)
        label = int(rng.integers(2))
        if label and self.order:
            first, second = second, first
        elif label:
            second = self._elsewhere((begin, end), seam, inside, rng)
        room = self.length if rng.random() >= self.short else int(rng.integers(SHORTEST, self.length + 1))
        return self._row(*_fitted(first, second, min(room - 3, end - begin), rng), label, rng)

    def _seam(self, begin: int, end: int, rng: np.random.Generator) -> tuple[int, bool]:
        """Where b begins, a border of sentences if there is one; and whether it is inside a sentence."""
        sentences = self.corpus.sentences
        low, high = int(sentences.searchsorted(begin, "right")), int(sentences.searchsorted(end, "left"))
        if low < high:
            return int(sentences[rng.integers(low, high)]), False
        return int(rng.integers(begin + 1, end)), True

    def _elsewhere(self, chunk: Span, seam: int, inside: bool, rng: np.random.Generator) -> Span:
        """Text of another document that might stand where b does: it begins, goes on and ends as b would have.

        b went on until there was enough, as this does; or until its document was over: then whole sentences that are
        not longer are looked for, in a few places.
        """
        whole = chunk[1] - chunk[0] >= self._enough
        wanted = max(1, (self._enough if whole else chunk[1] - chunk[0]) - (seam - chunk[0]))
        found: list[tuple[int, Span]] = []
        for _ in range(_TRIES):
            start, stop = self._place(chunk[0], inside, rng)
            end = self._end(start, min(start + wanted, stop), whole)
            length = end - start
            found.append((length if whole or length <= wanted else -length, (start, end)))
            if found[-1][0] >= wanted * 7 // 8:
                break
        return max(found, key=lambda one: one[0])[1]

    def _place(self, token: int, inside: bool, rng: np.random.Generator) -> Span:
        """Where a second part might begin in another document than that of `token`, and where that document ends."""
        sentences = self.corpus.sentences
        begin, end = self._other_chunk(token, rng)
        _, stop = self._document(begin)
        if inside:
            return int(rng.integers(begin + 1, end)), stop
        start, has_none = self._seam(begin, end, rng)
        if has_none:
            border = int(sentences[sentences.searchsorted(begin)])
            start = border if border < stop else begin
        return start, stop

    def _end(self, start: int, token: int, whole: bool) -> int:
        """Where a part ends: at the first border from `token` on, or at the last one up to it."""
        sentences = self.corpus.sentences
        if whole:
            return piece_end(sentences, token, self._enough)
        return int(sentences[max(sentences.searchsorted(token, "right") - 1, sentences.searchsorted(start, "right"))])

    def _other_chunk(self, token: int, rng: np.random.Generator) -> Span:
        """A chunk of another document than that of `token`, each with the same chance."""
        rows = self.chunks.rows
        low, high = (bisect_left(rows[:, 0], border) for border in self._document(token))
        number = int(rng.integers(len(rows) - (high - low)))
        begin, end = rows[number if number < low else number + high - low].tolist()
        return begin, end

    def _document(self, token: int) -> Span:
        """The document that a token is in."""
        sentences, documents = self.corpus.sentences, self.corpus.documents
        number = documents.searchsorted(sentences.searchsorted(token, "right") - 1, "right")
        return int(sentences[documents[number - 1]]), int(sentences[documents[number]])

    def _row(self, first: Span, second: Span, label: int, rng: np.random.Generator) -> Sample:
        corpus, border = self.corpus.ids, first[1] - first[0] + 2
        ids = np.empty(border + second[1] - second[0] + 1, np.int64)
        ids[0], ids[1 : border - 1], ids[border - 1] = self.cls_token_id, corpus[slice(*first)], self.sep_token_id
        ids[border:-1], ids[-1] = corpus[slice(*second)], self.sep_token_id
        types = np.zeros(len(ids), np.int64)
        types[border:] = 1
        return Sample(*self.masker(ids, rng), types, label)


class RunningText:
    """Rows of `length` tokens, one after another as the text has them, for a model of the next word: labels = ids.

    They begin at another place in every epoch, what is left over at both ends is a shorter row: no token is lost.
    Raises InputError for a length of less than 2, and for a corpus without a token.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int):
        check_length(length, 2)
        check_text(corpus)
        self.corpus, self.length, self.seed = corpus, length, seed
        self.dropped: dict[str, int] = {}

    def epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0."""
        first = 1 + int(generator(self.seed, number, purpose=_PLACE).integers(self.length))
        return _Rows(self.corpus, self.length, min(first, len(self.corpus.ids)))


class _Rows:
    """One of `RunningText`. first: tokens of the first row."""

    def __init__(self, corpus: Corpus, length: int, first: int):
        self._corpus, self._length, self._first = corpus, length, first
        self._rest = len(corpus.ids) - first
        self._count = 1 - (-self._rest // length)

    @cached_property
    def sizes(self) -> np.ndarray:
        sizes = np.full(self._count, self._length, np.int32)
        sizes[-1] = self._rest - (self._count - 2) * self._length
        sizes[0] = self._first
        return sizes

    def sample(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index}: the epoch has {self._count}")
        begin, end = (max(0, self._first + (index + row) * self._length) for row in (-1, 0))
        ids = self._corpus.ids[begin:end].astype(np.int64)
        return Sample(ids, ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sizes"}


def _fitted(first: Span, second: Span, room: int, rng: np.random.Generator) -> tuple[Span, Span]:
    """Both parts within `room` tokens: cut away from where they meet, each by a random share, none to nothing."""
    a, b = first[1] - first[0], second[1] - second[0]
    if a + b <= room:
        return first, second
    a = int(rng.integers(max(1, room - b), min(a, room - 1) + 1))
    return (first[1] - a, first[1]), (second[0], second[0] + min(b, room - a))


def _lengths(chunks: np.ndarray) -> np.ndarray:
    """[n, 2] -> [n] int32 tokens of each"""
    return np.subtract(chunks[:, 1], chunks[:, 0], dtype=np.int32, casting="unsafe")


def check_length(length: int, least: int) -> None:
    """Raise InputError if a row has no room."""
    if length < least:
        raise InputError(f"length = {length}: expected at least {least} tokens in a row")


def check_short(short: float) -> None:
    """Raise InputError if it is no share."""
    if not 0 <= short <= 1:
        raise InputError(f"short = {short}: expected a share of the rows, from 0 to 1")


def check_text(corpus: Corpus) -> None:
    """Raise InputError if there is none."""
    if not len(corpus.ids):
        raise InputError(f"{corpus.directory}: expected text with at least one token, got none")
