"""What a training step does in another way than torch would, and that it comes to the same."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import B, S, V, distance, generator, inputs_of, ours
from torch import nn

from hubmodels import layers, products
from hubmodels.training.allocator import keep_freed_memory

ROWS, IN, OUT = 37, 24, 44


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """As on a processor where its products are faster"""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    monkeypatch.setattr(products, "_LARGE", 0)


def operands(dtype=torch.float32, rows=ROWS):
    draw = generator(1)
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in ((rows, IN), (OUT, IN), (OUT,))]


def by_onednn(y):
    return "_Linear" in type(y.grad_fn).__name__


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_products_equal_torchs_with_gradients(rows, biased):
    inputs = operands(rows=rows)[: 2 + biased]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    y, right = products.linear(*inputs), F.linear(*doubles)
    assert by_onednn(y)
    assert distance(y.double(), right) <= 1e-5
    towards = torch.randn(right.shape, generator=generator(2))
    found = torch.autograd.grad(y, inputs, towards)
    for grad, expected in zip(found, torch.autograd.grad(right, doubles, towards.double()), strict=True):
        assert distance(grad.double(), expected) <= 1e-5


def test_gradients_have_gradients():
    """As a gradient penalty needs them"""
    results = []
    for map_ in (products.linear, F.linear):
        inputs = operands()
        (of_x,) = torch.autograd.grad(map_(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        results.append(torch.autograd.grad(of_x.pow(2).sum(), inputs))
    for found, expected in zip(*results, strict=True):
        assert distance(found, expected) <= 1e-5 * float(expected.abs().max())
        assert found.abs().max() > 0


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = operands()
    inputs[frozen].requires_grad_(False)
    products.linear(*inputs).sum().backward()
    assert [x.grad is None for x in inputs] == [number == frozen for number in range(3)]


def test_everything_else_is_torchs():
    x, weight, bias = operands()
    assert not by_onednn(products.linear(*operands(torch.float64)))
    assert not by_onednn(products.linear(x[None], weight, bias))
    assert not by_onednn(products.linear(x[:0], weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(x, weight, bias)
        assert y.dtype == torch.bfloat16
        assert not by_onednn(y)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    assert not by_onednn(torch.compile(products.linear, backend="eager", fullgraph=True)(x, weight, bias))
    vectors = torch.func.vmap(torch.func.grad(lambda row: products.linear(row[None], weight, bias).sum()))(x.detach())
    assert distance(vectors, weight.sum(0).expand(ROWS, -1)) <= 1e-5


def test_hooks_of_a_map_are_called():
    part, seen = layers.Linear(IN, OUT), []
    layers.initialise(part, 0.1)
    part.register_forward_hook(lambda *_: seen.append("forward"))
    part.register_full_backward_hook(lambda *_: seen.append("backward"))
    y = part(operands()[0])
    y.sum().backward()
    assert seen == ["forward", "backward"]


def losses_and_gradients(model):
    inputs = inputs_of("BertForMaskedLM", "right")
    labels = torch.randint(0, V, (B, S), generator=generator(4)).where(
        torch.rand(B, S, generator=generator(5)) < 0.3, -100
    )
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["plain", "checkpointed", "distributed"])
def test_a_step_of_a_model_equals_the_one_by_torch(how, monkeypatch, tmp_path):
    model = ours("BertForMaskedLM", torch.float32).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, layers.Attention):
            part.dropout = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: False)
        loss, expected = losses_and_gradients(model)
    calls, real = [], products._Linear.apply
    monkeypatch.setattr(products._Linear, "apply", lambda *given: calls.append(given) or real(*given))
    if how == "distributed":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            found_loss, found = losses_and_gradients(nn.parallel.DistributedDataParallel(model))
        finally:
            torch.distributed.destroy_process_group()
    else:
        model.gradient_checkpointing = how == "checkpointed"
        found_loss, found = losses_and_gradients(model)
    blocks = 4 * len(model.transformer.layers)  # linear maps in them; the head has two
    assert len(calls) == blocks * (2 if how == "checkpointed" else 1) + 2
    assert distance(found_loss, loss) <= 1e-6
    for grad, right in zip(found, expected, strict=True):
        assert (grad is None) == (right is None)
        assert grad is None or distance(grad, right) <= 1e-5


FAULTS = """
import resource, sys, torch
from hubmodels.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), end=" ")
for turn in range(3):  # the first takes the memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    def run(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return done.stdout.split()

    (given_back,) = run("plain")
    tries = [run("keep") for _ in range(3)]  # where a process's heap begins is drawn: it may have no room to grow
    assert {did for did, _ in tries} == {"True"}
    assert min(int(kept) for _, kept in tries) * 10 < int(given_back)


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
