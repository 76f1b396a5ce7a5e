"""Other libraries as the benchmark runs them: each computes what ours does. What is not installed is skipped."""

import sys
from pathlib import Path

import pytest
import torch
from reference import randomise

import hubmodels
from hubmodels.bench.peers import DECODERS, ENCODERS, PeerError

transformers = pytest.importorskip("transformers")

WORDS, NEW = 120, 12
NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "ctranslate2": ("ctranslate2",),
}
# The peers' dtypes; whatever else is asked of them is a PeerError.
TORCH = ("float32", "bfloat16")
DTYPES = {"onnxruntime": ("float32", "int8"), "ctranslate2": ("float32", "int8")}
LENGTHS = {"uniform": (9, 9, 9), "ragged": (4, 9, 7)}


def cases(builders) -> list[tuple[str, str]]:
    return [(name, dtype) for name in builders for dtype in DTYPES.get(name, TORCH)]


def refused(builders) -> list[tuple[str, str]]:
    known = {*TORCH, "int8"}
    return [(name, dtype) for name in builders for dtype in sorted(known - set(DTYPES.get(name, TORCH)))]


def build(builders, name: str, directory: Path, dtype: str):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    if (name, dtype) == ("openvino", "bfloat16") and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("openvino computes in no bfloat16 on this CPU")
    return builders[name](directory, dtype)


def saved(model, directory: Path) -> Path:
    randomise(model, 1, 0.15)
    model.eval().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=40, **sizes)
    return saved(transformers.BertModel(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=4, n_inner=112, n_positions=48)
    config.eos_token_id = config.bos_token_id = 0
    return saved(transformers.GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, WORDS, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "dtype"), cases(ENCODERS))
def test_encoder_gives_our_states(bert, name, dtype):
    run, ours = build(ENCODERS, name, bert, dtype), hubmodels.bertModel(str(bert))
    for lengths in LENGTHS.values():
        ids = some_ids(3, 9)
        mask = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
        with torch.inference_mode():
            wanted = ours(ids, mask).last_hidden_state
        found = run(ids, mask)
        assert found.shape == wanted.shape
        found, wanted = found[mask.bool()].float(), wanted[mask.bool()]
        if dtype == "float32":
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        else:
            least = 0.99 if torch.cpu._is_vnni_supported() else 0.97  # without it, ctranslate2's sums overflow
            assert torch.cosine_similarity(found, wanted, -1).min() >= least


@pytest.mark.parametrize(("name", "dtype"), cases(DECODERS))
def test_decoder_gives_our_tokens(gpt2, name, dtype):
    run, ours = build(DECODERS, name, gpt2, dtype), hubmodels.gpt2(str(gpt2))
    for prompt in (some_ids(1, 7), some_ids(32, 5)):  # the second is not to see what the first left in a cache
        wanted = torch.tensor([row.ids for row in ours.generate(prompt, max_new_tokens=NEW, stop_ids=[])])
        found = run(prompt, NEW)
        assert found.shape == wanted.shape
        assert found.dtype == torch.long
        if dtype == "float32":
            assert torch.equal(found, wanted)
        else:  # one token that is another changes all after it
            assert (found[:, 0] == wanted[:, 0]).float().mean() >= 0.9


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_does_not_stop(gpt2, tmp_path, name):
    """Not even where every token is the end token."""
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[0] * 10)
    model.save_pretrained(tmp_path)
    run = build(DECODERS, name, tmp_path, "float32")
    assert run(some_ids(2, 4), 6).tolist() == [[0] * 6] * 2


@pytest.mark.parametrize(("name", "dtype"), refused(ENCODERS))
def test_encoder_refuses_a_dtype(bert, name, dtype):
    with pytest.raises(PeerError, match=f"dtype = '{dtype}'"):
        build(ENCODERS, name, bert, dtype)


@pytest.mark.parametrize(("name", "dtype"), refused(DECODERS))
def test_decoder_refuses_a_dtype(gpt2, name, dtype):
    with pytest.raises(PeerError, match=f"dtype = '{dtype}'"):
        build(DECODERS, name, gpt2, dtype)


@pytest.mark.parametrize("name", ["transformers", "onnxruntime", "openvino", "ctranslate2"])
def test_missing_package_says_what_to_install(bert, gpt2, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    for builders, directory in ((ENCODERS, bert), (DECODERS, gpt2)):
        with pytest.raises(PeerError, match=f"^{name}: .*pip install {name}"):
            builders[name](directory, "float32")
