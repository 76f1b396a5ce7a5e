"""Sentences -> token ids on the disk: which ids, when they are made anew, and what a process that is stopped leaves."""

import gzip
import json
import lzma
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path

import filelock
import numpy as np
import pytest
import tokenizers

from hubmodels import bertTokenizer, gptTokenizer
from hubmodels.errors import InputError
from hubmodels.tokenizers import SPECIAL, BytePairTokenizer, WordPieceTokenizer
from hubmodels.training import corpus as module
from hubmodels.training.corpus import Corpus, prepare
from hubmodels.training.text import TextOptions, read_sentences

TEXT = "The first sentence.\nThe second one, naïve.\n\nAnother document: 書。\n\x01\n\n\x01\n\n\x02\x03\nLast words.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return bertTokenizer("bert-nano")


@pytest.fixture(scope="module")
def byte_pairs():
    return gptTokenizer("gpt-nano")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def vocabulary(path: Path, *words: str) -> WordPieceTokenizer:
    """[PAD] is 0, the first of the words is 5."""
    path.write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    return WordPieceTokenizer.from_vocab(path)


def documents_of(corpus: Corpus) -> list[list[list[int]]]:
    """Documents of sentences of ids"""
    borders = corpus.documents.tolist()
    return [[corpus.tokens(n, n + 1).tolist() for n in range(first, end)] for first, end in pairwise(borders)]


def same(one: Corpus, other: Corpus) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("ids", "sentences", "documents"))


def arrays(corpus: Corpus) -> list[list[int]]:
    return [getattr(corpus, name).tolist() for name in ("ids", "sentences", "documents")]


def left(cache: Path) -> list[str]:
    """Names in the cache, without locks"""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def state(directory: Path) -> dict[str, tuple[int, int]]:
    """What would show that something was written"""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


# what is in a corpus


def test_tokens_are_those_of_each_sentence_by_itself(write, cache, tokenizer):
    corpus = prepare([write(TEXT)], tokenizer, TextOptions(), cache)
    expected = [["The first sentence.", "The second one, naïve."], ["Another document: 書。"], ["Last words."]]
    ids = [[tokenizer.inner.encode(s, add_special_tokens=False).ids for s in document] for document in expected]
    assert documents_of(corpus) == ids
    assert corpus.ids.tolist() == corpus.tokens(0, 4).tolist() == list(chain(*chain(*ids)))
    assert (corpus.ids.dtype, corpus.sentences.dtype, corpus.documents.dtype) == (np.uint16, np.int64, np.int64)
    assert isinstance(corpus.ids.base, np.memmap)


def test_everything_is_counted(write, cache, tokenizer):
    one, two = write(TEXT, "one.txt"), write(gzip.compress(TEXT.encode()), "two.gz")
    about = prepare([one, two], tokenizer, TextOptions(), cache).about
    kept = ["The first sentence.", "The second one, naïve.", "Another document: 書。", "Last words."]
    tokens = sum(len(tokenizer.inner.encode(s, add_special_tokens=False).ids) for s in kept)
    assert about["tokens"] == 2 * tokens
    assert (about["sentences"], about["documents"], about["dropped"]) == (8, 6, 6)
    assert about["text_bytes"] == 2 * (len("".join(kept).encode()) + 4)
    assert about["options"] == TextOptions()._asdict()
    sizes = [file.stat().st_size for file in (one, two)]
    assert [(file["name"], file["size"]) for file in about["files"]] == [(str(one), sizes[0]), (str(two), sizes[1])]
    assert about["files"][0]["sha256"] == module._digest_of(one)
    assert len(about["digest"]) == len(about["tokenizer"]) == 64


@pytest.mark.parametrize("part", [1, 100, 1 << 18])
@pytest.mark.parametrize("ahead", [1, 3])
def test_it_does_not_show_what_was_encoded_together(write, cache, tokenizer, byte_pairs, part, ahead, monkeypatch):
    path = write(TEXT * 5)
    expected = [arrays(prepare([path], t, TextOptions(), cache / "one")) for t in (tokenizer, byte_pairs)]
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr(module, "_AHEAD", ahead)
    assert [arrays(prepare([path], t, TextOptions(), cache / "two")) for t in (tokenizer, byte_pairs)] == expected


def test_byte_pairs_have_line_feeds_and_an_end_after_each_document(write, cache, byte_pairs):
    corpus = prepare([write(TEXT.replace("\x01\n", ""))], byte_pairs, TextOptions(), cache)
    end = byte_pairs.end_token_id
    texts = [[byte_pairs.decode(sentence) for sentence in document] for document in documents_of(corpus)]
    assert texts == [
        ["The first sentence.\n", "The second one, naïve.\n", "<|endoftext|>"],
        ["Another document: 書。\n", "<|endoftext|>"],
        ["\x02\x03\n", "Last words.\n", "<|endoftext|>"],
    ]
    assert (corpus.ids == end).sum() == corpus.about["documents"] == 3
    assert corpus.about["sentences"] == 8
    assert corpus.about["text_bytes"] == len("".join(s for text in texts for s in text[:-1]).encode())


def test_byte_pairs_without_an_end_token_have_none(write, cache):
    # Letters as GPT's vocabulary has them: lower-cased, the last of a word marked.
    letters = {"<unk>": 0, **{letter: n for n, letter in enumerate(["a", "b", "a</w>", "b</w>"], 1)}}
    paths = write(json.dumps(letters), "vocab.json"), write("#version: 0.2\n", "merges.txt")
    old = BytePairTokenizer.from_files(*paths)
    corpus = prepare([write("ab\n\x01\n\n\x01\n\nB a\n")], old, TextOptions(), cache)
    assert documents_of(corpus) == [[[1, 4]], [[4, 3]]]
    assert corpus.about["dropped"] == 2


SENTENCES = [
    *(
        "The first.",
        "naïve Ⅷ café",
        "書は 学而时习之。",
        "a\u0301 ﬁ \u2028 \xa0x",
        "😀 ok",
        "\x01",
        " ",
        "  led ",
        "##s",
        "[UNK]",
    ),
    *("[PAD] a[MASK]b", "[SE", "P]", "[", "]", "[sep]", "[CLS] [SEP", "SEP]", "<|endoftext", "|>", "<|", "ENDOFTEXT|>"),
    *(f"word{n} Number {n}." for n in range(200)),
]


@pytest.mark.parametrize("together", [1, 50, 1 << 12])
@pytest.mark.parametrize("kind", ["word pieces", "more words", "byte pairs", "spaced byte pairs"])
def test_sentences_that_are_one_text_to_the_library_have_the_same_ids(
    tokenizer, byte_pairs, together, kind, monkeypatch
):
    monkeypatch.setattr(module, "_JOINED", together)
    if kind == "more words":
        tokenizer, _ = tokenizer.with_words(["zyzzyva", "led"])
    elif kind != "word pieces":
        tokenizer = pickle.loads(pickle.dumps(byte_pairs))
        tokenizer.inner.pre_tokenizer.add_prefix_space = kind != "byte pairs"
    encoder = module._Encoder(tokenizer)
    assert encoder.parts
    ids, lengths = encoder._joined(SENTENCES, sum(map(len, SENTENCES)))
    each = [tokenizer.inner.encode(sentence, add_special_tokens=False).ids for sentence in SENTENCES]
    assert lengths.tolist() == list(map(len, each))
    assert ids.tolist() == list(chain(*each))


@pytest.mark.parametrize("separator", ["[SEP]", "<|endoftext|>"])
def test_a_separator_that_is_text_is_what_the_tokenizer_makes_of_it(write, cache, tokenizer, byte_pairs, separator):
    text = f"One {separator} two.\nThree.\n\n{separator}\n{separator}Four."
    for mine, end, last in ((tokenizer, "", []), (byte_pairs, "\n", [[byte_pairs.end_token_id]])):
        encode = mine.inner.encode
        each = [
            [encode(sentence + end, add_special_tokens=False).ids for sentence in document.split("\n")] + last
            for document in text.split("\n\n")
        ]
        assert documents_of(prepare([write(text)], mine, TextOptions(), cache)) == each


def test_a_tokenizer_that_would_tell_joined_sentences_is_given_each(tmp_path, write, cache):
    words = vocabulary(tmp_path / "vocab.txt", "▁one", "one", "two")
    words.inner.normalizer = None
    words.inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    assert not module._Encoder(words).parts
    assert prepare([write("one\none\n")], words, TextOptions(), cache).ids.tolist() == [5, 5]


def test_a_separator_that_comes_out_of_a_text_parts_nothing(tmp_path):
    words = vocabulary(tmp_path / "vocab.txt", "a", "one")
    words.inner.normalizer = tokenizers.normalizers.Replace("two", "[SEP]")
    words.inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    encoder = module._Encoder(words)
    assert not encoder.parts
    encoder.parts = True
    encoded = encoder.encode(module._Part(["one two one", "one"], [1]))
    assert (encoded.ids.tolist(), encoded.lengths.tolist()) == ([6, 3, 6, 6], [3, 1])


@pytest.mark.parametrize(("largest", "kind"), [(65535, np.uint16), (65536, np.int32)])
def test_ids_are_small_where_the_vocabulary_is(tmp_path, write, cache, largest, kind):
    words = vocabulary(tmp_path / "vocab.txt", *(f"w{n}" for n in range(5, largest + 1)))
    corpus = prepare([write(f"w5 w{largest}")], words, TextOptions(), cache)
    assert corpus.ids.tolist() == [5, largest]
    assert corpus.ids.dtype == kind


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text.xz", "text.jsonl", "text.jsonl.gz", "text.jsonl.xz"])
def test_a_corpus_is_the_same_whatever_the_text_is_packed_in(write, cache, tokenizer, name):
    plain = "One.\nTwo.\n\nThree.\n"
    content = "\n".join(json.dumps({"text": text}) for text in plain.split("\n\n")) if "jsonl" in name else plain
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    packed = prepare([write(pack(content.encode()), name)], tokenizer, TextOptions(), cache)
    assert same(packed, prepare([write(plain, "plain.txt")], tokenizer, TextOptions(), cache))


def test_held_out_documents_and_the_others_are_all(write, cache, tokenizer):
    path = write("\n\n".join(f"Document {n}.\nIts text {n}." for n in range(300)))
    sides = [prepare([path], tokenizer, TextOptions(share=0.2, held_out=side), cache) for side in (True, False)]
    every = documents_of(prepare([path], tokenizer, TextOptions(), cache))
    assert sorted(documents_of(sides[0]) + documents_of(sides[1])) == sorted(every)
    assert 30 < sides[0].about["documents"] < 90


def test_a_corpus_is_mapped_late_and_pickles_as_its_directory(write, cache, tokenizer):
    corpus = prepare([write(TEXT)], tokenizer, TextOptions(), cache)
    assert set(vars(corpus)) == {"directory"}
    assert corpus.ids.size
    assert corpus.sentences.size
    assert len(pickle.dumps(corpus)) < 500
    other = pickle.loads(pickle.dumps(corpus))
    assert set(vars(other)) == {"directory"}
    assert same(other, corpus)
    assert other.about == corpus.about
    assert same(Corpus.open(str(corpus.directory)), corpus)


# when it is made anew


def test_the_same_again_writes_nothing(write, cache, tokenizer):
    path = write(TEXT)
    first = prepare([path], tokenizer, TextOptions(), cache)
    (first.directory / "chunks.npy").write_bytes(b"what others keep there")
    before = state(cache)
    os.utime(path, (1, 1))
    moved = path.rename(path.with_name("moved.txt"))
    again = prepare([str(moved)], pickle.loads(pickle.dumps(tokenizer)), TextOptions(), str(cache))
    assert again.directory == first.directory
    assert state(cache) == before


def test_overwrite_makes_it_anew(write, cache, tokenizer):
    first = prepare([write(TEXT)], tokenizer, TextOptions(), cache)
    (first.directory / "chunks.npy").write_bytes(b"made of the old ones")
    content, before = arrays(first), state(first.directory)
    again = prepare([write(TEXT)], tokenizer, TextOptions(), cache, overwrite=True)
    assert arrays(again) == content == arrays(first)  # whoever has mapped the old ones keeps them
    assert not set(state(again.directory).values()) & set(before.values())
    assert left(cache) == [first.directory.name]
    assert not (again.directory / "chunks.npy").exists()


def test_any_difference_makes_another(tmp_path, write, cache, tokenizer):
    text = "alpha\n\nbeta\n\ngamma\n\nalpha beta\n\nbeta alpha\n\nbeta gamma\n\ngamma beta\n"
    one, two = write(text, "one.txt"), write("gamma\n", "two.txt")
    words = vocabulary(tmp_path / "vocab.txt", "alpha", "beta", "gamma")
    options = TextOptions()

    def directory(files, tokenizer=words, **changed) -> str:
        return prepare(files, tokenizer, options._replace(**changed), cache).directory.name

    names = [
        directory([one]),
        directory([one, two]),
        directory([two, one]),
        directory([one, one]),
        directory([write(text.replace("alpha\n", "alpha!\n"), "edited.txt")]),
        directory([write(text[:-1], "shorter.txt")]),
        directory([one], form="lines"),
        directory([one], key="body"),
        directory([one], separator="x"),
        directory([one], share=0.1),
        directory([one], share=0.5),
        directory([one], share=0.5, held_out=True),
        directory([one], vocabulary(tmp_path / "vocab.txt", "alpha", "gamma", "beta")),
        directory([one], vocabulary(tmp_path / "vocab.txt", "alpha", "beta", "gamma", "delta")),
        directory([one], tokenizer),
    ]
    assert len(set(names)) == len(names)
    assert directory([one]) == names[0]


def test_an_edited_text_never_meets_old_ids(tmp_path, write, cache):
    words = vocabulary(tmp_path / "vocab.txt", "alpha", "beta")
    times = write("alpha\n").stat()
    assert prepare([write("alpha\n")], words, TextOptions(), cache).ids.tolist() == [5]
    path = write("beta\n\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare([path], words, TextOptions(), cache).ids.tolist() == [6]
    words = vocabulary(tmp_path / "vocab.txt", "beta", "alpha")
    assert prepare([path], words, TextOptions(), cache).ids.tolist() == [5]


def test_the_same_bytes_by_another_name_are_another_text(write, cache, tokenizer):
    line = json.dumps({"text": "One."})
    plain, objects = (prepare([write(line, n)], tokenizer, TextOptions(), cache) for n in ("a.txt", "a.jsonl"))
    assert len(plain.ids) > len(objects.ids)


def shorten(directory: Path) -> None:
    path = directory / "ids.npy"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(directory: Path) -> None:
    with open(directory / "documents.npy", "ab") as file:
        file.write(b"\0" * 8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, "ids.npy: 169 bytes, not 170"),
        (lengthen, "documents.npy: 168 bytes, not 160"),
        (lambda path: (path / "sentences.npy").unlink(), "sentences.npy: 0 bytes, not 168"),
        (lambda path: (path / "about.json").unlink(), "about.json: FileNotFoundError("),
        (lambda path: (path / "about.json").write_text("{"), "about.json: JSONDecodeError("),
        (lambda path: (path / "about.json").write_text("[]"), "about.json: TypeError("),
        (lambda path: (path / "about.json").write_text("{}"), "about.json: KeyError('sizes')"),
        (lambda path: (path / "about.json").write_text('{"sizes": 1}'), "about.json: AttributeError("),
        (lambda path: [shutil.rmtree(path), path.mkdir()], "about.json: FileNotFoundError("),
    ],
)
def test_a_damaged_one_is_refused_and_made_again(write, cache, tokenizer, damage, said):
    directory = prepare([write(TEXT)], tokenizer, TextOptions(), cache).directory
    content = arrays(Corpus.open(directory))
    damage(directory)
    with pytest.raises(InputError) as error:
        Corpus.open(directory)
    assert str(error.value).startswith(f"{directory}: expected a corpus, as `prepare` makes it: {said}")
    assert arrays(prepare([write(TEXT)], tokenizer, TextOptions(), cache)) == content
    assert left(cache) == [directory.name]


# what is left


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt(), OSError("No space left on device")])
def test_an_error_in_the_middle_leaves_nothing(write, cache, tokenizer, error, monkeypatch):
    def encode(self, part):
        if "Last" in part.sentences[0]:
            raise error
        return known(self, part)

    known = module._Encoder.encode
    monkeypatch.setattr(module, "PART", 1)
    monkeypatch.setattr(module._Encoder, "encode", encode)
    with pytest.raises((type(error), InputError)) as found:
        prepare([write(TEXT)], tokenizer, TextOptions(), cache)
    if isinstance(error, OSError):
        said = "tokens cannot be kept there: No space left on device; name another cache directory"
        assert str(found.value).endswith(said)
    assert left(cache) == []


def test_a_failure_to_overwrite_is_told_and_leaves_the_old_one(write, cache, tokenizer, monkeypatch):
    first = prepare([write(TEXT)], tokenizer, TextOptions(), cache)
    before = state(first.directory)
    monkeypatch.setattr(module._Writer, "add", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(InputError, match="No space left on device"):
        prepare([write(TEXT)], tokenizer, TextOptions(), cache, overwrite=True)
    assert state(first.directory) == before
    assert left(cache) == [first.directory.name]


def fork(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def killed_in_the_middle(files: list[Path], tokenizer, cache: Path) -> None:
    """For a process of its own"""
    known, module.PART = module._Writer.add, 1

    def add(self, encoded):
        if self.sentences == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        known(self, encoded)

    module._Writer.add = add
    prepare(files, tokenizer, TextOptions(), cache)


def test_a_process_that_is_killed_leaves_nothing_that_stays(write, cache, tokenizer):
    one, other = write(TEXT), write(TEXT + "more", "other.txt")
    for path in (one, other):
        process = fork(killed_in_the_middle, [path], tokenizer, cache)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in left(cache)] == [True]  # the second removed what the first had left
    corpus = prepare([one], tokenizer, TextOptions(), cache)
    assert corpus.about["sentences"] == 4
    assert left(cache) == [corpus.directory.name]


def test_what_a_living_process_is_making_is_not_removed(write, cache, tokenizer):
    cache.mkdir()
    for name in ("alive", "dead"):
        (cache / f".{name}.0123abcd.partial").mkdir()
        (cache / f".{name}.0123abcd.gone").mkdir()
    with filelock.FileLock(cache / ".alive.lock"):
        corpus = prepare([write(TEXT)], tokenizer, TextOptions(), cache)
        assert left(cache) == [".alive.0123abcd.gone", ".alive.0123abcd.partial", corpus.directory.name]
    prepare([write(TEXT)], tokenizer, TextOptions(), cache, overwrite=True)
    assert left(cache) == [corpus.directory.name]


def prepared_at_once(path: Path, tokenizer, cache: Path, barrier, answers) -> None:
    """For a process of its own"""
    known, made = module._Text.write, []

    def write(self, *arguments):
        made.append(True)
        known(self, *arguments)

    module._Text.write = write
    barrier.wait(60)
    corpus = prepare([path], tokenizer, TextOptions(), cache)
    answers.put((len(made), arrays(corpus), corpus.directory.stat().st_ino))


def at_once(path: Path, tokenizer, cache: Path) -> list[tuple[int, list[list[int]], int]]:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [fork(prepared_at_once, path, tokenizer, cache, barrier, answers) for _ in range(3)]
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return found


def test_of_processes_at_once_one_makes_it(write, cache, tokenizer):
    found = at_once(write(TEXT * 50), tokenizer, cache)
    assert sorted(made for made, _, _ in found) == [0, 0, 1]
    assert all(answer[1:] == found[0][1:] for answer in found)
    assert len(left(cache)) == 1


def test_processes_at_once_agree_where_locks_hold_nobody_up(write, cache, tokenizer, monkeypatch):
    monkeypatch.setattr(filelock, "FileLock", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "_clear", lambda cache: None)
    found = at_once(write(TEXT * 50), tokenizer, cache)
    assert all(answer[1] == found[0][1] for answer in found)
    assert len(left(cache)) == 1


# errors


def refused(files, tokenizer, cache: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        prepare(files, tokenizer, TextOptions(**options), cache)
    assert not cache.is_dir() or left(cache) == []
    return str(error.value)


def test_no_files_and_files_that_are_not_there_are_refused(tmp_path, write, cache, tokenizer):
    assert refused([], tokenizer, cache) == "files: expected at least one file of text, got none"
    missing = tmp_path / "none.txt"
    said = "expected a file of text that can be read: [Errno 2] No such file or directory: "
    assert refused([write(TEXT), missing], tokenizer, cache) == f"{missing}: {said}'{missing}'"
    assert f"{tmp_path}: expected a file of text that can be read: " in refused([tmp_path], tokenizer, cache)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "\n\n", "\x01\n\x02\n"])
def test_text_without_a_token_is_refused(write, cache, tokenizer, content):
    path = write(content)
    said = f"{path}: expected text of at least one token, got none, read with TextOptions(form='lines', "
    assert said in refused([path], tokenizer, cache, form="lines")


def test_a_share_that_holds_out_nothing_is_refused(write, cache, tokenizer):
    assert "share=1e-09, held_out=True" in refused([write(TEXT)], tokenizer, cache, share=1e-9, held_out=True)


def test_bad_text_and_bad_options_are_refused(write, cache, tokenizer):
    good, bad = write(TEXT), write(b"One.\n\xff\n", "bad.txt")
    assert f"{bad}: line 2, byte 5: expected UTF-8, got the byte 0xff" in refused([good, bad], tokenizer, cache)
    assert "form = 'poems'" in refused(["none.txt"], tokenizer, cache, form="poems")


def test_a_text_that_is_edited_while_it_is_read_is_refused(write, cache, tokenizer, monkeypatch):
    path = write(TEXT)

    def edited(*arguments):
        yield from read_sentences(*arguments)
        with open(path, "a") as file:
            file.write("more")

    monkeypatch.setattr(module, "read_sentences", edited)
    assert refused([path], tokenizer, cache) == f"{path}: changed while it was read; prepare it again"


def test_a_cache_that_cannot_be_is_refused(write, tmp_path, tokenizer):
    place = write("a file", "cache")
    with pytest.raises(InputError) as error:
        prepare([write(TEXT)], tokenizer, TextOptions(), place)
    assert str(error.value).startswith(f"{place}{os.sep}")
    assert "tokens cannot be kept there: [Errno 17]" in str(error.value)
    assert str(error.value).endswith("; name another cache directory")


# progress


class Terminal:
    """Standard error of somebody who looks"""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["text.txt", "text.xz"])
def test_a_bar_counts_bytes_of_the_file_on_a_terminal_and_nowhere_else(
    write, cache, tokenizer, name, monkeypatch, capsys
):
    content = "\n".join(f"Sentence {number}." for number in range(5000)).encode()
    path = write(lzma.compress(content) if name.endswith("xz") else content, name)
    prepare([path], tokenizer, TextOptions(), cache, progress=True)
    assert capsys.readouterr() == ("", "")
    for progress in (False, True):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        prepare([path], tokenizer, TextOptions(), cache, overwrite=True, progress=progress)
        assert ("100%" in terminal.text, "B/s" in terminal.text) == (progress, progress)
