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
]
