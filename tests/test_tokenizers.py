"""Text -> ids as transformers' BertTokenizer gives them, whatever the text; and what is refused, in which words."""

import pickle
import random
import re
import sys
import unicodedata

import pytest
import torch
from conftest import SHARED

from hubmodels.catalog import embedded_path, lookup
from hubmodels.errors import CheckpointError, HubModelsError, InputError
from hubmodels.tokenizers import SPECIAL, WordPieceTokenizer, train_word_piece

LOWER_CASE = {
    "bert-nano": True,
    "bert-base-uncased": True,
    "bert-base-cased": False,
    "bert-base-chinese": True,
    "bert-base-multilingual-cased": False,
}
SPECIALS = list(SPECIAL)

WORDS = ["the", "of", "and", "unaffable", "Embeddings", "playing", "tokenization", "naïve", "café", "Straße", "don't"]
ACCENTED = "àéîõüçñßøåÆŒđłšžİıſǅﬁÅΩ"
COMBINING = "\u0300\u0301\u0308\u0323\u0327\u0345\u0483\u0903\u20e3\ufe0f"
CJK = "中文字漢字々〆〇㐀豈한국어조선カタカナひらがなー𠀀𪛟𫝀、。「」！？"
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "☃️", "1️⃣", "🧑🏿‍🚀", "😀"]
CONTROL = (
    "\x00\x01\x07\x08\x1b\x1f\x7f\x80\x85\x9f\xad\u200b\u200c\u200d\u200e\u202e\u2060\ufeff\ufffd\ue000\u0378\uffff"
)
SCRIPTS = ["שלום", "עִבְרִית", "مرحبا", "العربيّة", "हिन्दी", "ไทย", "Ελλάς", "ΑΣΣ", "Привет", "ё", "й", "ქართული", "Ꭰ", "ﷺ"]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡«»—–…‘’“”†‰€£¥©®°±×÷§¶·¿′″∀∑√∞≠≤^`´¨"
SPACES = " \t\n\r\v\f\x1c\x1d\u00a0\u1680\u2002\u2009\u2028\u2029\u202f\u205f\u3000"
INSIDE = [
    *SPECIALS,
    "[mask]",
    "[ MASK ]",
    "[[MASK]]",
    "[MASK]ed",
    "un[SEP]",
    "##ing",
    "[unused1]",
    "[PAD][PAD]",
    "[CLS",
]
EDGES = ["", " ", "\n\t", "\x00", "\u0301", "[MASK]", " [SEP] ", "a" * 99, "a" * 100, "a" * 101, "é" * 100, "中" * 120]


def generated(count: int, seed: int) -> list[str]:
    """Texts of everything that a normaliser, a splitter or a vocabulary may stumble over."""
    rng = random.Random(seed)

    def some(letters: str, most: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, most)))

    def word() -> str:
        made = rng.choice(WORDS)
        return rng.choice((made, made.upper(), made.title(), unicodedata.normalize("NFD", made)))

    makers = [
        word,
        word,
        word,
        lambda: some(ACCENTED, 6),
        lambda: unicodedata.normalize("NFD", some(ACCENTED, 6)),
        lambda: word() + some(COMBINING, 3),
        lambda: some(CJK, 8),
        lambda: rng.choice(EMOJI),
        lambda: word() + some(CONTROL, 2) + word(),
        lambda: rng.choice(SCRIPTS),
        lambda: some("abcdefgh", 3) * rng.randint(20, 60),
        lambda: some("0123456789", 14),
        lambda: some(PUNCTUATION, 10),
        lambda: some("0123456789.,:-/%", 12),
        lambda: rng.choice(INSIDE),
        lambda: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
    ]
    texts = list(EDGES)
    while len(texts) < count:
        parts = []
        for _ in range(rng.randint(1, 12)):
            parts += [rng.choice(makers)(), rng.choice(("", " ", " ", " ", some(SPACES, 3)))]
        texts.append("".join(parts))
    return texts


TEXTS = generated(2200, seed=0)
BATCHES = [TEXTS[begin : begin + 50] for begin in range(0, len(TEXTS), 50)]


def vocabulary(name: str):
    if name == "bert-nano":
        return embedded_path(lookup(name).vocabulary[0])
    path = SHARED / "data" / "vocab" / name / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def reference(path, **options):
    from transformers.models.bert.tokenization_bert import BertTokenizerFast, load_vocab

    return BertTokenizerFast(vocab=load_vocab(path), **options)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.long
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module", params=LOWER_CASE)
def both(request):
    """Our tokenizer and theirs on one vocabulary."""
    path = vocabulary(request.param)
    lower_case = LOWER_CASE[request.param]
    return WordPieceTokenizer.from_vocab(path, lower_case=lower_case), reference(path, do_lower_case=lower_case)


@pytest.fixture(scope="module")
def nano() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_vocab(vocabulary("bert-nano"))


# Equality with transformers


def test_ids_types_masks_and_offsets_equal_transformers(both):
    ours, theirs = both
    for texts in BATCHES:
        expected = theirs(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
        assert_equal(ours(texts, offsets=True), dict(expected))


def test_pairs_equal_transformers(both):
    ours, theirs = both
    for texts, pairs in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        expected = theirs(texts, pairs, padding=True, return_offsets_mapping=True, return_tensors="pt")
        assert_equal(ours(texts, pairs, offsets=True), dict(expected))


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 33])
def test_truncation_equals_transformers(both, max_length):
    ours, theirs = both
    for texts in BATCHES[::11]:
        expected = theirs(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        assert_equal(ours(texts, max_length=max_length), dict(expected))


@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 17, 32])
def test_truncation_of_pairs_shortens_the_longer_text_first(both, max_length):
    """transformers' `truncation=True` is its strategy "longest_first"."""
    ours, theirs = both
    for texts, pairs in zip(BATCHES[:3], BATCHES[8:11], strict=True):
        texts, pairs = [text[:40] for text in texts], [text[:25] for text in pairs]
        options = {"padding": True, "max_length": max_length, "return_tensors": "pt", "return_offsets_mapping": True}
        result = ours(texts, pairs, max_length=max_length, offsets=True)
        assert_equal(result, dict(theirs(texts, pairs, truncation=True, **options)))
        assert_equal(result, dict(theirs(texts, pairs, truncation="longest_first", **options)))


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_transformers(both, skip):
    ours, theirs = both
    for text in TEXTS[:400]:
        ids = ours(text)["input_ids"][0]
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_tokens_equal_transformers(both):
    ours, theirs = both
    for text in TEXTS[:200]:
        ids = ours(text)["input_ids"][0]
        assert ours.tokens(ids) == theirs.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize(("strip_accents", "split_chinese"), [(None, False), (True, True), (False, False)])
def test_options_equal_transformers(lower_case, strip_accents, split_chinese):
    path = vocabulary("bert-base-multilingual-cased")
    ours = WordPieceTokenizer.from_vocab(
        path, lower_case=lower_case, strip_accents=strip_accents, split_chinese=split_chinese
    )
    theirs = reference(
        path, do_lower_case=lower_case, strip_accents=strip_accents, tokenize_chinese_chars=split_chinese
    )
    for texts in BATCHES[::6]:
        assert_equal(ours(texts), dict(theirs(texts, padding=True, return_tensors="pt")))


# What the tensors are


def test_one_text_is_a_batch_of_one(nano):
    assert_equal(nano("The ship sailed."), nano(["The ship sailed."]))
    assert_equal(nano("The ship", "sailed."), nano(("The ship",), ("sailed.",)))


def test_a_batch_is_padded_on_the_right_to_its_longest_row(nano):
    texts = ["the ship sailed across the sea", "", "the ship"]
    batch, alone = nano(texts, offsets=True), [nano(text, offsets=True) for text in texts]
    assert batch["input_ids"].shape[1] == max(row["input_ids"].shape[1] for row in alone)
    for i, row in enumerate(alone):
        length = row["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, :length], row["input_ids"][0])
        assert torch.equal(batch["offset_mapping"][i, :length], row["offset_mapping"][0])
        assert batch["input_ids"][i, length:].eq(nano.pad_token_id).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert not batch["token_type_ids"][i].any()
        assert not batch["offset_mapping"][i, length:].any()


def test_types_part_a_pair(nano):
    row = {name: tensor[0].tolist() for name, tensor in nano("the ship", "the sea").items()}
    first, second = len(nano("the ship")["input_ids"][0]), len(nano("the sea")["input_ids"][0]) - 1
    assert row["token_type_ids"] == [0] * first + [1] * second
    assert row["input_ids"][first - 1] == row["input_ids"][-1] == nano.sep_token_id


def test_offsets_cut_the_words_out_of_the_text(nano):
    text = "The ship — the 😀 sea!"
    result = nano(text, offsets=True)
    words = [text[begin:end] for begin, end in result["offset_mapping"][0].tolist()]
    assert words[0] == words[-1] == ""
    assert words[1] == "The"
    assert words[-2] == "!"
    assert "".join(words).replace("##", "") == text.replace(" ", "")


def test_truncation_holds_for_one_call_only(nano):
    before = nano("the ship sailed across the sea")
    assert nano("the ship sailed across the sea", max_length=4)["input_ids"].shape == (1, 4)
    assert_equal(nano("the ship sailed across the sea"), before)


def test_truncation_leaves_no_trace_in_the_inner_tokenizer(nano):
    """`training.corpus` encodes with `inner` itself: a call with max_length must not shorten its corpus."""
    text = "the ship sailed across the sea"
    whole = nano(text)["input_ids"][0].tolist()
    nano(text, max_length=4)
    assert nano.inner.encode(text).ids == whole


def test_properties(both):
    ours, theirs = both
    assert ours.vocab_size == theirs.vocab_size
    assert ours.mask_token == theirs.mask_token
    for name in ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_decode_and_tokens_take_lists_and_tensors(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, "the", "sail", "##ed", "."]) + "\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer.from_vocab(path)
    ids = tokenizer("The [MASK] sailed.")["input_ids"][0]
    assert ids.tolist() == [2, 5, 4, 6, 7, 8, 3]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "the sailed."
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[CLS] the [MASK] sailed. [SEP]"
    expected = ["[CLS]", "the", "[MASK]", "sail", "##ed", ".", "[SEP]"]
    assert tokenizer.tokens(ids) == tokenizer.tokens(ids.tolist()) == expected


# Files and copies


def test_from_json_of_what_was_saved_equals_from_vocab(both, tmp_path):
    ours, _ = both
    ours("leave a truncation behind", max_length=3)
    ours.save(tmp_path / "tokenizer.json")
    again = WordPieceTokenizer.from_json(tmp_path / "tokenizer.json")
    for texts in BATCHES[::8]:
        assert_equal(again(texts, offsets=True), ours(texts, offsets=True))
        assert_equal(again(texts, texts[::-1], max_length=20), ours(texts, texts[::-1], max_length=20))
    ids = ours(TEXTS[40])["input_ids"][0]
    assert again.decode(ids) == ours.decode(ids)


def test_pickle_round_trip(both):
    ours, _ = both
    ours("leave a truncation behind", max_length=3)
    again = pickle.loads(pickle.dumps(ours))
    assert_equal(again(TEXTS[:100]), ours(TEXTS[:100]))
    assert again.mask_token_id == ours.mask_token_id


def test_vocabulary_with_windows_line_ends_and_no_last_one(nano, tmp_path):
    text = vocabulary("bert-nano").read_text(encoding="utf-8").rstrip("\n").replace("\n", "\r\n")
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    again = WordPieceTokenizer.from_vocab(tmp_path / "vocab.txt")
    assert again.vocab_size == nano.vocab_size
    assert_equal(again(TEXTS[:50]), nano(TEXTS[:50]))


# Errors


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts: expected a str or a list of str, got NoneType"),
        (3, "texts: expected a str or a list of str, got int"),
        (b"ship", "texts: expected a str or a list of str, got bytes"),
        ({"a": "ship"}, "texts: expected a str or a list of str, got dict"),
        (["ship", 3], "texts[1]: expected a str, got int"),
        ([None], "texts[0]: expected a str, got NoneType"),
        ([b"ship"], "texts[0]: expected a str, got bytes"),
        ([("the", "ship")], "texts[0]: expected a str, got tuple"),
        ([], "texts: expected at least one text, got an empty list"),
    ],
)
def test_what_is_no_text_is_refused(nano, texts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        nano(texts)


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        (["a", "b"], ["c"], "pairs: expected 2, one for each text, got 1"),
        ("a", ["c", "d"], "pairs: expected 1, one for each text, got 2"),
        (["a"], [4], "pairs[0]: expected a str, got int"),
        (["a"], 4, "pairs: expected a str or a list of str, got int"),
        ([], [], "texts: expected at least one text, got an empty list"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(nano, texts, pairs, message):
    with pytest.raises(InputError, match=re.escape(message)):
        nano(texts, pairs)


@pytest.mark.parametrize(("pairs", "max_length", "least"), [(None, 1, 2), (None, 0, 2), (None, -5, 2), ("b", 2, 3)])
def test_max_length_has_to_hold_the_special_tokens(nano, pairs, max_length, least):
    message = f"max_length = {max_length}: expected at least {least}, the special tokens alone"
    with pytest.raises(InputError, match=re.escape(message)):
        nano("a", pairs, max_length=max_length)


def test_a_text_that_is_not_unicode_is_refused(nano):
    """A lone surrogate: what Python makes of a file name or argument that is not UTF-8."""
    with pytest.raises(InputError, match=re.escape("texts[1]")):
        nano(["ship", "s\udce9a"])


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nship\n", encoding="utf-8")
    message = f"{path}: the vocabulary lacks [MASK]; BERT needs {', '.join(SPECIALS)}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        WordPieceTokenizer.from_vocab(path)


def test_a_tokenizer_json_without_a_special_token_is_refused(tmp_path):
    import tokenizers

    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "ship"])}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]")).save(str(path))
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: the vocabulary lacks [SEP], [MASK]; BERT needs")):
        WordPieceTokenizer.from_json(path)


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"a": 1}', "[PAD]\n[UNK]\n"])
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(
        CheckpointError, match=re.escape(f"{path}: expected a tokenizer.json of the tokenizers library")
    ):
        WordPieceTokenizer.from_json(path)


@pytest.mark.parametrize("make", [WordPieceTokenizer.from_vocab, WordPieceTokenizer.from_json])
def test_a_missing_file_is_named(tmp_path, make):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "gone"))):
        make(tmp_path / "gone")


def test_a_vocabulary_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n\xff\xfe\n")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        WordPieceTokenizer.from_vocab(path)


@pytest.mark.parametrize("name", ["from_vocab", "from_json", "train"])
def test_without_the_tokenizers_package_the_error_says_what_to_install(monkeypatch, nano, tmp_path, name):
    nano.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    makers = {
        "from_vocab": lambda: WordPieceTokenizer.from_vocab(vocabulary("bert-nano")),
        "from_json": lambda: WordPieceTokenizer.from_json(tmp_path / "tokenizer.json"),
        "train": lambda: train_word_piece(["the ship"], 40),
    }
    with pytest.raises(HubModelsError, match=re.escape("need the package 'tokenizers': pip install tokenizers")):
        makers[name]()


# A new vocabulary


def invented_text() -> list[str]:
    rng = random.Random(3)
    syllables = ["ka", "lo", "mi", "tu", "ren", "sol", "vi", "na", "per", "dro"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(400)]


def test_train_word_piece_makes_a_vocabulary_of_the_size_asked_for():
    tokenizer = train_word_piece(invented_text(), 200)
    assert tokenizer.vocab_size == 200
    assert tokenizer.tokens(range(5)) == SPECIALS
    assert sorted(tokenizer.inner.get_vocab().values()) == list(range(200))


def test_train_word_piece_knows_its_text():
    texts = invented_text()
    tokenizer = train_word_piece(texts, 200)
    ids = tokenizer(texts)["input_ids"]
    assert not ids.eq(tokenizer.unk_token_id).any()
    assert tokenizer.decode(ids[0]) == texts[0].lower()


def test_train_word_piece_can_keep_capitals():
    texts = [*invented_text(), "Kalo KALO kalo"]
    tokenizer = train_word_piece(texts, 300, lower_case=False)
    upper, lower = tokenizer("KALO")["input_ids"], tokenizer("kalo")["input_ids"]
    assert upper.tolist() != lower.tolist()
    assert not tokenizer(texts)["input_ids"].eq(tokenizer.unk_token_id).any()
