"""Grow or shrink a model's vocabulary: the word table, and the bias of the masked-word head."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .loading import AnyModel

M = TypeVar("M", bound=AnyModel)
_TABLES = ("embeddings.word.weight", "head.bias")  # the parameters with a row for each word, in every family


def read_words(path: Path) -> list[str]:
    """A UTF-8 file's lines, a word each, without blank ones. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected UTF-8 text, a word a line: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def resize_vocabulary(
    model: M, size: int, pieces: Mapping[int, Sequence[int]] | None = None, seed: int | None = None
) -> M:
    """A model with `size` words; old rows are bit-equal, and memory is shared of all that does not change.

    pieces: id -> the old ids that the word is made of: its row is the mean of theirs. Other new rows are the mean of
        all old ones. It may give rows to old ids too, as to those that a table has only to be of a round size.
    seed: add noise to what is made, a tenth of each column's standard deviation; None: none, so that words without
        pieces are all alike. Source: Hewitt 2021, Initializing new word embeddings for pretrained language models.
    Raises InputError for a size below 1, and for ids that are not there.
    """
    state = resized(dict(model.named_parameters()), size, pieces or {}, seed)
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    made = copy.deepcopy(model, shared)  # type: ignore[arg-type]  # the memo: what is not copied
    transformer: Any = getattr(made, "transformer", made)
    transformer.config = dataclasses.replace(model.config, vocab_size=size)
    transformer.embeddings.word.num_embeddings = size
    for name, old in model.named_parameters():
        if name.endswith(_TABLES):
            owner, _, own = name.rpartition(".")
            setattr(made.get_submodule(owner), own, nn.Parameter(state[name].detach(), old.requires_grad))
    if hasattr(model, "provenance"):
        said = f"{model.provenance.weights}, {model.config.vocab_size} words made {size}"
        made.provenance = dataclasses.replace(model.provenance, weights=said)
    return made


def resized(
    tensors: Mapping[str, Tensor], size: int, pieces: Mapping[int, Sequence[int]], seed: int | None
) -> dict[str, Tensor]:
    """As `resize_vocabulary`, of parameters by name."""
    if type(size) is not int or size < 1:
        raise InputError(f"size = {size!r}: expected a whole number of words, at least 1")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return {
        name: _resized(tensors[name], size, pieces, generator) if name.endswith(_TABLES) else tensors[name]
        for name in tensors
    }


def _resized(table: Tensor, size: int, pieces: Mapping[int, Sequence[int]], generator: Any) -> Tensor:
    """[V, D] or [V] -> [size, D] or [size]"""
    words = len(table)
    for word, ids in pieces.items():
        whole = all(type(i) is int for i in (word, *ids))
        if not whole or not 0 <= word < size or not ids or not all(0 <= i < words for i in ids):
            raise InputError(
                f"pieces: {word}: {list(ids)}: expected a word below {size}, made of one or more below {words}"
            )
    made = [*(word for word in pieces if word < words), *range(words, size)]
    if size == words and not made:
        return table
    exact = table.double()
    mean = exact.mean(0)
    rows = [exact[torch.tensor(list(pieces[word]))].mean(0) if word in pieces else mean for word in made]
    grown = torch.cat([table[:size], table.new_empty(max(0, size - words), *table.shape[1:])])
    if made:
        fresh = torch.stack(rows)
        if generator is not None:
            noise = torch.randn(fresh.shape, generator=generator, dtype=fresh.dtype).to(fresh.device)
            fresh += 0.1 * exact.std(0, correction=0) * noise
        grown[torch.tensor(made)] = fresh.to(table.dtype)
    return grown
