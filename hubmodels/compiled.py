"""An encoder's blocks for few tokens, and the steps of a generation, as programs that torch.compile makes for this CPU.

Their products are inductor's own, on weights in the layout that they want: they read a matrix as fast as the memory
gives it (docs/performance.md), and what stands between them is a loop each. Shape letters: see `layers.py`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .cache import Cache, Seen
from .errors import InputError
from .fused import FusedBlocks, Parts
from .packing import Packing
from .steps import Step

_USUAL = 24  # tokens that a program of blocks is made for, whatever comes first; it serves others as well


class _Program:
    """A function of a model that becomes a program when it is first called, and the model's weights are frozen into it.

    Each kind of input that differs in more than sizes has one of its own; each takes a minute or two, and memory for
    the weights once more.
    """

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype):
        options = {
            "max_autotune": True,
            # Of float64 inductor has no products of its own.
            "max_autotune_gemm_backends": "ATEN" if dtype == torch.float64 else "CPP",
            # To look at each part of the model before each call takes a millisecond.
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        }
        self._run = torch.compile(  # type: ignore[call-overload]
            function, fullgraph=True, dynamic=True, isolate_recompiles=True, options=options
        )

    def __call__(self, *inputs: Any) -> Tensor:
        # torch looks at this setting alone, not among the options.
        with torch._inductor.config.patch(freezing=True):
            return self._run(*inputs)


class CompiledBlocks:
    """`Shortcut` of a few tokens through all blocks of an encoder, as one program.

    blocks: those that it stands for. like: the same, on weights that torch.compile can lay out. others: the shortcut of
    other numbers of tokens, if there is one.
    """

    most: ClassVar[int] = 32  # tokens; of 64, oneDNN's products are as fast

    def __init__(self, blocks: nn.ModuleList, like: nn.ModuleList, others: FusedBlocks | None = None):
        self.blocks, self.like, self.others = blocks, like, others
        self._parts = Parts(blocks)
        self._program: _Program | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.blocks, self.like, self.others)  # a copy's weights are its own

    def __call__(self, x: Tensor, packing: Packing) -> Tensor | None:
        """None: these tokens are for no shortcut."""
        if not 1 < len(x) <= self.most or packing.pairwise is not None:
            return None if self.others is None else self.others(x, packing)
        if not self._parts.may_be_passed_by():
            return None
        with torch.inference_mode(False), torch.no_grad():  # else there would be one for each mode
            if self._program is None:
                self._program = _Program(_through, x.dtype)
                self._program(self.like, x.new_zeros(_USUAL, x.shape[1]), torch.ones(_USUAL, 1, 1, _USUAL).bool())
            rows = torch.arange(packing.batch).repeat_interleave(packing.ends(x.device).diff())  # [T]
            return self._program(self.like, x.detach().clone(), (rows[:, None] == rows)[:, None, None])


class _EachOther:
    """What a block takes for a cache, of which each token looks at those of the same input that `mask` lets it see.

    So the attention is that of a step, of sums.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask  # [T, 1, 1, T]

    def extend(self, new: Tensor, packing: Packing) -> Seen:
        """[T, 2, H, K]"""
        keys, values = new.permute(1, 2, 0, 3)[:, None].expand(2, len(new), -1, -1, -1)  # [T, H, T, K]
        return Seen(keys, values, self.mask)


def _through(blocks: nn.ModuleList, x: Tensor, mask: Tensor) -> Tensor:
    past = _EachOther(mask)
    for block in blocks:
        x = block(x, Packing(len(x), 1), None, past)
    return x


class CompiledSteps:
    """`Steps` as one program for a single row, and one for any number of them; each is made when it is first wanted."""

    least: ClassVar[int] = 1

    def __init__(self) -> None:
        self._model: Any = None  # whose programs these are
        self._program: Callable[..., Tensor] = _next_scores

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, model: Any, cache: Cache) -> Step | None:
        """As `Steps`"""
        if cache.batch == 1 and cache.real is not None:
            return None  # the last row of several, with padding, which the program of one knows nothing of
        if model is not self._model:
            self._program = _Program(_next_scores, next(model.parameters()).dtype)
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
