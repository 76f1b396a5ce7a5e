"""Ids without offsets are those with offsets, and a list's rows those of a batch, whatever the text or the tokenizer.

The two come from different calls of the library: one follows where each letter stands, one does not.
"""

import copy
import json
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SHARED

from hubmodels.catalog import embedded_path, lookup
from hubmodels.errors import InputError
from hubmodels.tokenizers import SPECIAL, BytePairTokenizer, Tokenizer, WordPieceTokenizer

SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
PIECES = [
    *SPECIAL,
    *("[mask]", "un[SEP]", "[MASK]ed", "[[CLS]", "<|endoftext|>", "##ing", "[unused1]"),
    *("the", "Ship", "SAILED", "don't", "naïve", "e\u0301", "Straße", "ΑΣΣ", "İ", "x" * 101, "https://a.b/c?d=e"),
    *("庆恐肉袒请罪", "。", "한국어", "カタカナ", "𠀀", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷", "1️⃣", "שלום", "हिन्दी", "ไทย"),
    *"\u0300\u0301\u0323\u0345\u20e3\ufe0f\x00\x07\x7f\x80\xad\u200d\u202e\ufffd\ue000\uffff.,;:!?()",
]
EDGES = ["", " ", "   ", "\t\n", "\u00a0", "\u2028", "\x00", "\u0301", "[MASK]", " [SEP] ", "a\x0bb\x85c\x1cd e"]


def generated(count: int) -> list[str]:
    rng = random.Random(7)

    def piece() -> str:
        letter = chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
        return rng.choice((rng.choice(PIECES), rng.choice(PIECES), rng.choice(SPACES), " ", " ", letter))

    return EDGES + ["".join(piece() for _ in range(rng.randint(1, 40))) for _ in range(count)]


TEXTS = generated(1200)


def word_piece(name: str) -> WordPieceTokenizer:
    if name == "bert-nano":
        return WordPieceTokenizer.from_vocab(embedded_path(lookup(name).vocabulary[0]))
    path = SHARED / "data" / "vocab" / name / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return WordPieceTokenizer.from_vocab(path)


def byte_pair(name: str) -> BytePairTokenizer:
    if name == "gpt-nano":
        vocabulary = embedded_path(lookup(name).vocabulary[0])
        return BytePairTokenizer.from_files(vocabulary, vocabulary.with_name("merges.txt"))
    paths = [SHARED / "data" / "vocab" / "gpt1" / file for file in ("encoder_bpe_40000.json", "vocab_40000.bpe")]
    if not paths[0].is_file():
        pytest.skip(f"{paths[0]} is not there")
    return BytePairTokenizer.from_files(*paths)


def changed(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    """The same but for some parts of its tokenizer.json; added_tokens come on top."""
    import tokenizers

    content = json.loads(tokenizer.inner.to_str())
    content["added_tokens"] += parts.pop("added_tokens", [])
    return type(tokenizer)(tokenizers.Tokenizer.from_str(json.dumps(content | parts)))


def added(content: str, **flags: bool) -> dict[str, object]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 8192, "content": content, **plain, **flags}


ODD = {
    "a token with a space": {"added_tokens": [added("the Ship")]},
    "a token that takes spaces": {"added_tokens": [added("Ship", lstrip=True, rstrip=True)]},
    "a word of its own": {"added_tokens": [added("ship", single_word=True, normalized=True)]},
    "a Chinese token": {"added_tokens": [added("庆恐", normalized=True)]},
    "no normaliser": {"normalizer": None},
    "across spaces": {"normalizer": {"type": "Replace", "pattern": {"String": "e S"}, "content": "x"}},
    "stripped": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "the"}},
    "composed": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}},
    "parted at spaces alone": {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    "parted as bytes": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
    "not parted": {"pre_tokenizer": None},
    "no post-processor": {"post_processor": None},
}


@pytest.fixture(scope="module")
def nano() -> WordPieceTokenizer:
    return word_piece("bert-nano")


def with_offsets(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in tokenizer.inner.encode_batch(texts, add_special_tokens=False)]


def assert_rows(tokenizer: WordPieceTokenizer, texts: list[str]) -> None:
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer.rows(texts) == [[begin, *ids, end] for ids in with_offsets(tokenizer, texts)]


@pytest.mark.parametrize(
    "name", ["bert-nano", "bert-base-uncased", "bert-base-cased", "bert-base-chinese", "bert-base-multilingual-cased"]
)
def test_rows_are_the_ids_with_offsets(name):
    assert_rows(word_piece(name), TEXTS)


@pytest.mark.parametrize("change", ODD)
def test_rows_are_the_ids_with_offsets_of_an_odd_tokenizer(nano, change):
    assert_rows(changed(nano, **ODD[change]), TEXTS[:500])


@pytest.mark.parametrize("max_length", [2, 3, 8, 30])
def test_rows_of_at_most_so_many_tokens(nano, max_length):
    whole = nano.rows(TEXTS)
    shortened = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in whole]
    assert nano.rows(TEXTS, max_length) == shortened
    ids = nano(TEXTS, max_length=max_length)["input_ids"]
    assert torch.equal(ids, nano.padded(shortened)["input_ids"])


@pytest.mark.parametrize("max_length", [None, 9])
def test_a_call_without_offsets_gives_what_one_with_them_gives(nano, max_length):
    texts, pairs = TEXTS[:200], TEXTS[200:400]
    for arguments in ((texts,), (texts, pairs)):
        full = nano(*arguments, max_length=max_length, offsets=True)
        found = nano(*arguments, max_length=max_length)
        assert set(full) - set(found) == {"offset_mapping"}
        assert all(torch.equal(tensor, full[name]) for name, tensor in found.items())


@pytest.mark.parametrize("name", ["gpt-nano", "gpt1"])
def test_byte_pairs_without_offsets_are_those_with_them(name):
    tokenizer = byte_pair(name)
    texts = [text for text, ids in zip(TEXTS, with_offsets(tokenizer, TEXTS), strict=True) if ids]
    full, found = tokenizer(texts, offsets=True), tokenizer(texts)
    assert all(torch.equal(tensor, full[name]) for name, tensor in found.items())


def test_copies_and_threads_give_the_same_rows(nano):
    expected = nano.rows(TEXTS)
    for again in (pickle.loads(pickle.dumps(nano)), copy.deepcopy(nano)):
        assert again.rows(TEXTS) == expected
    with ThreadPoolExecutor(4) as pool:
        assert all(rows == expected for rows in pool.map(lambda _: nano.rows(TEXTS), range(8)))


def test_rows_of_nothing(nano):
    assert nano.rows([]) == []
    assert nano.rows("") == [[nano.cls_token_id, nano.sep_token_id]]


def test_rows_refuse_what_is_no_unicode(nano):
    with pytest.raises(InputError, match=re.escape("texts[1]: expected Unicode text")):
        nano.rows(["ship", "s\udce9a"])
