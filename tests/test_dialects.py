"""The same random model in every dialect: bit-equal parameters, an account of both sides in full, memory once."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from dialects import BERT, GPT, Writer, memory_of

import hubmodels
from hubmodels.checkpoint import dialects
from hubmodels.checkpoint.dialects import Dialect
from hubmodels.checkpoint.tensors import scratch
from hubmodels.errors import CheckpointError

SIZES = {
    "bert": {
        **{"model_type": "bert", "vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"intermediate_size": 20, "max_position_embeddings": 11, "type_vocab_size": 4},
    },
    "gpt": {"model_type": "openai-gpt", "vocab_size": 37, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3},
    "gpt2": {"model_type": "gpt2", "vocab_size": 37, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3},
}
LARGER = {
    "bert": {"model_type": "bert", "vocab_size": 9000, "num_hidden_layers": 3, "max_position_embeddings": 64},
    "gpt": {"model_type": "openai-gpt", "vocab_size": 9000, "n_positions": 64, "n_layer": 3},
}
ENTRIES = {"bert": hubmodels.bertForPreTraining, "gpt": hubmodels.gpt, "gpt2": hubmodels.gpt2}
ALL = [
    *(pytest.param("bert", write, id=f"bert-{name}") for name, write in BERT.items()),
    *(pytest.param("gpt", write, id=f"gpt-{name}") for name, write in GPT.items()),
    *(pytest.param("gpt2", GPT[name], id=f"gpt2-{name}") for name in ("safetensors", ".bin", "native")),
]


def made(family: str, sizes: dict, seed: int = 0) -> torch.nn.Module:
    """A model whose every parameter is random, norms and biases too."""
    config = hubmodels.hub.families.ENTRY_POINTS[family].family.config.from_published(sizes, "a test")
    classes = {"bert": "BertForPreTraining", "gpt": "Gpt", "gpt2": "Gpt2"}
    entries = hubmodels.hub.families.ENTRY_POINTS[family]
    model = next(cls for cls in entries.classes if cls.__name__ == classes[family])(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def written(model: torch.nn.Module, write: Writer, directory: Path) -> Path:
    directory.mkdir(parents=True)
    config = {"model_type": model.config.MODEL_TYPE, **model.config.to_published()}
    (directory / "config.json").write_text(json.dumps(config))
    state = model.family.keys.dump(model.state_dict(), prefixed=True)
    return write({key: tensor.detach().contiguous() for key, tensor in state.items()}, directory)


@pytest.mark.parametrize(("family", "write"), ALL)
def test_every_dialect_loads_to_the_same_bits(family, write, tmp_path):
    model = made(family, SIZES[family])
    loaded = ENTRIES[family](written(model, write, tmp_path / "there"))
    want = dict(model.named_parameters())
    got = dict(loaded.named_parameters())
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    report = loaded.provenance.report
    assert report.is_complete
    assert report.of_the_model() == (len(want), sum(parameter.numel() for parameter in want.values()))
    assert str(report).endswith("numbers: 100 %")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["safetensors", ".bin", "pytorch-pretrained-bert", "Lightning", "native"])
def test_half_precision_files_load_to_the_rounded_bits(name, dtype, tmp_path):
    model = made("bert", SIZES["bert"]).to(dtype)
    path = written(model, BERT[name], tmp_path / "there")
    for asked in (torch.float32, dtype):
        loaded = hubmodels.bertForPreTraining(path, dtype=asked)
        want = {key: parameter.to(asked) for key, parameter in model.named_parameters()}
        assert all(torch.equal(parameter, want[key]) for key, parameter in loaded.named_parameters())
        assert {entry.dtype for entry in loaded.provenance.report.entries if entry.ours} == {str(dtype)[6:]}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("bert", name) for name in ("safetensors", ".bin in three files", "pytorch-pretrained-bert", "TensorFlow")),
        *(("bert", name) for name in ("Lightning", "native")),
        *(("gpt", name) for name in ("safetensors", "OpenAI")),
    ],
)
def test_a_checkpoint_is_never_in_memory_twice(family, name, tmp_path):
    """Measured with files of full size by benchmarks/formats.py; the bar there and here is 1.15."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("there is no /proc to tell how much memory was used")
    write = (BERT if family == "bert" else GPT)[name]
    paths = [written(made(family, sizes[family]), write, tmp_path / str(n)) for n, sizes in enumerate((SIZES, LARGER))]
    peak, _, size = memory_of(ENTRIES[family].__name__, *paths)
    assert size > 100e6
    assert peak <= 1.15 * size


def test_threads_that_read_side_by_side_hold_one_tensor_twice_at_a_time():
    """Else the peak is that of as many as there are threads, and which those are is luck."""
    inside, together = threading.Semaphore(), threading.Event()

    def turn(_) -> None:
        with scratch((64, 64), torch.float32), scratch((3, 3), torch.float16):  # a thread may have some already
            if not inside.acquire(blocking=False):
                together.set()
            together.wait(0.02)
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turn, range(8)))
    assert not together.is_set()


# --- The files' own names


def test_the_account_calls_tensors_what_the_file_calls_them(tmp_path):
    path = written(made("bert", SIZES["bert"]), BERT["TensorFlow"], tmp_path / "there")
    lines = {entry.theirs: entry for entry in hubmodels.bertForPreTraining(path).provenance.report.entries}
    query = lines["bert/encoder/layer_1/attention/self/query/kernel"]
    assert (query.ours, query.operation) == ("transformer.layers.1.attention.qkv.weight", "transposed and fused")
    inner = lines["bert/encoder/layer_0/intermediate/dense/kernel"]
    assert (inner.operation, inner.shape) == ("transposed", (12, 20))
    assert lines["global_step"].because == "of the training, not of the model"


def test_errors_call_them_so_too(tmp_path):
    model = made("bert", SIZES["bert"])
    path = written(model, BERT["TensorFlow"], tmp_path / "there")
    config = path / "bert_config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 20', '"intermediate_size": 21'))
    with pytest.raises(CheckpointError) as caught:
        hubmodels.bertModel(path)
    name = "bert/encoder/layer_1/intermediate/dense/kernel"
    assert f"{name} (bert.encoder.layer.1.intermediate.dense.weight): expected [21, 12]" in str(caught.value)


def test_the_report_is_a_table_with_both_totals(tmp_path):
    path = written(made("bert", SIZES["bert"]), BERT["pytorch-pretrained-bert"], tmp_path / "there")
    model = hubmodels.bertModel(path)
    lines = str(model.provenance.report).splitlines()
    assert lines[0].split() == ["OURS", "THEIRS", "OPERATION", "SHAPE", "DTYPE", "WHY"]
    row = next(line for line in lines if "embeddings.LayerNorm.gamma" in line)
    assert row.split() == ["embeddings.norm.weight", "bert.embeddings.LayerNorm.gamma", "loaded", "12", "float32"]
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert re.fullmatch(r"of the file: (\d+) of \1 names, ([\d,]+) of \2 numbers: 100 %", lines[-2])
    assert lines[-1] == f"of the model: 31 of 31 names, {numbers:,} of {numbers:,} numbers: 100 %"


# --- A new dialect is an entry of the list, and nothing else


def fairseq_like(key: str) -> str | tuple[str, ...]:
    """Its words for BERT's parts; query, key and value are one matrix."""
    key = key.replace("decoder.sentence_encoder.", "bert.").replace("bert.layers.", "bert.encoder.layer.")
    if part := re.fullmatch(r"(.*)self_attn\.in_proj_(weight|bias)", key):
        return tuple(f"{part[1]}attention.self.{each}.{part[2]}" for each in ("query", "key", "value"))
    words = {"self_attn.out_proj": "attention.output.dense", "self_attn_layer_norm": "attention.output.LayerNorm"}
    words |= {"fc1": "intermediate.dense", "fc2": "output.dense", "final_layer_norm": "output.LayerNorm"}
    for theirs, ours in words.items():
        key = key.replace(theirs, ours)
    return key


def as_fairseq(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in state.items():
        key = key.replace("bert.encoder.layer.", "decoder.sentence_encoder.layers.")
        key = key.replace("attention.output.dense", "self_attn.out_proj")
        key = key.replace("attention.output.LayerNorm", "self_attn_layer_norm")
        key = key.replace("intermediate.dense", "fc1").replace("output.dense", "fc2")
        if key.startswith("decoder."):
            key = key.replace("output.LayerNorm", "final_layer_norm")
        found[key] = tensor
    for key in [key for key in found if "attention.self.query" in key]:
        parts = [found.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        found[key.replace("attention.self.query.", "self_attn.in_proj_")] = torch.cat(parts)
    return found


@pytest.fixture
def fairseq(monkeypatch) -> None:
    spoken = Dialect("fairseq", lambda key: "sentence_encoder" in key, fairseq_like)
    monkeypatch.setattr(dialects, "DIALECTS", (*dialects.DIALECTS, spoken))


def test_a_dialect_that_names_and_cuts_otherwise_needs_no_change_to_a_family(fairseq, tmp_path):
    model, write = made("bert", SIZES["bert"]), BERT["a training's checkpoint"]
    path = written(model, lambda state, directory: write(as_fairseq(state), directory), tmp_path / "there")
    loaded = hubmodels.bertForPreTraining(path)
    want = dict(model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in loaded.named_parameters())
    assert loaded.provenance.dialect == "fairseq"
    assert loaded.provenance.report.is_complete


def test_a_tensor_that_cannot_be_cut_is_named(fairseq, tmp_path):
    def write(state, directory):
        cut = as_fairseq(state)
        name = next(name for name in cut if name.endswith("in_proj_bias"))
        return BERT[".bin"]({**cut, name: cut[name][:-1]}, directory)

    path = written(made("bert", SIZES["bert"]), write, tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"in_proj_bias \[35\]: expected 3 equal parts: .*query.*key.*value"):
        hubmodels.bertModel(path)
