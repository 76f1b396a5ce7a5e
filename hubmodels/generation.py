"""Text from a language model, a word at a time: greedy, sampled, or by beams, on a cache of keys and values.

The prompt is computed once; each step then computes one token a row. Shape letters: see `layers.py`.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Cache
from .errors import InputError
from .prepack import prepacked
from .steps import Step, Steps

_WORTH_PACKING = 64  # steps: to pack the weights takes as long as twenty to sixty of them save
Ending = Callable[[list[int]], bool]  # a row's new ids -> whether it ends with the last of them


class Generated(NamedTuple):
    """ids: the new tokens, the one that ended it included. ended: by a stop, not by max_new_tokens.

    score: of a beam, its log-probability divided by its length ** length_penalty; else None.
    """

    ids: list[int]
    ended: bool
    score: float | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """How the next word is chosen.

    max_new_tokens: tokens to add at most.
    temperature: 0: the likeliest word (greedy); above: words are drawn, the scores divided by it first.
    top_k: draw from the k likeliest. top_p: from the likeliest that together reach this probability (Holtzman 2019).
    min_p: from those at least this fraction as likely as the likeliest (Nguyen 2024).
    repetition_penalty: above 1: scores of words that are there already sink (Keskar 2019 §4.1).
    num_beams: above 1: keep that many beginnings and return the best whole. length_penalty: above 0 favours long ones.
    num_return_sequences: samples of each prompt, or the best so many beams.
    stop_ids: tokens that end a row. seed: of the draws; None: another one each time.
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_ids: Collection[int] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        def expect(name: str, holds: bool, what: str) -> None:
            if not holds:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected {what}")

        def within(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            value = getattr(self, name)
            expect(name, type(value) is int and value >= 1, "a whole number, at least 1")
        expect("top_k", self.top_k is None or (type(self.top_k) is int and self.top_k >= 1), "a whole number above 0")
        expect("temperature", within("temperature", 0, sys.float_info.max), "0 (greedy) or a number above it")
        expect(
            "top_p", self.top_p is None or (within("top_p", 0, 1) and self.top_p > 0), "a probability, 0 < top_p <= 1"
        )
        expect("min_p", self.min_p is None or within("min_p", 0, 1), "a fraction, 0 <= min_p <= 1")
        expect("repetition_penalty", within("repetition_penalty", 1e-3, 1e3), "a number from 0.001 to 1000; 1 is none")
        expect("length_penalty", within("length_penalty", -100, 100), "a number from -100 to 100")
        whole = type(self.seed) is int and -(2**63) <= self.seed < 2**64
        expect("seed", self.seed is None or whole, "None or a whole number of 64 bits")
        check_stop_ids(self.stop_ids)
        cuts = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and cuts:
            raise InputError(f"{', '.join(cuts)}: given without temperature; set temperature=1.0 to draw words")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                f"num_beams = {self.num_beams} with temperature = {self.temperature}: beams search for the likeliest "
                "text and draw nothing; set one of the two"
            )
        most = 1 if self.temperature == 0 and self.num_beams == 1 else self.num_beams
        if self.temperature == 0 and self.num_return_sequences > most:
            raise InputError(
                f"num_return_sequences = {self.num_return_sequences}: greedy search has one result and beam search "
                f"num_beams, here {most}; set temperature above 0 to draw several"
            )


def check_stop_ids(ids: Any) -> Collection[int]:
    """Raise InputError unless `ids` are whole numbers."""
    if not isinstance(ids, Collection) or any(type(number) is not int for number in ids):
        raise InputError(f"stop_ids = {ids!r}: expected a list of ids")
    return ids


def generate(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions, ending: Ending | None
) -> list[Generated]:
    """See `LanguageModel.generate`."""
    if options.num_beams > 1:
        return _beam_search(model, input_ids, attention_mask, options, ending)
    rows: list[list[int]] = [[] for _ in range(len(input_ids) * options.num_return_sequences)]
    ended = [False] * len(rows)
    for row, token, is_end in stream(model, input_ids, attention_mask, options, ending):
        rows[row].append(token)
        ended[row] = is_end
    return [Generated(*row) for row in zip(rows, ended, strict=True)]


def stream(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions, ending: Ending | None
) -> Iterator[tuple[int, int, bool]]:
    """Each token as it comes: (row, id, whether it ends the row). Rows: all samples of the first prompt first.

    Bad input is told, and the prompt computed, before the first is asked for.
    """
    if options.num_beams > 1:
        raise InputError(f"num_beams = {options.num_beams}: beams are known only when the search is over; use generate")
    with torch.inference_mode():
        state = _State(model, input_ids, attention_mask, options)
        state.select(torch.arange(len(input_ids)).repeat_interleave(options.num_return_sequences))
    return _steps(state, options, ending, _generator(options.seed, input_ids.device))


@torch.inference_mode()
def _steps(
    state: "_State", options: GenerationOptions, ending: Ending | None, generator: torch.Generator
) -> Iterator[tuple[int, int, bool]]:
    rows = list(range(len(state.scores)))  # those that are not over
    new: dict[int, list[int]] = {row: [] for row in rows}
    for number in range(1, options.max_new_tokens + 1):
        chosen = _choose(state.scores, state.seen, options, generator)  # [B]
        over = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            new[row].append(token)
            is_end = token in options.stop_ids or (ending is not None and ending(list(new[row])))
            yield row, token, is_end
            over += [place] if is_end else []
        if over:
            kept = [place for place in range(len(rows)) if place not in over]
            rows, chosen = [rows[place] for place in kept], chosen[kept]
            state.select(torch.tensor(kept, dtype=torch.long))
        if not rows:
            return
        if number < options.max_new_tokens:
            state.step(chosen)


class _State:
    """What generation knows of its rows: the scores of the next word [B, V], and the cache of all before it."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions):
        ids, mask = _left_padded(input_ids, attention_mask)
        longest = model.transformer.embeddings.position.num_embeddings
        length, room = ids.shape[1], ids.shape[1] + options.max_new_tokens
        if room > longest:
            raise InputError(
                f"prompt of {length} tokens and max_new_tokens = {options.max_new_tokens}: together {room}, but this "
                f"model has positions for {longest}; shorten the prompt or ask for at most {max(0, longest - length)}"
            )
        self.model, count = model, options.max_new_tokens
        steps: Steps | None = None if model.training or options.num_beams > 1 else model.steps
        self.steps = steps if steps is not None and count >= steps.least else None
        if self.steps is None and count >= _WORTH_PACKING and not model.training:  # what is packed drops nothing
            self.model = prepacked(model, len(ids) * max(options.num_beams, options.num_return_sequences))
        self.taker: Step | None = None
        self.cache: Cache = model.transformer.new_cache(len(ids), room - 1)  # nothing looks at the last new token
        self.positions: Tensor | None = None  # [B, 1] of the next token; None: its column, as nothing is padding
        self.seen = ids if options.repetition_penalty != 1.0 else None  # [B, so far]
        if mask is None:
            encoded = self.model.transformer.encode(ids, cache=self.cache)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            encoded = self.model.transformer.encode(ids, mask, position_ids=positions, cache=self.cache)
            self.positions = positions[:, -1:] + 1
        self.scores = self.model.word_scores(encoded.packing.last(encoded.states))  # [B, V]

    def step(self, tokens: Tensor) -> None:
        """Add a token to each row [B] and compute the scores of the next one."""
        if self.steps is not None and self.taker is None:
            self.taker = self.steps(self.model, self.cache)
        if self.taker is not None:
            self.scores = self.taker(tokens, self.positions)
        else:
            self.scores = self.model.next_scores(tokens, self.positions, self.cache)
        self.positions = None if self.positions is None else self.positions + 1
        self.seen = None if self.seen is None else torch.cat([self.seen, tokens[:, None]], 1)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows [B'], in this order."""
        if torch.equal(rows, torch.arange(len(self.scores))):
            return
        if self.taker is not None and not self.taker.goes_on(len(rows)):  # the rest goes on without
            self.taker = self.steps = None
        rows = rows.to(self.scores.device)
        self.cache.select(rows)
        self.scores = self.scores[rows]
        self.positions = None if self.positions is None else self.positions[rows]
        self.seen = None if self.seen is None else self.seen[rows]


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts [B, S] with padding anywhere -> padded on the left, as little as can be; mask None: nothing is padding.

    Padding takes the row's last token, so that whoever looks at a row's words sees none that is not in it.
    """
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids: expected ids [B, S], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise InputError(f"input_ids: expected ids [B, S], got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
    input_ids = input_ids.long()
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask: expected {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    lengths = real.sum(1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty or not len(input_ids):
        which = f"row {empty[0]} has" if empty else "there is"
        raise InputError(f"prompt: {which} no token to go on from; begin with one, such as tokenizer.end_token_id")
    order = real.argsort(stable=True, dim=1)[:, -int(lengths.max()) :]
    ids, real = input_ids.gather(1, order), real.gather(1, order)
    return torch.where(real != 0, ids, ids[:, -1:]), None if bool(real.all()) else real


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _choose(
    scores: Tensor, seen: Tensor | None, options: GenerationOptions, generator: torch.Generator | None
) -> Tensor:
    """[B, V] -> the next words [B]"""
    scores = _penalised(scores, seen, options.repetition_penalty)
    if options.temperature == 0:
        return scores.argmax(-1)
    scores = (scores - scores.amax(-1, keepdim=True)) / options.temperature  # the least temperature makes no infinity
    probabilities = _cut(scores, options).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _penalised(scores: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """[B, V], [B, so far] -> scores in which the seen words' are divided by `penalty`, or, below 0, multiplied."""
    if seen is None:
        return scores
    theirs = scores.gather(1, seen)
    return scores.scatter(1, seen, torch.where(theirs < 0, theirs * penalty, theirs / penalty))


def _cut(scores: Tensor, options: GenerationOptions) -> Tensor:
    """[B, V] -> the same with -inf for the words that top_k, top_p and min_p rule out, one after the other"""
    if options.top_k is not None:
        least = scores.topk(min(options.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, places = scores.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of those likelier
        scores = scores.masked_fill((before >= options.top_p).scatter(1, places, before >= options.top_p), -torch.inf)
    if options.min_p is not None:
        probabilities = scores.softmax(-1)
        least = options.min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


class _Beams:
    """The beginnings and the endings of one prompt's search."""

    def __init__(self, options: GenerationOptions, ending: Ending | None):
        self.options, self.ending = options, ending
        hopeless: list[tuple[float, list[int]]] = [(-torch.inf, [])] * (options.num_beams - 1)
        self.running = [(0.0, []), *hopeless]
        self.over: list[Generated] = []

    def advance(self, candidates: list[tuple[float, int, int]]) -> list[int]:
        """Take the best of (log-probability, beam, token), best first. Returns the beams that they go on from."""
        running: list[tuple[float, list[int]]] = []
        beams: list[int] = []
        for rank, (score, beam, token) in enumerate(candidates):
            ids = [*self.running[beam][1], token]
            if token in self.options.stop_ids or (self.ending is not None and self.ending(ids)):
                if rank < self.options.num_beams:  # one that no beginning among the best led to is no result
                    self._end(score, ids, True)
            elif len(running) < self.options.num_beams:
                running.append((score, ids))
                beams.append(beam)
        short = self.options.num_beams - len(running)  # too many ended: hopeless ones keep the batch's shape
        self.running = running + [(-torch.inf, [*self.running[0][1], candidates[0][2]])] * short
        return beams + [0] * short

    def _end(self, score: float, ids: list[int], ended: bool) -> None:
        if score > -torch.inf:
            self.over.append(Generated(ids, ended, score / len(ids) ** self.options.length_penalty))
            self.over.sort(key=lambda found: -(found.score or 0.0))
            del self.over[self.options.num_beams :]

    def is_over(self) -> bool:
        """Whether no beginning can become better than what is found: a log-probability only sinks as it grows."""
        if len(self.over) < self.options.num_beams:
            return False
        best, penalty = self.running[0], self.options.length_penalty
        length = self.options.max_new_tokens if penalty > 0 else len(best[1]) + 1
        return best[0] / length**penalty <= (self.over[-1].score or 0.0)

    def results(self) -> list[Generated]:
        for score, ids in self.running:
            if len(ids) == self.options.max_new_tokens:
                self._end(score, ids, False)
        return self.over[: self.options.num_return_sequences]


@torch.inference_mode()
def _beam_search(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions, ending: Ending | None
) -> list[Generated]:
    """The likeliest whole texts that `num_beams` beginnings of each prompt lead to."""
    state = _State(model, input_ids, attention_mask, options)
    prompts, beams = len(input_ids), options.num_beams
    state.select(torch.arange(prompts).repeat_interleave(beams))
    searches = [_Beams(options, ending) for _ in range(prompts)]
    for number in range(1, options.max_new_tokens + 1):
        logprobs = _penalised(state.scores.log_softmax(-1), state.seen, options.repetition_penalty)  # [P * beams, V]
        so_far = torch.tensor([[score for score, _ in search.running] for search in searches])
        words = logprobs.shape[-1]
        total = (logprobs.view(prompts, beams, words) + so_far.to(logprobs)[:, :, None]).flatten(1)
        best = total.topk(min(total.shape[1], beams * (2 + len(options.stop_ids))))
        rows, tokens = [], []
        for place, (search, scores, places) in enumerate(
            zip(searches, best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            candidates = [(score, at // words, at % words) for score, at in zip(scores, places, strict=True)]
            rows += [place * beams + beam for beam in search.advance(candidates)]
            tokens += [ids[-1] for _, ids in search.running]
        if all(search.is_over() for search in searches) or number == options.max_new_tokens:
            break
        state.select(torch.tensor(rows))
        state.step(torch.tensor(tokens, device=input_ids.device))
    found = [result for search in searches for result in search.results()]
    if len(found) < prompts * options.num_return_sequences:
        raise InputError(
            f"num_return_sequences = {options.num_return_sequences}: there are not so many different texts of "
            f"{options.max_new_tokens} tokens"
        )
    return found
