"""From a name or a path to a model and back: what is loaded, what is said about it, and every error on the way."""

import hashlib
import json
import os
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_keymap import KEYS, NAMES, SIZES, assert_accounts, assert_equal, make, make_theirs
from test_store import REPO, REVISION, FakeHub

import hubmodels
from hubmodels import loading
from hubmodels.errors import CatalogError, CheckpointError, ConfigError, InputError, StoreError
from hubmodels.families import bert, gpt, gpt2

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
WITH_LABELS = ("BertForSequenceClassification", "BertForTokenClassification")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    "##s",
    "##t",
    "##u",
    ".",
    ",",
    "!",
]


def entry_point(name: str):
    return getattr(hubmodels, f"b{name[1:]}")


def inputs(name: str) -> dict[str, torch.Tensor]:
    shape = (2, 3, 8) if name == "BertForMultipleChoice" else (2, 8)
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], shape, generator=generator),
        "token_type_ids": torch.randint(0, SIZES["type_vocab_size"], shape, generator=generator),
    }


@torch.no_grad()
def outputs(model, name: str) -> dict[str, torch.Tensor]:
    result = model(**inputs(name))
    fields = {
        "BertModel": ["last_hidden_state", "pooler_output"],
        "BertForPreTraining": ["prediction_logits", "seq_relationship_logits"],
        "BertForQuestionAnswering": ["start_logits", "end_logits"],
    }.get(name, ["logits"])
    return {field: getattr(result, field) for field in fields}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for field in want:
        torch.testing.assert_close(got[field], want[field], atol=1e-5, rtol=1e-5)


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_checkpoint(directory: Path, name: str = "BertForMaskedLM", file: str = "model.safetensors", **config) -> Path:
    """A tiny checkpoint of ours under Hugging Face's names, and its config.json; `config` changes what that says."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    theirs = KEYS.dump(make(name).state_dict(), prefixed=name != "BertModel")
    if file.endswith(".safetensors"):
        save_file(theirs, directory / file, {"format": "pt"})
    else:
        torch.save(theirs, directory / file)
    labels = {"num_labels": 5} if name in WITH_LABELS else {}
    published = {"model_type": "bert", **SIZES, **labels, **config}
    (directory / "config.json").write_text(json.dumps(published), encoding="utf-8")
    return directory


@pytest.fixture
def words(tmp_path) -> Path:
    """The directory of a tiny masked language model."""
    return write_checkpoint(tmp_path / "words")


# --- Local checkpoints


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("given", ["directory", "file", "str", "file as str"])
def test_a_directory_or_a_file_of_it(file, given, tmp_path):
    directory = write_checkpoint(tmp_path / "words", file=file)
    path = directory / file if given.startswith("file") else directory
    model = hubmodels.bertForMaskedLM(str(path) if given.endswith("str") else path)
    assert_equal(tensors_of(model), make("BertForMaskedLM").state_dict())
    assert model.provenance.files[0].path == directory / file


def test_another_file_of_a_directory(words):
    torch.save(KEYS.dump(make("BertForMaskedLM", seed=9).state_dict(), True), words / "best.pt")
    model = hubmodels.bertForMaskedLM(words / "best.pt")
    assert_equal(tensors_of(model), make("BertForMaskedLM", seed=9).state_dict())


def test_safetensors_before_bin(words):
    torch.save({"nothing": torch.ones(1)}, words / "pytorch_model.bin")
    assert hubmodels.bertForMaskedLM(words).provenance.files[0].path.name == "model.safetensors"


def test_a_name_wins_over_a_path_and_a_dot_forces_the_path(monkeypatch, tmp_path):
    write_checkpoint(tmp_path / "bert-tiny")
    monkeypatch.chdir(tmp_path)
    with loading.find_checkpoint("bert-tiny", bert.FAMILY) as found:
        assert found.config_source == "manifest entry bert-tiny"
    for path in ("./bert-tiny", Path("bert-tiny"), str(tmp_path / "bert-tiny")):
        with loading.find_checkpoint(path, bert.FAMILY) as found:
            assert found.published["hidden_size"] == SIZES["hidden_size"]
    model = hubmodels.bertForMaskedLM("./bert-tiny")
    assert_equal(tensors_of(model), make("BertForMaskedLM").state_dict())


def test_gamma_and_beta(tmp_path):
    directory = write_checkpoint(tmp_path / "old", file="pytorch_model.bin")
    content = torch.load(directory / "pytorch_model.bin")
    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for k, t in content.items()}
    assert "bert.embeddings.LayerNorm.gamma" in old
    torch.save(old, directory / "pytorch_model.bin")
    model = hubmodels.bertForMaskedLM(directory)
    assert_equal(tensors_of(model), make("BertForMaskedLM").state_dict())
    assert model.provenance.dialect == "huggingface-gamma-beta"


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_gives_the_same_outputs(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = entry_point(name)(tmp_path)
    assert_close(outputs(model, name), outputs(theirs, name))


def test_models_come_in_eval_mode_and_can_be_trained(words):
    model = hubmodels.bertForMaskedLM(words)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    before = (words / "model.safetensors").read_bytes()
    ids = inputs("BertForMaskedLM")["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert all(
        p.grad is not None for p in model.parameters() if p is not model.transformer.embeddings.token_type.weight
    )
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (words / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype, words):
    model = hubmodels.bertForMaskedLM(words, dtype=dtype)
    want = {name: tensor.to(dtype) for name, tensor in make("BertForMaskedLM").state_dict().items()}
    assert_equal(tensors_of(model), want)
    assert {p.dtype for p in hubmodels.bertForMaskedLM(words, dtype=dtype, pretrained=False).parameters()} == {dtype}


def test_a_half_precision_file_gives_single_precision(words):
    from safetensors.torch import load_file, save_file

    half = {key: tensor.half() for key, tensor in load_file(words / "model.safetensors").items()}
    save_file(half, words / "model.safetensors")
    model = hubmodels.bertForMaskedLM(words)
    want = {name: tensor.half().float() for name, tensor in make("BertForMaskedLM").state_dict().items()}
    assert_equal(tensors_of(model), want)
    assert {entry.dtype for entry in model.provenance.report.entries} == {"float16"}


def test_device(words):
    assert hubmodels.bertForMaskedLM(words, device="cpu").head.bias.device.type == "cpu"
    assert {p.device.type for p in hubmodels.bertForMaskedLM(words, device="meta").parameters()} == {"meta"}


# --- Options


def test_overrides_adjust_the_config(words):
    model = hubmodels.bertForMaskedLM(words, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0, hidden_act="relu")
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.3, 0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert model.transformer.layers[0].attention.dropout == 0
    assert model.transformer.layers[0].feed_forward.activation == "relu"
    assert hubmodels.bertForMaskedLM(words).config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize("option", ["hidden_size", "num_hidden_layers", "vocab_size", "pad_token_id", "nonsense"])
def test_an_option_that_would_change_shapes_or_is_unknown(option, words):
    with pytest.raises(InputError) as caught:
        hubmodels.bertForMaskedLM(words, **{option: 24})
    assert str(caught.value).startswith(f"unknown option {option}; options are attention_probs_dropout_prob, ")
    assert "head_seed" in str(caught.value)


def test_all_unknown_options_are_named(words):
    with pytest.raises(InputError, match=r"^unknown option force_reload, trust_repo; "):
        hubmodels.bertModel(words, trust_repo=True, force_reload=True)


def test_the_options_are_those_of_the_families():
    """The type that an editor shows, and what is taken."""
    adjustable = {name for family in (bert, gpt, gpt2) for name in family.FAMILY.config.ADJUSTABLE}
    assert set(loading.ModelOptions.__annotations__) == adjustable | set(loading.LoadOptions.__annotations__)


@pytest.mark.parametrize(("option", "value"), [("hidden_dropout_prob", 1.5), ("hidden_act", "swish9")])
def test_an_override_that_is_not_valid(option, value, words):
    with pytest.raises(ConfigError, match=rf"{option} = .*{value}"):
        hubmodels.bertForMaskedLM(words, **{option: value})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16"])
def test_a_dtype_that_no_parameter_can_have(dtype, words):
    with pytest.raises(InputError, match="dtype"):
        hubmodels.bertForMaskedLM(words, dtype=dtype)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_LABELS])
def test_num_labels_of_a_model_without_labels(name, tmp_path):
    with pytest.raises(InputError, match=rf"^num_labels = 3: {name} has no labels to number$"):
        entry_point(name)(write_checkpoint(tmp_path / "c"), num_labels=3)


def test_a_head_seed_of_a_model_without_a_head(words):
    with pytest.raises(InputError, match=r"^head_seed = 0: BertModel has no head to start anew$"):
        hubmodels.bertModel(words, head_seed=0)


def test_weights_are_a_name_or_a_path():
    with pytest.raises(InputError, match=r"^weights: expected a name or a path, got NoneType$"):
        hubmodels.bertModel(None)


@pytest.mark.parametrize("value", [0, -1, 2.0, "3"])
def test_num_labels_is_a_positive_number(value, words):
    with pytest.raises(InputError, match=r"num_labels = .*: expected a positive number"):
        hubmodels.bertForSequenceClassification(words, num_labels=value)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_another_number_of_labels_than_the_file_has(name, tmp_path):
    directory = write_checkpoint(tmp_path / "c", name)
    assert entry_point(name)(directory).classifier.out_features == 5
    with pytest.raises(CheckpointError) as caught:
        entry_point(name)(directory, num_labels=3)
    text = str(caught.value)
    assert text.startswith(f"{directory / 'model.safetensors'}: 2 of its tensors and the model do not fit:")
    assert "classifier.weight: expected [3, 12] for classifier.weight, got [5, 12]" in text
    assert "classifier.bias: expected [3] for classifier.bias, got [5]" in text
    assert "head_seed=0" in text
    model = entry_point(name)(directory, num_labels=3, head_seed=0)  # the way out that it names
    assert model.classifier.weight.shape == (3, 12)


@pytest.mark.parametrize("said", [{"num_labels": 4}, {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}])
def test_the_number_of_labels_is_what_config_json_says(said, tmp_path):
    directory = write_checkpoint(tmp_path / "c", **said)
    assert hubmodels.bertForTokenClassification(directory, head_seed=1).classifier.out_features == 4
    assert hubmodels.bertForTokenClassification(directory, head_seed=1, num_labels=6).classifier.out_features == 6


def test_without_a_number_of_labels_there_are_two(words):
    assert hubmodels.bertForSequenceClassification(words, head_seed=1).classifier.out_features == 2


# --- New heads


def test_head_seed_decides_the_head_and_nothing_else(words):
    def load(seed: int) -> dict[str, torch.Tensor]:
        return tensors_of(hubmodels.bertForTokenClassification(words, num_labels=3, head_seed=seed))

    first, again, other = load(7), load(7), load(8)
    assert_equal(first, again)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert all(torch.equal(first[name], other[name]) for name in first if name != "classifier.weight")
    assert first["classifier.bias"].eq(0).all()
    assert 0 < first["classifier.weight"].std() < 0.1


def test_head_seed_replaces_the_head_of_the_file(tmp_path):
    directory = write_checkpoint(tmp_path / "c", "BertForSequenceClassification")
    kept = hubmodels.bertForSequenceClassification(directory)
    new = hubmodels.bertForSequenceClassification(directory, head_seed=0)
    assert not torch.equal(kept.classifier.weight, new.classifier.weight)
    assert torch.equal(kept.transformer.pooler.weight, new.transformer.pooler.weight)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering", "BertForMaskedLM"])
@pytest.mark.parametrize("head_seed", [None, 3])
def test_loading_leaves_the_global_generator_alone(name, head_seed, words):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry_point(name)(words, head_seed=head_seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_the_file_lacks_warns_once_and_where(tmp_path):
    directory = write_checkpoint(tmp_path / "c", "BertModel")
    with pytest.warns(UserWarning, match="starts anew") as caught:
        model = hubmodels.bertForQuestionAnswering(directory)
    (warning,) = caught
    assert str(warning.message) == (
        f"{directory / 'model.safetensors'} has no qa_outputs for BertForQuestionAnswering: it starts anew from seed 0 "
        "and has to be trained"
    )
    assert warning.filename == __file__
    assert_equal(tensors_of(model), tensors_of(hubmodels.bertForQuestionAnswering(directory, head_seed=0)))


def test_several_parts_that_the_file_lacks_are_one_warning(words):
    with pytest.warns(UserWarning, match="starts anew") as caught:
        hubmodels.bertForSequenceClassification(words)
    (warning,) = caught
    assert "has no transformer.pooler, classifier for BertForSequenceClassification" in str(warning.message)


def test_a_head_that_is_asked_for_does_not_warn(tmp_path):
    directory = write_checkpoint(tmp_path / "c", "BertModel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hubmodels.bertForQuestionAnswering(directory, head_seed=0)


def test_a_file_that_has_all_of_it_does_not_warn(words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hubmodels.bertForMaskedLM(words)


def test_not_pretrained_draws_from_the_global_generator(words):
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return tensors_of(hubmodels.bertForMaskedLM(words, pretrained=False))

    first, again, other = draw(1), draw(1), draw(2)
    assert_equal(first, again)
    word = "transformer.embeddings.word.weight"
    assert not torch.equal(first[word], other[word])
    assert first[word][0].eq(0).all()
    assert 0.01 < first[word].std() < 0.03
    assert first["head.norm.weight"].eq(1).all()
    assert first["head.bias"].eq(0).all()


def test_not_pretrained_needs_no_weights(monkeypatch):
    """Nothing is fetched: no_network would see it."""
    monkeypatch.setattr(loading.store, "fetch", lambda *_, **__: pytest.fail("a file was fetched"))
    model = hubmodels.bertModel("bert-tiny", pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == catalog.lookup("bert-tiny").parameters
    assert not model.training
    assert str(model.provenance).startswith("bert-tiny, not pretrained: ")
    assert model.provenance.files == ()
    assert model.provenance.revision is None
    assert {entry.ours for entry in model.provenance.report.entries} == set(tensors_of(model))
    assert {entry.operation for entry in model.provenance.report.entries} == {"new"}


def test_not_pretrained_needs_a_config_alone(words):
    (words / "model.safetensors").unlink()
    assert hubmodels.bertModel(words, pretrained=False).config.hidden_size == SIZES["hidden_size"]


# --- Provenance


def test_provenance_of_a_local_checkpoint(words):
    model = hubmodels.bertForMaskedLM(words)
    provenance = model.provenance
    (file,) = provenance.files
    digest = hashlib.sha256((words / "model.safetensors").read_bytes()).hexdigest()
    assert (file.path, file.source, file.revision, file.sha256) == (words / "model.safetensors", None, None, digest)
    assert (provenance.revision, provenance.dialect) == (None, "huggingface")
    assert_accounts(provenance.report, KEYS.dump(model.state_dict(), True), model)
    text = str(provenance)
    assert str(words / "model.safetensors") in text
    assert digest in text
    assert "30 loaded, 12 fused" in text


# --- What goes wrong


def test_a_name_or_path_that_is_not_there():
    with pytest.raises(CatalogError) as caught:
        hubmodels.bertModel("bert-base-uncasd")
    assert "no weights are called 'bert-base-uncasd', and there is no such file or directory" in str(caught.value)
    assert "did you mean bert-base-uncased" in str(caught.value)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CatalogError, match=r"nowhere: no such file or directory; a name of the manifest is given as a"):
        hubmodels.bertModel(tmp_path / "nowhere")
    with pytest.raises(CatalogError, match=r"no weights are called '.*nowhere', and there is no such file"):
        hubmodels.bertModel(str(tmp_path / "nowhere"))


def test_a_directory_without_config_json(words):
    (words / "config.json").unlink()
    for path in (words, words / "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"words/config\.json: no such file; a checkpoint needs its config\.json"
        ):
            hubmodels.bertModel(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not JSON"), ("", "not JSON"), ("[]", "expected a JSON object, got a list"), ("\xff", "not JSON")],
)
def test_a_config_json_that_is_not_one(text, expected, words):
    (words / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        hubmodels.bertModel(words)
    assert str(caught.value).startswith(f"{words / 'config.json'}: {expected}")


def test_a_directory_without_weights(words):
    (words / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertModel(words)
    assert str(caught.value).startswith(f"{words}: expected model.safetensors or pytorch_model.bin beside config.json")


def test_the_config_of_another_family(tmp_path):
    directory = write_checkpoint(tmp_path / "c", model_type="roberta")
    with pytest.raises(ConfigError) as caught:
        hubmodels.bertModel(directory)
    assert str(caught.value).startswith(
        f"{directory / 'config.json'}: not implemented for bert: model_type = 'roberta'"
    )


def test_a_config_that_does_not_belong_to_the_file(tmp_path):
    directory = write_checkpoint(tmp_path / "c", vocab_size=41)
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertForMaskedLM(directory)
    text = str(caught.value)
    assert "word_embeddings.weight: expected [41, 12] for transformer.embeddings.word.weight, got [37, 12]" in text
    assert "Check that config.json belongs to this file" in text


def test_the_entry_point_of_another_family(monkeypatch):
    record = catalog.lookup("bert-tiny")
    other = type(record)(**{**vars(record), "name": "some-t5", "family": "t5"})
    monkeypatch.setattr(catalog, "manifest", lambda path=None: {"some-t5": other})
    said = "some-t5 is a t5 checkpoint; this entry point loads bert; take an entry point of that family, as t5Model is"
    with pytest.raises(CatalogError, match=f"^{said}$"):
        hubmodels.bertModel("some-t5")


@pytest.mark.parametrize(
    ("entry", "name", "family", "wanted"),
    [
        ("bertModel", "gpt-nano", "gpt", "bert"),
        ("bertForMaskedLM", "gpt2", "gpt2", "bert"),
        ("gptModel", "bert-nano", "bert", "gpt"),
        ("gpt", "gpt2", "gpt2", "gpt"),
        ("gptDoubleHeads", "distilgpt2", "gpt2", "gpt"),
        ("gpt2", "gpt-nano", "gpt", "gpt2"),
        ("openAIGPTLMHeadModel", "gpt2-medium", "gpt2", "gpt"),
    ],
)
def test_weights_of_another_family_are_refused_before_anything_is_fetched(entry, name, family, wanted, monkeypatch):
    monkeypatch.setattr(loading.store, "fetch", lambda *_, **__: pytest.fail("a file was fetched"))
    with pytest.raises(CatalogError) as caught:
        getattr(hubmodels, entry)(name)
    text = f"{name} is a {family} checkpoint; this entry point loads {wanted}; take "
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith(f" as {family}Model is")
    assert callable(getattr(hubmodels, f"{family}Model"))


@pytest.mark.parametrize(("entry", "name"), [("bertTokenizer", "gpt-nano"), ("gptTokenizer", "bert-nano")])
def test_a_tokenizer_of_another_kind(entry, name):
    kinds = {"bertTokenizer": "WordPieceTokenizer", "gptTokenizer": "BytePairTokenizer"}
    got = next(kind for kind in kinds.values() if kind != kinds[entry])
    with pytest.raises(CatalogError) as caught:
        getattr(hubmodels, entry)(name)
    assert str(caught.value) == (
        f"{name} has a {got}, but this entry point makes a {kinds[entry]}; take the entry point of its own family"
    )


def test_a_damaged_file_is_named(words):
    os.truncate(words / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"words/model\.safetensors: .*truncated"):
        hubmodels.bertModel(words)


# --- Export


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_loads_back_in_ours_and_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(name)
    assert hubmodels.export(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = entry_point(name)(tmp_path / "a" / "b")
    assert_equal(tensors_of(back), tensors_of(model))
    assert back.config == model.config
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
    }
    assert_close(outputs(model, name), outputs(theirs.eval(), name))


def test_export_says_what_the_model_is(tmp_path):
    hubmodels.export(make("BertForTokenClassification"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert len(config["id2label"]) == 5
    assert config["model_type"] == "bert"


def test_export_into_the_directory_that_the_model_is_mapped_from(words):
    model = hubmodels.bertForMaskedLM(words)
    with torch.no_grad():
        model.head.bias.add_(1)
    want = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    hubmodels.export(model, words)
    assert_equal(tensors_of(hubmodels.bertForMaskedLM(words)), want)
    assert_equal(tensors_of(model), want)


def test_export_keeps_the_dtype(words, tmp_path):
    from safetensors.torch import load_file

    hubmodels.export(hubmodels.bertForMaskedLM(words, dtype=torch.bfloat16), tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_export_writes_a_tokenizer_that_loads(words, tmp_path):
    (words / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = hubmodels.bertTokenizer(words)
    hubmodels.export(hubmodels.bertForMaskedLM(words), tmp_path / "out", tokenizer)
    back = hubmodels.bertTokenizer(tmp_path / "out")
    want, got = tokenizer(["a b.", "zs!"]), back(["a b.", "zs!"])
    assert want["input_ids"][0].tolist() == [2, 5, 6, 34, 3]
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_export_that_fails_leaves_nothing_half_written(monkeypatch, words, tmp_path):
    import safetensors.torch

    before = {path.name: path.read_bytes() for path in words.iterdir()}
    model = hubmodels.bertForMaskedLM(words)

    def save_half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", save_half)
    for directory in (words, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            hubmodels.export(model, directory)
    assert {path.name: path.read_bytes() for path in words.iterdir()} == before
    assert not (tmp_path / "new").exists()


# --- By name


@pytest.fixture
def published(monkeypatch, words):
    """A hub that has the tiny model, and a manifest that has its record."""
    (words / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    fake = FakeHub()
    files = tuple(fake.add((words / name).read_bytes(), name) for name in ("model.safetensors", "vocab.txt"))
    record = catalog.Record(
        name="some-bert",
        family="bert",
        config=SIZES,
        tokenizer={"file": "vocab.txt", "lower_case": True},
        files=files,
        dialect="huggingface",
        licence="MIT",
        homepage="h",
        citation="c",
        parameters=1,
        check={"none": "made for this test"},
    )
    monkeypatch.setattr(catalog, "manifest", lambda path=None: {"some-bert": record})
    with fake.running(monkeypatch) as hub:
        yield hub


def test_a_model_by_name(published):
    model = hubmodels.bertForMaskedLM("some-bert", progress=False)
    assert_equal(tensors_of(model), make("BertForMaskedLM").state_dict())
    provenance = model.provenance
    file = catalog.lookup("some-bert").weights[0]
    assert (provenance.weights, provenance.revision, provenance.dialect) == ("some-bert", REVISION, "huggingface")
    assert [(f.source, f.revision, f.sha256) for f in provenance.files] == [(REPO, REVISION, file.sha256)]
    assert provenance.files[0].path.read_bytes() == published.files[f"{REPO}/resolve/{REVISION}/model.safetensors"]
    text = str(provenance)
    assert all(part in text for part in ("some-bert", REPO, REVISION, file.sha256, "huggingface", "30 loaded"))
    assert {where for _, where in published.requests} == {f"{REPO}/resolve/{REVISION}/model.safetensors"}
    requests = len(published.requests)
    hubmodels.bertForMaskedLM("some-bert", progress=False)
    assert len(published.requests) == requests


def test_a_tokenizer_by_name(published, tmp_path):
    tokenizer = hubmodels.bertTokenizer("some-bert", progress=False, cache_dir=tmp_path / "mine")
    assert tokenizer("A b!")["input_ids"].tolist() == [[2, 5, 6, 36, 3]]
    assert (tmp_path / "mine" / "huggingface.co" / REPO).is_dir()
    assert {where for _, where in published.requests} == {f"{REPO}/resolve/{REVISION}/vocab.txt"}


def test_wrong_bytes_are_never_parsed(published, monkeypatch):
    where = f"{REPO}/resolve/{REVISION}/model.safetensors"
    wrong = published.files[where][:-1] + b"!"
    assert wrong != published.files[where]
    published.files[where] = wrong
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: pytest.fail("the file was opened"))
    with pytest.raises(StoreError) as caught:
        hubmodels.bertForMaskedLM("some-bert", progress=False)
    assert catalog.lookup("some-bert").weights[0].sha256 in str(caught.value)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
