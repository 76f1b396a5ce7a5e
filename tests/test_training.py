"""Pretraining: what is masked, what is paired, and a run that can be stopped anywhere."""

import json
import lzma
import math
import pathlib
import random
import re
import shutil
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from hubmodels import bertForPreTraining, bertTokenizer, gpt, gptTokenizer
from hubmodels.errors import InputError
from hubmodels.families.bert import BertConfig, BertForPreTraining
from hubmodels.families.gpt import Gpt, GptConfig
from hubmodels.heads import IGNORED
from hubmodels.layers import initialise
from hubmodels.tasks import perplexity
from hubmodels.tokenizers import BytePairTokenizer
from hubmodels.training import loop, pretrain, pretrain_gpt
from hubmodels.training.data import (
    Corpus,
    LanguageModelBatches,
    PretrainingBatches,
    mask_words,
    paragraphs,
    read_books,
    sentences,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return bertTokenizer("bert-nano")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def specials(tokenizer) -> torch.Tensor:
    return torch.tensor(tokenizer.inner.encode("[PAD][UNK][CLS][SEP][MASK]", add_special_tokens=False).ids)


def ordinary_ids(tokenizer, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    ids = torch.tensor(sorted(set(range(tokenizer.vocab_size)) - set(specials(tokenizer).tolist())))
    return ids[torch.randint(len(ids), (rows, length), generator=seeded(seed))]


# mask_words


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.4])
def test_mask_words_chooses_the_exact_count_in_every_row(tokenizer, rate):
    words = torch.arange(1, 129)
    ids = ordinary_ids(tokenizer, len(words), 130)
    padding = torch.arange(130) > words[:, None]
    ids[:, 0] = tokenizer.cls_token_id
    ids = ids.masked_fill(padding, tokenizer.pad_token_id)
    _, labels = mask_words(ids, tokenizer, rate, seeded(1))
    counts = (labels != IGNORED).sum(1)
    assert counts.tolist() == [max(1, round(rate * n)) for n in words.tolist()]


def test_mask_words_leaves_special_tokens_alone(tokenizer):
    ids = ordinary_ids(tokenizer, 200, 40)
    special = torch.rand(ids.shape, generator=seeded(2)) < 0.5
    kinds = specials(tokenizer)
    ids[special] = kinds[torch.randint(len(kinds), (int(special.sum()),), generator=seeded(3))]
    masked, labels = mask_words(ids, tokenizer, 0.9, seeded(4))
    assert labels[special].eq(IGNORED).all()
    assert torch.equal(masked[special], ids[special])


def test_mask_words_of_nothing_but_special_tokens_changes_nothing(tokenizer):
    ids = specials(tokenizer).repeat(3, 2)
    masked, labels = mask_words(ids, tokenizer, 0.15, seeded(0))
    assert torch.equal(masked, ids)
    assert labels.eq(IGNORED).all()


def test_mask_words_does_80_10_10(tokenizer):
    ids = ordinary_ids(tokenizer, 2000, 120)
    masked, labels = mask_words(ids, tokenizer, 0.5, seeded(5))
    chosen = labels != IGNORED
    count = int(chosen.sum())
    assert count == 120_000
    hidden = masked[chosen].eq(tokenizer.mask_token_id)
    kept = masked[chosen].eq(ids[chosen])
    found = torch.tensor([hidden.sum(), (~hidden & ~kept).sum(), kept.sum()]).double()
    expected = torch.tensor([0.8, 0.1, 0.1], dtype=torch.double) * count
    assert ((found - expected) ** 2 / expected).sum() < 13.8  # chi square, 2 degrees of freedom: one seed in 1000


def test_mask_words_labels_hold_the_hidden_words_and_nothing_else_changes(tokenizer):
    ids = ordinary_ids(tokenizer, 100, 50)
    masked, labels = mask_words(ids, tokenizer, 0.15, seeded(6))
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])


def test_mask_words_puts_in_words_only_and_any_word(tokenizer):
    ids = ordinary_ids(tokenizer, 2000, 120)
    masked, labels = mask_words(ids, tokenizer, 1.0, seeded(7))
    random_words = masked[(masked != ids) & (masked != tokenizer.mask_token_id)]
    assert not torch.isin(random_words, specials(tokenizer)).any()
    assert len(random_words.unique()) > 0.9 * tokenizer.vocab_size
    assert (labels != IGNORED).all()


def test_mask_words_chooses_every_place_alike(tokenizer):
    _, labels = mask_words(ordinary_ids(tokenizer, 4000, 20), tokenizer, 0.25, seeded(8))
    shares = (labels != IGNORED).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_mask_words_is_a_function_of_the_seed(tokenizer):
    ids = ordinary_ids(tokenizer, 30, 30)
    first, again, other = (mask_words(ids, tokenizer, 0.15, seeded(seed)) for seed in (9, 9, 10))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


# PretrainingBatches, on a corpus whose tokens are numbered through: an id says where it stood.

FIRST_ID = 5
LENGTH = 48


@pytest.fixture(scope="module")
def corpus(tokenizer) -> Corpus:
    assert max(specials(tokenizer)) < FIRST_ID
    rng = random.Random(0)
    sentence_offsets, document_offsets = [0], [0]
    for _ in range(6):
        for _ in range(130):
            sentence_offsets.append(sentence_offsets[-1] + rng.randint(3, 14))
        document_offsets.append(len(sentence_offsets) - 1)
    ids = torch.arange(FIRST_ID, FIRST_ID + sentence_offsets[-1], dtype=torch.int32)
    assert ids[-1] < tokenizer.vocab_size
    return Corpus(ids, sentence_offsets, document_offsets)


def make_batches(corpus, tokenizer, *, seed: int = 0, rows: int = 16, length: int = LENGTH) -> PretrainingBatches:
    return PretrainingBatches(corpus, tokenizer, rows=rows, length=length, mask_rate=0.15, seed=seed)


def unmasked(batch) -> torch.Tensor:
    return torch.where(batch["labels"] != IGNORED, batch["labels"], batch["input_ids"])


def document_of(corpus: Corpus, token: int) -> int:
    begins = [corpus.sentences[sentence] for sentence in corpus.documents]
    return sum(token - FIRST_ID >= begin for begin in begins) - 1


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_batch_is_a_function_of_seed_and_number(corpus, tokenizer):
    one, other = make_batches(corpus, tokenizer), make_batches(corpus, tokenizer)
    numbers = [0, 1, len(one) - 1, len(one), 3 * len(one) + 2]
    forwards = {number: one.batch(number) for number in numbers}
    for number in reversed(numbers):
        assert same(other.batch(number), forwards[number])
        assert same(one.batch(number), forwards[number])
    assert not same(make_batches(corpus, tokenizer, seed=1).batch(0), forwards[0])


def test_every_epoch_is_another(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer)
    for number in range(3):
        first, second = batches.batch(number), batches.batch(number + len(batches))
        assert not same(first, second)
        assert set(unmasked(first).flatten().tolist()) != set(unmasked(second).flatten().tolist())


def test_an_epoch_uses_each_chunk_at_most_once(corpus, tokenizer):
    """First parts of an epoch's rows never share a token."""
    batches = make_batches(corpus, tokenizer)
    seen: set[int] = set()
    for number in range(len(batches)):
        batch = batches.batch(number)
        for ids, types, mask in zip(unmasked(batch), batch["token_type_ids"], batch["attention_mask"], strict=True):
            first = set(ids[(types == 0) & (mask == 1)][1:-1].tolist())
            assert not first & seen
            seen |= first


@pytest.mark.parametrize("length", [16, LENGTH])
def test_rows_are_cls_a_sep_b_sep(corpus, tokenizer, length):
    batches = make_batches(corpus, tokenizer, length=length)
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    for number in range(10):
        batch = batches.batch(number)
        assert batch["input_ids"].shape[1] <= length
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
        for ids, types, mask in zip(
            unmasked(batch).tolist(), batch["token_type_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
        ):
            size = sum(mask)
            assert mask == [1] * size + [0] * (len(mask) - size)
            assert set(ids[size:]) <= {tokenizer.pad_token_id}
            seam = ids.index(sep_id)
            assert [i for i, token in enumerate(ids) if token == sep_id] == [seam, size - 1]
            assert [i for i, token in enumerate(ids) if token == cls_id] == [0]
            assert seam > 1
            assert size - seam > 2
            assert types == [0] * (seam + 1) + [1] * (size - seam - 1) + [0] * (len(ids) - size)


def test_second_parts_follow_or_come_from_another_document(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer)
    for number in range(40):
        batch = batches.batch(number)
        for ids, label in zip(unmasked(batch).tolist(), batch["next_sentence_label"].tolist(), strict=True):
            seam = ids.index(tokenizer.sep_token_id)
            first, second = ids[1:seam], ids[seam + 1 : ids.index(tokenizer.sep_token_id, seam + 1)]
            assert first == list(range(first[0], first[-1] + 1))
            assert second == list(range(second[0], second[-1] + 1))
            if label == 0:
                assert second[0] == first[-1] + 1
            assert (document_of(corpus, first[0]) == document_of(corpus, second[0])) == (label == 0)
            assert document_of(corpus, second[0]) == document_of(corpus, second[-1])


def test_half_of_the_pairs_are_random(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer)
    labels = torch.cat([batches.batch(number)["next_sentence_label"] for number in range(300)])
    assert labels.double().mean() == pytest.approx(0.5, abs=0.03)


def test_one_row_in_ten_is_short(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer)
    sizes = torch.cat([batches.batch(number)["attention_mask"].sum(1) for number in range(100)])
    assert int(sizes.max()) == LENGTH
    assert 0.02 < (sizes < LENGTH // 2).double().mean() < 0.2


def test_corpus_holds_every_token_of_its_text(tokenizer):
    documents = [["The ship sailed.", "", "It sank."], ["She [MASK] said no."]]
    corpus = Corpus.build(documents, tokenizer)
    encode = tokenizer.inner.encode
    texts = ["The ship sailed.", "It sank.", "She [MASK] said no."]
    expected = [encode(text, add_special_tokens=False).ids for text in texts]
    assert corpus.ids.tolist() == [i for ids in expected for i in ids]
    assert corpus.documents == [0, 2, 3]
    assert [corpus.tokens(i, i + 1).tolist() for i in range(3)] == expected


def test_corpus_does_not_depend_on_what_the_tokenizer_did_before(tokenizer):
    documents = [["The ship sailed across the sea and sank."], ["She said no."]]
    before = Corpus.build(documents, tokenizer)
    tokenizer("The ship sailed across the sea.", max_length=4)
    assert torch.equal(Corpus.build(documents, tokenizer).ids, before.ids)


@pytest.mark.parametrize("documents", [[], [0], [0, 40]])
def test_fewer_than_two_documents_are_refused(corpus, tokenizer, documents):
    part = Corpus(corpus.ids, corpus.sentences[:41], documents)
    with pytest.raises(InputError, match="expected at least two documents"):
        make_batches(part, tokenizer)


@pytest.mark.timeout(5)
def test_an_empty_document_does_not_count(corpus, tokenizer):
    """A file of one book has an empty rest after its last line: there is nothing to pair the book with."""
    part = Corpus(corpus.ids, corpus.sentences[:131], [0, 130, 130])
    with pytest.raises(InputError, match="expected at least two documents"):
        make_batches(part, tokenizer).batch(0)


def test_a_text_too_short_for_one_batch_is_refused(corpus, tokenizer):
    """Found out now, not by a division by zero after hours of training."""
    with pytest.raises(InputError, match="1000 rows"):
        make_batches(corpus, tokenizer, rows=1000)


# LanguageModelBatches, on documents whose tokens are numbered through: an id says where it stood.

DOCUMENTS = (40, 1, 0, 83, 61)  # tokens
ROW = 7


class Numbered:
    """A tokenizer whose text is the number of tokens wanted; the next ids are given out, and 0 ends a text."""

    end_token_id = 0

    def __init__(self):
        self.inner, self.given = self, 0

    def encode_batch_fast(self, documents, add_special_tokens):
        assert not add_special_tokens
        for document in documents:
            ids = list(range(self.given + 1, self.given + int(document) + 1))
            self.given += len(ids)
            yield type("Encoding", (), {"ids": ids})


def make_rows(documents=DOCUMENTS, *, rows: int = 4, length: int = ROW, seed: int = 0) -> LanguageModelBatches:
    return LanguageModelBatches([str(count) for count in documents], Numbered(), rows=rows, length=length, seed=seed)


def test_documents_stand_one_after_another_with_an_end_around_each():
    expected, begin = [0], 1
    for count in DOCUMENTS:
        expected += [*range(begin, begin + count), 0]
        begin += count
    assert make_rows().ids.tolist() == expected


def test_rows_are_pieces_of_the_text_as_it_stands():
    batches = make_rows()
    text = batches.ids.tolist()
    pieces = {tuple(text[begin : begin + ROW]) for begin in range(len(text) - ROW + 1)}
    for number in range(3 * len(batches)):
        batch = batches.batch(number)
        assert batch.keys() == {"input_ids", "labels"}
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert (batch["input_ids"].shape, batch["input_ids"].dtype) == ((4, ROW), torch.int64)
        assert {tuple(row) for row in batch["input_ids"].tolist()} <= pieces


def test_an_epoch_has_no_token_twice_and_leaves_little_out():
    batches = make_rows(rows=1)
    words = len(batches.ids) - len(DOCUMENTS) - 1
    for epoch in range(4):
        rows = [batches.batch(epoch * len(batches) + number)["input_ids"][0].tolist() for number in range(len(batches))]
        seen = [token for row in rows for token in row if token]
        assert len(seen) == len(set(seen))
        assert len(seen) > words - 2 * ROW
        assert rows != sorted(rows)  # shuffled


def test_the_next_epoch_cuts_and_orders_the_text_otherwise():
    batches = make_rows()
    text, phases, orders = batches.ids.tolist(), [], []
    for epoch in range(8):
        rows = [
            row for number in range(len(batches)) for row in batches.batch(epoch * len(batches) + number)["input_ids"]
        ]
        begins = [next(i for i in range(len(text)) if text[i : i + ROW] == row.tolist()) for row in rows]
        assert len({begin % ROW for begin in begins}) == 1
        phases.append(begins[0] % ROW)
        orders.append([begin // ROW for begin in begins])
    assert len(set(phases)) > 3
    assert all(left != right for left, right in pairwise(orders))


def test_every_token_has_its_turn_at_every_place():
    """The first token of a row is foreseen by none: it must not be the same ones every time."""
    batches = make_rows(rows=1)
    firsts = {batches.batch(number)["input_ids"][0, 0].item() for number in range(60 * len(batches))}
    assert len(firsts) > 0.8 * len(batches.ids)


def test_a_batch_of_rows_is_a_function_of_seed_and_number():
    one, other = make_rows(seed=3), make_rows(seed=3)
    numbers = [0, 1, len(one) - 1, len(one), 3 * len(one) + 2, 1]
    forwards = [one.batch(number)["input_ids"] for number in numbers]
    for number, expected in zip(reversed(numbers), reversed(forwards), strict=True):
        assert torch.equal(other.batch(number)["input_ids"], expected)
        assert torch.equal(one.batch(number)["input_ids"], expected)
    assert not torch.equal(make_rows(seed=4).batch(0)["input_ids"], forwards[0])


def test_the_global_generators_decide_nothing():
    expected = make_rows().batch(1)["input_ids"]
    random.seed(99)
    torch.manual_seed(99)
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert torch.equal(make_rows().batch(1)["input_ids"], expected)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_rows_of_a_real_tokenizer_say_the_text_again():
    tokenizer = gptTokenizer("gpt-nano")
    documents = ["The ship sailed.\nIt sank.", "", "She said no: “naïve”!"]
    batches = LanguageModelBatches(documents, tokenizer, rows=1, length=3, seed=0)
    end = tokenizer.tokens([tokenizer.end_token_id])[0]
    assert tokenizer.decode(batches.ids) == end + end.join(documents) + end
    assert batches.ids.dtype == torch.int32


@pytest.mark.parametrize("documents", [(), (0,), (1,), (20,), (2 * 4 * ROW - 30,)])
def test_a_text_too_short_for_one_batch_of_rows_is_refused(documents):
    """The shortest too, of which nothing would be left."""
    tokens = sum(documents) + len(documents) + 1
    with pytest.raises(InputError) as caught:
        make_rows(documents)
    assert str(caught.value) == f"expected text enough for a batch of 4 rows of {ROW}, got {tokens} tokens"


def test_a_text_just_long_enough_is_taken():
    """A row more than a batch, as the text is cut at any place."""
    need = 5 * ROW - 2  # with an end before and after
    batches = make_rows((need,))
    assert len(batches) == 1
    assert all(batches.batch(number)["input_ids"].shape == (4, ROW) for number in range(30))
    with pytest.raises(InputError, match=r"expected text enough"):
        make_rows((need - 1,))


def test_a_tokenizer_that_cannot_end_a_text_is_refused():
    class Endless(Numbered):
        end_token_id = None

    with pytest.raises(InputError, match=r"^tokenizer: expected one with <\|endoftext\|>, to part the documents$"):
        LanguageModelBatches(["99"], Endless(), rows=1, length=3, seed=0)


@pytest.mark.parametrize(("rows", "length"), [(0, ROW), (-1, ROW), (4, 0), (4, -1), (4, 1)])
def test_rows_and_lengths_that_cannot_be_are_refused(rows, length):
    """A row of one token foresees nothing: its loss would be no number."""
    with pytest.raises(InputError):
        make_rows(rows=rows, length=length)


# Books

PAGES = """Produced by Nobody

THE FIRST BOOK

The ship sailed.  It was
_late_ then!  "Was it?"  he asked.

[Illustration: a ship]

CHAPTER II

Dr. who knows 3.5 miles? (Nobody.)




End of the Project Gutenberg EBook of The First Book, by
A. Nobody

The dog ran. The cat sat.

End of Project Gutenberg's The Second Book, by B. Nobody

A third text without an end.
"""
BOOKS = [
    (
        "The First Book, by A. Nobody",
        ['The ship sailed. It was late then! "Was it?" he asked.', "Dr. who knows 3.5 miles? (Nobody.)"],
    ),
    ("The Second Book, by B. Nobody", ["The dog ran. The cat sat."]),
    ("the last book", ["A third text without an end."]),
]


@pytest.mark.parametrize("name", ["books.txt", "books.txt.xz"])
@pytest.mark.parametrize("as_string", [True, False])
def test_read_books_parts_at_the_lines_that_end_a_book(tmp_path, name, as_string):
    path = tmp_path / name
    opener = lzma.open if name.endswith(".xz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(PAGES)
    books = list(read_books(str(path) if as_string else path))
    assert books == BOOKS
    assert sentences(books[0][1])[:3] == ["The ship sailed.", "It was late then!", '"Was it?" he asked.']


def test_paragraphs_are_unwrapped():
    text = "The ship\nsailed. It\n  sank!\n \nWas it  _so_ late?\r\n\n\n\nNobody\tknew."
    assert paragraphs(text) == ["The ship sailed. It sank!", "Was it so late?", "Nobody knew."]


def test_no_sentence_goes_over_the_end_of_a_paragraph():
    assert sentences(["The ship sailed", "It sank. Nobody knew", "why."]) == [
        "The ship sailed",
        "It sank.",
        "Nobody knew",
        "why.",
    ]


def test_sentences_are_unwrapped_and_cut_at_full_stops():
    text = "The ship\nsailed. It sank!\n \nWas it _so_ late?  “No.” Nobody knew.\n\nThe 3.5 miles e.g. here"
    expected = ["The ship sailed.", "It sank!", "Was it so late?", "“No.”", "Nobody knew.", "The 3.5 miles e.g. here"]
    assert sentences(paragraphs(text)) == expected


def test_underlining_counts_as_space():
    """Gutenberg's _italics_. To the tokenizer a space before a full stop is none."""
    assert sentences(paragraphs("It was _late_! So _very_ late.")) == ["It was late !", "So very late."]


@pytest.mark.parametrize(
    "text", ["", "\n\n \n", "CHAPTER II", "* * *\n\n1234", "Produced by somebody", "[Illustration: it]"]
)
def test_what_is_no_prose_is_left_out(text):
    assert paragraphs(text) == []
    assert sentences(paragraphs(text)) == []


# The loop


def test_learning_rate_goes_up_and_down():
    rates = [loop.learning_rate(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2 / 90)
    assert rates[100] == 0
    assert max(rates) == pytest.approx(2.0)
    assert all(right > left for left, right in pairwise(rates[:10]))
    assert all(right < left for left, right in pairwise(rates[10:]))


def test_learning_rate_without_warm_up():
    assert loop.learning_rate(0, 100, 2.0, 0) == pytest.approx(2.0)


def tiny_model(tokenizer) -> BertForPreTraining:
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )
    model = BertForPreTraining(config)
    initialise(model, 0.02, seeded(0))
    return model


def test_every_parameter_gets_a_gradient_and_an_optimiser(corpus, tokenizer):
    model = tiny_model(tokenizer).train()
    model(**make_batches(corpus, tokenizer).batch(0)).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    groups = [group["params"] for optimiser in loop.optimizers(model, 1e-3, 0.1) for group in optimiser.param_groups]
    assert sorted(id(p) for group in groups for p in group) == sorted(id(p) for p in model.parameters())


def test_every_parameter_of_a_decoder_gets_a_gradient_and_an_optimiser():
    config = GptConfig(
        vocab_size=sum(DOCUMENTS) + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=ROW,
    )
    model = Gpt(config)
    initialise(model, 0.02, seeded(0))
    model.train()(**make_rows().batch(0)).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    muon, adamw = loop.optimizers(model, 1e-3, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [names[id(p)] for optimiser in (muon, adamw) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    inside = ("attention.qkv", "attention.output", "feed_forward.inner", "feed_forward.output")
    assert matrices == {f"transformer.layers.{i}.{part}.weight" for i in range(2) for part in inside}
    decays = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if decay} == {
        "transformer.embeddings.word.weight",
        "transformer.embeddings.position.weight",
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Six books of sentences whose words follow from each other."""
    rng = random.Random(0)
    crew = {"cook": "soup", "captain": "map", "sailor": "rope", "parrot": "nut", "doctor": "book", "boy": "apple"}
    books = []
    for number in range(6):
        lines = []
        for _ in range(120):
            who = rng.choice(sorted(crew))
            lines.append(f"The {who} took the {crew[who]} and said that the {crew[who]} was for the {who}.")
        paragraphs = [" ".join(lines[begin : begin + 6]) for begin in range(0, len(lines), 6)]
        books.append(
            "\n\n".join(paragraphs) + f"\n\n\nEnd of Project Gutenberg's Voyage Number {number}, by Nobody\n\n"
        )
    path = tmp_path_factory.mktemp("text") / "books.txt"
    path.write_text("".join(books), encoding="utf-8")
    return path


def arguments(text, out, *more: object) -> list[str]:
    options = {
        "text": text,
        "out": out,
        "steps": 60,
        "rows": 8,
        "length": 32,
        "lr": 1e-2,
        "warmup": 5,
        "vocab-size": 60,
        "hidden-size": 32,
        "layers": 1,
        "heads": 2,
        "save-every": 7,
    }
    held_out = ("--hold-out", "Voyage Number 1", "--hold-out", "Voyage Number 4")
    return [*(str(x) for name, value in options.items() for x in (f"--{name}", value)), *held_out, *map(str, more)]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run from beginning to end: its directory and the loss of every step."""
    return run_whole(pretrain, arguments(text, tmp_path_factory.mktemp("run") / "out"))


def run_whole(script: ModuleType, given: list[str]):
    losses, step = [], loop.train_step

    def recorded(*arguments):
        losses.append(step(*arguments))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", recorded)
        script.main(given)
    return pathlib.Path(given[given.index("--out") + 1]), losses


def run_interrupted(script: ModuleType, given: list[str], stop: int) -> None:
    """The same, stopped by the user before step number `stop`."""
    step, count = loop.train_step, 0

    def interrupted(*arguments):
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(given)


def assert_same_end(out, whole) -> None:
    ours, theirs = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (out, whole))
    assert ours["spent"]["step"] == theirs["spent"]["step"]
    assert ours["spent"]["tokens"] == theirs["spent"]["tokens"]
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_pretraining_learns(finished):
    out, losses = finished
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["step"] == 60
    assert figures["tokens"] > 60 * 8 * 16
    assert figures["masked_accuracy"] > figures["commonest_token_accuracy"]
    assert 0 <= figures["next_sentence_accuracy"] <= 1
    assert figures["masked_words"] > figures["pairs"] > 0


def test_pretraining_leaves_a_checkpoint_that_loads_by_path(finished):
    out, _ = finished
    files = {path.name for path in out.iterdir()}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert files == {"config.json", "model.safetensors", *tokenizer_files, "metrics.json", "checkpoint.pt"}
    model, tokenizer = bertForPreTraining(out), bertTokenizer(out)
    assert model.config.max_position_embeddings == 32
    assert model.config.vocab_size == tokenizer.vocab_size
    output = model(**tokenizer("The cook took the [MASK].", "The boy said that."))
    assert output.prediction_logits.isfinite().all()
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, trained[name].half().float()), name


@pytest.mark.parametrize("stop", [7, 18])
def test_a_run_that_was_stopped_ends_with_the_same_bits(finished, text, tmp_path, stop):
    """Stopped on a checkpoint, and between two of them."""
    whole, _ = finished
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "tokenizer.json", out)  # that a vocabulary is reproducible is another test
    run_interrupted(pretrain, arguments(text, out), stop)
    assert not (out / "model.safetensors").exists()
    torch.manual_seed(stop)  # another process
    pretrain.main(arguments(text, out))
    assert_same_end(out, whole)


def test_a_finished_run_run_again_changes_nothing(finished, text):
    out, _ = finished
    before = (out / "model.safetensors").read_bytes()
    pretrain.main(arguments(text, out))
    assert (out / "model.safetensors").read_bytes() == before


def test_save_atomically_leaves_what_was_there_if_it_fails(tmp_path):
    path = tmp_path / "checkpoint.pt"
    loop.save_atomically({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        loop.save_atomically({"step": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.parametrize("held_out", [(), ("--hold-out", "Voyage Number 1")])
def test_too_few_books_to_evaluate_on_are_refused_before_training(text, tmp_path, monkeypatch, held_out):
    monkeypatch.setattr(pretrain, "train", lambda *_: pytest.fail("training began"))
    given = arguments(text, tmp_path)
    begin = given.index("--hold-out")
    with pytest.raises(InputError, match=re.escape("expected at least two documents")):
        pretrain.main([*given[:begin], *held_out])


# The next word


def gpt_arguments(text, out, *more: object) -> list[str]:
    """A vocabulary needs the 256 bytes; the last of two options of one name counts."""
    shape = ("--vocab-size", 300, "--length", 16, "--hidden-size", 24, "--steps", 50)
    return [*arguments(text, out), *map(str, shape), *map(str, more)]


@pytest.fixture(scope="module")
def finished_gpt(text, tmp_path_factory):
    """A run from beginning to end: its directory and the loss of every step."""
    return run_whole(pretrain_gpt, gpt_arguments(text, tmp_path_factory.mktemp("run") / "out"))


def held_out_texts(text) -> list[str]:
    books = [lines for title, lines in read_books(text) if "Number 1" in title or "Number 4" in title]
    assert len(books) == 2
    return ["\n".join(lines) for lines in books]


def test_pretraining_of_the_next_word_learns(finished_gpt):
    out, losses = finished_gpt
    assert len(losses) == 50
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)  # it begins by knowing nothing
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["step"] == 50
    assert figures["tokens"] == 50 * 8 * 16
    assert figures["perplexity"] < 0.4 * 300
    assert 0 < figures["bits_per_byte"] < 8
    assert figures["epochs"] > 0


def test_its_checkpoint_loads_by_path_and_goes_on_from_a_text(finished_gpt):
    out, _ = finished_gpt
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "model.safetensors", "vocab.json", "merges.txt", "metrics.json", "checkpoint.pt"}
    model, tokenizer = gpt(out), gptTokenizer(out)
    assert (model.config.max_position_embeddings, model.config.num_hidden_layers) == (16, 1)
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    assert tokenizer.end_token_id == 0
    prompt = tokenizer("The cook took")
    (added,) = model.generate(**prompt, max_new_tokens=4)
    assert len(added.ids) == 4
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, trained[name].half().float()), name


def test_its_figures_are_those_of_the_task_on_what_is_shipped(finished_gpt, text):
    """Loaded by path, each held-out book read by itself, all of their tokens and bytes counted."""
    out, _ = finished_gpt
    model, tokenizer = gpt(out), gptTokenizer(out)
    texts = held_out_texts(text)
    found = [perplexity(model, tokenizer, book) for book in texts]
    figures = json.loads((out / "metrics.json").read_text())
    sizes = [len(book.encode()) for book in texts]
    assert figures["held_out_bytes"] == sum(sizes)
    assert figures["held_out_tokens"] == sum(f.tokens for f in found)
    assert figures["held_out_tokens"] == sum(len(tokenizer(book)["input_ids"][0]) for book in texts)
    together = sum(f.bits_per_byte * size for f, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert figures["bits_per_byte"] == pytest.approx(together, rel=1e-6)
    mean_nats = sum(f.nats for f in found) / figures["held_out_tokens"]
    assert figures["perplexity"] == pytest.approx(math.exp(mean_nats), rel=1e-6)


def test_one_book_held_out_gives_the_tasks_figures(finished_gpt, text):
    out, _ = finished_gpt
    model, tokenizer = gpt(out), gptTokenizer(out)
    book = held_out_texts(text)[0]
    figures = pretrain_gpt.evaluate(model, tokenizer, [book.split("\n")])
    found = perplexity(model, tokenizer, book)
    assert figures["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-9)
    assert figures["perplexity"] == pytest.approx(found.perplexity, rel=1e-9)


def test_nothing_of_the_held_out_books_is_in_the_vocabulary_or_the_batches(text, tmp_path, monkeypatch):
    seen = []

    def stop(model, batches, options, checkpoint):
        seen.append(batches.ids)
        raise KeyboardInterrupt

    changed = tmp_path / "books.txt"
    content = text.read_text()
    begin = content.index("End of Project Gutenberg's Voyage Number 0")
    end = content.index("End of Project Gutenberg's Voyage Number 1")
    changed.write_text(content[:begin] + content[begin:end].replace("parrot", "zebra") + content[end:])
    monkeypatch.setattr(pretrain_gpt, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain_gpt.main(gpt_arguments(changed, tmp_path / "out"))
    tokenizer = BytePairTokenizer.from_files(tmp_path / "out" / "vocab.json", tmp_path / "out" / "merges.txt")
    assert "parrot" in tokenizer.decode(seen[0])
    assert "zebra" not in tokenizer.decode(seen[0])


@pytest.mark.parametrize("stop", [7, 18])
def test_a_stopped_run_of_the_next_word_ends_with_the_same_bits(finished_gpt, text, tmp_path, stop):
    """Stopped on a checkpoint, and between two of them."""
    whole, _ = finished_gpt
    out = tmp_path / "out"
    out.mkdir()
    for name in ("vocab.json", "merges.txt"):  # that a vocabulary is reproducible is another test
        shutil.copy(whole / name, out)
    run_interrupted(pretrain_gpt, gpt_arguments(text, out), stop)
    assert not (out / "model.safetensors").exists()
    torch.manual_seed(stop)  # another process
    random.seed(stop)
    pretrain_gpt.main(gpt_arguments(text, out))
    assert_same_end(out, whole)
    ours, theirs = (json.loads((d / "metrics.json").read_text()) for d in (out, whole))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_finished_run_of_the_next_word_run_again_changes_nothing(finished_gpt, text):
    out, _ = finished_gpt
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    pretrain_gpt.main(gpt_arguments(text, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("held_out", [(), ("--hold-out", "No Such Book")])
def test_no_book_to_evaluate_on_is_refused_before_training(text, tmp_path, monkeypatch, held_out):
    """Found out now, not by a division by zero after hours of training."""
    monkeypatch.setattr(pretrain_gpt, "train", lambda *_: pytest.fail("training began"))
    given = gpt_arguments(text, tmp_path)
    while "--hold-out" in given:
        begin = given.index("--hold-out")
        given = given[:begin] + given[begin + 2 :]
    with pytest.raises(InputError, match=r"held? out|hold-out"):
        pretrain_gpt.main([*given, *held_out])
