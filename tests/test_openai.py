"""OpenAI's own release of GPT: ten .npy shards of one list of numbers, and the shapes that part it."""

import io
import itertools
import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SHARED
from reference import distance, generator, randomise
from safetensors.torch import save_file
from test_store import REVISION, FakeHub

import hubmodels
from hubmodels import loading, local, store
from hubmodels.checkpoint import tensors
from hubmodels.checkpoint.dialects import translate
from hubmodels.checkpoint.readers import read_checkpoint
from hubmodels.errors import CheckpointError, HubModelsError, StoreError
from hubmodels.families.gpt import FAMILY, GptConfig

catalog = import_module("hubmodels.catalog")  # hubmodels.catalog, the attribute, is the entry point

SIZES = {"vocab_size": 67, "n_positions": 16, "n_embd": 20, "n_layer": 3, "n_head": 4}
PARTS = ("attn/c_attn/w", "attn/c_attn/b", "attn/c_proj/w", "attn/c_proj/b", "ln_1/g", "ln_1/b")
PARTS += ("mlp/c_fc/w", "mlp/c_fc/b", "mlp/c_proj/w", "mlp/c_proj/b", "ln_2/g", "ln_2/b")
KINDS = {"w": "weight", "g": "weight", "b": "bias"}


def their_names(layers: int) -> list[str]:
    """OpenAI's order, as its train.py makes the variables, in Hugging Face's names: positions, words, then blocks.

    Source: openai/finetune-transformer-lm, train.py, `embed`, `block` and the sorting of parameters by their making.
    """
    names = ["positions_embed.weight", "tokens_embed.weight"]
    for layer, part in itertools.product(range(layers), PARTS):
        *path, kind = part.split("/")
        names.append(".".join(["h", str(layer), *path, KINDS[kind]]))
    return names


def their_model(seed: int = 1, **changes) -> transformers.OpenAIGPTLMHeadModel:
    """Random in every parameter, float32, in eval mode."""
    config = transformers.OpenAIGPTConfig(attn_implementation="eager", **{**SIZES, **changes})
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    randomise(model, seed)
    return model


def is_matrix(name: str) -> bool:
    return ".c_" in name and name.endswith("weight")


def arrays_of(model: transformers.OpenAIGPTLMHeadModel) -> list[np.ndarray]:
    """As OpenAI has them: what was a convolution of width 1 begins with a 1."""
    tensors = model.transformer.state_dict()
    names = their_names(model.config.n_layer)
    assert set(names) == {name for name in tensors if not name.endswith(".attn.bias")}
    arrays = [tensors[name].numpy() for name in names]
    return [
        array[None] if ".c_" in name and array.ndim == 2 else array for name, array in zip(names, arrays, strict=True)
    ]


def evenly(numbers: np.ndarray) -> list[np.ndarray]:
    return np.array_split(numbers, 10)


def oddly(numbers: np.ndarray) -> list[np.ndarray]:
    """Through the middle of tensors, at their ends, several in one, one over several, and a shard of nothing."""
    words = 16 * 20 + 67 * 20
    return np.split(numbers, [1, 7, 319, 320, 320, words - 1, words, words + 3, words + 20 * 60 + 5])


def whole(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers]


def many(numbers: np.ndarray) -> list[np.ndarray]:
    """More than ten: params_10.npy comes after params_9.npy, not after params_1.npy."""
    return np.array_split(numbers, 23)


def release(directory: Path, arrays: list[np.ndarray], cut=evenly, config: dict | None = SIZES) -> Path:
    """params_0.npy … and params_shapes.json; for sizes that are not the published ones a config.json beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = np.concatenate([array.ravel() for array in arrays])
    for number, part in enumerate(cut(numbers)):
        np.save(directory / f"params_{number}.npy", part)
    (directory / "params_shapes.json").write_text(json.dumps([list(array.shape) for array in arrays]))
    if config is not None:
        (directory / "config.json").write_text(json.dumps({"model_type": "openai-gpt", **config}))
    return directory


@pytest.fixture
def theirs() -> transformers.OpenAIGPTLMHeadModel:
    return their_model()


@pytest.fixture
def tiny(theirs, tmp_path) -> Path:
    return release(tmp_path / "release", arrays_of(theirs))


IDS = torch.randint(0, SIZES["vocab_size"], (5, 9), generator=generator(2))


# What is read


@pytest.mark.parametrize("cut", [evenly, oddly, whole, many])
def test_every_parameter_and_the_logits_equal_transformers(theirs, tmp_path, cut):
    directory = release(tmp_path, arrays_of(theirs), cut)
    model = hubmodels.gpt(directory, dtype=torch.float64)
    theirs = theirs.double()
    exported = FAMILY.keys.dump(model.state_dict(), prefixed=True)
    wanted = dict(theirs.named_parameters())
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert distance(model(IDS).logits, theirs(IDS).logits) <= 1e-10


def test_one_layer_equals_transformers(tmp_path):
    theirs = their_model(n_layer=1)
    model = hubmodels.gpt(release(tmp_path, arrays_of(theirs), config={**SIZES, "n_layer": 1}), dtype=torch.float64)
    with torch.no_grad():
        assert distance(model(IDS).logits, theirs.double()(IDS).logits) <= 1e-10


@pytest.mark.parametrize("entry", ["gptModel", "gpt", "openAIGPTModel", "openAIGPTLMHeadModel"])
def test_every_entry_point_reads_the_release(theirs, tiny, entry):
    model = getattr(hubmodels, entry)(tiny, dtype=torch.float64)
    with torch.no_grad():
        states = getattr(model, "transformer", model)(IDS)
        states = states if entry == "openAIGPTModel" else states.last_hidden_state
        assert distance(states, theirs.double().transformer(IDS).last_hidden_state) <= 1e-10
    assert not model.training


def test_the_head_that_chooses_starts_anew(tiny):
    with pytest.warns(UserWarning, match=re.escape(f"{tiny} has no choice for GptDoubleHeads: it starts anew")):
        model = hubmodels.gptDoubleHeads(tiny)
    assert (model.provenance.report.count("new"), model.provenance.report.count("dropped")) == (2, 0)


def test_the_same_as_hugging_faces_file(theirs, tiny, tmp_path):
    """One model, two publishers."""
    other = tmp_path / "other"
    theirs.save_pretrained(other)
    by_openai, by_hugging_face = hubmodels.gpt(tiny), hubmodels.gpt(other)
    assert by_hugging_face.provenance.dialect == "huggingface"
    ours, wanted = by_openai.state_dict(), by_hugging_face.state_dict()
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_file_of_weights_beside_the_shards_is_preferred(theirs, tiny):
    """Who exports into the release's own directory reads the export back."""
    changed = {f"transformer.{name}": torch.zeros(t.shape) for name, t in theirs.transformer.named_parameters()}
    save_file(changed, tiny / "model.safetensors")
    model = hubmodels.gpt(tiny)
    assert model.provenance.dialect == "huggingface"
    assert not any(parameter.any() for parameter in model.parameters())


def test_writing_into_the_model_leaves_the_shards_alone(tiny):
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with torch.no_grad():
        for parameter in hubmodels.gpt(tiny).parameters():
            parameter.fill_(42)
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before


def test_half_precision_is_rounded_from_what_was_read(theirs, tiny):
    model = hubmodels.gpt(tiny, dtype=torch.bfloat16)
    words = theirs.transformer.tokens_embed.weight.bfloat16()
    assert torch.equal(model.transformer.embeddings.word.weight, words)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_export_of_the_release_is_read_by_transformers(theirs, tiny, tmp_path):
    hubmodels.export(hubmodels.gpt(tiny), tmp_path / "out")
    again = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "out")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", [str, Path])
def test_a_str_or_a_path(tiny, kind):
    assert hubmodels.gpt(kind(tiny)).provenance.weights == str(tiny)


def test_without_config_json_the_published_sizes_hold(theirs, tmp_path):
    directory = release(tmp_path, arrays_of(theirs), config=None)
    with loading.find_checkpoint(directory, FAMILY) as found:
        pass
    assert FAMILY.config.from_published(found.published, found.config_source) == GptConfig()
    assert loading.model_type_of(directory) == "openai-gpt"
    config = GptConfig()
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (40478, 512, 768)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_act) == (12, 12, "gelu_new")
    with pytest.raises(CheckpointError, match=re.escape("params.0 (positions_embed.weight): expected [512, 768]")):
        hubmodels.gpt(directory)


def published_shapes() -> list[list[int]]:
    path = SHARED / "data" / "vocab" / "gpt1" / "params_shapes.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def test_the_published_shapes_are_all_of_gpt(tmp_path):
    """Shards with holes instead of numbers: only their headers are read, but for the last few numbers."""
    shapes = published_shapes()
    total = sum(int(np.prod(shape)) for shape in shapes)
    assert (len(shapes), total) == (146, 116_534_784)
    bounds = [total * number // 10 for number in range(11)]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        path = tmp_path / f"params_{number}.npy"
        with open(path, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (end - first,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * (end - first))
    with open(path, "r+b") as file:
        file.seek(-4 * 768, 2)
        np.arange(768, dtype=np.float32).tofile(file)
    (tmp_path / "params_shapes.json").write_text(json.dumps(shapes))
    found, _, dialect, _ = translate(read_checkpoint(tmp_path), "the release")
    with torch.device("meta"):
        model = transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig())
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dialect == "openai"
    assert {name: lazy.shape for name, lazy in found.items()} == wanted
    assert list(found) == their_names(12)
    assert torch.equal(found["h.11.ln_2.bias"].read(), torch.arange(768, dtype=torch.float32))
    assert not found["h.11.ln_2.weight"].read().any()


# How it is read


def test_each_number_is_read_once_and_one_tensor_at_a_time(theirs, tiny, monkeypatch):
    """Nothing of the whole list's size is ever made."""
    asked: list[int] = []
    read = tensors.read_bytes
    monkeypatch.setattr(tensors, "read_bytes", lambda p, b, buffer: (asked.append(len(buffer)), read(p, b, buffer))[1])
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("a whole shard was read"))
    read_checkpoint(tiny)
    assert asked == []
    hubmodels.gpt(tiny)
    sizes = [4 * parameter.numel() for parameter in theirs.parameters()]
    assert sum(asked) == sum(sizes)
    assert max(asked) <= max(sizes)


def test_a_tensor_is_read_only_when_it_is_asked_for(tiny):
    found = read_checkpoint(tiny)
    last = found["params.37"].read()
    for number in range(5):
        (tiny / f"params_{number}.npy").unlink()
    assert torch.equal(found["params.37"].read(), last)
    with pytest.raises(FileNotFoundError):
        found["params.0"].read()


def test_read_into_equals_read(tiny):
    for lazy in read_checkpoint(tiny).values():
        target = torch.full(lazy.shape, 7.0)
        lazy.read_into(target)
        assert torch.equal(target, lazy.read())
        assert (lazy.dtype, tuple(target.shape)) == (torch.float32, lazy.shape)


def test_a_shard_that_shrinks_while_it_is_read(tiny):
    found = read_checkpoint(tiny)
    with open(tiny / "params_9.npy", "r+b") as file:
        file.truncate(130)
    with pytest.raises(CheckpointError, match=r"params_9\.npy: the file became shorter while it was read"):
        found["params.37"].read()


# The account


def test_provenance_tells_every_file_and_tensor(tiny):
    provenance = hubmodels.gpt(tiny).provenance
    names = [f"params_{number}.npy" for number in range(10)] + ["params_shapes.json"]
    assert [file.path for file in provenance.files] == [tiny / name for name in names]
    assert all(file.sha256 == store.sha256_of(file.path) for file in provenance.files)
    assert {(file.source, file.revision, file.pinned) for file in provenance.files} == {(None, None, None)}
    assert (provenance.weights, provenance.dialect, provenance.revision) == (str(tiny), "openai", None)
    report = provenance.report
    matrices = 3 * 4
    assert {name: report.count(name) for name in ("loaded", "transposed", "tied", "dropped", "new")} == {
        "loaded": 2 + 3 * 12 - matrices,
        "transposed": matrices,
        "tied": 0,
        "dropped": 0,
        "new": 0,
    }
    assert len({entry.ours for entry in report.entries}) == len(report.entries) == 38
    text = str(provenance)
    assert text.startswith(f"{tiny}: 26 loaded, 12 transposed\n")
    for file in provenance.files:
        assert f"  {file.path}\n  {file.path.name} SHA-256 {file.sha256}, openai" in text


# Releases that are refused


def refusal(directory: Path) -> str:
    """The text with which the directory is refused; no other error than ours may come out."""
    with pytest.raises(CheckpointError) as caught:
        hubmodels.gpt(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", [0, 4, 8])
def test_a_missing_shard_is_named(tiny, number):
    (tiny / f"params_{number}.npy").unlink()
    assert refusal(tiny) == f"{tiny / f'params_{number}.npy'}: missing among the shards beside it"


def test_without_the_last_shard_the_numbers_do_not_add_up(theirs, tiny):
    last = np.load(tiny / "params_9.npy").size
    (tiny / "params_9.npy").unlink()
    total = sum(parameter.numel() for parameter in theirs.parameters())
    expected = f"params_shapes.json describes {total} numbers, the 9 files params_*.npy hold {total - last}"
    assert expected in refusal(tiny)


def test_without_any_shard(theirs, tiny):
    for path in tiny.glob("params_*.npy"):
        path.unlink()
    total = sum(parameter.numel() for parameter in theirs.parameters())
    assert f"params_shapes.json describes {total} numbers, the 0 files params_*.npy hold 0" in refusal(tiny)


def test_another_array_beside_the_shards_is_named_or_left_alone(theirs, tiny):
    """It must not be taken for a missing params_10.npy."""
    np.save(tiny / "params_mine.npy", np.zeros(3, np.float32))
    try:
        model = hubmodels.gpt(tiny)
    except CheckpointError as error:
        assert "params_mine.npy" in str(error)  # noqa: PT017
    else:
        assert torch.equal(model.transformer.embeddings.word.weight, theirs.transformer.tokens_embed.weight)


def test_shards_without_their_shapes(tiny):
    (tiny / "params_shapes.json").unlink()
    assert "model.safetensors or pytorch_model.bin" in refusal(tiny)


@pytest.mark.parametrize("lost", [1, 4, 40])
def test_a_shard_that_is_cut_short(tiny, lost):
    path = tiny / "params_3.npy"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - lost)
    assert f"{path}: expected {size} bytes for " in refusal(tiny)
    assert f"got {size - lost}; fetch it again" in refusal(tiny)


def test_a_shard_with_bytes_after_its_end(tiny):
    path = tiny / "params_3.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    assert f"{path}: expected {size} bytes for " in refusal(tiny)


def test_a_shard_is_not_the_numbers_it_should_be(tiny):
    numbers = np.load(tiny / "params_3.npy")
    np.save(tiny / "params_3.npy", numbers[:-1])
    assert "params_shapes.json describes" in refusal(tiny)
    np.save(tiny / "params_3.npy", np.append(numbers, numbers[:1]))
    assert "params_shapes.json describes" in refusal(tiny)


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    width = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header + data


def saved(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


NOT_SHARDS = {
    "nothing": b"",
    "text": b"<!DOCTYPE html><html>Not found",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "magic alone": b"\x93NUMPY",
    "magic and version": b"\x93NUMPY\x01\x00",
    "cut in the header": saved(np.zeros(3, np.float32))[:40],
    "float64": saved(np.zeros(4, np.float64)),
    "float16": saved(np.zeros(4, np.float16)),
    "int32": saved(np.zeros(4, np.int32)),
    "big-endian": saved(np.zeros(4, ">f4")),
    "objects": saved(np.array([{}, {}], dtype=object), allow_pickle=True),
    "fields": saved(np.zeros(2, [("a", "<f4"), ("b", "<f4")])),
    "two dimensions": saved(np.zeros((2, 3), np.float32)),
    "two dimensions in Fortran's order": saved(np.asfortranarray(np.zeros((2, 3), np.float32))),
    "no dimension": saved(np.zeros((), np.float32)),
    "version 2": saved(np.zeros(4, np.float32), version=(2, 0)),
    "version 3": saved(np.zeros(4, np.float32), version=(3, 0)),
    "negative": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}"),
    "fraction": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1.0,)}", bytes(4)),
    "truth": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", bytes(4)),
    "immense": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,)}"),
    "no shape": npy(b"{'descr': '<f4', 'fortran_order': False}"),
    "no descr": npy(b"{'fortran_order': False, 'shape': (0,)}"),
    "shape is a number": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': 4}", bytes(16)),
    "a list": npy(b"['<f4', False, (4,)]", bytes(16)),
    "a call": npy(b"__import__('os').mkdir('marker')"),
    "a longer header than there is": npy(b"{}")[:-2] + b"",
    "header of the greatest length": b"\x93NUMPY\x01\x00\xff\xff{}",
    "brackets": npy(b"(" * 60_000),
    "closed brackets": npy(b"[" * 30_000 + b"]" * 30_000),
    "signs": npy(b"-" * 60_000 + b"1"),
    "a sum": npy(b"1+" * 30_000 + b"1"),
    "a long number": npy(b"9" * 60_000),
    "not text": npy(b"\xff\xfe\x00" * 20),
}


@pytest.mark.parametrize("case", NOT_SHARDS)
def test_what_is_no_shard_is_refused(tiny, case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tiny / "params_4.npy"
    path.write_bytes(NOT_SHARDS[case])
    text = refusal(tiny)
    assert text.startswith(f"{path}: expected ")
    assert not text.rstrip().endswith(":")  # a reason is given
    assert len(text) < 1000
    assert not (tmp_path / "marker").exists()


def test_a_row_in_fortrans_order_is_the_same_row(theirs, tiny):
    """Of one dimension both orders are the same bytes."""
    path = tiny / "params_4.npy"
    path.write_bytes(path.read_bytes().replace(b"'fortran_order': False", b"'fortran_order': True "))
    assert torch.equal(hubmodels.gpt(tiny).transformer.embeddings.word.weight, theirs.transformer.tokens_embed.weight)


def test_a_directory_in_a_shards_place(tiny):
    (tiny / "params_4.npy").unlink()
    (tiny / "params_4.npy").mkdir()
    assert str(tiny / "params_4.npy") in refusal(tiny)


NOT_SHAPES = {
    "nothing": "",
    "text": "shapes",
    "cut off": "[[16, 20], [67",
    "a number": "3",
    "null": "null",
    "an object": '{"shape": [16, 20]}',
    "an empty object": "{}",
    "an empty text": '""',
    "of numbers": "[16, 20]",
    "of text": '["ab"]',
    "of nulls": "[null]",
    "negative": "[[16, 20], [-67, -20]]",
    "zero": "[[16, 20], [0, 20]]",
    "fraction": "[[16.0, 20]]",
    "truth": "[[16, true]]",
    "nested": "[[[16, 20]]]",
    "text in a shape": '[[16, "20"]]',
    "not a number": "[[16, NaN]]",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", NOT_SHAPES)
def test_what_are_no_shapes_is_refused(tiny, case):
    (tiny / "params_shapes.json").write_text(NOT_SHAPES[case])
    assert refusal(tiny).startswith(f"{tiny / 'params_shapes.json'}: expected a list of shapes: ")


def test_shapes_that_are_not_text_are_refused(tiny):
    (tiny / "params_shapes.json").write_bytes(b"\xff\xfe[]")
    assert refusal(tiny).startswith(f"{tiny / 'params_shapes.json'}: expected a list of shapes: ")


@pytest.mark.parametrize("change", [[16, 21], [10**30, 20], []], ids=str)
def test_shapes_that_do_not_add_up(tiny, change):
    shapes = json.loads((tiny / "params_shapes.json").read_text())
    (tiny / "params_shapes.json").write_text(json.dumps([change, *shapes[1:]]))
    text = refusal(tiny)
    assert text.startswith(f"{tiny}: params_shapes.json describes ")
    assert "the 10 files params_*.npy hold" in text


def test_shapes_of_another_order_do_not_fit_the_model(tiny):
    """The same numbers: only the model can tell."""
    shapes = json.loads((tiny / "params_shapes.json").read_text())
    (tiny / "params_shapes.json").write_text(json.dumps([shapes[1], shapes[0], *shapes[2:]]))
    text = refusal(tiny)
    assert "params.0 (positions_embed.weight): expected [16, 20]" in text
    assert "got [67, 20]" in text


@pytest.mark.parametrize("layers", [2, 4])
def test_a_config_of_another_depth(tiny, layers):
    (tiny / "config.json").write_text(json.dumps({"model_type": "openai-gpt", **SIZES, "n_layer": layers}))
    text = refusal(tiny)
    assert "Check that config.json belongs to this file" in text
    assert f"transformer.layers.{min(layers, 3)}" in text or f"layers.{min(layers, 3)}" in text


def test_arrays_that_are_no_whole_layer(theirs, tmp_path):
    directory = release(tmp_path, arrays_of(theirs)[:-1])
    assert "transformer.layers.2.feed_forward_norm.bias" in refusal(directory)


@pytest.mark.parametrize("entry", ["bertModel", "gpt2"])
def test_another_familys_entry_point_refuses_the_release(tiny, entry):
    with pytest.raises(HubModelsError, match=r"openai-gpt|no row knows it"):
        getattr(hubmodels, entry)(tiny)


@pytest.mark.parametrize("name", ["params_0.npy", "params_shapes.json"])
def test_a_path_into_the_release_means_all_of_it(tiny, name):
    model, whole = hubmodels.gpt(tiny / name), hubmodels.gpt(tiny)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert model.provenance.weights == str(tiny)


# By name


NAME = "tiny-gpt"


@pytest.fixture
def published(theirs, tiny, monkeypatch):
    """A site that has the release, file by file, and a manifest that pins each by its git blob."""
    (tiny / "encoder.json").write_text("{}")
    (tiny / "vocab.bpe").write_text("#version: 0.2\n")
    site = FakeHub()
    names = [*(f"model/params_{number}.npy" for number in range(10)), "model/params_shapes.json"]
    names += ["model/encoder.json", "model/vocab.bpe"]
    files = tuple(site.publish((tiny / Path(name).name).read_bytes(), name) for name in names)
    record = catalog.Record(
        name=NAME,
        family="gpt",
        config=SIZES,
        tokenizer={"file": "model/encoder.json", "merges": "model/vocab.bpe"},
        files=files,
        dialect="openai",
        licence="MIT",
        homepage="h",
        citation="c",
        parameters=sum(parameter.numel() for parameter in theirs.parameters()),
        check={"none": "made for this test"},
    )
    for module in (catalog, local):
        monkeypatch.setattr(module, "manifest", lambda path=None: {NAME: record})
    with site.running(monkeypatch):
        yield site


def cached(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file() and ".hubmodels" not in path.parts}


def test_by_name_it_is_downloaded_once(theirs, published, tmp_path):
    model = hubmodels.gpt(NAME, dtype=torch.float64, progress=False)
    with torch.no_grad():
        assert distance(model(IDS).logits, theirs.double()(IDS).logits) <= 1e-10
    weights = [f"params_{number}.npy" for number in range(10)] + ["params_shapes.json"]
    assert sorted(path.rsplit("/", 1)[1] for _, path in published.requests) == sorted(weights)
    assert {method for method, _ in published.requests} == {"GET"}
    root = tmp_path / "torch" / "hub" / "hubmodels"
    assert cached(root) == set(weights)
    again = hubmodels.gpt(NAME, dtype=torch.float64, progress=False)
    assert len(published.requests) == 11
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    published.stop()
    hubmodels.gptModel(NAME, progress=False)


@pytest.mark.parametrize("kind", [str, Path])
def test_by_name_into_another_cache(published, tmp_path, kind):
    for _ in range(2):
        model = hubmodels.gpt(NAME, cache_dir=kind(tmp_path / "mine"), progress=False)
    assert len(published.requests) == 11
    assert all(file.path.is_relative_to(tmp_path / "mine") for file in model.provenance.files)
    assert not (tmp_path / "torch").exists()


def test_by_name_provenance_tells_what_pins_each_file(tiny, published):
    provenance = hubmodels.gpt(NAME, progress=False).provenance
    source = f"{published.url}/openai/some-gpt"
    assert (provenance.weights, provenance.dialect, provenance.revision) == (NAME, "openai", REVISION)
    assert len(provenance.files) == 11
    text = str(provenance)
    assert text.startswith(f"{NAME}: 26 loaded, 12 transposed\n")
    for file in provenance.files:
        assert (file.source, file.revision) == (source, REVISION)
        assert file.digest == f"git blob SHA-1 {store.git_sha1_of(tiny / file.path.name)}"
        assert file.sha256 == store.sha256_of(tiny / file.path.name)
        assert f"  {source} at {REVISION}\n  {file.path.name} {file.digest}, openai" in text


def test_by_name_a_wrong_shard_is_never_opened(published, tmp_path, monkeypatch):
    """The digest is another's than that of what came: nothing is parsed, and nothing stays under the file's name."""
    path = f"openai/some-gpt/{REVISION}/model/params_7.npy"
    right = published.files[path]
    published.files[path] = right[:-1] + bytes([right[-1] ^ 1])
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: pytest.fail("a file was opened"))
    with pytest.raises(StoreError, match="git blob SHA-1"):
        hubmodels.gpt(NAME, progress=False)
    assert not any(name.startswith("params_7.npy") for name in cached(tmp_path / "torch"))


def test_by_name_a_shard_altered_in_the_store_is_fetched_again(published):
    path = hubmodels.gpt(NAME, progress=False).provenance.files[3].path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hubmodels.gpt(NAME, progress=False)
    assert path.read_bytes() == content
    assert len(published.requests) == 12


def test_by_name_a_shard_altered_in_the_store_is_refused_if_there_is_no_other(published):
    path = hubmodels.gpt(NAME, progress=False).provenance.files[3].path
    path.write_bytes(b"not it")
    published.files.clear()
    with pytest.raises(StoreError, match=re.escape(f"{path}: expected git blob SHA-1")):
        hubmodels.gpt(NAME, progress=False)
    assert not path.exists()


def test_by_name_not_pretrained_downloads_nothing(published):
    model = hubmodels.gpt(NAME, pretrained=False)
    assert published.requests == []
    assert model.provenance.files == ()


def test_a_local_release_with_a_name_of_the_manifest(published, tiny, monkeypatch, tmp_path):
    """A name wins over a path; ./name is a path."""
    tiny.rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert hubmodels.gpt(f"./{NAME}").provenance.revision is None
    assert published.requests == []
    assert hubmodels.gpt(NAME, progress=False).provenance.revision == REVISION


def test_the_manifests_release_is_laid_out_so(theirs):
    """What these tests make is what the manifest has under openai-gpt: ten shards and the shapes, pinned by git."""
    record = catalog.lookup("openai-gpt")
    names = [f"model/params_{number}.npy" for number in range(10)] + ["model/params_shapes.json"]
    assert [file.filename for file in record.weights] == names
    assert len({(file.source, file.revision) for file in record.files}) == 1
    assert all(file.git_sha1 and file.size is None for file in record.weights[:10])
