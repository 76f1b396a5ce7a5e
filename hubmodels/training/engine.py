"""A model while it is trained: on its device, shared with the other ranks, with what moves it and its average."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .batches import MicroBatch
from .chance import generator
from .distributed import World, blocks_of, exchanging, replicated, sharded, whole
from .objectives import losses
from .optimisers import make_optimisers
from .settings import Settings

_DROPOUT = 3  # the purpose of its numbers
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """`model` on its way. It is trained itself, or, if it is sharded, a copy is, and it follows in `shown`.

    Raises InputError for weights that are not in float32 or better, or if there is nothing to train.
    """

    def __init__(self, model: nn.Module, settings: Settings, world: World):
        self.model, self.settings, self.world = model.to(world.device), settings, world
        self.is_sharded = settings.sharded and world.ranks > 1
        self.trained = sharded(model, world) if self.is_sharded else model
        self._rest()
        if settings.compiled:
            for block in blocks_of(self.trained):
                block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
        self.called = self.trained if self.is_sharded else replicated(model, world)
        self.parameters = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        _check(self.parameters)
        self.optimisers = make_optimisers(self.trained, settings)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        self._begin()

    def _begin(self) -> None:
        """Optimisers make their state in their first step: here one that moves nothing, so that a checkpoint holds it,
        and fills it, wherever a run stands; in fp16 the first steps may overflow, and be none.
        """
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 0.0
            optimiser.step()
            optimiser.zero_grad()
            for state in optimiser.state.values():
                for value in state.values():
                    value.zero_()

    def backward(self, step: int, batches: Sequence[MicroBatch], totals: Mapping[str, float]) -> dict[str, float]:
        """Gradients of the sum of the losses, each a mean over the `totals` of the step. Returns this rank's sums.

        Dropout is a function of seed, step, rank and micro-batch: a run that goes on has no generator to restore.
        """
        self.called.train()
        sums: dict[str, Tensor] = {}
        dtype = _DTYPES[self.settings.precision]
        for number, batch in enumerate(batches):
            draw = generator(self.settings.seed, step, self.world.rank << 32 | number, _DROPOUT)
            torch.manual_seed(int(draw.integers(2**63)))
            with exchanging(self.called, now=number + 1 == len(batches)):
                with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
                    found = losses(self.called, batch.to(self.world.device).inputs, batch.counts)
                loss = torch.stack([loss / max(1, totals[name]) for name, loss in found.items()]).sum()
                self.scaler.scale(loss * self.world.ranks).backward()  # the ranks' gradients are averaged
            for name, part in found.items():
                sums[name] = sums.get(name, 0) + part.detach()
        return {name: float(total) for name, total in sums.items()}

    def update(self, rate: float) -> float:
        """Move the weights. Returns the norm of the gradient: if it is no number, nothing has moved."""
        if missed := [name for name, p in self.parameters.items() if p.grad is None]:
            raise InputError(
                f"no loss depends on {', '.join(missed)}: they would never be trained; take a model without them, or "
                "freeze them with requires_grad_(False)"
            )
        for optimiser in self.optimisers:
            self.scaler.unscale_(optimiser)
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        if math.isfinite(norm):
            if self.settings.clip:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.clip, norm)
            self._move(rate)
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        return float(norm)

    def _move(self, rate: float) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        if self.average:
            with torch.no_grad():
                weights: list[Tensor] = [self.parameters[name] for name in self.average]
                torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.settings.ema)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, and is read into, by names that do not depend on how it is shared out."""
        names: dict[Tensor, str] = {p: name for name, p in self.parameters.items()}
        states = {names[p]: state for optimiser in self.optimisers for p, state in optimiser.state.items()}
        return {"model": self.trained.state_dict(), "optimiser": states, "average": self.average}

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The model as it would be if this was the end; then its training goes on."""
        overwritten = self.parameters if self.average and not self.is_sharded else {}
        kept = {name: p.detach().clone() for name, p in overwritten.items()}
        with torch.compiler.set_stance("force_eager" if self.settings.compiled else "default"):
            yield self.show()  # in eval mode every graph would be compiled once more
        with torch.no_grad():
            for name, weights in kept.items():
                self.parameters[name].copy_(weights)
        self._rest()

    def _rest(self) -> None:
        """Of a sharded model the whole waits where there is room."""
        if self.is_sharded:
            self.model.cpu()

    @torch.no_grad()
    def show(self) -> nn.Module:
        """Give the model the weights that count, the average if there is one: whole, on every rank, in eval mode."""
        own = self.model.to(self.world.device).state_dict()
        for weights in (self.trained.state_dict(), self.average):
            for name, tensor in weights.items():
                own[name].copy_(whole(tensor))
        return self.model.eval()

    def close(self) -> None:
        """Take away what was compiled."""
        for block in blocks_of(self.trained):
            vars(block).pop("forward", None)


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise InputError("the model has no parameter that is trained: all are frozen")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name} is {parameter.dtype}: what a step adds would be rounded away; train model.float(), with "
                'precision="bf16" for products in half precision'
            )
