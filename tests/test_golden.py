"""Real checkpoints against transformers and recorded values.

The all-MiniLM-L6-v2, a trained BERT, is loaded by path and by name; its values are those of the file with the pinned
digest, computed with transformers 5.23 in float64. What this repository holds replays its manifest's check. What the
user has downloaded of the published GPTs goes on with the texts that transformers' own tests expect of them.
"""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hubmodels
from hubmodels import store
from hubmodels.errors import StoreError
from hubmodels.tasks import generate

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point
NAME = "all-MiniLM-L6-v2"
# Before own_caches hides them.
USERS = {key: os.environ.get(key) for key in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "HUBMODELS_MIRROR")}
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
    assert file.sha256 == DIGEST == catalog.lookup(NAME).weights[0].sha256
    assert file.path.stat().st_size == catalog.lookup(NAME).weights[0].size
    assert DIGEST in str(model.provenance)
    store.verify(minilm / "vocab.txt", *catalog.lookup(NAME).vocabulary)


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


BASES = {"bert": hubmodels.bertModel, "gpt": hubmodels.gptModel, "gpt2": hubmodels.gpt2Model}
EMBEDDED = [name for name, record in catalog.manifest().items() if record.weights[0].is_embedded]


def test_a_model_of_each_kind_is_embedded_with_a_check():
    assert {"bert-nano", "gpt-nano"} <= set(EMBEDDED)
    assert [name for name in EMBEDDED if "none" in catalog.lookup(name).check] == []


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_check_of_a_model_in_this_repository_replays(name):
    record = catalog.lookup(name)
    replay(BASES[record.family](name), record.check)


def test_the_check_of_gpt_nano_holds_at_its_last_word_alone():
    """The check sees the second and third word; that no later one changes them is what makes it a decoder's."""
    check, model = catalog.lookup("gpt-nano").check, hubmodels.gptModel("gpt-nano")
    ids = torch.tensor(check["input_ids"])
    end = check["slice"][1][1]
    assert end < ids.shape[1]
    replay(model, {**check, "input_ids": ids[:, :end].tolist()})


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
    assert (named.provenance.weights, named.provenance.revision) == (NAME, catalog.lookup(NAME).revision)
    assert named.provenance.files[0].sha256 == DIGEST
    want = dict(model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in named.named_parameters())
    assert hubmodels.bertTokenizer(NAME)(TEXTS)["input_ids"].tolist() == IDS


# --- What the user has downloaded. The texts are of transformers' tests/models/openai/test_modeling_openai.py and
# tests/models/gpt2/test_modeling_gpt2.py


def look_into(monkeypatch, hub_cache: str, others: str) -> None:
    """Only these caches of the user's are left, and no network. The store is the test's own: it links what it finds."""
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_CACHE", hub_cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HUBMODELS_MIRROR", others)


@pytest.fixture
def users_caches(own_caches, monkeypatch):
    """The caches that the user really has, looked into and never written to."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub_cache = USERS["HF_HUB_CACHE"] or os.path.join(USERS["HF_HOME"] or f"{caches}/huggingface", "hub")
    store = os.path.join(USERS["TORCH_HOME"] or f"{caches}/torch", "hub", "hubmodels")
    look_into(monkeypatch, os.path.expanduser(hub_cache), f"{store} {USERS['HUBMODELS_MIRROR'] or ''}")


def load_if_at_hand(entry, name: str):
    """Skips where the user has not downloaded the files; bytes that are there and wrong are a failure."""
    try:
        return entry(name, progress=False)
    except StoreError as error:
        digests = [(file.revision, file.sha256, file.git_sha1) for file in catalog.lookup(name).files]
        wrong = [line for line in str(error).splitlines() if line.endswith("; it was left alone")]
        pinned = [pin for pins in digests for pin in pins if pin]
        if "HF_HUB_OFFLINE is set" not in str(error) or any(
            pin in line.split(": ")[0] for line in wrong for pin in pinned
        ):
            raise  # a file of another revision may well be another
        pytest.skip(f"{name} is not in the user's caches")


def test_openai_gpt_goes_on_as_published(users_caches):
    model = load_if_at_hand(hubmodels.gpt, "openai-gpt")
    prompt = [481, 4735, 544]  # the president is
    expected = [246, 963, 870, 762, 239, 244, 40477, 244, 249, 719, 881, 487, 544, 240, 244, 603, 481]
    assert model.generate(torch.tensor([prompt]), max_new_tokens=17)[0].ids == expected
    tokenizer = load_if_at_hand(hubmodels.gptTokenizer, "openai-gpt")
    assert tokenizer("the president is")["input_ids"].tolist() == [prompt]


def test_gpt2_goes_on_as_published(users_caches):
    """A batch of two prompts; transformers pads them on the left, we on the right."""
    model = load_if_at_hand(hubmodels.gpt2, "gpt2")
    tokenizer = load_if_at_hand(hubmodels.gpt2Tokenizer, "gpt2")
    prompts = ["Hello, my dog is a little", "Today, I"]
    expected = [
        "Hello, my dog is a little bit of a mess. I'm not sure if he's going",
        "Today, I'm going to be doing a lot of research on this. I",
    ]
    longest = max(len(tokenizer(prompt)["input_ids"][0]) for prompt in prompts)
    found = generate(model, tokenizer, prompts, max_new_tokens=20 - longest)  # there max_length counts the prompt
    assert [prompt + text.text for prompt, text in zip(prompts, found, strict=True)] == expected


def test_gpt2s_check_replays(users_caches):
    replay(load_if_at_hand(hubmodels.gpt2Model, "gpt2"), catalog.lookup("gpt2").check)


def everything_below(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in root.rglob("*")}


@pytest.mark.parametrize("where", ["hub cache", "store"])
@pytest.mark.parametrize("entry", [hubmodels.gpt, hubmodels.gpt2])
def test_what_is_not_at_hand_is_skipped_and_what_is_wrong_is_not(entry, where, monkeypatch, tmp_path):
    """The skip must not hide a damaged file. Nothing is written where the user's files are."""
    name, theirs = "openai-gpt" if entry is hubmodels.gpt else "gpt2", tmp_path / "theirs"
    look_into(monkeypatch, str(theirs / "hf"), str(theirs / "store"))
    (theirs / "store").mkdir(parents=True)
    with pytest.raises(pytest.skip.Exception, match=f"{name} is not in the user's caches"):
        load_if_at_hand(entry, name)
    file = catalog.lookup(name).weights[0]
    if where == "store":
        path = theirs / "store" / store.relative_path(file)
    elif file.is_url:
        path = theirs / "hf" / "models--else--where" / "blobs" / file.git_sha1
    else:
        path = theirs / "hf" / f"models--{file.source.replace('/', '--')}" / "snapshots" / file.revision / file.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not it")
    there = everything_below(theirs)
    with pytest.raises(StoreError, match=r"; it was left alone\n"):
        load_if_at_hand(entry, name)
    assert everything_below(theirs) == there


def test_another_revision_of_the_users_is_no_damage(monkeypatch, tmp_path):
    look_into(monkeypatch, str(tmp_path / "hf"), "")
    file = catalog.lookup("gpt2").weights[0]
    path = tmp_path / "hf" / f"models--{file.source.replace('/', '--')}" / "snapshots" / ("0" * 40) / file.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another release")
    with pytest.raises(pytest.skip.Exception, match="gpt2 is not in the user's caches"):
        load_if_at_hand(hubmodels.gpt2, "gpt2")
