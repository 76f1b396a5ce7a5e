"""Who takes the steps of a generation, if not the model itself."""

from typing import Any, Protocol

from torch import Tensor

from .cache import Cache


class Step(Protocol):
    """Takes steps of one generation, on its cache."""

    def __call__(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Tokens [B] and their positions [B, 1], None: the column -> float32 [B, V]"""

    def goes_on(self, rows: int) -> bool:
        """Whether it can take the next step too, now that the cache has so many rows and not those it had."""


class Steps(Protocol):
    """Who takes the steps of a model's generations; `least`: from how many on that is worth while."""

    @property
    def least(self) -> int: ...

    def __call__(self, model: Any, cache: Cache) -> Step | None:
        """None: nobody; the model is to be called itself."""
