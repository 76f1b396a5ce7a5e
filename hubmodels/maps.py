"""Linear maps on weights that are packed for inference on a CPU, additions and activations done with the products.

torch's own product with a matrix as it stands in a file is not the fastest that torch has. Three layouts do better:
oneDNN's, which is quickly made and serves rows of any number; FBGEMM's for half precision and whole numbers, which
takes a second or two; and, for a single row, that of an embedding bag.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import NAMESPACE
from .layers import ACTIVATIONS
from .products import linear

TOKENS = 16  # that a weight is laid out for; oneDNN's layout for an inner product is the same for more
_NARROW = 1024  # outputs
_LEAST = 1e-30  # what the largest number of a row of zeros is taken to be
_WIDTH = 96  # numbers of a bag: as many as FBGEMM sums up in a CPU's registers; half or twice as many are slower


class PackedMap(nn.Module):
    """What stands for a `Linear` in an inference copy, and does with its output what would come next."""

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """[T, in] -> [T, out], and the activation of that"""
        return ACTIVATIONS[activation](self(x))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, in], [T, out] -> [T, out], added to `residual`"""
        y = self(x)
        return y.add_(as_input(y.dtype, residual))

    # The same for tokens of the map's dtype, and not too many of them, with the least of Python.

    def bare(self) -> Callable[[Tensor], Tensor]:
        """To `forward`"""
        return self.forward

    def bare_bent(self, activation: str) -> Callable[[Tensor], Tensor]:
        """To `bent`"""
        return partial(self.bent, activation=activation)

    def bare_plus(self) -> Callable[[Tensor, Tensor], Tensor]:
        """To `plus`"""
        return self.plus


def as_input(dtype: torch.dtype, x: Tensor) -> Tensor:
    """What a packed product takes: no other dtype, as autocast may make it, and nothing that waits for a gradient."""
    return x if x.dtype == dtype and not x.requires_grad else x.detach().to(dtype)


# What oneDNN calls them, their parameters and their kind.
ONEDNN_ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "gelu_new": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
}


class PackedLinear(PackedMap):
    """`Linear` on a weight in oneDNN's layout, for inputs of about `rows` rows. What inductor uses in frozen models."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = TOKENS):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias, self.rows = bias, rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}  # nothing else of that layout can be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self._in_parts(self.bare(), x)

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """As `PackedMap`"""
        if activation not in ONEDNN_ACTIVATIONS:
            return super().bent(x, activation)
        return self._in_parts(self.bare_bent(activation), x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `PackedMap`"""
        return self._in_parts(self.bare_plus(), x, residual)

    def bare(self) -> Callable[[Tensor], Tensor]:
        """As `PackedMap`, at once"""
        return self._product("none", [], "")

    def bare_bent(self, activation: str) -> Callable[[Tensor], Tensor]:
        """As `PackedMap`, at once"""
        known = ONEDNN_ACTIVATIONS.get(activation)
        return super().bare_bent(activation) if known is None else self._product(*known)

    def bare_plus(self) -> Callable[[Tensor, Tensor], Tensor]:
        """As `PackedMap`, at once"""
        return partial(torch.ops.mkldnn._linear_pointwise.binary, W=self.weight, B=self.bias, attr="add")

    def _product(self, attr: str, scalars: list[float], algorithm: str) -> Callable[[Tensor], Tensor]:
        product = torch.ops.mkldnn._linear_pointwise.default
        return partial(product, W=self.weight, B=self.bias, attr=attr, scalars=scalars, algorithm=algorithm)

    def _in_parts(self, product: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """rows: each of as many tokens"""
        dtype = self.weight.dtype
        inputs = [as_input(dtype, each) for each in rows]
        count = parts_for(inputs[0].shape[0], self.weight)
        if count == 1:
            return product(*inputs)
        parts = zip(*(each.tensor_split(count) for each in inputs), strict=True)
        return torch.cat([product(*part) for part in parts])


def parts_for(tokens: int, weight: Tensor) -> int:
    """In how many parts oneDNN is to multiply the tokens.

    Of two threads its product in bfloat16 by AMX leaves one idle if tokens and outputs are about as many, and those
    outputs few; of a third as many tokens, for maps as in BERT, it does not (benchmarks/products.py --parts).
    """
    outputs = weight.shape[0]
    alike = outputs <= _NARROW and 3 * outputs < 5 * tokens and 3 * tokens <= 4 * outputs
    if not alike or weight.dtype != torch.bfloat16 or torch.get_num_threads() != 2:
        return 1
    return -(-3 * tokens // outputs) if torch.cpu._is_amx_tile_supported() else 1


class PlainMap(PackedMap):
    """`Linear` on the model's own weight, which is shared and not packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return linear(x, self.weight, self.bias)


class HalfLinear(PackedMap):
    """`Linear` on a half precision weight in FBGEMM's layout; inputs, sums and outputs are float32.

    FBGEMM keeps float16: of a bfloat16 weight, numbers below 6e-5 lose digits, at most 3e-8 of their value.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        bias = None if bias is None else bias.detach().float()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        return torch.ops.quantized.linear_dynamic_fp16(as_input(torch.float32, x), self.weight)


class Int8Linear(PackedMap):
    """`Linear` in whole numbers of 8 bits, in FBGEMM's layout: a scale for each row of the weight, and one for each
    token as it comes, so that what becomes of a token does not depend on the others.

    Inputs and outputs are float32. A weight's numbers go from -127 to 127. A token's do too if the CPU has VNNI, else
    from -63 to 63: FBGEMM then adds up two products in 16 bits, which hold 2 * 127 * 127 and cut off what is more.
    Source: Zafrir 2019 (Q8BERT) §3.1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        whole = torch.quantize_per_channel(
            weight, _scales(weight).double(), torch.zeros(len(weight)).long(), 0, torch.qint8
        )
        self.weight = torch.ops.quantized.linear_prepack(whole, None)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        self.steps = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        x = as_input(torch.float32, x)
        if len(x) == 0:
            return x.new_empty(0, len(self.bias))
        largest = x.abs().amax(1, keepdim=True).clamp_(min=_LEAST)  # [T, 1]: every token is scaled to -1 … 1
        return torch.addcmul(self.bias, self.product(x / largest), largest)

    def product(self, x: Tensor) -> Tensor:
        """Tokens between -1 and 1 [T, in] -> [T, out]"""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x, 1 / self.steps, self.steps + 1, self.weight)


def _scales(weight: Tensor) -> Tensor:
    """[out, in] -> what a step of 127 is worth in each row [out]"""
    return weight.detach().float().abs().amax(1).clamp_(min=_LEAST) / 127


class Int8TracedLinear(Int8Linear):
    """`Int8Linear` for what torch.compile makes a program of.

    There a single token, and where the CPU has AMX each, is rounded to bfloat16, not to whole numbers, and the weight
    multiplied as it stands; several go to FBGEMM by an operator that a program can name.
    """

    whole: Tensor  # int8 [out and some more, in]
    scales: Tensor  # [out]
    ones: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        scales = _scales(weight)
        whole = (weight.detach() / scales[:, None]).round_().to(torch.int8)
        rest = -len(whole) % 16  # what inductor's product of few tokens makes at once
        self.register_buffer("whole", F.pad(whole, (0, 0, 0, rest)), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("ones", torch.ones(len(whole) + rest, dtype=torch.bfloat16), persistent=False)
        self.widens = torch.cpu._is_amx_tile_supported()
        self.number = _numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.number = _numbered(self)

    def forward(self, x: Tensor) -> Tensor:
        """As `Int8Linear`"""
        if not torch.compiler.is_compiling() or (len(x) != 1 and not self.widens):
            return super().forward(x)
        product = torch._weight_int8pack_mm(x.bfloat16(), self.whole, self.ones)[:, : len(self.bias)]
        return torch.addcmul(self.bias, product.float(), self.scales)

    def product(self, x: Tensor) -> Tensor:
        """As `Int8Linear`"""
        if torch.compiler.is_compiling():
            return _int8_product(x, self.number, len(self.bias))
        return super().product(x)


_traced: WeakValueDictionary[int, Int8TracedLinear] = WeakValueDictionary()  # a program names one by its number
_numbers = itertools.count()


def _numbered(part: Int8TracedLinear) -> int:
    number = next(_numbers)
    _traced[number] = part
    return number


def _product_of(x: Tensor, number: int, size: int) -> Tensor:
    """`Int8Linear.product` of the map of that number, which has so many rows."""
    return Int8Linear.product(_traced[number], x)


_operators = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators.define("int8_product(Tensor x, int number, int size) -> Tensor")
_operators.impl("int8_product", _product_of, "CPU")
_operators.impl("int8_product", lambda x, number, size: x.new_empty(len(x), size), "Meta")
_int8_product = getattr(torch.ops, NAMESPACE).int8_product.default


class RowLinear(PackedMap):
    """`Linear` of a single token, as a language model takes them one by one; `many` multiplies any other number.

    Such a product reads a matrix and does little else, and torch's usual ones are slower than the memory is
    (docs/performance.md). It is also a sum of the matrix's columns, each times a number of the token: an embedding bag
    with weights, whose kernel in FBGEMM fetches ahead.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, many: PackedMap):
        super().__init__()
        self.many, self.bias, self.size = many, bias, len(weight)
        parts = weight.detach().split(min(_WIDTH, len(weight)))  # a bag makes so many neighbours of the output
        bags = weight.new_zeros(len(parts), weight.shape[1], len(parts[0]))
        for bag, part in zip(bags, parts, strict=True):  # one by one torch turns them in a third of the time
            bag[:, : len(part)] = part.T
        self.columns = self.packed(bags.flatten(0, 1))
        self.indices = torch.arange(len(self.columns), dtype=torch.int32)
        self.begins = self.indices[:: weight.shape[1]].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        if len(x) != 1:
            return self.many(x)
        given = as_input(torch.float32, x).expand(len(self.begins), -1).reshape(-1)  # [bags * in]
        y = self.summed(given).view(1, -1)[:, : self.size]
        return y if self.bias is None else y + self.bias

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """As `PackedMap`"""
        return super().bent(x, activation) if len(x) == 1 else self.many.bent(x, activation)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `PackedMap`"""
        return super().plus(x, residual) if len(x) == 1 else self.many.plus(x, residual)

    def packed(self, columns: Tensor) -> Tensor:
        """[bags * in, width] -> as they are held"""
        return columns

    def summed(self, given: Tensor) -> Tensor:
        """What to multiply each column with [bags * in] -> [bags, width]"""
        return torch.embedding_bag(self.columns, self.indices, self.begins, per_sample_weights=given)[0]


class Int8RowLinear(RowLinear):
    """`RowLinear` whose columns are rounded to 8 bits, each bag's by a scale of its own; the token is not rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.float(), bias, Int8Linear(weight, bias))

    def packed(self, columns: Tensor) -> Tensor:
        """As `RowLinear`"""
        return torch.ops.quantized.embedding_bag_byte_prepack(columns)

    def summed(self, given: Tensor) -> Tensor:
        """As `RowLinear`"""
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        return bag(self.columns, self.indices, self.begins, per_sample_weights=given)


class PackedWordScores(nn.Module):
    """`WordScores` on the packed table; the one that is handed in is the one that was packed."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear: Any = linear

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, V]"""
        return self.linear(states) if bias is None else self.linear.plus(states, bias.expand(len(states), -1))
