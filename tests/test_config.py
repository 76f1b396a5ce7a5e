"""config.json <-> the config: published files are taken as they are, what is not implemented is refused by name."""

import dataclasses
import json
import math

import pytest

from hubmodels.errors import ConfigError
from hubmodels.families.bert import BertConfig, BertForSequenceClassification
from hubmodels.families.gpt import GptConfig, GptDoubleHeads
from hubmodels.families.gpt2 import Gpt2, Gpt2Config

BASE_UNCASED = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
BASE_CHINESE = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "directionality": "bidi",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "type_vocab_size": 2,
    "vocab_size": 21128,
}
# Google's own bert_config.json, and pytorch-pretrained-bert's.
FIRST_RELEASE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
CLASSIFIER = BASE_UNCASED | {
    "_name_or_path": "bert-base-uncased",
    "finetuning_task": "sst-2",
    "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
    "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
    "problem_type": "single_label_classification",
    "torch_dtype": "float32",
    "classifier_dropout": None,
    "output_past": True,
}


def read(published: dict, **changes) -> BertConfig:
    return BertConfig.from_published(published | changes, "some/config.json")


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(BASE_UNCASED, **changes)
    assert str(caught.value).startswith("some/config.json: ")
    return str(caught.value)


# --- What is taken


@pytest.mark.parametrize("published", [BASE_UNCASED, CLASSIFIER], ids=["base", "classifier"])
def test_bert_base_uncased(published):
    assert read(published) == BertConfig()


def test_bert_base_chinese():
    assert read(BASE_CHINESE) == BertConfig(vocab_size=21128)


def test_the_first_release():
    config = read(FIRST_RELEASE)
    assert (config.hidden_size, config.num_attention_heads, config.layer_norm_eps) == (128, 2, 1e-12)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
def test_an_unknown_key_that_is_off_may_stand(value):
    assert read(BASE_UNCASED, sparse_attention=value) == BertConfig()


def test_what_transformers_writes_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig(vocab_size=99, hidden_size=24, num_attention_heads=3, num_labels=4)
    theirs.save_pretrained(tmp_path)
    config = read(json.loads((tmp_path / "config.json").read_text()))
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (99, 24, 3)
    for field in dataclasses.fields(BertConfig):
        assert getattr(config, field.name) == getattr(theirs, field.name), field.name


# --- What is refused


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "position_embedding_type",
            "relative_key",
            "position_embedding_type = 'relative_key' (implemented: 'absolute')",
        ),
        ("is_decoder", True, "is_decoder = True (implemented: False)"),
        ("add_cross_attention", True, "add_cross_attention = True (implemented: False)"),
        ("chunk_size_feed_forward", 64, "chunk_size_feed_forward = 64 (implemented: 0)"),
        ("model_type", "roberta", "model_type = 'roberta' (expected 'bert')"),
        ("embedding_size", 128, "embedding_size = 128 (unknown key)"),
        ("pruned_heads", {"0": [1]}, "pruned_heads = {'0': [1]} (unknown key)"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_and_value(key, value, expected):
    text = refusal(**{key: value})
    assert text.startswith(f"some/config.json: not implemented for bert: {expected}. ")
    assert "take it out of the file and load again" in text


def test_all_that_is_refused_is_named_at_once():
    text = refusal(is_decoder=True, embedding_size=128, model_type="electra")
    assert all(f"{key} = " in text for key in ("is_decoder", "embedding_size", "model_type"))


@pytest.mark.parametrize("value", ["swish9", "Gelu", ""])
def test_an_activation_that_is_not_there(value):
    assert f"hidden_act = {value!r}: implemented are gelu, gelu_new, relu, silu" in refusal(hidden_act=value)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("hidden_size", "768", "int"),
        ("hidden_size", 768.0, "int"),
        ("hidden_size", None, "int"),
        ("hidden_size", True, "int"),
        ("hidden_act", 3, "str"),
        ("hidden_act", None, "str"),
        ("layer_norm_eps", "1e-12", "float"),
        ("hidden_dropout_prob", True, "float"),
        ("hidden_dropout_prob", [0.1], "float"),
        ("pad_token_id", None, "int"),
    ],
)
def test_a_wrong_type(key, value, kind):
    assert f"{key} = {value!r}: expected {kind}" in refusal(**{key: value})


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ],
)
def test_a_size_is_positive(key, value):
    assert f"{key} = {value}: expected a positive number" in refusal(**{key: value})


def test_a_token_id_may_be_zero_but_not_less():
    assert read(BASE_UNCASED, pad_token_id=0).pad_token_id == 0
    assert "pad_token_id = -1" in refusal(pad_token_id=-1)


def test_a_padding_token_is_one_of_the_vocabulary():
    text = refusal(pad_token_id=30522)
    assert "pad_token_id = 30522" in text
    assert "vocab_size" in text


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan, math.inf])
@pytest.mark.parametrize("key", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_a_probability(key, value):
    assert f"{key} = {value}: expected a probability, 0 <= p < 1" in refusal(**{key: value})


@pytest.mark.parametrize("value", [-1e-12, math.nan, math.inf])
@pytest.mark.parametrize("key", ["layer_norm_eps", "initializer_range"])
def test_a_number_that_must_not_be_negative(key, value):
    assert f"{key} = {value}" in refusal(**{key: value})


def test_heads_divide_the_hidden_size():
    assert "hidden_size = 768: expected a multiple of num_attention_heads = 7" in refusal(num_attention_heads=7)


def test_a_config_made_in_code_is_checked_too():
    with pytest.raises(ConfigError, match=r"^hidden_size = 10: expected a multiple of num_attention_heads = 12$"):
        BertConfig(hidden_size=10)


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="vocab_size = -3"):
        BertConfig(vocab_size=-3)


# --- Back


@pytest.mark.parametrize(
    "config",
    [BertConfig(), BertConfig(vocab_size=7, hidden_act="gelu_new", layer_norm_eps=1e-5, pad_token_id=3)],
    ids=["base", "other"],
)
def test_there_and_back(config):
    published = config.to_published()
    assert published["model_type"] == "bert"
    assert published["position_embedding_type"] == "absolute"
    assert BertConfig.from_published(json.loads(json.dumps(published)), "f") == config


def test_transformers_understands_what_we_publish():
    transformers = pytest.importorskip("transformers")
    config = BertConfig(vocab_size=7, hidden_size=24, num_attention_heads=3, layer_norm_eps=1e-5)
    theirs = transformers.BertConfig.from_dict(config.to_published())
    for field in dataclasses.fields(config):
        assert getattr(theirs, field.name) == getattr(config, field.name), field.name


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BertConfig().hidden_size = 3


def test_what_a_user_may_set_changes_no_shape():
    other = {"hidden_act": "relu"} | {name: 0.5 for name in BertConfig.ADJUSTABLE if name != "hidden_act"}
    small = BertConfig(vocab_size=7, hidden_size=6, num_attention_heads=2, num_hidden_layers=1, intermediate_size=5)
    models = [BertForSequenceClassification(config) for config in (small, dataclasses.replace(small, **other))]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]
    assert not {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"} & set(BertConfig.ADJUSTABLE)


@pytest.mark.parametrize(("config", "cls"), [(GptConfig, GptDoubleHeads), (Gpt2Config, Gpt2)], ids=["gpt", "gpt2"])
def test_what_a_user_may_set_of_a_decoder_changes_no_shape(config, cls):
    other = {"hidden_act": "relu"} | {name: 0.5 for name in config.ADJUSTABLE if name != "hidden_act"}
    small = config(vocab_size=7, hidden_size=6, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=5)
    models = [cls(chosen) for chosen in (small, dataclasses.replace(small, **other))]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]
    fixed = {"vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    fixed |= {"intermediate_size", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"}
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(config.ADJUSTABLE) == fields - fixed


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_classifier_dropout_is_a_probability_or_none(value):
    assert f"classifier_dropout = {value}: expected a probability" in refusal(classifier_dropout=value)
    assert read(BASE_UNCASED, classifier_dropout=0.3).classifier_dropout == 0.3
    assert read(BASE_UNCASED, classifier_dropout=None).classifier_dropout is None
