"""BERT and GPT as native PyTorch models with pinned, verified weights. See README.md; start at `hub`."""

__version__ = "0.1.0"

from . import hub
from .hub import *  # noqa: F403
from .loading import export
from .prepack import accelerate
from .verification import verify

__all__ = [*hub.__all__, "accelerate", "export", "verify"]
