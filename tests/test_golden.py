"""The real all-MiniLM-L6-v2: a trained BERT, loaded by path and by name, against transformers and recorded values.

The values are those of the file with the pinned digest, computed with transformers 5.23 in float64.
"""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hubmodels
from hubmodels import store

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
NAME = "all-MiniLM-L6-v2"
DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = ["This is an example sentence", "Each sentence is converted"]
IDS = [[101, 2023, 2003, 2019, 2742, 6251, 102], [101, 2169, 6251, 2003, 4991, 102, 0]]
HIDDEN = [0.0365650436, -0.0161615146, 0.1682452906, 0.1157566822, 0.1196022292]
POOLED = [0.0134285537, 0.0400361844, 0.0030797007]
MEANS = [
    [0.0676568961, 0.0634959035, 0.0487131049, 0.0793049791, 0.0374480535],
    [0.0864385721, 0.1027626200, 0.0053945356, 0.0020444249, -0.0099633799],
]


@pytest.fixture(scope="module")
def model(minilm):
    return hubmodels.bertModel(minilm)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return hubmodels.bertTokenizer(minilm / "vocab.txt")


@pytest.fixture(scope="module")
def ours(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(TEXTS))


@pytest.fixture(scope="module")
def theirs(minilm, tokenizer):
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertModel.from_pretrained(minilm, dtype=torch.float32).eval()
    with torch.no_grad():
        return reference(**tokenizer(TEXTS))


def means(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, S, D], [B, S] -> [B, D]: the mean over the real tokens, of length 1"""
    mask = mask[:, :, None].to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1))


def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    inputs = tokenizer(texts)
    with torch.no_grad():
        return means(model(**inputs).last_hidden_state, inputs["attention_mask"])


def assert_near(got: torch.Tensor, want, atol: float = 1e-5) -> None:
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# --- What was loaded


def test_the_file_is_the_pinned_one(model, minilm):
    (file,) = model.provenance.files
    assert file.path == minilm / "model.safetensors"
    assert file.sha256 == DIGEST == catalog.lookup(NAME).weights.sha256
    assert file.path.stat().st_size == catalog.lookup(NAME).weights.size
    assert DIGEST in str(model.provenance)
    store.verify(minilm / "vocab.txt", catalog.lookup(NAME).vocabulary)


def test_every_tensor_is_accounted_for(model):
    report = model.provenance.report
    assert (report.count("fused"), report.count("dropped"), report.count("new")) == (36, 1, 0)
    (dropped,) = (entry for entry in report.entries if entry.operation == "dropped")
    assert dropped.theirs == "embeddings.position_ids"
    assert {entry.ours for entry in report.entries if entry.ours} == {name for name, _ in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == catalog.lookup(NAME).parameters


def test_the_manifests_config_is_the_files(model):
    assert type(model.config).from_published(catalog.lookup(NAME).config, "manifest") == model.config


# --- Tokenizers


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "."])
def test_ids(file, minilm):
    inputs = hubmodels.bertTokenizer(minilm / file)(TEXTS)
    assert inputs["input_ids"].tolist() == IDS
    assert inputs["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert inputs["token_type_ids"].eq(0).all()


# --- Outputs


def test_hidden_states_equal_the_references(ours, theirs, tokenizer):
    real = tokenizer(TEXTS)["attention_mask"].bool()
    assert_near(ours.last_hidden_state[real], theirs.last_hidden_state[real])
    assert ours.last_hidden_state[~real].eq(0).all()
    assert_near(ours.pooler_output, theirs.pooler_output)


def test_mean_pooled_embeddings_equal_the_references(ours, theirs, tokenizer):
    mask = tokenizer(TEXTS)["attention_mask"]
    assert_near(means(ours.last_hidden_state, mask), means(theirs.last_hidden_state, mask))


def test_recorded_values(ours, tokenizer):
    assert_near(ours.last_hidden_state[0, 0, :5], HIDDEN)
    assert_near(ours.pooler_output[0, :3], POOLED)
    assert_near(means(ours.last_hidden_state, tokenizer(TEXTS)["attention_mask"])[:, :5], MEANS)


def test_recorded_values_to_every_digit_in_double_precision(minilm, tokenizer):
    model, inputs = hubmodels.bertModel(minilm, dtype=torch.float64), tokenizer(TEXTS)
    with torch.no_grad():
        states, pooled = model(**inputs)[:2]
    assert_near(states[0, 0, :5], HIDDEN, atol=1e-9)
    assert_near(pooled[0, :3], POOLED, atol=1e-9)
    assert_near(means(states, inputs["attention_mask"])[:, :5], MEANS, atol=1e-9)


def test_it_is_the_trained_model(model, tokenizer):
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    food, bread, baby = embed(model, tokenizer, texts)
    assert food @ bread == pytest.approx(0.7553, abs=5e-5)
    assert food @ baby == pytest.approx(-0.1050, abs=5e-5)


def replay(model, check: dict) -> None:
    """Compare what the manifest says comes out of a model with what comes out."""
    inputs = {
        key: torch.tensor(check[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in check
    }
    with torch.no_grad():
        output = getattr(model(**inputs), check["output"])
    assert_near(output[tuple(slice(*bounds) for bounds in check["slice"])], check["expected"], check["atol"])


def test_the_manifests_check_replays(model):
    replay(model, catalog.lookup(NAME).check)


@pytest.mark.parametrize(
    "name", [name for name, r in catalog.manifest().items() if r.weights.is_embedded and "none" not in r.check]
)
def test_the_check_of_a_model_in_this_repository_replays(name):
    replay(hubmodels.bertModel(name), catalog.lookup(name).check)


# --- By name


def test_by_name_from_the_users_cache(minilm, model):
    """The file where an earlier download of any program would have left it; nothing is asked of the network."""
    from huggingface_hub import constants

    for file in catalog.lookup(NAME).files:
        folder = (
            Path(constants.HF_HUB_CACHE) / f"models--{file.source.replace('/', '--')}" / "snapshots" / file.revision
        )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(minilm / file.filename, folder / file.filename)
        except OSError:  # another file system
            (folder / file.filename).symlink_to(minilm / file.filename)
    named = hubmodels.bertModel(NAME)
    assert (named.provenance.weights, named.provenance.revision) == (NAME, catalog.lookup(NAME).weights.revision)
    assert named.provenance.files[0].sha256 == DIGEST
    want = dict(model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in named.named_parameters())
    assert hubmodels.bertTokenizer(NAME)(TEXTS)["input_ids"].tolist() == IDS
