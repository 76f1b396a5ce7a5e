"""Larger and smaller vocabularies: every old bit stays, every new row is what it should be, and it loads again."""

import json
from pathlib import Path

import pytest
import reference
import torch
import transformers
from reference import V
from test_saving import (
    MLM,
    NAMES,
    TEXTS,
    assert_bit_equal,
    assert_same_results,
    bits,
    ids_in_transformers,
    loaded,
    ours,
    results,
    silence,
    snapshot,
    tokenizer_named,
)
from torch import Tensor

import hubmodels
from hubmodels.errors import ConfigError, HubModelsError, InputError
from hubmodels.families import bert
from hubmodels.tokenizers import WordPieceTokenizer

TABLE, BIAS = "transformer.embeddings.word.weight", "head.bias"
WITH_BIAS = (MLM, "BertForPreTraining")


def tables(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that have a row for each word"""
    found = {k: t for k, t in model.state_dict().items() if k.endswith(("embeddings.word.weight", "head.bias"))}
    assert all(len(table) == model.config.vocab_size for table in found.values())
    return found


def rest(model: torch.nn.Module) -> dict[str, Tensor]:
    return {k: t for k, t in model.state_dict().items() if k not in tables(model)}


# resize_vocabulary


@pytest.mark.parametrize("size", [V + 9, 2, V])
@pytest.mark.parametrize("name", NAMES)
def test_old_rows_are_bit_equal_and_nothing_else_changes(name, size):
    model = ours(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = hubmodels.resize_vocabulary(model, size)
    assert type(made) is type(model)
    assert made is not model
    assert made.config.vocab_size == size
    assert_bit_equal(rest(made), rest(model))
    assert len(tables(model)) == len(tables(made)) == (2 if name in WITH_BIAS else 1)
    for key, table in tables(made).items():
        assert table.shape == (size, *before[key].shape[1:])
        assert bits(table[: min(V, size)]) == bits(before[key][: min(V, size)])
        for row in table[V:]:
            assert bits(row) == bits(before[key].double().mean(0).float())
    assert_bit_equal(model, before)
    assert model.config.vocab_size == V


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_change_is_shared_and_what_changes_is_not(name):
    model = ours(name)
    made = hubmodels.resize_vocabulary(model, V + 3)
    old, new = dict(model.named_parameters()), dict(made.named_parameters())
    for key in old:
        assert (old[key].data_ptr() == new[key].data_ptr()) == (key not in tables(model)), key
    before = {key: tensor.clone() for key, tensor in tables(model).items()}
    with torch.no_grad():
        for key in tables(made):
            new[key].zero_()
    assert_bit_equal(tables(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_mean_of_its_pieces(name):
    model = ours(name)
    pieces = {V + 1: [3, 5, 5], V: [7], 4: [6, 0], 5: [5]}
    made = hubmodels.resize_vocabulary(model, V + 3, pieces)
    for key, table in tables(made).items():
        old = model.state_dict()[key]
        want = {
            V: old[7],
            V + 1: ((old[3].double() + 2 * old[5].double()) / 3).float(),
            V + 2: old.double().mean(0).float(),
            4: ((old[6].double() + old[0].double()) / 2).float(),
        }
        for i in range(V + 3):
            row = want.get(i, old[i] if i < V else None)
            if i == V or (i < V and i not in want):
                assert torch.equal(table[i], row)
            torch.testing.assert_close(table[i], row, atol=1e-7, rtol=1e-6)


def test_pieces_are_what_was_there_before():
    """A word may be made of one that is itself made anew, and of ids that are cut off."""
    model = ours(MLM)
    old = model.state_dict()[TABLE].clone()
    made = hubmodels.resize_vocabulary(model, V - 10, {2: [3], 3: [2], 4: [V - 1]})
    table = made.state_dict()[TABLE]
    assert torch.equal(table[[2, 3, 4]], old[[3, 2, V - 1]])
    assert torch.equal(table[5:], old[5 : V - 10])


def test_the_same_size_with_pieces():
    """Ids that the table has only to be of a round size become words."""
    model = ours(MLM)
    made = hubmodels.resize_vocabulary(model, V, {V - 1: [1, 2]})
    old = model.state_dict()
    for key in (TABLE, BIAS):
        assert torch.equal(made.state_dict()[key][:-1], old[key][:-1])
        torch.testing.assert_close(made.state_dict()[key][-1], old[key][1:3].double().mean(0).float())


def test_a_mean_by_hand():
    """Of a table of three words, (0, 1), (2, 3), (7, 8), and its bias 1, 2, 6."""
    sizes = {**reference.SIZES, "vocab_size": 3, "hidden_size": 2, "num_attention_heads": 1}
    model = bert.BertForMaskedLM(bert.BertConfig(**sizes))
    with torch.no_grad():
        model.transformer.embeddings.word.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0], [7.0, 8.0]]))
        model.head.bias.copy_(torch.tensor([1.0, 2.0, 6.0]))
    made = hubmodels.resize_vocabulary(model, 5, {4: [0, 2]})
    want = [[0, 1], [2, 3], [7, 8], [3, 4], [3.5, 4.5]]
    assert made.transformer.embeddings.word.weight.tolist() == want
    assert made.head.bias.tolist() == [1, 2, 6, 3, 3.5]


@pytest.mark.parametrize("name", [MLM, "GPT2LMHeadModel"])
def test_a_seed_gives_the_same_noise_and_another_another(name):
    model = ours(name)

    def make(seed: int | None) -> torch.nn.Module:
        return hubmodels.resize_vocabulary(model, V + 200, {V: [1, 2]}, seed=seed)

    exact, one, again, other = make(None), make(1), make(1), make(2)
    assert_bit_equal(one, again)
    for key in tables(one):
        table, plain = tables(one)[key], tables(exact)[key]
        assert bits(table[:V]) == bits(tables(model)[key])
        assert not torch.equal(table[V:], tables(other)[key][V:])
        assert table[V:].unique(dim=0).shape == table[V:].shape
        noise = (table - plain)[V:].double()
        share = noise.std(0) / tables(model)[key].double().std(0)
        assert ((share > 0.07) & (share < 0.13)).all()
    assert_bit_equal(rest(one), rest(exact))
    assert not torch.equal(tables(one)[TABLE][V], tables(exact)[TABLE][V])  # words of pieces, too


def test_noise_is_not_drawn_from_the_global_generator():
    model = ours(MLM)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    hubmodels.resize_vocabulary(model, V + 5, seed=0)
    hubmodels.resize_vocabulary(model, V + 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_words_without_pieces_are_alike():
    table = hubmodels.resize_vocabulary(ours(MLM), V + 4).state_dict()[TABLE]
    assert len({bits(row) for row in table[V:]}) == 1


@pytest.mark.parametrize("name", [MLM, "BertForPreTraining", "OpenAIGPTLMHeadModel", "GPT2LMHeadModel"])
@torch.no_grad()
def test_logits_of_old_words_stay(name):
    model = ours(name, torch.float64)
    made = hubmodels.resize_vocabulary(model, V + 6, {V: [3, 4]})
    got, want = results(made, name)[0], results(model, name)[0]
    assert got.shape == (*want.shape[:-1], V + 6)
    assert reference.distance(got[..., :V], want) <= 1e-12
    mean = want[..., 3:5].mean(-1)  # a mean of rows gives the mean of their scores
    assert reference.distance(got[..., V], mean) <= 1e-10


@torch.no_grad()
def test_logits_of_what_is_left_stay():
    model = ours(MLM, torch.float64)
    made = hubmodels.resize_vocabulary(model, 20)
    ids = torch.randint(0, 20, (3, 8), generator=reference.generator(1))
    assert reference.distance(made(ids).logits, model(ids).logits[..., :20]) <= 1e-12


@pytest.mark.parametrize("name", [MLM, "OpenAIGPTLMHeadModel", "GPT2LMHeadModel"])
def test_the_head_is_still_tied(name):
    """A change of the table changes the scores, and the gradient comes from both sides."""
    made = hubmodels.resize_vocabulary(ours(name), V + 2)
    word = torch.tensor([[V + 1, 1, 2]])
    with torch.no_grad():
        before = made(word).logits[0, 1, V]
        made.transformer.embeddings.word.weight[V] += 1
        assert made(word).logits[0, 1, V] != before
    made(word, labels=word).loss.backward()
    gradient = made.transformer.embeddings.word.weight.grad
    assert gradient.shape[0] == V + 2
    assert gradient[V].abs().sum() > 0  # it is in no input
    assert not any(name.endswith(("decoder.weight", "lm_head.weight")) for name, _ in made.named_parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_dtype_and_what_is_frozen_are_kept(name, dtype):
    model = ours(name).to(dtype)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    for training in (True, False):
        made = hubmodels.resize_vocabulary(model.train(training), V + 2)
        assert {module.training for module in made.modules()} == {training}
        assert {key: parameter.requires_grad for key, parameter in made.named_parameters()} == flags
        assert {parameter.dtype for parameter in made.parameters()} == {dtype}
        assert all(parameter.is_leaf for parameter in made.parameters())
        assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
        assert {module.training for module in model.modules()} == {training}


def test_half_precision_is_rounded_once():
    model = ours(MLM).to(torch.bfloat16)
    made = hubmodels.resize_vocabulary(model, V + 1)
    old = model.state_dict()
    for key in (TABLE, BIAS):
        assert bits(made.state_dict()[key][-1]) == bits(old[key].double().mean(0).bfloat16())


@pytest.mark.parametrize("number", [1, 4])
def test_the_number_of_labels_is_kept(number):
    config = bert.BertConfig(**reference.SIZES)
    for cls in (bert.BertForSequenceClassification, bert.BertForTokenClassification):
        assert hubmodels.resize_vocabulary(cls(config, num_labels=number), V + 1).classifier.out_features == number


def test_checkpointing_of_gradients_is_kept():
    model = ours(MLM).train()
    model.gradient_checkpointing = True
    assert hubmodels.resize_vocabulary(model, V + 1).gradient_checkpointing


def test_an_encoder_without_a_pooler():
    """As that of a masked language model is."""
    encoder = ours(MLM).transformer
    made = hubmodels.resize_vocabulary(encoder, V + 2)
    assert made.embeddings.word.weight.shape[0] == V + 2
    assert made.pooler is None
    assert_bit_equal(rest(made), rest(encoder))


def test_where_it_comes_from_says_so(tmp_path):
    hubmodels.export(ours(MLM), tmp_path)
    model = loaded(MLM, tmp_path)
    made = hubmodels.resize_vocabulary(model, V + 2)
    file = tmp_path / "model.safetensors"
    assert made.provenance.weights == f"{file}, {V} words made {V + 2}"
    assert model.provenance.weights == str(file)
    assert made.provenance.files == model.provenance.files
    again = hubmodels.resize_vocabulary(made, V)
    assert again.provenance.weights == f"{file}, {V} words made {V + 2}, {V + 2} words made {V}"
    assert_bit_equal(again, model)


@pytest.mark.parametrize("size", [0, -3, 2.0, "5", None, True])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError) as caught:
        hubmodels.resize_vocabulary(ours(MLM), size)
    assert str(caught.value) == f"size = {size!r}: expected a whole number of words, at least 1"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ({V + 2: [1]}, f"pieces: {V + 2}: [1]: expected a word below {V + 2}, made of one or more below {V}"),
        ({-1: [1]}, f"pieces: -1: [1]: expected a word below {V + 2}, made of one or more below {V}"),
        ({V: []}, f"pieces: {V}: []: expected a word below {V + 2}, made of one or more below {V}"),
        ({V: [1, V]}, f"pieces: {V}: [1, {V}]: expected a word below {V + 2}, made of one or more below {V}"),
        ({V: [-1]}, f"pieces: {V}: [-1]: expected a word below {V + 2}, made of one or more below {V}"),
        ({V: [0.5]}, f"pieces: {V}: [0.5]: expected a word below {V + 2}, made of one or more below {V}"),
        ({0.5: [1]}, f"pieces: 0.5: [1]: expected a word below {V + 2}, made of one or more below {V}"),
    ],
)
def test_pieces_that_are_not_there(pieces, said):
    with pytest.raises(InputError) as caught:
        hubmodels.resize_vocabulary(ours(MLM), V + 2, pieces)
    assert str(caught.value) == said


def test_shrinking_below_the_id_of_padding():
    model = ours(MLM, pad_token_id=5)
    assert hubmodels.resize_vocabulary(model, 6).config.vocab_size == 6
    with pytest.raises((ConfigError, InputError)) as caught:
        hubmodels.resize_vocabulary(model, 5)
    assert str(caught.value) == "pad_token_id = 5: expected less than vocab_size = 5"


@pytest.mark.parametrize("form", ["hf", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resized_model_is_written_and_read(name, form, tmp_path, capfd):
    made = hubmodels.resize_vocabulary(ours(name, torch.float64), V + 5, {V: [1, 2]}, seed=0)
    hubmodels.export(made, tmp_path, form=form)
    back = loaded(name, tmp_path, dtype=torch.float64)
    assert_bit_equal(back, made)
    assert back.config == made.config
    if form == "hf":
        with silence(capfd):
            theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
        assert theirs.config.vocab_size == V + 5
        assert_same_results(made, theirs, name)


def test_a_mapped_model_is_resized_without_a_change_of_its_file(tmp_path):
    hubmodels.export(ours(MLM), tmp_path, form="native")
    before = snapshot(tmp_path)
    made = hubmodels.resize_vocabulary(loaded(MLM, tmp_path), V + 5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert snapshot(tmp_path) == before


# add_tokens: WordPiece

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##s", "##t", "##u", "##v"]
WORDS += ["ship", "##ly", ".", ",", "!", "ub", "##w", "##ub", "boat"]


def bert_with_words(directory: Path, words: list[str] = WORDS, spare: int = 0, **settings) -> Path:
    """A masked language model with a row for each word, and some that no word has."""
    model = ours(MLM, vocab_size=len(words) + spare)
    vocab = directory.parent / f"{directory.name}.txt"
    vocab.write_text("\n".join(words) + "\n", encoding="utf-8")
    hubmodels.export(model, directory, WordPieceTokenizer.from_vocab(vocab, **settings))
    return directory


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"][0].tolist()


OLD_TEXTS = ["a ship.", "as ats shiply!", "b, c zu xyz", "boat ub"]


def test_a_new_word_is_one_token_whose_row_is_the_mean_of_its_pieces(tmp_path, capfd):
    source = bert_with_words(tmp_path / "source")
    before = snapshot(source)
    old, model = hubmodels.bertTokenizer(source), loaded(MLM, source)
    number = len(WORDS)
    assert hubmodels.add_tokens(source, tmp_path / "out", ["stu", "ust"]) == ["stu", "ust"]
    new, made = hubmodels.bertTokenizer(tmp_path / "out"), loaded(MLM, tmp_path / "out")
    assert snapshot(source) == before
    assert ids(old, "stu ust.")[1:-1] == [old.inner.token_to_id(w) for w in ("s", "##t", "##u", "u", "##s", "##t", ".")]
    assert ids(new, "stu ust.")[1:-1] == [number, number + 1, old.inner.token_to_id(".")]
    assert new.vocab_size == made.config.vocab_size == number + 2
    assert [ids(new, text) for text in OLD_TEXTS] == [ids(old, text) for text in OLD_TEXTS]
    for key, table in tables(made).items():
        was = model.state_dict()[key]
        assert bits(table[:number]) == bits(was)
        for row, word in enumerate(("stu", "ust"), number):
            pieces = was[ids(old, word)[1:-1]].double()
            torch.testing.assert_close(table[row].double(), pieces.mean(0), atol=1e-7, rtol=1e-6)
    assert_bit_equal(rest(made), rest(model))
    with silence(capfd):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        rows = [ids_in_transformers(theirs, text) for text in [*OLD_TEXTS, "Stu, ust! x"]]
        theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert rows == [ids(new, text) for text in [*OLD_TEXTS, "Stu, ust! x"]]
    made, words = made.double(), torch.arange(number + 2)[:, None].expand(-1, 3)
    with torch.no_grad():
        assert reference.distance(made(words).logits, theirs(words).logits) <= 1e-10
    (tmp_path / "out" / "tokenizer.json").unlink()  # vocab.txt has them too
    assert ids(hubmodels.bertTokenizer(tmp_path / "out"), "stu ust.") == ids(new, "stu ust.")


def test_words_are_taken_as_the_tokenizer_takes_text(tmp_path):
    source = bert_with_words(tmp_path / "source", lower_case=True)
    words = ["STU", "stu", "Stü", " stu ", "Ship", "boat", "ust", "USTS"]
    assert hubmodels.add_tokens(source, tmp_path / "out", words) == ["stu", "ust", "usts"]
    new = hubmodels.bertTokenizer(tmp_path / "out")
    assert new.tokenize("Stu STÜ uSt USTS ship") == ["stu", "stu", "ust", "usts", "ship"]
    assert new.decode(ids(new, "Stu ship")) == "stu ship"


def test_words_of_a_cased_vocabulary_keep_their_capitals(tmp_path):
    source = bert_with_words(tmp_path / "source", [*WORDS, "S", "T"], lower_case=False)
    assert hubmodels.add_tokens(source, tmp_path / "out", ["Stu", "stu"]) == ["Stu", "stu"]
    new = hubmodels.bertTokenizer(tmp_path / "out")
    assert new.tokenize("Stu stu S") == ["Stu", "stu", "S"]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["do_lower_case"] is False


def test_no_new_words_is_a_copy(tmp_path):
    source = bert_with_words(tmp_path / "source")
    assert hubmodels.add_tokens(source, tmp_path / "out", ["ship", "Boat", "a"]) == []
    assert hubmodels.add_tokens(source, tmp_path / "none", []) == []
    for made in ("out", "none"):
        assert snapshot(tmp_path / made) == snapshot(source)


def test_adding_twice_adds_once(tmp_path):
    source = bert_with_words(tmp_path / "source")
    hubmodels.add_tokens(source, tmp_path / "one", ["stu"])
    assert hubmodels.add_tokens(tmp_path / "one", tmp_path / "two", ["stu"]) == []
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert hubmodels.add_tokens(tmp_path / "one", tmp_path / "one", ["ust"]) == ["ust"]  # onto itself
    assert hubmodels.bertTokenizer(tmp_path / "one").tokenize("stu ust") == ["stu", "ust"]
    assert loaded(MLM, tmp_path / "one").config.vocab_size == len(WORDS) + 2


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("two words", "['two', 'words']"),
        ("a-b", "['a', '-', 'b']"),
        ("c++", "['c', '+', '+']"),
        ("##s", "['#', '#', 's']"),
        ("国破", "['国', '破']"),
        ("", "nothing"),
        (" \t", "nothing"),
    ],
)
def test_words_that_are_not_one_are_refused(word, parts, tmp_path):
    source = bert_with_words(tmp_path / "source")
    with pytest.raises(InputError) as caught:
        hubmodels.add_tokens(source, tmp_path / "out", ["stu", word])
    assert str(caught.value) == f"words: {word!r}: expected one word, but to this tokenizer it is {parts}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([5], "words[0]: expected a str, got int"),
        (["stu", None], "words[1]: expected a str, got NoneType"),
        (7, "words: expected a str or a list of str, got int"),
    ],
)
def test_words_that_are_no_text(words, said, tmp_path):
    with pytest.raises(InputError) as caught:
        hubmodels.add_tokens(bert_with_words(tmp_path / "source"), tmp_path / "out", words)
    assert str(caught.value) == said
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_too_long_for_the_tokenizer(tmp_path):
    """BERT's makes [UNK] of more than 100 letters, whatever the vocabulary has."""
    source = bert_with_words(tmp_path / "source")
    assert hubmodels.add_tokens(source, tmp_path / "out", ["x" * 100]) == ["x" * 100]
    assert hubmodels.bertTokenizer(tmp_path / "out").tokenize("x" * 100) == ["x" * 100]
    with pytest.raises(InputError, match="words"):
        hubmodels.add_tokens(source, tmp_path / "long", ["x" * 101])


def test_a_word_of_unknown_letters_is_as_what_is_unknown(tmp_path):
    source = bert_with_words(tmp_path / "source")
    hubmodels.add_tokens(source, tmp_path / "out", ["ß"])
    model = loaded(MLM, tmp_path / "out")
    assert bits(tables(model)[TABLE][-1]) == bits(tables(model)[TABLE][1])


def test_rows_that_no_word_had_are_used_first(tmp_path):
    """A table of a round size"""
    source = bert_with_words(tmp_path / "source", spare=3)
    model, number = loaded(MLM, source), len(WORDS)
    hubmodels.add_tokens(source, tmp_path / "two", ["stu", "ust"])
    made = loaded(MLM, tmp_path / "two")
    assert made.config.vocab_size == number + 3
    pieces = ids(hubmodels.bertTokenizer(source), "stu")[1:-1]
    for key, table in tables(made).items():
        was = tables(model)[key]
        torch.testing.assert_close(table[number].double(), was[pieces].double().mean(0), atol=1e-7, rtol=1e-6)
        assert bits(table[number + 2]) == bits(was[number + 2])
        assert bits(table[:number]) == bits(was[:number])
    hubmodels.add_tokens(source, tmp_path / "four", ["stu", "ust", "uts", "tus"])
    made = loaded(MLM, tmp_path / "four")
    assert made.config.vocab_size == number + 4 == hubmodels.bertTokenizer(tmp_path / "four").vocab_size


def test_a_vocabulary_with_a_line_twice(tmp_path):
    """Its last id is above the number of its entries."""
    source = bert_with_words(tmp_path / "source")
    vocab = [*WORDS[:-1], "ship", WORDS[-1]]
    model = ours(MLM, vocab_size=len(vocab))
    hubmodels.export(model, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (source / "vocab.txt").write_text("\n".join(vocab) + "\n")
    old = hubmodels.bertTokenizer(source)
    assert max(ids(old, "boat ship a")) >= old.vocab_size - 1
    with pytest.raises(InputError, match=r"the vocabulary.s ids have a gap, as where a line stands twice"):
        hubmodels.add_tokens(source, tmp_path / "out", ["stu"])
    assert not (tmp_path / "out").exists()


def test_seeds_of_added_words(tmp_path):
    source = bert_with_words(tmp_path / "source")
    for name, seed in (("plain", None), ("one", 1), ("again", 1), ("two", 2)):
        hubmodels.add_tokens(source, tmp_path / name, ["stu", "ust"], seed=seed)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "again")
    rows = {name: tables(loaded(MLM, tmp_path / name))[TABLE][-2:] for name in ("plain", "one", "two")}
    assert not torch.equal(rows["one"], rows["two"])
    assert not torch.equal(rows["one"], rows["plain"])


@pytest.mark.parametrize("options", [{"form": "native"}, {"max_file_size": "5KB"}])
def test_other_forms_of_a_checkpoint_with_more_words(options, tmp_path):
    source = bert_with_words(tmp_path / "source")
    hubmodels.add_tokens(source, tmp_path / "plain", ["stu"])
    hubmodels.add_tokens(source, tmp_path / "out", ["stu"], **options)
    assert_bit_equal(loaded(MLM, tmp_path / "out"), loaded(MLM, tmp_path / "plain"))
    assert hubmodels.bertTokenizer(tmp_path / "out").tokenize("stu") == ["stu"]


def test_without_a_tokenizer_there_is_no_telling(tmp_path):
    hubmodels.export(ours(MLM), tmp_path / "source")
    with pytest.raises(InputError) as caught:
        hubmodels.add_tokens(tmp_path / "source", tmp_path / "out", ["stu"])
    said = "expected a WordPiece tokenizer beside it, to add words to; got none"
    assert str(caught.value) == f"{tmp_path / 'source'}: {said}"
    assert not (tmp_path / "out").exists()


def test_real_words_in_a_real_vocabulary():
    tokenizer = tokenizer_named("bert-base-uncased")
    made, pieces = tokenizer.with_words(["Zyzzyva", "covid", "the"])
    assert made.tokens(sorted(pieces)) == ["zyzzyva", "covid"]
    assert {word: tokenizer.tokens(found) for word, found in pieces.items()} == {
        30522: ["z", "##y", "##zzy", "##va"],
        30523: ["co", "##vid"],
    }
    assert made.tokenize("ZYZZYVA and covid") == ["zyzzyva", "and", "covid"]
    assert tokenizer.tokenize("covid") == ["co", "##vid"]
    assert [ids(made, text) for text in TEXTS] == [ids(tokenizer, text) for text in TEXTS]
    assert made.vocab_size == tokenizer.vocab_size + 2


@pytest.mark.parametrize("name", ["gpt-nano"])
def test_byte_pairs_have_no_whole_words(name, tmp_path):
    with pytest.raises(InputError) as caught:
        hubmodels.add_tokens(name, tmp_path / "out", ["zyzzyva"])
    said = "expected a WordPiece tokenizer beside it, to add words to; got byte pairs, which have no whole words"
    assert str(caught.value) == f"{name}: {said}"
    assert not (tmp_path / "out").exists()


def test_a_table_smaller_than_the_tokenizer_is_refused(tmp_path):
    """Pieces that have no row: said, not guessed."""
    tokenizer = tokenizer_named("bert-nano")
    hubmodels.export(ours(MLM, vocab_size=100), tmp_path / "source", tokenizer)
    with pytest.raises(HubModelsError, match=r"made of one or more below 100"):
        hubmodels.add_tokens(tmp_path / "source", tmp_path / "out", ["zyzzyva"])
    assert not (tmp_path / "out").exists()
