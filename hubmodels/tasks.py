"""What a person asks of a model: fill a blank, turn texts into vectors, go on from a text, say how likely it is."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import InputError
from .generation import Ending, check_stop_ids
from .heads import IGNORED, MaskedLM
from .language_model import LanguageModel
from .tokenizers import BytePairTokenizer, WordPieceTokenizer, check_text, check_texts
from .transformer import Encoder

BATCH_TOKENS = 8192  # of a batch, padding included: enough for a CPU's or GPU's products to be at their best
_CHUNK = 8192  # texts that are sorted by their length together
_AT_ONCE = 512  # tokens that are projected on the vocabulary together: 100 MB with GPT-2's
POOLINGS = ("mean", "first", "pooler")


class Guess(NamedTuple):
    """token: as in the vocabulary; probability: among all of it."""

    token: str
    token_id: int
    probability: float


@torch.inference_mode()
def fill_mask(
    model: MaskedLM,
    tokenizer: WordPieceTokenizer,
    texts: str | Sequence[str],
    top_k: int = 5,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[list[Guess]]]:
    """For each text, for each [MASK] in it, the `top_k` likeliest tokens, likeliest first.

    Only masked positions are projected on the vocabulary. batch_tokens: as for `embed`.
    Raises InputError for a text without [MASK].
    """
    _check_batch(batch_tokens)
    texts = check_texts("texts", texts)
    if not 1 <= top_k <= tokenizer.vocab_size:
        raise InputError(f"top_k = {top_k}: expected 1 to {tokenizer.vocab_size}, the size of the vocabulary")
    rows = tokenizer.rows(texts)
    for text, row in zip(texts, rows, strict=True):
        if tokenizer.mask_token_id not in row:
            raise InputError(f"no {tokenizer.mask_token} in {text!r}: write it where a word is to be filled in")
    device = model.transformer.embeddings.word.weight.device
    results: list[list[list[Guess]]] = [[] for _ in texts]
    for batch in _batches(enumerate(rows), batch_tokens):
        inputs = {name: tensor.to(device) for name, tensor in tokenizer.padded([ids for _, ids in batch]).items()}
        masked = inputs["input_ids"] == tokenizer.mask_token_id  # [B, S]
        logits = model(**inputs, labels=inputs["input_ids"].masked_fill(~masked, IGNORED)).logits  # [M, V]
        probabilities, ids = logits.float().softmax(-1).topk(top_k)
        owners = [number for number, row in batch for token in row if token == tokenizer.mask_token_id]
        for number, row, likely in zip(owners, ids, probabilities, strict=True):
            found = zip(tokenizer.tokens(row), row, likely, strict=True)
            results[number].append([Guess(token, int(i), float(p)) for token, i, p in found])
    return results


@torch.no_grad()
def embed(
    model: Encoder,
    tokenizer: WordPieceTokenizer,
    texts: str | Iterable[str],
    *,
    pooling: str = "mean",
    normalise: bool = True,
    overlap: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> Tensor:
    """[N, D], a vector for each text, in their order, on the model's device.

    texts: any number; what is no list is read as it is worked on.
    pooling: "mean" of the text's token states; "first", the state of [CLS]; or "pooler", BERT's pooler_output.
    normalise: to length 1, so that a dot product is a cosine.
    overlap: None: texts longer than the model's position table are cut; a number: they are read in windows that share
        so many tokens with the next, and their vector is the windows' mean, by their tokens.
    batch_tokens: of a batch, at most, padding included: texts are sorted by their length, so that there is little.
    progress: show a bar.
    Raises InputError for an option that is none, and for a text that is no text.
    """
    if not isinstance(model, Encoder):
        raise InputError(f"embed: expected an encoder, such as bertModel gives, got a {type(model).__name__}")
    if pooling not in POOLINGS:
        raise InputError(f"pooling = {pooling!r}: expected one of {', '.join(POOLINGS)}")
    _check_batch(batch_tokens)
    table = model.embeddings.position.weight
    room = len(table) - 2  # beside the special tokens
    if overlap is not None and not (type(overlap) is int and 0 <= overlap < room):
        raise InputError(f"overlap = {overlap!r}: expected None, or a number of tokens from 0 to {room - 1}")
    found = []
    with _bar(progress, texts) as bar:
        for chunk in _chunks(texts):
            rows = tokenizer.rows(chunk, None if overlap is not None else len(table))
            windows = [(number, window) for number, row in enumerate(rows) for window in _windows(row, room, overlap)]
            found.append(_vectors(model, tokenizer, windows, len(chunk), pooling, batch_tokens, bar))
    joined = torch.cat(found) if found else table.new_empty(0, table.shape[1])
    return F.normalize(joined, dim=-1) if normalise else joined


def _bar(progress: bool, texts: str | Iterable[str]) -> Any:
    from tqdm import tqdm

    total = len(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else None
    return tqdm(total=total, unit="text", unit_scale=True, disable=not progress)


def _chunks(texts: str | Iterable[str]) -> Iterator[list[str]]:
    """Texts that are sorted and read together: of any number only so many are in memory."""
    if isinstance(texts, str | Sequence):
        texts = check_texts("texts", texts)
    elif not isinstance(texts, Iterable):
        raise InputError(f"texts: expected a str or an iterable of them, got {type(texts).__name__}")
    places = iter(texts)
    while chunk := list(islice(places, _CHUNK)):
        yield chunk


def _windows(row: list[int], room: int, overlap: int | None) -> Iterator[list[int]]:
    """[CLS] … [SEP] -> the same of at most `room` tokens between them"""
    body = row[1:-1]
    if overlap is None or len(body) <= room:
        yield row
        return
    for begin in range(0, len(body) - overlap, room - overlap):
        yield [row[0], *body[begin : begin + room], row[-1]]


def _vectors(
    model: Encoder,
    tokenizer: WordPieceTokenizer,
    windows: Sequence[tuple[int, list[int]]],
    count: int,
    pooling: str,
    batch_tokens: int,
    bar: Any,
) -> Tensor:
    """[count, D]; windows: the number of the text and its ids"""
    table = model.embeddings.position.weight
    totals = [0] * count
    for number, ids in windows:
        totals[number] += len(ids)
    vectors = table.new_zeros(count, table.shape[1])
    for batch in _batches(windows, batch_tokens):
        inputs = tokenizer.padded([ids for _, ids in batch])
        inputs = {name: tensor.to(table.device) for name, tensor in inputs.items()}
        output = model(**inputs)
        if pooling == "mean":  # padding is zeros
            pooled = output.last_hidden_state.sum(1) / inputs["attention_mask"].sum(1, keepdim=True)
        else:
            pooled = output.pooler_output if pooling == "pooler" else output.last_hidden_state[:, 0]
        shares = [len(ids) / totals[number] for number, ids in batch]
        owners = torch.tensor([number for number, _ in batch], device=table.device)
        vectors.index_add_(0, owners, pooled * pooled.new_tensor(shares)[:, None])
        bar.update(sum(shares))
    return vectors


def _check_batch(batch_tokens: int) -> None:
    if type(batch_tokens) is not int or batch_tokens < 1:
        raise InputError(f"batch_tokens = {batch_tokens!r}: expected a whole number, at least 1")


def _batches(rows: Iterable[tuple[int, list[int]]], most: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Numbers and ids, longest first: as many rows as fit, padded to the longest; at least one."""
    batch: list[tuple[int, list[int]]] = []
    for row in sorted(rows, key=lambda row: -len(row[1])):
        if batch and len(batch[0][1]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Completion(NamedTuple):
    """text: what was added to the prompt, up to a stop. ids: its tokens, the one that ended it included.

    ended: by a stop, not by max_new_tokens. score: of a beam, see `Generated`.
    """

    prompt: str
    text: str
    ids: list[int]
    ended: bool
    score: float | None = None


def generate(
    model: LanguageModel,
    tokenizer: BytePairTokenizer,
    prompts: str | Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> list[Completion]:
    """Go on from each prompt; all samples of the first prompt come first.

    stop: strings that end a text, and are not part of it; <|endoftext|> ends it too. An empty prompt stands for
    <|endoftext|>, the beginning of a text, where the tokenizer has that. Options: see `GenerationOptions`.
    Raises InputError as `LanguageModel.generate` does.
    """
    prompts = check_texts("prompts", prompts)
    inputs, stops = _prompts(model, tokenizer, prompts), _stops(stop)
    copies = options.get("num_return_sequences", 1)
    options["stop_ids"] = _stop_ids(tokenizer, options)
    results = model.generate(**inputs, **options, ending=_ending(tokenizer, stops))
    completions = []
    for number, (ids, ended, score) in enumerate(results):
        row = number // copies
        before = inputs["input_ids"][row][inputs["attention_mask"][row] != 0].tolist()
        text, _ = _until(_added(tokenizer, before, _kept(ids, options["stop_ids"])), stops)
        completions.append(Completion(prompts[row], text, ids, ended, score))
    return completions


def stream(
    model: LanguageModel, tokenizer: BytePairTokenizer, prompt: str, *, stop: str | Sequence[str] = (), **options: Any
) -> Iterator[str]:
    """The text of `generate` for one prompt, in pieces as they come.

    A piece is held back while it may still become a stop string, or is a part of a character.
    """
    inputs, stops = _prompts(model, tokenizer, check_texts("prompt", prompt)), _stops(stop)
    if len(inputs["input_ids"]) != 1 or options.get("num_return_sequences", 1) != 1:
        raise InputError("stream: expected one prompt and num_return_sequences = 1; generate takes several")
    options["stop_ids"] = _stop_ids(tokenizer, options)
    tokens = model.stream(**inputs, **options, ending=_ending(tokenizer, stops))
    before = inputs["input_ids"][0].tolist()
    return _pieces(tokenizer, before, (token for _, token, _ in tokens), options["stop_ids"], stops)


def _pieces(
    tokenizer: BytePairTokenizer, before: list[int], tokens: Iterable[int], stop_ids: Sequence[int], stops: list[str]
) -> Iterator[str]:
    ids: list[int] = []
    text, told = "", 0
    for token in tokens:
        ids.append(token)
        text, unsure = _until(_added(tokenizer, before, _kept(ids, stop_ids)), stops)
        if len(text) - unsure > told:
            yield text[told : len(text) - unsure]
            told = len(text) - unsure
    if len(text) > told:
        yield text[told:]


def _prompts(model: LanguageModel, tokenizer: BytePairTokenizer, prompts: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask, on the model's device"""
    if not prompts:
        raise InputError("prompts: expected at least one text, got an empty list")
    begin = "" if tokenizer.end_token_id is None else tokenizer.tokens([tokenizer.end_token_id])[0]
    for place, prompt in enumerate(prompts):
        if not prompt and not begin:
            raise InputError(
                f"prompts[{place}]: expected text to go on from, got none; this tokenizer cannot begin one"
            )
    device = model.transformer.embeddings.word.weight.device
    return {name: tensor.to(device) for name, tensor in tokenizer([text or begin for text in prompts]).items()}


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = check_texts("stop", stop)
    if "" in stops:
        raise InputError("stop: expected strings of at least one character")
    return stops


def _stop_ids(tokenizer: BytePairTokenizer, options: dict[str, Any]) -> tuple[int, ...]:
    end = () if tokenizer.end_token_id is None else (tokenizer.end_token_id,)
    return (*check_stop_ids(options.get("stop_ids", ())), *end)


def _ending(tokenizer: BytePairTokenizer, stops: list[str]) -> Ending | None:
    """Whether a stop string is in what the new tokens say after any whole word."""
    if not stops:
        return None
    word = tokenizer(".")["input_ids"][0].tolist()
    return lambda ids: any(stop in _added(tokenizer, word, ids) for stop in stops)


def _kept(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def _added(tokenizer: BytePairTokenizer, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of `before`: decoded alone they would lose the space in front."""
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def _until(text: str, stops: list[str]) -> tuple[str, int]:
    """The text up to the first stop string, and how many characters at its end may still change with what follows."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)], 0
    whole = text.rstrip("\ufffd")  # what is left of a character that is not complete
    begun = (n for stop in stops for n in range(1, min(len(stop), len(whole) + 1)) if whole.endswith(stop[:n]))
    return text, len(text) - len(whole) + max(begun, default=0)


class Score(NamedTuple):
    """token_ids and the natural logarithm of each one's probability after all before it."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


class Perplexity(NamedTuple):
    """perplexity: e to the mean loss of a token. nats: the whole text's loss; bits_per_byte: the same for each of its
    bytes in UTF-8, which compares models of different vocabularies. tokens: those that were scored."""

    perplexity: float
    bits_per_byte: float
    nats: float
    tokens: int


def score(model: LanguageModel, tokenizer: BytePairTokenizer, texts: str | Sequence[str]) -> list[Score]:
    """How likely each text is, token by token.

    <|endoftext|> stands before a text where the tokenizer has it; else the first token is not scored, as nothing comes
    before it. A text longer than the model's positions is read as in `perplexity`.
    """
    texts = check_texts("texts", texts)
    found = []
    for text in texts:
        ids = _begun(tokenizer, text)
        found.append(Score(ids[1:], token_logprobs(model, ids)))
    return found


def perplexity(
    model: LanguageModel, tokenizer: BytePairTokenizer, text: str, *, stride: int | None = None, batch_size: int = 8
) -> Perplexity:
    """Of a text of any length, read in windows as long as the model's positions, `stride` tokens apart.

    Each token is scored once, after all before it in its window: at least the window's length less `stride` of them,
    once there are so many. A smaller stride gives more context and takes longer; default half the window.
    """
    ids = _begun(tokenizer, check_text("text", text))
    logprobs = token_logprobs(model, ids, stride=stride, batch_size=batch_size)
    if not logprobs:
        raise InputError("text: expected at least one token to score after the first, got none")
    nats = -math.fsum(logprobs)
    scored = text if tokenizer.end_token_id is not None else tokenizer.decode(ids[1:])
    bits = nats / math.log(2) / len(scored.encode())
    return Perplexity(math.exp(nats / len(logprobs)), bits, nats, len(logprobs))


def _begun(tokenizer: BytePairTokenizer, text: str) -> list[int]:
    ids = tokenizer.inner.encode(text, add_special_tokens=False).ids
    return ids if tokenizer.end_token_id is None else [tokenizer.end_token_id, *ids]


@torch.inference_mode()
def token_logprobs(
    model: LanguageModel, ids: list[int], *, stride: int | None = None, batch_size: int = 8
) -> list[float]:
    """The log-probability of each of `ids` but the first. Windows as in `perplexity`."""
    table = model.transformer.embeddings.position.weight
    window = len(table)
    stride = max(1, window // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride < window:
        raise InputError(f"stride = {stride}: expected 1 to {window - 1}, less than the model's {window} positions")
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: expected at least 1")
    found: list[float] = []
    # A window foresees the token after each of its own. Of the first one all are scored, of the others the last ones.
    windows = [(begin, 0 if begin == 0 else window - stride) for begin in range(0, max(1, len(ids)), stride)]
    windows = [(begin, known) for begin, known in windows if begin + known + 1 < len(ids)]
    for first in range(0, len(windows), batch_size):
        rows = [
            (torch.tensor(ids[begin : begin + window + 1]), known)
            for begin, known in windows[first : first + batch_size]
        ]
        inputs = pad_sequence([row[:-1] for row, _ in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(row) - 1) for row, _ in rows], batch_first=True)
        states = model.transformer.encode(inputs.to(table.device), mask.to(table.device)).states  # [T, D]
        each = states.split([len(row) - 1 for row, _ in rows])
        wanted = torch.cat([part[known:] for part, (_, known) in zip(each, rows, strict=True)])
        targets = torch.cat([row[known + 1 :] for row, known in rows]).to(table.device)
        for part, target in zip(wanted.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
            found.extend((-F.cross_entropy(model.word_scores(part), target, reduction="none")).tolist())
    return found
