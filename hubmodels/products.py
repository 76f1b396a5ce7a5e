"""How a matrix meets tokens: the product behind `Linear` on a CPU, and what is kept of it for the way back.

Shape letters: see `layers.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_TENSORS = (Tensor, torch.nn.Parameter)  # and no class of anybody's, whose product may be another
_HALF = (torch.bfloat16, torch.float16)
_LARGE = 2**18  # numbers of a matrix from which on a better product is worth oneDNN's 40 microseconds to begin one
_MANY = 16  # tokens from which on a product in float32 pays for making it of a matrix in half precision


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, [..., in] -> [..., out]; the same numbers, but for rounding, where that is faster: by oneDNN, and in
    float32 on a CPU that multiplies no half precision. There torch's own takes up to seven times as long.

    Where anybody might look at how it is computed, it is `F.linear`. For a gradient only the way there is oneDNN's: on
    the way back MKL is as fast.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.linear(x, weight, bias)
    is_cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_cast else x.dtype
    if not (_has_better(dtype, x, weight) and _is_mere_product(dtype, is_cast, x, weight, bias)):
        return F.linear(x, weight, bias)
    waits = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias))
    if waits and not (x.dim() == 2 and len(x)):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False) if is_cast else nullcontext():
        return _Linear.apply(x.to(dtype), weight, bias, dtype) if waits else _product(x, weight, bias, dtype)


def _has_better(dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    """Whether these products of `dtype` are faster by `_product`"""
    if dtype in _HALF and not multiplies(dtype):
        tokens = x.numel() // max(1, weight.shape[-1])
        return tokens >= _MANY and tokens * weight.numel() >= _MANY * _LARGE
    return dtype == torch.float32 and weight.numel() >= _LARGE and onednn_is_faster()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast products of `dtype`"""
    if dtype not in _HALF:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    onednn = torch.ops.mkldnn
    supported = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
    return bool(supported())


@cache
def onednn_is_faster() -> bool:
    """Whether MKL, by which torch multiplies matrices in float32, is slower here than oneDNN: it is on AMD's CPUs.

    On a Zen 3, of BERT-base, it takes 0.9 to 1.3 times as long, by matrix and tokens, 1.08 in the median
    (benchmarks/products.py).
    """
    known = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # which an older torch does not tell
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise") and capabilities.get("cpu_name", "")[:3] == "AMD"


def _is_mere_product(dtype: torch.dtype, is_cast: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these fit, are of `dtype`, or cast to it from float32, and nobody looks on."""
    dtypes = (dtype, torch.float32) if is_cast else (dtype,)
    if not (_is_plain(x, dtypes) and _is_plain(weight, dtypes) and (bias is None or _is_plain(bias, dtypes))):
        return False
    if x.shape[-1:] != weight.shape[1:] or not torch.backends.mkldnn.enabled:
        return False
    return not _is_watched()


def _is_watched() -> bool:
    """Whether somebody sees more of an operator than its result"""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # torch.func's transforms
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0  # whoever counts or records operators
    )


def _is_plain(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    return type(x) in _TENSORS and x.dtype in dtypes and x.is_cpu and x.layout == torch.strided


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[..., in] -> [..., out] of `dtype`, to which all are rounded, summed up in float32 and rounded once"""
    x, weight = _wide(x, dtype), _wide(weight, dtype)
    bias = None if bias is None else _wide(bias, dtype)
    if onednn_is_faster() and weight.numel() >= _LARGE:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "").to(dtype)
    return F.linear(x, weight, bias).to(dtype)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


class _Linear(torch.autograd.Function):
    """`_product`, whose gradients are such products too; of what is in half precision, nothing wider is kept."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _product(x, weight, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.dtype = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad = grad.float()
        with torch.autocast("cpu", enabled=False):
            return (
                (grad @ _wide(weight, ctx.dtype)).to(x.dtype) if of_x else None,
                (grad.mT @ x.float()).to(weight.dtype) if of_weight else None,
                grad.sum(0).to(ctx.bias_dtype) if of_bias else None,
                None,
            )


def look_up(ids: Tensor, weight: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
    """`F.embedding`, [T] -> [T, D], and the table [V, D] for whatever else takes it.

    Of a table that is looked up and then, as this second result, multiplied, autograd makes one gradient: what was
    looked up is added to the product's. Else it would make two, and for BERT each takes 94 MB.
    """
    waits = torch.is_grad_enabled() and weight.requires_grad and not (torch.jit.is_tracing() or _is_watched())
    exact = (torch.float32, torch.float64)  # in half precision sums would be rounded as they grow
    if waits and _is_plain(weight, exact) and _is_plain(ids, (torch.int64, torch.int32)):
        return _LookUp.apply(ids, weight, weight, padding)
    return F.embedding(ids, weight, padding), weight


class _LookUp(torch.autograd.Function):
    """ids, the table, the table once more, the id of padding -> vectors and the second table"""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, table: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, weight), table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ids, weight, _, ctx.padding = inputs
        ctx.shape = weight.shape
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_vectors: Tensor | None, of_table: Tensor | None) -> tuple[Tensor | None, ...]:
        """The sparse gradient comes first: autograd adds it in place to a dense one that follows, if nobody else holds
        that; after a dense one it never does.
        """
        if of_vectors is None:
            return None, None, of_table, None
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            of_vectors = of_vectors.masked_fill((ids == ctx.padding)[:, None], 0.0)
        if torch.is_grad_enabled():  # there will be a gradient of this one
            return None, of_vectors.new_zeros(ctx.shape).index_add(0, ids, of_vectors), of_table, None
        rows = torch.sparse_coo_tensor(ids[None], of_vectors, ctx.shape, check_invariants=False)
        return None, rows if of_table is not None else of_vectors.new_zeros(ctx.shape).add_(rows), of_table, None


def made_again(x: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """While what takes `x` runs: on a CPU it is not kept for the way back, but made again there of what is kept anyway.

    Not where somebody has a say in what is kept, as gradient checkpointing has.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not (x.is_cpu and x.requires_grad):
        return nullcontext()
    graph: Any = torch._C._autograd
    if not graph._saved_tensors_hooks_is_enabled() or graph._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func's transforms
        return nullcontext()
    known = _identity(x)  # and not x, which would be kept so
    return saved_tensors_hooks(
        lambda saved: None if _identity(saved) == known else saved, lambda kept: make() if kept is None else kept
    )


def _identity(x: Tensor) -> tuple[Any, ...]:
    """What no other tensor has while `x` lives, and `x` no more once something is written into it"""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version
