"""Files of text to tokens on the disk: `prepare` against `encode_batch_fast` of the same sentences in memory.

    python benchmarks/preparing.py --text FILE [--form FORM] [--megabytes N] [--rounds N] [--vocabulary FILE]

FILE is read over and over until there are N MB of text, in a file of its own, as it is and packed. `encode_batch_fast`
gets all sentences in one call, or as many at a time as `prepare` gives it; nothing is made of what it returns. All run
in one process, in turn, on all cores. MB/s is the median over the rounds; a ratio is the median of each round's ratio,
with the least and the most: > 1 is faster than the library alone. CPU is the ratio to it in parts in processor time,
which other work on the machine disturbs less: the library alone leaves cores idle, so it may be less than the first.

Memory is what a process of its own needed at most, by getrusage, before it prepared that text and after. --rounds 0
measures memory alone.
"""

import argparse
import gzip
import itertools
import lzma
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hubmodels.tokenizers import WordPieceTokenizer
from hubmodels.training.corpus import PART, prepare
from hubmodels.training.text import FORMS, TextOptions, read_sentences

VOCABULARY = Path(__file__).resolve().parent.parent / "hubmodels" / "weights" / "bert-nano" / "vocab.txt"


def write_text(source: Path, path: Path, size: int) -> None:
    """`size` bytes of the lines of `source`, over and over, in memory that does not depend on it"""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(source.suffix, open)
    with open(path, "wb") as file:
        while size > 0:
            with opener(source, "rb") as lines:
                for line in lines:
                    file.write(line)
                    size -= len(line)
                    if size <= 0:
                        break


def in_parts(sentences: list[str]) -> list[list[str]]:
    """As many characters in each as `prepare` takes"""
    parts: list[list[str]] = [[]]
    size = 0
    for sentence in sentences:
        if size >= PART:
            parts.append([])
            size = 0
        parts[-1].append(sentence)
        size += len(sentence)
    return parts


def make_systems(path: Path, tokenizer: WordPieceTokenizer, form: str) -> dict[str, Callable[[], int]]:
    """Name -> what is timed; it returns the number of tokens."""
    options = TextOptions(form)
    sentences = [sentence for sentence in read_sentences(path, options) if sentence]
    parts = in_parts(sentences)

    def encode(calls: list[list[str]]) -> int:
        encode = tokenizer.inner.encode_batch_fast
        return sum(sum(map(len, encode(call, add_special_tokens=False))) for call in calls)

    def make(file: Path) -> int:
        return prepare([file], tokenizer, options, path.parent, overwrite=True).about["tokens"]

    packed = path.with_suffix(".xz")  # which takes longer to unpack than .gz
    with open(path, "rb") as plain, lzma.open(packed, "wb") as file:
        shutil.copyfileobj(plain, file)
    systems: dict[str, Callable[[], int]] = {
        "encode_batch_fast": lambda: encode([sentences]),
        "it in parts": lambda: encode(parts),
    }
    return systems | {"prepare text.txt": lambda: make(path), "prepare text.xz": lambda: make(packed)}


def compare(systems: dict[str, Callable[[], int]], rounds: int, size: float) -> None:
    """Prints one line a system. The first round warms up, and finds as many tokens by each."""
    wall: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    expected = next(iter(systems.values()))()
    for turn in range(rounds + 1):
        for name, system in systems.items():
            begun, used = time.perf_counter(), time.process_time()
            found = system()
            if found != expected:
                raise SystemExit(f"{name}: {found} tokens, not {expected}")
            if turn:
                wall[name].append(time.perf_counter() - begun)
                cpu[name].append(time.process_time() - used)

    def ratio(found: dict[str, list[float]], other: str, name: str) -> str:
        ratios = [o / s for o, s in zip(found[other], found[name], strict=True)]
        return f"{median(ratios):10.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    whole, parts = itertools.islice(systems, 2)
    print(f"{'':20}  MB/s  x encode_batch_fast       x it in parts                 CPU")
    for name in systems:
        line = f"{name:20}{size / median(wall[name]):6.2f}"
        print(line + ratio(wall, whole, name) + ratio(wall, parts, name) + ratio(cpu, parts, name))


def peak() -> float:
    """MB that this process has needed at most"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure_memory(path: Path, vocabulary: Path, form: str) -> None:
    """Prints a line. In a process of its own, since a peak is never forgotten."""
    tokenizer, before = WordPieceTokenizer.from_vocab(vocabulary), peak()
    corpus = prepare([path], tokenizer, TextOptions(form), path.parent, overwrite=True)
    size = path.stat().st_size / 1e6
    print(f"{size:.0f} MB of text, {corpus.about['tokens']:,} tokens: {peak():.0f} MB at most, {before:.0f} MB before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--form", choices=FORMS, default="running")
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY)
    parser.add_argument("--memory-of", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    options = parser.parse_args()
    if options.memory_of:
        return measure_memory(options.text, options.vocabulary, options.form)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "text.txt"
        write_text(options.text, path, int(options.megabytes * 1e6))
        # Before anything is in memory: a child begins with the peak of its parent.
        call = [sys.executable, __file__, "--memory-of", "--text", path, "--vocabulary", options.vocabulary]
        subprocess.run([*call, "--form", options.form], check=True)
        if options.rounds:
            tokenizer = WordPieceTokenizer.from_vocab(options.vocabulary)
            compare(make_systems(path, tokenizer, options.form), options.rounds, options.megabytes)


if __name__ == "__main__":
    main()
