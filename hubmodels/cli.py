"""The command `hubmodels`: a thin face on the catalog and the tasks."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, hub
from .catalog import lookup
from .errors import HubModelsError, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, or 2 for an error that is the user's to mend."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except HubModelsError as error:
        print(f"hubmodels: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hubmodels", description="BERT in plain PyTorch, with pinned weights.")
    parser.add_argument("--version", action="version", version=f"hubmodels {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.add_argument("--json", action="store_true", help="for machines")
        made.set_defaults(run=run)
        return made

    command("list", _list, "Every weights name.")
    command("show", _show, "What is known of one checkpoint.").add_argument("name", metavar="NAME")
    fill = command("fill-mask", _fill_mask, "The likeliest words for each [MASK].")
    fill.add_argument("--top-k", type=int, default=5, metavar="K", help="words for each mask (5)")
    embed = command("embed", _embed, "A vector for each text.")
    embed.add_argument("--pooling", default="mean", help="mean (default), first or pooler")
    for made in (fill, embed):
        made.add_argument("texts", nargs="*", metavar="TEXT", help="none: standard input, a text a line")
        made.add_argument("--file", action="append", type=Path, default=[], help="a text a line; may be repeated")
        made.add_argument("--model", default="bert-nano", help="weights name or path (bert-nano)")
    return parser


def _list(options: argparse.Namespace) -> None:
    rows = hub.catalog()
    if options.json:
        return _print_json(rows)
    lines = [(r["name"], r["family"], f"{r['parameters']:,}", f"{r['megabytes']:.1f}", r["licence"]) for r in rows]
    _print_table(("NAME", "FAMILY", "PARAMETERS", "MB", "LICENCE"), lines, right=(2, 3))


def _show(options: argparse.Namespace) -> None:
    record = lookup(options.name)
    files = [{**vars(file)} for file in record.files]
    if options.json:
        return _print_json({**vars(record), "files": files})
    facts = {
        "name": record.name,
        "family": record.family,
        "parameters": f"{record.parameters:,}",
        "licence": record.licence,
        "homepage": record.homepage,
        "citation": record.citation,
        "notes": record.notes or "none",
        "check": record.check.get("source") or f"none: {record.check.get('none')}",
    }
    _print_table(("FACT", ""), facts.items())
    print()
    _print_table(("CONFIG", ""), ((key, str(value)) for key, value in record.config.items()))
    for file in files:
        print()
        _print_table(("FILE", file.pop("filename")), ((key, str(value)) for key, value in file.items()))


def _fill_mask(options: argparse.Namespace) -> None:
    from .tasks import fill_mask

    texts = _texts(options)
    model, tokenizer = hub.bertForMaskedLM(options.model), hub.bertTokenizer(options.model)
    results = fill_mask(model, tokenizer, texts, options.top_k)
    if options.json:
        pairs = zip(texts, results, strict=True)
        return _print_json([{"text": t, "masks": [[g._asdict() for g in m] for m in masks]} for t, masks in pairs])
    lines = [
        (
            text if rank == number == 0 else "",
            str(number + 1) if rank == 0 else "",
            guess.token,
            f"{guess.probability:.3f}",
        )
        for text, masks in zip(texts, results, strict=True)
        for number, guesses in enumerate(masks)
        for rank, guess in enumerate(guesses)
    ]
    _print_table(("TEXT", "MASK", "WORD", "PROBABILITY"), lines, right=(1, 3))


def _embed(options: argparse.Namespace) -> None:
    from .tasks import embed

    texts = _texts(options)
    model, tokenizer = hub.bertModel(options.model), hub.bertTokenizer(options.model)
    vectors = embed(model, tokenizer, texts, pooling=options.pooling)
    if options.json:
        pairs = zip(texts, vectors.tolist(), strict=True)
        return _print_json([{"text": text, "vector": vector} for text, vector in pairs])
    cosines = (vectors @ vectors[0]).tolist()
    beginnings = (" ".join(f"{x:7.4f}" for x in vector[:4]) + " …" for vector in vectors.tolist())
    lines = [(t, b, f"{c:.3f}") for t, b, c in zip(texts, beginnings, cosines, strict=True)]
    _print_table(("TEXT", f"VECTOR ({vectors.shape[1]} numbers)", "COSINE TO FIRST"), lines, right=(2,))


def _texts(options: argparse.Namespace) -> list[str]:
    texts = list(options.texts)
    for path in options.file:
        texts += _lines(str(path), path.read_bytes)
    if not texts and not options.file:
        if sys.stdin.isatty():
            raise InputError("no text: give it as an argument, with --file, or on standard input")
        texts = _lines("standard input", sys.stdin.buffer.read)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError("no text: what was given is empty")
    return texts


def _lines(name: str, read: Callable[[], bytes]) -> list[str]:
    try:
        return read().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as UTF-8 text: {error}") from None


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=1))


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell; long cells are not cut, so that what is shown can be copied."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())
