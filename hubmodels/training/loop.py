"""The loop of pretraining: steps, evaluations and checkpoints until a budget is spent; stopped anywhere, it goes on."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import HubModelsError, InputError
from . import checkpoints
from .batches import STOPS, Batches, MicroBatch
from .distributed import World
from .engine import Engine
from .optimisers import learning_rate
from .settings import Settings, Spent


class Phase(NamedTuple):
    """Batches, and for which share of the run's budget."""

    batches: Batches
    share: float = 1.0


class Progress(NamedTuple):
    """How far a run is. step, tokens, seconds: over all times that it went on. fraction: of the budget.

    epoch: of its phase. losses: the mean of each since the last Progress, over all ranks, in nats; loss: their sum.
    rate: the learning rate; norm: of the gradient, before it is clipped. tokens_per_second: since the last Progress,
    without evaluations and checkpoints. skipped: steps that overflowed in fp16 and moved nothing. notes: what a person
    should know, such as that a damaged checkpoint was passed over.
    """

    step: int
    epoch: int
    phase: int
    fraction: float
    tokens: int
    seconds: float
    losses: dict[str, float]
    loss: float
    rate: float
    norm: float
    tokens_per_second: float
    skipped: int = 0
    notes: tuple[str, ...] = ()


class Interrupted(HubModelsError):
    """A run was asked to stop (SIGINT, SIGTERM), has saved, and can go on."""


def fit(
    model: nn.Module,
    phases: Sequence[Phase],
    settings: Settings,
    directory: Path,
    *,
    world: World,
    facts: Mapping[str, Any],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    observe: Callable[[Progress], None] = lambda progress: None,
    observe_evaluation: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Progress:
    """Train `model` until the budget is spent, from the newest checkpoint in `directory`/checkpoints on, if any.

    phases: one after another; their batches are those of this rank.
    facts: what a run that goes on must agree on, JSON.
    evaluate: called on every rank with `model`, in eval mode, with the weights that count so far; its "loss", of rank
        0, decides which checkpoint is best. observe, observe_evaluation: called on rank 0.
    Returns the Progress of the end; `model` then has the last weights, or their average, in eval mode, on every rank.
    Raises InputError for what does not fit, among it facts that differ, which are listed; CheckpointError if none can
    be read or written; HubModelsError for a loss that is no number; Interrupted.
    """
    if not math.isclose(sum(phase.share for phase in phases), 1.0, abs_tol=1e-6):
        raise InputError(f"phases: expected shares that are 1 together, got {[phase.share for phase in phases]}")
    home = directory / "checkpoints"
    with checkpoints.locked(home, world), closing(Engine(model, settings, world)) as engine, _signals() as asked:
        run = _Run(engine, phases, home, facts, observe)
        for batches in run.steps():
            run.step(batches, asked)
            if run.is_ending or run.is_due(settings.log_every):
                run.look()
            is_best = False
            if evaluate is not None and (run.is_over or run.is_due(settings.evaluate_every)):
                figures = run.examine(evaluate)
                is_best = run.is_best(figures)
                if world.is_main:
                    observe_evaluation(run.state.spent.steps, figures)
            if run.is_ending or is_best or run.is_due(settings.save_every) or run.is_time():
                run.save()
            if run.is_ending and not run.is_over:
                raise Interrupted(
                    f"stopped by {asked[0] if asked else 'another rank'} after step {run.state.spent.steps}, which is "
                    f"saved in {home}; the same call goes on from there"
                )
        engine.show()
        return run.progress


@dataclass
class _State:
    """Where a run stands: what a checkpoint holds beside tensors and facts, as JSON.

    begin: the step of the epoch that comes next. warm: what was spent when the warm-up ended. best: step and loss.
    losses, counts, busy_tokens, busy_seconds: sums since the last Progress; progress: that one.
    """

    spent: Spent = field(default_factory=Spent)
    warm: Spent = field(default_factory=Spent)
    phase: int = 0
    epoch: int = 0
    begin: int = 0
    best: tuple[int, float] | None = None
    skipped: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    busy_tokens: int = 0
    busy_seconds: float = 0.0
    progress: dict[str, Any] | None = None

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> "_State":
        return cls(**{**saved, "spent": Spent(*saved["spent"]), "warm": Spent(*saved["warm"])})


class _Run:
    """A run on one rank. All ranks decide alike: what they decide by is summed over all of them."""

    def __init__(
        self,
        engine: Engine,
        phases: Sequence[Phase],
        home: Path,
        facts: Mapping[str, Any],
        observe: Callable[[Progress], None],
    ):
        self.engine, self.phases, self.home, self.observe = engine, phases, home, observe
        self.settings, self.world = engine.settings, engine.world
        own = {"seed": self.settings.seed, "optimiser": self.settings.optimiser, "ema": self.settings.ema > 0}
        self.facts = json.loads(json.dumps({**own, **facts}))
        self.state = _State()
        self.notes: tuple[str, ...] = ()
        self.rate = self.norm = math.nan
        self.is_asked = False
        if found := checkpoints.newest(home, self.world):
            self._resume(found)
        self.saved = self.state.spent.seconds
        self.begun = time.monotonic() - self.saved
        self.mark = time.monotonic()

    def _resume(self, found: checkpoints.Found) -> None:
        saved = found.about["facts"]
        if saved != self.facts:
            names = sorted(name for name in {*saved, *self.facts} if saved.get(name) != self.facts.get(name))
            listed = "; ".join(f"{n} was {saved.get(n)!r}, is {self.facts.get(n)!r}" for n in names)
            raise InputError(f"{found.path} is of another run: {listed}; go on as it began, or take another directory")
        checkpoints.load(found.path, self.engine.tensors(), self.world)
        if found.about["scaler"]:
            self.engine.scaler.load_state_dict(found.about["scaler"])
        self.state, self.notes = _State.of_json(found.about["state"]), found.passed_over

    @property
    def fraction(self) -> float:
        """Of the budget that is spent"""
        return self.settings.of(self.state.spent) / self.settings.budget

    @property
    def is_over(self) -> bool:
        return self.fraction >= 1

    @property
    def is_ending(self) -> bool:
        return self.is_over or self.is_asked

    @property
    def progress(self) -> Progress:
        """The last one that was said, or, if none ever was, one of now."""
        said = self.state.progress
        return self._now() if said is None else Progress(**{**said, "notes": self.notes})

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps is done now."""
        return every > 0 and self.state.spent.steps % every == 0

    def is_time(self) -> bool:
        """Whether a checkpoint is due by the clock."""
        minutes = self.settings.save_minutes
        return minutes > 0 and self.state.spent.seconds - self.saved >= 60 * minutes

    def steps(self) -> Iterator[list[MicroBatch]]:
        """The batches of each step from here on. The place in the state is already that after the step."""
        state = self.state
        while not self.is_over:
            phase = self._phase()
            if phase != state.phase:
                state.phase, state.epoch, state.begin = phase, 0, 0
            for batches in self.phases[phase].batches.epoch(state.epoch, state.begin):
                state.begin += 1
                yield batches
                if self.is_over or self._phase() != phase:
                    break
            else:
                if state.begin == 0:
                    raise InputError(f"phase {phase}: there is not one step in epoch {state.epoch}")
                state.epoch, state.begin = state.epoch + 1, 0

    def _phase(self) -> int:
        end = 0.0
        for number, phase in enumerate(self.phases[:-1]):
            end += phase.share
            if self.fraction < end - 1e-9:
                return number
        return len(self.phases) - 1

    def step(self, batches: Sequence[MicroBatch], asked: Sequence[str]) -> None:
        """One update, and what it took. asked: whatever asks this rank to stop."""
        state, world = self.state, self.world
        counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
        totals = world.sum(counts)
        sums = self.engine.backward(state.spent.steps, batches, totals)
        spent = {
            "tokens": sum(batch.tokens for batch in batches),
            "seconds": time.monotonic() - self.begun if world.is_main else 0,
            "stop": bool(asked),
        }
        told = world.sum({**{f"loss {name}": loss for name, loss in sums.items()}, **spent})
        self._update({name: told[f"loss {name}"] for name in sums}, totals)
        state.spent = Spent(state.spent.steps + 1, state.spent.tokens + int(told["tokens"]), told["seconds"])
        if state.spent.steps <= self.settings.warmup:
            state.warm = state.spent
        self.is_asked = told["stop"] > 0
        state.busy_tokens += int(told["tokens"])
        now = time.monotonic()
        state.busy_seconds, self.mark = state.busy_seconds + now - self.mark, now

    def _update(self, losses: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Move the weights and take note of the losses, sums over `counts`; of numbers that are none, do neither."""
        state, halved = self.state, self.settings.precision == "fp16"
        self.rate = learning_rate(self.settings, state.spent, state.warm)
        is_finite = all(map(math.isfinite, losses.values()))
        self.norm = self.engine.update(self.rate) if is_finite or halved else math.nan
        if math.isfinite(self.norm):
            for name, loss in losses.items():
                state.losses[name] = state.losses.get(name, 0.0) + loss
                state.counts[name] = state.counts.get(name, 0.0) + counts[name]
        elif halved and self.engine.scaler.get_scale() >= 1:
            state.skipped += 1
        else:
            told = ", ".join(f"{name} {loss / max(1, counts[name]):.4g}" for name, loss in losses.items())
            raise HubModelsError(
                f"step {state.spent.steps + 1}: the loss ({told}) or its gradient ({self.norm:.4g}) is not a finite "
                f"number; no weight was moved, and the checkpoints in {self.home} are as they were. A lower learning "
                'rate, a longer warm-up, clip=1.0 or precision="fp32" may help'
            )

    def look(self) -> None:
        """Say how far the run is."""
        state, now = self.state, self._now()
        state.progress = now._replace(notes=())._asdict()
        state.losses, state.counts, state.busy_tokens, state.busy_seconds = {}, {}, 0, 0.0
        self.notes = ()
        if self.world.is_main:
            self.observe(now)

    def _now(self) -> Progress:
        state = self.state
        losses = {name: state.losses[name] / count for name, count in state.counts.items() if count}
        return Progress(
            *(state.spent.steps, state.epoch, state.phase, self.fraction, state.spent.tokens, state.spent.seconds),
            losses=losses,
            loss=math.fsum(losses.values()) if losses else math.nan,
            rate=self.rate,
            norm=self.norm,
            tokens_per_second=state.busy_tokens / max(state.busy_seconds, 1e-9),
            skipped=state.skipped,
            notes=self.notes,
        )

    def examine(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        """What `evaluate` finds with the weights that count so far: rank 0's figures, on all."""
        with self.engine.shown() as model:
            figures = self.world.broadcast(evaluate(model))
        self.mark = time.monotonic()
        return figures

    def is_best(self, figures: Mapping[str, float]) -> bool:
        """Whether the loss is the lowest so far; if so it is kept in mind."""
        loss, best = figures["loss"], self.state.best
        if not math.isfinite(loss) or (best is not None and loss >= best[1]):
            return False
        self.state.best = (self.state.spent.steps, loss)
        return True

    def save(self) -> None:
        """A checkpoint, and no more of the older ones than are to be kept."""
        state, step = self.state, self.state.spent.steps
        about = {
            "facts": self.facts,
            "state": dataclasses.asdict(state),
            "scaler": self.engine.scaler.state_dict(),
        }
        checkpoints.save(self.home, step, self.engine.tensors(), about, self.world)
        if self.world.is_main:
            checkpoints.prune(self.home, step, self.settings.keep, state.best[0] if state.best else None)
        self.saved, self.mark = state.spent.seconds, time.monotonic()


@contextmanager
def _signals() -> Iterator[list[str]]:
    """What asks the run to stop while it is in the block. The second time a signal does what it always did."""
    asked: list[str] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in map(int, STOPS):
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
