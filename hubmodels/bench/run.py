"""The whole benchmark: models, dtypes, cells, one after the other; what it found as data."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from .. import export
from ..catalog import manifest
from ..compiled import CompiledBlocks
from ..errors import InputError
from ..hub.families import ENTRY_POINTS, family_of
from . import measure
from .measure import ALIKE, Found, Timing, checked, time_in_turn
from .systems import BASE, COMPILED, FLOOR, PEERS, our_runs, peer_runs, products_alone, sorted_buckets
from .workloads import AXES, CELLS, Cell, cells_of, curves

DTYPES = tuple(ALIKE)
DEVICES = ("cpu", "cuda")
_SHORT = 1024  # tokens


class Plan(NamedTuple):
    """What to measure. models: names, of which random weights of that shape are made, or paths. device: cpu or cuda."""

    models: Sequence[str] = ("bert-base-uncased", "gpt2")
    dtypes: Sequence[str] = DTYPES
    cells: Sequence[str] = CELLS
    peers: Sequence[str] = PEERS
    rounds: int = 5
    curves: Sequence[str] = ()  # the axes
    device: str = "cpu"


@torch.inference_mode()
def bench(plan: Plan, tell: Callable[[str], None] = lambda line: None) -> Found:
    """Measure all that the plan names and this machine has. tell: is given a line after each cell.

    Raises InputError for a name that is none.
    """
    for what, names, known in (
        ("dtype", plan.dtypes, DTYPES),
        ("cell", plan.cells, CELLS),
        ("peer", plan.peers, PEERS),
        ("curve", plan.curves, AXES),
    ):
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"{what} {', '.join(unknown)}: expected some of {', '.join(known)}")
    if plan.rounds < 1:
        raise InputError(f"rounds = {plan.rounds}: expected at least 1")
    _check_device(plan.device)
    entries = {name: _entry_of(name) for name in plan.models}
    found = Found([], [])
    for name, entry in entries.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            judge = entry(name, pretrained=name not in manifest(), dtype=torch.float32)
        with tempfile.TemporaryDirectory() as directory:
            export(judge, directory)
            judge.to(plan.device)
            for dtype in plan.dtypes:
                try:
                    contest = _Contest(name, dtype, judge, Path(directory), plan, tell)
                except InputError as error:
                    tell(f"{name}: without {dtype}: {error}")
                    continue
                words, longest = judge.config.vocab_size, judge.config.max_position_embeddings
                for cell in cells_of(plan.cells, words, longest, contest.decodes):
                    found.timings.extend(contest.hold(cell))
                for axis in () if contest.decodes else plan.curves:
                    points = curves(words, longest)[axis]
                    found.curves.extend((axis, x, timing) for x, cell in points for timing in contest.hold(cell))
    return found


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise InputError(f"device {device}: expected one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no GPU here")


def _entry_of(name: str) -> Callable[..., Any]:
    """What makes an encoder, or a language model, of the name or path"""
    entry = ENTRY_POINTS.get(family_of(name))
    if entry is None:
        raise InputError(f"{name}: expected a model of one of {', '.join(ENTRY_POINTS)}, got {family_of(name)}")
    return entry.language_model or entry.model


class _Contest:
    """One model in one dtype, and all who can run it."""

    def __init__(
        self, name: str, dtype: str, judge: Any, directory: Path, plan: Plan, tell: Callable[[str], None]
    ) -> None:
        self.name, self.dtype, self.judge, self.rounds, self.tell = name, dtype, judge, plan.rounds, tell
        self.decodes = hasattr(judge, "generate")
        self.device = plan.device
        self.runs, self.missing = peer_runs(plan.peers, family_of(name), directory, dtype, plan.device)
        if dtype == "int8" and BASE in plan.peers:  # which has none of its own
            theirs, _ = peer_runs([BASE], family_of(name), directory, "float32", plan.device)
            self.runs = {f"{BASE}, float32": run for run in theirs.values()} | self.runs
        self.plain = copy.deepcopy(judge).to(torch.bfloat16) if dtype == "bfloat16" else judge
        ours, self.fast = our_runs(self.plain, dtype, self.decodes)
        self.runs |= ours
        self.peak: float | None = None  # a decoder's limit, and that of a CPU, are other ones
        if plan.device != "cpu" and not self.decodes:
            self.peak = measure.matrix_peak(plan.device, next(self.plain.parameters()).dtype)
        self.base = next((base for base in (BASE, f"{BASE}, float32") if base in self.runs), next(iter(self.runs)))
        for system, why in self.missing.items():
            tell(f"{name}, {dtype}: without {system}: {why}")

    def hold(self, cell: Cell) -> list[Timing]:
        """Everybody in one cell: first checked, then timed, those that passed, in turn."""
        cell, runs = cell.to(self.device), dict(self.runs)
        if cell.name == "ragged":
            runs[f"{self.base}, sorted"] = sorted_buckets(runs[self.base])
        if not cell.new and cell.tokens > CompiledBlocks.most:
            runs.pop(COMPILED, None)  # there it is the accelerated model
        alike, errors = checked(runs, cell, self.judge)
        least = ALIKE[self.dtype][bool(cell.new)]
        for system, likeness in alike.items():
            if not likeness >= least:
                errors[system] = f"its output is not the model's: likeness {likeness:.4f}, expected at least {least}"
        timed: dict[str, Callable[[], Any]] = {
            system: partial(run, cell) for system, run in runs.items() if system not in errors
        }
        if floor := products_alone(self.plain, self.fast, cell, self.decodes):
            timed[FLOOR] = floor
        warm = cell.tokens < _SHORT and not cell.new
        seconds = time_in_turn(timed, self.rounds, warm, self.device)
        timings = []
        for system in (*runs, *self.missing, FLOOR):
            error = errors.get(system) or self.missing.get(system)
            if error or system in seconds:
                own = seconds.get(system, ())
                ratios = tuple(a / b for a, b in zip(seconds.get(self.base, ()), own, strict=False))
                known = (self.name, self.dtype, cell.name, system, cell.tokens)
                timings.append(Timing(*known, own, ratios, alike.get(system), error, self._share(cell, own)))
        shown = ", ".join(f"{t.system} {t.speed:.0f}" for t in timings if t.seconds)
        self.tell(f"{self.name}, {self.dtype}, {cell.name}, tokens/s: {shown}")
        return timings

    def _share(self, cell: Cell, seconds: Sequence[float]) -> float | None:
        """Of the device's matrix peak"""
        if self.peak is None or not seconds:
            return None
        return measure.flops(self.judge, cell) / median(seconds) / self.peak
