"""A language model's linear maps laid out for one token a row on a CPU.

There a step is bound by reading the weights, and torch's own product of one row with a matrix reads them at half the
speed that memory allows. Two packed layouts that torch has do better: oneDNN's, which is quickly made (`prepacked`, for
one generation), and FBGEMM's for half precision, which takes a second or two and reads fastest (`accelerate`, to keep).
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .layers import Linear, WordScores

M = TypeVar("M", bound=nn.Module)
_TABLE = "transformer.embeddings.word.weight"


class PackedLinear(nn.Module):
    """`Linear` on a weight in oneDNN's layout, for inputs of about `rows` rows. What inductor uses in frozen models."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = 1):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """`Linear` on a half precision weight in FBGEMM's layout; inputs, sums and outputs are float32.

    FBGEMM keeps float16: of a bfloat16 weight, numbers below 6e-5 lose digits, at most 3e-8 of their value.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = None if bias is None else bias.detach().float()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)


class PackedWordScores(nn.Module):
    """`WordScores` on the packed table; the one that is handed in is the one that was packed."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """[T, D] -> [T, V]"""
        return self.linear(states)


def prepacked(model: M, rows: int) -> M:
    """A copy of a language model for inference, its linear maps packed by oneDNN for inputs of about `rows` rows.

    Where that is not possible it is the model itself. The copy costs as much memory as the maps, shares everything else
    with the model, and does not see what becomes of the model's weights afterwards. A part that has hooks, or is of
    another class than those of `layers`, goes on as it is.
    """
    table = model.get_parameter(_TABLE)
    if not _onednn_packs(table) or torch.is_autocast_enabled("cpu"):  # which would cast inputs, but no packed weight
        return model
    return _twin(model, lambda weight, bias: PackedLinear(weight, bias, rows))


def accelerate(model: M) -> M:
    """A copy of a language model for inference, packed once for many generations: `accelerate(gpt2("gpt2")).generate`.

    Of a model in half precision the copy computes in float32 on the half precision weights, and is both faster and
    nearer to the model in float32 than the model itself. Otherwise as `prepacked`.
    Raises InputError for a model that is not a language model, or is not on a CPU.
    """
    if _TABLE not in dict(model.named_parameters()) or not any(type(part) is WordScores for part in model.modules()):
        raise InputError(f"accelerate: expected a language model, gpt or gpt2, got a {type(model).__name__}")
    if not model.get_parameter(_TABLE).is_cpu:
        raise InputError(f"accelerate: expected a model on a CPU, got one on {model.get_parameter(_TABLE).device}")
    return _in_float32(_twin(model, HalfLinear)) if _fbgemm_packs(model) else prepacked(model, 1)


def _twin(model: M, pack: Callable[[Tensor, Tensor | None], nn.Module]) -> M:
    """A copy that shares all but its modules and the weights of linear maps; those are packed side by side."""
    table = model.get_parameter(_TABLE)
    maps: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for part in model.modules():
        if type(part) is Linear and not _has_hooks(part):  # not an adapter that was made of one
            maps[part] = (part.weight, part.bias)
        elif type(part) is WordScores and not _has_hooks(part):
            maps[part] = (table, None)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        packed = dict(zip(maps, pool.map(lambda part: pack(*maps[part]), maps), strict=True))

    def twin(module: nn.Module) -> nn.Module:
        if module in packed:
            return PackedWordScores(packed[module]) if isinstance(module, WordScores) else packed[module]
        if _has_hooks(module):
            return module
        copied = copy.copy(module)
        copied._modules = {name: part and twin(part) for name, part in module._modules.items()}
        return copied

    return twin(model)  # type: ignore[return-value]


def _in_float32(model: M) -> M:
    """A twin with float32 parameters, but for the word table: its rows are added to float32 positions."""
    for name, module in model.named_modules():
        if not name.endswith("embeddings.word"):
            wide = {
                key: None if p is None else nn.Parameter(p.detach().float()) for key, p in module._parameters.items()
            }
            module._parameters = wide
    return model


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fbgemm_packs(model: nn.Module) -> bool:
    """Whether the model is in half precision, fits into float16, and nothing in it goes on as it is."""
    table, parts = model.get_parameter(_TABLE), list(model.modules())
    if table.itemsize != 2 or torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    if any(_has_hooks(part) or (isinstance(part, nn.Linear) and type(part) is not Linear) for part in parts):
        return False
    return all(float(p.detach().abs().max()) < torch.finfo(torch.float16).max for p in model.parameters())


def _onednn_packs(weight: Tensor) -> bool:
    if not (weight.is_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or half
