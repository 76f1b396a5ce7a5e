"""BERT and GPT as native PyTorch models with pinned, verified weights. See README.md; start at `hub`."""

__version__ = "0.1.0"

from .hub import (
    bertForMaskedLM,
    bertForMultipleChoice,
    bertForNextSentencePrediction,
    bertForPreTraining,
    bertForQuestionAnswering,
    bertForSequenceClassification,
    bertForTokenClassification,
    bertModel,
    bertTokenizer,
    catalog,
)
from .loading import export

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
    "export",
]
