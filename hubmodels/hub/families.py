"""What belongs to each family, for code that is given any checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.config import Family
from ..families import bert, gpt, gpt2
from ..loading import AnyModel, model_type_of
from .bert import bertModel, bertTokenizer
from .gpt import gpt as gptLanguageModel
from .gpt import gptModel, gptTokenizer
from .gpt2 import gpt2 as gpt2LanguageModel
from .gpt2 import gpt2Model, gpt2Tokenizer


class EntryPoints(NamedTuple):
    """classes: of two that fit a checkpoint equally well the first is the likelier. language_model: None in a family
    that has none.
    """

    family: Family
    classes: tuple[type[AnyModel], ...]
    model: Callable[..., Any]
    tokenizer: Callable[..., Any]
    language_model: Callable[..., Any] | None = None


_BERTS = (
    *(bert.BertModel, bert.BertForPreTraining, bert.BertForMaskedLM, bert.BertForNextSentencePrediction),
    *(bert.BertForSequenceClassification, bert.BertForTokenClassification, bert.BertForQuestionAnswering),
    bert.BertForMultipleChoice,
)
_GPTS = gpt.Gpt, gpt.GptDoubleHeads, gpt.GptModel
_GPT2S = gpt2.Gpt2, gpt2.Gpt2Model
ENTRY_POINTS = {
    bert.FAMILY.name: EntryPoints(bert.FAMILY, _BERTS, bertModel, bertTokenizer),
    gpt.FAMILY.name: EntryPoints(gpt.FAMILY, _GPTS, gptModel, gptTokenizer, gptLanguageModel),
    gpt2.FAMILY.name: EntryPoints(gpt2.FAMILY, _GPT2S, gpt2Model, gpt2Tokenizer, gpt2LanguageModel),
}


def family_named(said: str) -> str:
    """The manifest's name for what a config.json calls a family; what it says if that is none of ours."""
    return {each.family.config.MODEL_TYPE: name for name, each in ENTRY_POINTS.items()}.get(said, said)


def family_of(weights: str | Path) -> str:
    """The manifest's name for the family of a checkpoint; what its config.json says if that is none of ours."""
    return family_named(model_type_of(weights))
