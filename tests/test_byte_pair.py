"""Text -> ids as transformers' OpenAIGPTTokenizer and GPT2Tokenizer give them, and back; and what is refused."""

import copy
import json
import pickle
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import SHARED
from test_tokenizers import EMOJI, WORDS, generated, invented_text

import hubmodels
from hubmodels.catalog import embedded_path, lookup
from hubmodels.errors import CatalogError, CheckpointError, HubModelsError, InputError
from hubmodels.tokenizers import (
    END_OF_TEXT,
    BytePairTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    read_tokenizer,
    train_byte_pair,
)

REAL = {"gpt1": ("encoder_bpe_40000.json", "vocab_40000.bpe"), "gpt2": ("encoder.json", "vocab.bpe")}
BYTE_LEVEL = {"gpt1": False, "small-gpt1": False, "gpt2": True, "gpt-nano": True}
LAYOUTS = [("vocab.json", "merges.txt"), *REAL.values()]
INSIDE = [END_OF_TEXT, "<unk>", "</w>", "the</w>", "<|endoftext", "|>", "Ġthe", "\r\n", "\n\n", "  ", "'s", "'LL", "_"]


def with_gpt_marks(texts: list[str], seed: int) -> list[str]:
    """Every third text gets something that means something to these two tokenizers, at any place."""
    rng = random.Random(seed)
    changed = []
    for number, text in enumerate(texts):
        at = rng.randrange(len(text) + 1)
        changed.append(text[:at] + rng.choice(INSIDE) + text[at:] if number % 3 == 1 else text)
    return changed


TEXTS = with_gpt_marks(generated(2200, seed=6), seed=7)
BATCHES = [TEXTS[begin : begin + 100] for begin in range(0, len(TEXTS), 100)]


def code_points(count: int, seed: int) -> list[str]:
    """Texts of code points of all planes, surrogates left out."""
    rng = random.Random(seed)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]

    def one() -> str:
        return chr(rng.randrange(*rng.choice(planes)))

    return ["".join(one() for _ in range(rng.randint(1, 30))) for _ in range(count)]


def entries_and_merges(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write(directory: Path, vocab: dict[str, int], merges: list[tuple[str, str]], names=LAYOUTS[0]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (directory / names[1]).write_text("\n".join(lines), encoding="utf-8")
    return directory


def small_gpt1() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of GPT's kind made here, for machines without the real one."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    inner.train_from_iterator([*invented_text(), *WORDS * 5], trainer)
    return entries_and_merges(inner)


@pytest.fixture(scope="session")
def files_of(tmp_path_factory):
    """name -> the paths of its vocabulary and merges"""
    small = write(tmp_path_factory.mktemp("small"), *small_gpt1())

    def find(name: str) -> tuple[Path, Path]:
        if name == "small-gpt1":
            return small / "vocab.json", small / "merges.txt"
        if name == "gpt-nano":
            vocab, merges = map(embedded_path, lookup(name).vocabulary)
            return vocab, merges
        vocab, merges = (SHARED / "data" / "vocab" / name / file for file in REAL[name])
        if not vocab.is_file():
            pytest.skip(f"{vocab} is not there")
        return vocab, merges

    return find


def reference(vocab: Path, merges: Path, byte_level: bool):
    """transformers' tokenizer of OpenAI's files, which are read here as OpenAI's own code reads them."""
    from transformers import GPT2Tokenizer, OpenAIGPTTokenizer

    entries = json.loads(vocab.read_text(encoding="utf-8"))
    pairs = [tuple(line.split(" ")) for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line]
    return (GPT2Tokenizer if byte_level else OpenAIGPTTokenizer)(vocab=entries, merges=pairs)


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def both(request, files_of):
    """Our tokenizer and theirs on one vocabulary."""
    files = files_of(request.param)
    return BytePairTokenizer.from_files(*files), reference(*files, BYTE_LEVEL[request.param])


@pytest.fixture(scope="module", params=["small-gpt1", "gpt-nano"])
def ours(request, files_of) -> BytePairTokenizer:
    """One tokenizer of each kind."""
    return BytePairTokenizer.from_files(*files_of(request.param))


@pytest.fixture(scope="module")
def nano(files_of) -> BytePairTokenizer:
    return BytePairTokenizer.from_files(*files_of("gpt-nano"))


@pytest.fixture(scope="module")
def small(files_of) -> BytePairTokenizer:
    return BytePairTokenizer.from_files(*files_of("small-gpt1"))


def some_text(tokenizer: BytePairTokenizer, texts: list[str]) -> list[str]:
    """Those that have a token: the others are refused."""
    return [text for text in texts if tokenizer.tokenize(text)]


def assert_equal(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.long
        assert torch.equal(tensor, theirs[name]), name


# Equality with transformers


def test_ids_masks_and_offsets_equal_transformers(both):
    ours, theirs = both
    compared = refused = 0
    for texts in BATCHES:
        expected = theirs(texts, return_offsets_mapping=True)
        rows = zip(texts, expected["input_ids"], expected["offset_mapping"], strict=True)
        kept = [(text, ids, places) for text, ids, places in rows if ids]
        result = ours([text for text, _, _ in kept], offsets=True)
        for row, (text, ids, places) in enumerate(kept):
            length = len(ids)
            assert result["input_ids"][row, :length].tolist() == ids, text
            assert result["offset_mapping"][row, :length].tolist() == [list(place) for place in places], text
            assert result["attention_mask"][row].tolist() == [1] * length + [0] * (
                result["input_ids"].shape[1] - length
            )
        for text in set(texts) - {text for text, _, _ in kept}:
            refused += 1
            with pytest.raises(InputError, match="expected text of at least one token, got none"):
                ours(text)
        compared += len(kept)
    assert compared >= 2000
    assert refused >= 1


@pytest.mark.parametrize("max_length", [1, 2, 7, 33])
def test_truncation_equals_transformers(both, max_length):
    ours, theirs = both
    for texts in BATCHES[::7]:
        texts = some_text(ours, texts)
        expected = theirs(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        result = ours(texts, max_length=max_length, offsets=True)
        assert result["input_ids"].shape[1] == max_length
        for row, ids in enumerate(expected["input_ids"]):
            assert result["input_ids"][row, : len(ids)].tolist() == ids
            assert int(result["attention_mask"][row].sum()) == len(ids)
            places = [list(place) for place in expected["offset_mapping"][row]]
            assert result["offset_mapping"][row, : len(ids)].tolist() == places


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_transformers(both, skip):
    ours, theirs = both
    for text in some_text(ours, TEXTS[:400]):
        ids = ours(text)["input_ids"][0]
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_tokens_equal_transformers(both):
    ours, theirs = both
    for text in some_text(ours, TEXTS[:300]):
        expected = theirs.tokenize(text)
        ids = ours(text)["input_ids"][0]
        assert ours.tokenize(text) == ours.tokens(ids) == ours.tokens(ids.tolist()) == expected
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids.tolist()) == expected
        assert ours.convert_tokens_to_ids(expected) == theirs.convert_tokens_to_ids(expected) == ids.tolist()


def test_sizes_and_special_ids(both):
    ours, theirs = both
    assert ours.vocab_size == len(theirs)
    assert ours.end_token_id == (theirs.eos_token_id if theirs.eos_token else None)
    assert ours.pad_token_id == (ours.end_token_id or 0)


def test_published_ids_of_gpt(files_of):
    """transformers, test_modeling_openai.py; and the original port's example, hubconfs/gpt_hubconf.py."""
    tokenizer = BytePairTokenizer.from_files(*files_of("gpt1"))
    assert tokenizer("the president is")["input_ids"].tolist() == [[481, 4735, 544]]
    tokens = tokenizer.tokenize("Who was Jim Henson ? Jim Henson was a puppeteer")
    assert tokens[:5] == ["who</w>", "was</w>", "jim</w>", "hen", "son</w>"]
    ids = [763, 509, 4265, 2298, 945, 257, 4265, 2298, 945, 509, 246, 10148, 39041, 483]
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.convert_ids_to_tokens([763])[0] == "who</w>"
    assert tokenizer.decode(ids) == "who was jim henson ? jim henson was a puppeteer"
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (40478, None)


def test_published_ids_of_gpt2(files_of):
    """transformers, tokenization_gpt2.py."""
    tokenizer = BytePairTokenizer.from_files(*files_of("gpt2"))
    assert tokenizer("Hello world")["input_ids"].tolist() == [[15496, 995]]
    assert tokenizer(" Hello world")["input_ids"].tolist() == [[18435, 995]]
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (50257, 50256)


# And back


@pytest.fixture(scope="module", params=["gpt2", "gpt-nano"])
def byte_level(request, files_of) -> BytePairTokenizer:
    return BytePairTokenizer.from_files(*files_of(request.param))


def test_any_unicode_comes_back(byte_level):
    texts = [*code_points(1500, seed=8), *(text for text in TEXTS if text)]
    result = byte_level(texts)
    lengths = result["attention_mask"].sum(1).tolist()
    for text, ids, length in zip(texts, result["input_ids"], lengths, strict=True):
        assert byte_level.decode(ids[:length]) == text


@pytest.mark.parametrize(
    "text",
    [
        *EMOJI,
        "\x00",
        "\r\n",
        "\r",
        " ",
        "\n\n \t",
        "\u0301",
        "e\u0301\u0323",
        "\ufeff",
        "\u2028\u2029",
        "\U0010ffff",
        "\ud7ff\ue000",
        "\ufffd",
        "".join(map(chr, range(256))),
        "ﷺ" * 40,
        END_OF_TEXT,
        f"a{END_OF_TEXT}{END_OF_TEXT} b",
        f" {END_OF_TEXT}\n",
        "<|endoftext|",
        "  two  spaces  ",
        "don't I'LL we've",
        "a" * 5000,
    ],
    ids=ascii,
)
def test_hard_text_comes_back(byte_level, text):
    ids = byte_level(text)["input_ids"][0]
    assert byte_level.decode(ids) == byte_level.decode(ids.tolist()) == text


def test_the_end_of_text_is_one_token(byte_level):
    end = byte_level.end_token_id
    assert byte_level(END_OF_TEXT)["input_ids"].tolist() == [[end]]
    ids = byte_level(f"the ship{END_OF_TEXT}the sea")["input_ids"][0].tolist()
    assert ids.count(end) == 1
    assert byte_level.tokens([end]) == [END_OF_TEXT]
    assert byte_level.decode(ids) == f"the ship{END_OF_TEXT}the sea"
    assert byte_level.decode(ids, skip_special_tokens=True) == "the shipthe sea"
    assert byte_level.decode(ids, skip_special_tokens=False) == byte_level.decode(ids)


def test_gpt_lowers_case_and_parts_words(small):
    assert small.decode(small("Kalo  MITU.\nRen")["input_ids"][0]) == "kalo mitu . ren"


def test_gpt_has_a_token_for_the_unknown(small):
    ids = small("kalo 中 ren")["input_ids"][0]
    assert small.tokens(ids).count("<unk>") == 1
    assert [*small.tokenize("kalo"), "<unk>", *small.tokenize("ren")] == small.tokens(ids)
    assert "<unk>" in small.decode(ids)
    assert "<unk>" not in small.decode(ids, skip_special_tokens=True)


def test_ids_of_no_text_are_no_text(ours):
    assert ours.decode([]) == ""
    assert ours.tokens([]) == []
    assert ours.decode(torch.empty(0, dtype=torch.long)) == ""


# What the tensors are


def test_one_text_is_a_batch_of_one(ours):
    assert_equal(ours("The ship sailed."), ours(["The ship sailed."]))
    assert_equal(ours(("The ship", "The sea")), ours(["The ship", "The sea"]))


def test_a_batch_is_padded_on_the_right_to_its_longest_row(ours):
    texts = ["the ship sailed across the sea", "a", "the ship"]
    batch, alone = ours(texts, offsets=True), [ours(text, offsets=True) for text in texts]
    longest = max(row["input_ids"].shape[1] for row in alone)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    assert batch["offset_mapping"].shape == (3, longest, 2)
    for i, row in enumerate(alone):
        length = row["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, :length], row["input_ids"][0])
        assert torch.equal(batch["offset_mapping"][i, :length], row["offset_mapping"][0])
        assert batch["input_ids"][i, length:].eq(ours.pad_token_id).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)
        assert not batch["offset_mapping"][i, length:].any()
        assert row["attention_mask"].all()


def test_offsets_are_given_only_if_asked_for(ours):
    assert set(ours("a")) == {"input_ids", "attention_mask"}
    assert set(ours("a", offsets=True)) == {"input_ids", "attention_mask", "offset_mapping"}


def test_offsets_of_byte_pairs_cut_the_text_into_its_tokens(nano):
    text = "The ship, and the sea!\n"
    result = nano(text, offsets=True)
    words = [text[begin:end] for begin, end in result["offset_mapping"][0].tolist()]
    assert "".join(words) == text
    assert words == [nano.decode([i]) for i in result["input_ids"][0]]


def test_offsets_of_gpt_leave_the_spaces_out(small):
    text = "Kalo — KALO\t!"
    result = small(text, offsets=True)
    words = [text[begin:end] for begin, end in result["offset_mapping"][0].tolist()]
    assert "".join(words) == "".join(text.split())


def test_offsets_count_characters_not_bytes(nano):
    text = "é😀x"
    begin, end = nano(text, offsets=True)["offset_mapping"][0, -1].tolist()
    assert text[begin:end] == "x"


def test_truncation_keeps_the_beginning_and_holds_for_one_call_only(ours):
    text = "the ship sailed across the sea"
    whole = ours(text)["input_ids"]
    assert torch.equal(ours(text, max_length=3)["input_ids"], whole[:, :3])
    assert torch.equal(ours(text, 3)["input_ids"], whole[:, :3])
    assert torch.equal(ours(text, max_length=10**6)["input_ids"], whole)
    assert torch.equal(ours(text)["input_ids"], whole)


def test_truncation_shortens_the_mask_and_the_offsets_too(ours):
    result = ours(["the ship sailed across the sea", "a"], max_length=2, offsets=True)
    assert result["input_ids"].shape == (2, 2)
    assert result["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert result["offset_mapping"].shape == (2, 2, 2)


# Errors of text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts: expected a str or a list of str, got NoneType"),
        (3, "texts: expected a str or a list of str, got int"),
        (b"ship", "texts: expected a str or a list of str, got bytes"),
        (["ship", 3], "texts[1]: expected a str, got int"),
        ([["ship"]], "texts[0]: expected a str, got list"),
        ([], "texts: expected at least one text, got an empty list"),
        ("", "texts[0]: expected text of at least one token, got none"),
        (["ship", ""], "texts[1]: expected text of at least one token, got none"),
        (["ship", "s\udce9a"], "texts[1]: expected Unicode text, but 'utf-8' codec can't encode"),
    ],
)
def test_what_is_no_text_is_refused(ours, texts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ours(texts)


@pytest.mark.parametrize("text", [" ", "\n\t", "\x00\x01\x07", "\u0301"])
def test_text_of_which_gpt_keeps_nothing_is_refused(small, text):
    with pytest.raises(InputError, match=re.escape("texts[1]: expected text of at least one token, got none")):
        small(["ship", text])


@pytest.mark.parametrize("max_length", [0, -1])
def test_max_length_has_to_keep_a_token(ours, max_length):
    with pytest.raises(InputError, match=re.escape(f"max_length = {max_length}: expected a whole number, at least 1")):
        ours("a", max_length=max_length)


@pytest.mark.parametrize("text", [None, 3, b"ship", [], ["a", "b"], ["a", "b", "c"], "s\udce9a"], ids=repr)
def test_tokenize_takes_one_text(ours, text):
    """Two in a list would be taken for a pair by the library."""
    with pytest.raises(InputError, match="text"):
        ours.tokenize(text)


def test_tokens_that_are_not_in_the_vocabulary_are_named(ours):
    with pytest.raises(InputError, match="tokens: not in the vocabulary: 'nonsense', 'Unsinn'"):
        ours.convert_tokens_to_ids(["a", "nonsense", "Unsinn"])


def test_one_token_as_a_str_is_not_spelled_out(ours):
    """The original port gave the token's id for it; its letters' ids are what nobody means."""
    token = ours.tokens([ours.vocab_size - 1])[0]
    assert len(token) > 1
    try:
        result = ours.convert_tokens_to_ids(token)
    except InputError:
        return
    assert result == ours.vocab_size - 1


@pytest.mark.parametrize("name", ["decode", "tokens"])
@pytest.mark.parametrize("ids", [[-100], [10**9], [2**40], torch.ones(2, 3), torch.tensor(3), 3], ids=repr)
def test_ids_that_are_none_are_refused(ours, name, ids):
    """-100 of labels, ids of a wider model, a batch where a row was meant."""
    with pytest.raises(InputError, match="ids"):
        getattr(ours, name)(ids)


# Files and copies


def test_pickle_round_trip(ours):
    ours("leave a truncation behind", max_length=3)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(again) is BytePairTokenizer
        texts = some_text(ours, TEXTS[:100])
        assert_equal(again(texts, offsets=True), ours(texts, offsets=True))
        assert (again.end_token_id, again.pad_token_id, again.vocab_size) == (
            ours.end_token_id,
            ours.pad_token_id,
            ours.vocab_size,
        )


def test_what_was_saved_is_read_again(ours, tmp_path):
    ours.save(tmp_path / "tokenizer.json")
    texts = [text for batch in BATCHES[::5] for text in some_text(ours, batch)]
    for again in (
        BytePairTokenizer.from_json(tmp_path / "tokenizer.json"),
        read_tokenizer(tmp_path / "tokenizer.json"),
        hubmodels.gptTokenizer(tmp_path),
        hubmodels.gpt2Tokenizer(tmp_path / "tokenizer.json"),
    ):
        assert type(again) is BytePairTokenizer
        assert (again.end_token_id, again.pad_token_id) == (ours.end_token_id, ours.pad_token_id)
        assert_equal(again(texts, offsets=True), ours(texts, offsets=True))
        ids = ours(texts[50])["input_ids"][0]
        assert again.decode(ids) == ours.decode(ids)
        assert again.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)


ENTRIES = ["gptTokenizer", "gpt2Tokenizer", "openAIGPTTokenizer"]


def copied(files: tuple[Path, Path], names: tuple[str, str], directory: Path) -> Path:
    directory.mkdir()
    for file, name in zip(files, names, strict=True):
        shutil.copy(file, directory / name)
    return directory


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_every_layout_loads_through_every_entry_point(ours, files_of, tmp_path, names, entry):
    files = files_of("gpt-nano" if ours.end_token_id is not None else "small-gpt1")
    directory = copied(files, names, tmp_path / "it")
    load = getattr(hubmodels, entry)
    texts = some_text(ours, TEXTS[:50])
    for where in (directory, str(directory), directory / names[0]):
        again = load(where)
        assert type(again) is BytePairTokenizer
        assert_equal(again(texts), ours(texts))


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_embedded_one_loads_by_name(nano, entry):
    assert_equal(getattr(hubmodels, entry)("gpt-nano")(TEXTS[20:40]), nano(TEXTS[20:40]))


@pytest.mark.parametrize("name", ["small-gpt1", "gpt-nano", "gpt1", "gpt2"])
def test_what_transformers_saves_is_read(files_of, tmp_path, name):
    theirs = reference(*files_of(name), BYTE_LEVEL[name])
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    ours = hubmodels.gpt2Tokenizer(tmp_path)
    assert type(ours) is BytePairTokenizer
    assert ours.end_token_id == (theirs.eos_token_id if theirs.eos_token else None)
    for text in some_text(ours, TEXTS[:200]):
        assert ours(text)["input_ids"][0].tolist() == theirs(text)["input_ids"]


def test_tokenizer_json_as_the_hub_has_it(nano, tmp_path):
    """GPT-2's there has a post-processor and asks for truncation and padding; ids and lengths stay what they are."""
    content = json.loads(nano.inner.to_str())
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    again = hubmodels.gptTokenizer(tmp_path)
    texts = some_text(nano, TEXTS[:100])
    assert_equal(again(texts, offsets=True), nano(texts, offsets=True))


def test_windows_line_ends_and_a_missing_version_line(ours, files_of, tmp_path):
    vocab, merges = files_of("gpt-nano" if ours.end_token_id is not None else "small-gpt1")
    text = merges.read_text(encoding="utf-8").removeprefix("#version: 0.2\n").rstrip("\n")
    (tmp_path / "merges.txt").write_bytes(text.replace("\n", "\r\n").encode())
    again = BytePairTokenizer.from_files(vocab, tmp_path / "merges.txt")
    texts = some_text(ours, TEXTS[:50])
    assert_equal(again(texts), ours(texts))


def test_a_byte_level_vocabulary_with_gpts_mark_in_it_stays_byte_level(nano, tmp_path):
    """A vocabulary of text about tokenizers may hold </w> itself."""
    vocab, merges = entries_and_merges(nano.inner)
    directory = write(tmp_path, {**vocab, "</w>": len(vocab)}, merges)
    again = hubmodels.gpt2Tokenizer(directory)
    assert again.decode(again("The Ship\n")["input_ids"][0]) == "The Ship\n"


# Files that are refused


def refusal(vocab: str | None, merges: str | None, directory: Path) -> str:
    for name, content in (("vocab.json", vocab), ("merges.txt", merges)):
        if content is not None:
            (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        BytePairTokenizer.from_files(directory / "vocab.json", directory / "merges.txt")
    return str(caught.value)


@pytest.mark.parametrize(
    "vocab", [None, "", "not json", '{"a": 0', "[" * 100_000], ids=["missing", "empty", "text", "cut off", "deep"]
)
def test_a_vocabulary_that_is_not_json_is_refused(tmp_path, vocab):
    text = refusal(vocab, "#version: 0.2\n", tmp_path)
    assert text.startswith(f"{tmp_path / 'vocab.json'}: expected a JSON object, token -> id")


@pytest.mark.parametrize(
    "vocab",
    ["[]", "3", "null", '["a"]', '{"a": "0"}', '{"a": null}', '{"a": -1}', '{"a": 0.5}', '{"a": 1e3}', '{"a": [0]}'],
)
def test_a_vocabulary_of_something_else_is_refused(tmp_path, vocab):
    assert str(tmp_path / "vocab.json") in refusal(vocab, "#version: 0.2\n", tmp_path)


@pytest.mark.parametrize(
    "merges",
    ["a b\n", "h e\n", "t h\nth e r\n", "th\n", "the zz\n", "zzzz t\n", "th th\n", "th e</w>\n"],
    ids=["no entry", "none either", "three", "one", "no right", "no left", "longer than any", "longer than words"],
)
@pytest.mark.parametrize("kind", ["byte level", "words"])
def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path, merges, kind):
    """The library panics at some of them, which no `except Exception` sees."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if kind == "byte level" else ["<unk>", *"abthez", "e</w>"]
    vocab = {token: i for i, token in enumerate([*letters, "th"])}
    text = refusal(json.dumps(vocab), "#version: 0.2\n" + merges, tmp_path)
    assert str(tmp_path / "merges.txt") in text


def test_merges_that_are_missing_are_named(tmp_path):
    text = refusal('{"a": 0}', None, tmp_path)
    assert text.startswith(f"{tmp_path / 'merges.txt'}: expected a pair of tokens a line, in UTF-8: ")


def test_merges_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff \xfe\n")
    text = refusal('{"a": 0}', None, tmp_path)
    assert text.startswith(f"{tmp_path / 'merges.txt'}: expected a pair of tokens a line, in UTF-8: ")


def test_a_byte_level_vocabulary_that_lacks_a_byte_is_refused(nano, tmp_path):
    """It would drop what it lacks without a word, and every text is promised to come back."""
    vocab, merges = entries_and_merges(nano.inner)
    vocab = {token: i for token, i in vocab.items() if token != "z"}
    merges = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab and "z" not in (a, b)]
    text = refusal(json.dumps(vocab), "\n".join(map(" ".join, merges)), tmp_path)
    assert str(tmp_path / "vocab.json") in text


def test_gpts_vocabulary_without_the_unknown_is_refused(tmp_path):
    """Else the first text with a letter that it lacks raises the library's bare Exception."""
    assert "<unk>" in refusal('{"a": 0, "a</w>": 1}', "#version: 0.2\n", tmp_path)


def test_a_directory_without_a_tokenizer_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: expected one of tokenizer.json, vocab.txt, ")):
        hubmodels.gptTokenizer(tmp_path)


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_a_directory_without_merges_names_them(files_of, tmp_path, names):
    shutil.copy(files_of("gpt-nano")[0], tmp_path / names[0])
    for where in (tmp_path, tmp_path / names[0]):
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / names[1]}: expected a pair of tokens")):
            hubmodels.gptTokenizer(where)


@pytest.mark.parametrize("content", ["", "not json", "{}", "[" * 100_000], ids=["empty", "text", "no model", "deep"])
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(
        CheckpointError, match=re.escape(f"{path}: expected a tokenizer.json of the tokenizers library")
    ):
        hubmodels.gptTokenizer(path)


def test_a_tokenizer_json_of_a_third_kind_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    message = f"{path}: expected a tokenizer of kind WordPiece or BPE, got WordLevel"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        hubmodels.gptTokenizer(path)


# The other family's


@pytest.mark.parametrize("saved", [True, False], ids=["tokenizer.json", "two files"])
def test_berts_entry_point_refuses_byte_pairs(nano, files_of, tmp_path, saved):
    directory = copied(files_of("gpt-nano"), LAYOUTS[0], tmp_path / "it")
    if saved:
        nano.save(directory / "tokenizer.json")
    with pytest.raises(
        CatalogError, match=re.escape(f"{directory} has a BytePairTokenizer, but this entry point makes a WordPiece")
    ):
        hubmodels.bertTokenizer(directory)


def test_berts_entry_point_refuses_gpts_name():
    with pytest.raises(CatalogError, match=r"gpt-nano has a BytePairTokenizer, .* entry point of its own family"):
        hubmodels.bertTokenizer("gpt-nano")


@pytest.mark.parametrize("entry", ENTRIES)
def test_gpts_entry_points_refuse_berts(tmp_path, entry):
    message = "has a WordPieceTokenizer, but this entry point makes a BytePairTokenizer"
    with pytest.raises(CatalogError, match=f"bert-nano {message}"):
        getattr(hubmodels, entry)("bert-nano")
    hubmodels.bertTokenizer("bert-nano").save(tmp_path / "tokenizer.json")
    with pytest.raises(CatalogError, match=message):
        getattr(hubmodels, entry)(tmp_path)


def test_a_tokenizer_json_of_the_other_kind_is_refused_by_from_json(nano, tmp_path):
    nano.save(tmp_path / "pairs.json")
    hubmodels.bertTokenizer("bert-nano").save(tmp_path / "pieces.json")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "pairs.json"))):
        WordPieceTokenizer.from_json(tmp_path / "pairs.json")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "pieces.json"))):
        BytePairTokenizer.from_json(tmp_path / "pieces.json")


# A new vocabulary


def test_train_byte_pair_brings_any_text_back():
    tokenizer = train_byte_pair(invented_text(), 400)
    assert isinstance(tokenizer, BytePairTokenizer)
    assert tokenizer.vocab_size == 400
    assert tokenizer.end_token_id == tokenizer.pad_token_id == 0
    assert sorted(tokenizer.inner.get_vocab().values()) == list(range(400))
    for text in [*code_points(300, seed=9), *(text for text in TEXTS[:300] if text)]:
        assert tokenizer.decode(tokenizer(text)["input_ids"][0]) == text


def test_train_byte_pair_knows_its_text():
    texts = invented_text()
    tokenizer = train_byte_pair(texts, 600)
    assert sum(map(len, map(tokenizer.tokenize, texts[:50]))) < 0.4 * sum(map(len, texts[:50]))


def test_a_trained_vocabulary_survives_openais_two_files(tmp_path):
    trained = train_byte_pair(invented_text(), 400)
    again = hubmodels.gptTokenizer(write(tmp_path, *entries_and_merges(trained.inner)))
    texts = [text for text in TEXTS[:300] if text]
    assert_equal(again(texts), trained(texts))
    assert again.end_token_id == 0


@pytest.mark.parametrize("name", ["from_files", "from_json", "train"])
def test_without_the_tokenizers_package_the_error_says_what_to_install(monkeypatch, files_of, nano, tmp_path, name):
    nano.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    makers = {
        "from_files": lambda: BytePairTokenizer.from_files(*files_of("gpt-nano")),
        "from_json": lambda: Tokenizer.from_json(tmp_path / "tokenizer.json"),
        "train": lambda: train_byte_pair(["the ship"], 300),
    }
    with pytest.raises(HubModelsError) as caught:
        makers[name]()
    assert str(caught.value).endswith("need the package 'tokenizers': pip install tokenizers")
    assert type(caught.value) is HubModelsError
