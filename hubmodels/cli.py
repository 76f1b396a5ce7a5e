"""The command `hubmodels`: a thin face on the catalog and the tasks."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, hub
from .catalog import lookup
from .errors import HubModelsError, InputError
from .loading import model_type_of


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
    parser = argparse.ArgumentParser(
        prog="hubmodels", description="BERT and GPT in plain PyTorch, with pinned weights."
    )
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
    generate = command("generate", _generate, "Go on from a text, as it comes.")
    _add_generation_arguments(generate)
    score = command("score", _score, "How likely each token of a text is after those before it.")
    perplexity = command("perplexity", _perplexity, "How well a model foresees whole files.")
    perplexity.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    perplexity.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (half the model's positions)"
    )
    for made in (fill, embed, generate, score):
        made.add_argument("texts", nargs="*", metavar="TEXT", help="none: standard input, a text a line")
        made.add_argument("--file", action="append", type=Path, default=[], help="a text a line; may be repeated")
    for made, model in ((fill, "bert"), (embed, "bert"), (generate, "gpt"), (score, "gpt"), (perplexity, "gpt")):
        made.add_argument("--model", default=f"{model}-nano", help=f"weights name or path ({model}-nano)")
    return parser


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to add at most (100)")
    add("--temperature", type=float, metavar="T", help="0: always the likeliest word; more: bolder (0.8; with beams 0)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest words")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest words that together have probability P")
    add("--min-p", type=float, metavar="P", help="draw from words at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less (1)")
    add("--num-beams", type=int, default=1, metavar="N", help="search for the likeliest text with N beginnings (1)")
    add("--length-penalty", type=float, default=1.0, metavar="L", help="of beams; higher: longer (1)")
    add("--samples", type=int, default=1, metavar="N", dest="num_return_sequences", help="texts for each prompt (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    add("--seed", type=int, help="the same seed draws the same words")


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
        head = ("FILE", file.pop("filename"))
        _print_table(head, ((key, str(value)) for key, value in file.items() if value is not None))


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


def _generate(options: argparse.Namespace) -> None:
    from . import tasks
    from .generation import GenerationOptions

    prompts = [""] if options.texts == [""] else _texts(options)  # an empty prompt: the beginning of any text
    model, tokenizer = _language_model(options.model)
    chosen = {key: value for key, value in vars(options).items() if key in GenerationOptions.__dataclass_fields__}
    if options.temperature is None:
        chosen["temperature"] = 0.8 if options.num_beams == 1 else 0.0
    if not options.json and len(prompts) == options.num_beams == options.num_return_sequences == 1:
        pieces = tasks.stream(model, tokenizer, prompts[0], stop=options.stop, **chosen)
        for piece in itertools.chain(prompts, pieces):
            print(piece, end="", flush=True)
        return print()
    found = tasks.generate(model, tokenizer, prompts, stop=options.stop, **chosen)
    if options.json:
        return _print_json([completion._asdict() for completion in found])
    print("\n\n".join(completion.prompt + completion.text for completion in found))


def _score(options: argparse.Namespace) -> None:
    from .tasks import score

    texts = _texts(options)
    model, tokenizer = _language_model(options.model)
    found = score(model, tokenizer, texts)
    if options.json:
        pairs = zip(texts, found, strict=True)
        return _print_json([{"text": text, **each._asdict(), "total": each.total} for text, each in pairs])
    lines = []
    for text, each in zip(texts, found, strict=True):
        lines.append((text, "", f"{each.total:.3f}"))
        tokens = tokenizer.tokens(each.token_ids)
        lines += [("", token, f"{value:.3f}") for token, value in zip(tokens, each.logprobs, strict=True)]
    _print_table(("TEXT", "TOKEN", "LOG-PROBABILITY"), lines, right=(2,))


def _perplexity(options: argparse.Namespace) -> None:
    from .tasks import perplexity

    texts = ["\n".join(_lines(str(path), path.read_bytes)) for path in options.files]
    model, tokenizer = _language_model(options.model)
    found = []
    for path, text in zip(options.files, texts, strict=True):
        try:
            found.append(perplexity(model, tokenizer, text, stride=options.stride))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    if options.json:
        pairs = zip(options.files, found, strict=True)
        return _print_json([{"file": str(path), **each._asdict()} for path, each in pairs])
    lines = [
        (str(path), f"{each.perplexity:.2f}", f"{each.bits_per_byte:.3f}", f"{each.tokens:,}")
        for path, each in zip(options.files, found, strict=True)
    ]
    _print_table(("FILE", "PERPLEXITY", "BITS PER BYTE", "TOKENS"), lines, right=(1, 2, 3))


def _language_model(weights: str) -> tuple[Any, Any]:
    """The language model and the tokenizer of any family that has one."""
    families = {
        "gpt": (hub.gpt, hub.gptTokenizer),
        "openai-gpt": (hub.gpt, hub.gptTokenizer),
        "gpt2": (hub.gpt2, hub.gpt2Tokenizer),
    }
    family = model_type_of(weights)
    if family not in families:
        raise InputError(f"{weights}: expected a language model, gpt or gpt2, got {family}")
    model, tokenizer = families[family]
    return model(weights), tokenizer(weights)


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
