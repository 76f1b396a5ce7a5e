"""What torch.hub.help shows: it prints an entry point's docstring and nothing else, so everything goes in there."""

import inspect
from collections.abc import Callable
from typing import TypeVar

from ..catalog import Record, manifest

F = TypeVar("F", bound=Callable)

_OPTIONS = """
    weights      a name of the table below, or the path of a local checkpoint: a directory with config.json and
                 model.safetensors or pytorch_model.bin, or such a file. A name wins over a path; ./name is a path.
    pretrained   True; False gives the same architecture with new parameters
    device       where the parameters go; the CPU if not given
    dtype        of the parameters; torch.float32 if not given
    progress     True: a bar while downloading
    cache_dir    another Hugging Face cache directory
    num_labels   width of a classifier; what the checkpoint's config says, or 2, if not given
    head_seed    start the head anew from this seed, even if the checkpoint has one
    hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout, hidden_act, layer_norm_eps,
                 initializer_range: instead of the checkpoint's

The model comes in eval mode. `model.provenance` says which bytes were loaded and what became of every tensor.
"""


def megabytes(record: Record) -> float:
    return record.weights.size / 1e6


def help_page(family: str, signature: str, options: bool = True) -> Callable[[F], F]:
    """Complete a docstring of example and explanation with the signature, the options and the table of weights."""

    def complete(function: F) -> F:
        rows = [r for r in manifest().values() if r.family == family]
        table = "\n".join(f"    {r.name:<30}{megabytes(r):>8.0f} MB   {r.licence}" for r in rows)
        text = f"{function.__name__}{signature}\n\n{inspect.cleandoc(function.__doc__ or '')}\n"
        function.__doc__ = f"{text}{_OPTIONS if options else ''}\nWeights, size and licence:\n{table}\n"
        return function

    return complete
