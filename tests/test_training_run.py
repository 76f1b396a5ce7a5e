"""A whole run: from text to a directory that loads, stopped and gone on with, by the command and by Python."""

import csv
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import hubmodels
from hubmodels.errors import InputError
from hubmodels.training import material
from hubmodels.training.corpus import prepare
from hubmodels.training.distributed import World
from hubmodels.training.evaluation import evaluate, pseudo_perplexity
from hubmodels.training.options import Options
from hubmodels.training.run import pretrain
from hubmodels.training.text import TextOptions

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
WORDS = [
    "the",
    "a",
    "ship",
    "sailed",
    "sea",
    "wind",
    "harbour",
    "night",
    "captain",
    "old",
    "foul",
    "fair",
    "across",
    "came",
    "went",
    "saw",
    "under",
    "over",
    "no",
    "good",
]
ALONE = World(0, 1, torch.device("cpu"))


def prose(seed: int, documents: int, sentences: int) -> str:
    rng = random.Random(seed)
    line = lambda: " ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + " ."  # noqa: E731
    return "\n\n".join("\n".join(line() for _ in range(sentences)) for _ in range(documents)) + "\n"


@pytest.fixture
def told(tmp_path):
    """More options -> those of a small run of a new model, on small texts"""
    (tmp_path / "train.txt").write_text(prose(0, 6, 12))
    (tmp_path / "eval.txt").write_text(prose(1, 3, 8))
    (tmp_path / "small.json").write_text(json.dumps(TINY))

    def options(**more) -> Options:
        small = {
            "out": tmp_path / "run",
            "train": (str(tmp_path / "train.txt"),),
            "eval": (str(tmp_path / "eval.txt"),),
            "config": tmp_path / "small.json",
            "tokenizer": "bert-nano",
            "length": ((32, 1.0),),
            "batch_size": 8,
            "steps": 6,
            "log_every": 2,
            "lr": 1e-3,
            "device": "cpu",
        }
        return Options(**{**small, **more})

    return options


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_model_is_left_with_its_card_and_its_course(told, tmp_path):
    lines: list[str] = []
    metrics = pretrain(
        told(eval_every=3, general=(str(tmp_path / "train.txt"),)), lines.append, command=["hubmodels", "x y"]
    )
    out = tmp_path / "run"
    model = hubmodels.bertForPreTraining(out)
    assert model.provenance.report.is_complete
    assert hubmodels.bertForMaskedLM(out).config.hidden_size == 24
    assert hubmodels.bertTokenizer(out).vocab_size == 8192
    assert [row["step"] for row in rows(out / "training.csv")] == ["2", "4", "6"]
    assert all(float(row["word_loss"]) > 0 and float(row["pair_loss"]) > 0 for row in rows(out / "training.csv"))
    exams = [(row["step"], row["text"]) for row in rows(out / "evaluation.csv")]
    assert exams == [(step, text) for step in "036" for text in ("held-out", "general")]
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert set(metrics["held-out"]) == {
        *("loss", "word_loss", "perplexity", "word_accuracy", "commonest_accuracy", "words", "pair_accuracy", "pairs"),
    }
    card = (out / "README.md").read_text()
    assert "    hubmodels 'x y'" in card
    assert rows(out / "evaluation.csv")[0]["word_loss"] in card
    assert "BertForPreTraining, 2 layers, hidden size 24" in card
    assert any(line.startswith("train: ") and "6 documents" in line for line in lines)


def test_the_course_is_drawn(told, tmp_path):
    pytest.importorskip("matplotlib")
    pretrain(told())
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_for_tensorboard(told, tmp_path):
    pytest.importorskip("tensorboard")
    pretrain(told(tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("training/word_loss")] == [2, 4, 6]
    assert [event.step for event in found.Scalars("held-out/word_loss")] == [0, 6]


@pytest.mark.parametrize(
    "more", [{}, {"nsp": "google"}, {"nsp": "sop", "whole_word_mask": True}, {"nsp": "none", "ngram": 3}]
)
def test_stopped_and_gone_on_with_a_run_ends_as_one_that_was_not(told, tmp_path, more):
    pretrain(told(**more, schedule="constant"))
    pretrain(told(**more, schedule="constant", out=tmp_path / "two", steps=3))
    pretrain(told(**more, schedule="constant", out=tmp_path / "two"))
    assert hubmodels.diff(str(tmp_path / "run"), str(tmp_path / "two")).is_equal
    one, two = (rows(tmp_path / name / "training.csv")[-1] for name in ("run", "two"))
    assert one["word_loss"] == two["word_loss"]
    assert [row["step"] for row in rows(tmp_path / "two" / "evaluation.csv")] == ["0", "3", "6"]


def test_what_must_not_change_is_named(told, tmp_path):
    pretrain(told(steps=2))
    with pytest.raises(InputError, match=r"mlm_probability was 0.15, is 0.3; seed was 0, is 1"):
        pretrain(told(mlm_probability=0.3, seed=1))
    (tmp_path / "train.txt").write_text(prose(3, 6, 12))
    with pytest.raises(InputError, match="text was "):
        pretrain(told())
    pretrain(told(overwrite=True, steps=2))


def test_a_directory_of_something_else_is_left_alone(told, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="something else is there; name a new directory, or one of a run"):
            pretrain(told(overwrite=overwrite))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_a_vocabulary_from_the_text(told, tmp_path):
    pretrain(told(tokenizer=None, train_tokenizer=120))
    assert hubmodels.bertTokenizer(tmp_path / "run").vocab_size <= 120
    assert hubmodels.bertForMaskedLM(tmp_path / "run").config.vocab_size <= 120


def test_a_model_of_the_next_word(told, tmp_path):
    for kind, entry in (("gpt2", hubmodels.gpt2), ("openai-gpt", hubmodels.gpt)):
        (tmp_path / "gpt.json").write_text(
            json.dumps({"model_type": kind, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32})
        )
        out = tmp_path / kind
        metrics = pretrain(told(config=tmp_path / "gpt.json", tokenizer=None, train_tokenizer=300, out=out))
        assert set(metrics["held-out"]) == {
            "loss",
            "word_loss",
            "perplexity",
            "word_accuracy",
            "commonest_accuracy",
            "words",
        }
        model = entry(out)
        assert len(model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)[0].ids) <= 3


def test_a_checkpoint_goes_on_and_keeps_what_is_not_taught(told, tmp_path):
    before = hubmodels.bertForPreTraining("bert-nano").state_dict()
    metrics = pretrain(told(config=None, tokenizer=None, weights="bert-nano", nsp="none", steps=2))
    after = hubmodels.bertForPreTraining(tmp_path / "run").state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "pooler" in name or "next_sentence" in name}
    assert "pair_accuracy" not in metrics["held-out"]


def test_pairs_are_asked_where_the_checkpoint_has_the_head(told, tmp_path):
    assert "pair_accuracy" in pretrain(told(config=None, tokenizer=None, weights="bert-nano", steps=1))["held-out"]
    hubmodels.export(
        hubmodels.bertForMaskedLM("bert-nano"), tmp_path / "headless", hubmodels.bertTokenizer("bert-nano")
    )
    headless = told(config=None, tokenizer=None, weights=str(tmp_path / "headless"), steps=1, out=tmp_path / "two")
    assert "pair_accuracy" not in pretrain(headless)["held-out"]


def test_more_words_begin_as_the_mean_of_their_pieces(told, tmp_path):
    (tmp_path / "words.txt").write_text("spinnaker\nmizzenmast\n")
    pretrain(
        told(config=None, tokenizer=None, weights="bert-nano", add_tokens=tmp_path / "words.txt", steps=1, lr=1e-12)
    )
    tokenizer, old = hubmodels.bertTokenizer(tmp_path / "run"), hubmodels.bertTokenizer("bert-nano")
    assert tokenizer.tokenize("a spinnaker") == ["a", "spinnaker"]
    table, before = (hubmodels.bertModel(w).embeddings.word.weight for w in (tmp_path / "run", "bert-nano"))
    pieces = old("spinnaker")["input_ids"][0, 1:-1]
    assert len(pieces) > 1
    torch.testing.assert_close(table[-2], before[pieces].mean(0), atol=1e-4, rtol=0)
    assert hubmodels.bertForMaskedLM(tmp_path / "run").head.bias.shape == (8194,)


def test_held_out_documents_of_the_same_file(told):
    metrics = pretrain(told(eval=(), eval_share=0.4, steps=1))
    assert metrics["held-out"]["words"] > 0


def test_half_precision_is_what_is_measured(told, tmp_path):
    metrics = pretrain(told(half=True))
    assert {
        t.dtype
        for t in __import__("safetensors.torch").torch.load_file(tmp_path / "run" / "model.safetensors").values()
    } == {torch.float16}
    exams = [row for row in rows(tmp_path / "run" / "evaluation.csv") if row["step"] == "6"]
    assert f"{metrics['held-out']['word_loss']:.6g}" == exams[-1]["word_loss"]


def test_two_lengths_one_after_the_other(told, tmp_path):
    pretrain(told(length=((16, 0.5), (32, 0.5)), steps=8, log_every=1))
    assert [row["phase"] for row in rows(tmp_path / "run" / "training.csv")] == ["0"] * 4 + ["1"] * 4


def test_rows_of_the_first_length_alone_leave_later_positions_as_they_were(told, tmp_path):
    start = pretrain(told(length=((16, 1.0),), weight_decay=0.0, steps=3, seed=4, eval=()))
    del start
    trained = hubmodels.bertModel(tmp_path / "run").embeddings.position.weight
    options = told(length=((16, 1.0),), seed=4)
    words = material.words_in(options, ALONE)
    new = material.model_in(options, "bert", words, "strict").transformer.embeddings.position.weight
    assert torch.equal(trained[16:], new[16:])
    assert not torch.equal(trained[:16], new[:16])


@pytest.mark.parametrize("more", [{"tokens": 900}, {"hours": 3e-4}, {"epochs": 1.0}])
def test_other_budgets(told, more):
    metrics = pretrain(told(steps=None, **more))
    if "tokens" in more:
        assert 900 <= metrics["tokens"] < 900 + 8 * 32
    if "epochs" in more:
        assert metrics["passes"] == pytest.approx(1.0, abs=0.4)  # pairs bring in tokens of their own
    assert metrics["steps"] > 0


def test_every_option_of_the_loop_runs(told):
    more = {"ema": 0.9, "gradient_checkpointing": True, "optimiser": "muon", "precision": "bf16", "warmup": 2}
    more |= {"schedule": "cosine", "batch_size": None, "batch_tokens": 300, "micro_tokens": 100, "workers": 1}
    more |= {"dropout": 0.1, "start": "neighbours", "save_every": 2}
    metrics = pretrain(told(**more))
    assert math.isfinite(metrics["held-out"]["loss"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"length": ((64, 1.0),)}, "--length 64: the model has 32 positions"),
        ({"train": ("nothing-*.txt",)}, "nothing-*.txt"),
        ({"start": "neighbours", "config": "gpt"}, "--start neighbours: it is for encoders"),
        ({"config": "few"}, "the model has 100 words, but the tokenizer 8192"),
        ({"config": "t5"}, "expected a bert, gpt, gpt2, got a t5"),
    ],
)
def test_what_does_not_fit_is_said(told, tmp_path, more, text):
    for name, content in (
        ("gpt", {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 3}),
        ("few", {**TINY, "vocab_size": 100}),
        ("t5", {"model_type": "t5"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if "config" in more:
        more = {**more, "config": tmp_path / f"{more['config']}.json"}
    if "gpt" in str(more.get("config")):
        more |= {"tokenizer": None, "train_tokenizer": 300}
    with pytest.raises(hubmodels.errors.HubModelsError) as caught:
        pretrain(told(**more))
    assert text in str(caught.value)


@pytest.fixture
def exam(told, tmp_path):
    options = told()
    tokenizer = hubmodels.bertTokenizer("bert-nano")
    corpus = prepare([tmp_path / "eval.txt"], tokenizer, TextOptions(), tmp_path / "cache")
    return lambda pairs: (material.exam_in(corpus, tokenizer, options.length[0][0], pairs), tokenizer)


@pytest.mark.parametrize("pairs", ["strict", "none", "sop"])
def test_figures_do_not_depend_on_the_batch(exam, pairs):
    samples, tokenizer = exam(pairs)
    model = hubmodels.bertForPreTraining("bert-nano")
    if pairs == "none":
        model = hubmodels.bertForMaskedLM("bert-nano")
    found = [evaluate(model, samples, tokenizer.pad_token_id, most=most, world=ALONE) for most in (1, 1, 100, 1000)]
    assert found[0] == found[1]
    for other in found[2:]:
        assert other == pytest.approx(found[0], abs=1e-6, rel=1e-6)
    assert not model.training


def test_pseudo_perplexity_hides_each_word_alone(exam):
    samples, tokenizer = exam("none")
    model = hubmodels.bertForMaskedLM("bert-nano")
    found = pseudo_perplexity(model, samples, 0, tokenizer.mask_token_id, rows=2, most=100)
    epoch = samples.epoch(0)
    nats, words = 0.0, 0
    for index in (0, len(epoch.sizes) - 1):
        sample = epoch.sample(index)
        ids = torch.tensor([i if label < 0 else label for i, label in zip(sample.ids, sample.labels, strict=True)])
        for place in range(1, len(ids) - 1):
            hidden = ids.clone()
            hidden[place] = tokenizer.mask_token_id
            nats -= model(hidden[None]).logits[0, place].log_softmax(-1)[ids[place]].item()
            words += 1
    assert found == pytest.approx(math.exp(nats / words), rel=1e-4)


def test_a_small_model_learns_fifty_sentences_by_heart(told, tmp_path):
    """As google-research/bert's own check on its sample text: masked words 0.985, next sentences 1.0."""
    entries = (REPOSITORY / "hubmodels/weights/bert-nano/vocab.txt").read_text().split()
    rng = random.Random(5)
    words = rng.sample([word for word in entries if word.isalpha() and len(word) > 3], 250)
    lines = [" ".join(words[begin : begin + 5]) for begin in range(0, 250, 5)]
    text = "\n\n".join("\n".join(lines[begin : begin + 10]) for begin in range(0, 50, 10))
    (tmp_path / "fifty.txt").write_text(text)
    (tmp_path / "small.json").write_text(json.dumps({**TINY, "hidden_size": 64, "num_attention_heads": 4}))
    fifty = (str(tmp_path / "fifty.txt"),)
    more = {"optimiser": "muon", "start": "neighbours", "lr": 1e-2, "warmup": 40, "steps": 600, "batch_size": 16}
    metrics = pretrain(told(train=fifty, eval=fifty, **more, dropout=0.0))
    assert metrics["held-out"]["word_accuracy"] >= 0.98
    assert metrics["held-out"]["pair_accuracy"] == 1.0


def test_two_ranks_end_where_one_does(told, tmp_path):
    told()
    command = [
        "pretrain",
        "--train",
        "train.txt",
        "--eval",
        "eval.txt",
        "--config",
        "small.json",
        "--tokenizer",
        "bert-nano",
    ]
    command += [
        "--length",
        "32",
        "--batch-size",
        "8",
        "--steps",
        "5",
        "--dropout",
        "0",
        "--device",
        "cpu",
        "--json",
        "--cache",
        "c",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    found = []
    for name, start in (
        ("one", ["-m"]),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]),
    ):
        done = subprocess.run(
            [sys.executable, *start, "hubmodels", *command, "--out", name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["held-out"] == pytest.approx(found[1]["held-out"], rel=1e-4)
    assert found[0]["tokens"] == found[1]["tokens"]


def test_the_usual_command_of_tutorials_runs(run, told, tmp_path, monkeypatch):
    told()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(
        *("pretrain", "--output_dir=output", "--model_type=bert", "--model_name_or_path=bert-nano", "--do_train"),
        *("--train_data_file=train.txt", "--do_eval", "--eval_data_file=eval.txt", "--mlm", "--line_by_line"),
        *("--block_size=32", "--per_gpu_train_batch_size=16", "--max_steps=2", "--overwrite_output_dir"),
    )
    assert code == 0, err
    assert hubmodels.bertForMaskedLM("./output")


def test_options_are_what_a_run_says_it_was_told(told, tmp_path):
    options = told(steps=1)
    pretrain(options)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(said) == {field.name for field in dataclasses.fields(Options)}
    assert said["steps"] == 1
