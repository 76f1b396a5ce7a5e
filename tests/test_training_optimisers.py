"""Optimisers against NumPy, what decays, and the learning rate at every corner of a schedule."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_case import Case, make_model

from hubmodels.errors import InputError
from hubmodels.training import optimisers
from hubmodels.training.optimisers import GoogleAdamW, Muon, kinds, learning_rate, make_optimisers, orthogonalised
from hubmodels.training.settings import Settings, Spent

pytestmark = pytest.mark.usefixtures("one_thread")

# GoogleAdamW


def google_reference(weights, gradients, rates, decays, beta1=0.9, beta2=0.999, eps=1e-6):
    """google-research/bert, optimization.py, AdamWeightDecayOptimizer.apply_gradients, in NumPy."""
    weights = [w.copy() for w in weights]
    m, v = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for i, gradient in enumerate(gradients[step]):
            m[i] = beta1 * m[i] + (1 - beta1) * gradient
            v[i] = beta2 * v[i] + (1 - beta2) * np.square(gradient)
            update = m[i] / (np.sqrt(v[i]) + eps)
            update += decays[i] * weights[i]
            weights[i] = weights[i] - rate * update
    return weights


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_google_adamw_equals_its_reference_for_ten_steps(dtype, most):
    rng = np.random.default_rng(0)
    shapes, decays = [(5, 7), (3,)], [0.01, 0.0]
    start = [rng.normal(size=shape) for shape in shapes]
    gradients = [[rng.normal(size=shape) * 10.0 ** rng.integers(-6, 2) for shape in shapes] for _ in range(10)]
    rates = [1e-2 * (10 - step) / 10 for step in range(10)]
    params = [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in start]
    optimiser = GoogleAdamW(
        [{"params": [p], "weight_decay": decay} for p, decay in zip(params, decays, strict=True)], lr=1.0
    )
    for step, rate in enumerate(rates):
        for p, gradient in zip(params, gradients[step], strict=True):
            p.grad = torch.tensor(gradient, dtype=dtype)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    expected = google_reference(start, gradients, rates, decays)
    for p, weights, begun in zip(params, expected, start, strict=True):
        assert np.abs(p.detach().numpy() - weights).max() <= most
        assert np.abs(begun - weights).max() > 1e-2


def test_google_adamw_leaves_alone_what_has_no_gradient():
    moved, left = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimiser = GoogleAdamW([moved, left], lr=0.1)
    moved.grad = torch.ones(3)
    optimiser.step()
    assert torch.equal(left, torch.ones(3))
    assert not torch.equal(moved, torch.ones(3))
    assert left not in optimiser.state


# Muon


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_equals_torchs_where_bfloat16_is_multiplied(shape, monkeypatch):
    monkeypatch.setattr(optimisers, "multiplies", lambda dtype: True)
    draw = torch.Generator().manual_seed(3)
    start, *grads = torch.randn(4, *shape, generator=draw)
    found = []
    for cls in (Muon, torch.optim.Muon):
        p = nn.Parameter(start.clone())
        optimiser = cls([p, nn.Parameter(torch.zeros(2, 2))], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
        for grad in grads:
            p.grad = grad.clone()
            optimiser.step()
        found.append((p.detach(), optimiser.state_dict()["state"]))
    (weights, state), (right, their_state) = found
    assert torch.equal(weights, right)
    assert not torch.equal(weights, start)
    assert state.keys() == their_state.keys()
    assert torch.equal(state[0]["momentum_buffer"], their_state[0]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_in_float32_the_iteration_keeps_directions_and_evens_their_sizes(shape, monkeypatch):
    monkeypatch.setattr(optimisers, "multiplies", lambda dtype: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    moved = orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5)
    assert moved.dtype == torch.float32
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    told = u.T @ moved @ v.T
    assert (told - told.diagonal().diag()).abs().max() < 1e-4
    near = told.diagonal()[sizes > 0.05 * sizes.norm()]
    assert ((near > 0.65) & (near < 1.25)).all()
    assert len(near) > min(shape) // 2


@pytest.mark.parametrize("multiplied", [True, False])
def test_where_bfloat16_is_multiplied(multiplied, monkeypatch):
    monkeypatch.setattr(optimisers, "multiplies", lambda dtype: multiplied)
    here, elsewhere = (orthogonalised(torch.ones(4, 4, device=name), (1.0, 1.0, 1.0), 1) for name in ("cpu", "meta"))
    assert here.dtype == (torch.bfloat16 if multiplied else torch.float32)
    assert elsewhere.dtype == torch.bfloat16  # a CPU's lack is no other device's


# What is moved by what, and what decays


def names_of(model, parameters):
    found = {id(p): name for name, p in model.named_parameters()}
    return {found[id(p)] for p in parameters}


def test_parameters_are_told_apart_by_what_they_are():
    model = make_model(Case(None, layers=1))
    found = kinds(model)
    assert names_of(model, found.tables) == {
        f"transformer.embeddings.{name}.weight" for name in ("word", "position", "token_type")
    }
    matrices = ("attention.qkv", "attention.output", "feed_forward.inner", "feed_forward.output")
    assert names_of(model, found.matrices) == {
        *(f"transformer.layers.0.{name}.weight" for name in matrices),
        *("transformer.pooler.weight", "head.dense.weight", "next_sentence.weight"),
    }
    rest = {name for name, _ in model.named_parameters()} - names_of(model, found.tables + found.matrices)
    assert names_of(model, found.vectors) == rest
    assert all("norm" in name or name.endswith("bias") for name in rest)
    assert sum(len(kind) for kind in found) == len(list(model.parameters()))


def test_names_decide_nothing():
    """A matrix that is called like a bias, a norm that is called like a matrix, one weight in two places."""
    model = nn.Module()
    model.bias_map, model.dense, model.words = nn.Linear(4, 4), nn.LayerNorm((2, 4)), nn.Embedding(9, 4)
    model.scores = nn.Linear(4, 9)
    model.scores.weight = model.words.weight
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    model.kernel = nn.Conv1d(4, 4, 3)
    found = kinds(model)
    assert names_of(model, found.matrices) == {"bias_map.weight"}
    assert names_of(model, found.tables) == {"words.weight", "kernel.weight"}
    assert names_of(model, found.vectors) == {
        "bias_map.bias",
        "dense.weight",
        "dense.bias",
        "scores.bias",
        "kernel.bias",
    }


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("google", 1e-6), ("muon", 1e-8)])
def test_every_optimiser_decays_all_but_biases_and_norms(name, eps):
    model = make_model(Case(None, layers=1))
    settings = Settings(steps=1, optimiser=name, weight_decay=0.25, betas=(0.8, 0.98), learning_rate=0.5)
    made = make_optimisers(model, settings)
    groups = [group for optimiser in made for group in optimiser.param_groups]
    moved = [p for group in groups for p in group["params"]]
    assert sorted(map(id, moved)) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.25 for p in group["params"]}
    found = kinds(model)
    assert decayed == {id(p) for p in found.matrices + found.tables}
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    last = made[-1].param_groups[0]
    assert (last["lr"], last["betas"], last["eps"]) == (0.5, (0.8, 0.98), eps)
    assert [type(optimiser).__name__ for optimiser in made] == {
        "adamw": ["AdamW"],
        "google": ["GoogleAdamW"],
        "muon": ["Muon", "AdamW"],
    }[name]
    if name == "muon":
        assert {id(p) for p in made[0].param_groups[0]["params"]} == {id(p) for p in found.matrices}
        assert made[0].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"


def test_eps_can_be_said():
    made = make_optimisers(make_model(Case(None)), Settings(steps=1, optimiser="google", eps=1e-3))
    assert made[0].param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize("name", ["adamw", "google", "muon"])
def test_a_model_of_one_matrix_needs_no_empty_groups(name):
    model = nn.Linear(3, 3, bias=False)
    made = make_optimisers(model, Settings(steps=1, optimiser=name))
    assert [len(group["params"]) for optimiser in made for group in optimiser.param_groups] == [1]


# The learning rate


def rates(settings, warm=None):
    """At every step of a budget of steps."""
    warm = Spent(settings.warmup) if warm is None else warm
    return [learning_rate(settings, Spent(step), warm) for step in range(settings.steps + 1)]


def test_linear_is_exact_at_its_corners():
    peak, warmup, steps = 3e-4, 7, 100
    found = rates(Settings(steps=steps, warmup=warmup, learning_rate=peak))
    assert found[0] == peak * 1 / 7
    assert found[1] == peak * 2 / 7
    assert found[warmup - 1] == peak
    assert found[warmup] == peak
    assert found[warmup + 1] == peak * (92 / 93)
    assert found[steps] == 0.0
    assert found[53] == pytest.approx(peak * 47 / 93, rel=1e-15)


def test_cosine_is_exact_at_its_corners():
    peak, warmup, steps = 3e-4, 7, 107
    found = rates(Settings(steps=steps, warmup=warmup, learning_rate=peak, schedule="cosine"))
    assert found[0] == peak * 1 / 7
    assert found[1] == peak * 2 / 7
    assert found[warmup - 1] == peak
    assert found[warmup] == peak
    assert found[warmup + 1] == pytest.approx(peak * (1 + math.cos(math.pi / 100)) / 2, rel=1e-12)
    assert found[warmup + 50] == pytest.approx(peak / 2, rel=1e-12)
    assert found[steps] == 0.0


def test_constant_stays_at_the_peak():
    found = rates(Settings(steps=20, warmup=4, learning_rate=0.5, schedule="constant"))
    assert found == [0.125, 0.25, 0.375, *[0.5] * 18]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_a_warm_up_the_peak_comes_first(schedule):
    found = rates(Settings(steps=10, learning_rate=0.5, schedule=schedule))
    assert found[0] == 0.5
    assert found[10] == 0.0
    assert found == sorted(found, reverse=True)


def test_a_warm_up_longer_than_the_run_never_ends():
    assert rates(Settings(steps=3, warmup=10, learning_rate=1.0)) == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(("unit", "place"), [("tokens", 1), ("seconds", 2)])
def test_tokens_and_seconds_play_the_part_of_steps(unit, place):
    settings = Settings(**{unit: 1000}, warmup=4, learning_rate=2.0)
    warm = Spent(4, 200, 200.0)

    def rate(step, spent):
        return learning_rate(settings, Spent(step)._replace(**{unit: spent}), warm)

    assert rate(3, 150) == 2.0  # of the warm-up, whatever is spent
    assert rate(4, 200) == 2.0
    assert rate(5, 600) == 1.0
    assert rate(9, 1000) == 0.0
    assert rate(9, 1234) == 0.0  # a step more than the budget never turns around


# Settings


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "expected one budget, steps, tokens or seconds; got none"),
        ({"steps": 3, "tokens": 4}, "got steps = 3, tokens = 4"),
        ({"steps": 0}, "steps = 0: expected more than 0"),
        ({"seconds": math.inf}, "seconds = inf: expected more than 0"),
        ({"steps": 1, "learning_rate": math.nan}, "learning_rate = nan: expected more than 0"),
        ({"steps": 1, "keep": 0}, "keep = 0: expected more than 0"),
        ({"steps": 1, "warmup": -1}, "warmup = -1: expected 0 or more"),
        ({"steps": 1, "clip": -0.5}, "clip = -0.5: expected 0 or more"),
        ({"steps": 1, "ema": 1.0}, "ema = 1.0: expected 0 or more, and less than 1"),
        ({"steps": 1, "betas": (0.9, 1.0)}, "betas = 1.0: expected 0 or more, and less than 1"),
        ({"steps": 1, "optimiser": "adam"}, "optimiser = 'adam': expected adamw, google or muon"),
        ({"steps": 1, "schedule": "step"}, "schedule = 'step': expected linear, cosine or constant"),
        ({"steps": 1, "precision": "fp8"}, "precision = 'fp8': expected fp32, bf16 or fp16"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, text):
    with pytest.raises(InputError) as error:
        Settings(**given)
    assert text in str(error.value)
