"""Models -> files: transformers loads them in silence with the same numbers, and nothing is lost when writing fails."""

import copy
import functools
import json
import logging
import os
import stat
import warnings
from contextlib import contextmanager
from pathlib import Path

import gpt_reference
import pytest
import reference
import safetensors.torch
import torch
import transformers
from conftest import SHARED
from safetensors import safe_open
from torch import Tensor

import hubmodels
from hubmodels import saving
from hubmodels.errors import HubModelsError, InputError
from hubmodels.families import bert
from hubmodels.tokenizers import BytePairTokenizer, Tokenizer, WordPieceTokenizer

NAMES = (*reference.NAMES, *gpt_reference.NAMES)
ENTRIES = {name: f"b{name[1:]}" for name in reference.NAMES} | {
    "OpenAIGPTModel": "gptModel",
    "OpenAIGPTLMHeadModel": "gpt",
    "OpenAIGPTDoubleHeadsModel": "gptDoubleHeads",
    "GPT2Model": "gpt2Model",
    "GPT2LMHeadModel": "gpt2",
}
MLM, LABELLED = "BertForMaskedLM", "BertForSequenceClassification"
SMALL = ["config.json", "model.safetensors"]
VOCABULARIES = SHARED / "data" / "vocab"
TEXTS = [
    "The ship sailed across the unaffable sea, 42.5 km!",
    "Ünïcödé naïve café — “quoted” don't we'll I'M",
    "国破山河在, 城春草木深 ok 🙂 привет",
    "a\tb\nc  d   e",
    "[MASK] <unk> x<|endoftext|>y antidisestablishmentarianism",
    "0123456789 supercalifragilistic/expialidocious_snake_case@mail.example",
]


# What other files of tests take from here


@functools.cache
def _pair(name: str, dtype: torch.dtype, options: tuple) -> tuple[torch.nn.Module, torch.nn.Module]:
    made = reference if name in reference.NAMES else gpt_reference
    return made.pair(name, dtype, **dict(options))


def pair(name: str, dtype: torch.dtype = torch.float64, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, theirs) of transformers' class `name`, equal in every parameter, to do with as one likes."""
    return copy.deepcopy(_pair(name, dtype, tuple(sorted(options.items()))))


def ours(name: str, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    return copy.deepcopy(_pair(name, dtype, tuple(sorted(options.items())))[0])


def loaded(name: str, directory: Path, **options) -> torch.nn.Module:
    """By the entry point of that class of ours; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(hubmodels, ENTRIES[name])(directory, **options)


@torch.no_grad()
def results(model: torch.nn.Module, name: str) -> list[Tensor]:
    """Every output that a class has, for rows without padding."""
    if name in reference.NAMES:
        out = model(**reference.inputs_of(name, "none"))
    else:
        inputs = gpt_reference.inputs_of(name, "none")
        theirs = isinstance(model, transformers.PreTrainedModel)
        out = gpt_reference.call(model, name, **inputs) if theirs else model(**inputs)
    fields = ("last_hidden_state", "pooler_output", "logits", "mc_logits", "prediction_logits")
    fields += ("seq_relationship_logits", "start_logits", "end_logits")
    return [getattr(out, field) for field in fields if getattr(out, field, None) is not None]


def assert_same_results(one: torch.nn.Module, other: torch.nn.Module, name: str) -> None:
    got, want = results(one, name), results(other, name)
    assert len(got) == len(want) >= 1
    assert all(reference.distance(a, b) <= 1e-10 for a, b in zip(got, want, strict=True))


def bits(tensor: Tensor) -> bytes:
    """nan is itself here, and -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_bit_equal(got, want) -> None:
    """Of two models, or of two dicts of tensors."""
    got, want = (x.state_dict() if isinstance(x, torch.nn.Module) else dict(x) for x in (got, want))
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert bits(got[name]) == bits(want[name]), name


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """Of all files of safetensors in a directory"""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def as_usual(named: dict) -> dict:
    """Of the two names of a tied matrix transformers writes the second for OpenAIGPTDoubleHeadsModel alone."""
    moved = {"lm_head.weight": "transformer.tokens_embed.weight"}
    return {moved.get(key, key): value for key, value in named.items()}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too, and every directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"directory"
        for path in directory.rglob("*")
    }


@contextmanager
def silence(capfd):
    """Nothing inside may be said: no log of transformers', no Python warning, nothing on standard output or error."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    logging.Logger.warning_once.cache_clear()  # what was said once, outside, would be said in silence again
    logger.addHandler(handler)
    capfd.readouterr()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.removeHandler(handler)
        transformers.utils.logging.enable_progress_bar()
    text = "\n".join([*said, *(str(warning.message) for warning in caught), *capfd.readouterr()])
    assert text.strip() == "", text


def word_piece(name: str) -> WordPieceTokenizer:
    path = VOCABULARIES / name / "vocab.txt"
    if not path.is_file():
        pytest.skip("no vocabularies beside this checkout")
    return hubmodels.bertTokenizer(path)


def byte_pairs(name: str) -> BytePairTokenizer:
    files = {"gpt1": ("encoder_bpe_40000.json", "vocab_40000.bpe"), "gpt2": ("encoder.json", "vocab.bpe")}[name]
    if not (VOCABULARIES / name / files[0]).is_file():
        pytest.skip("no vocabularies beside this checkout")
    return BytePairTokenizer.from_files(*(VOCABULARIES / name / file for file in files))


def tokenizer_named(name: str) -> Tokenizer:
    """Of shared data, or of this repository's own weights."""
    if name.startswith("bert-base"):
        return word_piece(name)
    if name in ("gpt1", "gpt2"):
        return byte_pairs(name)
    return hubmodels.bertTokenizer(name) if name == "bert-nano" else hubmodels.gptTokenizer(name)


def ids_in_transformers(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


# transformers


def test_silence_hears_what_transformers_says(tmp_path, capfd):
    """The report of what is missing, which is no Python warning."""
    hubmodels.export(ours("BertModel"), tmp_path)
    with pytest.raises(AssertionError, match="LOAD REPORT"):
        with silence(capfd):
            transformers.BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_an_export_in_silence_with_equal_results(name, tmp_path, capfd):
    model, _ = pair(name)
    assert hubmodels.export(model, tmp_path / "out") == tmp_path / "out"
    with silence(capfd):
        theirs = getattr(transformers, name).from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float64
    assert_same_results(model, theirs.eval(), name)
    with silence(capfd):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is getattr(transformers, name).config_class
    assert config.architectures == [name]


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_again_is_what_was_exported(name, tmp_path, capfd):
    """Their names, all of them and no more, and every bit."""
    hubmodels.export(ours(name), tmp_path / "out")
    with silence(capfd):
        getattr(transformers, name).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    assert_bit_equal(tensors_in(tmp_path / "out"), as_usual(tensors_in(tmp_path / "theirs")))


@pytest.mark.parametrize("form", ["hf", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_equal(name, form, tmp_path):
    model = ours(name)
    hubmodels.export(model, tmp_path / "out", form=form)
    back = loaded(name, tmp_path / "out")
    assert_bit_equal(back, model)
    assert (back.config, type(back)) == (model.config, type(model))
    assert back.provenance.dialect == {"hf": "huggingface", "native": "native"}[form]
    assert back.provenance.report.is_complete
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [name]


@pytest.mark.parametrize("form", ["hf", "native"])
def test_every_bit_pattern_comes_back(form, tmp_path):
    """nan, infinities, -0.0 and numbers below the normal ones."""
    model = ours(MLM)
    with torch.no_grad():
        for parameter in model.parameters():
            odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, -1e-45])
            parameter.view(-1)[:6] = odd[: parameter.numel()]
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hubmodels.export(model, tmp_path, form=form)
    assert_bit_equal(loaded(MLM, tmp_path), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["hf", "native"])
def test_the_dtype_is_kept(dtype, form, tmp_path, capfd):
    model = ours(MLM, dtype)
    hubmodels.export(model, tmp_path, form=form)
    assert {tensor.dtype for tensor in tensors_in(tmp_path).values()} == {dtype}
    assert_bit_equal(loaded(MLM, tmp_path, dtype=dtype), model)
    if form == "hf":
        with silence(capfd):
            assert transformers.BertForMaskedLM.from_pretrained(tmp_path).dtype == dtype


@pytest.mark.parametrize("changes", gpt_reference.VARIANTS)
def test_every_variant_of_gpt2_is_in_its_config(changes, tmp_path, capfd):
    model, _ = pair("GPT2LMHeadModel", **changes)
    hubmodels.export(model, tmp_path)
    with silence(capfd):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_results(model, theirs, "GPT2LMHeadModel")
    assert loaded("GPT2LMHeadModel", tmp_path).config == model.config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (MLM, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "pad_token_id": 5, "classifier_dropout": 0.25}),
        ("OpenAIGPTLMHeadModel", {"afn": "silu", "layer_norm_epsilon": 1e-3, "resid_pdrop": 0.3}),
        ("OpenAIGPTLMHeadModel", {"afn": "gelu"}),
        ("GPT2LMHeadModel", {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "embd_pdrop": 0.3}),
    ],
)
def test_a_config_that_is_not_the_default(name, changes, tmp_path, capfd):
    model, _ = pair(name, **changes)
    hubmodels.export(model, tmp_path)
    with silence(capfd):
        theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    assert {key: getattr(theirs.config, key) for key in changes} == changes
    assert_same_results(model, theirs, name)
    assert loaded(name, tmp_path).config == model.config


def test_a_part_of_a_model_is_a_model(tmp_path, capfd):
    """The encoder of a masked language model has no pooler."""
    model = ours(MLM, torch.float64)
    hubmodels.export(model.transformer, tmp_path)
    with silence(capfd):
        theirs = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert_same_results(model.transformer, theirs, "BertModel")


def test_frozen_and_training_models_are_written_as_any(tmp_path):
    model = ours(MLM).train().requires_grad_(False)
    hubmodels.export(model, tmp_path)
    assert_bit_equal(loaded(MLM, tmp_path), model)
    assert model.training


# What config.json says beyond the forward pass

LABELS = {"id2label": {str(i): f"Klasse {i} ä" for i in range(reference.LABELS)}}
LABELS |= {"label2id": {label: int(i) for i, label in LABELS["id2label"].items()}}


def labelled(directory: Path, name: str = LABELLED, **said) -> Path:
    """What transformers saves of a classifier, whose config.json says more."""
    pair(name)[1].save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}), encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", [LABELLED, "BertForTokenClassification"])
def test_labels_have_the_names_that_they_had(name, tmp_path, capfd):
    source = labelled(tmp_path / "source", name, **LABELS, problem_type="multi_label_classification")
    hubmodels.export(loaded(name, source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in LABELS} == LABELS
    assert config["problem_type"] == "multi_label_classification"
    assert "Klasse 0 ä" in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    with silence(capfd):
        theirs = getattr(transformers, name).from_pretrained(tmp_path / "out").config
    assert theirs.id2label == {int(i): label for i, label in LABELS["id2label"].items()}
    assert (theirs.label2id, theirs.num_labels) == (LABELS["label2id"], reference.LABELS)
    assert theirs.problem_type == "multi_label_classification"


def test_names_of_other_labels_than_the_head_has_are_not_kept(tmp_path):
    source = labelled(tmp_path / "source", **LABELS)
    hubmodels.export(hubmodels.bertForSequenceClassification(source, num_labels=3, head_seed=0), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert loaded(LABELLED, tmp_path / "out").classifier.out_features == 3


def test_a_model_without_labels_has_no_names_of_them(tmp_path):
    source = labelled(tmp_path / "source", **LABELS)
    hubmodels.export(loaded("BertModel", source), tmp_path / "out")
    assert "Klasse" not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_a_model_that_was_never_loaded_numbers_its_labels(tmp_path):
    hubmodels.export(bert.BertForTokenClassification(bert.BertConfig(**reference.SIZES), num_labels=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(4)}


def test_ids_of_special_tokens_are_kept(tmp_path):
    source = tmp_path / "source"
    pair("GPT2LMHeadModel")[1].save_pretrained(source)
    path = source / "config.json"
    said = {"bos_token_id": 3, "eos_token_id": 4, "task_specific_params": {"text-generation": {"max_length": 9}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    hubmodels.export(loaded("GPT2LMHeadModel", source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in said} == said


# Tokenizers

KINDS = ["bert-base-uncased", "bert-base-cased", "bert-base-chinese", "bert-base-multilingual-cased"]
KINDS += ["gpt1", "gpt2", "bert-nano", "gpt-nano"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_tokenizer_as_it_is(kind, tmp_path, capfd):
    tokenizer = tokenizer_named(kind)
    family = MLM if kind.startswith("bert") else "OpenAIGPTLMHeadModel" if kind == "gpt1" else "GPT2LMHeadModel"
    hubmodels.export(ours(family), tmp_path, tokenizer)
    with silence(capfd):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        rows = [ids_in_transformers(theirs, text) for text in TEXTS]
    assert rows == [tokenizer(text)["input_ids"][0].tolist() for text in TEXTS]
    if family == MLM:
        both = tokenizer(TEXTS[0], TEXTS[1])
        assert {key: both[key][0].tolist() for key in both} == dict(theirs(TEXTS[0], TEXTS[1]))
    back = hubmodels.bertTokenizer(tmp_path) if family == MLM else hubmodels.gptTokenizer(tmp_path)
    assert type(back) is type(tokenizer)
    assert [back(text)["input_ids"][0].tolist() for text in TEXTS] == rows
    assert [back.decode(row) for row in rows] == [tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_alone_says_the_same(kind, tmp_path):
    """transformers of before tokenizer.json reads vocab.txt, or vocab.json and merges.txt."""
    tokenizer = tokenizer_named(kind)
    tokenizer.save_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    family = "gpt" if kind.startswith("gpt") else "bert"
    back = getattr(hubmodels, f"{family}Tokenizer")(tmp_path)
    assert [back(text)["input_ids"][0].tolist() for text in TEXTS] == [
        tokenizer(text)["input_ids"][0].tolist() for text in TEXTS
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["tokenizer_config.json", *(["vocab.txt"] if family == "bert" else ["merges.txt", "vocab.json"])]
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lower_case": False, "strip_accents": False, "split_chinese": True}, "Ünï Naïve 国破"),
        ({"lower_case": True, "strip_accents": False, "split_chinese": True}, "Ünï Naïve 国破"),
        ({"lower_case": False, "strip_accents": True, "split_chinese": False}, "Ünï Naïve 国破"),
        ({"lower_case": True, "strip_accents": None, "split_chinese": False}, "Ünï Naïve 国破"),
    ],
)
def test_how_a_vocabulary_is_used_is_kept(settings, text, tmp_path, capfd):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ünï", "ünï", "uni", "Uni", "Naïve", "naïve", "naive"]
    words += ["Naive", "国", "破", "国破"]
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer.from_vocab(tmp_path / "words.txt", **settings)
    (tmp_path / "out").mkdir()
    hubmodels.export(ours(MLM), tmp_path / "out", tokenizer)
    want = tokenizer(text)["input_ids"][0].tolist()
    assert 1 not in want
    with silence(capfd):
        assert ids_in_transformers(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), text) == want
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert hubmodels.bertTokenizer(tmp_path / "out")(text)["input_ids"][0].tolist() == want


def test_add_prefix_space_is_kept(tmp_path, capfd):
    files = Path(hubmodels.__file__).parent / "weights" / "gpt-nano"
    tokenizer = BytePairTokenizer.from_files(files / "vocab.json", files / "merges.txt", add_prefix_space=True)
    hubmodels.export(ours("GPT2LMHeadModel"), tmp_path, tokenizer)
    want = tokenizer("ship ahoy")["input_ids"][0].tolist()
    assert want != hubmodels.gptTokenizer("gpt-nano")("ship ahoy")["input_ids"][0].tolist()
    with silence(capfd):
        assert ids_in_transformers(transformers.AutoTokenizer.from_pretrained(tmp_path), "ship ahoy") == want
    (tmp_path / "tokenizer.json").unlink()
    assert hubmodels.gptTokenizer(tmp_path)("ship ahoy")["input_ids"][0].tolist() == want


# Several files


def sizes(model: torch.nn.Module) -> dict[str, int]:
    prefixed = hasattr(model, "transformer")
    return {key: t.nbytes for key, t in model.family.keys.dump(model.state_dict(), prefixed).items()}


@pytest.mark.parametrize("name", [MLM, "BertModel", "OpenAIGPTDoubleHeadsModel", "GPT2LMHeadModel"])
@pytest.mark.parametrize("most", ["20KB", 5000])
def test_above_the_size_there_are_several_files_with_an_index(name, most, tmp_path, capfd):
    model, theirs = pair(name)
    hubmodels.export(model, tmp_path / "out", max_file_size=most)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    got, want = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in ("out", "theirs"))
    assert got.keys() == want.keys()
    assert got["metadata"]["total_size"] == want["metadata"]["total_size"] == sum(sizes(model).values())
    assert got["weight_map"].keys() == as_usual(want["weight_map"]).keys()
    files = sorted(set(got["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", *files]
    )
    limit = 20_000 if most == "20KB" else most
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as held:
            keys = list(held.keys())
            assert held.metadata() == {"format": "pt"}
        assert {key for key, place in got["weight_map"].items() if place == file} == set(keys)
        size = sum(sizes(model)[key] for key in keys)
        assert keys
        assert size <= limit or len(keys) == 1
    with silence(capfd):
        back = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    assert_same_results(model, back, name)
    assert_bit_equal(loaded(name, tmp_path / "out", dtype=torch.float64), model)
    assert_bit_equal(loaded(name, tmp_path / "out" / "model.safetensors.index.json", dtype=torch.float64), model)


def test_a_limit_below_every_tensor_gives_each_its_own_file(tmp_path, capfd):
    model = ours(MLM, torch.float64)
    hubmodels.export(model, tmp_path, max_file_size=1)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(sizes(model))
    assert [len(safetensors.torch.load_file(file)) for file in files] == [1] * len(files)
    with silence(capfd):
        theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert_same_results(model, theirs, MLM)


def test_one_tensor_above_the_limit_is_alone_and_the_others_are_not(tmp_path):
    model = ours(MLM)
    largest = max(sizes(model).values())
    hubmodels.export(model, tmp_path, max_file_size=largest - 1)
    held = [list(safetensors.torch.load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert ["bert.embeddings.word_embeddings.weight"] in held
    assert 2 < len(held) < 20
    assert_bit_equal(loaded(MLM, tmp_path), model)


def test_the_limit_itself_is_still_one_file(tmp_path):
    model = ours(MLM)
    whole = sum(sizes(model).values())
    hubmodels.export(model, tmp_path / "one", max_file_size=whole)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == SMALL
    hubmodels.export(model, tmp_path / "two", max_file_size=whole - 1)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


def test_native_weights_are_one_file_whatever_the_limit(tmp_path):
    hubmodels.export(ours(MLM), tmp_path, form="native", max_file_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "hubmodels.safetensors"]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("5MB", 5_000_000),
        ("5 mb", 5_000_000),
        ("0.5KB", 500),
        ("1.5GB", 1_500_000_000),
        ("7B", 7),
        ("2TB", 2 * 10**12),
        (1, 1),
        ("3000", 3000),
    ],
)
def test_sizes(size, count):
    """The last is what the command is given for a number of bytes."""
    assert saving._bytes(size) == count


@pytest.mark.parametrize(
    "size", [0, -1, 1.5, True, None, "", "5 gigabytes", "GB", "-5MB", "0B", "0.1B", "5MiB", "1e3B", "nanB", b"5MB"]
)
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(InputError) as caught:
        hubmodels.export(ours(MLM), tmp_path / "out", max_file_size=size)
    assert str(caught.value) == f"max_file_size = {size!r}: expected a number of bytes, or such as 5GB"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["pt", "", None, "HF"])
def test_forms_that_are_none(form, tmp_path):
    with pytest.raises(InputError) as caught:
        hubmodels.export(ours(MLM), tmp_path / "out", form=form)
    assert str(caught.value) == f"form = {form!r}: expected hf or native"
    assert not (tmp_path / "out").exists()


# Over what was there

FORMS = {
    "whole": {},
    "native": {"form": "native"},
    "few": {"max_file_size": "30KB"},
    "many": {"max_file_size": "5KB"},
}


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_nothing_of_an_older_export_is_left(before, after, tmp_path, capfd):
    old, new = ours(MLM, seed=1), ours(MLM, seed=2)
    hubmodels.export(old, tmp_path / "out", **FORMS[before])
    hubmodels.export(new, tmp_path / "out", **FORMS[after])
    hubmodels.export(new, tmp_path / "fresh", **FORMS[after])
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")
    assert_bit_equal(loaded(MLM, tmp_path / "out"), new)
    if after != "native":
        with silence(capfd):
            theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
        table = theirs.bert.embeddings.word_embeddings.weight
        assert torch.equal(table, new.transformer.embeddings.word.weight)


def test_what_is_none_of_ours_stays(tmp_path):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    kept = {
        "README.md": "read",
        "notes-model.safetensors": "x",
        "model.safetensors.bak": "y",
        "runs/model.safetensors": "z",
    }
    kept |= {"pytorch_model.bin": "old", "model-1-of-2.safetensors": "w", ".hidden": "h"}
    for name, text in kept.items():
        (out / name).write_text(text)
    for options in FORMS.values():
        hubmodels.export(ours(MLM), out, **options)
        assert {name: (out / name).read_text() for name in kept} == kept
    assert_bit_equal(loaded(MLM, out), ours(MLM))  # model.safetensors goes before pytorch_model.bin


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    """As in the cache of Hugging Face's hub, whose files are links to its blobs."""
    blob, out = tmp_path / "blob", tmp_path / "out"
    blob.write_bytes(b"somebody else's")
    out.mkdir()
    (out / "model.safetensors").symlink_to(blob)
    hubmodels.export(ours(MLM), out)
    assert blob.read_bytes() == b"somebody else's"
    assert not (out / "model.safetensors").is_symlink()
    assert_bit_equal(loaded(MLM, out), ours(MLM))


@pytest.mark.parametrize("form", FORMS)
def test_every_file_can_be_read_by_all(form, tmp_path):
    mask = os.umask(0o022)
    try:
        hubmodels.export(ours(MLM), tmp_path / "out", hubmodels.bertTokenizer("bert-nano"), **FORMS[form])
    finally:
        os.umask(mask)
    paths = list((tmp_path / "out").iterdir())
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths} == {p.name: "0o644" for p in paths}
    assert len(paths) >= 5


@pytest.mark.parametrize("form", ["whole", "native", "few"])
@pytest.mark.parametrize("was", ["whole", "native", "few"])
def test_a_model_goes_over_the_files_that_it_is_mapped_from(was, form, tmp_path):
    hubmodels.export(ours(MLM), tmp_path, **FORMS[was])
    model = loaded(MLM, tmp_path)
    with torch.no_grad():
        model.head.bias.add_(1)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hubmodels.export(model, tmp_path, **FORMS[form])
    assert_bit_equal(model, want)
    assert_bit_equal(loaded(MLM, tmp_path), want)


# What goes wrong


class Stop(Exception):
    """No error of the package's"""


def break_at(monkeypatch, owner, name: str, number: int, error: BaseException):
    """The call of that number raises; those before it are made."""
    real, calls = getattr(owner, name), []

    def broken(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, broken)
    return calls


BREAKS = [
    *((safetensors.torch, "save_file", number) for number in (1, 2)),
    (Tokenizer, "save_files", 1),
    (WordPieceTokenizer, "_settings", 1),
    (saving, "_write_json", 1),
    (saving, "_write_json", 2),
    (json, "dumps", 1),
    (os, "fsync", 4),
    *((os, "replace", number) for number in (1, 2, 3, 5, 8)),
]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
@pytest.mark.parametrize(("owner", "name", "number"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_failure_changes_nothing(owner, name, number, error, monkeypatch, tmp_path):
    """Whatever fails, and wherever: the old directory is as it was, and a new one is not made."""
    tokenizer = hubmodels.bertTokenizer("bert-nano")
    old, new = ours(MLM, seed=1), ours(MLM, seed=2)
    hubmodels.export(old, tmp_path / "old", tokenizer)
    (tmp_path / "old" / "README.md").write_text("mine")
    before = snapshot(tmp_path)
    for directory in (tmp_path / "old", tmp_path / "a" / "b"):
        with monkeypatch.context() as patch:
            calls = break_at(patch, owner, name, number, error)
            with pytest.raises(type(error)) as caught:
                hubmodels.export(new, directory, tokenizer, max_file_size="30KB")
            assert error in (caught.value, caught.value.__cause__)
            assert len(calls) >= number
        assert snapshot(tmp_path) == before
    assert_bit_equal(loaded(MLM, tmp_path / "old"), old)


def test_a_failure_leaves_an_empty_directory_that_was_there(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    break_at(monkeypatch, safetensors.torch, "save_file", 1, Stop())
    with pytest.raises(Stop):
        hubmodels.export(ours(MLM), tmp_path / "there" / "a" / "b")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_later_export_ends_well_after_a_failed_one(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        break_at(patch, os, "replace", 1, Stop())
        with pytest.raises(Stop):
            hubmodels.export(ours(MLM), tmp_path / "out")
    hubmodels.export(ours(MLM), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == SMALL


def test_a_directory_that_cannot_be_one(tmp_path):
    """A file in its place, or above it: said as every other error is."""
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((HubModelsError, OSError)) as caught:
            hubmodels.export(ours(MLM), directory)
        assert "file" in str(caught.value)
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_what_safetensors_lacks_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    def lacks(*_):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("safetensors.torch.save_file", lacks)
    with pytest.raises(HubModelsError) as error:
        hubmodels.export(hubmodels.bertModel("bert-nano"), tmp_path / "out")
    assert str(error.value) == "model.safetensors: safetensors needs numpy to write: pip install numpy"
    assert not (tmp_path / "out").exists()
