"""Rows of an epoch, on corpora whose tokens are numbered through: an id says where it stood."""

import pickle
import re
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from small_corpus import FIRST_ID, SmallCorpus, numbered, numbers, p_value

from hubmodels import bertTokenizer
from hubmodels.errors import InputError
from hubmodels.heads import IGNORED
from hubmodels.training import arrays, chunks
from hubmodels.training.corpus import prepare
from hubmodels.training.masking import Masker, Masking
from hubmodels.training.samples import Epoch, MaskedText, RunningText, Sample, SentencePairs
from hubmodels.training.text import TextOptions

LENGTH = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return numbers(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def masker(tokenizer):
    return Masker(tokenizer, Masking())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> SmallCorpus:
    """Documents of every size, sentences of 1 to 200 tokens."""
    rng = np.random.default_rng(0)
    documents = [[1], [1, 1], [130], [20, 1], [46], [47], [3, 44, 1]]
    documents += [rng.choice([*range(1, 30), 90, 200], rng.integers(1, 40)).tolist() for _ in range(8)]
    rng.shuffle(documents)
    return numbered(documents, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> SmallCorpus:
    """Six documents, as most are."""
    rng = np.random.default_rng(1)
    return numbered([rng.integers(3, 15, 130).tolist() for _ in range(6)], tmp_path_factory.mktemp("prose"))


def unmasked(sample: Sample) -> list[int]:
    return np.where(sample.labels == IGNORED, sample.ids, sample.labels).tolist()


def all_of(epoch: Epoch) -> list[Sample]:
    return [epoch.sample(index) for index in range(len(epoch.sizes))]


def parts(sample: Sample, tokenizer) -> tuple[list[int], list[int]]:
    """a, b; the row is checked to be [CLS] a [SEP] b [SEP]."""
    ids, types = unmasked(sample), sample.token_types.tolist()
    seam = types.index(1)
    assert types == [0] * seam + [1] * (len(ids) - seam)
    assert ids[0] == tokenizer.cls_token_id
    assert [i for i, token in enumerate(ids) if token == tokenizer.sep_token_id] == [seam - 1, len(ids) - 1]
    a, b = ids[1 : seam - 1], ids[seam:-1]
    for part in (a, b):
        assert part == list(range(part[0], part[0] + len(part)))
    return a, b


def same(left: Sample, right: Sample) -> bool:
    return left.next_sentence == right.next_sentence and all(
        (a is None and b is None) or np.array_equal(a, b) for a, b in zip(left[:3], right[:3], strict=True)
    )


# Chunks


def chunks_in_plain_python(corpus: SmallCorpus, size: int, reach: bool) -> list[list[int]]:
    """The rules, sentence by sentence."""
    found = []
    for first, end in pairwise(corpus.documents.tolist()):
        pieces = []
        for a, b in pairwise(corpus.sentences[first : end + 1].tolist()):
            count = -(-(b - a) // size)
            pieces += pairwise([a + part * (b - a) // count for part in range(count + 1)])
        of_document: list[list[int]] = []
        for a, b in pieces:
            begin = of_document[-1][0] if of_document else a
            if of_document and (a - begin < size if reach else b - begin <= size):
                of_document[-1][1] = b
            else:
                of_document.append([a, b])
        if reach and len(of_document) > 1 and of_document[-1][1] - of_document[-1][0] == 1:
            of_document[-2][1] += 1
            del of_document[-1]
        found += [chunk for chunk in of_document if not reach or chunk[1] - chunk[0] > 1]
    return found


@pytest.mark.parametrize("size", [5, 17, 46, 1000, 20_000])
@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize("block", [1, 100, 1 << 18])
def test_chunks_are_those_of_the_plain_rules_however_much_is_looked_at_together(corpus, size, reach, block):
    rows = np.concatenate(list(chunks.find_chunks(corpus, size, reach, block)))
    assert rows.dtype == np.int64
    assert rows.tolist() == chunks_in_plain_python(corpus, size, reach)


def test_the_table_is_made_once(corpus, tmp_path, monkeypatch):
    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)
    made = chunks.chunk_table(corpus, 30).rows
    monkeypatch.setattr(chunks, "find_chunks", lambda *_: pytest.fail("it is there"))
    assert np.array_equal(chunks.chunk_table(corpus, 30).rows, made)
    with pytest.raises(pytest.fail.Exception):
        chunks.chunk_table(corpus, 31)
    with pytest.raises(pytest.fail.Exception):
        chunks.chunk_table(corpus, 30, reach=True)


@pytest.mark.parametrize("size", [0, 40, -8])
def test_a_table_of_which_the_disk_has_less_is_made_again(corpus, tmp_path, size):
    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)
    table = chunks.chunk_table(corpus, 30)
    content = table.path.read_bytes()
    table.path.write_bytes(content[:size])
    assert chunks.chunk_table(corpus, 30).rows.tolist() == chunks_in_plain_python(corpus, 30, False)
    assert table.path.read_bytes() == content


def test_a_process_that_is_stopped_leaves_no_table(corpus, tmp_path, monkeypatch):
    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)

    def stopped(*_):
        yield np.zeros((3, 2), np.int64)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "find_chunks", stopped)
        with pytest.raises(KeyboardInterrupt):
            chunks.chunk_table(corpus, 30)
    assert list(tmp_path.glob("*.npy")) == []
    assert chunks.chunk_table(corpus, 30).rows.tolist() == chunks_in_plain_python(corpus, 30, False)


def test_a_disk_without_room_is_said_to_be_one(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)
    monkeypatch.setattr(arrays, "array_file", full)
    message = f"{tmp_path / 'chunks-1-fit-30.npy'}: cannot be kept there: [Errno 28] No space left on device; make room"
    with pytest.raises(InputError, match=re.escape(message)):
        chunks.chunk_table(corpus, 30)


def test_a_table_that_is_there_needs_no_room_and_no_lock(corpus, tmp_path, monkeypatch):
    """The cache of somebody else, say."""
    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)
    made = chunks.chunk_table(corpus, 30).rows
    (tmp_path / "chunks-1-fit-30.npy.lock").unlink(missing_ok=True)
    monkeypatch.setattr("filelock.FileLock", lambda *_: pytest.fail("it is there"))
    assert np.array_equal(chunks.chunk_table(corpus, 30).rows, made)


def test_of_several_at_once_one_makes_the_table(corpus, tmp_path, monkeypatch):
    corpus = SmallCorpus(corpus.ids, corpus.sentences, corpus.documents, tmp_path)
    find, calls = chunks.find_chunks, []
    monkeypatch.setattr(chunks, "find_chunks", lambda *given: (calls.append(1), find(*given))[1])
    found = []
    threads = [threading.Thread(target=lambda: found.append(chunks.chunk_table(corpus, 30).rows)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(rows.tolist() == chunks_in_plain_python(corpus, 30, False) for rows in found)
    assert len(found) == 4


@pytest.mark.parametrize(("columns", "blocks"), [(0, [3, 0, 9]), (2, [1, 1000]), (2, []), (0, [])])
def test_an_array_written_block_by_block_is_what_numpy_reads(tmp_path, columns, blocks):
    shape = (columns,) if columns else ()
    pieces = [np.random.default_rng(n).integers(99, size=(n, *shape)) for n in blocks]
    path = tmp_path / "a.npy"
    with arrays.array_file(path, np.int32, columns) as add:
        for piece in pieces:
            add(piece)
    expected = np.concatenate([np.zeros((0, *shape), np.int32), *pieces])
    assert np.load(path).dtype == np.int32
    assert np.array_equal(np.load(path), expected)
    mapped = pickle.loads(pickle.dumps(arrays.MappedArray(path)))
    assert np.array_equal(mapped.rows, expected)
    assert type(mapped.rows) is np.ndarray
    assert len(pickle.dumps(mapped)) < 500


# MaskedText


@pytest.mark.parametrize("length", [3, 20, LENGTH, 500])
def test_every_token_of_the_corpus_is_in_exactly_one_row(corpus, tokenizer, masker, length):
    epoch = MaskedText(corpus, tokenizer, masker, length, seed=0).epoch(0)
    text = []
    for sample, size in zip(all_of(epoch), epoch.sizes, strict=True):
        ids = unmasked(sample)
        assert len(ids) == size <= length
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert corpus.document_of(ids[1]) == corpus.document_of(ids[-2])
        assert sample.token_types is sample.next_sentence is None
        text += ids[1:-1]
    assert text == corpus.ids.tolist()
    assert epoch.sizes.dtype == np.int32


def test_rows_are_masked_exactly_and_otherwise_in_every_epoch(prose, tokenizer, masker):
    samples = MaskedText(prose, tokenizer, masker, LENGTH, seed=0)
    first, second = all_of(samples.epoch(0)), all_of(samples.epoch(1))
    for left, right in zip(first, second, strict=True):
        assert unmasked(left) == unmasked(right)
        assert (left.labels != IGNORED).sum() == max(1, round(0.15 * (len(left.ids) - 2)))
    assert sum(np.array_equal(a.labels, b.labels) for a, b in zip(first, second, strict=True)) < 5
    assert samples.dropped == {}


def every_kind(corpus, tokenizer, masker, seed: int) -> list:
    return [
        MaskedText(corpus, tokenizer, masker, LENGTH, seed),
        SentencePairs(corpus, tokenizer, masker, LENGTH, seed),
        SentencePairs(corpus, tokenizer, masker, LENGTH, seed, order=True),
        RunningText(corpus, LENGTH, seed),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_a_sample_is_a_function_of_seed_epoch_and_index(corpus, tokenizer, masker, kind):
    """In another process too, which gets no more than the place of the corpus, and in any order."""
    first, other = (every_kind(corpus, tokenizer, masker, seed)[kind] for seed in (0, 1))
    samples = all_of(first.epoch(0))
    again = pickle.loads(pickle.dumps(first.epoch(0)))
    for index in reversed(range(len(samples))):
        assert same(again.sample(index), samples[index])
    for changed in (first.epoch(1), other.epoch(0)):
        few = range(min(len(changed.sizes), len(samples)))
        assert sum(same(changed.sample(index), samples[index]) for index in few) < len(few) / 3


@pytest.mark.parametrize("kind", range(4))
def test_workers_are_sent_little(prose, tokenizer, masker, kind):
    samples = every_kind(prose, tokenizer, masker, 0)[kind]
    epoch = samples.epoch(0)
    before = len(pickle.dumps(epoch))
    assert epoch.sizes.sum() > 0
    epoch.sample(0)
    assert len(pickle.dumps(epoch)) == before


# SentencePairs


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("length", [8, 20, LENGTH, 500])
def test_rows_are_two_parts_of_at_most_so_many_tokens(corpus, tokenizer, masker, length, order):
    samples = SentencePairs(corpus, tokenizer, masker, length, seed=0, order=order, short=0.3)
    for number in range(2):
        epoch = samples.epoch(number)
        assert epoch.sizes.dtype == np.int32
        for sample, size in zip(all_of(epoch), epoch.sizes, strict=True):
            a, b = parts(sample, tokenizer)
            assert len(a) + len(b) + 3 <= size <= length
            assert (sample.labels != IGNORED).sum() == max(1, round(0.15 * (len(a) + len(b))))


def test_a_second_part_follows_or_is_from_another_document(corpus, tokenizer, masker):
    samples = SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0)
    for number in range(12):
        for sample in all_of(samples.epoch(number)):
            a, b = parts(sample, tokenizer)
            assert corpus.document_of(a[0]) == corpus.document_of(a[-1])
            assert corpus.document_of(b[0]) == corpus.document_of(b[-1])
            if sample.next_sentence == 0:
                assert b[0] == a[-1] + 1
            assert (corpus.document_of(a[0]) == corpus.document_of(b[0])) == (sample.next_sentence == 0)


def test_half_of_the_second_parts_are_random(prose, tokenizer, masker):
    samples = SentencePairs(prose, tokenizer, masker, LENGTH, seed=3)
    labels = [sample.next_sentence for number in range(70) for sample in all_of(samples.epoch(number))]
    assert len(labels) > 9_000
    assert np.mean(labels) == pytest.approx(0.5, abs=0.01)


@pytest.mark.timeout(20)
def test_two_documents_of_very_different_size_are_never_paired_with_themselves(tmp_path, tokenizer, masker):
    corpus = numbered([[9] * 2000, [4, 5]], tmp_path)
    samples = SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0)
    labels = []
    for number in range(4):
        for sample in all_of(samples.epoch(number)):
            a, b = (corpus.document_of(part[0]) for part in parts(sample, tokenizer))
            assert (a != b) == sample.next_sentence
            labels.append(sample.next_sentence)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.04)


def test_a_random_part_is_from_any_other_document_as_likely_as_it_is_long(tmp_path, tokenizer, masker):
    """From all of it, but for the first sentence of a document, which follows nothing."""
    corpus = numbered([[8] * count for count in (80, 160, 40, 320)], tmp_path)
    samples = SentencePairs(corpus, tokenizer, masker, 28, seed=0)  # three sentences each
    sizes = np.array([80, 160, 40, 320]) / 600
    seen = np.zeros(len(corpus.ids) + FIRST_ID, int)
    found, expected = np.zeros(4), np.zeros(4)
    for number in range(25):
        for sample in all_of(samples.epoch(number)):
            if sample.next_sentence:
                a, b = parts(sample, tokenizer)
                seen[b] += 1
                found[corpus.document_of(b[0])] += 1
                others = np.delete(np.arange(4), corpus.document_of(a[0]))
                expected[others] += sizes[others] / sizes[others].sum()
    assert p_value(found, expected, 3) > 0.01
    begins = corpus.sentences[corpus.documents[:-1]]
    follows = np.delete(seen[FIRST_ID:], (begins[:, None] + np.arange(8)).ravel())
    assert (follows == 0).mean() < 0.1


@pytest.mark.parametrize(
    ("sentences", "most", "order"),
    [
        (range(2, 30), 2, False),  # documents of a sentence or two
        (range(3, 20), 8, False),  # of about a row
        (range(3, 15), 60, False),
        (range(40, 90), 20, False),  # sentences that are cut
        (range(3, 15), 60, True),
    ],
)
def test_the_answer_is_not_given_away_by_lengths_or_by_what_was_cut(
    tmp_path, tokenizer, masker, sentences, most, order
):
    """Of both labels rows are as long, and as many parts begin and end where sentences do."""
    rng = np.random.default_rng(2)
    documents = [rng.choice(sentences, rng.integers(1, most + 1)).tolist() for _ in range(500)]
    while sum(map(sum, documents)) > 12_000:
        documents.pop()
    corpus = numbered(documents, tmp_path)
    samples = SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0, order=order)
    borders = set((corpus.sentences + FIRST_ID).tolist())
    found: dict[int, list] = {0: [], 1: []}
    for number in range(10):
        for sample in all_of(samples.epoch(number)):
            a, b = parts(sample, tokenizer)
            uncut = [token in borders for token in (a[0], a[-1] + 1, b[0], b[-1] + 1)]
            found[sample.next_sentence].append([len(a) + len(b), len(a), *uncut])
    real, other = np.mean(found[0], axis=0), np.mean(found[1], axis=0)
    assert real[:2] == pytest.approx(other[:2], rel=0.1)
    assert real[2:] == pytest.approx(other[2:], abs=0.08)


@pytest.mark.parametrize("order", [False, True])
def test_no_token_is_out_of_reach_but_those_that_are_said_to_be_dropped(tmp_path, tokenizer, masker, order):
    documents = [[3, 9, 1], [40], [1], [2], [30, 1, 1, 25], [1], [7, 8, 9]]
    corpus = numbered(documents, tmp_path)
    samples = SentencePairs(corpus, tokenizer, masker, 16, seed=0, order=order, short=0.0)
    seen: set[int] = set()
    for number in range(400):
        for sample in all_of(samples.epoch(number)):
            if order or sample.next_sentence == 0:
                a, b = parts(sample, tokenizer)
                seen.update(a + b)
    assert samples.dropped == {"tokens of documents of one token, of which there is no pair": 2}
    alone = {FIRST_ID + sum(map(sum, documents[:number])) for number in (2, 5)}
    assert set(corpus.ids.tolist()) - seen == alone


def test_a_single_sentence_is_parted_inside_and_so_is_what_is_put_there(tmp_path, tokenizer, masker):
    """Each line a document: nothing but sentences that stand alone."""
    corpus = numbered([[n] for n in range(2, 40)], tmp_path)
    samples = SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0)
    begins = set((corpus.sentences + FIRST_ID).tolist())
    for number in range(20):
        for index, sample in enumerate(all_of(samples.epoch(number))):
            a, b = parts(sample, tokenizer)
            assert b[0] not in begins
            assert len(a) + len(b) <= index + 2


def test_some_pairs_are_cut_short(prose, tokenizer, masker):
    def sizes(short: float) -> np.ndarray:
        epochs = [SentencePairs(prose, tokenizer, masker, LENGTH, 0, short=short).epoch(n) for n in range(10)]
        return np.array([len(sample.ids) for epoch in epochs for sample in all_of(epoch)])

    never, sometimes, always = (sizes(short) for short in (0.0, 0.25, 1.0))
    assert (never >= LENGTH - 1).mean() > 0.93  # all but the ends of documents
    assert (sometimes < LENGTH - 1).mean() - (never < LENGTH - 1).mean() == pytest.approx(0.25 * 39 / 41, abs=0.04)
    assert set(range(8, LENGTH + 1)) <= set(always.tolist())
    assert always.mean() == pytest.approx((8 + LENGTH) / 2, abs=1.5)


def test_with_order_half_of_the_pairs_have_changed_places(prose, tokenizer, masker):
    samples = SentencePairs(prose, tokenizer, masker, LENGTH, seed=0, order=True)
    labels = []
    for number in range(20):
        for sample in all_of(samples.epoch(number)):
            a, b = parts(sample, tokenizer)
            assert prose.document_of(a[0]) == prose.document_of(b[0])
            if sample.next_sentence == 0:
                assert a[-1] + 1 == b[0]
            else:
                assert a[0] > b[-1]
                assert a[0] - b[-1] < 2 * LENGTH  # of one chunk
            labels.append(sample.next_sentence)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("documents", "found"), [([[5, 6, 7]], 1), ([[1], [5, 6]], 1), ([[1], [1], [1]], 0)])
def test_fewer_than_two_documents_are_refused(tmp_path, tokenizer, masker, documents, found):
    corpus = numbered(documents, tmp_path)
    message = f"{tmp_path}: expected at least two documents, to take random sentences from, of two tokens or more, got"
    with pytest.raises(InputError, match=re.escape(f"{message} {found}; the form of the text says what ends")):
        SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0)


def test_for_order_one_document_is_enough_and_none_is_not(tmp_path, tokenizer, masker):
    samples = SentencePairs(numbered([[5, 6]], tmp_path / "a"), tokenizer, masker, LENGTH, 0, order=True)
    assert len(samples.epoch(0).sizes) == 1
    with pytest.raises(InputError, match="expected a document of two tokens or more, got 0"):
        SentencePairs(numbered([[1]], tmp_path / "b"), tokenizer, masker, LENGTH, 0, order=True)


def test_an_empty_document_does_not_count(prose, tmp_path, tokenizer, masker):
    corpus = SmallCorpus(prose.ids, prose.sentences, np.array([0, 0, len(prose.sentences) - 1] + [780] * 2), tmp_path)
    with pytest.raises(InputError, match="expected at least two documents"):
        SentencePairs(corpus, tokenizer, masker, LENGTH, seed=0)


# RunningText


@pytest.mark.parametrize("length", [2, 7, LENGTH, 5000])
def test_running_text_loses_no_token(prose, length):
    samples = RunningText(prose, length, seed=0)
    begins = set()
    for number in range(8):
        epoch = samples.epoch(number)
        rows = all_of(epoch)
        assert [len(row.ids) for row in rows] == epoch.sizes.tolist()
        assert all(np.array_equal(row.ids, row.labels) for row in rows)
        assert np.concatenate([row.ids for row in rows]).tolist() == prose.ids.tolist()
        assert (epoch.sizes[1:-1] == length).all()
        assert 0 < epoch.sizes.min() <= epoch.sizes.max() <= length
        assert (epoch.sizes.dtype, rows[0].ids.dtype) == (np.int32, np.int64)
        begins.add(int(epoch.sizes[0]))
    assert len(begins) > (1 if length == 2 else 4)
    assert samples.dropped == {}


@pytest.mark.parametrize("tokens", [1, 2, 5, 12])
def test_a_text_of_a_few_tokens_is_a_row_or_two(tmp_path, tokens):
    corpus = numbered([[tokens]], tmp_path)
    for number in range(20):
        epoch = RunningText(corpus, 6, seed=0).epoch(number)
        assert np.concatenate([row.ids for row in all_of(epoch)]).tolist() == corpus.ids.tolist()
        assert epoch.sizes.sum() == tokens


@pytest.mark.parametrize("index", [-1, 1000])
def test_a_row_that_is_not_there_is_an_index_error(prose, index):
    with pytest.raises(IndexError):
        RunningText(prose, LENGTH, seed=0).epoch(0).sample(index)


# What is refused, by all


def test_a_length_without_room_is_refused(prose, tokenizer, masker):
    for kind, arguments, least in [
        (MaskedText, (tokenizer, masker), 3),
        (SentencePairs, (tokenizer, masker), 8),
        (RunningText, (), 2),
    ]:
        with pytest.raises(InputError, match=f"length = {least - 1}: expected at least {least} tokens in a row"):
            kind(prose, *arguments, least - 1, 0)
        assert len(kind(prose, *arguments, least, 0).epoch(0).sizes) > 0


@pytest.mark.parametrize("short", [-0.1, 1.1, float("nan")])
def test_a_share_of_short_rows_that_is_none_is_refused(prose, tokenizer, masker, short):
    with pytest.raises(InputError, match=f"short = {short}: expected a share of the rows, from 0 to 1"):
        SentencePairs(prose, tokenizer, masker, LENGTH, 0, short=short)


def test_a_corpus_without_a_token_is_refused(tmp_path, tokenizer, masker):
    corpus = SmallCorpus(np.zeros(0, np.uint16), np.zeros(1, np.int64), np.zeros(1, np.int64), tmp_path)
    for kind, arguments in [(MaskedText, (tokenizer, masker)), (SentencePairs, (tokenizer, masker)), (RunningText, ())]:
        with pytest.raises(InputError, match=re.escape(f"{tmp_path}: expected text with at least one token, got none")):
            kind(corpus, *arguments, LENGTH, 0)


# Of text


def test_samples_of_a_prepared_text_are_its_words(tmp_path):
    tokenizer = bertTokenizer("bert-nano")
    documents = [[f"The ship number {n} sailed to the north.", "It sank.", "Nobody was on it."] for n in range(9)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("\n".join(document) for document in documents) + "\n", encoding="utf-8")
    corpus = prepare([text], tokenizer, TextOptions(), tmp_path / "cache")
    masker = Masker(tokenizer, Masking(whole_words=True))
    ids = [row[1:-1] for row in tokenizer.rows([" ".join(document) for document in documents])]
    masked = all_of(MaskedText(corpus, tokenizer, masker, 64, 0).epoch(0))
    assert [unmasked(sample)[1:-1] for sample in masked] == ids
    assert {sample.next_sentence for sample in all_of(SentencePairs(corpus, tokenizer, masker, 64, 0).epoch(0))} == {
        0,
        1,
    }
    rows = all_of(RunningText(corpus, 10, 0).epoch(0))
    assert np.concatenate([row.ids for row in rows]).tolist() == [token for document in ids for token in document]
    again = prepare([text], tokenizer, TextOptions(), tmp_path / "cache")  # a table beside it does no harm
    table = next(Path(again.directory).glob("chunks-*.npy"))
    assert table.stat().st_mtime_ns == next(Path(corpus.directory).glob(table.name)).stat().st_mtime_ns
