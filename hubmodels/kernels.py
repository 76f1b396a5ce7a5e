"""The kernels behind `Attention.attend`: how tokens meet each other.

Shape letters: see `layers.py`.
"""

import zlib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products
from .cache import Seen
from .packing import Packing


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, probs: list[Tensor]
) -> Tensor:
    """Softmax written out, for who wants to see the weights. Padding has weight 0 and gives none."""
    keys, values = (packing.unpack(t).transpose(1, 2) for t in (k, v))  # [B, H, S, K]
    return seen_attention(q, Seen(keys, values, packing.mask(q.device)), packing, dropout, probs)


def seen_attention(q: Tensor, seen: Seen, packing: Packing, dropout: float, probs: list[Tensor] | None) -> Tensor:
    """The new tokens [T, H, K] look at all that `seen` lets them."""
    keys, values, mask, begins = seen
    if begins is not None and probs is None:
        return _attention_of_last(q, keys, values, begins, dropout)
    if probs is None and packing.length == 1 and q.is_cpu and dropout == 0.0 and torch.compiler.is_compiling():
        return _summed_attention_of_last(q, keys, values, mask)
    padded = packing.unpack(q).transpose(1, 2).to(keys.dtype)  # [B, H, S, K]
    if probs is None:
        out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask, dropout_p=dropout)
        return packing.pack(out.transpose(1, 2)).to(q.dtype)
    scores = padded @ keys.mT * q.shape[-1] ** -0.5  # [B, H, S, columns]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1), dropout)
    real = packing.real()
    if real is not None:  # a padding position's own row is nobody's weights
        weights = weights * real[:, None, :, None]
    probs.append(weights.to(q.dtype))
    return packing.pack((weights @ values).transpose(1, 2)).to(q.dtype)


def _attention_of_last(q: Tensor, keys: Tensor, values: Tensor, begins: list[int], dropout: float) -> Tensor:
    """One token a row, [B, H, K], looks at its row's columns [H, columns, K] from `begins` on: no padding is read."""
    queries = q.to(keys.dtype)[:, :, None]  # [B, H, 1, K]
    out = torch.empty_like(queries)
    for row, begin in enumerate(begins):
        few = slice(row, row + 1), slice(None), slice(begin, None)
        out[row] = F.scaled_dot_product_attention(queries[row][None], keys[few], values[few], dropout_p=dropout)[0]
    return out[:, :, 0].to(q.dtype)


def _summed_attention_of_last(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One token a row, [B, H, K], looks at all columns of the mask: of sums torch.compile makes one loop of its own."""
    # Spread out, a factor is never contiguous, and torch need not ask whether the cache is: it is when it gets full.
    scores = (q.to(keys.dtype)[:, :, None].expand_as(keys) * keys).sum(-1) * q.shape[-1] ** -0.5  # [B, H, columns]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
    return (scores.softmax(-1)[..., None].expand_as(values) * values).sum(2).to(q.dtype)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    """torch's fused attention over [B, S]: best where nothing is padding, the fallback where something is."""
    q, k, v = (packing.unpack(t).transpose(1, 2) for t in (q, k, v))  # [B, H, S, K]
    is_causal = packing.causal and packing.indices is None and packing.pairwise is None
    mask = None if is_causal else packing.mask(q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    return packing.pack(out.transpose(1, 2))


@cache
def products_are_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU's plain products beat those in torch's flash attention: in bfloat16, unless it has AMX."""
    fast = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and fast and torch.backends.mkldnn.is_available()


def takes_padded(dtype: torch.dtype, packing: Packing) -> bool:
    """Whether, on a CPU and without gradients, nothing is faster than torch's fused attention on a batch as it is."""
    whole = packing.indices is None and packing.pairwise is None
    return whole and products.multiplies(dtype) and (packing.causal or not products_are_faster(dtype))


def product_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Softmax between two products, for as many heads at once as stay in a CPU's cache; each looks at all of its row.

    For inference: no gradients. The scores are rounded to the dtype, as in BERT's first implementations.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    uniform = [(0, len(q), packing.batch, packing.length)] if len(q) else []
    for run in uniform if packing.offsets is None else _runs(packing.offsets):
        queries, keys, values = (_rows(x, run).contiguous().flatten(0, 1) for x in (q, k, v))  # [rows * H, length, K]
        mixed = torch.empty_like(queries)
        at_once = max(1, _SCORES // run[3] ** 2)
        scores = q.new_empty(min(at_once, len(queries)), run[3], run[3])
        weights = torch.empty_like(scores)
        parts = (x.split(at_once) for x in (queries, keys, values, mixed))
        for query, key, value, mix in zip(*parts, strict=True):
            few = slice(len(query))
            torch.baddbmm(scores[few], query, key.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=scores[few])
            torch.bmm(torch.softmax(scores[few], -1, out=weights[few]), value, out=mix)
        _rows(out, run).copy_(mixed.unflatten(0, (run[2], -1)))
    return out


@cache
def has_varlen(device: torch.device) -> bool:
    """Whether torch has variable-length flash attention for this GPU: from Ampere on."""
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Variable-length flash attention, CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn

    offsets: Any = packing.offsets
    window = (-1, 0) if packing.causal else (-1, -1)  # columns to the left and right that a token sees; -1: all
    longest = packing.longest
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=window)  # type: ignore[return-value]


# On a CPU, one flash call per run of neighbouring rows of one length, each on a view of the packed tokens: no mask, no
# copy. (Putting rows in the order of their lengths first costs what the fewer calls gain.) The loop is one operator to
# torch.compile, so a graph holds for batches of every shape. Several versions of this package may live in one process:
# each registers it under a name of its own.
NAMESPACE = f"hubmodels_{zlib.crc32(__file__.encode()):08x}"
while hasattr(getattr(torch.ops, NAMESPACE), "ragged_attention"):  # this file ran before, and its models live on
    NAMESPACE += "_"
_SCORES = 2**19  # at once, of these and of their softmax: a megabyte of bfloat16 each
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _runs(offsets: Tensor) -> list[tuple[int, int, int, int]]:
    """[B + 1] -> (begin, end, rows, length) of each run of rows of one length; empty rows are left out."""
    runs: list[tuple[int, int, int, int]] = []
    for begin, end in pairwise(offsets.tolist()):
        if runs and runs[-1][3] == end - begin:
            runs[-1] = (runs[-1][0], end, runs[-1][2] + 1, end - begin)
        elif end > begin:
            runs.append((begin, end, 1, end - begin))
    return runs


def _rows(x: Tensor, run: tuple[int, int, int, int]) -> Tensor:
    """[T, H, ...] -> view [rows, H, length, ...] of one run"""
    begin, end, rows, length = run
    return x[begin:end].view(rows, length, *x.shape[1:]).transpose(1, 2)


def _multiplied(*tensors: Tensor) -> Iterator[Tensor]:
    """In float32 if this CPU does not multiply half precision, whose products take several times as long"""
    return (x if products.multiplies(x.dtype) else x.float() for x in tensors)


def _empty_results(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """What `ragged_attention` gives, without values: all that torch.compile has to know of it."""
    lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _ragged_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """[T, H, K] three times, [B + 1] -> [T, H, K] and the scores' log-sum-exp [T, H]; each row attends to itself."""
    out, lse = _empty_results(q, k, v, offsets)
    q, k, v = _multiplied(q, k, v)
    for run in _runs(offsets):
        attended, sums = _FLASH(*(_rows(x, run) for x in (q, k, v)), 0.0, causal)
        _rows(out, run).copy_(attended)
        _rows(lse, run).copy_(sums)
    return out, lse


# Calling it as an operator imports the compiler, a second: without gradients the function is called itself.
ragged_attention = torch.library.custom_op(
    f"{NAMESPACE}::ragged_attention", _ragged_attention, mutates_args=(), device_types="cpu"
)


@torch.library.custom_op(f"{NAMESPACE}::ragged_attention_backward", mutates_args=(), device_types="cpu")
def _ragged_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad, q, k, v, out = _multiplied(grad, q, k, v, out)
    for run in _runs(offsets):
        parts = _FLASH_BACKWARD(*(_rows(x, run) for x in (grad, q, k, v, out, lse)), 0.0, causal)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _rows(whole, run).copy_(part)
    return dq, dk, dv


ragged_attention.register_fake(_empty_results)


@_ragged_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.causal = inputs[4]


def _backward(ctx, grad: Tensor, _: Tensor):
    return *_ragged_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


ragged_attention.register_autograd(_backward, setup_context=_save)


# torch's attention on a CPU drops weights only where it has written out all of them, over the padded batch, and keeps
# them and their mask for the way back. Here each run of rows is attended to for as many heads at once as stay in the
# cache, and on the way back weights and mask are made again: the mask is a function of the seed.
def dropped_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    """[T, H, K] three times -> [T, H, K], on a CPU, each weight dropped by torch's generator with that probability."""
    seed = torch.randint(2**62, (), device="cpu")
    plain = not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and q.requires_grad)
    kernel = _seeded_attention if plain else seeded_attention
    return kernel(q, k, v, packing.ends(q.device), seed, dropout, packing.causal)


def _slabs(run: tuple[int, int, int, int], *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each of [T, H, K], [n, length, K] of the run's n next heads; a view if they are of one row."""
    at_once = max(1, _SCORES // run[3] ** 2)
    return zip(*(_rows(x, run).flatten(0, 1).split(at_once) for x in packed), strict=True)


def _weights(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """[n, length, K] twice -> [n, length, length]"""
    size, length = len(query), query.shape[1]
    scores = torch.baddbmm(query.new_empty(size, length, length), query, key.mT, beta=0, alpha=query.shape[-1] ** -0.5)
    if causal:
        scores.masked_fill_(scores.new_ones(length, length, dtype=torch.bool).triu_(1), -torch.inf)
    return torch.softmax(scores, -1)


def _dropping(dropout: float) -> int:
    """Of 2^16 numbers, how many drop: what is nearest to `dropout`"""
    return round(dropout * 2**16)


def _growth(dropout: float) -> float:
    """What those are multiplied by that are kept"""
    return 2**16 / max(1, 2**16 - _dropping(dropout))


def _drop(weights: Tensor, dropout: float, draw: torch.Generator) -> Tensor:
    """Where to drop, bool. Sixteen bits decide for each, which takes a fifth of the time of torch's `bernoulli_`."""
    count = weights.numel()
    numbers = weights.new_empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=draw)
    return (numbers.view(torch.int16)[:count] < _dropping(dropout) - 2**15).view(weights.shape)


@torch.autocast("cpu", enabled=False)
def _seeded_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seed: Tensor, dropout: float, causal: bool = False
) -> Tensor:
    """[T, H, K] three times, [B + 1], [] -> [T, H, K]; each row attends to itself, some of its weights dropped."""
    out, draw = torch.empty_like(q, memory_format=torch.contiguous_format), torch.Generator().manual_seed(int(seed))
    q, k, v = _multiplied(q, k, v)
    for run in _runs(offsets):
        mixed = []
        for query, key, value in _slabs(run, q, k, v):
            weights = _weights(query, key, causal)
            mixed.append(weights.masked_fill_(_drop(weights, dropout, draw), 0.0) @ value)
        _rows(out, run).copy_(torch.cat(mixed).unflatten(0, (run[2], -1)))
    return out.mul_(_growth(dropout))


seeded_attention = torch.library.custom_op(
    f"{NAMESPACE}::seeded_attention", _seeded_attention, mutates_args=(), device_types="cpu"
)


@torch.library.custom_op(f"{NAMESPACE}::seeded_attention_backward", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def _seeded_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seed: Tensor, dropout: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    draw, scale = torch.Generator().manual_seed(int(seed)), q.shape[-1] ** -0.5
    grad, q, k, v = _multiplied(grad * _growth(dropout), q, k, v)
    for run in _runs(offsets):
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for query, key, value, given in _slabs(run, q, k, v, grad):
            weights = _weights(query, key, causal)
            drop = _drop(weights, dropout, draw)
            of_weights = (given @ value.mT).masked_fill_(drop, 0.0)
            scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(scale)
            parts[2].append(weights.masked_fill_(drop, 0.0).mT @ given)
            parts[0].append(scores @ key)
            parts[1].append(scores.mT @ query)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _rows(whole, run).copy_(torch.cat(part).unflatten(0, (run[2], -1)))
    return dq, dk, dv


@seeded_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seed: Tensor, dropout: float, causal: bool = False):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_seeded_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seed: Tensor, dropout: float, causal: bool):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_seed(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward_of_seeded(ctx, grad: Tensor):
    return *_seeded_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


seeded_attention.register_autograd(_backward_of_seeded, setup_context=_save_seed)
