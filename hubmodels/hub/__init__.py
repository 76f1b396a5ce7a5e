"""The entry points of torch.hub, a file per family."""

from .bert import (
    bertForMaskedLM,
    bertForMultipleChoice,
    bertForNextSentencePrediction,
    bertForPreTraining,
    bertForQuestionAnswering,
    bertForSequenceClassification,
    bertForTokenClassification,
    bertModel,
    bertTokenizer,
)
from .catalog import catalog
from .gpt import gpt, gptDoubleHeads, gptModel, gptTokenizer
from .gpt2 import gpt2, gpt2Model, gpt2Tokenizer
from .original import (
    gpt2LMHeadModel,
    openAIGPTDoubleHeadsModel,
    openAIGPTLMHeadModel,
    openAIGPTModel,
    openAIGPTTokenizer,
)

__all__ = [
    "bertForMaskedLM",
    "bertForMultipleChoice",
    "bertForNextSentencePrediction",
    "bertForPreTraining",
    "bertForQuestionAnswering",
    "bertForSequenceClassification",
    "bertForTokenClassification",
    "bertModel",
    "bertTokenizer",
    "catalog",
    "gpt",
    "gpt2",
    "gpt2LMHeadModel",
    "gpt2Model",
    "gpt2Tokenizer",
    "gptDoubleHeads",
    "gptModel",
    "gptTokenizer",
    "openAIGPTDoubleHeadsModel",
    "openAIGPTLMHeadModel",
    "openAIGPTModel",
    "openAIGPTTokenizer",
]
