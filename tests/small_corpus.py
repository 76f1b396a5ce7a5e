"""A corpus whose tokens are numbered through, so that an id says where it stood; a vocabulary that has them; chance."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubmodels.tokenizers import SPECIAL, WordPieceTokenizer

FIRST_ID = len(SPECIAL)
VOCABULARY = 20_000


@dataclass(frozen=True)
class SmallCorpus:
    """What the samples know of `hubmodels.training.corpus.Corpus`."""

    ids: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    directory: Path
    about: dict[str, Any] = field(default_factory=lambda: {"digest": "small"})

    def tokens(self, first: int, end: int) -> np.ndarray:
        return self.ids[self.sentences[first] : self.sentences[end]]

    def document_of(self, token: int) -> int:
        """Of a token, by its id"""
        borders = self.sentences[self.documents]
        return int(borders.searchsorted(token - FIRST_ID, "right")) - 1


def numbered(documents: Sequence[Sequence[int]], directory: Path) -> SmallCorpus:
    """The tokens of each sentence of each document -> a corpus; token number n has the id FIRST_ID + n."""
    lengths = [tokens for document in documents for tokens in document]
    sentences = np.append(0, np.cumsum(lengths, dtype=np.int64)).astype(np.int64)
    borders = np.append(0, np.cumsum([len(document) for document in documents], dtype=np.int64)).astype(np.int64)
    ids = np.arange(FIRST_ID, FIRST_ID + sentences[-1]).astype(np.uint16)
    assert FIRST_ID + len(ids) <= VOCABULARY
    return SmallCorpus(ids, sentences, borders, directory)


def vocabulary(directory: Path, words: Sequence[str]) -> WordPieceTokenizer:
    """A tokenizer whose ids are the special tokens, then `words`."""
    path = directory / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    return WordPieceTokenizer.from_vocab(path)


def numbers(directory: Path) -> WordPieceTokenizer:
    """A vocabulary for `numbered`."""
    return vocabulary(directory, [f"w{number}" for number in range(VOCABULARY - FIRST_ID)])


def p_value(found, expected, freedom: int) -> float:
    """Of chi square: how often chance alone makes counts as far from what is expected."""
    statistic = ((np.asarray(found) - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))
