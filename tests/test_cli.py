"""The command line: what it prints, for people and for machines, and how it fails.

Here are the commands that ask something of a model, and what all have in common; test_weights_commands.py has the rest.
"""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from hubmodels import __version__, bertModel, bertTokenizer, gpt, gptTokenizer, tasks
from hubmodels.cli import main
from hubmodels.tasks import embed


def standard_input(monkeypatch, content: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))


# fill-mask


def test_fill_mask_prints_the_likeliest_words(answer):
    lines = answer("fill-mask", "The [MASK] sailed.", "A [MASK] and a [MASK].", "--top-k", 2).splitlines()
    assert lines[0].split() == ["TEXT", "MASK", "WORD", "PROBABILITY"]
    assert len(lines) == 1 + 3 * 2
    assert lines[1].startswith("The [MASK] sailed.  ")
    assert lines[3].startswith("A [MASK] and a [MASK].  ")
    assert [line.split()[-3] for line in lines[1::2]] == ["1", "1", "2"]


def test_fill_mask_as_json_is_complete(answer):
    texts = ["The [MASK] sailed.", "Ça: [MASK] — [MASK]…"]
    rows = json.loads(answer("fill-mask", *texts, "--json"))
    assert [row["text"] for row in rows] == texts
    assert [len(row["masks"]) for row in rows] == [1, 2]
    tokenizer = bertTokenizer("bert-nano")
    for guess in (guess for row in rows for guesses in row["masks"] for guess in guesses):
        assert set(guess) == {"token", "token_id", "probability"}
        assert tokenizer.tokens([guess["token_id"]]) == [guess["token"]]
        assert 0 <= guess["probability"] <= 1


# embed


def test_embed_prints_a_line_per_text(answer):
    lines = answer("embed", "The ship sailed.", "It sank.").splitlines()
    assert "COSINE TO FIRST" in lines[0]
    assert len(lines) == 3
    assert lines[1].startswith("The ship sailed.")
    assert lines[1].endswith("1.000")


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_embed_as_json_is_complete(answer, pooling):
    texts = ["The ship sailed.", "Ça va ?"]
    rows = json.loads(answer("embed", *texts, "--json", "--pooling", pooling))
    assert [row["text"] for row in rows] == texts
    vectors = embed(bertModel("bert-nano"), bertTokenizer("bert-nano"), texts, pooling=pooling)
    for row, vector in zip(rows, vectors.tolist(), strict=True):
        assert row["vector"] == pytest.approx(vector, abs=1e-5)


def test_embed_reads_long_texts_in_windows(answer):
    text = "the ship sailed across the sea " * 60
    whole, cut = (json.loads(answer("embed", text, "--json", *more))[0]["vector"] for more in (("--overlap", "8"), ()))
    model, tokenizer = bertModel("bert-nano"), bertTokenizer("bert-nano")
    assert whole == pytest.approx(embed(model, tokenizer, text, overlap=8)[0].tolist(), abs=1e-5)
    assert whole != pytest.approx(cut, abs=1e-5)


# generate


def completions(out: str) -> list[dict]:
    return json.loads(out)


GREEDY = ("--temperature", 0, "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def nano():
    return gpt("gpt-nano"), gptTokenizer("gpt-nano")


def test_generate_prints_the_text_with_its_prompt(answer, nano):
    [expected] = tasks.generate(*nano, "The ship", max_new_tokens=6)
    assert answer("generate", "The ship", *GREEDY) == f"The ship{expected.text}\n"


def test_generate_streams(monkeypatch, answer):
    """Each piece is written out before the next is computed."""

    def stream(*args, **options):
        for piece in (" one", " two", " three"):
            yield piece
            printed.append(sys.stdout.getvalue())

    printed: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.StringIO())
        patched.setattr(tasks, "stream", stream)
        assert main(["generate", "Count:"]) == 0
    assert printed == ["Count: one", "Count: one two", "Count: one two three"]


def test_generate_draws_unless_told_otherwise_and_a_seed_repeats_it(answer):
    arguments = ("generate", "The ship", "--max-new-tokens", 12)
    drawn = answer(*arguments, "--seed", 3)
    assert answer(*arguments, "--seed", 3) == drawn
    assert answer(*arguments, "--seed", 4) != drawn
    assert answer(*arguments, "--seed", 3, "--temperature", 0.8) == drawn
    assert answer(*arguments, "--temperature", 0) == answer(*arguments, "--temperature", 0, "--seed", 9)


def test_generate_as_json_is_complete(answer, nano):
    expected = tasks.generate(*nano, ["The ship", "Né"], max_new_tokens=6)
    assert completions(answer("generate", "The ship", "Né", "--json", *GREEDY)) == [e._asdict() for e in expected]
    one = completions(answer("generate", "The ship", "--json", *GREEDY))
    assert one == [expected[0]._asdict()]


def test_generate_streams_what_it_tells_as_json(answer):
    arguments = ("generate", "The ship", "--seed", 5, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01)
    arguments += ("--repetition-penalty", 1.2, "--max-new-tokens", 15, "--stop", "the")
    [told] = completions(answer(*arguments, "--json"))
    assert answer(*arguments) == f"The ship{told['text']}\n"


def test_generate_gives_several_samples_apart(answer):
    arguments = ("generate", "The ship", "--samples", 3, "--seed", 1, "--max-new-tokens", 8)
    told = completions(answer(*arguments, "--json"))
    assert len({each["text"] for each in told}) == 3
    assert answer(*arguments) == "\n\n".join("The ship" + each["text"] for each in told) + "\n"


def test_generate_searches_with_beams(answer, nano):
    arguments = ("generate", "The ship", "--num-beams", 3, "--length-penalty", 0.5, "--max-new-tokens", 5)
    [expected] = tasks.generate(*nano, "The ship", num_beams=3, length_penalty=0.5, max_new_tokens=5)
    assert completions(answer(*arguments, "--json")) == [expected._asdict()]
    assert answer(*arguments) == f"The ship{expected.text}\n"
    assert len(completions(answer(*arguments, "--samples", 2, "--json"))) == 2


def test_generate_ends_before_any_stop(answer):
    free = completions(answer("generate", "The ship", "--json", *GREEDY))[0]["text"]
    [told] = completions(answer("generate", "The ship", "--json", *GREEDY, "--stop", free[3:5], "--stop", "~~"))
    assert (told["text"], told["ended"]) == (free[: free.index(free[3:5])], True)


def test_generate_reads_standard_input_and_files(answer, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("The ship\n\nShe said\n")
    read = [each["prompt"] for each in completions(answer("generate", "--json", "--file", tmp_path / "a.txt", *GREEDY))]
    assert read == ["The ship", "She said"]
    standard_input(monkeypatch, "Né\n".encode())
    assert answer("generate", *GREEDY).startswith("Né")


def test_generate_takes_a_path(answer, nano, tmp_path):
    from hubmodels import export

    export(nano[0], tmp_path / "model", nano[1])
    named = answer("generate", "The ship", *GREEDY)
    assert answer("generate", "The ship", *GREEDY, "--model", tmp_path / "model") == named


# score and perplexity


def test_score_prints_every_token(answer, nano):
    [expected] = tasks.score(*nano, "The ship sailed.")
    lines = answer("score", "The ship sailed.").splitlines()
    assert lines[0].split() == ["TEXT", "TOKEN", "LOG-PROBABILITY"]
    assert lines[1].split() == ["The", "ship", "sailed.", f"{expected.total:.3f}"]
    told = [line.split() for line in lines[2:]]
    assert [value for _, value in told] == [f"{value:.3f}" for value in expected.logprobs]


def test_score_as_json_is_complete(answer, nano):
    texts = ["The ship sailed.", "Né"]
    rows = json.loads(answer("score", *texts, "--json"))
    for text, row, expected in zip(texts, rows, tasks.score(*nano, texts), strict=True):
        assert (row["text"], row["token_ids"]) == (text, expected.token_ids)
        assert row["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
        assert row["total"] == pytest.approx(expected.total, abs=1e-3)


def test_perplexity_of_files(answer, nano, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("The ship sailed.\nIt sank.\n")
    second.write_text("Une école — " * 60, encoding="utf-8")
    expected = [tasks.perplexity(*nano, path.read_text(encoding="utf-8"), stride=100) for path in (first, second)]
    lines = answer("perplexity", first, second, "--stride", 100).splitlines()
    assert lines[0].split() == ["FILE", "PERPLEXITY", "BITS", "PER", "BYTE", "TOKENS"]
    for path, line, each in zip((first, second), lines[1:], expected, strict=True):
        told = [str(path), f"{each.perplexity:.2f}", f"{each.bits_per_byte:.3f}", f"{each.tokens:,}"]
        assert line.split() == told
    rows = json.loads(answer("perplexity", first, second, "--stride", 100, "--json"))
    for path, row, each in zip((first, second), rows, expected, strict=True):
        assert row.pop("file") == str(path)
        assert row == pytest.approx(each._asdict(), rel=1e-5)


# Where texts come from


def texts_of(out: str) -> list[str]:
    return [row["text"] for row in json.loads(out)]


def test_texts_come_from_several_files_after_the_arguments(answer, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("Une école.\n\n   \nTwo.\r\n", encoding="utf-8")
    second.write_text("Three.", encoding="utf-8")
    out = answer("embed", "--json", "Zero.", "--file", first, "--file", second)
    assert texts_of(out) == ["Zero.", "Une école.", "Two.", "Three."]


def test_texts_come_from_standard_input(answer, monkeypatch):
    standard_input(monkeypatch, "The [MASK] sailed.\n\nThe [MASK] sank — 中文.\n".encode())
    assert texts_of(answer("fill-mask", "--json")) == ["The [MASK] sailed.", "The [MASK] sank — 中文."]


def test_standard_input_is_left_alone_if_there_are_texts(answer, monkeypatch, tmp_path):
    standard_input(monkeypatch, b"not read\n")
    assert texts_of(answer("embed", "--json", "One.")) == ["One."]
    (tmp_path / "a.txt").write_text("Two.\n")
    assert texts_of(answer("embed", "--json", "--file", tmp_path / "a.txt")) == ["Two."]
    assert sys.stdin.read() == "not read\n"


def test_a_byte_order_mark_is_no_part_of_the_text(answer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfThe ship.\n")
    assert texts_of(answer("embed", "--json", "--file", tmp_path / "a.txt")) == ["The ship."]


def test_only_line_ends_part_texts(answer, tmp_path):
    """A text a line, as wc and grep count lines: a form feed or U+2028 stands inside a text."""
    (tmp_path / "a.txt").write_bytes("The ship\fsailed\u2028far.\nIt sank.\n".encode())
    assert len(texts_of(answer("embed", "--json", "--file", tmp_path / "a.txt"))) == 2


def test_model_may_be_a_path(answer, tmp_path):
    from hubmodels import bertForMaskedLM, export

    export(bertForMaskedLM("bert-nano"), tmp_path / "model", bertTokenizer("bert-nano"))
    named = answer("fill-mask", "The [MASK].", "--json")
    assert answer("fill-mask", "The [MASK].", "--json", "--model", tmp_path / "model") == named


# Errors: one line on standard error, exit code 2, nothing on standard output


def refused(run, *arguments: object) -> str:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("hubmodels: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "command",
    [("show",), ("embed", "text", "--model"), ("fill-mask", "[MASK]", "--model"), ("generate", "text", "--model")],
)
def test_an_unknown_name_lists_near_names(run, command):
    message = refused(run, *command, "bert-bse-uncased")
    assert "'bert-bse-uncased'" in message
    assert "did you mean bert-base-uncased" in message


@pytest.mark.parametrize("command", ["embed", "fill-mask"])
@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_empty_input_is_refused(run, monkeypatch, command, content):
    standard_input(monkeypatch, content)
    assert "no text: what was given is empty" in refused(run, command)


def test_a_terminal_is_not_read(run, monkeypatch):
    standard_input(monkeypatch, b"never read")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "no text: give it as an argument, with --file, or on standard input" in refused(run, "embed")


def test_a_file_that_is_not_utf8_is_refused(run, tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("école\n".encode("latin-1"))
    assert f"{path}: cannot be read as UTF-8 text" in refused(run, "embed", "--file", path)


def test_a_missing_file_and_a_directory_are_refused(run, tmp_path):
    assert f"{tmp_path / 'gone'}: cannot be read" in refused(run, "embed", "--file", tmp_path / "gone")
    assert f"{tmp_path}: cannot be read" in refused(run, "embed", "--file", tmp_path)


def test_standard_input_that_is_not_utf8_is_refused(run, monkeypatch):
    standard_input(monkeypatch, "école\n".encode("latin-1"))
    assert "UTF-8" in refused(run, "embed")


def test_an_argument_that_is_not_utf8_is_refused(run):
    refused(run, "embed", os.fsdecode("école".encode("latin-1")))


def test_fill_mask_without_a_mask_is_refused(run):
    assert "no [MASK] in 'The ship.'" in refused(run, "fill-mask", "The ship.")


def test_options_out_of_range_are_refused(run):
    assert "top_k = 0" in refused(run, "fill-mask", "[MASK]", "--top-k", 0)
    assert "pooling = 'max'" in refused(run, "embed", "text", "--pooling", "max")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "bert-nano"), "bert-nano: expected a language model, gpt or gpt2, got bert"),
        (("--top-p", 2), "top_p = 2.0: expected a probability, 0 < top_p <= 1"),
        (("--num-beams", 2, "--temperature", 0.7), "num_beams = 2 with temperature = 0.7"),
        (("--num-beams", 2, "--top-k", 5), "top_k: given without temperature"),
        (("--temperature", "nan"), "temperature = nan: expected 0 (greedy) or a number above it"),
        (("--temperature", 0, "--samples", 2), "num_return_sequences = 2: greedy search has one result"),
        (("--max-new-tokens", 0), "max_new_tokens = 0: expected a whole number, at least 1"),
        (("--max-new-tokens", 256), "this model has positions for 256; shorten the prompt or ask for at most 25"),
        (("--stop", ""), "stop: expected strings of at least one character"),
        (("--seed", 10**20), f"seed = {10**20}: expected"),
    ],
    ids=str,
)
def test_generate_refuses_before_it_prints(run, arguments, message):
    assert message in refused(run, "generate", "The ship", *arguments)


@pytest.mark.parametrize("command", ["score", "perplexity"])
def test_language_tasks_refuse_a_model_that_is_none(run, tmp_path, command):
    (tmp_path / "a.txt").write_text("The ship.")
    message = "bert-nano: expected a language model, gpt or gpt2, got bert"
    assert message in refused(run, command, tmp_path / "a.txt", "--model", "bert-nano")


def test_perplexity_refuses_what_it_cannot_read(run, tmp_path):
    path, empty = tmp_path / "a.txt", tmp_path / "empty.txt"
    path.write_text("The ship.")
    empty.write_text("")
    assert f"{tmp_path / 'gone'}: cannot be read" in refused(run, "perplexity", path, tmp_path / "gone")
    assert "stride = 256: expected 1 to 255" in refused(run, "perplexity", path, "--stride", 256)
    message = refused(run, "perplexity", path, empty)
    assert "expected at least one token to score after the first, got none" in message
    assert str(empty) in message  # of many files, which


@pytest.mark.parametrize("arguments", [[], ["sing"], ["fill-mask", "--top-k", "many"], ["show"]])
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: hubmodels" in capsys.readouterr().err


ABOUT_WEIGHTS = ["list", "show", "fetch", "bundle", "unbundle", "verify", "where", "clean", "pin"]
ABOUT_CHECKPOINTS = ["convert", "average", "interpolate", "add-tokens", "diff"]
TASKS = ["fill-mask", "embed", "generate", "score", "perplexity"]
COMMANDS = [*ABOUT_WEIGHTS, *ABOUT_CHECKPOINTS, *TASKS, "pretrain", "bench"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("    ") and not line.startswith("     ")] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_answer_for_machines(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hubmodels {command} ")
    assert "--json" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hubmodels {__version__}\n"


# As a process


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hubmodels", "list"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "bert-nano" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    """As under `| head -1`; here the reader is gone before the first byte."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hubmodels", "list"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
