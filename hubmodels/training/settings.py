"""How a model is trained: the numbers of a run that are neither data nor model, and what follows from them alone."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError

OPTIMISERS = ("adamw", "google", "muon")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
BUDGETS = ("steps", "tokens", "seconds")


class Spent(NamedTuple):
    """What a run has used so far, over all ranks and all times that it went on: steps, real tokens, seconds."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Exactly one of steps, tokens and seconds is set: the budget, after which a run ends.

    learning_rate: the highest; warmup: steps until it is reached. schedule: what it does from there to the end.
    optimiser: "adamw"; "google", without bias correction, as BERT was published; "muon", for the matrices.
    weight_decay: not of biases and norms. eps: None, the optimiser's own: 1e-8, of "google" 1e-6.
    clip: the greatest norm of a step's gradient; 0: any. precision: of the products; weights are float32.
    ema: decay of an exponential average of the weights, which is then what is evaluated and kept; 0: none.
    compiled: torch.compile each block. sharded: weights, gradients and optimiser are parted among the ranks (FSDP2);
    but for evaluations, when each holds all weights.
    save_every: steps between checkpoints; save_minutes: minutes, as well; 0: steps alone. keep: how many of the last.
    evaluate_every: steps; 0: at the end alone. log_every: steps. seed: of dropout.
    Raises InputError for what cannot be.
    """

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: int = 0
    optimiser: str = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    clip: float = 1.0
    precision: str = "fp32"
    ema: float = 0.0
    compiled: bool = False
    sharded: bool = False
    save_every: int = 1000
    save_minutes: float = 0.0
    keep: int = 2
    evaluate_every: int = 0
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        given = [f"{name} = {getattr(self, name)}" for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"expected one budget, steps, tokens or seconds; got {', '.join(given) or 'none'}")
        for name, allowed in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} = {getattr(self, name)!r}: expected {', '.join(allowed[:-1])} or {allowed[-1]}"
                )
        for name in (self._unit, "learning_rate", "save_every", "keep", "log_every"):
            self._check(name, getattr(self, name), "more than 0", getattr(self, name) > 0)
        for name in ("warmup", "weight_decay", "clip", "save_minutes", "evaluate_every"):
            self._check(name, getattr(self, name), "0 or more", getattr(self, name) >= 0)
        for name, value in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            self._check(name, value, "0 or more, and less than 1", 0 <= value < 1)

    @staticmethod
    def _check(name: str, value: float, expected: str, fits: bool) -> None:
        if not (fits and math.isfinite(value)):
            raise InputError(f"{name} = {value}: expected {expected}")

    @property
    def _unit(self) -> str:
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def budget(self) -> float:
        """In the unit of `of`."""
        return getattr(self, self._unit)

    def of(self, spent: Spent) -> float:
        """How much of the budget is spent: steps, tokens or seconds."""
        return getattr(spent, self._unit)
