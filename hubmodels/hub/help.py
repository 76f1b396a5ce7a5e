"""What torch.hub.help shows: it prints an entry point's docstring and nothing else, so everything goes in there."""

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import TypeVar

from ..catalog import manifest
from ..checkpoint.config import Family

F = TypeVar("F", bound=Callable)

_OPTIONS = {
    "weights": "a name of the table below, or the path of a local checkpoint: a directory with config.json and "
    "model.safetensors or pytorch_model.bin, or such a file. A name wins over a path; ./name is a path.",
    "pretrained": "True; False gives the same architecture with new parameters",
    "device": "where the parameters go; the CPU if not given",
    "dtype": "of the parameters; torch.float32 if not given",
    "progress": "True: a bar while downloading",
    "cache_dir": "another cache directory",
    "num_labels": "width of a classifier; what the checkpoint's config says, or 2, if not given",
    "head_seed": "start the head anew from this seed, even if the checkpoint has one",
}
_PROMISE = (
    "The model comes in eval mode. `model.provenance` says which bytes were loaded and what became of every tensor."
)


TOKENIZER = "(weights, *, progress=True, cache_dir=None)"


def signature(*more: str) -> str:
    """Of a model's entry point with these options besides those that all have."""
    options = ("pretrained=True", "device=None", "dtype=None", "progress=True", "cache_dir=None")
    return f"(weights, *, {', '.join([*options, *(f'{name}=None' for name in more)])}, **config)"


def help_page(family: Family, signature: str) -> Callable[[F], F]:
    """Complete a docstring of example and explanation with the signature, the options and the table of weights."""

    def complete(function: F) -> F:
        rows = [r for r in manifest().values() if r.family == family.name]
        table = "\n".join(f"    {r.name:<30}{r.megabytes:>8.0f} MB   {r.licence}" for r in rows)
        text = f"{function.__name__}{signature}\n\n{inspect.cleandoc(function.__doc__ or '')}\n"
        explained = "" if signature == TOKENIZER else f"\n{_explained(family, signature)}\n\n{_PROMISE}\n"
        function.__doc__ = f"{text}{explained}\nWeights, size and licence:\n{table}\n"
        return function

    return complete


@functools.cache  # many pages have the same
def _explained(family: Family, signature: str) -> str:
    """A paragraph for each option of the signature, and one for those of the family's config."""
    fill = functools.partial(textwrap.fill, initial_indent=" " * 4, subsequent_indent=" " * 17, width=120)
    lines = [
        fill(f"{name:<13}{text}") for name, text in _OPTIONS.items() if name == "weights" or f" {name}=" in signature
    ]
    adjustable = f"{', '.join(family.config.ADJUSTABLE)}: instead of the checkpoint's"
    return "\n".join([*lines, fill(adjustable)])
