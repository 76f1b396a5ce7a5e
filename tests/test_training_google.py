"""Google's pairs, to the token.

The digests, counts and numbers below were made once with create_pretraining_data.py of google-research/bert at commit
eedf5716 (its TensorFlow parts taken away, under Python 3.11): its `create_instances_from_document` over the documents
of `documents()`, shuffled with random.Random(seed), three times over, as its `create_training_instances` has it before
it shuffles what it made. An instance became [ids, where segment 1 begins, is_random_next, masked_lm_positions, ids of
masked_lm_labels], all of them JSON without blanks, that its SHA-256; `after` is the generator's next random().
"""

import hashlib
import json
import pickle
import random
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from small_corpus import SmallCorpus, vocabulary

from hubmodels import bertTokenizer
from hubmodels.errors import InputError
from hubmodels.heads import IGNORED
from hubmodels.tokenizers import SPECIAL
from hubmodels.training import google_pairs
from hubmodels.training.corpus import prepare
from hubmodels.training.google_pairs import Entries, GooglePairs, Procedure, google_instances
from hubmodels.training.samples import Epoch, Sample
from hubmodels.training.text import TextOptions

WORDS, PIECES = 300, 100


class Made(NamedTuple):
    """What the original makes of `documents()`. counts: instances of each duplicate."""

    procedure: Procedure
    seed: int
    counts: list[int]
    digest: str
    after: float


MADE = [
    Made(Procedure(128, 0.1, 0.15, 20, False), 12345, [70, 68, 75],
         "d6bf0a1c4e75cd6ee82c33f48c37059c0740f1f3da34a3d40dcb5645e2d734f6", 0.11486709484421764),
    Made(Procedure(24, 0.5, 0.3, 5, False), 7, [116, 112, 112],
         "defc94e431afc16c51e02e9079d15daf37eb84503940a57e9926a56f0cbb5991", 0.08725166277977836),
    Made(Procedure(8, 0.0, 0.15, 20, False), 3, [129, 128, 127],
         "97fc0fa82ce392002944204a2fa73673a6c2da4056723303adc07452bace9dd6", 0.6286767243979504),
    Made(Procedure(128, 0.1, 0.15, 20, True), 12345, [80, 75, 74],
         "bace7ab025f866ab6b076601dfefff4ba5317398dff026de1092d9cee3cc1528", 0.44551428208640687),
    Made(Procedure(24, 0.5, 0.3, 5, True), 7, [113, 114, 113],
         "1fb0b2a133b0250a11a2d8b3b239511aa13fb2ea4f0aadb9505d11f742dd2cef", 0.19267841367349803),
    Made(Procedure(8, 0.0, 0.15, 20, True), 3, [125, 125, 131],
         "0cb2563b9b318a5a7036e5b0584bc81e49332d50054e39bdbac60123f4757340", 0.4109344419461246),
]  # fmt: skip
# The first three instances of the third
FIRST = [
    [[2, 4, 363, 134, 3, 346, 57, 3], 5, 1, [1], [281]],
    [[2, 133, 3, 99, 223, 269, 4, 3], 3, 0, [6], [349]],
    [[2, 180, 48, 4, 3, 198, 132, 3], 5, 1, [3], [187]],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [*(f"w{i}" for i in range(WORDS)), *(f"##p{i}" for i in range(PIECES))]
    return vocabulary(tmp_path_factory.mktemp("vocabulary"), words)


def documents() -> list[list[list[int]]]:
    """25 documents of 1 to 12 sentences of 1 to 150 tokens"""
    rng = random.Random(0)
    ids = range(len(SPECIAL), len(SPECIAL) + WORDS + PIECES)
    return [
        [rng.choices(ids, k=rng.choice([1, 4, 9, 20, 33, 150])) for _ in range(rng.randint(1, 12))] for _ in range(25)
    ]


def corpus_of(documents: list[list[list[int]]], directory: Path) -> SmallCorpus:
    sentences = [sentence for document in documents for sentence in document]
    return SmallCorpus(
        np.array([token for sentence in sentences for token in sentence], np.uint16),
        np.cumsum([0, *map(len, sentences)], dtype=np.int64),
        np.cumsum([0, *map(len, documents)], dtype=np.int64),
        directory,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> SmallCorpus:
    return corpus_of(documents(), tmp_path_factory.mktemp("corpus"))


def pairs_of(corpus, tokenizer, made: Made, cache_dir: Path) -> GooglePairs:
    length, short, rate, most, whole_words = made.procedure
    options = {"rate": rate, "most": most, "short": short, "whole_words": whole_words}
    return GooglePairs(corpus, tokenizer, length, made.seed, **options, cache_dir=cache_dir)


def all_of(epoch: Epoch) -> list[Sample]:
    return [epoch.sample(index) for index in range(len(epoch.sizes))]


def plain(sample: Sample) -> list:
    """As the head of this file has it"""
    places = np.flatnonzero(sample.labels != IGNORED)
    seam = int(sample.token_types.argmax())
    assert sample.token_types.tolist() == [0] * seam + [1] * (len(sample.ids) - seam)
    return [sample.ids.tolist(), seam, sample.next_sentence, places.tolist(), sample.labels[places].tolist()]


def digest(instances: list) -> str:
    return hashlib.sha256(json.dumps(instances, separators=(",", ":")).encode()).hexdigest()


# The same as the original's


@pytest.mark.parametrize("made", MADE)
def test_the_instances_are_the_originals(tokenizer, made):
    rng, shuffled = random.Random(made.seed), documents()
    rng.shuffle(shuffled)
    epochs = [list(google_instances(shuffled, rng, Entries.of(tokenizer), made.procedure)) for _ in range(3)]
    assert [len(instances) for instances in epochs] == made.counts
    assert digest([[i.ids, i.seam, int(i.is_random), i.places, i.labels] for e in epochs for i in e]) == made.digest
    assert rng.random() == made.after


@pytest.mark.parametrize("made", MADE)
def test_the_epochs_of_a_corpus_are_its_duplicates(corpus, tokenizer, made, tmp_path):
    samples = pairs_of(corpus, tokenizer, made, tmp_path)
    epochs = [samples.epoch(number) for number in range(3)]
    assert [len(epoch.sizes) for epoch in epochs] == made.counts
    instances = [plain(sample) for epoch in epochs for sample in all_of(epoch)]
    assert digest(instances) == made.digest
    assert [size for epoch in epochs for size in epoch.sizes] == [len(ids) for ids, *_ in instances]
    assert max(len(ids) for ids, *_ in instances) <= made.procedure.length
    assert epochs[0].sizes.dtype == np.int32
    assert {kind.dtype for kind in epochs[0].sample(0)[:3]} == {np.dtype(np.int64)}
    assert samples.dropped == {}
    if made.procedure == MADE[2].procedure:
        assert instances[:3] == FIRST


def test_of_a_text_too(tmp_path):
    tokenizer = bertTokenizer("bert-nano")
    text = tmp_path / "text.txt"
    lines = [f"The ship number {n} sailed to the north." + "\n" * (n % 4 == 0) for n in range(60)]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = prepare([text], tokenizer, TextOptions(), tmp_path / "cache")
    found = [plain(sample) for sample in all_of(GooglePairs(corpus, tokenizer, 64, 5, cache_dir=tmp_path).epoch(0))]
    rng = random.Random(5)
    read = [[row[1:-1] for row in tokenizer.rows(d.splitlines())] for d in text.read_text().strip().split("\n\n")]
    rng.shuffle(read)
    instances = google_instances(read, rng, Entries.of(tokenizer), Procedure(64, 0.1, 0.15, 20, False))
    assert found == [[i.ids, i.seam, int(i.is_random), i.places, i.labels] for i in instances]


def test_a_single_document_is_its_own_random_one(tokenizer, tmp_path):
    """As in the original, which says so nowhere."""
    corpus = corpus_of(documents()[:1], tmp_path)
    labels = [sample.next_sentence for sample in all_of(pairs_of(corpus, tokenizer, MADE[1], tmp_path).epoch(0))]
    assert 1 in labels


def test_empty_documents_count_for_nothing(corpus, tokenizer, tmp_path):
    borders = np.repeat(corpus.documents, 2)
    gaps = SmallCorpus(corpus.ids, corpus.sentences, borders, tmp_path)
    found = [plain(sample) for sample in all_of(pairs_of(gaps, tokenizer, MADE[0], tmp_path).epoch(0))]
    made = pairs_of(corpus, tokenizer, MADE[0], tmp_path / "other").epoch(0)
    assert found == [plain(sample) for sample in all_of(made)]


# Kept


def test_an_epoch_is_made_once_and_those_before_it_first(corpus, tokenizer, tmp_path, monkeypatch):
    pairs_of(corpus, tokenizer, MADE[0], tmp_path / "a").epoch(0)
    third = all_of(pairs_of(corpus, tokenizer, MADE[0], tmp_path / "b").epoch(2))  # asked for at once
    two = pairs_of(corpus, tokenizer, MADE[0], tmp_path / "a")
    two.epoch(1)
    again = all_of(pairs_of(corpus, tokenizer, MADE[0], tmp_path / "a").epoch(2))  # as a process that goes on
    assert [plain(s) for s in again] == [plain(s) for s in third]
    assert len(third) == MADE[0].counts[2]
    monkeypatch.setattr(google_pairs, "google_instances", lambda *_: pytest.fail("it is there"))
    kept = pairs_of(corpus, tokenizer, MADE[0], tmp_path / "b")
    assert [plain(s) for s in all_of(kept.epoch(2))] == [plain(s) for s in third]
    with pytest.raises(pytest.fail.Exception):
        kept.epoch(3)


@pytest.mark.parametrize("change", ["seed", "corpus", *Procedure._fields])
def test_what_was_made_otherwise_is_not_taken(corpus, tokenizer, tmp_path, change):
    made = MADE[0]
    other = {"length": 64, "short": 0.2, "rate": 0.2, "most": 9, "whole_words": True}
    here = pairs_of(corpus, tokenizer, made, tmp_path).directory
    if change == "seed":
        made = made._replace(seed=1)
    elif change == "corpus":
        corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, corpus.directory, {"digest": "another"})
    else:
        made = made._replace(procedure=made.procedure._replace(**{change: other[change]}))
    assert pairs_of(corpus, tokenizer, made, tmp_path).directory != here


@pytest.mark.parametrize("stop", [0, 30])
def test_a_process_that_is_stopped_leaves_no_epoch_and_the_next_one_makes_it(
    corpus, tokenizer, tmp_path, monkeypatch, stop
):
    samples, make = pairs_of(corpus, tokenizer, MADE[0], tmp_path), google_instances
    samples.epoch(0)

    def stopped(*given):
        for number, instance in enumerate(make(*given)):
            if number == stop:
                raise KeyboardInterrupt
            yield instance

    with monkeypatch.context() as patch:
        patch.setattr(google_pairs, "google_instances", stopped)
        with pytest.raises(KeyboardInterrupt):
            samples.epoch(1)
    assert [path.name for path in samples.directory.glob("epoch-*")] == ["epoch-0000"]
    assert (samples.directory / "partial").exists()
    epochs = [pairs_of(corpus, tokenizer, MADE[0], tmp_path).epoch(number) for number in range(3)]
    assert digest([plain(sample) for epoch in epochs for sample in all_of(epoch)]) == MADE[0].digest
    assert not (samples.directory / "partial").exists()


def test_two_epochs_are_kept_and_any_can_be_made_again(corpus, tokenizer, tmp_path, monkeypatch):
    samples, make, calls = pairs_of(corpus, tokenizer, MADE[0], tmp_path), google_instances, []
    monkeypatch.setattr(google_pairs, "google_instances", lambda *given: (calls.append(1), make(*given))[1])
    reading = samples.epoch(0)
    before = [plain(sample) for sample in all_of(reading)]
    wanted = [[plain(sample) for sample in all_of(samples.epoch(number))] for number in range(4)]
    assert sorted(path.name for path in samples.directory.glob("epoch-*")) == ["epoch-0002", "epoch-0003"]
    assert [plain(sample) for sample in all_of(reading)] == before == wanted[0]  # whoever reads one goes on
    assert len(calls) == 4
    for number in (1, 3, 0):
        assert [plain(sample) for sample in all_of(pairs_of(corpus, tokenizer, MADE[0], tmp_path).epoch(number))] == (
            wanted[number]
        )
    assert len(calls) == 6


def test_of_several_at_once_one_makes_the_epoch(corpus, tokenizer, tmp_path, monkeypatch):
    make, calls, found = google_instances, [], []
    monkeypatch.setattr(google_pairs, "google_instances", lambda *given: (calls.append(1), make(*given))[1])

    def ask() -> None:
        found.append(pairs_of(corpus, tokenizer, MADE[0], tmp_path).epoch(1))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert {digest([plain(sample) for sample in all_of(epoch)]) for epoch in found} == {
        digest([plain(sample) for sample in all_of(found[0])])
    }
    assert len(found) == 4


def test_more_instances_than_are_written_together(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(google_pairs, "_AT_ONCE", 10)
    samples = pairs_of(corpus, tokenizer, MADE[0], tmp_path)
    epochs = [samples.epoch(number) for number in range(3)]
    assert 70 in map(len, (epoch.sizes for epoch in epochs))  # a whole number of tens too
    assert digest([plain(sample) for epoch in epochs for sample in all_of(epoch)]) == MADE[0].digest


def test_workers_are_sent_the_place_of_an_epoch(corpus, tokenizer, tmp_path):
    epoch = pairs_of(corpus, tokenizer, MADE[0], tmp_path).epoch(0)
    samples = [plain(sample) for sample in all_of(epoch)]
    sent = pickle.dumps(epoch)
    assert len(sent) < 1000
    assert [plain(sample) for sample in all_of(pickle.loads(sent))] == samples


# What is refused


def test_what_cannot_be_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(InputError, match="length = 7: expected at least 8 tokens in a row"):
        GooglePairs(corpus, tokenizer, 7, 0, cache_dir=tmp_path)
    for options, message in [
        ({"rate": 0.0}, "rate = 0.0, most = None: expected more than 0 and at most 1"),
        ({"most": 0}, "rate = 0.15, most = 0: expected more than 0"),
        ({"short": 1.5}, "short = 1.5: expected a share of the rows, from 0 to 1"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            GooglePairs(corpus, tokenizer, 128, 0, **options, cache_dir=tmp_path)
    empty = corpus_of([], tmp_path)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: expected text with at least one token, got none")):
        GooglePairs(empty, tokenizer, 128, 0, cache_dir=tmp_path)


def test_a_disk_without_room_is_said_to_be_one(corpus, tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    samples = pairs_of(corpus, tokenizer, MADE[0], tmp_path)
    monkeypatch.setattr(google_pairs, "array_file", full)
    message = re.escape(f"{samples.directory}: cannot be kept there: [Errno 28] No space left on device; make room, or")
    with pytest.raises(InputError, match=message):
        samples.epoch(0)
