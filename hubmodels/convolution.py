"""A linear map of a few tokens as a convolution: the same sum, by a better kernel of oneDNN's.

On CPUs without AVX512 oneDNN's inner product has none for a few tokens, its convolution has (benchmarks/products.py).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import ONEDNN_ACTIVATIONS, TOKENS, PackedMap, as_input
from .products import onednn_is_faster

_POINT = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation and groups of a convolution with a kernel of 1 x 1
FEW = 32  # tokens; of more, a convolution is not faster
_WIDE = 2**20  # numbers of a weight from which on it is worth the tenth of a millisecond that one takes to begin


class ConvolvedLinear(PackedMap):
    """`Linear` of up to 32 tokens by oneDNN's convolution, of an image of one row with a kernel of 1 x 1; `many` takes
    any other number.

    oneDNN chooses a weight's layout by the number of tokens and would lay it out anew in each call: tokens are filled
    up with zeros to a number that wants the layout which the weight has.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, many: PackedMap):
        super().__init__()
        self.many, self.bias = many, None if bias is None else bias.detach()
        self._pack(weight.detach())

    def _pack(self, weight: Tensor) -> None:
        self.shape, self.kernel = weight.shape, _kernel_of(weight, TOKENS)
        self.width = _width_of(self.kernel, weight.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kernel": self.kernel.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pack(self.kernel[:, :, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        rows = self._rows(x)
        return self._convolved(x, rows, "none", [], "") if rows else self.many(x)

    def bent(self, x: Tensor, activation: str) -> Tensor:
        """As `PackedMap`"""
        if activation not in ONEDNN_ACTIVATIONS:
            return super().bent(x, activation)
        rows = self._rows(x)
        return self._convolved(x, rows, *ONEDNN_ACTIVATIONS[activation]) if rows else self.many.bent(x, activation)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `PackedMap`"""
        rows = self._rows(x)
        if not rows:
            return self.many.plus(x, residual)
        images = _image_of(x, rows), _image_of(residual, rows)
        convolve = torch.ops.mkldnn._convolution_pointwise.binary
        return _tokens_of(convolve(*images, self.kernel, self.bias, *_POINT, "add", None, None, [], None), len(x))

    def _convolved(self, x: Tensor, rows: int, *activation: Any) -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        return _tokens_of(convolve(_image_of(x, rows), self.kernel, self.bias, *_POINT, *activation), len(x))

    def _rows(self, x: Tensor) -> int | None:
        if not 0 < len(x) <= FEW:
            return None
        return _rows_for(-(-len(x) // 4) * 4, self.shape, self.width, torch.get_num_threads())


def _image_of(x: Tensor, rows: int) -> Tensor:
    """[T, D] -> [1, D, 1, rows], a token's numbers side by side"""
    x = as_input(torch.float32, x)
    x = F.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x.contiguous()
    return x.view(1, 1, rows, -1).permute(0, 3, 1, 2)


def _tokens_of(image: Tensor, tokens: int) -> Tensor:
    """[1, D, 1, rows] -> [T, D]"""
    return image[0, :, 0].T[:tokens]


def _kernel_of(weight: Tensor, rows: int) -> Tensor:
    """[out, in], as oneDNN wants it for an image of so many tokens"""
    size = [1, weight.shape[1], 1, rows]
    return torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *_POINT, size)


def _width_of(kernel: Tensor, inputs: int) -> int | None:
    """How many outputs lie side by side in a weight; None: it does not lie in such stripes, and is not convolved.

    oneDNN's `dnnl_memory_desc` holds the strides from its byte 320 on.
    """
    stripe, width = torch.ops.mkldnn._get_mkldnn_serialized_md(kernel)[320:336].view(torch.int64).tolist()
    return width if stripe == width * inputs else None


@cache
def _rows_for(least: int, shape: torch.Size, width: int | None, threads: int) -> int | None:
    """`least` tokens, or four more, if oneDNN wants a weight for so many in stripes of that width.

    Only by making one can it be asked. threads: torch's at this moment, at which it looks too.
    """
    fits = (rows for rows in (least, least + 4) if _width_of(_kernel_of(torch.empty(shape), rows), shape[1]) == width)
    return next(fits, None) if width else None


def convolves(weight: Tensor) -> bool:
    """Whether few tokens are multiplied faster by `ConvolvedLinear`, as measured: wide weights on AMD's CPUs without
    AVX512.
    """
    if torch.cpu._is_avx512_supported() or not hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md"):
        return False
    return weight.dtype == torch.float32 and weight.numel() >= _WIDE and onednn_is_faster()
