"""`kernels.linear`: the product that a CPU is faster at, and only where nobody can tell but by the clock."""

import pytest
import torch
import torch.nn.functional as F
from reference import inputs_of, pair
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hubmodels import kernels
from hubmodels.layers import Linear, WordScores, initialise

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Every matrix is large and the CPU one of AMD's: the shapes that oneDNN was asked for."""
    real, shapes = torch.ops.mkldnn._linear_pointwise, []

    def spied(x, weight, *rest):
        shapes.append(tuple(weight.shape))
        return real(x, weight, *rest)

    monkeypatch.setattr(kernels, "_LARGE", 0)
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spied)
    return shapes


def linear_of(bias=True, dtype=torch.float32):
    linear = Linear(11, 7, bias=bias, dtype=dtype)
    initialise(linear, 0.5, torch.Generator().manual_seed(0))
    return linear


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 4), (2, 0)])
def test_the_same_numbers(products, shape, bias):
    linear, x = linear_of(bias), x_of(*shape)
    with torch.no_grad():
        found = linear(x)
        expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert products == [(7, 11)]
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_contiguous(products):
    weight, x = x_of(7).T.contiguous().T, x_of(6)[::2]
    torch.testing.assert_close(kernels.linear(x.T.contiguous().T, weight, None), F.linear(x, weight))
    assert products == [(7, 11)]


def test_a_language_models_scores_are_a_product_too(products):
    table, states = x_of(20), x_of(3)
    torch.testing.assert_close(WordScores()(states, table), F.linear(states, table))
    assert products == [(20, 11)]


def test_gradients_are_those_of_torch(products):
    linear, x = linear_of(), x_of(3)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(7, -1))
    assert products == [(7, 11)]  # the way back is torch's own
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
def test_who_looks_at_how_it_is_computed_sees_torchs_own(products, case):
    linear = linear_of().requires_grad_(False)
    with torch.no_grad():
        case(linear, x_of(3))
    assert products == []


def test_a_shape_that_does_not_fit_is_torchs_error(products):
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear_of()(torch.ones(3, 5))


def test_small_matrices_are_not_worth_it(products, monkeypatch):
    monkeypatch.setattr(kernels, "_LARGE", 7 * 11 + 1)
    with torch.no_grad():
        linear_of()(x_of(3))
    assert products == []


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel Xeon", ""])
def test_it_is_the_maker_of_the_cpu_that_decides(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert kernels.onednn_is_faster.__wrapped__() == (name == "AMD EPYC" and torch.backends.mkl.is_available())
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not kernels.onednn_is_faster.__wrapped__()


def test_a_model_equals_itself_and_hooks_see_what_they_saw(products, monkeypatch):
    model, _ = pair("BertModel")
    model = model.float()
    inputs, seen = inputs_of("BertModel", "right"), []
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda part, given, output: seen.append(output))
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
        asked, outputs = len(products), list(seen)
        monkeypatch.setattr(kernels, "onednn_is_faster", lambda: False)
        seen.clear()
        expected = model(**inputs).last_hidden_state
    assert asked == len(outputs) == len(seen) == len(products) > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for output, before in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, before, rtol=1e-5, atol=1e-5)
