"""Which tokens of a corpus stand together: neighbouring sentences of one document, found in one pass over the borders.

The table of a length is kept beside the corpus, mapped: a run that goes on computes nothing. For 2.5 billion tokens it
is some hundred megabytes on the disk, made in memory that does not grow with the text.
"""

from collections.abc import Iterator

import numpy as np

from .arrays import MappedArray, kept_array
from .corpus import Corpus

VERSION = 1  # of what is in a table: another one does not read what this one wrote
_BLOCK = 1 << 18  # sentences that are looked at together


def chunk_table(corpus: Corpus, size: int, *, reach: bool = False) -> MappedArray:
    """[n, 2] int64, the first token of each chunk and the one after its last, in the order of the text.

    A chunk is as many sentences as fit into `size` tokens, and every token is in one. reach: as few sentences as have
    that many, or all that are left of the document; a last one of a single token goes to the chunk before it, and a
    document of a single token to none. A sentence of more than `size` tokens counts as several, about as long as each
    other.
    """
    name = f"chunks-{VERSION}-{'reach' if reach else 'fit'}-{size}.npy"
    return kept_array(corpus.directory / name, np.int64, 2, lambda: find_chunks(corpus, size, reach))


def find_chunks(corpus: Corpus, size: int, reach: bool, block: int = _BLOCK) -> Iterator[np.ndarray]:
    """The rows of `chunk_table`, those of about `block` sentences at a time."""
    sentences, documents = np.asarray(corpus.sentences), np.asarray(corpus.documents)
    block = max(block, size + 2)  # a chunk has to end in it
    begin = 0
    while begin < sentences[-1]:
        first = int(sentences.searchsorted(begin, "right")) - 1
        limits = sentences[first : first + block + 1]
        low, high = documents.searchsorted((first, first + block), "right")
        borders = _cut(limits, size)
        ends = borders.searchsorted(sentences[documents[low:high]])
        following = _following(borders, ends, size, reach)
        place = int(borders.searchsorted(begin))
        chain = borders[_chain(following.tolist(), place, whole=limits[-1] == sentences[-1])]
        begin = chain[-1]
        rows = np.stack([chain[:-1], chain[1:]], 1)
        yield rows[rows[:, 1] - rows[:, 0] > 1] if reach else rows


def _cut(limits: np.ndarray, size: int) -> np.ndarray:
    """Where sentences begin, and the last ends -> the same with borders inside those of more than `size` tokens."""
    lengths = np.diff(limits)
    parts = -(-lengths // size)
    sentence = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(sentence)) - (parts.cumsum() - parts)[sentence]
    inside = number * lengths[sentence] // parts[sentence]
    return np.append(limits[sentence] + inside, limits[-1])


def piece_end(sentences: np.ndarray, token: int, size: int) -> int:
    """The first border at `token` or after it, of a sentence or inside one of more than `size` tokens."""
    number = int(sentences.searchsorted(token))
    end = int(sentences[number])
    if end == token or (length := end - (begin := int(sentences[number - 1]))) <= size:
        return end
    parts = -(-length // size)
    return begin + -(-(token - begin) * parts // length) * length // parts


def _following(borders: np.ndarray, ends: np.ndarray, size: int, reach: bool) -> np.ndarray:
    """For each border that of the next chunk, if one begins here. ends: which borders end a document."""
    ends = np.append(ends, len(borders) - 1)
    document_end = ends[ends.searchsorted(np.arange(len(borders) - 1), "right").clip(max=len(ends) - 1)]
    starts = borders[:-1]
    if not reach:
        return np.minimum(borders.searchsorted(starts + size, "right") - 1, document_end)
    found = np.minimum(borders.searchsorted(starts + size, "left"), document_end)
    return np.where(borders[document_end] - borders[found] == 1, document_end, found)


def _chain(following: list[int], place: int, whole: bool) -> list[int]:
    """From `place` on border after border; the last one only if no text comes after it, which could be joined."""
    chain = [place]
    while (place := following[place]) < len(following):
        chain.append(place)
    return [*chain, place] if whole else chain
