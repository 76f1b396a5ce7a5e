"""One model as every era of PyTorch left it: wrapped, cut into files, in half precision; the numbers are the same."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hubmodels
from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError


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
