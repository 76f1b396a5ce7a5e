"""Padded batch <-> packed tokens, and the kernels that run on packed tokens."""

import inspect
import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import PATTERNS, B, D, H, S, distance, generator, mask_of

from hubmodels import kernels, layers, products
from hubmodels.errors import InputError
from hubmodels.packing import Packing, packing_of

pytestmark = pytest.mark.usefixtures("one_thread")

K = D // H
PADDED = PATTERNS[1:]
OFFSETS = torch.tensor([0, 3, 3, 5, 7, 8], dtype=torch.int32)  # an empty row; two rows of one length, side by side
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


def packing(pattern, causal=False):
    mask = mask_of(pattern, B)
    return packing_of(B, S, mask, causal), mask.bool()


def with_an_empty_row(pattern="interleaved", causal=False):
    mask = mask_of(pattern, B)
    mask[2] = 0
    return packing_of(B, S, mask, causal), mask.bool()


def heads(count, seed=20, dtype=torch.float64):
    """q, k, v [T, H, K] that take gradients"""
    draw = generator(seed)
    return [torch.randn(count, H, K, generator=draw, dtype=dtype).requires_grad_() for _ in range(3)]


def by_hand(q, k, v, mask, causal=False):
    """[T, H, K] three times -> [T, H, K], row after row, softmax written out"""
    out, begin = [], 0
    for count in mask.sum(1).tolist():
        rows = slice(begin, begin + count)
        scores = torch.einsum("ihk,jhk->hij", q[rows], k[rows]) / K**0.5
        if causal:
            later = torch.arange(count)[:, None] < torch.arange(count)
            scores = scores.masked_fill(later, -torch.inf)
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
    assert not packed.causal
    causal, _ = packing(pattern, causal=True)
    assert causal.causal
    assert torch.equal(causal.indices, packed.indices)
    assert torch.equal(causal.offsets, packed.offsets)
    assert (causal.longest, causal.pairwise) == (packed.longest, None)


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


@pytest.mark.parametrize("pattern", PATTERNS)
def test_last_is_the_last_token_of_each_row(pattern):
    packed, mask = packing(pattern)
    x = torch.randn(B, S, D, generator=generator(26))
    columns = [S - 1 - row[::-1].index(True) for row in mask.tolist()]
    assert torch.equal(packed.last(packed.pack(x)), torch.stack([x[row, c] for row, c in enumerate(columns)]))


def test_last_of_a_row_of_padding_is_zero():
    for empty in range(B):  # the first row too, before which no token stands, and the last, after which none does
        mask = mask_of("interleaved", B)
        mask[empty] = 0
        packed = packing_of(B, S, mask)
        last = packed.last(torch.ones(int(mask.sum()), D))
        assert last.sum(1).tolist() == [0 if row == empty else D for row in range(B)]


@pytest.mark.parametrize("which", ["first", "last"])
def test_first_and_last_where_there_is_no_token_at_all(which):
    packed = packing_of(B, S, torch.zeros(B, S))
    assert torch.equal(getattr(packed, which)(torch.ones(0, D)), torch.zeros(B, D))


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("pattern", ["none", "interleaved"])
def test_the_gradient_of_first_and_last_reaches_that_token_alone(which, pattern):
    packed, mask = packing(pattern)
    x = torch.randn(int(mask.sum()), D, generator=generator(27)).requires_grad_()
    getattr(packed, which)(x).sum().backward()
    columns = [row.index(True) if which == "first" else S - 1 - row[::-1].index(True) for row in mask.tolist()]
    reached = packed.unpack(x.grad)[..., 0].nonzero().tolist()
    assert reached == [[row, column] for row, column in enumerate(columns)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_says_what_is_a_token(pattern):
    packed, mask = packing(pattern)
    real = packed.real()
    assert (real is None) == (pattern == "none")
    assert real is None or torch.equal(real, mask)


def test_real_of_nothing_but_padding_and_of_pairs():
    assert packing_of(B, S, torch.zeros(B, S)).real().eq(False).all()
    assert packing_of(B, S, torch.zeros(B, S, S)).real() is None


@BOTH
@pytest.mark.parametrize("mask", [None, torch.ones(B, S)], ids=["no mask", "a mask of ones"])
def test_a_batch_without_padding_is_packed_by_a_view(mask, causal):
    packed = packing_of(B, S, mask, causal)
    assert packed == Packing(B, S, causal=causal)
    assert (packed.mask(CPU) is None) == (not causal)
    x = torch.randn(B, S, D)
    assert packed.pack(x).data_ptr() == x.data_ptr()
    assert packed.unpack(packed.pack(x)).data_ptr() == x.data_ptr()


def test_mask_lets_a_row_of_padding_look_at_everything():
    packed, mask = with_an_empty_row()
    seen = packed.mask(CPU)
    assert seen.shape == (B, 1, 1, S)
    expected = mask.clone()
    expected[2] = True
    assert torch.equal(seen[:, 0, 0], expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_causal_mask_lets_nothing_look_at_what_comes_after_it(pattern):
    packed, mask = packing(pattern, causal=True)
    seen = packed.mask(CPU)
    assert seen.dtype == torch.bool
    assert seen.shape == ((1, 1, S, S) if pattern == "none" else (B, 1, S, S))
    for row in range(B):
        for column in range(S):
            looks_at = [c for c in range(column + 1) if mask[row, c]] or list(range(S))  # no empty softmax
            assert seen.expand(B, 1, S, S)[row, 0, column].nonzero().flatten().tolist() == looks_at


def test_a_causal_mask_of_pairs_is_cut_to_a_triangle():
    pairs = torch.rand(B, S, S, generator=generator(28)) < 0.5
    pairs[0, 3] = False
    pairs[1, 0], pairs[1, 0, 5] = False, True  # only at one that comes after it
    packed = packing_of(B, S, pairs, causal=True)
    expected = pairs & torch.ones(S, S, dtype=torch.bool).tril()
    expected |= ~expected.any(-1, keepdim=True)
    assert torch.equal(packed.mask(CPU), expected[:, None])
    assert packed.mask(CPU)[1, 0, 0].all()


def test_a_mask_of_pairs_packs_nothing_away():
    pairs = torch.rand(B, S, S, generator=generator(23)) < 0.5
    packed = packing_of(B, S, pairs.float())
    assert packed.indices is None
    assert packed.offsets is None
    assert torch.equal(packed.mask(CPU), pairs[:, None])


@pytest.mark.parametrize("shape", [(B, S - 1), (S, B), (S,), (B, 1, S), (B, S, S - 1), (B, 1, S, S)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(InputError) as error:
        packing_of(B, S, torch.ones(shape))
    assert str(error.value) == (
        "attention_mask: expected shape (5, 9) (1 = token, 0 = padding) or (5, 9, 9) (1 = row may look at column), "
        f"got {shape}"
    )


@pytest.mark.parametrize("most", [1, S, 2 * S, 3 * S - 1, B * S])
@pytest.mark.parametrize("pattern", [*PATTERNS, "with an empty row"])
def test_parts_are_neighbouring_rows_with_a_packing_of_their_own(pattern, most):
    packed, mask = with_an_empty_row() if pattern == "with an empty row" else packing(pattern)
    x = torch.randn(B, S, D, generator=generator(23))
    tokens = packed.pack(x)
    parts = packed.parts(most)
    assert torch.equal(torch.cat([tokens[where] for where, _ in parts]), tokens)
    assert sum(part.batch for _, part in parts) == B
    begin = 0
    for where, part in parts:
        rows = slice(begin, begin + part.batch)
        assert torch.equal(part.pack(x[rows]), tokens[where])
        assert torch.equal(part.unpack(tokens[where]), x[rows] * mask[rows, :, None])
        lengths = mask[rows].sum(1).tolist()
        assert sum(lengths) <= most or part.batch == 1
        if part.offsets is not None:
            assert part.offsets.diff().tolist() == lengths
        begin += part.batch


def test_a_batch_of_pairs_and_one_without_tokens_stay_whole():
    pairs = packing_of(B, S, torch.ones(B, S, S))
    assert pairs.parts(S) == [(slice(None), pairs)]
    empty = packing_of(0, S, None)
    assert empty.parts(S) == [(slice(None), empty)]


# The kernels


@BOTH
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_equal_attention_by_hand_with_gradients(pattern, causal):
    packed, mask = packing(pattern, causal)
    inputs = heads(int(mask.sum()))
    weights = torch.randn(inputs[0].shape, generator=generator(24), dtype=torch.float64)
    probs = []
    results = {
        "hand": by_hand(*inputs, mask, causal),
        "padded": kernels.padded_attention(*inputs, packed, 0.0),
        "explicit": kernels.explicit_attention(*inputs, packed, 0.0, probs),
    }
    if packed.offsets is not None:
        results["ragged"] = kernels.ragged_attention(*inputs, packed.offsets, causal)[0]
    expected = results.pop("hand")
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, result in results.items():
        assert distance(result, expected) <= 1e-12, name
        gradients = torch.autograd.grad((result * weights).sum(), inputs)
        assert max(map(distance, gradients, expected_gradients)) <= 1e-12, name


@pytest.mark.parametrize("scores", [1, S * S, 2**19], ids=["one head", "a few", "all"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "with an empty row"])
def test_attention_in_products_equals_attention_by_hand(pattern, scores, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES", scores)
    packed, mask = with_an_empty_row() if pattern == "with an empty row" else packing(pattern)
    with torch.no_grad():
        q, k, v = fused = torch.stack(heads(int(mask.sum())), 1).unbind(1)  # views, as the fused projection gives them
        assert distance(kernels.product_attention(q, k, v, packed), by_hand(q, k, v, mask)) <= 1e-12
        halves = [x.bfloat16() for x in fused]
        expected = by_hand(*(x.double() for x in halves), mask)
        assert distance(kernels.product_attention(*halves, packed), expected) <= 3e-2


@pytest.mark.parametrize(("batch", "length"), [(0, S), (B, 0)])
def test_attention_in_products_of_no_token(batch, length):
    for packed in (packing_of(batch, length, None), packing_of(B, S, torch.zeros(B, S))):
        with torch.no_grad():
            assert kernels.product_attention(*heads(0), packed).shape == (0, H, K)


@BOTH
def test_kernels_under_a_mask_of_pairs_equal_attention_by_hand(causal):
    pairs = torch.rand(B, S, S, generator=generator(29)) < 0.5
    pairs[:, range(S), range(S)] = True
    packed = packing_of(B, S, pairs, causal)
    q, k, v = inputs = heads(B * S)
    seen = pairs.tril() if causal else pairs
    scores = torch.einsum("bihk,bjhk->bhij", q.view(B, S, H, K), k.view(B, S, H, K)) / K**0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhk->bihk", weights, v.view(B, S, H, K)).flatten(0, 1)
    probs = []
    assert distance(kernels.padded_attention(*inputs, packed, 0.0), expected) <= 1e-12
    assert distance(kernels.explicit_attention(*inputs, packed, 0.0, probs), expected) <= 1e-12
    assert distance(probs[0], weights) <= 1e-12


@pytest.mark.parametrize("pattern", PATTERNS)
def test_causal_weights_are_zero_for_what_comes_after_and_for_padding(pattern):
    packed, mask = packing(pattern, causal=True)
    probs = []
    kernels.explicit_attention(*heads(int(mask.sum())), packed, 0.0, probs)
    (weights,) = probs  # [B, H, S, S]
    allowed = mask[:, None, :, None] & mask[:, None, None, :] & torch.ones(S, S, dtype=torch.bool).tril()
    assert torch.equal(weights != 0, allowed.expand_as(weights))
    assert distance(weights.sum(-1), mask[:, None].double().expand(B, H, S)) <= 1e-12


@BOTH
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, S), (B, 1), (0, S)])
def test_small_batches(rows, length, causal):
    mask = torch.ones(rows, length, dtype=torch.bool)
    packed = packing_of(rows, length, mask, causal)
    inputs = heads(rows * length)
    expected = by_hand(*inputs, mask, causal) if rows else inputs[0]
    assert distance(kernels.padded_attention(*inputs, packed, 0.0), expected) <= 1e-12
    assert distance(kernels.explicit_attention(*inputs, packed, 0.0, []), expected) <= 1e-12
    offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    assert distance(kernels.ragged_attention(*inputs, offsets, causal)[0], expected) <= 1e-12


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_ragged_attention_in_other_dtypes(dtype, tolerance, causal):
    packed, mask = packing("interleaved")
    inputs = heads(int(mask.sum()), dtype=dtype)
    out, lse = kernels.ragged_attention(*inputs, packed.offsets, causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_hand(*exact, mask, causal)
    assert distance(out, expected) <= tolerance
    gradients = torch.autograd.grad(out.sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    assert max(map(distance, gradients, expected_gradients)) <= 5 * tolerance


@BOTH
def test_ragged_attention_gives_the_log_sum_exp_of_the_scores(causal):
    packed, mask = packing("right")
    q, k, v = heads(int(mask.sum()))
    lse = kernels.ragged_attention(q, k, v, packed.offsets, causal)[1]
    begin, end = packed.offsets[1:3].tolist()
    scores = torch.einsum("ihk,jhk->ihj", q[begin:end], k[begin:end]) / K**0.5
    if causal:
        later = torch.arange(end - begin)[:, None] < torch.arange(end - begin)
        scores = scores.masked_fill(later[:, None], -torch.inf)
    assert lse.dtype == torch.float64
    assert distance(lse[begin:end], scores.logsumexp(-1)) <= 1e-12


@BOTH
def test_rows_of_padding_take_no_part(causal):
    packed, mask = with_an_empty_row(causal=causal)
    inputs = heads(int(mask.sum()))
    expected = by_hand(*inputs, mask, causal)
    assert distance(kernels.ragged_attention(*inputs, packed.offsets, causal)[0], expected) <= 1e-12
    assert distance(kernels.padded_attention(*inputs, packed, 0.0), expected) <= 1e-12
    assert distance(kernels.explicit_attention(*inputs, packed, 0.0, []), expected) <= 1e-12


@BOTH
def test_no_token_at_all(causal):
    packed = packing_of(B, S, torch.zeros(B, S), causal)
    inputs = heads(0)
    assert packed.offsets.tolist() == [0] * (B + 1)
    assert kernels.padded_attention(*inputs, packed, 0.0).shape == (0, H, K)
    assert kernels.explicit_attention(*inputs, packed, 0.0, []).shape == (0, H, K)
    out = kernels.ragged_attention(*inputs, packed.offsets, causal)[0]
    assert out.shape == (0, H, K)
    assert torch.autograd.grad(out.sum(), inputs)[0].shape == (0, H, K)


def test_a_row_hears_nothing_of_its_neighbours():
    packed, mask = packing("right")
    q, k, v = heads(int(mask.sum()))
    begin, end = packed.offsets[1:3].tolist()
    with torch.no_grad():
        before = kernels.ragged_attention(q, k, v, packed.offsets)[0].clone()
        for x in (q, k, v):
            x[begin:end] += 3.0
        after = kernels.ragged_attention(q, k, v, packed.offsets)[0]
    others = [*range(begin), *range(end, len(q))]
    assert torch.equal(before[others], after[others])
    assert distance(before[begin:end], after[begin:end]) > 1.0


@pytest.mark.parametrize("kernel", ["ragged", "padded", "explicit"])
@pytest.mark.parametrize("pattern", ["right", "interleaved"])
def test_a_token_hears_nothing_of_those_after_it(kernel, pattern):
    packed, mask = packing(pattern, causal=True)
    q, k, v = heads(int(mask.sum()))
    run = {
        "ragged": lambda: kernels.ragged_attention(q, k, v, packed.offsets, True)[0].clone(),
        "padded": lambda: kernels.padded_attention(q, k, v, packed, 0.0).clone(),
        "explicit": lambda: kernels.explicit_attention(q, k, v, packed, 0.0, []).clone(),
    }[kernel]
    begin, end = packed.offsets[1:3].tolist()
    changed = begin + 2  # of the second row the third token and those after it
    assert changed < end
    with torch.no_grad():
        before = run()
        for x in (q, k, v):
            x[changed:end] += 3.0
        after = run()
    others = [*range(changed), *range(end, len(q))]
    assert torch.equal(before[others], after[others])
    assert (before[changed:end] - after[changed:end]).abs().amax((1, 2)).min() > 1.0


@BOTH
def test_ragged_attention_takes_views_into_the_fused_projection(causal):
    packed, mask = packing("left")
    fused = torch.randn(int(mask.sum()), 3 * D, generator=generator(25), dtype=torch.float64)
    q, k, v = fused.view(len(fused), 3, H, K).unbind(1)
    assert not q.is_contiguous()
    out = kernels.ragged_attention(q, k, v, packed.offsets, causal)[0]
    assert out.is_contiguous()
    assert distance(out, by_hand(q, k, v, mask, causal)) <= 1e-12


@BOTH
@pytest.mark.parametrize("pattern", ["right", "interleaved"])
def test_ragged_attention_is_a_sound_operator(pattern, causal):
    packed, mask = packing(pattern)
    results = torch.library.opcheck(kernels.ragged_attention, (*heads(int(mask.sum())), packed.offsets, causal))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@BOTH
def test_gradient_of_ragged_attention_is_the_derivative(causal):
    inputs = heads(8)
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.ragged_attention(q, k, v, OFFSETS, causal)[0], inputs)


LENGTHS = [3, 1, 1, 3, 0, 3, 2]


@BOTH
def test_neighbours_of_one_length_are_attended_to_together(causal):
    lengths = torch.tensor(LENGTHS)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    assert [(rows, length) for _, _, rows, length in kernels._runs(offsets)] == [(1, 3), (2, 1), (2, 3), (1, 2)]
    inputs, towards = heads(int(offsets[-1])), heads(int(offsets[-1]), seed=29)[0].detach()
    out, lse = kernels.ragged_attention(*inputs, offsets, causal)
    right = by_hand(*inputs, torch.arange(3) < lengths[:, None], causal)
    assert distance(out, right) <= 1e-12
    gradients = zip(*(torch.autograd.grad(y, inputs, towards) for y in (out, right)), strict=True)
    assert all(distance(found, expected) <= 1e-12 for found, expected in gradients)
    alone = offsets[:-1][lengths == 1].long()
    assert distance(lse[alone], (inputs[0] * inputs[1]).sum(-1)[alone] / K**0.5) <= 1e-12


@BOTH
def test_with_dropout_too(causal):
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(
        lambda q, k, v: kernels.seeded_attention(q, k, v, offsets, seed, 0.4, causal), heads(13)
    )
    q, k, v = heads(13)
    one = offsets[:-1][torch.tensor(LENGTHS) == 1].long()  # such a token has itself alone: dropped, or grown
    found = kernels.seeded_attention(q, k, v, offsets, seed, 0.375, causal)[one] / v[one]
    assert (torch.isclose(found, torch.tensor(1.6).double()) | (found == 0)).all()


# With dropout


def dropped_by_hand(q, k, v, mask, dropout, causal=False):
    """As `by_hand`, with the weights that the kernel drops: they show where the values are unit vectors"""
    torch.manual_seed(3)
    packed = packing_of(B, S, mask.long(), causal)
    units = packed.pack(torch.eye(S, dtype=q.dtype).expand(B, S, S))[:, None].expand(-1, H, -1)  # [T, H, S]: the column
    with torch.no_grad():
        kept = kernels.dropped_attention(*(F.pad(x, (0, S - K)) for x in (q, k)), units, packed, dropout) != 0
    out, begin = [], 0
    for columns in mask:
        rows = slice(begin, begin + int(columns.sum()))
        scores = torch.einsum("ihk,jhk->hij", q[rows], k[rows]) / K**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1) > 0, -torch.inf)
        weights = scores.softmax(-1) * kept[rows][:, :, columns].transpose(0, 1) / (1 - dropout)
        out.append(torch.einsum("hij,jhk->ihk", weights, v[rows]))
        begin = rows.stop
    return torch.cat(out)


@BOTH
@pytest.mark.parametrize("scores", [2**19, 1], ids=["at once", "head by head"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dropped_attention_equals_attention_by_hand_with_gradients(pattern, scores, causal, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES", scores)
    packed, mask = packing(pattern, causal)
    inputs = heads(int(mask.sum()))
    right = dropped_by_hand(*inputs, mask, 0.375, causal)
    torch.manual_seed(3)
    out = kernels.dropped_attention(*inputs, packed, 0.375)  # in 2^16 steps it is exact
    assert distance(out, right) <= 1e-12
    assert distance(out, by_hand(*inputs, mask, causal)) > 0.1
    towards = torch.randn(out.shape, generator=generator(28), dtype=out.dtype)
    for found, expected in zip(
        torch.autograd.grad(out, inputs, towards), torch.autograd.grad(right, inputs, towards), strict=True
    ):
        assert distance(found, expected) <= 1e-12


def test_dropped_attention_is_a_function_of_torchs_seed():
    packed, mask = packing("right")
    inputs = heads(int(mask.sum()))

    def run(seed):
        torch.manual_seed(seed)
        return kernels.dropped_attention(*inputs, packed, 0.4), kernels.dropped_attention(*inputs, packed, 0.4)

    (first, second), (again, also), (other, _) = run(0), run(0), run(1)
    assert torch.equal(first, again)
    assert torch.equal(second, also)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    with torch.no_grad():  # past the operator
        assert torch.equal(run(0)[0], first)


def test_as_many_weights_are_dropped_as_was_asked_for_and_no_two_heads_drop_the_same():
    length, count, dropout = 64, 200, 0.1
    zeros = torch.zeros(length, count, length)
    values = torch.eye(length)[:, None].expand(-1, count, -1)
    offsets = torch.tensor([0, length], dtype=torch.int32)
    weights = kernels.seeded_attention(zeros, zeros, values, offsets, torch.tensor(1), dropout) * length
    kept = weights != 0  # [row, head, column]
    assert torch.allclose(weights[kept], torch.tensor(1 / (1 - dropout)), rtol=2e-5)
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.float().mean() - (1 - dropout)) < 5 * deviation / kept.numel() ** 0.5
    for sides in ((0, 1), (0, 2), (1, 2)):  # over each two of rows, heads and columns it is still that
        share = kept.float().mean(sides)
        assert (share - (1 - dropout)).abs().max() < 5 * deviation / (kept.numel() / len(share)) ** 0.5
    assert len({head.numpy().tobytes() for head in kept.unbind(1)}) == count


@pytest.mark.parametrize("pattern", PADDED)
def test_dropped_attention_computes_no_padding(pattern):
    packed, mask = packing(pattern)
    inputs = heads(int(mask.sum()))
    with torch.profiler.profile(record_shapes=True) as profile:
        kernels.dropped_attention(*inputs, packed, 0.4).sum().backward()
    shapes = [event.input_shapes[1:3] for event in profile.events() if event.name == "aten::baddbmm"]
    scores = sum(n * rows * columns for (n, rows, _), (_, _, columns) in shapes)
    assert scores == 2 * H * int((mask.sum(1) ** 2).sum())  # there and back


@BOTH
def test_dropped_attention_is_a_sound_operator(causal):
    results = torch.library.opcheck(kernels.seeded_attention, (*heads(8), OFFSETS, torch.tensor(5), 0.4, causal))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@BOTH
def test_gradient_of_dropped_attention_is_the_derivative(causal):
    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(
        lambda q, k, v: kernels.seeded_attention(q, k, v, OFFSETS, seed, 0.4, causal), heads(8)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-2)])
def test_dropped_attention_in_other_dtypes(dtype, tolerance):
    packed, mask = packing("right")
    inputs = heads(int(mask.sum()))
    torch.manual_seed(0)
    right = kernels.dropped_attention(*inputs, packed, 0.4)
    torch.manual_seed(0)
    out = kernels.dropped_attention(*(x.to(dtype) for x in inputs), packed, 0.4)
    assert out.dtype == dtype
    assert distance(out.double(), right) <= tolerance


# On a CPU that does not multiply half precision


@pytest.fixture
def multiplied(monkeypatch):
    """In what torch multiplied, and where"""
    dtypes, functions = [], {name: getattr(kernels, name) for name in ("_FLASH", "_FLASH_BACKWARD", "_weights")}

    def spied(name):
        return lambda query, *rest: dtypes.append((name, query.dtype)) or functions[name](query, *rest)

    for name in functions:
        monkeypatch.setattr(kernels, name, spied(name))
    return dtypes


@BOTH
@pytest.mark.parametrize("is_cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.375])
@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_attends_in_float32_and_rounds_once(dtype, pattern, dropout, is_cast, causal, multiplied, monkeypatch):
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)
    packed, mask = packing(pattern, causal)
    attention = layers.Attention(D, H, dropout=dropout).train()
    inputs = [x.detach().to(dtype).requires_grad_() for x in heads(int(mask.sum()))]
    floats = [x.detach().float().requires_grad_() for x in inputs]
    towards = torch.randn(inputs[0].shape, generator=generator(28)).to(dtype)
    with torch.autocast("cpu", dtype, enabled=is_cast):
        torch.manual_seed(3)
        out = attention.attend(*inputs, packed, None)
        found = [out, *torch.autograd.grad(out, inputs, towards)]
    assert {name for name, _ in multiplied} == ({"_weights"} if dropout else {"_FLASH", "_FLASH_BACKWARD"})
    assert {each for _, each in multiplied} == {torch.float32}
    torch.manual_seed(3)
    right = attention.attend(*floats, packed, None)
    for ours, exact in zip(found, [right, *torch.autograd.grad(right, floats, towards.float())], strict=True):
        assert (ours.dtype, exact.dtype) == (dtype, torch.float32)
        assert distance(ours.float(), exact) <= torch.finfo(dtype).eps * 4
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(attention.attend(*inputs, packed, None), out)


def test_a_mask_of_pairs_and_a_graph_are_left_to_torch(multiplied, monkeypatch):
    monkeypatch.setattr(products, "multiplies", lambda dtype: False)
    attention, half = layers.Attention(D, H, dropout=0.1).eval(), torch.bfloat16
    pairs = packing_of(B, S, torch.ones(B, S, S, dtype=torch.bool).tril())
    attention.attend(*heads(B * S, dtype=half), pairs, None)
    packed, _ = packing("none")
    compiled = torch.compile(attention.attend, backend="aot_eager", fullgraph=True)
    compiled(*heads(B * S, dtype=half), packed, None)
    assert multiplied == []


def test_operator_names_of_two_checkouts_differ():
    """Two versions in one process: the name is made of the file's path."""
    assert kernels.ragged_attention._qualname.startswith(kernels.NAMESPACE + "::")
    assert re.fullmatch(r"hubmodels_[0-9a-f]{8}_*", kernels.NAMESPACE)


# Which kernel runs


@pytest.mark.parametrize(
    ("pattern", "training", "weights", "kernel"),
    [
        ("none", False, False, "padded_attention"),
        ("none", True, False, "dropped_attention"),
        ("right", False, False, "ragged_attention"),
        ("right", True, False, "dropped_attention"),
        ("right", False, True, "explicit_attention"),
        ("none", False, True, "explicit_attention"),
    ],
)
def test_attend_takes_the_kernel_that_fits(pattern, training, weights, kernel, monkeypatch):
    called = []

    def spy_on(name):
        real = getattr(kernels, name)

        def spy(*args):
            called.append(name)
            return real(*args)

        monkeypatch.setattr(kernels, name, spy)

    for name in ("padded_attention", "ragged_attention", "dropped_attention", "explicit_attention", "varlen_attention"):
        spy_on(name)
    packed, mask = packing(pattern)
    attention = layers.Attention(D, H, dropout=0.1).train(training)
    attention.attend(*heads(int(mask.sum()), dtype=torch.float32), packed, [] if weights else None)
    assert called == [kernel]


@pytest.mark.parametrize("pattern", ["none", "right"])
@pytest.mark.parametrize(
    ("case", "amx", "in_products"),
    [
        ("inference", False, True),
        ("inference", True, False),
        ("float32", False, False),
        ("causal", False, False),
        ("pairs", False, False),
        ("gradients", False, False),
        ("dropout", False, False),
    ],
)
def test_bfloat16_is_attended_to_in_products_where_those_are_faster(case, amx, in_products, pattern, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    kernels.products_are_faster.cache_clear()
    called, real = [], kernels.product_attention
    monkeypatch.setattr(kernels, "product_attention", lambda *args: called.append(args) or real(*args))
    packed, mask = packing(pattern, causal=case == "causal")
    inputs = heads(int(mask.sum()), dtype=torch.float32 if case == "float32" else torch.bfloat16)
    if case == "pairs":
        packed = packing_of(B, S, mask[:, None].expand(B, S, S))
        inputs = heads(B * S, dtype=torch.bfloat16)
    attention = layers.Attention(D, H, dropout=0.1).train(case == "dropout")
    with torch.set_grad_enabled(case == "gradients"):
        attention.attend(*inputs, packed, None)
    kernels.products_are_faster.cache_clear()
    assert bool(called) == in_products


@BOTH
@pytest.mark.parametrize("graph", [False, True], ids=["no grad", "with grad"])
@pytest.mark.parametrize("weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attend_hands_on_what_the_packing_says(pattern, weights, graph, causal):
    """Without gradients the ragged kernel is called past its operator: that path has to hear of the triangle too."""
    packed, mask = packing(pattern, causal)
    attention = layers.Attention(D, H, dropout=0.1).eval()
    inputs = heads(int(mask.sum()))
    with torch.set_grad_enabled(graph):
        out = attention.attend(*inputs, packed, [] if weights else None)
    assert out.requires_grad == graph
    assert distance(out, by_hand(*inputs, mask, causal)) <= 1e-12


def test_attend_in_training_drops_under_the_causal_mask():
    """Dropped weights are zero, the others grow, and none is of a later token."""
    packed, mask = packing("right", causal=True)
    attention = layers.Attention(D, H, dropout=0.5).train()
    q, k, _ = heads(int(mask.sum()))
    v = packed.pack(torch.arange(S).double().expand(B, S))[:, None, None].expand(-1, H, K)  # the column
    torch.manual_seed(0)
    out = torch.stack([attention.attend(q, k, 10.0**v, packed, None) for _ in range(20)])
    columns = v[:, :, 0]
    assert (out.amax((0, 2, 3)) < 2.001 * 10.0 ** columns[:, 0]).all()
    assert out.std(0).max() > 0
    first = (columns[:, 0] == 0).nonzero().flatten()
    assert set(out[:, first].flatten().tolist()) == {0.0, 2.0}


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
        assert given["window_size"] in ((-1, -1), (-1, 0))  # to the right all, or nothing: causal
        causal = given["window_size"][1] == 0
        out = []
        begins, ends = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
        assert begins == ends
        for begin, end in itertools.pairwise(begins):
            assert end - begin <= given["max_q"]
            rows = (given[name][begin:end].transpose(0, 1)[None] for name in ("query", "key", "value"))
            out.append(F.scaled_dot_product_attention(*rows, is_causal=causal)[0].transpose(0, 1))
        return torch.cat(out)

    return twin


@BOTH
@pytest.mark.parametrize("pattern", PADDED)
def test_variable_length_path_of_cuda_equals_the_fallback(pattern, causal, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", on_a_cpu(calls))
    packed, mask = packing(pattern, causal)
    inputs = heads(int(mask.sum()))
    out = kernels.varlen_attention(*inputs, packed)
    fallback = kernels.padded_attention(*inputs, packed, 0.0)
    assert distance(out, fallback) <= 1e-12
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert max(map(distance, gradients, torch.autograd.grad(fallback.square().sum(), inputs))) <= 1e-12
    (given,) = calls
    assert given["window_size"] == ((-1, 0) if causal else (-1, -1))
    assert given["max_q"] == given["max_k"] == int(mask.sum(1).max())
    assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32


@BOTH
def test_variable_length_path_with_a_row_of_padding(causal, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", on_a_cpu([]))
    packed, mask = with_an_empty_row("right", causal)
    inputs = heads(int(mask.sum()))
    assert distance(kernels.varlen_attention(*inputs, packed), by_hand(*inputs, mask, causal)) <= 1e-12


@pytest.mark.parametrize(
    ("capability", "missing", "has"), [((9, 0), False, True), ((7, 5), False, False), ((9, 0), True, False)]
)
def test_a_gpu_without_variable_length_attention_falls_back(capability, missing, has, monkeypatch):
    kernels.has_varlen.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if missing:
        monkeypatch.delattr(torch.nn.attention, "varlen", raising=False)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert kernels.has_varlen(torch.device("cuda")) == has
    kernels.has_varlen.cache_clear()
