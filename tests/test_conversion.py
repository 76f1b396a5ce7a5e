"""Checkpoints of every dialect and every head -> one form; their averages; what is different between two."""

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import gpt_reference
import numpy as np
import pytest
import reference
import safetensors.torch
import test_openai
import torch
import transformers
from conftest import REPOSITORY
from reference import LABELS, D, V
from test_saving import (
    LABELLED,
    MLM,
    NAMES,
    SMALL,
    assert_bit_equal,
    assert_same_results,
    bits,
    ids_in_transformers,
    labelled,
    loaded,
    ours,
    pair,
    silence,
    snapshot,
    tensors_in,
)
from test_saving import LABELS as LABEL_NAMES
from test_tensorflow import FIXTURES, weights
from torch import Tensor

import hubmodels
from hubmodels import conversion
from hubmodels.checkpoint import tensorflow_file, tensors
from hubmodels.conversion import opened
from hubmodels.errors import CatalogError, CheckpointError, ConfigError, HubModelsError, InputError, StoreError
from hubmodels.families import bert, gpt, gpt2

PRETRAINING, CHOICE = "BertForPreTraining", "BertForMultipleChoice"
WORD = "embeddings.word.weight"
TENSORFLOW = FIXTURES / "tensorflow"


# Checkpoints to convert from


def published(name: str, directory: Path, **options) -> Path:
    """What transformers saves, float32 unless `dtype` says otherwise"""
    pair(name, options.pop("dtype", torch.float32))[1].save_pretrained(directory, **options)
    return directory


def state_of(name: str, **options) -> dict[str, Tensor]:
    """As torch.save had it: with what is tied, under both names."""
    return pair(name, torch.float32, **options)[1].state_dict()


def as_bin(name: str, directory: Path, change: Callable[[dict], dict] = dict, **said) -> Path:
    """pytorch_model.bin and a config.json that says what `said` changes; None takes a key out."""
    directory.mkdir(parents=True)
    torch.save(change(state_of(name)), directory / "pytorch_model.bin")
    config = {**pair(name)[1].config.to_dict(), "architectures": [name], **said}
    text = json.dumps({key: value for key, value in config.items() if value is not None or key not in said})
    (directory / "config.json").write_text(text)
    return directory


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for k, t in state.items()}


def wrapped(state: dict[str, Tensor]) -> dict:
    return {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "optimizer": {"step": 1}}


def in_parts(name: str, directory: Path) -> Path:
    """pytorch_model.bin in two files with an index"""
    as_bin(name, directory)
    state = torch.load(directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").unlink()
    places = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
    for file in set(places.values()):
        torch.save({key: tensor for key, tensor in state.items() if places[key] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def zipped(directory: Path) -> Path:
    published(MLM, directory.with_name("inside"))
    with zipfile.ZipFile(directory.with_suffix(".zip"), "w") as archive:
        for path in directory.with_name("inside").iterdir():
            archive.write(path, f"model/{path.name}")
    return directory.with_suffix(".zip")


def native(name: str, directory: Path) -> Path:
    return hubmodels.export(ours(name), directory, form="native")


def release(directory: Path) -> Path:
    """OpenAI's shards, with a config.json for their small size"""
    return test_openai.release(directory, test_openai.arrays_of(test_openai.their_model()))


SOURCES: dict[str, tuple[Callable[[Path], Path], str, str]] = {  # how it is made, its class, its dialect
    **{name: (lambda directory, name=name: published(name, directory), name, "huggingface") for name in NAMES},
    "several files": (lambda d: published(MLM, d, max_shard_size="20KB"), MLM, "huggingface"),
    "bin": (lambda d: as_bin(PRETRAINING, d), PRETRAINING, "huggingface"),
    "bin in parts": (lambda d: in_parts(PRETRAINING, d), PRETRAINING, "huggingface"),
    "gamma and beta": (lambda d: as_bin(PRETRAINING, d, old_names), PRETRAINING, "huggingface-gamma-beta"),
    "wrapped": (lambda d: as_bin("GPT2LMHeadModel", d, wrapped), "GPT2LMHeadModel", "huggingface"),
    "zip": (zipped, MLM, "huggingface"),
    "native": (lambda d: native(LABELLED, d), LABELLED, "native"),
    "native gpt": (lambda d: native("OpenAIGPTDoubleHeadsModel", d), "OpenAIGPTDoubleHeadsModel", "native"),
    "openai": (release, "OpenAIGPTLMHeadModel", "openai"),
    **{
        f"tensorflow {kind}": (lambda _, kind=kind: TENSORFLOW / kind, PRETRAINING, "tensorflow")
        for kind in ("one", "three", "objects")
    },
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path) -> tuple[Path, str, str]:
    make, name, dialect = SOURCES[request.param]
    return make(tmp_path / "source"), name, dialect


def assert_complete(report) -> None:
    assert report.is_complete
    assert report.of_the_file() == report.file
    assert report.of_the_model() == report.model
    assert report.model.numbers > 0
    assert str(report).count(": 100 %") == 2


def assert_equal_checkpoints(one, other) -> None:
    found = hubmodels.diff(one, other)
    assert found.is_equal
    assert found.config == {}
    assert len(found.differences) > 10
    assert {(each.largest, each.relative) for each in found.differences} == {(0.0, 0.0)}
    assert all(each.shapes[0] == each.shapes[1] for each in found.differences)


# convert


def test_every_source_becomes_what_transformers_loads_in_silence(source, tmp_path, capfd):
    path, name, dialect = source
    report = hubmodels.convert(path, tmp_path / "out")
    assert_complete(report)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == SMALL
    assert_equal_checkpoints(path, tmp_path / "out")
    model = loaded(name, path, dtype=torch.float64)
    assert model.provenance.dialect == dialect
    with silence(capfd):
        theirs = getattr(transformers, name).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert theirs.config.architectures == [name]
    back = loaded(name, tmp_path / "out", dtype=torch.float64)
    assert_bit_equal(back, model)
    if model.config.vocab_size == V:
        assert_same_results(back, theirs, name)
        return
    words = torch.arange(model.config.vocab_size).view(-1, 1).expand(-1, 4)
    with torch.no_grad():
        got, want = model(words)[1], theirs(words)
        want = want.prediction_logits if name == PRETRAINING else want.logits
        assert reference.distance(got, want) <= 1e-10


def test_every_source_becomes_native_and_comes_back(source, tmp_path):
    path, name, _ = source
    assert_complete(hubmodels.convert(path, tmp_path / "native", form="native"))
    assert sorted(p.name for p in (tmp_path / "native").iterdir()) == ["config.json", "hubmodels.safetensors"]
    model = loaded(name, tmp_path / "native")
    assert_bit_equal(model, loaded(name, path))
    assert_bit_equal(tensors_in(tmp_path / "native"), model)
    assert_complete(hubmodels.convert(tmp_path / "native", tmp_path / "back"))
    hubmodels.convert(path, tmp_path / "straight")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "straight")


def test_every_source_is_opened_as_what_it_is(source):
    path, name, _ = source
    with opened(path) as found:
        cls = found.contents.cls
        assert (cls.architecture or cls.__name__) == name
        assert found.tokenizer is None
        assert_complete(found.report)
        assert set(found.tensors) == set(loaded(name, path).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saved_is_what_is_written(name, tmp_path):
    source = published(name, tmp_path / "source")
    hubmodels.convert(source, tmp_path / "out")
    want = tensors_in(source)
    if name == "OpenAIGPTDoubleHeadsModel":
        want["transformer.tokens_embed.weight"] = want.pop("lm_head.weight")
    assert_bit_equal(tensors_in(tmp_path / "out"), want)
    theirs, mine = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    ends = ("bos_token_id", "eos_token_id")  # 50256, which this vocabulary has not got
    assert {k: v for k, v in mine.items() if k in theirs and theirs[k] != v and not (k in ends and v is None)} == {}


@pytest.mark.parametrize("kind", ["one", "three", "objects"])
def test_numbers_of_tensorflow_are_where_transformers_has_them(kind, tmp_path):
    hubmodels.convert(TENSORFLOW / kind, tmp_path)
    found, theirs = tensors_in(tmp_path), {k: torch.from_numpy(v) for k, v in weights().items()}
    assert len(found) == len(theirs)
    assert bits(found["bert.embeddings.word_embeddings.weight"]) == bits(theirs["bert/embeddings/word_embeddings"])
    layer = "bert/encoder/layer_1/attention/self/query/kernel"
    assert torch.equal(found["bert.encoder.layer.1.attention.self.query.weight"], theirs[layer].t())
    assert torch.equal(found["cls.seq_relationship.weight"], theirs["cls/seq_relationship/output_weights"])
    assert torch.equal(found["cls.predictions.bias"], theirs["cls/predictions/output_bias"])
    assert sum(t.double().sum() for t in found.values()) == pytest.approx(
        sum(t.double().sum() for t in theirs.values())
    )


def test_a_file_of_a_directory_is_converted_too(tmp_path):
    source = published(MLM, tmp_path / "source")
    hubmodels.convert(source / "model.safetensors", tmp_path / "out")
    hubmodels.convert(str(source), tmp_path / "text")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "text")


def test_a_config_json_of_before_model_type(tmp_path):
    """pytorch-pretrained-bert wrote none. Entry points load such a directory."""
    source = as_bin(PRETRAINING, tmp_path / "source", old_names, model_type=None, architectures=None)
    model = loaded(PRETRAINING, source)
    assert_complete(hubmodels.convert(source, tmp_path / "out"))
    assert_bit_equal(loaded(PRETRAINING, tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("name", "entry", "ids"),
    [("bert-nano", PRETRAINING, "bertTokenizer"), ("gpt-nano", "OpenAIGPTLMHeadModel", "gptTokenizer")],
)
def test_weights_by_name_come_with_their_tokenizer(name, entry, ids, tmp_path, capfd):
    report = hubmodels.convert(name, tmp_path / "out", max_file_size="5MB")
    assert_complete(report)
    assert_equal_checkpoints(name, tmp_path / "out")
    assert (tmp_path / "out" / "model-00002-of-00002.safetensors").is_file() or name == "bert-nano"
    text = "The ship sailed (unaffably) to Ærø, 42 km!"
    tokenizer = getattr(hubmodels, ids)(name)
    want = tokenizer(text)
    with silence(capfd):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert ids_in_transformers(theirs, text) == want["input_ids"][0].tolist()
        model = getattr(transformers, entry).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    with torch.no_grad():
        got = loaded(entry, tmp_path / "out", dtype=torch.float64)(want["input_ids"])[1]
        said = model(want["input_ids"])
    said = said.prediction_logits if name == "bert-nano" else said.logits
    assert reference.distance(got, said) <= 1e-10


@pytest.mark.parametrize("name", [LABELLED, "BertForTokenClassification"])
@pytest.mark.parametrize("form", ["hf", "native"])
def test_labels_keep_their_names(name, form, tmp_path, capfd):
    source = labelled(tmp_path / "source", name, **LABEL_NAMES, problem_type="single_label_classification")
    hubmodels.convert(source, tmp_path / "out", form=form)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    said = {**LABEL_NAMES, "problem_type": "single_label_classification"}
    assert {key: config[key] for key in said} == said
    assert loaded(name, tmp_path / "out").classifier.out_features == LABELS


def test_names_of_labels_survive_average_and_new_words(tmp_path):
    source = labelled(tmp_path / "source", **LABEL_NAMES)
    hubmodels.average([source, source], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in LABEL_NAMES} == LABEL_NAMES


def test_a_classifier_beside_another_head_keeps_its_labels(tmp_path):
    """A model of several tasks: the class is that of more heads, the classifier stays one that loads."""
    source = as_bin(PRETRAINING, tmp_path / "source", lambda s: {**s, **head(5)}, **five_labels())
    model = loaded(LABELLED, source)
    assert_complete(hubmodels.convert(source, tmp_path / "out"))
    assert_equal_checkpoints(source, tmp_path / "out")
    back = loaded(LABELLED, tmp_path / "out")
    assert_bit_equal(back, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["hf", "native"])
def test_numbers_of_another_dtype(dtype, form, tmp_path):
    source = published(MLM, tmp_path / "source")
    assert_complete(hubmodels.convert(source, tmp_path / "out", dtype=dtype, form=form))
    want = {key: tensor.to(dtype) for key, tensor in loaded(MLM, source).state_dict().items()}
    assert_bit_equal(loaded(MLM, tmp_path / "out", dtype=dtype), want)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {dtype}


def test_without_a_dtype_each_tensor_keeps_its_own(tmp_path):
    """Of parts that differ in it, the one that holds them all."""
    source = published(MLM, tmp_path / "source")
    state = tensors_in(source)
    state = {key: t.half() if "LayerNorm" not in key and ".key." not in key else t for key, t in state.items()}
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    hubmodels.convert(source, tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    for key in state:
        if any(part in key for part in (".query.", ".value.")):
            assert torch.equal(found[key], state[key].float())
        else:
            assert bits(found[key]) == bits(state[key])
            assert found[key].dtype == state[key].dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16", torch.complex64])
def test_dtypes_that_no_parameter_can_have(dtype, tmp_path):
    source = published(MLM, tmp_path / "source")
    with pytest.raises(InputError, match="dtype"):
        hubmodels.convert(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_odd_numbers_come_through_bit_by_bit(tmp_path):
    source = published(MLM, tmp_path / "source")
    state = tensors_in(source)
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    for tensor in state.values():
        tensor.view(-1)[:5] = odd
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    for form in ("hf", "native"):
        hubmodels.convert(source, tmp_path / form, form=form)
    hubmodels.convert(tmp_path / "native", tmp_path / "back")
    assert_bit_equal(tensors_in(tmp_path / "hf"), state)
    assert_bit_equal(tensors_in(tmp_path / "back"), state)
    assert hubmodels.diff(source, tmp_path / "native").is_equal


@pytest.mark.parametrize("form", ["hf", "native"])
@pytest.mark.parametrize("kind", ["bin", "several files", "native", "tensorflow one"])
def test_a_directory_onto_itself(kind, form, tmp_path):
    make, name, _ = SOURCES[kind]
    source = make(tmp_path / "source")
    if kind.startswith("tensorflow"):
        source = Path(shutil.copytree(source, tmp_path / "copy"))
    shutil.copytree(source, tmp_path / "before")
    report = hubmodels.convert(source, source, form=form)
    assert_complete(report)
    assert_equal_checkpoints(tmp_path / "before", source)
    assert_bit_equal(loaded(name, source), loaded(name, tmp_path / "before"))
    weights_file = {"hf": "model.safetensors", "native": "hubmodels.safetensors"}[form]
    assert loaded(name, source).provenance.files[0].path.name == weights_file


# What class a file is of


def head(labels: int) -> dict[str, Tensor]:
    return {"classifier.weight": torch.randn(labels, D), "classifier.bias": torch.randn(labels)}


def five_labels() -> dict:
    return {"id2label": {str(i): f"L{i}" for i in range(5)}, "label2id": {f"L{i}": i for i in range(5)}}


def less(*parts: str) -> Callable[[dict], dict]:
    """Without tensors whose names begin so"""
    return lambda state: {key: tensor for key, tensor in state.items() if not key.startswith(parts)}


@pytest.mark.parametrize(
    ("name", "change", "said", "found"),
    [
        (PRETRAINING, less("cls.seq_relationship"), {"architectures": None}, MLM),  # and its pooler
        (PRETRAINING, less("cls.seq_relationship"), {"architectures": ["BertForPreTraining"]}, MLM),
        (PRETRAINING, less("cls.predictions"), {"architectures": None}, "BertForNextSentencePrediction"),
        (PRETRAINING, less("cls."), {"architectures": None}, "BertModel"),
        (PRETRAINING, less("cls.", "bert.pooler"), {"architectures": None}, "BertModel"),
        (PRETRAINING, dict, {"architectures": ["BertForMaskedLM"]}, PRETRAINING),
        (LABELLED, dict, {"architectures": None}, LABELLED),
        (LABELLED, dict, {"architectures": ["BertForMultipleChoice"]}, CHOICE),
        (LABELLED, dict, {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        (LABELLED, less("bert.pooler"), {"architectures": None}, "BertForTokenClassification"),
        ("BertForTokenClassification", dict, {"architectures": None}, "BertForTokenClassification"),
        ("BertForTokenClassification", dict, {"architectures": ["Nothing"]}, "BertForTokenClassification"),
        ("BertForQuestionAnswering", dict, {"architectures": None}, "BertForQuestionAnswering"),
        (CHOICE, dict, {"architectures": [CHOICE]}, CHOICE),
        ("OpenAIGPTDoubleHeadsModel", dict, {"architectures": None}, "OpenAIGPTDoubleHeadsModel"),
        ("OpenAIGPTDoubleHeadsModel", dict, {"architectures": ["OpenAIGPTModel"]}, "OpenAIGPTDoubleHeadsModel"),
        ("OpenAIGPTLMHeadModel", dict, {"architectures": None}, "OpenAIGPTLMHeadModel"),
        ("OpenAIGPTModel", dict, {"architectures": ["OpenAIGPTModel"]}, "OpenAIGPTModel"),
        ("OpenAIGPTModel", dict, {"architectures": None}, "OpenAIGPTLMHeadModel"),
        ("GPT2Model", dict, {"architectures": ["GPT2Model"]}, "GPT2Model"),
        ("GPT2Model", dict, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ("GPT2LMHeadModel", less("lm_head"), {"architectures": None}, "GPT2LMHeadModel"),
        (PRETRAINING, lambda s: {**s, **head(5)}, {"architectures": None}, PRETRAINING),
        (MLM, lambda s: {**s, **head(1)}, {"architectures": ["BertForMaskedLM"]}, MLM),
    ],
)
def test_the_class_is_that_of_the_heads_and_nothing_is_lost(name, change, said, found, tmp_path):
    if said["architectures"] == [CHOICE]:
        name = CHOICE
    source = as_bin(name, tmp_path / "source", change, **said)
    for form in ("native", "hf"):
        assert_complete(hubmodels.convert(source, tmp_path / "out", form=form))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [found]
        assert_equal_checkpoints(source, tmp_path / "out")
    tied = ("cls.predictions.decoder.", "lm_head.")
    was = {k: t for k, t in torch.load(source / "pytorch_model.bin").items() if not k.startswith(tied)}
    assert_bit_equal(bare(tensors_in(tmp_path / "out")), bare({k: t for k, t in was.items() if not is_computed(k)}))


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("bert.").removeprefix("transformer."): tensor for key, tensor in state.items()}


def is_computed(key: str) -> bool:
    return key.endswith(("position_ids", ".attn.bias", ".attn.masked_bias"))


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_the_number_of_labels_is_the_files(labels, tmp_path):
    source = as_bin(LABELLED, tmp_path / "source", lambda s: {**s, **head(labels)}, id2label=None, label2id=None)
    hubmodels.convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == labels
    assert loaded(LABELLED, tmp_path / "out").classifier.out_features == labels


# Dry run


class Reading(AssertionError):
    """A tensor was read"""


@pytest.fixture
def unread(monkeypatch) -> None:
    """Nothing may be read of a file's tensors."""

    def refuse(self, *_):
        raise Reading(self)

    for cls in (tensors.MappedTensor, tensors.ShardedTensor, tensorflow_file.BundledTensor):
        for name in ("read", "read_into"):
            monkeypatch.setattr(cls, name, refuse)


KINDS_WITHOUT_REPEATS = [MLM, LABELLED, "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "several files", "native", "openai"]
KINDS_WITHOUT_REPEATS += ["zip", "tensorflow one", "tensorflow three", "tensorflow objects"]


@pytest.mark.parametrize("kind", KINDS_WITHOUT_REPEATS)
def test_the_account_needs_no_numbers(kind, tmp_path, unread, run, capsys):
    source = SOURCES[kind][0](tmp_path / "source")
    capsys.readouterr()  # transformers' bar
    before = snapshot(tmp_path)
    with opened(source) as found:
        assert_complete(found.report)
        with pytest.raises(Reading):
            next(iter(found.tensors.values()))
    code, out, err = run("convert", source, "--dry-run")
    assert (code, err) == (0, "")
    assert out.count(": 100 %") == 2
    code, out, err = run("convert", source, tmp_path / "out", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["file"]["accounted"] == json.loads(out)["file"]["there"]
    assert snapshot(tmp_path) == before


def test_of_what_is_tied_only_the_two_copies_are_read(tmp_path, monkeypatch):
    """Whether they are equal decides whether it can be converted at all."""
    source = as_bin(PRETRAINING, tmp_path / "source", lambda s: {k: t.clone() for k, t in s.items()})
    shapes, real = set(), tensors.MappedTensor.read

    def read(self):
        shapes.add(self.shape)
        return real(self)

    monkeypatch.setattr(tensors.MappedTensor, "read", read)
    with opened(source) as found:
        assert found.report.count("tied") == 2
    assert shapes <= {(V, D), (V,)}


# What is refused


def refusal(error: type[Exception], *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        hubmodels.convert(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (less("bert.encoder.layer.1.attention.self.key.bias"), "encoder.layer.1.attention.self.key.bias is not in the"),
        (less("bert.embeddings.LayerNorm.weight"), "transformer.embeddings.norm.weight [24] is in the model, but noth"),
        (less("bert.pooler.dense.bias"), "transformer.pooler.bias [24] is in the model, but nothing in the file fills"),
        (less("cls.predictions.transform.dense.weight"), "head.dense.weight [24, 24] is in the model, but nothing in"),
        (lambda s: {**s, "lstm.weight": torch.zeros(3)}, "lstm.weight [3] is in the file, but no row knows it"),
        (lambda s: {**s, "cls.predictions.bias": torch.zeros(9)}, "cls.predictions.bias: expected [67] for head.bias"),
        (lambda s: {**s, "classifier.weight": torch.zeros(5, D)}, "classifier.bias [5] is in the model, but nothing"),
        (lambda s: {**s, "cls.predictions.decoder.weight": torch.ones(V, D)}, "should repeat"),
        (lambda s: {**s, "bert.pooler.dense.bias": torch.zeros(D, dtype=torch.int64)}, "expected floating point"),
        (lambda s: {}, "is in the model, but nothing in the file fills it"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_written(change, said, tmp_path):
    source = as_bin(PRETRAINING, tmp_path / "source", change)
    before = snapshot(tmp_path)
    text = refusal(CheckpointError, source, tmp_path / "out")
    assert said in text
    assert str(source / "pytorch_model.bin") in text
    assert snapshot(tmp_path) == before


def test_a_damaged_file_writes_nothing(tmp_path):
    source = published(MLM, tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    before = snapshot(tmp_path)
    assert str(path) in refusal(CheckpointError, source, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_shard_that_is_missing(tmp_path):
    source = published(MLM, tmp_path / "source", max_shard_size="20KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert refusal(CheckpointError, source, tmp_path / "out") == f"{lost}: no such file"
    assert not (tmp_path / "out").exists()


def test_another_familys_checkpoint(tmp_path):
    source = as_bin(MLM, tmp_path / "source", model_type="roberta")
    text = refusal(CheckpointError, source, tmp_path / "out")
    assert text == f"{source / 'config.json'}: it says roberta; families are bert, gpt, gpt2"
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_something_else(tmp_path):
    source = as_bin(MLM, tmp_path / "source", position_embedding_type="relative_key")
    assert "position_embedding_type = 'relative_key'" in refusal(ConfigError, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_of_other_sizes(tmp_path):
    source = as_bin(MLM, tmp_path / "source", vocab_size=V + 1)
    assert f"expected [{V + 1}, {D}] for transformer.{WORD}, got [{V}, {D}]" in refusal(
        CheckpointError, source, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(tmp_path):
    assert "did you mean bert-nano" in refusal(CatalogError, "bert-nan", tmp_path / "out")
    assert "no such file or directory" in refusal(CatalogError, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in refusal(CheckpointError, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError):
        hubmodels.convert(None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_form_or_size_that_is_none_writes_nothing(tmp_path):
    source = published(MLM, tmp_path / "source")
    assert refusal(InputError, source, tmp_path / "out", form="pt") == "form = 'pt': expected hf or native"
    said = "max_file_size = 'big': expected a number of bytes, or such as 5GB"
    assert refusal(InputError, source, tmp_path / "out", max_file_size="big") == said
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_does_not_hide_the_weights(tmp_path):
    """Comparing, averaging and the account need no words."""
    source = published(MLM, tmp_path / "source")
    (source / "vocab.txt").write_text("no\nspecial\ntokens\n")
    assert hubmodels.diff(source, source).is_equal
    with opened(source) as found:
        assert_complete(found.report)


# The account


def test_the_account_as_a_table(tmp_path):
    """One layer of one number, and a step of the training's beside it."""
    sizes = {"vocab_size": 3, "n_positions": 2, "n_embd": 2, "n_layer": 1, "n_head": 1}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    state = {f"module.{key}": tensor.clone() for key, tensor in theirs.state_dict().items()}
    state |= {"module.transformer.h.0.attn.bias": torch.ones(1, 1, 2, 2, dtype=torch.bool)}
    torch.save({"state_dict": state, "optimizer": {"step": torch.zeros(())}}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    report = hubmodels.convert(tmp_path / "model.pt", tmp_path / "out")
    lines = str(report).splitlines()
    assert lines[0].split() == ["OURS", "THEIRS", "OPERATION", "SHAPE", "DTYPE", "WHY"]
    rows = [[cell for cell in line.split("  ") if cell.strip()] for line in lines[1:-4]]
    rows = [[cell.strip() for cell in row] for row in rows]
    word, key = "transformer.embeddings.word.weight", "state_dict.module.transformer.wte.weight"
    assert [word, key, "loaded", "3x2", "float32"] in rows
    assert [
        "transformer.layers.0.attention.qkv.weight",
        "state_dict.module.transformer.h.0.attn.c_attn.weight",
        "transposed",
        "2x6",
        "float32",
    ] in rows
    assert [
        word,
        "state_dict.module.lm_head.weight",
        "tied",
        "3x2",
        "float32",
        f"repeats {key} (transformer.wte.weight)",
    ] in rows
    triangle = "state_dict.module.transformer.h.0.attn.bias"
    because = "it is the triangle of the causal mask, which is computed"
    assert ["-", triangle, "dropped", "1x1x2x2", "bool", because] in rows
    assert ["-", "optimizer.step", "dropped", "1", "float32", "of the training, not of the model"] in rows
    assert len(rows) == len(state) + 1
    model = sum(p.numel() for p in theirs.parameters())
    assert lines[-4] == ""
    assert lines[-3] == report.summary
    assert sorted(lines[-3].split(", ")) == ["1 tied", "12 loaded", "2 dropped", "4 transposed"]
    names = len(dict(theirs.named_parameters()))
    count, numbers = len(rows), model + 6 + 4 + 1  # what is tied, the triangle, the step
    assert lines[-2] == f"of the file: {count} of {count} names, {numbers} of {numbers} numbers: 100 %"
    assert lines[-1] == f"of the model: {names} of {names} names, {model} of {model} numbers: 100 %"


def test_the_account_of_turned_and_fused_tensors(tmp_path):
    report = hubmodels.convert(TENSORFLOW / "one", tmp_path)
    found = {entry.theirs: entry for entry in report.entries}
    entry = found["bert/encoder/layer_1/attention/self/query/kernel"]
    assert entry.ours == "transformer.layers.1.attention.qkv.weight"
    assert (entry.operation, entry.shape) == ("transposed and fused", (12, 12))
    assert found["bert/encoder/layer_1/intermediate/dense/kernel"].shape == (12, 20)
    assert found["global_step"][:3] == (None, "global_step", "dropped")
    assert report.count("dropped") == report.file.names - len(weights())


# average


def moved(directory: Path, name: str, change: Callable[[Tensor, int], Tensor], **options) -> Path:
    """A checkpoint whose numbers are `change`d, tensor by tensor"""
    model = ours(name, **options)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(change(parameter.double(), number))
    return hubmodels.export(model, directory)


@pytest.fixture
def three(tmp_path) -> list[Path]:
    return [hubmodels.export(ours(MLM, seed=seed), tmp_path / str(seed)) for seed in (1, 2, 3)]


@pytest.mark.parametrize("shares", [None, [0.5, 0.25, 0.25], [2, -1.5, 0.5]])
def test_the_mean_is_taken_in_float64_and_rounded_once(shares, three, tmp_path):
    assert hubmodels.average(three, tmp_path / "out", shares=shares) == tmp_path / "out"
    states = [{k: t.double().numpy() for k, t in loaded(MLM, path).state_dict().items()} for path in three]
    parts = shares or [1 / 3] * 3
    got = loaded(MLM, tmp_path / "out").state_dict()
    for key in states[0]:
        want = sum(share * state[key] for share, state in zip(parts, states, strict=True))
        assert got[key].dtype == torch.float32
        assert np.array_equal(got[key].numpy(), want.astype(np.float32)), key


def test_a_mean_by_hand(tmp_path):
    one = moved(tmp_path / "one", MLM, lambda t, i: torch.full_like(t, 1.0 + i))
    other = moved(tmp_path / "other", MLM, lambda t, i: torch.full_like(t, 5.0 - i))
    hubmodels.average([one, other], tmp_path / "out", shares=[0.75, 0.25])
    for number, tensor in enumerate(loaded(MLM, tmp_path / "out").parameters()):
        assert tensor.unique().tolist() == [0.75 * (1 + number) + 0.25 * (5 - number)]


def test_numbers_that_float32_would_lose(tmp_path):
    """2^25 + 1 + 1 - 2^25: added up in float32 the ones are gone."""
    big = float(2**25)
    paths = [moved(tmp_path / str(n), MLM, lambda t, _, n=n: torch.full_like(t, n)) for n in (big, 1.0, -big)]
    hubmodels.average([paths[0], paths[1], paths[1], paths[2]], tmp_path / "out")
    assert loaded(MLM, tmp_path / "out").head.bias.unique().tolist() == [0.5]


@pytest.mark.parametrize(("name", "count"), [*((name, 3) for name in NAMES), *((MLM, count) for count in (1, 2, 7))])
def test_the_mean_of_a_model_with_itself_is_the_model(name, count, tmp_path):
    source = hubmodels.export(ours(name), tmp_path / "source")
    hubmodels.average([source] * count, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_keeps_the_dtype_of_the_first(dtype, tmp_path):
    one = hubmodels.export(ours(MLM, dtype), tmp_path / "one")
    other = hubmodels.export(ours(MLM, seed=2), tmp_path / "other")
    hubmodels.average([one, other], tmp_path / "out")
    a, b = (loaded(MLM, path, dtype=torch.float64).state_dict() for path in (one, other))
    want = {key: (0.5 * a[key] + 0.5 * b[key]).to(dtype) for key in a}
    assert_bit_equal(loaded(MLM, tmp_path / "out", dtype=dtype), want)
    hubmodels.average([one, one], tmp_path / "itself")
    assert_bit_equal(tensors_in(tmp_path / "itself"), tensors_in(one))


def with_odd_numbers(directory: Path, seed: int) -> Path:
    """In each tensor nan, infinities and both zeros"""
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 3e38, 1e-45], dtype=torch.float64)

    def change(tensor: Tensor, number: int) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[:7] = odd.roll(seed)
        return tensor

    return moved(directory, MLM, change, seed=seed)


@pytest.mark.parametrize(("at", "end"), [(0, "one"), (1, "other"), (0.0, "one"), (1.0, "other")])
def test_the_ends_are_the_checkpoints_bit_by_bit(at, end, tmp_path):
    """What is not finite in the other one stays out, and -0.0 is no 0.0."""
    for name, seed in (("one", 1), ("other", 2)):
        with_odd_numbers(tmp_path / name, seed)
    assert hubmodels.interpolate(tmp_path / "one", tmp_path / "other", at, tmp_path / "out") == tmp_path / "out"
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / end))


def test_what_is_not_finite(tmp_path):
    """inf and a number: inf; inf and -inf, nan and anything: nan."""

    def bias(values: list[float], name: str) -> Path:
        def change(tensor: Tensor, _: int) -> Tensor:
            tensor = tensor.clone()
            tensor.view(-1)[: len(values)] = torch.tensor(values, dtype=torch.float64)
            return tensor

        return moved(tmp_path / name, MLM, change)

    inf, nan = math.inf, math.nan
    one = bias([inf, inf, -inf, nan, nan, 3e38], "one")
    other = bias([inf, -inf, 1.0, nan, 1.0, 3e38], "other")
    hubmodels.average([one, other], tmp_path / "out")
    got = loaded(MLM, tmp_path / "out").head.bias[:6].tolist()
    assert [got[0], got[2]] == [inf, -inf]
    assert all(math.isnan(got[i]) for i in (1, 3, 4))
    assert got[5] == torch.tensor(3e38).item()  # their sum is no float32


@pytest.mark.parametrize("at", [0.3, 0.5, -0.5, 1.5, 2])
def test_between_and_beyond(at, three, tmp_path):
    hubmodels.interpolate(three[0], three[1], at, tmp_path / "out")
    a, b = (loaded(MLM, path, dtype=torch.float64).state_dict() for path in three[:2])
    got = loaded(MLM, tmp_path / "out").state_dict()
    for key in a:
        assert torch.equal(got[key], ((1 - at) * a[key] + at * b[key]).float())


def test_options_of_an_average(three, tmp_path):
    hubmodels.interpolate(three[0], three[1], 0.5, tmp_path / "plain")
    hubmodels.interpolate(three[0], three[1], 0.5, tmp_path / "native", form="native")
    hubmodels.average(three[:2], tmp_path / "parts", max_file_size="5KB")
    assert (tmp_path / "native" / "hubmodels.safetensors").is_file()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    for name in ("native", "parts"):
        assert_equal_checkpoints(tmp_path / "plain", tmp_path / name)


def test_the_mean_of_different_forms_and_prefixes(tmp_path):
    """The same parameters under TensorFlow's names, Hugging Face's bare and prefixed ones, and ours."""
    model = ours("BertModel")
    sources = [hubmodels.export(model, tmp_path / "bare"), hubmodels.export(model, tmp_path / "native", form="native")]
    prefixed = tmp_path / "prefixed"
    shutil.copytree(tmp_path / "bare", prefixed)
    state = {f"bert.{key}": tensor for key, tensor in tensors_in(tmp_path / "bare").items()}
    safetensors.torch.save_file(state, prefixed / "model.safetensors", {"format": "pt"})
    sources.append(prefixed)
    for number, order in enumerate((sources, sources[::-1], [prefixed, sources[1], sources[0]])):
        hubmodels.average(order, tmp_path / f"out{number}")
        assert_bit_equal(loaded("BertModel", tmp_path / f"out{number}"), model)
    other = published(PRETRAINING, tmp_path / "other")
    hubmodels.convert(other, tmp_path / "ours", form="native")
    hubmodels.average([tmp_path / "ours", other], tmp_path / "both")
    assert_equal_checkpoints(other, tmp_path / "both")


def test_gpt_with_and_without_a_head_is_one_model(tmp_path):
    """Its head is the word table."""
    base = published("GPT2Model", tmp_path / "base")
    whole = published("GPT2LMHeadModel", tmp_path / "whole")
    hubmodels.average([base, whole], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["GPT2Model"]
    states = [loaded("GPT2Model", path).state_dict() for path in (base, whole)]
    want = {key: (0.5 * states[0][key].double() + 0.5 * states[1][key].double()).float() for key in states[0]}
    assert_bit_equal(loaded("GPT2Model", tmp_path / "out"), want)


def test_a_mean_has_the_tokenizer_of_the_first(tmp_path):
    hubmodels.average(["bert-nano", "bert-nano"], tmp_path)
    text = "The ship sailed."
    want = hubmodels.bertTokenizer("bert-nano")(text)["input_ids"]
    assert torch.equal(hubmodels.bertTokenizer(tmp_path)(text)["input_ids"], want)
    assert_equal_checkpoints("bert-nano", tmp_path)


def test_a_mean_onto_one_of_its_sources(three, tmp_path):
    hubmodels.average(three, tmp_path / "out")
    hubmodels.average(three, three[0])
    assert snapshot(three[0]) == snapshot(tmp_path / "out")


def not_averaged(paths: list, **options) -> str:
    before = snapshot(paths[0].parent) if paths and isinstance(paths[0], Path) else None
    out = Path(paths[0].parent if before is not None else ".") / "refused"
    with pytest.raises(InputError) as caught:
        hubmodels.average(paths, out, **options)
    assert before is None or snapshot(paths[0].parent) == before
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.5], [1, 1, 1], [], [0.5, 0.25, 0.2], [math.nan, 0, 1], [math.inf, -math.inf, 1], [0.5, 0.5, 1e-5]],
)
def test_shares_that_do_not_fit(shares, three):
    said = f"shares = {shares}: expected one for each of 3 checkpoints, together 1"
    assert not_averaged(three, shares=shares) == said


def test_a_mean_of_nothing():
    assert not_averaged([]) == "shares = []: expected one for each of 0 checkpoints, together 1"


@pytest.mark.parametrize("at", [math.nan, math.inf])
def test_points_that_are_none(at, three, tmp_path):
    with pytest.raises(InputError, match="shares = "):
        hubmodels.interpolate(three[0], three[1], at, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def named(path: Path) -> str:
    return str(path / "model.safetensors")


def test_two_families_have_no_mean(tmp_path):
    one, other = (hubmodels.export(ours(name), tmp_path / name) for name in (MLM, "GPT2LMHeadModel"))
    said = f"{named(one)} is a bert, {named(other)} a gpt2: expected one family"
    assert not_averaged([one, other]) == said
    with pytest.raises(InputError) as caught:
        hubmodels.diff(one, other)
    assert str(caught.value) == said


def test_two_sizes_have_no_mean(tmp_path):
    one = hubmodels.export(ours(MLM), tmp_path / "one")
    other = hubmodels.export(ours(MLM, vocab_size=V + 1, intermediate_size=20), tmp_path / "other")
    said = f"intermediate_size = 44 and 20; vocab_size = {V} and {V + 1}"
    assert not_averaged([one, other]) == f"{named(one)} and {named(other)} are not of one model: {said}"


def test_two_depths_have_no_mean(tmp_path):
    one = hubmodels.export(ours("GPT2LMHeadModel"), tmp_path / "one")
    other = hubmodels.export(ours("GPT2LMHeadModel", n_layer=2), tmp_path / "other")
    text = not_averaged([one, other])
    assert text.startswith(f"{named(one)} and {named(other)} are not of one model: ")
    assert f"layers.2.attention.output.bias is only in {named(one)}" in text


def test_two_heads_have_no_mean(tmp_path):
    one = hubmodels.export(ours("BertModel"), tmp_path / "one")
    other = hubmodels.export(ours(MLM), tmp_path / "other")
    lone = ["pooler.bias", "pooler.weight"], [f"head.{n}" for n in ("bias", "dense.bias", "dense.weight")]
    lone[1].extend(f"head.norm.{wb}" for wb in ("bias", "weight"))
    parts = [f"{name} is only in {named(one)}" for name in lone[0]] + [
        f"{n} is only in {named(other)}" for n in lone[1]
    ]
    assert not_averaged([one, other]) == f"{named(one)} and {named(other)} are not of one model: {'; '.join(parts)}"


@pytest.mark.parametrize("labels", [(5, 3), (3, 5), (5, 1), (1, 5)])
def test_two_numbers_of_labels_have_no_mean(labels, tmp_path):
    """Not even where one row could be added to five."""
    config = bert.BertConfig(**reference.SIZES)
    paths = []
    for count in labels:
        model = bert.BertForSequenceClassification(config, num_labels=count)
        gpt_reference.randomise(model, seed=count)
        paths.append(hubmodels.export(model, tmp_path / str(count)))
    text = not_averaged(paths)
    assert text.startswith(f"{named(paths[0])} and {named(paths[1])} are not of one model: ")
    assert "classifier" in text


def test_other_dropout_is_the_same_model(tmp_path):
    one = hubmodels.export(ours(MLM), tmp_path / "one")
    other = hubmodels.export(ours(MLM, hidden_dropout_prob=0.3), tmp_path / "other")
    hubmodels.average([one, other], tmp_path / "out")
    assert loaded(MLM, tmp_path / "out").config.hidden_dropout_prob == 0.1


def test_the_third_is_checked_as_the_second(three, tmp_path):
    other = hubmodels.export(ours(MLM, vocab_size=V + 1), tmp_path / "other")
    assert not_averaged([three[0], three[1], other]).endswith(f"vocab_size = {V} and {V + 1}")


# diff


def test_dialects_do_not_matter(tmp_path):
    forms = [TENSORFLOW / kind for kind in ("one", "three", "objects")]
    forms.append(hubmodels.export(hubmodels.bertForPreTraining(TENSORFLOW / "one"), tmp_path / "hf"))
    hubmodels.convert(TENSORFLOW / "one", tmp_path / "native", form="native")
    hubmodels.convert(TENSORFLOW / "one", tmp_path / "parts", max_file_size="3KB")
    forms += [tmp_path / "native", tmp_path / "parts"]
    for other in forms[1:]:
        assert_equal_checkpoints(forms[0], other)
        assert_equal_checkpoints(other, forms[0])


def differing(tmp_path: Path, change: Callable[[torch.nn.Module], object], name: str = MLM, form: str = "native"):
    """The rows that are not equal, after a change of the second"""
    model = ours(name)
    one = hubmodels.export(model, tmp_path / "one")
    with torch.no_grad():
        made = change(model)
    other = hubmodels.export(made if isinstance(made, torch.nn.Module) else model, tmp_path / "other", form=form)
    found = hubmodels.diff(one, other)
    assert found.is_equal == (not found.config and all(each.is_equal for each in found.differences))
    return {each.name: each for each in found.differences if not each.is_equal}, found


def test_the_largest_and_the_relative_difference_by_hand(tmp_path):
    """Of 3, 4 and 0 …: moved by -1 in the first and by 2 in the third, sqrt(5) of 5."""

    def change(model):
        bias = model.head.bias
        bias.zero_()
        bias[:2] = torch.tensor([3.0, 4.0])
        hubmodels.export(model, tmp_path / "one")
        bias[0] -= 1
        bias[2] += 2

    found, whole = differing(tmp_path, change)
    assert found.keys() == {"head.bias"}
    row = found["head.bias"]
    assert (row.largest, row.shapes) == (2.0, ((V,), (V,)))
    assert row.relative == pytest.approx(math.sqrt(5) / 5, rel=1e-12)
    assert not whole.is_equal
    assert whole.config == {}


def test_the_last_bit_is_a_difference(tmp_path):
    def change(model):
        bias = model.head.bias.view(torch.int32)
        bias[5] += 1

    found, _ = differing(tmp_path, change)
    assert found.keys() == {"head.bias"}
    assert 0 < found["head.bias"].largest < 1e-6


def test_a_difference_from_nothing_is_without_measure(tmp_path):
    def change(model):
        model.head.bias.zero_()
        hubmodels.export(model, tmp_path / "one")
        model.head.bias[3] = 0.5

    found, _ = differing(tmp_path, change)
    assert (found["head.bias"].largest, found["head.bias"].relative) == (0.5, math.inf)


def test_what_is_not_finite_is_equal_to_itself(tmp_path):
    assert hubmodels.diff(*(with_odd_numbers(tmp_path / name, 1) for name in ("one", "other"))).is_equal


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf), (math.inf, 1.0)])
def test_what_is_not_finite_is_different_from_all_else(values, tmp_path):
    def change(model):
        model.head.bias[1] = values[0]
        hubmodels.export(model, tmp_path / "one")
        model.head.bias[1] = values[1]

    found, _ = differing(tmp_path, change)
    assert found.keys() == {"head.bias"}


def test_a_nan_on_both_sides_does_not_hide_the_relative_difference(tmp_path):
    def change(model):
        model.head.bias.fill_(1.0)
        model.head.bias[0] = math.nan
        hubmodels.export(model, tmp_path / "one")
        model.head.bias[1] = 2.0

    found, _ = differing(tmp_path, change)
    assert found["head.bias"].largest == 1.0
    assert found["head.bias"].relative == pytest.approx(1 / math.sqrt(V - 1))


def test_another_vocabulary_is_another_shape(tmp_path):
    found, whole = differing(tmp_path, lambda model: hubmodels.resize_vocabulary(model, V + 3))
    assert {name: each.shapes for name, each in found.items()} == {
        WORD: ((V, D), (V + 3, D)),
        "head.bias": ((V,), (V + 3,)),
    }
    assert {each.largest for each in found.values()} == {math.inf}
    assert whole.config == {"vocab_size": (V, V + 3)}


def test_parameters_of_one_alone(tmp_path):
    one = hubmodels.export(ours("BertModel"), tmp_path / "one")
    state = ours("BertModel").state_dict()
    model = ours(MLM)
    model.transformer.load_state_dict({k: t for k, t in state.items() if not k.startswith("pooler")})
    other = hubmodels.export(model, tmp_path / "other")
    rows = {each.name: each.shapes for each in hubmodels.diff(one, other).differences if not each.is_equal}
    assert rows == {
        "pooler.weight": ((D, D), None),
        "pooler.bias": ((D,), None),
        "head.bias": (None, (V,)),
        "head.dense.weight": (None, (D, D)),
        "head.dense.bias": (None, (D,)),
        "head.norm.weight": (None, (D,)),
        "head.norm.bias": (None, (D,)),
    }


def test_configs_that_differ(tmp_path):
    one = hubmodels.export(ours("GPT2LMHeadModel"), tmp_path / "one")
    other = hubmodels.export(ours("GPT2LMHeadModel", layer_norm_epsilon=1e-3, n_inner=4 * D), tmp_path / "other")
    found = hubmodels.diff(one, other)
    assert found.config == {"layer_norm_epsilon": (1e-5, 1e-3), "n_inner": (None, 4 * D)}
    assert all(each.is_equal for each in found.differences)
    assert not found.is_equal


def test_names_of_the_manifest(tmp_path):
    hubmodels.convert("bert-nano", tmp_path)
    assert_equal_checkpoints("bert-nano", tmp_path)
    model = hubmodels.bertForPreTraining("bert-nano")
    with torch.no_grad():
        model.next_sentence.bias[0] += 1
    hubmodels.export(model, tmp_path)
    rows = [each for each in hubmodels.diff("bert-nano", tmp_path).differences if not each.is_equal]
    assert [(each.name, each.largest) for each in rows] == [("next_sentence.bias", 1.0)]


# NAME@TAG


def other_copy(root: Path, name: str = "bert-nano", old: str = "bert-nano", spoil: bool = False) -> Path:
    """Another version of this repository: its manifest has one entry, `name`, whose classifier of sentences and whose
    vocabulary are others."""
    inside = root / "hubmodels" / "weights" / old
    shutil.copytree(REPOSITORY / "hubmodels" / "weights" / old, inside)
    content = json.loads((REPOSITORY / "weights_manifest.json").read_text(encoding="utf-8"))
    entry = content["weights"][old]
    state = safetensors.torch.load_file(inside / "model.safetensors")
    state["cls.predictions.bias"][7] += 0.5
    safetensors.torch.save_file(state, inside / "model.safetensors", {"format": "pt"})
    words = (inside / "vocab.txt").read_text(encoding="utf-8").replace("\nship\n", "\nshyp\n")
    assert "\nshyp\n" in words
    (inside / "vocab.txt").write_text(words, encoding="utf-8")
    for file in entry["files"]:
        data = (root / file["filename"]).read_bytes()
        file |= {"size": len(data), "sha256": sha256(data).hexdigest()}
    content["weights"] = {name: entry}
    (root / "weights_manifest.json").write_text(json.dumps(content), encoding="utf-8")
    if spoil:
        (inside / "model.safetensors").write_bytes(b"x" * entry["files"][0]["size"])
    return root


@pytest.fixture
def hub_dir(tmp_path) -> Path:
    """torch.hub's directory, with a copy of version v9"""
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path / "hub")
    other_copy(tmp_path / "hub" / "someone_hubmodels_v9")
    yield tmp_path / "hub"
    torch.hub._hub_dir = before


@pytest.mark.parametrize("by", ["tag", "directory"])
def test_weights_as_another_version_has_them(by, hub_dir, tmp_path):
    version = "v9" if by == "tag" else str(hub_dir / "someone_hubmodels_v9")
    found = hubmodels.diff("bert-nano", f"bert-nano@{version}")
    assert [(each.name, each.largest) for each in found.differences if not each.is_equal] == [("head.bias", 0.5)]
    hubmodels.convert(f"bert-nano@{version}", tmp_path / "out")
    assert_equal_checkpoints(f"bert-nano@{version}", tmp_path / "out")


def test_the_tokenizer_is_of_that_version_too(hub_dir, tmp_path):
    hubmodels.convert("bert-nano@v9", tmp_path / "out")
    assert hubmodels.bertTokenizer("bert-nano").tokenize("ship") == ["ship"]
    assert hubmodels.bertTokenizer(tmp_path / "out").tokenize("shyp") == ["shyp"]


def test_a_name_that_only_that_version_has(tmp_path):
    root = other_copy(tmp_path / "copy", name="bert-gone")
    rows = hubmodels.diff("bert-nano", f"bert-gone@{root}").differences
    assert [each.name for each in rows if not each.is_equal] == ["head.bias"]
    hubmodels.convert(f"bert-gone@{root}", tmp_path / "out")
    assert_equal_checkpoints(f"bert-gone@{root}", tmp_path / "out")


def test_a_file_of_that_version_that_is_not_what_was_pinned(tmp_path):
    root = other_copy(tmp_path / "copy", spoil=True)
    with pytest.raises(StoreError) as caught:
        hubmodels.diff("bert-nano", f"bert-nano@{root}")
    assert str(root / "hubmodels" / "weights" / "bert-nano" / "model.safetensors") in str(caught.value)


def version_refused(weights: str) -> str:
    with pytest.raises(CatalogError) as caught:
        hubmodels.diff("bert-nano", weights)
    return str(caught.value)


def test_versions_that_are_not_there(hub_dir, tmp_path):
    advice = 'torch.hub.load("OWNER/hubmodels:v8", "catalog") brings it, and a directory may be named too'
    said = f"v8: expected one copy of this repository, got none in {hub_dir}; {advice}"
    assert version_refused("bert-nano@v8") == said
    (hub_dir / "someone_hubmodels_v8").mkdir()  # without a manifest
    assert version_refused("bert-nano@v8") == said
    text = version_refused(f"bert-nano@{tmp_path}")
    assert text.startswith(f"{tmp_path}: expected one copy of this repository, got none in ")


def test_several_copies_of_a_version(hub_dir):
    other_copy(hub_dir / "another_hubmodels_v9")
    roots = ", ".join(str(hub_dir / f"{owner}_hubmodels_v9") for owner in ("another", "someone"))
    text = version_refused("bert-nano@v9")
    assert text.startswith(f"v9: expected one copy of this repository, got {roots} in {hub_dir}; ")


def test_a_pattern_is_no_version(hub_dir):
    for version in ("v*", "?9", "[v]9", "*"):
        assert version_refused(f"bert-nano@{version}").startswith(f"{version}: expected one copy of this repository")


def test_a_name_that_that_version_has_not(hub_dir):
    said = f"{hub_dir / 'someone_hubmodels_v9'}: its manifest has no gpt-nano; there are bert-nano"
    assert version_refused("gpt-nano@v9") == said


def test_a_directory_of_the_tags_name_that_is_no_copy(hub_dir, tmp_path, monkeypatch):
    """It does not stand before what torch.hub has."""
    (tmp_path / "here" / "v9").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    rows = hubmodels.diff("bert-nano", "bert-nano@v9").differences
    assert [each.name for each in rows if not each.is_equal] == ["head.bias"]


def test_a_branch_with_a_slash(hub_dir):
    """torch.hub writes feature/x as feature_x."""
    (hub_dir / "someone_hubmodels_v9").rename(hub_dir / "someone_hubmodels_feature_x")
    rows = hubmodels.diff("bert-nano", "bert-nano@feature/x").differences
    assert [each.name for each in rows if not each.is_equal] == ["head.bias"]


def test_a_path_with_an_at_sign_is_a_path(tmp_path):
    source = published(MLM, tmp_path / "bert@v9")
    assert_equal_checkpoints(str(source), source)


def test_no_version_after_the_at_sign(hub_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert version_refused("bert-nano@")


def test_families_of_the_key_maps():
    """What this file goes through are all that there are."""
    assert set(conversion.ENTRY_POINTS) == {bert.FAMILY.name, gpt.FAMILY.name, gpt2.FAMILY.name}
    classes = {cls for entries in conversion.ENTRY_POINTS.values() for cls in entries.classes}
    assert {cls.architecture or cls.__name__ for cls in classes} == set(NAMES)
    assert issubclass(InputError, HubModelsError)
