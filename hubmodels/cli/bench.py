"""The command that measures inference on this machine."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..bench import measure, report, run
from ..errors import HubModelsError, InputError

PLOT, TABLE, DATA = "bench.png", "bench.md", "bench.json"


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command: makes a parser from a name, the function that runs, and a line of help."""
    add = command("bench", _bench, "How fast models are here, beside other libraries that are installed.").add_argument
    plan = run.Plan()
    add("--models", nargs="+", default=plan.models, metavar="NAME", help=f"names or paths ({' '.join(plan.models)})")
    add("--dtypes", nargs="+", default=plan.dtypes, choices=run.DTYPES, metavar="DTYPE", help=" ".join(run.DTYPES))
    add("--cells", nargs="+", default=plan.cells, choices=plan.cells, metavar="CELL", help=" ".join(plan.cells))
    add("--peers", nargs="*", default=plan.peers, choices=plan.peers, metavar="PEER", help=", ".join(plan.peers))
    add("--rounds", type=int, default=plan.rounds, metavar="N", help=f"of each cell ({plan.rounds})")
    add("--threads", type=int, metavar="N", help="of every contestant (torch's own number)")
    add("--device", default=plan.device, choices=run.DEVICES, help=f"{' or '.join(run.DEVICES)} ({plan.device})")
    add("--curves", nargs="*", choices=run.AXES, metavar="AXIS", help=f"also tokens/s against {', '.join(run.AXES)}")
    add("--output", type=Path, metavar="DIR", help=f"write {DATA}, {TABLE} and {PLOT} there")


def _bench(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    axes = () if options.curves is None else options.curves or run.AXES
    plan = run.Plan(options.models, options.dtypes, options.cells, options.peers, options.rounds, axes, options.device)
    found = run.bench(plan, lambda line: print(line, file=sys.stderr, flush=True))
    settings = {**plan._asdict(), "command": "hubmodels bench"}
    data, table = report.to_json(measure.machine(plan.device), settings, found), report.to_markdown(found.timings)
    print(data if options.json else table, end="")
    if options.output is None:
        return
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / DATA).write_text(data, encoding="utf-8")
        (options.output / TABLE).write_text(table, encoding="utf-8")
        report.draw(found, options.output / PLOT)
    except OSError as error:
        raise HubModelsError(f"{options.output}: cannot be written: {error}") from None
