"""Fused blocks in one loop: the same numbers as one by one, and only where nobody would see the difference."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from reference import PATTERNS, distance, mask_of

import hubmodels
from hubmodels import fused, maps
from hubmodels.fused import FusedBlocks, fused_blocks
from hubmodels.layers import Attention
from hubmodels.packing import packing_of
from hubmodels.prepack import accelerate

FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
KINDS = [
    pytest.param(torch.float32, None, id="float32"),
    pytest.param(
        torch.bfloat16,
        None,
        id="bfloat16",
        marks=pytest.mark.skipif(not (BF16 or FBGEMM), reason="torch packs no bfloat16 here"),
    ),
    pytest.param(
        torch.float32, torch.int8, id="int8", marks=pytest.mark.skipif(not FBGEMM, reason="torch has no FBGEMM here")
    ),
]


def encoder(dtype=torch.float32, packed=None):
    """An accelerated encoder, its loop, and tokens for it"""
    fast = accelerate(hubmodels.bertModel("bert-nano", dtype=dtype), packed)
    own = fast.layers[0].attention_norm.weight.dtype
    return fast, fast.shortcut, torch.randn(5 * 12, fast.config.hidden_size, generator=seeded()).to(own)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def one_by_one(blocks, x, packing):
    for block in blocks:
        x = block(x, packing)
    return x


def looked_at(monkeypatch) -> list[bool]:
    """Of each batch that a loop is asked for from now on, whether it took it."""
    taken, call = [], FusedBlocks.__call__
    monkeypatch.setattr(
        FusedBlocks, "__call__", lambda self, *given: [out := call(self, *given), taken.append(out is not None)][0]
    )
    return taken


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
@pytest.mark.parametrize(("dtype", "packed"), KINDS)
def test_the_loop_gives_what_the_blocks_give(dtype, packed, pattern):
    fast, loop, x = encoder(dtype, packed)
    packing = packing_of(5, 12, None if pattern is None else mask_of(pattern, 5, 12))
    tokens = packing.pack(x.view(5, 12, -1))
    with torch.inference_mode():
        found, expected = loop(tokens, packing), one_by_one(fast.layers, tokens, packing)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("packed", [None, pytest.param(torch.int8, marks=KINDS[-1].marks)])
def test_a_decoder_looks_only_back(packed, monkeypatch):
    """GPT's blocks are normalised as BERT's are."""
    model = hubmodels.gptModel("gpt-nano")
    fast = accelerate(model, packed)
    taken = looked_at(monkeypatch)
    ids = torch.randint(5, 100, (3, 9), generator=seeded())
    for mask in (None, mask_of("right", 3)):
        found, expected = (each(ids, mask).last_hidden_state for each in (fast, model))
        assert distance(found, expected) <= (1e-5 if packed is None else 0.1) * float(expected.detach().abs().max())
        changed = ids.clone()
        changed[:, -1] += 1
        assert torch.equal(fast(changed, mask).last_hidden_state[:, :5], found[:, :5])
    assert taken == [True] * 4


def test_a_mask_of_pairs(monkeypatch):
    fast, *_ = encoder()
    taken = looked_at(monkeypatch)
    ids, pairs = torch.randint(5, 100, (2, 7), generator=seeded()), torch.rand(2, 7, 7, generator=seeded()) < 0.6
    plain = hubmodels.bertModel("bert-nano")
    assert distance(fast(ids, pairs).last_hidden_state, plain(ids, pairs).last_hidden_state) <= 1e-5
    assert taken == [True]


@pytest.mark.parametrize("where", ["", "attention", "attention.qkv", "attention_norm", "feed_forward_norm"])
def test_a_hook_that_comes_later_is_run(where, monkeypatch):
    fast, *_ = encoder()
    taken, seen = looked_at(monkeypatch), []
    ids = torch.randint(5, 100, (2, 7), generator=seeded())
    expected = fast(ids).last_hidden_state
    handle = fast.layers[1].get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    assert torch.equal(fast(ids).last_hidden_state, expected)
    assert seen == [where]
    handle.remove()
    fast(ids)
    assert seen == [where]
    assert taken == [True, False, True]


@pytest.mark.parametrize("case", ["layers", "fewer", "more", "block", "norm", "map"])
def test_a_part_that_is_replaced_later_is_seen(case, monkeypatch):
    fast, *_ = encoder()
    taken, ids = looked_at(monkeypatch), torch.randint(5, 100, (2, 7), generator=seeded())
    before, blocks = fast(ids).last_hidden_state, fast.layers
    if case == "layers":
        fast.layers = blocks[:2]
    elif case == "fewer":
        del blocks[2:]
    elif case == "more":
        blocks.append(blocks[0])
    elif case == "block":
        blocks[1] = blocks[0]
    elif case == "norm":
        blocks[1].attention_norm = torch.nn.Identity()
    else:
        blocks[1].feed_forward.output = copy.deepcopy(blocks[0].feed_forward.output)
    found = fast(ids).last_hidden_state
    fast.shortcut = None
    assert torch.equal(found, fast(ids).last_hidden_state)
    assert not torch.equal(found, before)
    assert taken == ([True] if case == "layers" else [True, False])


@pytest.mark.parametrize("case", ["all", "train", "autocast", "compile", "gradient", "dtype", "many", "none"])
def test_what_is_not_for_the_loop(case, monkeypatch):
    fast, loop, x = encoder()
    batch = {"many": 1 + FusedBlocks.most // 12, "none": 0}.get(case, 5)
    x = x[:12].repeat(batch, 1)
    if case == "train":
        fast.layers.train()
    elif case == "compile":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif case == "gradient":
        x.requires_grad_()
    elif case == "dtype":
        x = x.double()
    with torch.autocast("cpu") if case == "autocast" else nullcontext():
        found = loop(x, packing_of(batch, 12, None))
    assert (found is None) == (case != "all")


def test_tokens_that_go_in_parts_are_not_for_the_loop(monkeypatch):
    _, loop, x = encoder()
    monkeypatch.setattr(fused, "parts_for", lambda tokens, weight: 2 if tokens > 40 else 1)
    assert loop(x, packing_of(5, 12, None)) is None
    assert loop(x[:36], packing_of(3, 12, None)) is not None


def test_a_copys_weights_are_its_own():
    fast, _, x = encoder()
    packing = packing_of(5, 12, None)
    expected = fast.shortcut(x, packing)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.shortcut.blocks is other.layers
        assert torch.equal(other.shortcut(x, packing), expected)
        with torch.no_grad():
            other.layers[0].attention_norm.bias.add_(1.0)
        found = other.shortcut(x, packing)
        assert torch.equal(found, one_by_one(other.layers, x, packing))
        assert not torch.equal(found, expected)
    assert torch.equal(fast.shortcut(x, packing), expected)


class _Biased(Attention):
    def attend(self, q, k, v, packing, probs, seen=None):
        return super().attend(q + 1.0, k, v, packing, probs, seen)


@pytest.mark.parametrize("case", ["attend", "scale", "norm", "hook", "none"])
def test_other_blocks_have_no_loop(case):
    model = hubmodels.bertModel("bert-nano")
    attention = model.layers[2].attention
    if case == "attend":
        attention.__class__ = _Biased
    elif case == "scale":
        attention.scale = 0.5
    elif case == "norm":
        model.layers[2].attention_norm = torch.nn.LayerNorm(model.config.hidden_size)
    elif case == "hook":
        attention.qkv.register_forward_hook(lambda *_: None)
    else:
        model.layers = torch.nn.ModuleList()
    fast, ids = accelerate(model), torch.randint(5, 100, (2, 7), generator=seeded())
    assert fast.shortcut is None
    assert fused_blocks(fast.layers) is None
    assert distance(fast(ids).last_hidden_state, model.eval()(ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("activation", [*maps.ONEDNN_ACTIVATIONS, "unknown to oneDNN"])
def test_a_packed_maps_bare_calls_are_its_own(activation, monkeypatch):
    monkeypatch.setitem(maps.ACTIVATIONS, "unknown to oneDNN", torch.tanh)
    weight, bias = torch.randn(24, 16, generator=seeded()), torch.randn(24, generator=seeded())
    x, residual = torch.randn(5, 16, generator=seeded()), torch.randn(5, 24, generator=seeded())
    for part in (maps.PackedLinear(weight, bias), maps.PackedLinear(weight, None), maps.PlainMap(weight, bias)):
        assert torch.equal(part.bare()(x), part(x))
        assert torch.equal(part.bare_bent(activation)(x), part.bent(x, activation))
        assert torch.equal(part.bare_plus()(x, residual), part.plus(x, residual))
