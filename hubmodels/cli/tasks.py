"""The commands that ask something of a model."""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import hub, tasks
from ..errors import InputError
from ..generation import GenerationOptions
from ..hub.families import ENTRY_POINTS, family_of
from .output import print_json, print_table


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command: makes a parser from a name, the function that runs, and a line of help."""
    filled = command("fill-mask", _fill_mask, "The likeliest words for each [MASK].")
    filled.add_argument("--top-k", type=int, default=5, metavar="K", help="words for each mask (5)")
    embedded = command("embed", _embed, "A vector for each text.")
    embedded.add_argument("--pooling", default="mean", help="mean (default), first or pooler")
    embedded.add_argument(
        "--overlap", type=int, metavar="N", help="read long texts in windows that share N tokens (cut)"
    )
    generated = command("generate", _generate, "Go on from a text, as it comes.")
    _add_generation_arguments(generated)
    scored = command("score", _score, "How likely each token of a text is after those before it.")
    measured = command("perplexity", _perplexity, "How well a model foresees whole files.")
    measured.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    measured.add_argument("--stride", type=int, metavar="N", help="tokens between windows (half the model's positions)")
    for made in (filled, embedded, generated, scored):
        made.add_argument("texts", nargs="*", metavar="TEXT", help="none: standard input, a text a line")
        made.add_argument("--file", action="append", type=Path, default=[], help="a text a line; may be repeated")
    berts, gpts = (filled, embedded), (generated, scored, measured)
    for made, model in [*((made, "bert-nano") for made in berts), *((made, "gpt-nano") for made in gpts)]:
        made.add_argument("--model", default=model, help=f"weights name or path ({model})")


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


def _fill_mask(options: argparse.Namespace) -> None:
    texts = _texts(options)
    model, tokenizer = hub.bertForMaskedLM(options.model), hub.bertTokenizer(options.model)
    results = tasks.fill_mask(model, tokenizer, texts, options.top_k)
    if options.json:
        pairs = zip(texts, results, strict=True)
        return print_json([{"text": t, "masks": [[g._asdict() for g in m] for m in masks]} for t, masks in pairs])
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
    print_table(("TEXT", "MASK", "WORD", "PROBABILITY"), lines, right=(1, 3))


def _embed(options: argparse.Namespace) -> None:
    texts = _texts(options)
    model, tokenizer = hub.bertModel(options.model), hub.bertTokenizer(options.model)
    shown = sys.stderr.isatty()
    vectors = tasks.embed(model, tokenizer, texts, pooling=options.pooling, overlap=options.overlap, progress=shown)
    if options.json:
        pairs = zip(texts, vectors.tolist(), strict=True)
        return print_json([{"text": text, "vector": vector} for text, vector in pairs])
    cosines = (vectors @ vectors[0]).tolist()
    beginnings = (" ".join(f"{x:7.4f}" for x in vector[:4]) + " …" for vector in vectors.tolist())
    lines = [(t, b, f"{c:.3f}") for t, b, c in zip(texts, beginnings, cosines, strict=True)]
    print_table(("TEXT", f"VECTOR ({vectors.shape[1]} numbers)", "COSINE TO FIRST"), lines, right=(2,))


def _generate(options: argparse.Namespace) -> None:
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
        return print_json([completion._asdict() for completion in found])
    print("\n\n".join(completion.prompt + completion.text for completion in found))


def _score(options: argparse.Namespace) -> None:
    texts = _texts(options)
    model, tokenizer = _language_model(options.model)
    found = tasks.score(model, tokenizer, texts)
    if options.json:
        pairs = zip(texts, found, strict=True)
        return print_json([{"text": text, **each._asdict(), "total": each.total} for text, each in pairs])
    lines = []
    for text, each in zip(texts, found, strict=True):
        lines.append((text, "", f"{each.total:.3f}"))
        tokens = tokenizer.tokens(each.token_ids)
        lines += [("", token, f"{value:.3f}") for token, value in zip(tokens, each.logprobs, strict=True)]
    print_table(("TEXT", "TOKEN", "LOG-PROBABILITY"), lines, right=(2,))


def _perplexity(options: argparse.Namespace) -> None:
    texts = ["\n".join(_lines(str(path), path.read_bytes)) for path in options.files]
    model, tokenizer = _language_model(options.model)
    found = []
    for path, text in zip(options.files, texts, strict=True):
        try:
            found.append(tasks.perplexity(model, tokenizer, text, stride=options.stride))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    if options.json:
        pairs = zip(options.files, found, strict=True)
        return print_json([{"file": str(path), **each._asdict()} for path, each in pairs])
    lines = [
        (str(path), f"{each.perplexity:.2f}", f"{each.bits_per_byte:.3f}", f"{each.tokens:,}")
        for path, each in zip(options.files, found, strict=True)
    ]
    print_table(("FILE", "PERPLEXITY", "BITS PER BYTE", "TOKENS"), lines, right=(1, 2, 3))


def _language_model(weights: str) -> tuple[Any, Any]:
    """The language model and the tokenizer of any family that has one."""
    family = family_of(weights)
    entry = ENTRY_POINTS.get(family)
    if entry is None or entry.language_model is None:
        known = " or ".join(name for name, entry in ENTRY_POINTS.items() if entry.language_model)
        raise InputError(f"{weights}: expected a language model, {known}, got {family}")
    return entry.language_model(weights), entry.tokenizer(weights)


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
