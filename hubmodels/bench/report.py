"""Timings as JSON, as Markdown tables, and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import HubModelsError
from .measure import Found, Timing
from .systems import FLOOR


def to_json(machine: dict[str, Any], settings: dict[str, Any], found: Found) -> str:
    """All there is: seconds and ratios of every round."""
    curves = [{"axis": axis, "value": value, **asdict(timing)} for axis, value, timing in found.curves]
    timings = [asdict(timing) for timing in found.timings]
    return json.dumps({"machine": machine, "settings": settings, "timings": timings, "curves": curves}, indent=1) + "\n"


def to_markdown(timings: Sequence[Timing]) -> str:
    """A table for each model and dtype: a row a contestant, a column a cell."""
    tables = []
    for model, dtype in dict.fromkeys((t.model, t.dtype) for t in timings):
        found = {(t.system, t.cell): t for t in timings if (t.model, t.dtype) == (model, dtype)}
        cells = list(dict.fromkeys(cell for _, cell in found))
        systems = list(dict.fromkeys(system for system, _ in found))
        lines = [f"**{model}, {dtype}**", "", f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
        for system in systems:
            if not any(t.seconds for (name, _), t in found.items() if name == system):
                continue
            shown = [_shown(found.get((system, cell))) for cell in cells]
            lines.append(f"| {system} | {' | '.join(shown)} |")
        reasons = dict.fromkeys(f"{t.system}: {' '.join(t.error.split())}" for t in found.values() if t.error)
        tables.append("\n".join([*lines, *([""] if reasons else []), *(f"- {reason}" for reason in reasons)]))
    return "\n\n".join(tables) + "\n"


def _shown(timing: Timing | None) -> str:
    """The base's milliseconds, the others' ratios; of a GPU the share of its matrix peak"""
    if timing is None:
        return ""
    if not timing.seconds:
        return "-"
    ratios, share = timing.ratios, "" if timing.share is None else f", {timing.share:.0%}"
    if not ratios or set(ratios) == {1.0}:
        return f"{1000 * median(timing.seconds):.0f} ms{share}"
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}){share}"


def draw(found: Found, path: Path) -> None:
    """A PNG: for each model and dtype the ratios as bars, then the curves.

    Raises HubModelsError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise HubModelsError(f"{path}: the picture needs matplotlib: pip install matplotlib") from error
    timings, curves = found
    groups = list(dict.fromkeys((t.model, t.dtype) for t in timings if t.ratios))
    axes_of = list(dict.fromkeys((t.model, t.dtype, axis) for axis, _, t in curves if t.seconds))
    count = max(1, len(groups) + len(axes_of))
    figure = Figure(figsize=(8, 3.6 * count), layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for group in groups:
        _bars(axes.pop(0), [t for t in timings if (t.model, t.dtype) == group and t.ratios])
    for model, dtype, axis in axes_of:
        points = [(x, t) for name, x, t in curves if (t.model, t.dtype, name) == (model, dtype, axis) and t.seconds]
        _lines(axes.pop(0), axis, points)
    figure.savefig(path, dpi=110)


def _bars(axes: Any, timings: Sequence[Timing]) -> None:
    cells, systems = (list(dict.fromkeys(getattr(t, of) for t in timings)) for of in ("cell", "system"))
    width = 0.85 / len(systems)
    for number, system in enumerate(systems):
        own = [t for t in timings if t.system == system]
        places = [cells.index(t.cell) + number * width for t in own]
        colour = {"color": "0.8"} if system == FLOOR else {}
        axes.bar(places, [median(t.ratios) for t in own], width, label=system, **colour)
    axes.set_xticks([n + 0.4 for n in range(len(cells))], cells)
    axes.axhline(1.0, color="black", linewidth=0.5)
    base = next((t.system for t in timings if set(t.ratios) == {1.0}), "the first")
    axes.set_ylabel(f"times as fast as {base}")
    axes.set_title(f"{timings[0].model}, {timings[0].dtype}")
    axes.legend(fontsize="x-small", ncols=2)


def _lines(axes: Any, axis: str, points: Sequence[tuple[float, Timing]]) -> None:
    for system in dict.fromkeys(timing.system for _, timing in points):
        own = sorted((x, t.speed) for x, t in points if t.system == system)
        axes.plot([x for x, _ in own], [speed for _, speed in own], marker="o", label=system)
    axes.set_xlabel({"length": "tokens in a row, 8 rows", "batch": "rows", "padding": "share of padding"}[axis])
    axes.set_ylabel("useful tokens a second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{points[0][1].model}, {points[0][1].dtype}")
    axes.legend(fontsize="x-small")
