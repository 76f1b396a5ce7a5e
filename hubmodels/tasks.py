"""What a person asks of a model: fill in the blank, turn texts into vectors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder
from .errors import InputError
from .heads import IGNORED, MaskedLM
from .tokenizers import WordPieceTokenizer, check_texts

POOLINGS = ("mean", "first", "pooler")


class Guess(NamedTuple):
    """token: as in the vocabulary; probability: among all of it."""

    token: str
    token_id: int
    probability: float


def _check(texts: str | Sequence[str], batch_size: int) -> list[str]:
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: expected at least 1")
    return check_texts("texts", texts)


@torch.inference_mode()
def fill_mask(
    model: MaskedLM, tokenizer: WordPieceTokenizer, texts: str | Sequence[str], top_k: int = 5, batch_size: int = 32
) -> list[list[list[Guess]]]:
    """For each text, for each [MASK] in it, the `top_k` likeliest tokens, likeliest first.

    Only masked positions are projected on the vocabulary. Raises InputError for a text without [MASK].
    """
    texts = _check(texts, batch_size)
    if not 1 <= top_k <= tokenizer.vocab_size:
        raise InputError(f"top_k = {top_k}: expected 1 to {tokenizer.vocab_size}, the size of the vocabulary")
    device = model.encoder.embeddings.word.weight.device
    results: list[list[list[Guess]]] = []
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        inputs = {name: tensor.to(device) for name, tensor in tokenizer(batch).items()}
        masked = inputs["input_ids"] == tokenizer.mask_token_id  # [B, S]
        counts = masked.sum(1).tolist()
        for text, count in zip(batch, counts, strict=True):
            if not count:
                raise InputError(f"no {tokenizer.mask_token} in {text!r}: write it where a word is to be filled in")
        logits = model(**inputs, labels=inputs["input_ids"].masked_fill(~masked, IGNORED)).logits  # [M, V]
        probabilities, ids = logits.float().softmax(-1).topk(top_k)
        guesses = [
            [Guess(token, int(i), float(p)) for token, i, p in zip(tokenizer.tokens(row), row, likely, strict=True)]
            for row, likely in zip(ids, probabilities, strict=True)
        ]
        for count in counts:
            results.append(guesses[:count])
            guesses = guesses[count:]
    return results


@torch.no_grad()
def embed(
    model: Encoder,
    tokenizer: WordPieceTokenizer,
    texts: str | Sequence[str],
    *,
    pooling: str = "mean",
    normalise: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """[N, D], a vector for each text, in their order, on the model's device.

    pooling: "mean" of the text's token states; "first", the state of [CLS]; or "pooler", BERT's pooler_output.
    normalise: to length 1, so that a dot product is a cosine. Texts longer than the model's position table are cut.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling = {pooling!r}: expected one of {', '.join(POOLINGS)}")
    texts = _check(texts, batch_size)
    table = model.embeddings.position.weight
    vectors = []
    for begin in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[begin : begin + batch_size], max_length=len(table))
        inputs = {name: tensor.to(table.device) for name, tensor in inputs.items()}
        output = model(**inputs)
        if pooling == "mean":
            lengths = inputs["attention_mask"].sum(1, keepdim=True)
            vectors.append(output.last_hidden_state.sum(1) / lengths)  # padding is zeros
        else:
            vectors.append(output.pooler_output if pooling == "pooler" else output.last_hidden_state[:, 0])
    joined = torch.cat(vectors) if vectors else table.new_empty(0, table.shape[1])
    return F.normalize(joined, dim=-1) if normalise else joined
