"""Padded batch <-> packed tokens, and the kernels that run on packed tokens."""

import inspect
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from reference import PATTERNS, B, D, H, S, distance, generator, mask_of

from hubmodels import layers
from hubmodels.errors import InputError
from hubmodels.packing import Packing, packing_of

K = D // H
PADDED = PATTERNS[1:]


def packing(pattern):
    mask = mask_of(pattern, B)
    return packing_of(B, S, mask), mask.bool()


def with_an_empty_row(pattern="interleaved"):
    mask = mask_of(pattern, B)
    mask[2] = 0
    return packing_of(B, S, mask), mask.bool()


def heads(count, seed=20, dtype=torch.float64):
    """q, k, v [T, H, K] that take gradients"""
    draw = generator(seed)
    return [torch.randn(count, H, K, generator=draw, dtype=dtype).requires_grad_() for _ in range(3)]


def by_hand(q, k, v, mask):
    """[T, H, K] three times -> [T, H, K], row after row, softmax written out"""
    out, begin = [], 0
    for count in mask.sum(1).tolist():
        rows = slice(begin, begin + count)
        scores = torch.einsum("ihk,jhk->hij", q[rows], k[rows]) / K**0.5
        out.append(torch.einsum("hij,jhk->ihk", scores.softmax(-1), v[rows]))
        begin += count
    return torch.cat(out)


@pytest.mark.parametrize("pattern", PADDED)
def test_packing_says_where_the_tokens_stand(pattern):
    packed, mask = packing(pattern)
    columns = [[c for c in range(S) if row[c]] for row in mask.tolist()]
    assert (packed.batch, packed.length) == (B, S)
    assert packed.indices.tolist() == [row * S + c for row, kept in enumerate(columns) for c in kept]
    lengths = [len(kept) for kept in columns]
    assert packed.offsets.dtype == torch.int32
    assert packed.offsets.tolist() == [sum(lengths[:row]) for row in range(B + 1)]
    assert packed.longest == max(lengths)
    assert packed.pairwise is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_and_unpack_are_inverse_at_tokens(pattern):
    packed, mask = packing(pattern)
    x = torch.randn(B, S, D, generator=generator(21))
    tokens = packed.pack(x)
    assert torch.equal(tokens, x[mask])
    assert torch.equal(packed.unpack(tokens), x * mask[..., None])
    assert torch.equal(packed.unpack(tokens, fill=-7.0), torch.where(mask[..., None], x, -7.0))
    assert torch.equal(packed.unpack(tokens[:, 0]), x[..., 0] * mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_first_is_the_first_token_of_each_row(pattern):
    packed, mask = packing(pattern)
    x = torch.randn(B, S, D, generator=generator(22))
    columns = [row.index(True) for row in mask.tolist()]
    assert torch.equal(packed.first(packed.pack(x)), torch.stack([x[row, c] for row, c in enumerate(columns)]))


def test_first_of_a_row_of_padding_is_zero():
    packed, mask = with_an_empty_row()
    first = packed.first(torch.ones(int(mask.sum()), D))
    assert first.sum(1).tolist() == [D, D, 0, D, D]


@pytest.mark.parametrize("mask", [None, torch.ones(B, S)], ids=["no mask", "a mask of ones"])
def test_a_batch_without_padding_is_packed_by_a_view(mask):
    packed = packing_of(B, S, mask)
    assert packed == Packing(B, S)
    assert packed.mask() is None
    x = torch.randn(B, S, D)
    assert packed.pack(x).data_ptr() == x.data_ptr()
    assert packed.unpack(packed.pack(x)).data_ptr() == x.data_ptr()


def test_mask_lets_a_row_of_padding_look_at_everything():
    packed, mask = with_an_empty_row()
    seen = packed.mask()
    assert seen.shape == (B, 1, 1, S)
    expected = mask.clone()
    expected[2] = True
    assert torch.equal(seen[:, 0, 0], expected)


def test_a_mask_of_pairs_packs_nothing_away():
    pairs = torch.rand(B, S, S, generator=generator(23)) < 0.5
    packed = packing_of(B, S, pairs.float())
    assert packed.indices is None
    assert packed.offsets is None
    assert torch.equal(packed.mask(), pairs[:, None])


@pytest.mark.parametrize("shape", [(B, S - 1), (S, B), (S,), (B, 1, S), (B, S, S - 1), (B, 1, S, S)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(InputError) as error:
        packing_of(B, S, torch.ones(shape))
    assert str(error.value) == (
        "attention_mask: expected shape (5, 9) (1 = token, 0 = padding) or (5, 9, 9) (1 = row may look at column), "
        f"got {shape}"
    )


# The kernels


@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_equal_attention_by_hand_with_gradients(pattern):
    packed, mask = packing(pattern)
    inputs = heads(int(mask.sum()))
    weights = torch.randn(inputs[0].shape, generator=generator(24), dtype=torch.float64)
    probs = []
    results = {
        "hand": by_hand(*inputs, mask),
        "padded": layers.padded_attention(*inputs, packed, 0.0),
        "explicit": layers.explicit_attention(*inputs, packed, 0.0, probs),
    }
    if packed.offsets is not None:
        results["ragged"] = layers.ragged_attention(*inputs, packed.offsets)[0]
    expected = results.pop("hand")
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, result in results.items():
        assert distance(result, expected) <= 1e-12, name
        gradients = torch.autograd.grad((result * weights).sum(), inputs)
        assert max(map(distance, gradients, expected_gradients)) <= 1e-12, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_ragged_attention_in_other_dtypes(dtype, tolerance):
    packed, mask = packing("interleaved")
    inputs = heads(int(mask.sum()), dtype=dtype)
    out, lse = layers.ragged_attention(*inputs, packed.offsets)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_hand(*exact, mask)
    assert distance(out, expected) <= tolerance
    gradients = torch.autograd.grad(out.sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    assert max(map(distance, gradients, expected_gradients)) <= 5 * tolerance


def test_ragged_attention_gives_the_log_sum_exp_of_the_scores():
    packed, mask = packing("right")
    q, k, v = heads(int(mask.sum()))
    lse = layers.ragged_attention(q, k, v, packed.offsets)[1]
    begin, end = packed.offsets[1:3].tolist()
    scores = torch.einsum("ihk,jhk->ihj", q[begin:end], k[begin:end]) / K**0.5
    assert lse.dtype == torch.float64
    assert distance(lse[begin:end], scores.logsumexp(-1)) <= 1e-12


def test_rows_of_padding_take_no_part():
    packed, mask = with_an_empty_row()
    inputs = heads(int(mask.sum()))
    expected = by_hand(*inputs, mask)
    assert distance(layers.ragged_attention(*inputs, packed.offsets)[0], expected) <= 1e-12
    assert distance(layers.padded_attention(*inputs, packed, 0.0), expected) <= 1e-12
    assert distance(layers.explicit_attention(*inputs, packed, 0.0, []), expected) <= 1e-12


def test_no_token_at_all():
    packed = packing_of(B, S, torch.zeros(B, S))
    inputs = heads(0)
    assert packed.offsets.tolist() == [0] * (B + 1)
    out = layers.ragged_attention(*inputs, packed.offsets)[0]
    assert out.shape == (0, H, K)
    assert torch.autograd.grad(out.sum(), inputs)[0].shape == (0, H, K)


def test_a_row_hears_nothing_of_its_neighbours():
    packed, mask = packing("right")
    q, k, v = heads(int(mask.sum()))
    begin, end = packed.offsets[1:3].tolist()
    with torch.no_grad():
        before = layers.ragged_attention(q, k, v, packed.offsets)[0].clone()
        for x in (q, k, v):
            x[begin:end] += 3.0
        after = layers.ragged_attention(q, k, v, packed.offsets)[0]
    others = [*range(begin), *range(end, len(q))]
    assert torch.equal(before[others], after[others])
    assert distance(before[begin:end], after[begin:end]) > 1.0


def test_ragged_attention_takes_views_into_the_fused_projection():
    packed, mask = packing("left")
    fused = torch.randn(int(mask.sum()), 3 * D, generator=generator(25), dtype=torch.float64)
    q, k, v = fused.view(len(fused), 3, H, K).unbind(1)
    assert not q.is_contiguous()
    out = layers.ragged_attention(q, k, v, packed.offsets)[0]
    assert out.is_contiguous()
    assert distance(out, by_hand(q, k, v, mask)) <= 1e-12


@pytest.mark.parametrize("pattern", ["right", "interleaved"])
def test_ragged_attention_is_a_sound_operator(pattern):
    packed, mask = packing(pattern)
    results = torch.library.opcheck(layers.ragged_attention, (*heads(int(mask.sum())), packed.offsets))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_gradient_of_ragged_attention_is_the_derivative():
    offsets = torch.tensor([0, 3, 3, 5, 7, 8], dtype=torch.int32)  # an empty row; two rows of one length, side by side
    inputs = heads(8)
    assert torch.autograd.gradcheck(lambda q, k, v: layers.ragged_attention(q, k, v, offsets)[0], inputs)


def test_operator_names_of_two_checkouts_differ():
    """Two versions in one process: the name is made of the file's path."""
    assert layers.ragged_attention._qualname.startswith(layers._NAMESPACE + "::")
    assert re.fullmatch(r"hubmodels_[0-9a-f]{8}_*", layers._NAMESPACE)


# Which kernel runs


@pytest.mark.parametrize(
    ("pattern", "training", "weights", "kernel"),
    [
        ("none", False, False, "padded_attention"),
        ("none", True, False, "padded_attention"),
        ("right", False, False, "ragged_attention"),
        ("right", True, False, "padded_attention"),
        ("right", False, True, "explicit_attention"),
        ("none", False, True, "explicit_attention"),
    ],
)
def test_attend_takes_the_kernel_that_fits(pattern, training, weights, kernel, monkeypatch):
    called = []

    def spy_on(name):
        real = getattr(layers, name)

        def spy(*args):
            called.append(name)
            return real(*args)

        monkeypatch.setattr(layers, name, spy)

    for name in ("padded_attention", "ragged_attention", "explicit_attention", "varlen_attention"):
        spy_on(name)
    packed, mask = packing(pattern)
    attention = layers.Attention(D, H, dropout=0.1).train(training)
    attention.attend(*heads(int(mask.sum()), dtype=torch.float32), packed, [] if weights else None)
    assert called == [kernel]


def on_a_cpu(calls):
    """A CPU twin of torch's varlen_attn: binds each call to the real signature, then attends row by row."""
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)

    def twin(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        calls.append(given)
        assert given["return_aux"] is None
        assert given["scale"] is None
        assert given["window_size"] == (-1, -1)  # no window and not causal
        out = []
        begins, ends = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
        assert begins == ends
        for begin, end in itertools.pairwise(begins):
            assert end - begin <= given["max_q"]
            rows = (given[name][begin:end].transpose(0, 1)[None] for name in ("query", "key", "value"))
            out.append(F.scaled_dot_product_attention(*rows)[0].transpose(0, 1))
        return torch.cat(out)

    return twin


@pytest.mark.parametrize("pattern", PADDED)
def test_variable_length_path_of_cuda_equals_the_fallback(pattern, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", on_a_cpu(calls))
    packed, mask = packing(pattern)
    inputs = heads(int(mask.sum()))
    out = layers.varlen_attention(*inputs, packed)
    fallback = layers.padded_attention(*inputs, packed, 0.0)
    assert distance(out, fallback) <= 1e-12
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert max(map(distance, gradients, torch.autograd.grad(fallback.square().sum(), inputs))) <= 1e-12
    (given,) = calls
    assert given["max_q"] == given["max_k"] == int(mask.sum(1).max())
    assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32


def test_variable_length_path_with_a_row_of_padding(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", on_a_cpu([]))
    packed, mask = with_an_empty_row("right")
    inputs = heads(int(mask.sum()))
    assert distance(layers.varlen_attention(*inputs, packed), by_hand(*inputs, mask)) <= 1e-12
