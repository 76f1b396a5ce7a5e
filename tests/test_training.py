"""Pretraining: what is masked, what is paired, and a run that can be stopped anywhere."""

import json
import lzma
import random
import re
import shutil
from itertools import pairwise

import pytest
import torch

from hubmodels import bertForPreTraining, bertTokenizer
from hubmodels.errors import InputError
from hubmodels.families.bert import BertConfig, BertForPreTraining
from hubmodels.heads import IGNORED
from hubmodels.layers import initialise
from hubmodels.training import pretrain
from hubmodels.training.data import Corpus, PretrainingBatches, mask_words, read_books, sentences


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
    ("The First Book, by A. Nobody", ["The ship sailed.", "It was late then!", '"Was it?" he asked.']),
    ("The Second Book, by B. Nobody", ["The dog ran.", "The cat sat."]),
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
    assert [title for title, _ in books] == [title for title, _ in BOOKS]
    assert books[0][1][:3] == BOOKS[0][1]
    assert books[1:] == BOOKS[1:]


def test_sentences_are_unwrapped_and_cut_at_full_stops():
    text = "The ship\nsailed. It sank!\n \nWas it _so_ late?  “No.” Nobody knew.\n\nThe 3.5 miles e.g. here"
    expected = ["The ship sailed.", "It sank!", "Was it so late?", "“No.”", "Nobody knew.", "The 3.5 miles e.g. here"]
    assert sentences(text) == expected


def test_underlining_counts_as_space():
    """Gutenberg's _italics_. To the tokenizer a space before a full stop is none."""
    assert sentences("It was _late_! So _very_ late.") == ["It was late !", "So very late."]


@pytest.mark.parametrize(
    "text", ["", "\n\n \n", "CHAPTER II", "* * *\n\n1234", "Produced by somebody", "[Illustration: it]"]
)
def test_what_is_no_prose_is_left_out(text):
    assert sentences(text) == []


# The loop


def test_learning_rate_goes_up_and_down():
    rates = [pretrain.learning_rate(step, 100, 2.0, 10) for step in range(101)]
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
    assert pretrain.learning_rate(0, 100, 2.0, 0) == pytest.approx(2.0)


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
    groups = [
        group["params"] for optimiser in pretrain.optimizers(model, 1e-3, 0.1) for group in optimiser.param_groups
    ]
    assert sorted(id(p) for group in groups for p in group) == sorted(id(p) for p in model.parameters())


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
    out, losses, step = tmp_path_factory.mktemp("run") / "out", [], pretrain.train_step

    def recorded(*given):
        losses.append(step(*given))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train_step", recorded)
        pretrain.main(arguments(text, out))
    return out, losses


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
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "checkpoint.pt"}
    model, tokenizer = bertForPreTraining(out), bertTokenizer(out)
    assert model.config.max_position_embeddings == 32
    assert model.config.vocab_size == tokenizer.vocab_size
    output = model(**tokenizer("The cook took the [MASK].", "The boy said that."))
    assert output.prediction_logits.isfinite().all()
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, trained[name].half().float()), name


@pytest.mark.parametrize("stop", [7, 18])
def test_a_run_that_was_stopped_ends_with_the_same_bits(finished, text, tmp_path, monkeypatch, stop):
    """Stopped on a checkpoint, and between two of them."""
    whole, _ = finished
    step, count = pretrain.train_step, 0

    def interrupted(*given):
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return step(*given)

    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "tokenizer.json", out)  # that a vocabulary is reproducible is another test
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(arguments(text, out))
    assert not (out / "model.safetensors").exists()
    torch.manual_seed(stop)  # another process
    pretrain.main(arguments(text, out))
    ours, theirs = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (out, whole))
    assert ours["spent"]["step"] == theirs["spent"]["step"]
    assert ours["spent"]["tokens"] == theirs["spent"]["tokens"]
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_finished_run_run_again_changes_nothing(finished, text):
    out, _ = finished
    before = (out / "model.safetensors").read_bytes()
    pretrain.main(arguments(text, out))
    assert (out / "model.safetensors").read_bytes() == before


def test_save_atomically_leaves_what_was_there_if_it_fails(tmp_path):
    path = tmp_path / "checkpoint.pt"
    pretrain.save_atomically({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        pretrain.save_atomically({"step": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.parametrize("held_out", [(), ("--hold-out", "Voyage Number 1")])
def test_too_few_books_to_evaluate_on_are_refused_before_training(text, tmp_path, monkeypatch, held_out):
    monkeypatch.setattr(pretrain, "train", lambda *_: pytest.fail("training began"))
    given = arguments(text, tmp_path)
    begin = given.index("--hold-out")
    with pytest.raises(InputError, match=re.escape("expected at least two documents")):
        pretrain.main([*given[:begin], *held_out])
