"""The command that pretrains, from scratch or on; also by the flags of the script that most tutorials use.

Source of those: huggingface/transformers v3.5.1, examples/contrib/legacy/run_language_modeling.py.
"""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .output import print_json

# Their names for what means the same here.
_ALIASES = {
    "out": ("--output_dir",),
    "train": ("--train_data_file", "--train_data_files", "--train_file"),
    "eval": ("--eval_data_file", "--validation_file"),
    "cache": ("--cache_dir",),
    "config": ("--config_name",),
    "weights": ("--model_name_or_path",),
    "tokenizer": ("--tokenizer_name",),
    "epochs": ("--num_train_epochs",),
    "steps": ("--max_steps",),
    "lr": ("--learning_rate",),
    "schedule": ("--lr_scheduler_type",),
    "warmup": ("--warmup_steps",),
    "clip": ("--max_grad_norm",),
    "save_every": ("--save_steps",),
    "keep": ("--save_total_limit",),
    "eval_every": ("--eval_steps",),
    "log_every": ("--logging_steps",),
    "workers": ("--dataloader_num_workers", "--preprocessing_num_workers"),
    "overwrite": ("--overwrite_output_dir",),
}
_GROUPS = {
    "out": "text",
    "config": "model",
    "objective": "what is learned",
    "epochs": "training",
    "save_every": "looking",
}
_NOUNS = {"train": "FILE", "eval": "FILE", "general": "FILE", "length": "N"}


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """command: makes a parser from a name, the function that runs, and a line of help."""
    parser = command("pretrain", _pretrain, "Train a BERT or GPT from scratch, or go on with one, on your text.")
    from ..training.options import CHOICES, Options, flag

    kinds = typing.get_type_hints(Options)
    group: Any = parser
    for field in dataclasses.fields(Options):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
        said: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": field.metadata["help"]}
        kind = _plain(kinds[field.name])
        if kind is bool:
            said["action"] = "store_true"
        elif field.name in CHOICES:
            said["choices"] = CHOICES[field.name]
        elif typing.get_origin(kind) is tuple:
            said |= {"nargs": "+", "metavar": _NOUNS[field.name], "type": _length if field.name == "length" else str}
        else:
            said |= {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind]}
        names = [flag(field.name), *_ALIASES.get(field.name, ())]
        names += [f"--{field.name}"] if "_" in field.name else []
        group.add_argument(*names, required=field.name in ("out", "train"), **said)
    _add_others(parser)


def _plain(kind: Any) -> Any:
    """`int | None` -> int"""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(kind) if each is not type(None))
    return kind


def _length(said: str) -> tuple[int, float]:
    """128 or 128:0.9"""
    length, _, share = said.partition(":")
    return int(length), float(share or 1)


def _add_others(parser: argparse.ArgumentParser) -> None:
    """Flags of the old script that say something in another way."""
    add = parser.add_argument_group("as the scripts of tutorials say it").add_argument
    alias: dict[str, Any] = {"action": "store_const", "default": argparse.SUPPRESS}
    add("--line-by-line", "--line_by_line", **alias, const="lines", dest="form", help="--form lines")
    add("--mlm", action="store_true", help="--nsp none, if --nsp says nothing: the script had no pairs")
    add("--block-size", "--block_size", "--max_seq_length", type=int, metavar="N", help="--length N")
    each = ("--per-device-train-batch-size", "--per_device_train_batch_size", "--per_gpu_train_batch_size")
    add(*each, type=int, metavar="N", help="rows that a rank takes at once")
    steps = ("--gradient-accumulation-steps", "--gradient_accumulation_steps")
    add(*steps, type=int, default=1, metavar="N", help="of those in a step")
    add("--fp16", **alias, const="fp16", dest="precision", help="--precision fp16")
    add("--bf16", **alias, const="bf16", dest="precision", help="--precision bf16")
    add("--model-type", "--model_type", metavar="NAME", help="checked: it is what the model says")
    for name in ("do_train", "do_eval", "evaluate_during_training", "should_continue"):
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)  # what is done follows from the texts
    for name in ("per_device_eval_batch_size", "per_gpu_eval_batch_size", "logging_dir"):
        add(f"--{name}", help=argparse.SUPPRESS)  # figures do not depend on it; the log lies in --out


def _pretrain(options: argparse.Namespace) -> None:
    from ..training.allocator import keep_freed_memory
    from ..training.distributed import world_size
    from ..training.options import Options
    from ..training.run import pretrain

    given = vars(options)
    known = {field.name for field in dataclasses.fields(Options)}
    said: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in known
    }
    if options.block_size:
        said["length"] = ((options.block_size, 1.0),)
    if options.mlm:
        said = {"objective": "mlm", "nsp": "none", **said}
    if rows := options.per_device_train_batch_size:
        if "batch_size" in said:
            raise InputError("expected --batch-size or --per-device-train-batch-size, got both")
        length = max(length for length, _ in said.get("length", Options.length))
        said["batch_size"] = rows * options.gradient_accumulation_steps * world_size()
        said.setdefault("micro_tokens", rows * length)
    elif options.gradient_accumulation_steps != 1:
        raise InputError(
            "--gradient-accumulation-steps: it needs --per-device-train-batch-size; or give --micro-tokens"
        )
    keep_freed_memory()  # the process is ours
    made = Options(**said)
    _check_model_type(options.model_type, made)
    figures = pretrain(
        made,
        lambda line: print(line, file=sys.stderr, flush=True),
        progress=sys.stderr.isatty() and not options.json,
        command=["hubmodels", *sys.argv[1:]],
    )
    if options.json and os.environ.get("RANK", "0") == "0":  # of those that torchrun started, one
        print_json(figures)


def _check_model_type(said: str | None, options: Any) -> None:
    from ..hub.families import family_named
    from ..training.material import family_in

    if said is not None and family_named(said) != (found := family_in(options)):
        raise InputError(f"--model-type {said}: the model is a {found}")
