"""`products.linear`: the product that a CPU is faster at, and only where nobody can tell but by the clock."""

import pytest
import torch
import torch.nn.functional as F
from reference import inputs_of, pair
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hubmodels import products
from hubmodels.layers import Linear, WordScores, initialise

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


@pytest.fixture
def shapes(monkeypatch):
    """Every matrix is large and the CPU one of AMD's: the shapes that oneDNN was asked for."""
    real, asked = torch.ops.mkldnn._linear_pointwise, []

    def spied(x, weight, *rest):
        asked.append(tuple(weight.shape))
        return real(x, weight, *rest)

    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spied)
    return asked


def linear_of(bias=True, dtype=torch.float32):
    linear = Linear(11, 7, bias=bias, dtype=dtype)
    initialise(linear, 0.5, torch.Generator().manual_seed(0))
    return linear


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 4), (2, 0)])
def test_the_same_numbers(shapes, shape, bias):
    linear, x = linear_of(bias), x_of(*shape)
    with torch.no_grad():
        found = linear(x)
        expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert shapes == [(7, 11)]
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_contiguous(shapes):
    weight, x = x_of(7).T.contiguous().T, x_of(6)[::2]
    torch.testing.assert_close(products.linear(x.T.contiguous().T, weight, None), F.linear(x, weight))
    assert shapes == [(7, 11)]


def test_a_language_models_scores_are_a_product_too(shapes):
    table, states = x_of(20), x_of(3)
    torch.testing.assert_close(WordScores()(states, table), F.linear(states, table))
    assert shapes == [(20, 11)]


def test_gradients_are_those_of_torch(shapes):
    linear, x = linear_of(), x_of(3)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(7, -1))
    assert shapes == [(7, 11)]  # the way back is torch's own
    with torch.no_grad():
        assert not linear(x).requires_grad
    for frozen in (linear.weight, linear.bias):
        frozen.requires_grad_(False)
    assert linear(x.clone().requires_grad_()).requires_grad
    assert not linear(x).requires_grad


class Own(torch.Tensor):
    """Somebody's tensor"""


def is_traced(linear, x):
    torch.jit.trace(linear, x, check_trace=False)


def is_dual(linear, x):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent[0], linear.weight.sum(1))


def is_counted(linear, x):
    with FlopCounterMode(display=False) as counter:
        linear(x)
    assert counter.get_total_flops() == 2 * 3 * 11 * 7


def is_cast(linear, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


def is_switched_off(linear, x):
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x)


def is_mapped(linear, x):
    torch.testing.assert_close(torch.vmap(linear)(x[:, None])[:, 0], F.linear(x, linear.weight, linear.bias))


def is_compiled(linear, x):
    torch.compile(linear, backend="eager", fullgraph=True)(x)


ELSEWHERE = [
    is_traced,
    is_dual,
    is_counted,
    is_cast,
    is_switched_off,
    is_mapped,
    is_compiled,
    lambda linear, x: linear(x.as_subclass(Own)),
    lambda linear, x: linear.double()(x.double()),
    lambda linear, x: linear.bfloat16()(x.bfloat16()),
    lambda linear, x: linear.to("meta")(x.to("meta")),
]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("case", ELSEWHERE)
def test_who_looks_at_how_it_is_computed_sees_torchs_own(shapes, case):
    linear = linear_of().requires_grad_(False)
    with torch.no_grad():
        case(linear, x_of(3))
    assert shapes == []


def test_a_shape_that_does_not_fit_is_torchs_error(shapes):
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear_of()(torch.ones(3, 5))


def test_small_matrices_are_not_worth_it(shapes, monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 7 * 11 + 1)
    with torch.no_grad():
        linear_of()(x_of(3))
    assert shapes == []


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel Xeon", ""])
def test_it_is_the_maker_of_the_cpu_that_decides(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert products.onednn_is_faster.__wrapped__() == (name == "AMD EPYC" and torch.backends.mkl.is_available())
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not products.onednn_is_faster.__wrapped__()


def test_a_model_equals_itself_and_hooks_see_what_they_saw(shapes, monkeypatch):
    model, _ = pair("BertModel")
    model = model.float()
    inputs, seen = inputs_of("BertModel", "right"), []
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda part, given, output: seen.append(output))
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
        asked, outputs = len(shapes), list(seen)
        monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
        seen.clear()
        expected = model(**inputs).last_hidden_state
    assert asked == len(outputs) == len(seen) == len(shapes) > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for output, before in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, before, rtol=1e-5, atol=1e-5)


# Half precision on a CPU that has no products of it

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without products of half precision, for which no matrix is too small: what was multiplied in float32."""
    real, asked = products._product, []
    monkeypatch.setattr(products, "_MANY", 2)
    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype not in HALF)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "_product", lambda *given: asked.append(given[-1]) or real(*given))
    return asked


def half_operands(dtype, is_cast, biased=True):
    """Numbers of `dtype`, in it or, to be cast, in float32"""
    made = [x_of(6), linear_of().weight, linear_of().bias][: 2 + biased]
    return [x.detach().to(dtype).to(torch.float32 if is_cast else dtype).requires_grad_() for x in made]


def results(map_, operands, dtype, is_cast, towards):
    with torch.autocast("cpu", dtype, enabled=is_cast):
        y = map_(*operands)
    return [y, *torch.autograd.grad(y, operands, towards.to(dtype))]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_products_in_float32_are_those_in_half_precision(lacking, dtype, is_cast, biased):
    operands = half_operands(dtype, is_cast, biased)
    towards = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    doubles = [x.detach().double().requires_grad_() for x in operands]
    exact = results(F.linear, doubles, torch.float64, False, towards.to(dtype))
    ours = results(products.linear, operands, dtype, is_cast, towards)
    theirs = results(F.linear, operands, dtype, is_cast, towards)
    assert lacking == [dtype]
    for found, same, right in zip(ours, theirs, exact, strict=True):
        assert (found.dtype, found.shape) == (same.dtype, same.shape)
        worst = (same.double() - right).abs().max()
        assert (found.double() - right).abs().max() <= worst + 1e-6  # rounded once, as torch's
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=is_cast):
        assert torch.equal(products.linear(*operands), ours[0])


@pytest.mark.parametrize("dtype", HALF)
def test_a_way_back_within_autocast(lacking, dtype):
    operands = half_operands(dtype, True)
    with torch.autocast("cpu", dtype):
        grads = torch.autograd.grad(products.linear(*operands).float().sum(), operands)
    expected = torch.autograd.grad(F.linear(*operands).sum(), operands)
    for found, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)


def test_nothing_wide_is_kept(lacking):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x)
    operands = half_operands(torch.bfloat16, True)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        products.linear(*operands)
    assert kept == [torch.bfloat16, torch.float32]  # the tokens; the model's own matrix


def test_elsewhere_half_precision_is_torchs(lacking, monkeypatch):
    x, weight, _ = half_operands(torch.bfloat16, False)
    products.linear(x[:1], weight)
    assert lacking == []  # of so few tokens torch's product is the faster one
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    products.linear(x, weight)
    assert lacking == []
    with pytest.raises(RuntimeError, match="same dtype"):
        products.linear(x, weight.float())


@pytest.mark.parametrize("has", [True, False])
def test_oneDNN_says_what_a_cpu_multiplies(has, monkeypatch):
    multiplies = products.multiplies.__wrapped__
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has)
    assert [multiplies(dtype) for dtype in (torch.float32, torch.float64, *HALF)] == [True, True, has, has]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies(torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_in_half_precision_is_as_right_as_torchs(lacking, dtype, monkeypatch):
    model, _ = pair("BertForMaskedLM")
    inputs = inputs_of("BertForMaskedLM", "right")
    with torch.no_grad():
        exact = model.double()(**inputs).logits
        model.to(dtype)
        found = model(**inputs).logits
        asked = len(lacking)
        monkeypatch.setattr(products, "multiplies", lambda dtype: True)
        expected = model(**inputs).logits
    assert asked == len(lacking) > 0
    assert found.dtype == expected.dtype == dtype
    assert (found - exact).norm() <= 1.2 * (expected - exact).norm()
    assert (found - exact).norm() <= 0.05 * exact.norm()


def test_training_under_autocast_is_as_right_as_torchs(lacking, monkeypatch):
    model, _ = pair("BertForMaskedLM")
    model, inputs = model.float(), inputs_of("BertForMaskedLM", "right")

    def gradients(is_cast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    found, asked, exact = gradients(True), len(lacking), gradients(False)
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    expected = gradients(True)
    assert asked == len(lacking) > 0
    assert (found - exact).norm() <= 1.1 * (expected - exact).norm()
    assert (found - exact).norm() <= 0.05 * exact.norm()
