"""Google's pairs of sentences and their masks: what its published procedure makes, to the token.

Source: google-research/bert, create_pretraining_data.py. With the same seed, documents and vocabulary this makes the
same instances, as every choice is drawn from the same numbers in the same order; so what may look odd here is the
original's: more than half of the second parts are random (56 to 67 %), because a chunk of one sentence has no other; a
random one may come from the same document; a random word may be any entry of the vocabulary, special ones too; and
[CLS] and [SEP] count for how many tokens are masked. `SentencePairs` has none of that.
"""

import hashlib
import json
import math
import os
import random
import shutil
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ..errors import InputError
from ..heads import IGNORED
from ..tokenizers import WordPieceTokenizer
from .arrays import MappedArray, array_file, not_kept
from .corpus import Corpus
from .masking import continuing_pieces
from .samples import SHORTEST, Epoch, Sample, check_length, check_short, check_text

VERSION = 2  # of the files; part of their directory's name
_AT_ONCE = 4096  # instances that are written together
_BEGIN, _SIZE, _SEAM, _RANDOM = range(4)  # columns of an epoch's table of rows

T = TypeVar("T", covariant=True)
Sentence = list[int]


class Numbered(Protocol[T]):
    """A list, or what reads its items when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> T: ...


Document = Numbered[Sentence]


class Procedure(NamedTuple):
    """length: tokens in a row at most; short: share of the documents read in shorter rows; rate: of the tokens of a row
    that is masked, `most` at most; whole_words: all pieces of a word or none, words that would be too many passed over.
    """

    length: int
    short: float
    rate: float
    most: int
    whole_words: bool


class Entries(NamedTuple):
    """What the procedure knows of a vocabulary. every: the ids in its order; pieces: those that go on with a word."""

    cls: int
    sep: int
    mask: int
    every: list[int]
    pieces: frozenset[int]

    @classmethod
    def of(cls, tokenizer: WordPieceTokenizer) -> "Entries":
        """Those of a tokenizer."""
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
        every = sorted(tokenizer.inner.get_vocab().values())
        return cls(*special, every, frozenset(np.flatnonzero(continuing_pieces(tokenizer)).tolist()))


class Instance(NamedTuple):
    """A row [CLS] a [SEP] b [SEP]. seam: where b begins; places: of the masked tokens; labels: what they were."""

    ids: list[int]
    seam: int
    is_random: bool
    places: list[int]
    labels: list[int]


def google_instances(
    documents: Numbered[Document], rng: random.Random, entries: Entries, procedure: Procedure
) -> Iterator[Instance]:
    """One duplicate of the documents, in their order, which the original has shuffled with the same `rng` before."""
    for number in range(len(documents)):
        for first, second, is_random in _pairs(documents, number, rng, procedure):
            row = [entries.cls, *first, entries.sep, *second, entries.sep]
            places = _masked_places(row, rng, entries, procedure)
            labels = [row[place] for place in places]
            for place in places:
                row[place] = _replaced(row[place], rng, entries)
            order = sorted(range(len(places)), key=places.__getitem__)
            yield Instance(row, len(first) + 2, is_random, [places[i] for i in order], [labels[i] for i in order])


def _pairs(
    documents: Numbered[Document], number: int, rng: random.Random, procedure: Procedure
) -> Iterator[tuple[Sentence, Sentence, bool]]:
    """The pairs of one document, cut to their room; and whether the second part is a random one."""
    document, room = documents[number], procedure.length - 3
    target = rng.randint(2, room) if rng.random() < procedure.short else room
    place = 0
    while place < len(document):
        chunk: list[Sentence] = []
        size = 0
        while place + len(chunk) < len(document) and size < target:
            chunk.append(document[place + len(chunk)])
            size += len(chunk[-1])
        split = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
        first = [token for sentence in chunk[:split] for token in sentence]
        is_random = len(chunk) == 1 or rng.random() < 0.5
        if is_random:
            second = _random_text(documents, number, rng, target - len(first))
        else:
            second = [token for sentence in chunk[split:] for token in sentence]
        place += split if is_random else len(chunk)  # what was not used is read again
        yield *_fitted(first, second, room, rng), is_random


def _random_text(documents: Numbered[Document], number: int, rng: random.Random, wanted: int) -> Sentence:
    """Sentences from a random one on, until there are `wanted` tokens. Ten tries to find another document."""
    for _ in range(10):
        other = rng.randint(0, len(documents) - 1)
        if other != number:
            break
    document = documents[other]
    found: Sentence = []
    for place in range(rng.randint(0, len(document) - 1), len(document)):
        found += document[place]
        if len(found) >= wanted:
            break
    return found


def _fitted(first: Sentence, second: Sentence, room: int, rng: random.Random) -> tuple[Sentence, Sentence]:
    """Token after token goes from the longer part (of two as long from the second), at its begin or at its end."""
    (a, a_end), (b, b_end) = (0, len(first)), (0, len(second))
    while a_end - a + b_end - b > room:
        at_begin = rng.random() < 0.5
        if a_end - a > b_end - b:
            a, a_end = (a + 1, a_end) if at_begin else (a, a_end - 1)
        else:
            b, b_end = (b + 1, b_end) if at_begin else (b, b_end - 1)
    return first[a:a_end], second[b:b_end]


def _masked_places(row: Sentence, rng: random.Random, entries: Entries, procedure: Procedure) -> list[int]:
    """Where tokens are masked, in the order of choice."""
    words: list[list[int]] = []
    for place, token in enumerate(row):
        if token in (entries.cls, entries.sep):
            continue
        if procedure.whole_words and words and token in entries.pieces:
            words[-1].append(place)  # also where the word before it is in the other part
        else:
            words.append([place])
    rng.shuffle(words)
    count = min(procedure.most, max(1, round(len(row) * procedure.rate)))
    places: list[int] = []
    for word in words:
        if len(places) >= count:
            break
        if len(places) + len(word) <= count:
            places += word
    return places


def _replaced(token: int, rng: random.Random, entries: Entries) -> int:
    """What a masked token becomes."""
    if rng.random() < 0.8:
        return entries.mask
    if rng.random() < 0.5:
        return token
    return entries.every[rng.randint(0, len(entries.every) - 1)]


class GooglePairs:
    """What create_pretraining_data.py makes of a corpus with `seed`: epoch n is its duplicate number n, unshuffled.

    An epoch is made when it is asked for, after those before it, as the numbers go on from one to the next, into a
    directory of its own under `cache_dir`: up to twice as many bytes as the corpus has. Of those before it one stays,
    and of the others where the numbers go on. A process that needs one that another is making waits. most: None, as
    published: 20 for a length of 128, 77 for 512. next_sentence: 0 b follows a, 1 it is random.
    Raises InputError for a length that leaves no room, for shares that are none, and for a corpus without a token.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: WordPieceTokenizer,
        length: int,
        seed: int,
        *,
        rate: float = 0.15,
        most: int | None = None,
        short: float = 0.1,
        whole_words: bool = False,
        cache_dir: Path,
    ):
        check_length(length, SHORTEST)
        check_short(short)
        check_text(corpus)
        if not (0 < rate <= 1 and (most is None or most >= 1)):
            raise InputError(f"rate = {rate}, most = {most}: expected more than 0 and at most 1, and at least 1 token")
        most = most or math.ceil(length * rate)
        self.corpus, self.seed = corpus, seed
        self.procedure, self.entries = Procedure(length, short, rate, most, whole_words), Entries.of(tokenizer)
        self.dropped: dict[str, int] = {}
        facts = [VERSION, corpus.about["digest"], seed, self.procedure]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.directory = Path(cache_dir) / f"google-{name}"

    def epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0."""
        from filelock import FileLock

        if not self._path(number).exists():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with FileLock(self.directory / "lock"):
                    for each in range(number + 1):
                        if not (self._path(each) if each == number else self._numbers(each)).exists():
                            self._make(each)
            except OSError as error:
                raise not_kept(self.directory, error) from error
        return _Made(self._path(number))

    def _path(self, number: int) -> Path:
        return self.directory / f"epoch-{number:04d}"

    def _numbers(self, number: int) -> Path:
        """Where they go on after that epoch."""
        return self.directory / f"after-{number:04d}.json"

    def _make(self, number: int) -> None:
        """Write epoch `number`, whole or not at all, after where the numbers go on; drop the last but one."""
        rng = random.Random(self.seed)
        documents = _Documents(self.corpus, rng)
        if number:
            version, state, gauss = json.loads(self._numbers(number - 1).read_text(encoding="utf-8"))
            rng.setstate((version, tuple(state), gauss))
        partial = self.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        write_instances(google_instances(documents, rng, self.entries, self.procedure), partial, self.corpus.ids.dtype)
        after = partial / "after.json"
        with open(after, "w", encoding="utf-8") as file:
            json.dump(rng.getstate(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(after, self._numbers(number))
        os.replace(partial, self._path(number))
        if number > 1:
            shutil.rmtree(self._path(number - 2), ignore_errors=True)


class _Documents:
    """The documents of a corpus that are not empty, in random order, read when they are looked at."""

    def __init__(self, corpus: Corpus, rng: random.Random):
        self._corpus = corpus
        self._order = array("q", np.flatnonzero(np.diff(corpus.documents)).astype(np.int64).tobytes())
        rng.shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Document:
        number = self._order[place]
        return _Sentences(self._corpus, *self._corpus.documents[number : number + 2].tolist())


class _Sentences:
    """One document: sentences first … end - 1."""

    def __init__(self, corpus: Corpus, first: int, end: int):
        self._corpus, self._first, self._end = corpus, first, end

    def __len__(self) -> int:
        return self._end - self._first

    def __getitem__(self, place: int) -> Sentence:
        return self._corpus.tokens(self._first + place, self._first + place + 1).tolist()


def write_instances(instances: Iterator[Instance], directory: Path, dtype: np.dtype) -> None:
    """tokens.npy: ids, places and labels of each instance. rows.npy [n + 1, 4]: their begin, size, seam, is_random."""
    begin = 0
    with (
        array_file(directory / "tokens.npy", dtype) as add_tokens,
        array_file(directory / "rows.npy", np.int64, columns=4) as add_rows,
    ):
        tokens: list[int] = []
        rows: list[tuple[int, int, int, bool]] = []
        for instance in instances:
            rows.append((begin + len(tokens), len(instance.ids), instance.seam, instance.is_random))
            tokens += instance.ids + instance.places + instance.labels
            if len(rows) == _AT_ONCE:
                add_tokens(np.array(tokens))
                add_rows(np.array(rows))
                begin += len(tokens)
                tokens, rows = [], []
        add_tokens(np.array(tokens, np.int64))
        add_rows(np.array([*rows, (begin + len(tokens), 0, 0, False)]))


class _Made:
    """An epoch on the disk."""

    def __init__(self, directory: Path):
        self._rows, self._tokens = MappedArray(directory / "rows.npy"), MappedArray(directory / "tokens.npy")
        _ = self._rows.rows, self._tokens.rows  # whoever has them open may go on with them when they are dropped

    @cached_property
    def sizes(self) -> np.ndarray:
        return self._rows.rows[:-1, _SIZE].astype(np.int32)

    def sample(self, index: int) -> Sample:
        begin, size, seam, is_random = self._rows.rows[index].tolist()
        tokens = self._tokens.rows[begin : self._rows.rows[index + 1, _BEGIN]].astype(np.int64)
        ids, (places, masked) = tokens[:size], tokens[size:].reshape(2, -1)
        labels = np.full(size, IGNORED, np.int64)
        labels[places] = masked
        types = np.zeros(size, np.int64)
        types[seam:] = 1
        return Sample(ids, labels, types, is_random)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sizes"}
