"""convert, average, interpolate, add-tokens and diff: what they print, for people and machines, and how they end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY
from reference import D, V
from test_conversion import SOURCES, TENSORFLOW, other_copy, published
from test_saving import MLM, SMALL, assert_bit_equal, ids_in_transformers, loaded, ours, snapshot, tensors_in
from test_vocabulary import WORDS, bert_with_words

import hubmodels
from hubmodels import conversion
from hubmodels.errors import CheckpointError

COMMANDS = ("convert", "average", "interpolate", "add-tokens", "diff")
GPT2 = "GPT2LMHeadModel"


@pytest.fixture
def refused(run, tmp_path):
    """arguments -> what is said by a command that has done nothing"""

    def call(*arguments: object) -> str:
        before = snapshot(tmp_path)
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("hubmodels: error: ")
        assert "Traceback" not in err
        assert err.endswith("\n")
        assert snapshot(tmp_path) == before
        return err.removeprefix("hubmodels: error: ").removesuffix("\n")

    return call


@pytest.fixture
def wrong(capsys):
    """arguments -> what argparse says of them"""
    from hubmodels.cli import main

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert (caught.value.code, captured.out) == (2, "")
        return captured.err

    return call


@pytest.fixture
def source(tmp_path) -> Path:
    return hubmodels.export(ours(MLM), tmp_path / "source")


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [hubmodels.export(ours(MLM, seed=seed), tmp_path / str(seed)) for seed in (1, 2)]


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument(command, capsys):
    from hubmodels.cli import main

    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    text = " ".join(captured.out.split())
    options = {"convert": ["SRC", "DST", "--dtype", "--dry-run", "{float32,float16,bfloat16}"]}
    options |= {"average": ["SRC", "--shares", "-o DST"], "interpolate": ["A B", "--at T", "-o DST"]}
    options |= {"add-tokens": ["SRC", "--tokens FILE", "--seed SEED", "-o DST"], "diff": ["A B", "--all", "NAME@TAG"]}
    writing = ["--to {hf,native}", "--max-file-size SIZE", "(50GB)"] if command != "diff" else []
    for expected in ["--json", *options[command], *writing]:
        assert expected in text


def test_the_commands_are_in_the_list(capsys):
    from hubmodels.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "convert Write a checkpoint of any kind as Hugging Face's or our own files.",
        "average Write the mean of several checkpoints of one model.",
        "interpolate Write the point between two checkpoints of one model.",
        "add-tokens Write a checkpoint with more words in its vocabulary.",
        "diff What is different between two checkpoints of one family, tensor by tensor.",
    ):
        assert said in out


# convert


def test_convert_writes_and_says_what_became_of_it(source, answer, tmp_path):
    out = answer("convert", source, tmp_path / "out")
    report = loaded(MLM, source).provenance.report
    assert out == f"{tmp_path / 'out'}: {report.summary}\n"
    assert snapshot(tmp_path / "out") == snapshot(source)


def test_convert_as_json(source, answer, tmp_path):
    found = json.loads(answer("convert", source, tmp_path / "out", "--json"))
    tensors = tensors_in(source)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert found.keys() == {"tensors", "file", "model"}
    assert found["file"] == {"accounted": [len(tensors), numbers], "there": [len(tensors), numbers]}
    model = loaded(MLM, source)
    parameters = [len(list(model.parameters())), sum(p.numel() for p in model.parameters())]
    assert found["model"] == {"accounted": parameters, "there": parameters}
    word = {"ours": "transformer.embeddings.word.weight", "theirs": "bert.embeddings.word_embeddings.weight"}
    word |= {"operation": "loaded", "shape": [V, D], "dtype": "float32", "because": ""}
    assert word in found["tensors"]
    assert {entry["theirs"] for entry in found["tensors"]} == set(tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == SMALL


@pytest.mark.parametrize("kind", ["openai", "native", "tensorflow one", "bin", "several files", "zip"])
def test_a_dry_run_is_the_account_and_nothing_else(kind, answer, tmp_path, capsys):
    path = SOURCES[kind][0](tmp_path / "source")
    before = snapshot(tmp_path)
    capsys.readouterr()
    out = answer("convert", path, tmp_path / "out", "--dry-run")
    assert out == answer("convert", path, "--dry-run")
    with conversion.opened(path) as found:
        assert out.replace(str(path), "") == f"{found.report}\n".replace(str(path), "")
    assert out.splitlines()[0].split() == ["OURS", "THEIRS", "OPERATION", "SHAPE", "DTYPE", "WHY"]
    assert [line.endswith(": 100 %") for line in out.splitlines()[-2:]] == [True, True]
    assert json.loads(answer("convert", path, "--dry-run", "--json"))["tensors"]
    assert snapshot(tmp_path) == before


def test_convert_to_native_in_half_precision(source, answer, tmp_path):
    answer("convert", source, tmp_path / "out", "--to", "native", "--dtype", "bfloat16")
    want = {key: tensor.bfloat16() for key, tensor in loaded(MLM, source).state_dict().items()}
    assert_bit_equal(tensors_in(tmp_path / "out"), want)


@pytest.mark.parametrize("size", ["20KB", "20 kb", "20000"])
def test_convert_into_several_files(size, source, answer, tmp_path):
    answer("convert", source, tmp_path / "out", "--max-file-size", size)
    hubmodels.convert(source, tmp_path / "same", max_file_size=20_000)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_convert_of_tensorflow_and_of_names(answer, tmp_path):
    for source in (TENSORFLOW / "one", TENSORFLOW / "one" / "bert_model.ckpt.index", "bert-nano"):
        answer("convert", source, tmp_path / "out")
        assert answer("diff", source, tmp_path / "out").endswith(" parameters are equal\n")


def test_convert_onto_itself(answer, tmp_path, capsys):
    path = SOURCES["bin"][0](tmp_path / "source")
    capsys.readouterr()
    answer("convert", path, path)
    assert (path / "model.safetensors").is_file()
    assert (path / "pytorch_model.bin").is_file()
    answer("diff", path / "pytorch_model.bin", path / "model.safetensors")


def test_convert_needs_a_place_to_write(source, refused):
    said = "convert: name the directory to write, DST, or give --dry-run"
    assert refused("convert", source) == said
    assert refused("convert", source, "--json") == said


def test_what_cannot_be_opened(refused, tmp_path):
    assert "did you mean bert-nano" in refused("convert", "bert-nan", tmp_path / "out")
    assert "did you mean gpt-nano" in refused("convert", "gpt-nanno", "--dry-run")
    text = refused("convert", tmp_path / "nowhere", tmp_path / "out")
    assert f"no weights are called '{tmp_path / 'nowhere'}', and there is no such file or directory" in text
    for command in (
        ("average", "bert-nano", "bert-nan", "-o", tmp_path / "out"),
        ("interpolate", "bert-nan", "bert-nano", "-o", tmp_path / "out"),
        ("diff", "bert-nano", "bert-nan"),
    ):
        assert "no weights are called 'bert-nan', and there is no such file or directory" in refused(*command)


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert str(tmp_path / "notes.txt") in refused("convert", tmp_path / "notes.txt", tmp_path / "out")
    assert str(tmp_path / "notes.txt") in refused("diff", tmp_path / "notes.txt", "bert-nano")


def test_a_checkpoint_that_is_not_whole(source, refused, tmp_path):
    from safetensors.torch import save_file

    state = tensors_in(source)
    del state["cls.predictions.bias"]
    save_file(state, source / "model.safetensors")
    for arguments in ((tmp_path / "out",), ("--dry-run",)):
        text = refused("convert", source, *arguments)
        assert f"head.bias [{V}] is in the model, but nothing in the file fills it" in text


def test_sizes_forms_and_dtypes_that_are_none(source, refused, wrong, tmp_path):
    said = "max_file_size = 'big': expected a number of bytes, or such as 5GB"
    assert refused("convert", source, tmp_path / "out", "--max-file-size", "big") == said
    assert refused("convert", source, tmp_path / "out", "--max-file-size", "0B") == said.replace("big", "0B")
    assert "invalid choice: 'pt'" in wrong("convert", source, tmp_path / "out", "--to", "pt")
    assert "invalid choice: 'int8'" in wrong("convert", source, tmp_path / "out", "--dtype", "int8")
    assert "the following arguments are required: SRC" in wrong("convert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "file/further/below", f"{'x' * 300}", f"new/{'x' * 300}"])
def test_a_place_that_cannot_be_written(place, two, refused, tmp_path):
    """Said as an error is, with the place, and nothing is left."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "words.txt").write_text("zyzzyva\n")
    target = tmp_path / place
    for command in (
        ("convert", two[0], target),
        ("average", *two, "-o", target),
        ("interpolate", *two, "-o", target),
        ("add-tokens", "bert-nano", "--tokens", tmp_path / "words.txt", "-o", target),
    ):
        assert str(target)[:100] in refused(*command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_the_right_to_write(source, refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert str(tmp_path / "closed") in refused("convert", source, tmp_path / "closed")
    assert str(tmp_path / "closed") in refused("convert", source, tmp_path / "closed" / "out")


def test_a_full_disk(source, refused, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert "No space left on device" in refused("convert", source, tmp_path / "out")


def test_an_account_that_leaves_something_out_is_1(source, run, monkeypatch, tmp_path):
    """No checkpoint should make one; if one does, it is not called done."""
    from hubmodels.checkpoint.report import Report, Total

    report = Report((), Total(2, 9), Total(1, 4))
    monkeypatch.setattr(conversion, "convert", lambda *_, **__: report)
    code, _, err = run("convert", source, tmp_path / "out")
    assert (code, err) == (1, "")
    lines = str(report).splitlines()
    assert lines[-2:] == [
        "of the file: 0 of 2 names, 0 of 9 numbers: NOT ALL, 0.0000%",
        "of the model: 0 of 1 names, 0 of 4 numbers: NOT ALL, 0.0000%",
    ]


def test_as_a_program_of_its_own(source, tmp_path):
    """A file where the directory should be: the exit code and standard error of a process."""
    done = subprocess.run(
        [sys.executable, "-m", "hubmodels", "convert", str(source), str(source / "config.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hubmodels: error: ")
    assert "Traceback" not in done.stderr


# average and interpolate


def test_average(two, answer, tmp_path):
    assert answer("average", *two, "-o", tmp_path / "out") == f"{tmp_path / 'out'}\n"
    hubmodels.average(two, tmp_path / "same")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")


def test_average_with_shares_as_json(two, answer, tmp_path):
    out = answer("average", *two, two[0], "--shares", "0.5", "0.75", "-0.25", "-o", tmp_path / "out", "--json")
    assert json.loads(out) == {"directory": str(tmp_path / "out")}
    hubmodels.average([*two, two[0]], tmp_path / "same", shares=[0.5, 0.75, -0.25])
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")


@pytest.mark.parametrize(("at", "arguments"), [(0.5, []), (0.0, ["--at", "0"]), (1.5, ["--at", "1.5"])])
def test_interpolate(at, arguments, two, answer, tmp_path):
    assert answer("interpolate", *two, *arguments, "--output", tmp_path / "out") == f"{tmp_path / 'out'}\n"
    hubmodels.interpolate(*two, at, tmp_path / "same")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")


def test_interpolate_backwards(two, answer, tmp_path):
    """A number below 0 is no option."""
    answer("interpolate", *two, "--at", "-0.5", "-o", tmp_path / "out", "--to", "native", "--json")
    hubmodels.interpolate(*two, -0.5, tmp_path / "same", form="native")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")


def test_what_has_no_average(two, refused, wrong, tmp_path):
    out = tmp_path / "out"
    said = "shares = [0.5]: expected one for each of 2 checkpoints, together 1"
    assert refused("average", *two, "--shares", "0.5", "-o", out) == said
    assert "together 1" in refused("average", *two, "--shares", "0.5", "0.6", "-o", out)
    assert "together 1" in refused("interpolate", *two, "--at", "nan", "-o", out)
    assert "expected one family" in refused("average", two[0], "gpt-nano", "-o", out)
    assert "are not of one model" in refused("interpolate", two[0], "bert-nano", "-o", out)
    assert "the following arguments are required: -o/--output" in wrong("average", *two)
    assert "the following arguments are required: -o/--output" in wrong("interpolate", *two)
    assert "the following arguments are required: SRC" in wrong("average", "-o", out)
    assert "invalid float value: 'half'" in wrong("interpolate", *two, "--at", "half", "-o", out)


# add-tokens


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("Stu\n\n  ship \r\nust\nstu\n", encoding="utf-8")
    return path


def test_add_tokens(words, answer, tmp_path):
    source = bert_with_words(tmp_path / "source")
    out = answer("add-tokens", source, "--tokens", words, "-o", tmp_path / "out")
    assert out == f"{tmp_path / 'out'}: 2 of 4 words added\n"
    tokenizer = hubmodels.bertTokenizer(tmp_path / "out")
    assert tokenizer.tokenize("stu ust ship") == ["stu", "ust", "ship"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "STU ust a ship!"
    assert ids_in_transformers(theirs, text) == tokenizer(text)["input_ids"][0].tolist()
    model = loaded(MLM, tmp_path / "out")
    assert model.config.vocab_size == len(WORDS) + 2


def test_add_tokens_as_json_with_a_seed(words, answer, tmp_path):
    source = bert_with_words(tmp_path / "source")
    for name in ("one", "two"):
        out = answer("add-tokens", source, "--tokens", words, "--seed", 3, "-o", tmp_path / name, "--json")
        assert json.loads(out) == {"directory": str(tmp_path / name), "added": ["stu", "ust"]}
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    answer("add-tokens", source, "--tokens", words, "-o", tmp_path / "plain")
    assert snapshot(tmp_path / "one") != snapshot(tmp_path / "plain")


def test_add_tokens_to_weights_of_a_name(answer, tmp_path):
    (tmp_path / "words.txt").write_text("zyzzyva\nship\n", encoding="utf-8")
    out = answer("add-tokens", "bert-nano", "--tokens", tmp_path / "words.txt", "-o", tmp_path / "out")
    assert out == f"{tmp_path / 'out'}: 1 of 2 words added\n"
    assert hubmodels.bertTokenizer(tmp_path / "out").tokenize("zyzzyva") == ["zyzzyva"]
    nano = hubmodels.bertModel("bert-nano")
    assert hubmodels.bertModel(tmp_path / "out").config.vocab_size == nano.config.vocab_size + 1


def test_a_list_of_words_from_windows(answer, tmp_path):
    """It begins with a byte order mark, as Notepad writes it."""
    (tmp_path / "words.txt").write_bytes("\ufeffzyzzyva\r\nship\r\n".encode())
    answer("add-tokens", "bert-nano", "--tokens", tmp_path / "words.txt", "-o", tmp_path / "out")
    assert hubmodels.bertTokenizer(tmp_path / "out").tokenize("zyzzyva") == ["zyzzyva"]


def test_words_that_cannot_be_added(words, refused, wrong, source, tmp_path):
    out = tmp_path / "out"
    text = refused("add-tokens", "bert-nano", "--tokens", tmp_path / "none.txt", "-o", out)
    assert text.startswith(f"{tmp_path / 'none.txt'}: expected UTF-8 text, a word a line: ")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    text = refused("add-tokens", "bert-nano", "--tokens", tmp_path / "latin.txt", "-o", out)
    assert text.startswith(f"{tmp_path / 'latin.txt'}: expected UTF-8 text, a word a line: ")
    assert f"{tmp_path}: expected UTF-8 text" in refused("add-tokens", "bert-nano", "--tokens", tmp_path, "-o", out)
    assert "got none" in refused("add-tokens", source, "--tokens", words, "-o", out)
    (tmp_path / "two.txt").write_text("new york\n")
    said = "words: 'new york': expected one word, but to this tokenizer it is ['new', 'york']"
    assert refused("add-tokens", "bert-nano", "--tokens", tmp_path / "two.txt", "-o", out) == said
    assert "the following arguments are required: --tokens, -o/--output" in wrong("add-tokens", "bert-nano")
    assert "invalid int value" in wrong("add-tokens", "bert-nano", "--tokens", words, "-o", out, "--seed", "x")


# diff


def changed(directory: Path, name: str = MLM) -> list[Path]:
    """A checkpoint, and one whose output bias, of ones, has a 3 and a half"""
    model = ours(name)
    bias = model.head.bias if name == MLM else model.transformer.norm.bias
    with torch.no_grad():
        bias.fill_(1.0)
        one = hubmodels.export(model, directory / "one")
        bias[4] = 3.5
    return [one, hubmodels.export(model, directory / "other", form="native")]


def test_equal_checkpoints_are_0(source, run, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    count = len(list(ours(MLM).parameters()))
    assert run("diff", source, tmp_path / "copy") == (0, f"{count} of {count} parameters are equal\n", "")


def test_different_checkpoints_are_1_and_a_table(run, tmp_path):
    code, out, err = run("diff", *changed(tmp_path))
    assert (code, err) == (1, "")
    count = len(list(ours(MLM).parameters()))
    assert out.splitlines() == [
        "PARAMETER  LARGEST  RELATIVE  SHAPES",
        f"head.bias      2.5     {2.5 / V**0.5:.3g}",
        f"{count - 1} of {count} parameters are equal",
    ]


def test_all_parameters_in_the_table(run, source, tmp_path):
    code, out, _ = run("diff", source, source, "--all")
    names = [name.removeprefix("transformer.") for name, _ in ours(MLM).named_parameters()]
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()[1:-1]} == set(names)
    assert {tuple(line.split()[1:]) for line in out.splitlines()[1:-1]} == {("0", "0")}
    code, out, _ = run("diff", *changed(tmp_path), "--all")
    assert code == 1
    assert len(out.splitlines()) == len(names) + 2


def test_shapes_and_configs_in_the_table(run, source, tmp_path):
    hubmodels.export(hubmodels.resize_vocabulary(loaded(MLM, source), V + 3), tmp_path / "out")
    code, out, err = run("diff", source, tmp_path / "out")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == f"vocab_size: {V} -> {V + 3}"
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[2:-1]]
    assert sorted(rows) == [
        ["embeddings.word.weight", "inf", "inf", f"({V}, {D}) -> ({V + 3}, {D})"],
        ["head.bias", "inf", "inf", f"({V},) -> ({V + 3},)"],
    ]


def test_parameters_of_one_alone_in_the_table(run, source, tmp_path):
    hubmodels.export(loaded(MLM, source).transformer, tmp_path / "base")
    code, out, _ = run("diff", tmp_path / "base", source)
    assert code == 1
    assert f"None -> ({V},)" in out


def test_a_config_alone_is_a_difference(run, tmp_path):
    one = hubmodels.export(ours(MLM), tmp_path / "one")
    other = hubmodels.export(ours(MLM, hidden_act="relu"), tmp_path / "other")
    code, out, _ = run("diff", one, other)
    count = len(list(ours(MLM).parameters()))
    assert code == 1
    assert out.splitlines() == ["hidden_act: 'gelu' -> 'relu'", f"{count} of {count} parameters are equal"]


def strictly(text: str) -> dict:
    """As every reader of JSON reads it: without NaN and Infinity"""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_diff_as_json(run, source, tmp_path):
    code, out, err = run("diff", *changed(tmp_path), "--json")
    assert (code, err) == (1, "")
    (row,) = strictly(out)["tensors"]
    assert strictly(out) == {"equal": False, "config": {}, "tensors": [row]}
    assert row == {
        "name": "head.bias",
        "shapes": [[V], [V]],
        "largest": 2.5,
        "relative": pytest.approx(2.5 / V**0.5, rel=1e-12),
    }
    code, out, _ = run("diff", source, source, "--json")
    assert (code, strictly(out)) == (0, {"equal": True, "config": {}, "tensors": []})
    code, out, _ = run("diff", source, source, "--json", "--all")
    assert (code, len(strictly(out)["tensors"])) == (0, len(list(ours(MLM).parameters())))


def test_differences_without_measure_are_json_too(run, source, tmp_path):
    """Another shape, or a parameter of one alone: no number says how far they are apart."""
    hubmodels.export(hubmodels.resize_vocabulary(loaded(MLM, source), V + 3), tmp_path / "out")
    code, out, _ = run("diff", source, tmp_path / "out", "--json")
    found = strictly(out)
    assert code == 1
    assert found["config"] == {"vocab_size": [V, V + 3]}
    assert {row["name"]: row["shapes"] for row in found["tensors"]} == {
        "embeddings.word.weight": [[V, D], [V + 3, D]],
        "head.bias": [[V], [V + 3]],
    }


def test_a_nan_is_json_too(run, tmp_path):
    one, other = changed(tmp_path)
    model = loaded(MLM, other)
    with torch.no_grad():
        model.head.bias[4] = float("nan")
    hubmodels.export(model, other)
    code, out, _ = run("diff", one, other, "--json")
    assert code == 1
    assert [row["name"] for row in strictly(out)["tensors"]] == ["head.bias"]


def test_what_cannot_be_compared_is_2(source, refused, wrong):
    assert "expected one family" in refused("diff", source, "gpt-nano")
    assert "the following arguments are required: B" in wrong("diff", source)


def test_diff_with_another_version(run, refused, tmp_path, monkeypatch):
    hub_dir = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(hub_dir))
    other_copy(hub_dir / "someone_hubmodels_v9")
    code, out, err = run("diff", "bert-nano", "bert-nano@v9")
    assert (code, err) == (1, "")
    assert [line.split()[:2] for line in out.splitlines()[1:-1]] == [["head.bias", "0.5"]]
    assert run("diff", "bert-nano@v9", f"bert-nano@{hub_dir / 'someone_hubmodels_v9'}")[0] == 0
    text = refused("diff", "bert-nano", "bert-nano@v7")
    assert text.startswith(f"v7: expected one copy of this repository, got none in {hub_dir}; torch.hub.load(")


def test_gpt2_goes_the_same_way(run, tmp_path):
    one, other = changed(tmp_path, GPT2)
    code, out, _ = run("diff", one, other)
    assert (code, [line.split()[:2] for line in out.splitlines()[1:-1]]) == (1, [["norm.bias", "2.5"]])
    assert run("average", one, other, "-o", tmp_path / "mean")[0] == 0
    assert loaded(GPT2, tmp_path / "mean").transformer.norm.bias[:5].tolist() == [1, 1, 1, 1, 2.25]


def test_errors_are_those_of_the_package(tmp_path):
    """What the command says in a line is raised by the function."""
    path = published(MLM, tmp_path / "source")
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        hubmodels.convert(path, tmp_path / "out")
