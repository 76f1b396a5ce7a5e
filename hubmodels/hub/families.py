"""Which entry points belong to a family, for code that is given any checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..families.bert import FAMILY as BERT
from ..families.gpt import FAMILY as GPT
from ..families.gpt2 import FAMILY as GPT2
from ..loading import model_type_of
from .bert import bertModel, bertTokenizer
from .gpt import gpt, gptModel, gptTokenizer
from .gpt2 import gpt2, gpt2Model, gpt2Tokenizer


class EntryPoints(NamedTuple):
    """language_model: None in a family that has none."""

    model: Callable[..., Any]
    tokenizer: Callable[..., Any]
    language_model: Callable[..., Any] | None = None


ENTRY_POINTS = {
    BERT.name: EntryPoints(bertModel, bertTokenizer),
    GPT.name: EntryPoints(gptModel, gptTokenizer, gpt),
    GPT2.name: EntryPoints(gpt2Model, gpt2Tokenizer, gpt2),
}


def family_of(weights: str | Path) -> str:
    """The manifest's name for the family of a checkpoint; what its config.json says if that is none of ours."""
    said = model_type_of(weights)
    return {family.config.MODEL_TYPE: family.name for family in (BERT, GPT, GPT2)}.get(said, said)
