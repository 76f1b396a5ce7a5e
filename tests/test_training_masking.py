"""What is hidden: exactly so many tokens, by chance and nothing but chance, and words as a whole."""

import pickle
import re
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from small_corpus import p_value, vocabulary

from hubmodels.errors import InputError
from hubmodels.heads import IGNORED
from hubmodels.tokenizers import SPECIAL
from hubmodels.training.chance import generator
from hubmodels.training.masking import Masker, Masking

WORDS, PIECES, CHARACTERS = 300, 100, "我喜欢你们中国人民和t恤"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words w0 …, pieces ##p0 …, characters; <x> is special and was added, `kayak` is a word that was added."""
    words = [*(f"w{i}" for i in range(WORDS)), *(f"##p{i}" for i in range(PIECES)), *CHARACTERS]
    tokenizer = vocabulary(tmp_path_factory.mktemp("vocabulary"), words)
    tokenizer, _ = tokenizer.with_words(["kayak"])
    tokenizer.inner.add_special_tokens(["<x>"])
    return tokenizer


@pytest.fixture(scope="module")
def special(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids([*SPECIAL, "<x>"])


def ids_of(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.rows(text)[0])


def words_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """[CLS] words [SEP], of the vocabulary's whole words"""
    return np.concatenate([[2], rng.integers(len(SPECIAL), len(SPECIAL) + WORDS, count), [3]])


def row_of_words(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """[CLS] words [SEP], each of so many pieces"""
    ids = rng.integers(len(SPECIAL), len(SPECIAL) + WORDS, sizes.sum())
    inside = np.ones(len(ids), bool)
    inside[sizes.cumsum() - sizes] = False
    ids[inside] = rng.integers(len(SPECIAL) + WORDS, len(SPECIAL) + WORDS + PIECES, inside.sum())
    return np.concatenate([[2], ids, [3]])


def runs(chosen: np.ndarray) -> list[int]:
    """How many neighbours were chosen together"""
    return [len(list(group)) for is_chosen, group in groupby(chosen.tolist()) if is_chosen]


# Tokens


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.4, 1.0])
def test_the_count_is_exact_in_every_row(tokenizer, rate):
    masker = Masker(tokenizer, Masking(rate=rate))
    for count in range(1, 140):
        _, labels = masker(words_of(generator(0, 0, count), count), generator(1, 0, count))
        assert (labels != IGNORED).sum() == max(1, round(rate * count))


def test_of_a_million_tokens_80_percent_are_hidden_10_another_word_10_themselves(tokenizer):
    """And the places are all alike, and so are the words put in: chi square."""
    masker, rows, length = Masker(tokenizer, Masking()), 8000, 125
    fates, places, put_in = np.zeros(3), np.zeros(length), np.zeros(tokenizer.vocab_size)
    for row in range(rows):
        rng = generator(2, 0, row)
        ids = words_of(rng, length)
        masked, labels = masker(ids, rng)
        chosen = labels != IGNORED
        hidden, kept = masked == tokenizer.mask_token_id, masked == ids
        fates += [(chosen & hidden).sum(), (chosen & ~hidden & ~kept).sum(), (chosen & kept).sum()]
        places += chosen[1:-1]
        put_in += np.bincount(masked[chosen & ~hidden & ~kept], minlength=len(put_in))
    count = rows * 19  # round(0.15 * 125)
    assert fates.sum() == places.sum() == count
    ordinary = tokenizer.vocab_size - len(SPECIAL) - 1
    itself = 0.1 / ordinary  # a random word may be the one that stood there
    assert p_value(fates, count * np.array([0.8, 0.1 - itself, 0.1 + itself]), 2) > 0.01
    # Of a row's places so many are chosen, none twice: their counts vary less than if they were drawn one by one.
    assert p_value(places / (1 - 19 / length) ** 0.5, rows * 19 / length / (1 - 19 / length) ** 0.5, length - 1) > 0.01
    assert (put_in > 0).sum() == ordinary
    # A word is never put in for itself, so that those that the rows are made of come a little less often.
    in_rows = np.arange(tokenizer.vocab_size)[put_in > 0] < len(SPECIAL) + WORDS
    expected = np.where(in_rows, 1 - 1 / WORDS, 1.0)
    assert p_value(put_in[put_in > 0], put_in.sum() * expected / expected.sum(), ordinary - 1) > 0.01


@pytest.mark.parametrize("masking", [Masking(rate=0.9, masked=0.0, random=1.0), Masking(rate=0.9, longest=3),
                                     Masking(rate=0.9, masked=0.0, random=1.0, whole_words=True)])  # fmt: skip
def test_special_tokens_are_never_chosen_and_never_put_in(tokenizer, special, masking):
    masker = Masker(tokenizer, masking)
    put_in = Counter()
    for row in range(400):
        rng = generator(3, 0, row)
        ids = words_of(rng, 60)
        fixed = rng.random(len(ids)) < 0.4
        ids[fixed] = rng.choice(special, fixed.sum())
        masked, labels = masker(ids, rng)
        is_special = np.isin(ids, special)
        assert (labels[is_special] == IGNORED).all()
        assert (masked[is_special] == ids[is_special]).all()
        put_in.update(masked[masked != ids].tolist())
    put_in.pop(tokenizer.mask_token_id, None)
    assert not put_in.keys() & set(special)
    if masking.random == 1.0:
        assert tokenizer.convert_tokens_to_ids("kayak") in put_in  # an added word is a word


@pytest.mark.parametrize("masking", [Masking(), Masking(longest=4), Masking(whole_words=True)])
def test_a_row_without_a_word_stays_as_it_is(tokenizer, special, masking):
    ids = np.array([*special, *special])
    masked, labels = Masker(tokenizer, masking)(ids, generator(0, 0))
    assert masked.tolist() == ids.tolist()
    assert (labels == IGNORED).all()


@pytest.mark.parametrize("masking", [Masking(0.4), Masking(0.4, longest=4), Masking(0.4, whole_words=True)])
def test_labels_are_what_was_there_and_the_rest_of_the_row_stays(tokenizer, masking):
    masker = Masker(tokenizer, masking)
    for row in range(100):
        rng = generator(4, 0, row)
        ids = row_of_words(rng, rng.integers(1, 4, 30))
        before = ids.copy()
        masked, labels = masker(ids, rng)
        assert masked.dtype == labels.dtype == np.int64
        assert masked.shape == labels.shape == ids.shape
        chosen = labels != IGNORED
        assert (labels[chosen] == ids[chosen]).all()
        assert (masked[~chosen] == ids[~chosen]).all()
        assert (ids == before).all()


def test_a_row_may_have_any_integers(tokenizer):
    ids = words_of(generator(5, 0), 50)
    masker = Masker(tokenizer, Masking())
    masked, labels = masker(ids.astype(np.uint16), generator(6, 0))
    same, same_labels = masker(ids, generator(6, 0))
    assert (masked == same).all()
    assert (labels == same_labels).all()


@pytest.mark.parametrize("masking", [Masking(), Masking(longest=3), Masking(whole_words=True)])
def test_masks_are_a_function_of_the_numbers_in_any_process(tokenizer, masking):
    ids = row_of_words(generator(7, 0), np.full(40, 2))
    masker = Masker(tokenizer, masking)
    first = masker(ids, generator(0, 1, 2))
    again = pickle.loads(pickle.dumps(masker))(ids, generator(0, 1, 2))
    assert all((left == right).all() for left, right in zip(first, again, strict=True))
    for seed, epoch, index in [(1, 1, 2), (0, 2, 2), (0, 1, 3)]:
        assert (masker(ids, generator(seed, epoch, index))[1] != first[1]).any()


# Whole words


def test_whole_words_are_hidden_all_or_nothing_and_15_percent_of_the_tokens(tokenizer):
    masker = Masker(tokenizer, Masking(whole_words=True))
    hidden = total = 0
    by_size = np.zeros((2, 7))  # words there were, words that were chosen
    for row in range(4000):
        rng = generator(8, 0, row)
        sizes = rng.choice([1, 2, 3, 6], 70, p=[0.6, 0.2, 0.15, 0.05])
        ids = row_of_words(rng, sizes)
        masked, labels = masker(ids, rng)
        begins = sizes.cumsum() - sizes
        chosen, is_mask = (labels != IGNORED)[1:-1], (masked == tokenizer.mask_token_id)[1:-1]
        of_words = np.add.reduceat(chosen.astype(int), begins)
        assert ((of_words == 0) | (of_words == sizes)).all()
        assert (is_mask == np.repeat(is_mask[begins], sizes)).all()  # one fate
        hidden, total = hidden + chosen.sum(), total + len(chosen)
        by_size[0] += np.bincount(sizes, minlength=7)
        by_size[1] += np.bincount(sizes[of_words > 0], minlength=7)
    assert hidden / total == pytest.approx(0.15, abs=0.003)
    for size in (1, 2, 3, 6):  # a long word has the chance of a short one
        assert by_size[1, size] / by_size[0, size] == pytest.approx(0.15, abs=0.006), size


@pytest.mark.parametrize("size", [2, 3, 5])
def test_15_percent_also_where_every_word_is_long(tokenizer, size):
    masker = Masker(tokenizer, Masking(whole_words=True))
    ids = row_of_words(generator(9, 0), np.full(120 // size, size))
    counts = [(masker(ids, generator(9, 1, row))[1] != IGNORED).sum() for row in range(3000)]
    assert np.mean(counts) / 120 == pytest.approx(0.15, abs=0.003)
    assert max(counts) < 18 + size


def test_at_least_one_word_is_hidden_however_long(tokenizer):
    masker = Masker(tokenizer, Masking(whole_words=True))
    ids = row_of_words(generator(10, 0), np.array([9]))
    for row in range(20):
        assert (masker(ids, generator(10, 1, row))[1] != IGNORED).sum() == 9


def test_a_piece_whose_word_is_not_in_the_row_is_a_unit(tokenizer):
    """After [CLS] and [SEP], where a row was cut."""
    masker = Masker(tokenizer, Masking(rate=0.01, whole_words=True))
    one, piece = tokenizer.convert_tokens_to_ids(["w1", "##p1"])
    ids = np.array([2, piece, piece, 3, piece, one, piece, 3])
    found = {tuple(np.flatnonzero(masker(ids, generator(11, 0, n))[1] != IGNORED).tolist()) for n in range(200)}
    assert found == {(1, 2), (4,), (5, 6)}


def found_units(tokenizer, words, text: str, longest: int = 1) -> set[str]:
    """What is hidden together when one unit is"""
    masker = Masker(tokenizer, Masking(rate=0.001, whole_words=True, longest=longest), words)
    ids = ids_of(tokenizer, text)
    found = set()
    for number in range(300):
        labels = masker(ids, generator(12, 0, number))[1]
        found.add("".join(tokenizer.tokens(labels[labels != IGNORED].tolist())))
    return found


def test_a_chinese_word_of_the_list_is_hidden_as_a_whole(tokenizer):
    masker = Masker(tokenizer, Masking(whole_words=True), ["喜欢"])
    ids = ids_of(tokenizer, "我喜欢你")
    assert tokenizer.tokens(ids.tolist())[1:-1] == ["我", "喜", "欢", "你"]
    seen = Counter()
    for number in range(600):
        masked, labels = masker(ids, generator(13, 0, number))
        assert (labels[2] != IGNORED) == (labels[3] != IGNORED)
        assert (masked[2] == tokenizer.mask_token_id) == (masked[3] == tokenizer.mask_token_id)
        seen[tuple((labels != IGNORED).nonzero()[0].tolist())] += 1
    assert seen.keys() == {(1,), (2, 3), (4,)}
    assert p_value(list(seen.values()), 200, 2) > 0.01


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["中国", "中国人民"], "中国人民和我", {"中国人民", "和", "我"}),  # the longest
        (["中国", "中国人民"], "中国人和我", {"中国", "人", "和", "我"}),  # that is there
        (["中国", "国人民"], "中国人民", {"中国", "人", "民"}),  # from the left
        (["喜欢"], "喜 [MASK] 欢 喜欢", {"喜", "欢", "喜欢"}),  # not over a special token
        (["喜欢", "我们"], "w1我们w2", {"w1", "我们", "w2"}),
        (["T恤", "没有", "w1w2"], "我T恤", {"我", "t恤"}),  # as the tokenizer reads them; what it cannot is left out
    ],
)
def test_words_are_matched_from_the_left_the_longest_first(tokenizer, words, text, expected):
    assert found_units(tokenizer, words, text) == expected


def test_a_character_whose_word_goes_on_is_no_part_of_a_chinese_word(tokenizer):
    masker = Masker(tokenizer, Masking(rate=0.001, whole_words=True), ["喜欢"])
    ids = np.array(tokenizer.convert_tokens_to_ids(["喜", "欢", "##p1"]))
    found = {tuple(np.flatnonzero(masker(ids, generator(14, 0, n))[1] != IGNORED).tolist()) for n in range(99)}
    assert found == {(0,), (1, 2)}


# Several words together


def test_neighbours_are_hidden_together_as_often_as_published(tokenizer):
    """Cui 2020 §3.1: one word 40 %, two 30 %, three 20 %, four 10 %."""
    masker, rows = Masker(tokenizer, Masking(rate=1e-6, longest=4)), 4000
    ids = words_of(generator(15, 0), 1000)
    found = Counter(size for row in range(rows) for size in runs(masker(ids, generator(15, 1, row))[1] != IGNORED))
    assert found.total() == rows  # one unit a row
    assert p_value([found[size] for size in (1, 2, 3, 4)], rows * np.array([0.4, 0.3, 0.2, 0.1]), 3) > 0.01


def test_several_words_together_are_15_percent_in_the_mean_and_every_place_alike(tokenizer):
    masker, rows = Masker(tokenizer, Masking(longest=3)), 4000
    ids = words_of(generator(16, 0), 120)
    shares = np.mean([masker(ids, generator(16, 1, row))[1][1:-1] != IGNORED for row in range(rows)], axis=0)
    assert shares.mean() == pytest.approx(0.15, abs=0.003)
    assert np.abs(shares - 0.15).max() < 5 * (0.15 * 0.85 / rows) ** 0.5


def test_several_words_together_are_whole_and_of_one_text(tokenizer):
    text = "我们 [SEP] 喜欢 你"
    assert found_units(tokenizer, ["我们", "喜欢"], text, longest=3) == {"我们", "喜欢", "喜欢你", "你"}


# What is refused


@pytest.mark.parametrize(
    ("masking", "words", "message"),
    [
        (Masking(rate=0), None, "rate = 0: expected a share of the tokens, more than 0 and at most 1"),
        (Masking(rate=1.5), None, "rate = 1.5: expected a share"),
        (Masking(masked=0.8, random=0.3), None, "masked = 0.8, random = 0.3: expected shares of the hidden, at most 1"),
        (Masking(masked=-0.1), None, "masked = -0.1"),
        (Masking(longest=0), None, "longest = 0: expected a whole number of words, at least 1"),
        (Masking(longest=2.0), None, "longest = 2.0"),
        (Masking(), ["喜欢"], "words: they say what a whole word is, but whole_words is False"),
        (Masking(whole_words=True), ["w1", "没有", "我"], "none of the 3 is such a word"),
        (Masking(whole_words=True), [], "none of the 0 is such a word"),
        (Masking(whole_words=True), [1], "words"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer, masking, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Masker(tokenizer, masking, words)


def test_a_vocabulary_without_words_is_refused(tmp_path):
    with pytest.raises(InputError, match="got special tokens alone"):
        Masker(vocabulary(tmp_path, []), Masking())
