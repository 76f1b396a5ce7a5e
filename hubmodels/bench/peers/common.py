"""What the peers share: how they are found, what they cannot do, what they are shown."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...errors import HubModelsError

EncoderRun = Callable[[Tensor, Tensor], Tensor]  # input_ids [B, S], attention_mask [B, S] -> states [B, S, D]
DecoderRun = Callable[[Tensor, int], Tensor]  # input_ids [B, S], n -> the n greedy tokens [B, n]
EncoderBuilder = Callable[..., EncoderRun]  # Path, dtype and, of those that can, the device
DecoderBuilder = Callable[..., DecoderRun]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXTRAS = {"onnxruntime": "onnxruntime onnx"}  # what to install where that is not the package's own name alone


class PeerError(HubModelsError):
    """A peer is not installed, or does not compute in that dtype."""


def need(module: str) -> Any:
    """The module, imported. Raises PeerError."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        wanted = _EXTRAS.get(package, package)
        raise PeerError(f"{package}: cannot be imported: {error}; to compare with it: pip install {wanted}") from error


def check_dtype(peer: str, dtype: str, able: tuple[str, ...], reason: str) -> None:
    """Raise PeerError unless the peer is able to compute in the dtype."""
    if dtype not in able:
        raise PeerError(f"{peer}: dtype = {dtype!r}: expected {' or '.join(able)}: {reason}")


@contextmanager
def quiet() -> Iterator[None]:
    """Nobody needs to read what a library says of its own export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def example(words: int) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask [2, 5]: with padding"""
    ids, mask = torch.arange(10).view(2, 5) % words, torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return ids, mask


def greedy(step: Callable[[Tensor], Tensor], input_ids: Tensor, n: int) -> Tensor:
    """step: new ids [B, S] -> logits of the last [B, V]. Gives [B, n]."""
    ids, found = input_ids.contiguous(), []
    for _ in range(n):
        ids = step(ids).argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, 1)
