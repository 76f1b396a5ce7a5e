"""Which words of a row are hidden, and behind what.

Source: Devlin 2018 §3.1, task 1. Of 100 tokens that are chosen 80 become [MASK], 10 a random one, 10 stay. What is
chosen is a token, or a longer unit: all pieces of a word (google-research/bert, README, whole word masking; for Chinese
Cui 2019, arXiv 1906.08101), or several neighbours (Cui 2020, arXiv 2004.13922, §3.1). A unit has one fate, as in Joshi
2019, arXiv 1907.10529, §3.1: no piece of a hidden word stays to give it away.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..heads import IGNORED
from ..tokenizers import SPECIAL, WordPieceTokenizer, check_texts

_END = -2  # in the tree of words: one may end here. No token has the number, nor -1, which stands for none.


class Masking(NamedTuple):
    """rate: of the tokens that are not special; masked, random: shares of those, the rest stay.

    whole_words: all pieces of a word or none. longest: 1 to so many neighbouring words together, the likelihood falling
    evenly: of 4, as in Cui 2020, one word 40 %, two 30, three 20, four 10.
    """

    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    whole_words: bool = False
    longest: int = 1


class Masker:
    """`masker(ids, rng) -> (ids, labels)`: a row with words hidden, and what they were.

    words: with whole words also what a word is where no blank parts them, as in Chinese: neighbouring tokens of one
    character that make up one of them are one, the longest first, read from the left.
    Raises InputError for a masking that cannot be, and for words none of which could be found in a row.
    """

    def __init__(self, tokenizer: WordPieceTokenizer, masking: Masking, words: Sequence[str] | None = None):
        _check(masking)
        if words is not None and not masking.whole_words:
            raise InputError("words: they say what a whole word is, but whole_words is False")
        self.masking, self.mask_token_id = masking, tokenizer.mask_token_id
        self._in_units = masking.whole_words or masking.longest > 1
        self._ordinary, self._continues = ordinary_tokens(tokenizer), continuing_pieces(tokenizer)
        self._guesses = np.flatnonzero(self._ordinary)
        self._words = {} if words is None else _tree(tokenizer, words)
        falling = np.arange(masking.longest, 0, -1)
        self._likelihood = np.cumsum(falling) / falling.sum()  # [longest], of at most 1, 2, … words together

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """[S] ids -> [S] ids with words hidden, [S] labels (-100 where none), int64.

        max(1, round(rate * n)) of the n tokens that are not special, exactly; of longer units so many in the mean, at
        least one unit, and each as likely as another, however long. Nothing, if there are none.
        """
        ids = np.array(ids, np.int64)
        labels = np.full(len(ids), IGNORED)
        places = np.flatnonzero(self._ordinary[ids])  # [C]
        if not len(places):
            return ids, labels
        count = max(1, round(self.masking.rate * len(places)))
        chosen, fates = self._units(ids, places, count, rng) if self._in_units else self._tokens(places, count, rng)
        masked, changed = self.masking.masked, self.masking.masked + self.masking.random
        labels[chosen] = ids[chosen]
        ids[chosen[fates < masked]] = self.mask_token_id
        replaced = chosen[(fates >= masked) & (fates < changed)]
        ids[replaced] = self._guesses[(rng.random(len(replaced)) * len(self._guesses)).astype(np.int64)]
        return ids, labels

    def _tokens(self, places: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens by chance, where they are, and a number from 0 to 1 for each, which decides what becomes of it."""
        return rng.permutation(places)[:count], rng.random(count)

    def _units(
        self, ids: np.ndarray, places: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Units by chance: as `_tokens`, all tokens of a unit or none, and one number for all of them.

        They lie around a circle in random order, and those go whose first token lies in an arc of `count` tokens. So
        each has the same chance; to fill up with what still fits would favour short words.
        """
        adjacent = np.zeros(len(places), bool)  # [C], whether each follows on the one before it in the row
        np.equal(places[1:] - places[:-1], 1, out=adjacent[1:])
        begins = self._begins(ids[places], adjacent, rng)
        unit = begins.cumsum() - 1  # [C], which one each token is in
        sizes = np.bincount(unit)
        order = rng.permutation(len(sizes))
        first = sizes[order].cumsum() - sizes[order]
        distance = (first - rng.integers(len(places))) % len(places)  # from where the arc begins
        chosen = order[distance < count]
        if not len(chosen):
            chosen = rng.integers(len(sizes), size=1)
        fates = np.full(len(sizes), -1.0)
        fates[chosen] = rng.random(len(chosen))
        fates = fates[unit]
        return places[fates >= 0], fates[fates >= 0]

    def _begins(self, tokens: np.ndarray, adjacent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[C] tokens -> [C] whether a unit begins there."""
        begins = np.ones(len(tokens), bool)
        if self.masking.whole_words:
            begins = ~(self._continues[tokens] & adjacent)
        if self._words:
            _join_words(self._words, tokens, adjacent, begins)
        if self.masking.longest > 1:
            words = np.flatnonzero(begins)
            steps = self._likelihood.searchsorted(rng.random(len(words)), "right") + 1
            first = np.zeros(len(words) + self.masking.longest, bool)
            first[np.append(0, steps.cumsum()).clip(max=len(words))] = True
            begins[words] = first[: len(words)] | ~adjacent[words]
        return begins


def ordinary_tokens(tokenizer: WordPieceTokenizer) -> np.ndarray:
    """[V] whether an id is an entry that text may have: there is one, and it is not special"""
    entries = tokenizer.inner.get_vocab()
    ordinary = np.zeros(max(entries.values()) + 1, bool)
    ordinary[list(entries.values())] = True
    ordinary[[entries[token] for token in SPECIAL]] = False
    ordinary[[i for i, token in tokenizer.inner.get_added_tokens_decoder().items() if token.special]] = False
    if not ordinary.any():
        raise InputError("tokenizer: expected a vocabulary with words in it, got special tokens alone")
    return ordinary


def continuing_pieces(tokenizer: WordPieceTokenizer) -> np.ndarray:
    """[V] whether an id is a piece that goes on with a word, as ##ing"""
    entries, prefix = tokenizer.inner.get_vocab(), tokenizer.inner.model.continuing_subword_prefix
    continues = np.zeros(max(entries.values()) + 1, bool)
    continues[[i for token, i in entries.items() if token.startswith(prefix)]] = True
    return continues


def _check(masking: Masking) -> None:
    rate, masked, random, _, longest = masking
    if not 0 < rate <= 1:
        raise InputError(f"rate = {rate}: expected a share of the tokens, more than 0 and at most 1")
    if not (masked >= 0 and random >= 0 and masked + random <= 1 + 1e-9):
        raise InputError(f"masked = {masked}, random = {random}: expected shares of the hidden, at most 1 together")
    if type(longest) is not int or longest < 1:
        raise InputError(f"longest = {longest!r}: expected a whole number of words, at least 1")


def _tree(tokenizer: WordPieceTokenizer, words: Sequence[str]) -> dict[int, Any]:
    """Words of two tokens or more, each of one character -> id of the first -> of the second -> … -> an end"""
    entries = tokenizer.inner.get_vocab()
    single = {i for token, i in entries.items() if len(token) == 1}
    tree: dict[int, Any] = {}
    for encoding in tokenizer.inner.encode_batch_fast(check_texts("words", words), add_special_tokens=False):
        if len(encoding.ids) > 1 and single.issuperset(encoding.ids):
            node = tree
            for token in encoding.ids:
                node = node.setdefault(token, {})
            node[_END] = {}
    if not tree:
        raise InputError(
            f"words: expected words of two characters or more, each of which is a token, as in Chinese; none of the "
            f"{len(words)} is such a word"
        )
    return tree


def _join_words(tree: dict[int, Any], tokens: np.ndarray, adjacent: np.ndarray, begins: np.ndarray) -> None:
    """Let no unit begin inside a word. A token whose word goes on with ## is no character of its own."""
    alone = begins.copy()
    alone[:-1] &= begins[1:]
    symbols, follows = np.where(alone, tokens, -1).tolist(), adjacent.tolist()
    inside: list[int] = []
    place, last = 0, len(symbols)
    while place < last:
        node, here, end = tree.get(symbols[place]), place + 1, place + 1
        while node is not None:
            if _END in node:
                end = here
            node = node.get(symbols[here]) if here < last and follows[here] else None
            here += 1
        inside.extend(range(place + 1, end))
        place = end
    begins[inside] = False
