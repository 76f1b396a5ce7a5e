"""Few tokens by a convolution: equal to the plain product, on the weight as it lies, and only where measured."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import distance
from test_bench import tiny
from test_generation import pair, ragged

from hubmodels import convolution, prepack
from hubmodels.convolution import FEW, ConvolvedLinear
from hubmodels.layers import ACTIVATIONS, Linear
from hubmodels.maps import PackedLinear, PackedMap, PlainMap
from hubmodels.prepack import accelerate, prepacked

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md"), reason="torch has no oneDNN, or an older one"
)


class Refuse(PackedMap):
    def forward(self, x):
        pytest.fail(f"{len(x)} tokens were not convolved")


class Elsewhere(PackedMap):
    def forward(self, x):
        return torch.full((len(x), 5), 7.0)


def weight_of(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)


def served(convolved: ConvolvedLinear, inputs: int) -> list[int]:
    return [tokens for tokens in range(FEW + 1) if convolved._rows(torch.empty(tokens, inputs))]


@pytest.fixture
def convolving(monkeypatch):
    """Any weight of float32, on any CPU"""
    monkeypatch.setattr(prepack, "convolves", lambda weight: weight.dtype == torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 768), (3072, 768), (1024, 1000), (8, 24), (5, 3)])
def test_few_tokens_are_multiplied_as_any_are(inputs, outputs, bias):
    weight, offset = weight_of(inputs, outputs)
    offset = offset if bias else None
    convolved = ConvolvedLinear(weight, offset, PlainMap(weight, offset))
    bound = 1e-6 * inputs**0.5 * float(weight.abs().max()) * 5
    for tokens in (0, 1, 2, 3, 4, 7, 13, 16, 24, FEW, FEW + 1):
        x, residual = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        right = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        assert convolved(x).shape == (tokens, outputs)
        assert convolved(x).is_contiguous()
        if tokens:
            assert distance(convolved(x), right) <= bound
            assert distance(convolved.plus(x, residual), right + residual) <= bound
            for activation, act in ACTIVATIONS.items():
                assert distance(convolved.bent(x, activation), act(right)) <= 2 * bound


def test_what_comes_need_not_lie_in_order_nor_be_of_its_dtype_nor_without_a_gradient():
    weight, offset = weight_of(64, 48)
    convolved, x = ConvolvedLinear(weight, offset, Refuse()), torch.randn(64, 16)
    right = convolved(x.T.contiguous())
    assert torch.equal(convolved(x.T), right)
    assert torch.equal(convolved(x.T.double()), right)
    assert torch.equal(convolved(x.T.contiguous().requires_grad_()), right)
    assert torch.equal(convolved.plus(x.T, offset.expand(16, -1)), right + offset)


@pytest.mark.skipif(torch.cpu._is_avx512_supported(), reason="measured, and so taken, without AVX512 alone")
def test_most_numbers_of_few_tokens_are_served():
    for inputs, outputs in ((768, 768), (768, 3072), (3072, 768), (1024, 4096)):
        weight, offset = weight_of(inputs, outputs)
        assert len(served(ConvolvedLinear(weight, offset, Refuse()), inputs)) >= 0.9 * FEW


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 768), (3072, 768), (1024, 1024), (768, 100)])
def test_no_weight_is_laid_out_anew_in_a_call(inputs, outputs, capfd):
    """As oneDNN itself tells: of the tokens that are convolved, each call is a convolution and no more."""
    weight, offset = weight_of(inputs, outputs)
    convolved = ConvolvedLinear(weight, offset, Refuse())
    given = [torch.randn(tokens, inputs) for tokens in served(convolved, inputs)]
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON), torch.inference_mode():
        for x in given:
            convolved(x)
            convolved.plus(x, torch.zeros(len(x), outputs))
    done = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert [line[5] for line in done] == ["convolution"] * 2 * len(given)


def test_a_number_of_tokens_that_wants_another_layout_goes_the_other_way(monkeypatch):
    weight, offset = weight_of(64, 48)
    convolved, widths = ConvolvedLinear(weight, offset, Elsewhere()), iter([8, 32])
    monkeypatch.setattr(convolution, "_width_of", lambda kernel, inputs: next(widths))
    convolution._rows_for.cache_clear()
    x = torch.randn(9, 64)
    assert torch.equal(convolved(x), torch.full((9, 5), 7.0))
    assert torch.equal(convolved.bent(x, "relu"), torch.full((9, 5), 7.0))
    assert torch.equal(convolved.plus(x, torch.ones(9, 5)), torch.full((9, 5), 8.0))
    assert next(widths, None) is None  # it was asked for twelve tokens and for sixteen, once
    convolution._rows_for.cache_clear()


def test_a_layout_that_is_not_known_is_not_trusted(monkeypatch):
    weight, offset = weight_of(64, 48)
    monkeypatch.setattr(convolution, "_width_of", lambda kernel, inputs: None)
    convolved = ConvolvedLinear(weight, offset, Elsewhere())
    assert torch.equal(convolved(torch.randn(8, 64)), torch.full((8, 5), 7.0))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_multiplies_alike(again):
    weight, offset = weight_of(64, 50)
    convolved, x = ConvolvedLinear(weight, offset, PlainMap(weight, offset)), torch.randn(6, 64)
    assert torch.equal(again(convolved)(x), convolved(x))


@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_a_language_model_generates_the_same(name, convolving):
    model, _ = pair(name, torch.float32, std=0.2)
    held = {p.data_ptr() for p in model.parameters()}
    _, ids, mask = ragged("left")
    for fast in (accelerate(model), prepacked(model, len(ids))):
        parts = [part for part in fast.modules() if isinstance(part, ConvolvedLinear)]
        assert len(parts) == 3 * 4 + 1
        assert {part.many.weight.data_ptr() for part in parts} <= held  # no third copy
        assert not any(isinstance(part, (Linear, PackedLinear)) for part in fast.modules())
        assert fast.generate(ids, mask, max_new_tokens=6) == model.generate(ids, mask, max_new_tokens=6)
        with torch.inference_mode():
            assert distance(fast(ids, mask).logits, model(ids, mask).logits) <= 1e-5


def test_an_encoder_has_both_layouts(convolving):
    model = tiny("bert").eval()
    fast = accelerate(model)
    parts = [part for part in fast.modules() if isinstance(part, ConvolvedLinear)]
    assert all(type(part.many) is PackedLinear for part in parts)
    assert fast.acceleration.startswith(f"{len(parts)} linear maps packed by oneDNN in float32, ")
    with torch.inference_mode():
        for shape in ((1, 7), (3, 5), (4, 12)):
            ids = torch.randint(5, 20, shape)
            assert distance(fast(ids).last_hidden_state, model(ids).last_hidden_state) <= 1e-5


def test_many_rows_are_not_convolved(convolving):
    model, _ = pair("gpt2", torch.float32)
    assert not any(isinstance(part, ConvolvedLinear) for part in prepacked(model, FEW + 1).modules())


def test_where_it_is_taken(monkeypatch):
    large, small = torch.empty(convolution._WIDE // 8, 8), torch.empty(convolution._WIDE // 8 - 1, 8)
    monkeypatch.setattr(convolution, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert convolution.convolves(large)
    assert not convolution.convolves(small)
    assert not convolution.convolves(large.double())
    monkeypatch.setattr(convolution, "onednn_is_faster", lambda: False)
    assert not convolution.convolves(large)
    monkeypatch.setattr(convolution, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert not convolution.convolves(large)
