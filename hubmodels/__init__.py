"""BERT and GPT as native PyTorch models with pinned, verified weights. See README.md; start at `hub`."""

__version__ = "0.1.0"

from . import hub
from .conversion import add_tokens, average, convert, diff, interpolate
from .hub import *  # noqa: F403
from .hub.texts import embed, tokenizer_of
from .prepack import accelerate
from .saving import export
from .verification import verify
from .vocabulary import resize_vocabulary

__all__ = [
    *hub.__all__,
    "accelerate",
    "add_tokens",
    "average",
    "convert",
    "diff",
    "embed",
    "export",
    "interpolate",
    "resize_vocabulary",
    "tokenizer_of",
    "verify",
]
