"""From texts straight to what a model makes of them, with the tokenizer that belongs to it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import tasks
from ..errors import InputError
from ..loading import find_checkpoint
from ..transformer import Encoder


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the checkpoint that a model was loaded from.

    Raises InputError if it was not loaded or has none beside it, and others if the checkpoint is no more to be had.
    """
    found, provenance = None, getattr(model, "provenance", None)
    if provenance is not None:
        with find_checkpoint(provenance.checkpoint) as checkpoint:
            found = checkpoint.tokenizer(None, True)
    if found is None:
        raise InputError(f"tokenizer_of: this {type(model).__name__} is of no checkpoint with a tokenizer: give one")
    return found


def embed(model: Encoder, texts: str | Iterable[str], tokenizer: Any = None, **options: Any) -> Tensor:
    """[N, D], a vector for each text, in their order: `embed(accelerate(bertModel("all-MiniLM-L6-v2")), texts)`.

    tokenizer: None: the model's own. Options: see `tasks.embed`.
    """
    return tasks.embed(model, tokenizer_of(model) if tokenizer is None else tokenizer, texts, **options)
