"""Text -> pretraining batches: sentence pairs for next-sentence prediction, words masked anew for every batch.

Source: Devlin 2018 §3.1; google-research/bert, create_pretraining_data.py. Two things differ from that script on
purpose: exactly half of the pairs are random ones (there 56 to 67 %), and a random one never comes from the same
document.
"""

import lzma
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..heads import IGNORED
from ..tokenizers import BytePairTokenizer, WordPieceTokenizer

# The last lines of a Project Gutenberg book, which name it; they part the books of a file that holds many.
_END_OF_BOOK = re.compile(
    r"(?mi)^[^\S\n]*(?:\*+\s*)?End of (?:the |this )?Project Gutenberg(?:['’]s)?(?: EBook| Etext)?(?: of)?[ \n]"
    r"(?P<title>.*(?:\n.+)*)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z])")


def read_books(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """A .txt or .txt.xz of Project Gutenberg books, one after another -> (closing words, which name it; paragraphs)."""
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    begin = 0
    for match in _END_OF_BOOK.finditer(text):
        yield " ".join(match["title"].split()), paragraphs(text[begin : match.start()])
        begin = match.end()
    rest = paragraphs(text[begin:])
    if rest:
        yield "the last book", rest


def paragraphs(text: str) -> list[str]:
    """The text between blank lines, unwrapped. Paragraphs without a lower-case word go."""
    unwrapped = (" ".join(p.replace("_", " ").split()) for p in re.split(r"\n\s*\n", text))
    return [p for p in unwrapped if re.search(r"[a-z]{3}", p) and not p.startswith(("Produced by", "[Illustration"))]


def sentences(paragraphs: list[str]) -> list[str]:
    """Paragraphs, cut at full stops."""
    return [s for p in paragraphs for s in _SENTENCE_END.sub(lambda m: m[0].rstrip() + "\n", p).split("\n")]


@dataclass(frozen=True)
class Corpus:
    """Token ids of all sentences in one list, and where sentences and documents begin.

    ids: [tokens] int32. sentences: [sentences + 1] offsets into ids. documents: [documents + 1] offsets into sentences.
    """

    ids: Tensor
    sentences: list[int]
    documents: list[int]

    @classmethod
    def build(cls, documents: list[list[str]], tokenizer: WordPieceTokenizer) -> "Corpus":
        pieces, sentence_offsets, document_offsets = [], [0], [0]
        for document in documents:
            for encoding in tokenizer.inner.encode_batch_fast(document, add_special_tokens=False):
                if encoding.ids:
                    pieces.append(torch.tensor(encoding.ids, dtype=torch.int32))
                    sentence_offsets.append(sentence_offsets[-1] + len(encoding.ids))
            document_offsets.append(len(sentence_offsets) - 1)
        return cls(
            torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32), sentence_offsets, document_offsets
        )

    def chunks(self, length: int) -> list[tuple[int, int, int]]:
        """(document, first sentence, end): neighbouring sentences of one document that fill `length` tokens."""
        found = []
        for document, (begin, end) in enumerate(zip(self.documents, self.documents[1:], strict=False)):
            first = begin
            for sentence in range(begin, end):
                enough = self.sentences[sentence + 1] - self.sentences[first] >= length
                if (enough or sentence + 1 == end) and sentence > first:
                    found.append((document, first, sentence + 1))
                    first = sentence + 1
        return found

    def tokens(self, first: int, end: int) -> Tensor:
        """Ids of the sentences first … end - 1."""
        return self.ids[self.sentences[first] : self.sentences[end]]


class PretrainingBatches:
    """Batch number n of a corpus: a function of (seed, n) and nothing else, so a run resumes anywhere.

    length: tokens in a row at most; one row in ten is cut to a random shorter length. mask_rate: of the real words.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: WordPieceTokenizer, *, rows: int, length: int, mask_rate: float, seed: int
    ):
        if length < 8:
            raise InputError(f"length = {length}: expected at least 8 tokens in a row")
        self.corpus, self.tokenizer, self.rows, self.length = corpus, tokenizer, rows, length
        self.mask_rate, self.seed = mask_rate, seed
        self.chunks = corpus.chunks(length - 3)
        documents = len({chunk[0] for chunk in self.chunks})
        if documents < 2:
            raise InputError(f"expected at least two documents, to take random sentences from, got {documents}")
        if len(self.chunks) < rows:
            raise InputError(f"expected text enough for a batch of {rows} rows, got {len(self.chunks)}")
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.chunks) // self.rows

    def batch(self, number: int) -> dict[str, Tensor]:
        """Arguments of `PreTraining.forward`, padded to the longest row."""
        epoch, place = divmod(number, len(self))
        rng = random.Random(f"{self.seed} {number}")
        order = self._epoch(epoch)[place * self.rows : (place + 1) * self.rows]
        rows = [self._pair(self.chunks[i], rng) for i in order]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row[0] for row in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        types = pad([row[1] for row in rows], batch_first=True)
        mask = pad([torch.ones_like(row[0]) for row in rows], batch_first=True)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        masked, labels = mask_words(ids, self.tokenizer, self.mask_rate, generator)
        return {
            "input_ids": masked,
            "attention_mask": mask,
            "token_type_ids": types,
            "labels": labels,
            "next_sentence_label": torch.tensor([row[2] for row in rows]),
        }

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.chunks)))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def _pair(self, chunk: tuple[int, int, int], rng: random.Random) -> tuple[Tensor, Tensor, int]:
        """ids [S], token types [S], label (0 = the second part follows, 1 = it is from another document)"""
        document, begin, end = chunk
        room = (self.length if rng.random() >= 0.1 else rng.randint(8, self.length)) - 3
        split = rng.randrange(begin + 1, end)
        first, second = self.corpus.tokens(begin, split), self.corpus.tokens(split, end)
        is_random = rng.random() < 0.5
        if is_random:
            other = rng.choice(self.chunks)
            while other[0] == document:
                other = rng.choice(self.chunks)
            second = self.corpus.tokens(rng.randrange(other[1], other[2]), other[2])
        keep = max(1, min(len(first), room - min(len(second), room // 2)))
        first, second = first[-keep:], second[: max(1, room - keep)]  # cut away from the seam
        cls_token, sep_token = torch.tensor([self.tokenizer.cls_token_id]), torch.tensor([self.tokenizer.sep_token_id])
        ids = torch.cat([cls_token, first.long(), sep_token, second.long(), sep_token])
        types = (torch.arange(len(ids)) >= len(first) + 2).long()
        return ids, types, int(is_random)


def mask_words(
    ids: Tensor, tokenizer: WordPieceTokenizer, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ids [B, S] -> ids with words hidden, labels (-100 where none), both [B, S].

    In every row `rate` of the words, rounded, at least one, are chosen; special tokens never. Of the chosen 80 %
    become [MASK], 10 % a random word, 10 % stay. Source: Devlin 2018 §3.1, task 1.
    """
    special = sorted(tokenizer.inner.get_added_tokens_decoder())
    words = ~torch.isin(ids, torch.tensor(special))
    counts = (words.sum(1) * rate).round().long().clamp(min=1)
    noise = torch.rand(ids.shape, generator=generator).masked_fill(~words, 2.0)
    ranks = noise.argsort(1).argsort(1)
    chosen = (ranks < counts[:, None]) & words
    labels = ids.masked_fill(~chosen, IGNORED)
    fate = torch.rand(ids.shape, generator=generator)
    ordinary = torch.tensor(sorted({*range(tokenizer.vocab_size)}.difference(special)))
    guesses = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    masked = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (fate >= 0.9), guesses, masked), labels


class LanguageModelBatches:
    """Batch number n of a text, for a model of the next word: a function of (seed, n) and nothing else.

    Documents stand one after another, <|endoftext|> before each and after the last. An epoch cuts that into rows of
    `length` tokens, at another place every time, and shuffles them.
    """

    def __init__(self, documents: list[str], tokenizer: BytePairTokenizer, *, rows: int, length: int, seed: int):
        end = tokenizer.end_token_id
        if rows < 1 or length < 2:
            raise InputError(f"rows = {rows}, length = {length}: expected at least 1 row of at least 2 tokens")
        if end is None:
            raise InputError("tokenizer: expected one with <|endoftext|>, to part the documents")
        self.rows, self.length, self.seed = rows, length, seed
        pieces = [torch.tensor([end], dtype=torch.int32)]
        for encoding in tokenizer.inner.encode_batch_fast(documents, add_special_tokens=False):
            pieces.append(torch.tensor([*encoding.ids, end], dtype=torch.int32))
        self.ids = torch.cat(pieces)
        if len(self) < 1:
            raise InputError(f"expected text enough for a batch of {rows} rows of {length}, got {len(self.ids)} tokens")
        self._order: tuple[int, int, list[int]] = (-1, 0, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return max(0, len(self.ids) - self.length) // self.length // self.rows

    def batch(self, number: int) -> dict[str, Tensor]:
        """Arguments of `LanguageModel.forward`."""
        epoch, place = divmod(number, len(self))
        if self._order[0] != epoch:
            rng = random.Random(f"{self.seed} epoch {epoch}")
            order = list(range(len(self) * self.rows))
            rng.shuffle(order)
            self._order = (epoch, rng.randrange(self.length), order)
        _, phase, order = self._order
        begins = [phase + self.length * row for row in order[place * self.rows : (place + 1) * self.rows]]
        ids = torch.stack([self.ids[begin : begin + self.length] for begin in begins]).long()
        return {"input_ids": ids, "labels": ids}
