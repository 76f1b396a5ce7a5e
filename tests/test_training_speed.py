"""What a training step does in another way than torch would, and that it comes to the same."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import B, S, V, distance, generator, inputs_of, ours, without_dropout
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

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
    model = without_dropout(ours("BertForMaskedLM", torch.float32))
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


# The output of an activation, which is not kept


@pytest.fixture
def bends(monkeypatch):
    """The outputs of each activation, as they are computed: weak ones, of their memory"""
    made = []

    def spied(bend):
        def bent(x):
            y = bend(x)
            made.append(StorageWeakRef(y.untyped_storage()))
            return y

        return bent

    for name, bend in layers.ACTIVATIONS.items():
        monkeypatch.setitem(layers.ACTIVATIONS, name, spied(bend))
    return made


def feed_forward(activation="gelu", dtype=torch.float32):
    part = layers.FeedForward(IN, OUT, activation).to(dtype)
    draw = generator(1)
    for linear in (part.inner, part.output):
        layers.initialise(linear, 0.3, draw)
    return part


def gradients_of(part, x):
    return torch.autograd.grad(part(x).pow(2).sum(), [x, *part.parameters()])


@pytest.mark.parametrize("onednns", [True, False])
@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_what_is_made_again_gives_the_same_gradients(bends, activation, onednns, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednns)
    part, x = feed_forward(activation), operands()[0]
    found = gradients_of(part, x)
    assert len(bends) == (1 if activation == "relu" else 2)  # relu's way back takes its output, which is so kept anyway
    monkeypatch.setattr(layers, "_OF_THEIR_INPUT", set())
    for grad, expected in zip(found, gradients_of(part, x), strict=True):
        assert torch.equal(grad, expected)


def test_it_is_not_kept(bends, monkeypatch):
    part, x = feed_forward(), operands()[0]
    y = part(x)
    assert [bent.expired() for bent in bends] == [True]
    monkeypatch.setattr(layers, "_OF_THEIR_INPUT", set())
    z = part(x)
    assert [bent.expired() for bent in bends] == [True, False]
    assert torch.equal(y, z)


def test_it_is_made_again_as_often_as_there_is_a_way_back(bends):
    part, x = feed_forward(), operands()[0]
    loss = part(x).pow(2).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first[0])
    assert len(bends) == 3
    assert all(bent.expired() for bent in bends)


def test_gradients_through_it_have_gradients():
    part, x = feed_forward(dtype=torch.float64), operands(torch.float64, rows=5)[0]
    assert torch.autograd.gradgradcheck(part, (x,))


@pytest.mark.parametrize("frozen", ["inner", "output", "both"])
def test_of_frozen_maps_too(frozen, monkeypatch):
    part, x = feed_forward(), operands()[0]
    for name in ("inner", "output") if frozen == "both" else (frozen,):
        part.get_submodule(name).requires_grad_(False)
    grads = []
    for kept in (layers._OF_THEIR_INPUT, set()):
        monkeypatch.setattr(layers, "_OF_THEIR_INPUT", kept)
        part.zero_grad()
        part(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in part.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_somebody_has_changed_is_kept(bends, monkeypatch):
    part, x = feed_forward(), operands()[0]
    part.output.register_forward_pre_hook(lambda _, given: (given[0].mul_(2),))
    found = gradients_of(part, x)
    assert len(bends) == 1
    monkeypatch.setattr(layers, "_OF_THEIR_INPUT", set())
    for grad, expected in zip(found, gradients_of(part, x), strict=True):
        assert torch.equal(grad, expected)


def is_checkpointed(part, x):
    return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)


def is_hooked(part, x):
    with torch.autograd.graph.save_on_cpu():
        return part(x)


def is_forbidden(part, x):
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        return part(x)


def is_compiled(part, x):
    return torch.compile(part, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(("case", "calls"), [(is_checkpointed, 2), (is_hooked, 1), (is_forbidden, 1)])
def test_who_decides_what_is_kept_does(bends, case, calls):
    part, x = feed_forward(), operands()[0]
    found = torch.autograd.grad(case(part, x).pow(2).sum(), x)
    assert len(bends) == calls
    assert torch.equal(found[0], torch.autograd.grad(part(x).pow(2).sum(), x)[0])


def test_compiled_and_transformed():
    part, x = feed_forward(), operands()[0]
    (expected,) = torch.autograd.grad(part(x).pow(2).sum(), x)
    (found,) = torch.autograd.grad(is_compiled(part, x).pow(2).sum(), x)
    assert distance(found, expected) <= 1e-5
    assert distance(torch.func.grad(lambda x: part(x).pow(2).sum())(x.detach()), expected) <= 1e-5


# The memory of a process


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
