"""From texts straight to what a model makes of them, with the tokenizer that belongs to it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import tasks
from ..errors import InputError
from ..transformer import Encoder
from .families import ENTRY_POINTS


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the checkpoint that a model was loaded from.

    Raises InputError if it was not loaded, and as the tokenizer's entry point if that is no more to be had.
    """
    provenance = getattr(model, "provenance", None)
    if provenance is None:
        raise InputError(f"tokenizer_of: this {type(model).__name__} is of no checkpoint: give a tokenizer")
    return ENTRY_POINTS[model.family.name].tokenizer(provenance.weights)


def embed(model: Encoder, texts: str | Iterable[str], tokenizer: Any = None, **options: Any) -> Tensor:
    """[N, D], a vector for each text, in their order: `embed(accelerate(bertModel("all-MiniLM-L6-v2")), texts)`.

    tokenizer: None: the model's own. Options: see `tasks.embed`.
    """
    return tasks.embed(model, tokenizer_of(model) if tokenizer is None else tokenizer, texts, **options)
