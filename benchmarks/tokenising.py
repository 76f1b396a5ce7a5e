"""Texts to lists of ids: `WordPieceTokenizer.rows` against `tokenizers`, transformers, and a memo of words, CPU.

    python benchmarks/tokenising.py [--rounds N] [--megabytes N] [--texts N] [--vocabulary DIRECTORY] [--data DIRECTORY]

Texts: paragraphs of English books, lines of classical Chinese, blocks of the standard library's source code, and a mix
of the three, in calls of --texts texts; 0: all in one call. The vocabulary is one of Google's, a directory of
DATA/vocab. All run in one process, in turn, on ids that were found equal. MB/s is the median over the rounds, of UTF-8;
a ratio is the median of each round's ratio: > 1 is faster than `encode_batch`, or than `rows`. CPU is the ratio to
`rows` in processor time, which other work on the machine disturbs less, and which tells what more cores would change:
the library's threads use them all, a memo in Python has one.

The memo is not part of hubmodels: it is measured here to say why. Chunks between white space are looked up in a bounded
dict, those of a call that are not there are encoded together and remembered. Cold: empty before each round.
"""

import argparse
import lzma
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubmodels.tokenizers import SEP, WordPieceTokenizer

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
JOINED = 64  # chunks in one text for the library: each text has a cost of its own
LONGEST, ENTRIES = 32, 2**18  # of a chunk that is remembered, of the memo
ODD = re.compile("[\x0b\x0c\x1c-\x1f\x85]")  # white space to Python; to BERT control characters, which join words
Rows = list[list[int]]


class Memo:
    """Ids of chunks. Only for BERT's own normaliser and pre-tokeniser, and added tokens without white space."""

    def __init__(self, tokenizer: WordPieceTokenizer):
        self.inner, self.cls, self.sep = tokenizer.inner, tokenizer.cls_token_id, tokenizer.sep_token_id
        self.known: dict[str, list[int]] = {}

    def rows(self, texts: list[str]) -> Rows:
        parts = [self._parted(text) for text in texts]
        known, words = self.known, set().union(*parts)
        if fresh := list(words.difference(known)):
            found = dict(self._encode(fresh))
            if len(known) + len(fresh) > ENTRIES:
                self.known = {}
            self.known.update((word, ids) for word, ids in found.items() if len(word) <= LONGEST)
            known = {word: found[word] if word in found else known[word] for word in words}
        return [[self.cls, *chain.from_iterable(map(known.__getitem__, part)), self.sep] for part in parts]

    @staticmethod
    def _parted(text: str) -> list[str]:
        """Its chunks; the text itself where they are long, as in Chinese, or may join words"""
        parts = text.split()
        return [text] if ODD.search(text) or sum(map(len, parts)) > 16 * len(parts) else parts

    def _encode(self, words: list[str]) -> Iterable[tuple[str, list[int]]]:
        """Many words in one text, parted by [SEP]. Where a word has one itself, each word alone."""
        short, long = [w for w in words if len(w) <= LONGEST], [w for w in words if len(w) > LONGEST]
        groups = [short[begin : begin + JOINED] for begin in range(0, len(short), JOINED)] + [[w] for w in long]
        texts, found = [f" {SEP} ".join(group) for group in groups], []
        for group, encoded in zip(groups, self.inner.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids, pieces, begin = [*encoded.ids, self.sep], [], 0
            while begin < len(ids):
                end = ids.index(self.sep, begin)
                pieces.append(ids[begin:end])
                begin = end + 1
            if len(pieces) != len(group):
                pieces = [e.ids for e in self.inner.encode_batch_fast(group, add_special_tokens=False)]
            found += zip(group, pieces, strict=True)
        return found


def first(texts: Iterable[str], size: int) -> list[str]:
    """The first of them, `size` bytes of UTF-8 or a little more"""
    found, total = [], 0
    for text in filter(str.strip, texts):
        found.append(text)
        total += len(text.encode())
        if total >= size:
            break
    return found


def read_texts(data: Path, size: int) -> dict[str, list[str]]:
    """Kind -> texts. Of the books paragraphs from all over, not those of one author."""
    with lzma.open(data / "text" / "english_books.txt.xz", "rt", encoding="utf-8") as file:
        english = file.read().split("\n\n")
    with lzma.open(data / "text" / "classical_chinese.txt.xz", "rt", encoding="utf-8") as file:
        chinese = file.read().split("\n")
    random.Random(0).shuffle(english)
    random.Random(0).shuffle(chinese)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = chain.from_iterable(path.read_text(encoding="utf-8", errors="replace").split("\n\n") for path in files)
    texts = {"English": first(english, size), "Chinese": first(chinese, size), "Python": first(code, size)}
    mixed = [text for kind in texts.values() for text in first(kind, size // 3)]
    random.Random(0).shuffle(mixed)
    return texts | {"mix": mixed}


def make_systems(path: Path) -> dict[str, Callable[[list[str]], Rows]]:
    """Name -> texts to rows of ids, [CLS] and [SEP] included. The two memos are one, emptied before a cold run."""
    from transformers import utils
    from transformers.models.bert.tokenization_bert import BertTokenizerFast, load_vocab

    utils.logging.set_verbosity_error()
    ours = WordPieceTokenizer.from_vocab(path)
    theirs = BertTokenizerFast(vocab=load_vocab(path), do_lower_case=ours.inner.normalizer.lowercase)
    memo = Memo(ours)
    return {
        "transformers": lambda texts: theirs(texts)["input_ids"],
        "encode_batch": lambda texts: [encoded.ids for encoded in ours.inner.encode_batch(texts)],
        "rows": ours.rows,
        "memo, cold": memo.rows,
        "memo, warm": memo.rows,
    }


def timed(system: Callable[[list[str]], Rows], calls: list[list[str]]) -> tuple[float, float, Rows]:
    """Seconds, seconds of processor time, rows"""
    rows: Rows = []
    begun, used = time.perf_counter(), time.process_time()
    for texts in calls:
        rows += system(texts)
    return time.perf_counter() - begun, time.process_time() - used, rows


def compare(systems: dict[str, Callable[[list[str]], Rows]], calls: list[list[str]], rounds: int) -> None:
    """Prints one line a system. The first round warms up and finds the ids equal."""
    size = sum(len(text.encode()) for texts in calls for text in texts) / 1e6
    wall: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    expected = None
    for turn in range(rounds + 1):
        for name, system in systems.items():
            if name == "memo, cold":
                system.__self__.known = {}  # type: ignore[attr-defined]
            seconds, used, rows = timed(system, calls)
            expected = rows if expected is None else expected
            if rows != expected:
                raise SystemExit(f"{name}: other ids than {next(iter(systems))}")
            if turn:
                wall[name].append(seconds)
                cpu[name].append(used)

    def ratio(found: dict[str, list[float]], other: str, name: str) -> float:
        return median(o / s for o, s in zip(found[other], found[name], strict=True))

    for name in systems:
        to_library, to_rows, of_cpu = (
            ratio(wall, "encode_batch", name),
            ratio(wall, "rows", name),
            ratio(cpu, "rows", name),
        )
        print(f"  {name:14}{size / median(wall[name]):6.2f}{to_library:14.2f}{to_rows:8.2f}{of_cpu:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=1)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--vocabulary", default="bert-base-uncased")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    systems = make_systems(options.data / "vocab" / options.vocabulary / "vocab.txt")
    for kind, texts in read_texts(options.data, int(options.megabytes * 1e6)).items():
        step = options.texts or len(texts)
        calls = [texts[begin : begin + step] for begin in range(0, len(texts), step)]
        print(f"{kind}, {options.vocabulary}: {len(texts)} texts in {len(calls)} calls, {options.rounds} rounds")
        print("                  MB/s  x encode_batch  x rows  CPU")
        compare(systems, calls, options.rounds)


if __name__ == "__main__":
    main()
