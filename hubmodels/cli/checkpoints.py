"""The commands that make one checkpoint of another, or compare two."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import conversion
from ..checkpoint.report import Report
from ..errors import InputError
from ..saving import FORMS, LARGEST_FILE
from ..vocabulary import read_words
from .output import print_json, print_table

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command: makes a parser from a name, the function that runs, and a line of help."""
    converted = command("convert", _convert, "Write a checkpoint of any kind as Hugging Face's or our own files.")
    converted.add_argument("weights", metavar="SRC", help="weights name or path")
    converted.add_argument("directory", type=Path, nargs="?", metavar="DST", help="to be written; not with --dry-run")
    converted.add_argument("--dtype", choices=_DTYPES, help="of the numbers (as they are)")
    converted.add_argument("--dry-run", action="store_true", help="only show what would become of every tensor")
    averaged = command("average", _average, "Write the mean of several checkpoints of one model.")
    averaged.add_argument("weights", nargs="+", metavar="SRC", help="weights names or paths")
    averaged.add_argument("--shares", nargs="+", type=float, metavar="X", help="of each, together 1 (equal)")
    between = command("interpolate", _interpolate, "Write the point between two checkpoints of one model.")
    between.add_argument("one", metavar="A")
    between.add_argument("other", metavar="B")
    between.add_argument("--at", type=float, default=0.5, metavar="T", help="0: A; 1: B; beyond them: further on (0.5)")
    added = command("add-tokens", _add_tokens, "Write a checkpoint with more words in its vocabulary.")
    added.add_argument("weights", metavar="SRC", help="weights name or path")
    added.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="UTF-8, a word a line")
    added.add_argument("--seed", type=int, help="add a little noise to the mean of a word's old pieces (none)")
    for made in (averaged, between, added):
        made.add_argument("-o", "--output", type=Path, required=True, metavar="DST", dest="directory")
    for made in (converted, averaged, between, added):
        made.add_argument("--to", choices=FORMS, default="hf", help="whose names (hf)")
        made.add_argument("--max-file-size", default=LARGEST_FILE, metavar="SIZE", help=f"of weights ({LARGEST_FILE})")
    differing = command("diff", _diff, "What is different between two checkpoints of one family, tensor by tensor.")
    differing.add_argument("one", metavar="A", help="weights name or path; NAME@TAG: as another version has it")
    differing.add_argument("other", metavar="B")
    differing.add_argument("--all", action="store_true", help="show equal tensors too")


def _convert(options: argparse.Namespace) -> int:
    """1 if the account leaves something out, which no checkpoint should make it."""
    if options.dry_run:
        with conversion.opened(options.weights) as found:
            report = found.report
    elif options.directory is None:
        raise InputError("convert: name the directory to write, DST, or give --dry-run")
    else:
        report = conversion.convert(
            options.weights, options.directory, dtype=_DTYPES.get(options.dtype), **_options(options)
        )
    if options.json:
        print_json(_rows(report))
    elif options.dry_run:
        print(report)
    else:
        print(f"{options.directory}: {report.summary}")
    return 0 if report.is_complete else 1


def _average(options: argparse.Namespace) -> None:
    _say(options, conversion.average(options.weights, shares=options.shares, **_written(options)))


def _interpolate(options: argparse.Namespace) -> None:
    _say(options, conversion.interpolate(options.one, options.other, options.at, **_written(options)))


def _add_tokens(options: argparse.Namespace) -> None:
    words = read_words(options.tokens)
    added = conversion.add_tokens(options.weights, words=words, seed=options.seed, **_written(options))
    if options.json:
        return print_json({"directory": str(options.directory), "added": added})
    print(f"{options.directory}: {len(added)} of {len(words)} words added")


def _diff(options: argparse.Namespace) -> int:
    """1 if they differ, as diff has it."""
    found = conversion.diff(options.one, options.other)
    rows = [each for each in found.differences if options.all or not each.is_equal]
    if options.json:
        tensors = [{**each._asdict(), **_finite(largest=each.largest, relative=each.relative)} for each in rows]
        print_json({"equal": found.is_equal, "config": found.config, "tensors": tensors})
        return 0 if found.is_equal else 1
    for field, (a, b) in found.config.items():
        print(f"{field}: {a!r} -> {b!r}")
    shapes = ["" if each.shapes[0] == each.shapes[1] else f"{each.shapes[0]} -> {each.shapes[1]}" for each in rows]
    if rows:
        lines = [(e.name, f"{e.largest:.3g}", f"{e.relative:.3g}", s) for e, s in zip(rows, shapes, strict=True)]
        print_table(("PARAMETER", "LARGEST", "RELATIVE", "SHAPES"), lines, right=(1, 2))
    equal = sum(each.is_equal for each in found.differences)
    print(f"{equal} of {len(found.differences)} parameters are equal")
    return 0 if found.is_equal else 1


def _finite(**numbers: float) -> dict[str, float | None]:
    """JSON has no infinity, which is for shapes that differ, and no nan."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _options(options: argparse.Namespace) -> dict[str, Any]:
    return {"form": options.to, "max_file_size": options.max_file_size}


def _written(options: argparse.Namespace) -> dict[str, Any]:
    return {"directory": options.directory, **_options(options)}


def _say(options: argparse.Namespace, directory: Path) -> None:
    print_json({"directory": str(directory)}) if options.json else print(directory)


def _rows(report: Report) -> dict[str, Any]:
    return {
        "tensors": [entry._asdict() for entry in report.entries],
        "file": {"accounted": report.of_the_file(), "there": report.file},
        "model": {"accounted": report.of_the_model(), "there": report.model},
    }
