"""A tensor in memory where the package expects one in a file."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.detach()

    def read_into(self, target: Tensor) -> None:
        target.copy_(self.tensor.detach())
