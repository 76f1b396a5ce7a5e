"""Names: the key map's table both ways, its account of every key, and what it says when a file does not fit."""

import pytest
import torch
from held import HeldTensor
from reference import NAMES
from torch import Tensor, nn

from hubmodels.checkpoint.dialects import translate
from hubmodels.checkpoint.keymap import ALIAS, DROP, FUSE, TRANSPOSE, KeyMap
from hubmodels.checkpoint.readers import read_safetensors
from hubmodels.checkpoint.report import Report, Total
from hubmodels.errors import CheckpointError
from hubmodels.families import bert

# All sizes differ, so that no transposition or exchange goes unseen.
SIZES = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 17,
    "type_vocab_size": 4,
}
KEYS = bert.KEYS
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


def make(name: str, seed: int = 0, **sizes) -> nn.Module:
    """A tiny model of ours with every parameter random."""
    options = {"num_labels": 5} if name in ("BertForSequenceClassification", "BertForTokenClassification") else {}
    model = getattr(bert, name)(bert.BertConfig(**{**SIZES, **sizes}), **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def make_theirs(name: str, seed: int = 0) -> nn.Module:
    """The same in transformers."""
    transformers = pytest.importorskip("transformers")
    options = {"num_labels": 5} if name in ("BertForSequenceClassification", "BertForTokenClassification") else {}
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def held(tensors: dict[str, Tensor]) -> dict[str, HeldTensor]:
    return {key: HeldTensor(tensor) for key, tensor in tensors.items()}


def load(tensors: dict[str, Tensor], model: nn.Module, must_be_new=()):
    match = KEYS.match(held(tensors), shapes(model), "some/file.bin", model.own_parts, must_be_new)
    match.check_repeats()
    totals = (Total.of(tuple(t.shape) for t in tensors.values()), Total.of(shapes(model).values()))
    return dict(match), Report(match.entries, *totals)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def assert_accounts(report, keys, model: nn.Module) -> None:
    """Every key of the file exactly once, every parameter of the model, and nothing else."""
    assert sorted(entry.theirs for entry in report.entries if entry.theirs) == sorted(keys)
    assert {entry.ours for entry in report.entries if entry.ours} == set(shapes(model))
    assert all(entry.because for entry in report.entries if entry.operation in ("dropped", "new", "tied"))
    for entry in report.entries:
        assert (entry.ours is None) == (entry.operation == "dropped")
        assert (entry.theirs is None) == (entry.operation == "new")


def mlm() -> tuple[nn.Module, dict[str, Tensor]]:
    model = make("BertForMaskedLM")
    return model, KEYS.dump(model.state_dict(), True)


# --- Both ways


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
@pytest.mark.parametrize("name", NAMES)
def test_dump_and_load_give_back_every_bit(name, prefixed):
    model = make(name)
    theirs = KEYS.dump(model.state_dict(), prefixed)
    encoder = [key for key in theirs if key.removeprefix("bert.").startswith(("embeddings.", "encoder.", "pooler."))]
    assert all(key.startswith("bert.") == prefixed for key in encoder)
    loaded, report = load(theirs, make(name, seed=1))
    assert_equal(loaded, model.state_dict())
    assert_accounts(report, theirs, model)
    assert report.count("fused") == 3 * 2 * SIZES["num_hidden_layers"]
    assert report.count("new") == report.count("dropped") == report.count("tied") == 0


@pytest.mark.parametrize("name", NAMES)
def test_transformers_names_and_back(name):
    theirs = make_theirs(name).state_dict()
    model = make(name)
    loaded, report = load(theirs, model)
    assert_accounts(report, theirs, model)
    assert report.count("new") == 0
    is_repeat = {DECODER, "cls.predictions.decoder.bias", "embeddings.position_ids", "bert.embeddings.position_ids"}
    written = KEYS.dump(loaded, prefixed=name != "BertModel")
    assert_equal(written, {key: tensor for key, tensor in theirs.items() if key not in is_repeat})


def test_qkv_is_query_key_value_in_this_order():
    theirs = make_theirs("BertModel").state_dict()
    loaded, report = load(theirs, make("BertModel"))
    stem = "encoder.layer.1.attention.self."
    for wb in ("weight", "bias"):
        parts = [theirs[f"{stem}{part}.{wb}"] for part in ("query", "key", "value")]
        assert torch.equal(loaded[f"layers.1.attention.qkv.{wb}"], torch.cat(parts))
        ours = f"layers.1.attention.qkv.{wb}"
        fused = [entry.theirs for entry in report.entries if entry.ours == ours]
        assert fused == [f"{stem}{part}.{wb}" for part in ("query", "key", "value")]


def test_the_order_of_keys_in_the_file_is_free():
    model, theirs = mlm()
    theirs = {DECODER: theirs[WORDS].clone(), **dict(reversed(theirs.items()))}
    loaded, report = load(theirs, model)
    assert_equal(loaded, model.state_dict())
    assert_accounts(report, theirs, model)


def test_transposition_both_ways():
    keys = KeyMap([("linear.weight", TRANSPOSE("conv.weight")), (None, DROP("mask", "computed"))], [], ("", "model."))
    ours = {"linear.weight": torch.randn(5, 3)}
    theirs = keys.dump(ours, prefixed=True)
    assert theirs["model.conv.weight"].shape == (3, 5)
    assert theirs["model.conv.weight"].is_contiguous()
    loaded = report = keys.match(held(theirs | {"model.mask": torch.ones(2)}), {"linear.weight": (5, 3)}, "f")
    assert_equal(loaded, ours)
    assert loaded["linear.weight"].is_contiguous()
    assert [entry.operation for entry in report.entries] == ["transposed", "dropped"]
    with pytest.raises(
        CheckpointError, match=r"model\.conv\.weight: expected \[3, 5\] for linear\.weight, got \[5, 3\]"
    ):
        keys.match(held(theirs), {"linear.weight": (3, 5)}, "f")


def test_dump_refuses_a_parameter_that_no_row_writes():
    with pytest.raises(CheckpointError, match=r"export.*transformer\.layers\.0\.gate\.weight"):
        KEYS.dump({"transformer.layers.0.gate.weight": torch.ones(1)}, True)


def test_dumped_parts_do_not_share_memory():
    """safetensors refuses tensors that share memory."""
    theirs = KEYS.dump(make("BertModel").state_dict(), False)
    assert len({tensor.untyped_storage().data_ptr() for tensor in theirs.values()}) == len(theirs)


# --- Repeats


def test_a_separate_but_equal_decoder_is_tied():
    model, theirs = mlm()
    theirs |= {DECODER: theirs[WORDS].clone(), "cls.predictions.decoder.bias": theirs["cls.predictions.bias"].clone()}
    loaded, report = load(theirs, model)
    assert_equal(loaded, model.state_dict())
    assert_accounts(report, theirs, model)
    tied = {entry.theirs: (entry.ours, entry.because) for entry in report.entries if entry.operation == "tied"}
    assert tied == {
        DECODER: ("transformer.embeddings.word.weight", f"repeats {WORDS}"),
        "cls.predictions.decoder.bias": ("head.bias", "repeats cls.predictions.bias"),
    }


@pytest.mark.parametrize(
    ("original", "repeat"),
    [(WORDS, DECODER), ("cls.predictions.bias", "cls.predictions.decoder.bias")],
    ids=["word table", "bias"],
)
def test_a_repeat_without_its_original_stands_in_for_it(original, repeat):
    model, theirs = mlm()
    theirs[repeat] = theirs.pop(original)
    loaded, report = load(theirs, model)
    assert_equal(loaded, model.state_dict())
    assert_accounts(report, theirs, model)
    assert next(entry for entry in report.entries if entry.theirs == repeat).operation == "loaded"


@pytest.mark.parametrize(
    ("original", "repeat"),
    [(WORDS, DECODER), ("cls.predictions.bias", "cls.predictions.decoder.bias")],
    ids=["word table", "bias"],
)
def test_a_repeat_that_disagrees_is_an_error(original, repeat):
    model, theirs = mlm()
    theirs[repeat] = theirs[original].clone()
    theirs[repeat].view(-1)[3] += 1
    with pytest.raises(CheckpointError) as caught:
        load(theirs, model)
    text = str(caught.value)
    assert "some/file.bin" in text
    assert f"{repeat} should repeat {original}, but its values differ" in text
    assert "untied" in text


def test_a_repeat_of_another_shape_says_so():
    model, theirs = mlm()
    theirs[DECODER] = torch.zeros(SIZES["vocab_size"] + 3, SIZES["hidden_size"])
    with pytest.raises(CheckpointError) as caught:
        load(theirs, model)
    assert DECODER in str(caught.value)
    assert "[40, 12]" in str(caught.value)
    assert "[37, 12]" in str(caught.value)


def test_a_repeat_in_another_dtype_is_compared_by_value():
    model, theirs = mlm()
    theirs[WORDS] = theirs[WORDS].half().float()
    theirs[DECODER] = theirs[WORDS].half()
    loaded, report = load(theirs, model)
    assert torch.equal(loaded["transformer.embeddings.word.weight"], theirs[WORDS])
    assert report.count("tied") == 1


# --- Parts that only one side has


def test_position_ids_are_dropped_with_the_reason():
    model, theirs = mlm()
    theirs["bert.embeddings.position_ids"] = torch.arange(17)[None]
    loaded, report = load(theirs, model)
    assert_equal(loaded, model.state_dict())
    (entry,) = (entry for entry in report.entries if entry.operation == "dropped")
    assert (entry.theirs, entry.shape, entry.dtype) == ("bert.embeddings.position_ids", (1, 17), "int64")
    assert "positions are computed" in entry.because


def test_a_head_is_dropped_by_a_base_model():
    source = make("BertForPreTraining")
    theirs = KEYS.dump(source.state_dict(), True)
    model = make("BertModel", seed=1)
    loaded, report = load(theirs, model)
    assert_equal(loaded, source.transformer.state_dict())
    assert_accounts(report, theirs, model)
    dropped = {entry.theirs: entry.because for entry in report.entries if entry.operation == "dropped"}
    assert dropped["cls.predictions.bias"] == "this model has no head"
    assert dropped["cls.seq_relationship.weight"] == "this model has no next_sentence"
    assert len(dropped) == 7


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_base_checkpoint_leaves_the_head_new(name):
    source, model = make("BertModel"), make(name, seed=1)
    theirs = KEYS.dump(source.state_dict(), False)
    loaded, report = load(theirs, model)
    assert_accounts(report, theirs, model)
    new = {entry.ours for entry in report.entries if entry.operation == "new"}
    assert new == {key for key in shapes(model) if not key.startswith("transformer.")} != set()
    assert {key.removeprefix("transformer.") for key in loaded} <= source.state_dict().keys()
    assert all(entry.because == "the checkpoint has none" for entry in report.entries if entry.operation == "new")


def test_a_pooler_that_the_model_lacks_is_dropped_and_one_that_the_file_lacks_is_new():
    base, words = make("BertModel"), make("BertForMaskedLM")
    theirs = KEYS.dump(base.state_dict(), False)
    _, report = load(theirs, words)
    assert {e.theirs for e in report.entries if e.operation == "dropped"} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    theirs = KEYS.dump(words.state_dict(), True)
    _, report = load(theirs, base)
    assert {entry.ours for entry in report.entries if entry.operation == "new"} == {"pooler.weight", "pooler.bias"}


def test_a_head_that_is_asked_to_be_new_drops_the_files():
    model = make("BertForSequenceClassification")
    theirs = KEYS.dump(model.state_dict(), True)
    loaded, report = load(theirs, model, must_be_new={"classifier"})
    assert "classifier.weight" not in loaded
    assert_accounts(report, theirs, model)
    dropped = {entry.theirs: entry.because for entry in report.entries if entry.operation == "dropped"}
    assert dropped == dict.fromkeys(["classifier.weight", "classifier.bias"], "a new head was asked for")
    assert {e.because for e in report.entries if e.operation == "new"} == {"asked for"}


def test_a_head_with_a_part_missing_is_an_error():
    model, theirs = mlm()
    del theirs["cls.predictions.transform.dense.bias"]
    with pytest.raises(CheckpointError, match=r"head\.dense\.bias \[12\] is in the model, but nothing in the file"):
        load(theirs, model)


def test_the_encoder_is_never_new():
    model = make("BertForTokenClassification")
    with pytest.raises(CheckpointError, match=r"transformer\.embeddings\.word\.weight \[37, 12\] is in the model"):
        load({"classifier.weight": torch.zeros(5, 12), "classifier.bias": torch.zeros(5)}, model)


# --- What does not fit


def test_everything_that_does_not_fit_is_in_one_error():
    model, theirs = mlm()
    del theirs["bert.encoder.layer.0.output.dense.bias"]
    del theirs["bert.encoder.layer.1.attention.self.key.weight"]
    theirs["bert.encoder.layer.1.attention.output.gate.weight"] = torch.zeros(2, 3)
    theirs["completely.unlike"] = torch.zeros(7)
    theirs["bert.embeddings.LayerNorm.weight"] = torch.zeros(13)
    with pytest.raises(CheckpointError) as caught:
        load(theirs, model)
    text = str(caught.value)
    lines = text.splitlines()
    assert lines[0] == "some/file.bin: 5 of its tensors and the model do not fit:"
    assert len(lines) == 7
    assert (
        "transformer.layers.0.feed_forward.output.bias [12] is in the model, but nothing in the file fills it" in text
    )
    assert (
        "encoder.layer.1.attention.self.key.weight is not in the file, "
        "but transformer.layers.1.attention.qkv.weight is made of it" in text
    )
    assert (
        "bert.encoder.layer.1.attention.output.gate.weight [2, 3] is in the file, but no row knows it "
        "(the nearest row is encoder.layer.{i}.attention.output.dense.{wb})" in text
    )
    assert "completely.unlike [7] is in the file, but no row knows it\n" in text
    assert "bert.embeddings.LayerNorm.weight: expected [12] for transformer.embeddings.norm.weight, got [13]" in text
    assert "config.json" in lines[-1]


def test_a_key_with_and_without_the_prefix_is_refused():
    model, theirs = mlm()
    theirs["embeddings.LayerNorm.bias"] = torch.zeros(12)
    with pytest.raises(CheckpointError) as caught:
        load(theirs, model)
    both = "bert.embeddings.LayerNorm.bias and embeddings.LayerNorm.bias are both in the file"
    assert f"{both} and both mean embeddings.norm.bias" in str(caught.value)


def test_a_duplicate_part_of_a_fused_tensor_is_refused():
    model, theirs = mlm()
    theirs["encoder.layer.0.attention.self.value.bias"] = torch.zeros(12)
    with pytest.raises(CheckpointError, match=r"attention\.self\.value\.bias are both in the file"):
        load(theirs, model)


def test_a_layer_more_than_the_config_has_is_refused():
    theirs = KEYS.dump(make("BertModel", num_hidden_layers=3).state_dict(), False)
    with pytest.raises(CheckpointError) as caught:
        load(theirs, make("BertModel"))
    text = str(caught.value)
    assert "encoder.layer.2.output.dense.bias would be layers.2.feed_forward.output.bias" in text
    assert "which this model's config has no place for" in text
    stem = "encoder.layer.2.attention.self."
    assert ", ".join(f"{stem}{part}.weight" for part in ("query", "key", "value")) in text
    assert "12 of its tensors" in text


def test_a_layer_fewer_than_the_config_has_is_refused():
    theirs = KEYS.dump(make("BertModel", num_hidden_layers=1).state_dict(), False)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.qkv\.weight \[36, 12\] is in the model"):
        load(theirs, make("BertModel"))


def test_a_classifier_of_another_width_names_both_shapes_and_the_way_out():
    theirs = KEYS.dump(make("BertForSequenceClassification").state_dict(), True)
    model = bert.BertForSequenceClassification(bert.BertConfig(**SIZES), num_labels=3)
    with pytest.raises(CheckpointError) as caught:
        load(theirs, model)
    hint = "classifier.weight: expected [3, 12] for classifier.weight, got [5, 12] (head_seed=0 starts this head anew)"
    assert hint in str(caught.value)


def test_a_pooler_of_another_shape_is_not_sent_to_head_seed():
    """head_seed leaves the pooler alone, so it is no way out."""
    model = make("BertForSequenceClassification")
    theirs = KEYS.dump(model.state_dict(), True)
    theirs["bert.pooler.dense.weight"] = torch.zeros(5, 12)
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.weight: expected \[12, 12\]") as caught:
        load(theirs, model)
    assert "head_seed" not in str(caught.value)


def test_parts_of_a_fused_tensor_of_unequal_size_are_refused():
    """Together they have the right shape, but each row would be taken for another part's."""
    theirs = KEYS.dump(make("BertModel").state_dict(), False)
    for part, rows in {"query": 11, "key": 12, "value": 13}.items():
        theirs[f"encoder.layer.0.attention.self.{part}.weight"] = torch.randn(rows, 12)
    with pytest.raises(CheckpointError) as caught:
        load(theirs, make("BertModel"))
    assert "[11, 12]" in str(caught.value)
    assert "encoder.layer.0.attention.self.query.weight" in str(caught.value)


def test_a_scalar_where_a_part_of_a_fused_tensor_should_be_is_refused():
    theirs = KEYS.dump(make("BertModel").state_dict(), False)
    theirs["encoder.layer.0.attention.self.query.bias"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=r"attention\.self\.query\.bias"):
        load(theirs, make("BertModel"))


@pytest.mark.parametrize("part", ["query", "key"])
@pytest.mark.parametrize("held_in_memory", [True, False], ids=["bin", "safetensors"])
def test_parts_of_a_fused_tensor_in_different_dtypes_keep_their_values(held_in_memory, part, tmp_path):
    """Copying bytes of one dtype into another would read the neighbour's bytes as numbers."""
    from safetensors.torch import save_file

    source = make("BertModel")
    theirs = {key: tensor.bfloat16().float() for key, tensor in KEYS.dump(source.state_dict(), False).items()}
    key = f"encoder.layer.0.attention.self.{part}.weight"
    mixed = theirs | {key: theirs[key].bfloat16()}
    save_file(mixed, tmp_path / "model.safetensors")
    file = held(mixed) if held_in_memory else read_safetensors(tmp_path / "model.safetensors")
    loaded = KEYS.match(file, shapes(source), "f", source.own_parts)
    stem = "encoder.layer.0.attention.self."
    want = torch.cat([theirs[f"{stem}{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(loaded["layers.0.attention.qkv.weight"].float(), want)


def test_whole_numbers_are_not_taken_for_weights():
    """A quantised file without its scales has the right shapes and the wrong numbers."""
    model, theirs = mlm()
    key = "bert.encoder.layer.0.output.dense.weight"
    theirs[key] = torch.ones(12, 20, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight.*int8"):
        load(theirs, model)


def test_parameters_that_require_grad_can_be_loaded():
    """torch.save(dict(model.named_parameters())) is a checkpoint too."""
    source = make("BertModel")
    theirs = {key: nn.Parameter(tensor) for key, tensor in KEYS.dump(source.state_dict(), False).items()}
    loaded, _ = load(theirs, make("BertModel", seed=1))
    assert_equal({key: tensor.detach() for key, tensor in loaded.items()}, source.state_dict())
    assert all(tensor.is_leaf for tensor in loaded.values())


def test_a_report_counts_what_happened():
    model = make("BertForSequenceClassification")
    theirs = KEYS.dump(make("BertForPreTraining").state_dict(), True)
    _, report = load(theirs, model)
    assert report.summary == "27 loaded, 12 fused, 7 dropped, 2 new"
    assert len(report.entries) == 48
    assert report.is_complete


def test_rules_name_their_operations():
    keys = KeyMap([("a", FUSE("x", "y")), ("b.weight", "c.weight")], [("b.weight", ALIAS("z"))], ("", "p."))
    tensors = {"p.x": torch.ones(2), "p.y": torch.ones(2), "p.c.weight": torch.ones(3), "z": torch.ones(3)}
    loaded = report = keys.match(held(tensors), {"a": (4,), "b.weight": (3,)}, "f")
    assert {entry.theirs: entry.operation for entry in report.entries} == {
        "p.x": "fused",
        "p.y": "fused",
        "p.c.weight": "loaded",
        "z": "tied",
    }
    assert loaded["a"].shape == (4,)


# --- Dialects


def test_gamma_and_beta_become_weight_and_bias():
    _, theirs = mlm()
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in theirs.items()
    }
    assert old.keys() != theirs.keys()
    found = translate(held(old), "f")
    assert found.dialect == "huggingface-gamma-beta"
    assert_equal({key: tensor.read() for key, tensor in found.tensors.items()}, theirs)
    assert {found.origins[key].key: key for key in theirs} == dict(zip(old, theirs, strict=True))
    assert translate(held(theirs), "f").dialect == "huggingface"


def test_gamma_of_another_module_is_left_alone():
    found = translate(held({"head.gamma": torch.ones(1), "x.LayerNorm.beta": torch.ones(2)}), "f")
    assert {key: tensor.shape for key, tensor in found.tensors.items()} == {
        "head.gamma": (1,),
        "x.LayerNorm.bias": (2,),
    }
    assert (found.dialect, found.dropped) == ("huggingface-gamma-beta", ())


def test_gamma_beside_weight_is_refused():
    with pytest.raises(CheckpointError, match=r"some/file: x\.LayerNorm\.gamma .*both mean x\.LayerNorm\.weight"):
        translate(held({"x.LayerNorm.weight": torch.ones(1), "x.LayerNorm.gamma": torch.ones(1)}), "some/file")
