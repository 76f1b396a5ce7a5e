"""One model as every era of PyTorch left it: wrapped, beside its training, cut into files, in half precision; the
numbers are the same. And what is no model, or would have to be run, is refused.
"""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import json
import os
import pathlib
import re
import uuid
import warnings
from pathlib import Path

import fuzz
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from fuzz import DEEP, LEAVES, text
from test_readers import Evil, pickled, refusal, saved
from torch import nn

import hubmodels
from hubmodels.checkpoint.dialects import translate
from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
BESIDE = "of the training, not of the model"


@pytest.fixture
def model():
    config = {"vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    directory = Path(__file__).resolve().parent / "fixtures" / "tensorflow" / "one"
    return config, hubmodels.bertForPreTraining(directory)


@pytest.fixture
def state(model, tmp_path):
    hubmodels.export(model[1], tmp_path / "plain")
    return safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")


@pytest.fixture
def directory(state, tmp_path):
    """With the config alone."""
    (tmp_path / "plain" / "model.safetensors").unlink()
    return tmp_path / "plain"


def assert_same(directory: Path, model) -> None:
    want = dict(model[1].named_parameters())
    found = hubmodels.bertForPreTraining(directory)
    assert all(torch.equal(parameter, want[name]) for name, parameter in found.named_parameters())


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_wrapper_around_the_model_is_taken_off(wrapper, state, directory, model):
    torch.save({wrapper + key: tensor for key, tensor in state.items()}, directory / "pytorch_model.bin")
    assert_same(directory, model)


def test_a_name_that_only_begins_like_a_wrapper_stays(state, directory):
    torch.save({**state, "module.x": torch.ones(1)}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"module\.x"):
        hubmodels.bertForPreTraining(directory)


def shard(state, directory: Path, kind: str, count: int = 3) -> Path:
    """As transformers saves a model that is larger than a file may be."""
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number in range(count):
        part = {key: tensor for place, (key, tensor) in enumerate(sorted(state.items())) if place % count == number}
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.{end}"
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(part, directory / name)
        places |= dict.fromkeys(part, name)
    index = directory / f"{stem}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(kind, state, directory, model):
    index = shard(state, directory, kind)
    assert_same(directory, model)
    assert_same(index, model)
    assert len(hubmodels.bertModel(directory).provenance.files) == 4


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.bin", "model.safetensors.index.json", 7, None]
)
def test_an_index_names_only_files_beside_it(name, state, directory):
    index = shard(state, directory, "safetensors")
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        read_checkpoint(index)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_told(text, directory):
    index = directory / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        read_checkpoint(index)


def test_a_missing_file_a_missing_tensor_and_a_stray_one_are_named(state, directory):
    index = shard(state, directory, "safetensors")
    content = json.loads(index.read_text())
    key, name = next(iter(content["weight_map"].items()))
    (directory / name).rename(directory / "away")
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        read_checkpoint(index)
    (directory / "away").rename(directory / name)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": name}}))
    with pytest.raises(CheckpointError, match=f"{name}: has no more, which model.safetensors.index.json says is in it"):
        read_checkpoint(index)
    del content["weight_map"][key]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"does not name {key} in {name}"):
        read_checkpoint(index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_float32_and_to_the_same_half(dtype, state, directory, model):
    torch.save({key: tensor.to(dtype) for key, tensor in state.items()}, directory / "pytorch_model.bin")
    want = {name: parameter.to(dtype) for name, parameter in model[1].named_parameters()}
    for asked, found in ((torch.float32, None), (dtype, None)):
        found = hubmodels.bertForPreTraining(directory, dtype=asked)
        assert all(torch.equal(p, want[name].to(asked)) for name, p in found.named_parameters())


@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parts_of_three_dtypes_are_fused_into_one(asked, state, directory):
    dtypes = {"query": torch.float16, "key": torch.bfloat16, "value": torch.float64}
    mixed = {key: tensor.to(dtypes.get(key.split(".")[-2], tensor.dtype)) for key, tensor in state.items()}
    torch.save({"state_dict": mixed}, directory / "x.ckpt")
    found = hubmodels.bertModel(directory / "x.ckpt", dtype=asked)
    name = "bert.encoder.layer.1.attention.self"
    for end in ("weight", "bias"):
        want = torch.cat([mixed[f"{name}.{part}.{end}"].to(asked) for part in dtypes])
        assert torch.equal(getattr(found.layers[1].attention.qkv, end), want)
    loaded = {entry.theirs: entry.dtype for entry in found.provenance.report.entries}
    assert [loaded[f"state_dict.{name}.{part}.weight"] for part in dtypes] == ["float16", "bfloat16", "float64"]


# --- Wrappers, as their own makers write them


@pytest.fixture
def theirs(state, directory):
    """The same model as transformers has it."""
    found = transformers.BertForPreTraining(transformers.BertConfig.from_pretrained(directory))
    missing = found.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not any("LayerNorm" in key or "self" in key for key in missing.missing_keys)
    return found


def compiled_inside(found: nn.Module) -> nn.Module:
    found.bert.encoder = torch.compile(found.bert.encoder)
    found.bert.pooler.dense = torch.compile(found.bert.pooler.dense)
    return found


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "DataParallel of torch.compile": lambda found: nn.DataParallel(torch.compile(found)),
    "torch.compile of DataParallel": lambda found: torch.compile(nn.DataParallel(found)),
    "torch.compile of parts": compiled_inside,
    "DataParallel of compiled parts": lambda found: nn.DataParallel(compiled_inside(found)),
}


def assert_accounts(path: Path, model, dialect: str = "huggingface") -> None:
    """All numbers, and an account under the file's own names in which nothing is missing."""
    found, names = hubmodels.bertForPreTraining(path), read_checkpoint(path)
    want = dict(model[1].named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in found.named_parameters())
    provenance = found.provenance
    assert provenance.dialect == dialect
    assert [file.path for file in provenance.files] == [path]
    assert provenance.report.is_complete
    assert "100 %" in str(provenance.report)
    assert "NOT ALL" not in str(provenance.report)
    assert {entry.theirs for entry in provenance.report.entries} == set(names)
    for entry in provenance.report.entries:
        assert entry.shape == tuple(names[entry.theirs].shape)
    beside = [entry.theirs for entry in provenance.report.entries if entry.because == BESIDE]
    assert all("embeddings" not in name and "encoder" not in name for name in beside)


@BOTH
@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_a_wrapper_really_saves(wrap, zipped, theirs, directory, model):
    state = WRAPPED[wrap](theirs).state_dict()
    assert any(key.startswith(("module.", "_orig_mod.")) or "._orig_mod." in key for key in state)
    path = directory / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_accounts(path, model)


@pytest.mark.parametrize("names", [("model", "optimizer"), ("model_state_dict", "optimizer_state_dict")])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_the_checkpoint_of_a_training_loop(wrap, names, theirs, directory, model):
    """With what an optimizer really has after a step, here one of no length."""
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0)
    for parameter in theirs.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = WRAPPED[wrap](theirs).state_dict()
    content = {names[0]: state, names[1]: optimizer.state_dict(), "epoch": 3, "loss": 0.4, "args": argparse.Namespace()}
    torch.save(content, directory / "x.pt")
    assert_accounts(directory / "x.pt", model)
    entries = hubmodels.bertForPreTraining(directory / "x.pt").provenance.report.entries
    beside = {entry.theirs: entry for entry in entries if entry.theirs.startswith(names[1])}
    assert len(beside) == 3 * len(list(theirs.parameters()))
    assert {(e.ours, e.operation, e.because) for e in beside.values()} == {(None, "dropped", BESIDE)}
    assert beside[f"{names[1]}.state.0.exp_avg"].shape == (37, 12)


@pytest.mark.parametrize(
    "prefix",
    ["state_dict.module.", "model_state_dict._orig_mod.", "model.module._orig_mod.", "module.model.", "model.model."],
)
def test_wrappers_in_any_order(prefix, state, directory, model):
    torch.save({prefix + key: tensor for key, tensor in state.items()}, directory / "x.pt")
    assert_accounts(directory / "x.pt", model)


def test_only_a_whole_word_is_a_wrapper(state, directory):
    """x_orig_mod. is somebody's own name, as is models."""
    for name in ("bert.pooler.x_orig_mod.dense.bias", "models.bert.pooler.dense.bias", "bert._orig_mod"):
        torch.save({**state, name: torch.ones(12)}, directory / "x.pt")
        with pytest.raises(CheckpointError, match=re.escape(f"{name} [12] is in the file, but no row knows it")):
            hubmodels.bertForPreTraining(directory / "x.pt")


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ("bert._orig_mod.pooler.dense.bias", "bert.pooler.dense.bias"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.embeddings._orig_mod.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_two_names_that_become_one_are_both_told(more, kept, wrapper, state, directory):
    both = {**state, more: state[kept]}
    torch.save({"state_dict": {wrapper + key: tensor for key, tensor in both.items()}}, directory / "x.ckpt")
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertForPreTraining(directory / "x.ckpt")
    names = {f"state_dict.{wrapper}{key}" for key in (more, kept)}
    found = re.fullmatch(rf".*/x\.ckpt: (\S+) and (\S+) both mean {re.escape(kept)}", str(caught.value))
    assert set(found.groups()) == names


def test_a_second_model_is_not_chosen_from_but_told(state, directory):
    """Which of the two is wanted nobody can know."""
    average = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"model": state, "model_ema": average, "epoch": 3}, directory / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertForPreTraining(directory / "x.pt")
    assert "model_ema.bert.pooler.dense.bias [12] is in the file, but no row knows it" in str(caught.value)


def test_one_model_under_two_names_is_one(state, directory, model):
    torch.save({"model": state, "best": state}, directory / "x.pt")
    assert_accounts(directory / "x.pt", model)


# --- Lightning


class Mode(enum.Enum):
    TRAIN = "train"


class AttributeDict(dict):
    """As Lightning has one for hyperparameters."""

    def __getattr__(self, name):
        return self[name]


class OwnOrder(collections.OrderedDict):
    pass


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    weights: torch.Tensor | None = None


Pair = collections.namedtuple("Pair", "one two")


class HyperParameters:
    """With a state of its own, as the most of classes."""

    __slots__ = ("__dict__", "rate")

    def __init__(self):
        self.rate, self.names = 0.1, ["a"]


def objects() -> dict[str, object]:
    """What people leave in their checkpoints, in Python's own pickles and torch's."""
    return {
        "hyperparameters": HyperParameters(),
        "attributes": AttributeDict(rate=0.1, inner=AttributeDict(a=[1])),
        "namespace": argparse.Namespace(rate=0.1, path=pathlib.Path("/tmp")),
        "path": pathlib.PurePosixPath("a/b"),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "dtype with a reader": torch.uint16,
        "size": torch.Size([1, 2]),
        "layout": torch.strided,
        "partial": functools.partial(max, 1, key=abs),
        "scalar": np.float64(0.5),
        "array": np.arange(12).reshape(3, 4),
        "random": np.random.default_rng(0),
        "states": {"numpy": np.random.get_state(), "python": __import__("random").getstate()},
        "enum": Mode.TRAIN,
        "time": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        "span": datetime.timedelta(3),
        "decimal": decimal.Decimal("1.5"),
        "id": uuid.UUID(int=7),
        "settings": Settings(),
        "settings with a tensor": Settings(weights=torch.ones(7)),
        "pair": Pair(1, torch.ones(2)),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\x00\xff",
        "array of bytes": bytearray(b"ab"),
        "complex": 1j,
        "range": range(3),
        "nothing": None,
        "truth": True,
        "long": 2**500,
        "infinite": float("inf"),
        "letters": "\x00\n\u2028 \U0001f600",
        "tuple": (1, (2, (3, ()))),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], 5),
        "order": collections.OrderedDict(a=1),
        "own order": OwnOrder(a=1),
        "function": shard,
        "builtin": len,
        "method": "a".join,
        "class": HyperParameters,
        "type": torch.optim.AdamW,
        "module": nn.Sequential(nn.Linear(2, 2), nn.GELU()),
        "odd keys": {None: 1, 2.5: 2, (1, ("a",)): 3, b"b": 4, Mode.TRAIN: 5, True: 6, -3: 7, "": 8, frozenset(): 9},
        "error": ValueError("no"),
        "exit": SystemExit(3),
        "pattern": re.compile("a+"),
    }


@pytest.mark.parametrize("kind", objects())
def test_an_object_of_any_sort_beside_the_model_is_left_out(kind, state, tmp_path):
    one = objects()[kind]
    content = {"state_dict": state, "hyper_parameters": {"it": one, "rate": 0.1, "in a list": [one, [one]]}, kind: one}
    for zipped in (True, False):
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        found = read_checkpoint(tmp_path / "x.ckpt")
        assert {name.removeprefix("state_dict."): lazy.shape for name, lazy in found.items()} == {
            key: tensor.shape for key, tensor in state.items()
        }
        assert all(torch.equal(found[f"state_dict.{key}"].read(), tensor) for key, tensor in state.items())


def lightning(state: dict[str, torch.Tensor], hyper_parameters: object) -> dict[str, object]:
    """What Lightning 2 writes, with the callbacks of most runs."""
    progress = {"total": {"ready": 10, "completed": 10}, "current": {"ready": 2, "completed": 2}}
    checkpoint = "ModelCheckpoint{'monitor': 'loss', 'mode': 'min', 'every_n_train_steps': 0}"
    score = torch.tensor(0.25)
    optimizer = {
        "state": {0: {"step": torch.tensor(10.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "initial_lr": 1e-4, "params": [0]}],
    }
    return {
        "epoch": 2,
        "global_step": 10,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": collections.OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": progress, "seen": torch.tensor([3])}},
        "callbacks": {
            checkpoint: {"best_model_score": score, "best_k_models": {"/x/a.b.ckpt": score}, "dirpath": "/x"},
            "EarlyStopping{'monitor': 'loss'}": {"wait_count": 0, "best_score": score},
        },
        "optimizer_states": [optimizer, {}],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None], "_last_lr": [1e-5], "last": torch.tensor(1.0)}],
        "native_amp_scaling_state": {"scale": torch.tensor(65536.0), "_growth_tracker": 3},
        "hparams_name": "config",
        "hyper_parameters": hyper_parameters,
        "datamodule_hyper_parameters": AttributeDict(path=pathlib.Path("/data")),
    }


@BOTH
@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod.", "_orig_mod.model.", "model.module.", "module."])
def test_a_checkpoint_of_lightning(prefix, zipped, state, directory, model):
    hyper_parameters = AttributeDict(objects(), custom=HyperParameters())
    content = lightning({prefix + key: tensor for key, tensor in state.items()}, hyper_parameters)
    torch.save(content, directory / "epoch=2-step=10.ckpt", _use_new_zipfile_serialization=zipped)
    assert_accounts(directory / "epoch=2-step=10.ckpt", model)
    entries = hubmodels.bertForPreTraining(directory / "epoch=2-step=10.ckpt").provenance.report.entries
    assert {entry.theirs for entry in entries if entry.because != BESIDE} == {
        f"state_dict.{prefix}{key}" for key in state
    }
    assert {entry.theirs.split(".")[0] for entry in entries if entry.because == BESIDE} == {
        *("loops", "callbacks", "optimizer_states", "lr_schedulers", "native_amp_scaling_state")
    }


@pytest.mark.parametrize("attribute", ["bert.", "model.", ""])
def test_a_lightning_module_of_the_bare_encoder(attribute, state, directory, model):
    """self.bert = BertModel(…), or self.model, or the model itself."""
    bare = {key.removeprefix("bert."): tensor for key, tensor in state.items() if key.startswith("bert.")}
    torch.save(lightning({attribute + key: tensor for key, tensor in bare.items()}, {}), directory / "x.ckpt")
    found = hubmodels.bertModel(directory / "x.ckpt")
    want = dict(model[1].transformer.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in found.named_parameters())
    assert found.provenance.report.is_complete
    assert f"state_dict.{attribute}pooler.dense.bias" in str(found.provenance.report)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inside_a_training_checkpoint(dtype, zipped, state, directory, model):
    halves = {f"model.{key}": tensor.to(dtype) for key, tensor in state.items()}
    torch.save(lightning(halves, {}), directory / "x.ckpt", _use_new_zipfile_serialization=zipped)
    want = {name: parameter.to(dtype) for name, parameter in model[1].named_parameters()}
    for asked in (torch.float32, dtype):
        found = hubmodels.bertForPreTraining(directory / "x.ckpt", dtype=asked)
        assert all(torch.equal(p, want[name].to(asked)) for name, p in found.named_parameters())
        assert found.provenance.report.is_complete


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rng_state", torch.get_rng_state()),
        ("rng_state", {"torch": torch.get_rng_state(), "numpy": np.arange(3)}),
        ("cuda_rng_state", [torch.get_rng_state()]),
        ("loss", torch.tensor(0.4)),
        ("hyper_parameters", {"class_weights": torch.ones(2), "rate": 0.1}),
        ("hyper_parameters", {"class_weights": torch.ones(2), "loss": nn.CrossEntropyLoss()}),
        ("optimizer_states", [{"state": {0: {"step": np.int64(3), "exp_avg": torch.ones(2)}}}]),
        ("optimizer_states", [{"state": {("a", 0): {"exp_avg": torch.ones(2)}, "b": {"exp_avg": torch.ones(2)}}}]),
    ],
    ids=["state", "states", "list", "loss", "hparams", "hparams with an object", "numpy's step", "odd keys"],
)
def test_more_that_trainings_leave_beside_the_model(name, value, state, directory, model):
    torch.save({"state_dict": state, name: value, "epoch": 3}, directory / "x.ckpt")
    assert_accounts(directory / "x.ckpt", model)


# --- pytorch-pretrained-bert, before transformers


@BOTH
@pytest.mark.parametrize("name", ["bert_config.json", "config.json"])
def test_a_directory_of_pytorch_pretrained_bert(name, zipped, state, directory, model):
    """LayerNorm's gamma and beta, as TensorFlow calls them."""
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {re.sub(r"(?<=LayerNorm\.)(\w+)", lambda m: old[m[1]], key): t for key, t in state.items()}
    assert sum(key.endswith((".gamma", ".beta")) for key in renamed) == 12
    (directory / "config.json").rename(directory / name)
    torch.save(renamed, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    assert_accounts(directory / "pytorch_model.bin", model, "huggingface-gamma-beta")
    assert_same(directory, model)
    assert hubmodels.bertTokenizer(directory)("a B")["input_ids"].tolist() == [[2, 5, 6, 3]]
    torch.save({"model": renamed}, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_accounts(directory / "pytorch_model.bin", model, "huggingface-gamma-beta")


# --- Code


def assert_refused(path: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertForPreTraining(path)
    assert str(caught.value).startswith(f"{path}: ")
    for part in (*said, "If you trust where it comes from, load it there and save its state_dict() alone"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("wrap", "zipped"),
    [("plain", True), ("plain", False), ("DataParallel", True), ("base", True), ("own", True), ("own", False)],
)
def test_a_whole_model_is_refused_by_the_name_of_its_class(wrap, zipped, theirs, directory):
    whole, name = {
        "plain": (theirs, "transformers.models.bert.modeling_bert.BertForPreTraining"),
        "DataParallel": (nn.DataParallel(theirs), "torch.nn.parallel.data_parallel.DataParallel"),
        "base": (theirs.bert, "transformers.models.bert.modeling_bert.BertModel"),
        "own": (nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
    }[wrap]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class whose source torch cannot find, in the old format
        for content, said in (
            (whole, f"refused, because it holds a whole object, a {name}, whose code would have to run"),
            ({"model": whole}, f"got no tensor, but model, a {name}"),
            ({"model": whole, "epoch": 3}, f"got no tensor, but model, a {name}, epoch, a int"),
        ):
            torch.save(content, directory / "x.pt", _use_new_zipfile_serialization=zipped)
            assert_refused(directory / "x.pt", said)


def test_a_whole_model_beside_its_optimizer_is_refused_by_the_name_of_its_class(theirs, directory):
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for parameter in theirs.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"model": theirs, "optimizer": optimizer.state_dict(), "epoch": 3}, directory / "x.pt")
    assert_refused(directory / "x.pt", "model", "transformers.models.bert.modeling_bert.BertForPreTraining")


@BOTH
def test_an_object_among_tensors_is_refused_wherever_they_are(zipped, state, directory):
    for wrapped, where in (
        (lambda it: it, "odd"),
        (lambda it: {"state_dict": it, "epoch": 3}, "state_dict.odd"),
        (lambda it: [it], None),
        (lambda it: {"models": [it]}, "models.0.odd"),
    ):
        content = wrapped({**state, "odd": HyperParameters()})
        torch.save(content, directory / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError) as caught:
            hubmodels.bertForPreTraining(directory / "x.pt")
        said = f"refused, because {where} is a test_eras.HyperParameters, whose code would have to run. If you trust"
        assert (said if where else "expected a state dict, name -> tensor, got a list") in str(caught.value)


@BOTH
@pytest.mark.parametrize(
    "place",
    [
        "hyper_parameters",
        "in a list",
        "in a tuple",
        "a key",
        "in a set",
        "state of an object",
        "with a tensor",
        "twice",
    ],
)
def test_a_payload_beside_the_model_never_runs(place, zipped, state, directory, model, tmp_path):
    marker = tmp_path / "marker"
    evil, holder = Evil(marker), HyperParameters()
    holder.names = evil
    content = {
        "hyper_parameters": {"it": evil, "a": 1},
        "in a list": [evil],
        "in a tuple": ((evil,),),
        "a key": {evil: 1, "a": 2},
        "in a set": {evil},
        "state of an object": holder,
        "with a tensor": {"it": evil, "list": [torch.ones(1)][:0]},
        "twice": [evil, evil, [evil]],
    }[place]
    torch.save(
        {"state_dict": state, "hyper_parameters": content},
        directory / "x.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    assert_accounts(directory / "x.ckpt", model)
    assert not marker.exists()
    with pytest.MonkeyPatch.context() as patch:
        made = []
        patch.setattr(os, "mkdir", lambda path: made.append(path))
        torch.load(io.BytesIO((directory / "x.ckpt").read_bytes()), weights_only=False)
    assert marker.exists() or made  # the payload does work where it is let


# --- Pickles that were made to be hard to read


@pytest.fixture
def beside(tmp_path):
    """content -> what is read of torch.save's file of it"""

    def read(content) -> dict[str, tuple[int, ...]]:
        torch.save(content, tmp_path / "x.pt")
        return {name: tuple(lazy.read().shape) for name, lazy in read_checkpoint(tmp_path / "x.pt").items()}

    return read


ONE, TWO = torch.ones(1), torch.ones(2)


def test_what_holds_itself_is_read_once(beside):
    content = {"a": ONE, "list": [TWO]}
    content["self"] = content
    content["list"] += [content["list"], content, {"up": content, "b": ONE.clone()}]
    assert beside(content) == {"a": (1,), "list.0": (2,), "list.3.b": (1,)}


def test_keys_that_are_numbers_are_written_out(beside):
    content = {0: ONE, "a": {1: TWO, -2: ONE, 10**30: ONE}, "b": [ONE, {}, [], TWO], "": {"": ONE}}
    wanted = {"0": (1,), "a.1": (2,), "a.-2": (1,), f"a.{10**30}": (1,), "b.0": (1,), "b.3": (2,)}
    found = beside(content)
    assert {name: found[name] for name in wanted} == wanted
    assert len(found) == 7


def test_odd_keys_beside_a_tensor_are_left_out(beside):
    odd = {None: 1, 2.5: {"a": ONE}, ("a", 1): [TWO], b"x": "y", frozenset(): ONE.dtype}
    assert beside({**odd, "a": ONE, "b": {**odd, "c": TWO}}) == {"a": (1,), "b.c": (2,)}


@pytest.mark.parametrize("key", [None, 2.5, ("a", 1), b"a"], ids=str)
def test_a_tensor_under_an_odd_key_has_no_name(key, tmp_path):
    torch.save({"a": ONE, "b": {"c": {key: TWO}}}, tmp_path / "x.pt")
    assert "a tensor's key is neither a name nor a number" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"a.b": ONE, "a": {"b": TWO}}, "a.b"),
        ({"a": {"b": {"c": ONE}, "b.c": TWO}}, "a.b.c"),
        ({"a": {0: ONE, "0": TWO}}, "a.0"),
        ({"a": [ONE], "a.0": ONE}, "a.0"),
        ({1: ONE, "1": ONE}, "1"),
        ({"": {"a": ONE}, "a": ONE}, "a"),
    ],
    ids=["dict", "deep", "number", "list", "top", "empty"],
)
def test_two_tensors_of_one_path(content, name, tmp_path):
    """Also where both are the same one. A dict under an empty name adds none."""
    torch.save(content, tmp_path / "x.pt")
    assert f"two of its tensors are called {name}" in refusal(tmp_path / "x.pt")


def test_a_tensor_is_never_lost_in_silence(state, directory):
    """A name of any length is in the error or in the account."""
    for name in ("n" * 990, "n" * 1010, "n" * 70_000):
        torch.save({**state, name: torch.ones(3)}, directory / "x.pt")
        with pytest.raises(CheckpointError):
            hubmodels.bertForPreTraining(directory / "x.pt")


@pytest.mark.parametrize("content", [{("a", 1): 3}, {None: ONE.dtype}, {2.5: "a", b"x": [1]}], ids=str)
def test_a_dict_of_odd_keys_alone_is_not_taken_for_an_empty_one(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert "expected a state dict, name -> tensor" in refusal(tmp_path / "x.pt")


MANY = 20_000
MORE = 80_000  # times a long name are more bytes than a case may take
LONG = b"n" * 990
HELD = text(b"t") + pickled(16, (16,)) + b"q\x07"  # a tensor, and its place in the memo
HARD = {  # pairs of the dict in a file of some KB
    "one list many times": HELD + text(b"a") + b"]q\x08" + text(b"b") + b"](" + b"h\x08" * MANY + b"e",
    "the same under a long name": HELD + text(b"a") + b"]q\x08" + text(LONG) + b"](" + b"h\x08" * MORE + b"e",
    "one tensor many times under a long name": HELD + text(LONG) + b"](" + b"h\x07" * MORE + b"e",
    "one dict under many names": HELD
    + text(b"a")
    + b"}q\x08"
    + text(LONG)
    + b"}("
    + b"".join(text(b"%d" % number) + b"h\x08" for number in range(MORE))
    + b"u",
    "one object many times": HELD + text(b"a") + b"cposix\nmkdir\nq\x08" + text(b"b") + b"](" + b"h\x08" * MANY + b"e",
    "lists in lists": HELD + text(b"a") + b"]" * MANY + b"a" * (MANY - 1),
    "dicts in dicts": HELD + text(b"a") + (b"}" + text(b"k")) * MANY + b"N" + b"s" * MANY,
    "dicts in dicts with a tensor": HELD + text(b"a") + (b"}" + text(b"k")) * MANY + b"h\x07" + b"s" * MANY,
    "lists doubled": HELD + text(b"a") + b"](" + b"]q\x09]q\x08" + b"(h\x09h\x09eq\x09" * 60 + b"e",
    "objects in objects": HELD + text(b"a") + b"cposix\nmkdir\n" + b")R" * MANY,
    "objects' arguments": HELD + text(b"a") + b"cposix\nmkdir\n" + DEEP + b"\x85R",
    "objects' leaves": HELD + text(b"a") + b"cposix\nmkdir\n" + LEAVES + b"\x85R",
    "an object's state": HELD + text(b"a") + b"cposix\nmkdir\n)\x81" + DEEP + b"b",
    "a deep key": HELD + text(b"a") + b"}" + DEEP + b"Ns",
    "a key of leaves": HELD + text(b"a") + b"}" + LEAVES + b"Ns",
    "a list in itself": HELD + text(b"a") + b"]q\x08h\x08ah\x08a",
    "a name of a megabyte": HELD + text(b"n" * 2**20) + b"](" + b"h\x07" * 100 + b"e",
    "an object's name of a megabyte": HELD + text(b"a") + b"c" + b"n" * 2**20 + b"\nx\n",
    "names of a megabyte each": HELD
    + text(b"a")
    + b"".join(b"}" + text(b"n" * 2**20) for _ in range(4))
    + b"h\x07ssss",
}


@pytest.fixture
def kind(monkeypatch):
    """The fuzzer's own watch on a reader: for hangs, crashes and memory. Python's unpickler is no judge of these."""
    monkeypatch.setitem(fuzz.KINDS, "hard", fuzz.Kind("pytorch_model.bin", fuzz.zip_seed, fuzz.mutate_zip))
    return "hard"


@pytest.mark.parametrize("case", HARD)
def test_a_pickle_that_is_hard_to_read(case, kind, tmp_path):
    files = {"pytorch_model.bin": saved(tmp_path / "x.bin", True, HARD[case]).read_bytes()}
    result = fuzz.run(kind, lambda number: files, 1)
    assert result.faults == []
    assert sum(result.counts.values()) == 1


def test_a_name_of_wrappers_alone():
    """A few megabytes of them; the fuzzer watches over it, and how long that takes is not asked."""
    made = safetensors.torch.save({"module.model." * 300_000: ONE})

    def reader(path: Path):
        found = read_checkpoint(path)
        assert len(translate(found, "x").tensors) == 1
        return found

    result = fuzz.run("safetensors", lambda number: {"model.safetensors": made}, 1, reader, seconds=5)
    assert (result.faults, result.counts) == ([], {"loaded": 1})
