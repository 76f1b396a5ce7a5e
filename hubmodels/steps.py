"""The steps of a generation as one program, which torch.compile makes of a language model for the CPU that it is on.

Its products of few tokens are inductor's own, on weights in the layout that they want: they read a matrix as fast as
the memory gives it (docs/performance.md), and what stands between them is a loop each. Shape letters: see `layers.py`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .cache import Cache
from .errors import InputError


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


class CompiledSteps:
    """`Steps` as one program for a single row, and one for any number of them; each is made when it is first wanted.

    That takes a minute or two, and memory for the weights once more.
    """

    least: ClassVar[int] = 1

    def __init__(self) -> None:
        self._model: Any = None  # whose programs these are: they hold its weights
        self._program: Callable[..., Tensor] = _next_scores

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy's weights are its own

    def __call__(self, model: Any, cache: Cache) -> Step | None:
        """As `Steps`"""
        if cache.batch == 1 and cache.real is not None:
            return None  # the last row of several, with padding, which the program of one knows nothing of
        if model is not self._model:
            wide = next(model.parameters()).dtype == torch.float64  # of which inductor has no products
            options = {
                "max_autotune": True,
                "max_autotune_gemm_backends": "ATEN" if wide else "CPP",
                # To look at each part of the model before each step takes a millisecond.
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            }
            self._program = torch.compile(  # type: ignore[call-overload]
                _next_scores, fullgraph=True, dynamic=True, isolate_recompiles=True, options=options
            )
            self._model = model
        return _CompiledStep(self._program, model, cache)


class _CompiledStep:
    def __init__(self, program: Callable[..., Tensor], model: Any, cache: Cache):
        self.program, self.model, self.cache = program, model, cache
        if cache.batch > 1:
            cache.mark()  # one program for rows with and without padding

    def __call__(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = torch.full((len(tokens), 1), self.cache.length)
        # What is frozen has its weights in the program. torch looks at this setting alone, not among the options.
        with torch._inductor.config.patch(freezing=True):
            return self.program(self.model, tokens, positions, self.cache)

    def goes_on(self, rows: int) -> bool:
        return rows > 1


def _next_scores(model: Any, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    return model.next_scores(tokens, positions, cache)


def check_compiler() -> None:
    """Raise InputError unless torch finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "accelerate: compiled = True: torch.compile finds no C++ compiler on this machine; install one, as g++, or "
            "name it in the environment variable CXX"
        ) from error
