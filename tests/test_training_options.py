"""What a run is told: options that cannot be, the command, and the flags of older scripts."""

import dataclasses
from pathlib import Path

import pytest

from hubmodels.cli import pretrain as command
from hubmodels.errors import InputError
from hubmodels.training.options import CHOICES, Options, flag

NEW = {"train": ("a.txt",), "config": Path("c.json"), "tokenizer": "bert-nano"}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"train": ()}, "--train: expected at least one file or glob of text"),
        ({"config": None}, "expected --config FILE for a new model, or --weights NAME"),
        ({"weights": "bert-nano"}, "expected --config FILE for a new model, or --weights NAME"),
        ({"tokenizer": None}, "a new model needs --tokenizer NAME or --train-tokenizer N, one of the two"),
        ({"train_tokenizer": 99}, "a new model needs --tokenizer NAME or --train-tokenizer N, one of the two"),
        ({"steps": 5, "hours": 1.0}, "expected one budget, got --steps 5, --hours 1.0"),
        ({"steps": 0}, "--steps 0: expected more than 0"),
        ({"lr": float("nan")}, "--lr nan: expected more than 0"),
        ({"batch_size": 4, "batch_tokens": 4}, "expected --batch-size or --batch-tokens, got both"),
        ({"mlm_probability": 1.5}, "--mlm-probability 1.5: expected 0 or more, and less than 1"),
        ({"form": "verse"}, "--form verse: expected sentences, paragraphs, lines or running"),
        ({"nsp": "loose"}, "--nsp loose: expected strict, google, sop or none"),
        ({"length": ((4, 1.0),)}, "--length 4:1: expected 8 tokens or more, and a share up to 1"),
        ({"length": ((128, 0.5), (512, 0.4))}, "--length: expected shares that are 1 together, got 0.9"),
        ({"eval": ("b.txt",), "eval_share": 0.1}, "--eval-share: --eval has the held-out text already"),
        ({"word_list": Path("w.txt")}, "--word-list: it is for --whole-word-mask, which is off"),
    ],
)
def test_what_cannot_be_is_refused(wrong, text):
    with pytest.raises(InputError) as caught:
        Options(**{**NEW, **wrong})
    assert text in str(caught.value)


def test_a_vocabulary_of_its_own_is_for_new_models():
    with pytest.raises(
        InputError, match="--train-tokenizer: --weights has a vocabulary; --add-tokens gives it more words"
    ):
        Options(train=("a.txt",), weights="bert-nano", train_tokenizer=99)


@pytest.fixture
def told(monkeypatch, run):
    """Arguments of the command -> the options that it makes of them"""

    def parse(*arguments: str) -> Options:
        found = []
        monkeypatch.setattr("hubmodels.training.run.pretrain", lambda options, *_, **__: found.append(options) or {})
        code, _, err = run("pretrain", "--out", "runs/x", "--train", "a.txt", *arguments)
        assert code == 0, err
        return found[0]

    return parse


def test_the_command_tells_every_option_by_its_name(told):
    values = {bool: [], int: ["3"], float: ["0.5"], Path: ["p"], str: ["n"]}
    for field in dataclasses.fields(Options):
        if field.name in ("out", "train", "length", "config", "weights", "tokenizer", "train_tokenizer", "word_list"):
            continue
        kind = command._plain(__import__("typing").get_type_hints(Options)[field.name])
        said = [CHOICES[field.name][-1]] if field.name in CHOICES else values.get(kind, ["t.txt"])
        found = getattr(told("--weights", "bert-nano", flag(field.name), *said), field.name)
        expected = {bool: True, int: 3, float: 0.5, Path: Path("p"), str: said and said[0]}.get(kind, ("t.txt",))
        assert found == expected, field.name


def test_what_is_not_told_is_the_default(told):
    expected = Options(out=Path("runs/x"), train=("a.txt",), weights="bert-nano")
    assert told("--weights", "bert-nano") == expected


def test_lengths_in_turn(told):
    assert told("--weights", "w", "--length", "64").length == ((64, 1.0),)
    assert told("--weights", "w", "--length", "128:0.9", "512:0.1").length == ((128, 0.9), (512, 0.1))


def test_the_usual_command_of_tutorials(told, monkeypatch):
    found = told(
        *("--output_dir=output", "--model_type=bert", "--model_name_or_path=bert-nano", "--do_train", "--do_eval"),
        *("--train_data_file=wiki.txt", "--eval_data_file=wiki-test.txt", "--mlm", "--line_by_line"),
        *("--block_size=64", "--per_device_train_batch_size=8", "--gradient_accumulation_steps=4"),
        *("--learning_rate=3e-5", "--num_train_epochs=2", "--save_steps=50", "--save_total_limit=1", "--fp16"),
        *("--overwrite_output_dir", "--mlm_probability=0.2", "--whole_word_mask", "--warmup_steps=10", "--seed=3"),
    )
    assert found == Options(
        out=Path("output"),
        train=("wiki.txt",),
        eval=("wiki-test.txt",),
        weights="bert-nano",
        objective="mlm",
        nsp="none",
        form="lines",
        length=((64, 1.0),),
        batch_size=32,
        micro_tokens=512,
        lr=3e-5,
        epochs=2.0,
        save_every=50,
        keep=1,
        precision="fp16",
        overwrite=True,
        mlm_probability=0.2,
        whole_word_mask=True,
        warmup=10,
        seed=3,
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model_type", "gpt2"), "--model-type gpt2: the model is a bert"),
        (("--gradient_accumulation_steps", "2"), "it needs --per-device-train-batch-size"),
        (("--batch-size", "4", "--per_gpu_train_batch_size", "2"), "got both"),
        (("--objective", "causal"), "--objective causal: a bert learns by mlm"),
    ],
)
def test_what_the_command_refuses(run, arguments, text, tmp_path):
    code, _, err = run("pretrain", "--out", tmp_path / "x", "--train", "a.txt", "--weights", "bert-nano", *arguments)
    assert code == 2
    assert text in err


def test_the_help_names_every_option(run):
    with pytest.raises(SystemExit):
        run("pretrain", "--help")


def test_every_option_has_a_line_of_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(Options))
