"""Text -> sentences: what a line, a sentence and a document are, whatever a file is packed in, and what is refused."""

import gzip
import hashlib
import json
import lzma
import tracemalloc
from itertools import chain
from pathlib import Path

import pytest

from hubmodels.errors import InputError
from hubmodels.training import text
from hubmodels.training.text import FORMS, TextOptions, find_files, kind_of, read_sentences


def read(path: Path, form: str = "sentences", **options) -> list[list[str]]:
    """Documents, each a list of sentences"""
    documents: list[list[str]] = [[]]
    for sentence in read_sentences(path, TextOptions(form, **options)):
        if sentence is None:
            assert documents[-1] != []
            documents.append([])
        else:
            assert sentence
            documents[-1].append(sentence)
    assert documents.pop() == []  # the last one was ended too
    return documents


def flat(documents: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(documents))


# forms


def test_sentences_are_lines_and_a_blank_line_ends_a_document(write):
    path = write("\n\nOne. Two.\nthree\n \t\n\n  Four.  \n")
    assert read(path) == [["One. Two.", "three"], ["  Four.  "]]


def test_paragraphs_are_lines_of_sentences(write):
    path = write('One. Two!  Three?\n"Four." Five\n\nSix.\n')
    assert read(path, "paragraphs") == [["One.", "Two!", "Three?", '"Four."', "Five"], ["Six."]]


def test_lines_are_documents_of_one_sentence(write):
    assert read(write("One. Two.\n\nthree\n"), "lines") == [["One. Two."], ["three"]]


def test_running_text_is_joined_up_to_a_blank_line_and_a_file_is_one_document(write):
    path = write("He went to\n  the sea. It was\ngrey\n\nThe end.\n\n\nIndeed")
    assert read(path, "running") == [["He went to the sea.", "It was grey", "The end.", "Indeed"]]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ('"Where?" he asked. "There!" She left.', ['"Where?" he asked.', '"There!"', "She left."]),
        ("Mr. Bond met Mrs. Pan and Dr. No. They left.", ["Mr. Bond met Mrs. Pan and Dr. No.", "They left."]),
        ("Pi is 3.14 or so. See e.g. the book (p. 3).", ["Pi is 3.14 or so.", "See e.g. the book (p.", "3)."]),
        ("Wait... What?! (No!) “Yes.” “no.”", ["Wait...", "What?!", "(No!)", "“Yes.” “no.”"]),
        ("Он ушёл. Она осталась. Да? да", ["Он ушёл.", "Она осталась.", "Да? да"]),
        ("学而时习之。不亦说乎？子曰：「善。」又曰", ["学而时习之。", "不亦说乎？", "子曰：「善。」", "又曰"]),
        ("“你好！”他说。", ["“你好！”", "他说。"]),
        ("One.\u2028Two. Three.", ["One.", "Two.", "Three."]),
        ("no stop", ["no stop"]),
        ("...", ["..."]),
    ],
)
def test_sentences_end_at_stops_and_the_quotes_that_close_behind(write, paragraph, expected):
    assert read(write(paragraph), "paragraphs") == [expected]
    assert read(write(paragraph), "running") == [expected]


@pytest.mark.parametrize("form", FORMS)
def test_a_separator_ends_a_document_and_goes(write, form):
    path = write("One.\nTwo.\n*** END of a ***\nThree.\n")
    documents = [["One."], ["Two."], ["Three."]] if form == "lines" else [["One.", "Two."], ["Three."]]
    assert read(path, form, separator=r"\*+ END") == documents
    assert "END" in "".join(flat(read(path, form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n\u2028\n"])
def test_nothing_is_no_document(write, form, content):
    assert read(write(content), form) == []
    assert read(write("\ufeff" + content), form) == []


# lines


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line(write, separator):
    assert read(write(f"One{separator}two.\nThree.\n")) == [[f"One{separator}two.", "Three."]]


@pytest.mark.parametrize("form", FORMS)
def test_a_carriage_return_before_a_line_feed_is_none_of_the_text(write, form):
    plain, windows = "One.\nTwo.\n\nThree.", "One.\r\nTwo.\r\n\r\nThree."
    assert read(write(windows), form) == read(write(plain), form)


def test_a_byte_order_mark_is_left_out_only_in_front(write):
    assert read(write("\ufeffOne.\n\ufeffTwo.\n")) == [["One.", "\ufeffTwo."]]


@pytest.mark.parametrize("at", range(-3, 4))
def test_blocks_of_reading_show_nowhere(write, at, monkeypatch):
    monkeypatch.setattr(text, "_BUFFER", 16)
    filler = "x" * (16 + at)
    path = write(f"{filler}\r\nä€😀.\r\n\r\n{filler}é\n{filler}")
    assert read(path) == [[filler, "ä€😀."], [filler + "é", filler]]


def test_sentences_come_one_by_one(write):
    sentences = read_sentences(write("One.\nTwo.\n"), TextOptions())
    assert [next(sentences), next(sentences), next(sentences), next(sentences, "end")] == ["One.", "Two.", None, "end"]


# lines that are too long


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("letters", ["word ", "no-space", "書", "😀", "é "])
@pytest.mark.parametrize("after", ["", "\n", " \nNext.\n", f"{' ' * 5000}\nNext.\n"])
def test_a_long_line_is_cut_and_loses_nothing(write, form, letters, after, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1000)
    monkeypatch.setattr(text, "_BUFFER", 256)
    line = letters * (5003 // len(letters.encode()))
    found = read(write(f"Before.\n{line}{after}"), form)
    assert "".join("".join(flat(found)).split()) == "".join(f"Before.{line}{after}".split())
    assert max(map(len, flat(found))) <= (2200 if form == "running" else 1300)
    if form != "lines":
        assert len(found) == 1  # no cut is taken for a blank line
    if letters == "word " and form != "running":
        assert set(" ".join(flat(found)).split()) <= {"Before.", "word", "Next."}


def test_a_long_line_after_white_space_is_not_cut_there(write, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1000)
    monkeypatch.setattr(text, "_BUFFER", 256)
    line = " " + "x" * 3000
    found = read(write(f"Before.\n{line}\nAfter.\n"))
    assert len(found) == 1
    assert "".join(found[0]) == f"Before.{line}After."


def test_running_text_without_a_blank_line_is_cut_where_sentences_end(write, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1000)
    content = "".join(f"This is the\nsentence {number}.\n" for number in range(500))
    assert read(write(content), "running") == [[f"This is the sentence {number}." for number in range(500)]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", [b"A sentence of it. ", b"word", b" "])
def test_memory_does_not_grow_with_the_length_of_a_line(write, form, unit, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1 << 14)
    monkeypatch.setattr(text, "_BUFFER", 1 << 12)

    def peak_of(size: int) -> int:
        sentences = read_sentences(write(gzip.compress(unit * (size // len(unit))), "text.gz"), TextOptions(form))
        tracemalloc.start()
        for _ in sentences:
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    small, large = peak_of(100_000), peak_of(1_000_000)
    assert large < 1.2 * small
    assert large < 500_000


# files


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".GZ": gzip.compress}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["text.txt", "text", "text.v1"])
def test_a_file_is_unpacked_by_its_name(write, suffix, name):
    path = write(PACKERS[suffix]("\ufeffOne.\r\nTwo. 書\n\nThree.".encode()), name + suffix)
    assert read(path) == [["One.", "Two. 書"], ["Three."]]


def test_members_of_a_packed_file_are_read_one_after_another(write):
    for packed in (gzip.compress, lzma.compress):
        path = write(packed(b"One.\nTw") + packed(b"o.\n"), "text.gz" if packed is gzip.compress else "text.xz")
        assert read(path) == [["One.", "Two."]]


@pytest.mark.parametrize("suffix", PACKERS)
def test_objects_are_documents(write, suffix):
    lines = [{"text": "One.\n\nTwo. Three.", "id": 7}, {"text": ""}, {"id": 8, "text": "Four\r\nfive.\u2028Six."}]
    content = "\n\n".join(json.dumps(line) for line in lines) + "\n"
    path = write(PACKERS[suffix](b"\xef\xbb\xbf" + content.encode()), "text.jsonl" + suffix)
    last = "five.\u2028Six."
    assert read(path) == [["One.", "Two. Three."], ["Four", last]]
    assert read(path, "paragraphs") == [["One.", "Two.", "Three."], ["Four", "five.", "Six."]]
    assert read(path, "lines") == [["One."], ["Two. Three."], ["Four"], [last]]
    assert read(path, "running") == [["One.", "Two.", "Three."], ["Four five.", "Six."]]
    assert read(path, separator="Two") == [["One."], ["Four", last]]


def test_the_key_of_the_text_can_be_named(write):
    path = write('{"text": "One.", "body": "Two."}\n', "text.jsonl")
    assert read(path, key="body") == [["Two."]]


def test_kind_of_a_file_is_said_by_its_name():
    names = ["a.txt", "a", "a.gz", "a.JSONL", "a.jsonl.xz", "jsonl.gz", "a.jsonl.txt"]
    kinds = [(False, ""), (False, ""), (False, ".gz"), (True, ""), (True, ".xz"), (False, ".gz"), (False, "")]
    assert [kind_of(name) for name in names] == kinds


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_read_of_a_file_is_told(write, suffix):
    path = write(PACKERS[suffix](b"".join(b"Sentence %d.\n" % n for n in range(60_000))), "text" + suffix)
    told: list[int] = []
    for _ in read_sentences(path, TextOptions(), told.append):
        pass
    assert sum(told) == path.stat().st_size


# what is held out


def many(count: int = 2000) -> str:
    return "\n\n".join(f"Document {number} begins.\nIts second sentence, {number}." for number in range(count))


@pytest.mark.parametrize("form", ["sentences", "paragraphs", "lines"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_held_out_documents_are_the_share_that_was_asked_for_and_no_others(write, form, share):
    path = write(many())
    every = read(path, form)
    out, others = read(path, form, share=share, held_out=True), read(path, form, share=share)
    assert sorted(out + others) == sorted(every)
    assert [document for document in every if document in others] == others  # the order is that of the file
    assert not {tuple(d) for d in out} & {tuple(d) for d in others}
    assert len(out) == pytest.approx(share * len(every), abs=4 * (share * (1 - share) * len(every)) ** 0.5)


def test_held_out_documents_are_the_same_in_any_file_and_for_ever(write):
    out = {document[0] for document in read(write(many()), share=0.1, held_out=True)}
    backwards = write("\n\n".join(reversed(many().split("\n\n"))), "other.txt")
    assert {document[0] for document in read(backwards, share=0.1, held_out=True)} == out
    assert {document[0] for document in read(write(many()), share=0.2, held_out=True)} > out
    firsts = [f"Document {number} begins." for number in range(2000)]
    assert out == {first for first in firsts if int(hashlib.sha256(first.encode()).hexdigest()[:8], 16) / 2**32 < 0.1}


def test_documents_that_begin_alike_are_on_one_side(write):
    path = write("\n\n".join(f"Chapter I\nText {number}." for number in range(50)))
    sides = [len(read(path, share=0.5, held_out=side)) for side in (True, False)]
    assert sorted(sides) == [0, 50]


# errors


def refused(path: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        read(path, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "line", "byte", "bad"),
    [
        (b"One.\nTwo\xe4.\n", 2, 8, "0xe4"),
        (b"\xef\xbb\xbfOne.\n\n\nTw\x80o.\n", 4, 12, "0x80"),
        (b"One.\n\xff", 2, 5, "0xff"),
        (b"One. \xe6\x9b", 1, 5, "0xe6"),  # the file ends in a character
        ("One.".encode("utf-16"), 1, 0, "0xff"),
        (b"\xed\xa0\x80\n", 1, 0, "0xed"),  # half of a pair
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_utf8_is_refused_by_line_and_byte(write, content, line, byte, bad, suffix, monkeypatch):
    monkeypatch.setattr(text, "_BUFFER", 7)
    path = write(PACKERS[suffix](content), "text.txt" + suffix)
    said = "convert the file, as by iconv -f LATIN1 -t UTF-8"
    assert refused(path) == f"{path}: line {line}, byte {byte}: expected UTF-8, got the byte {bad}; {said}"


def test_bad_utf8_in_a_long_line_is_refused_by_line_and_byte(write, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1000)
    path = write(b"One.\n" + b"x" * 5000 + b"\x80" * 5000)
    assert f"{path}: line 2, byte 5005: expected UTF-8, got the byte 0x80" in refused(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected an object as JSON, got b'{': Expecting property name"),
        ('["text"]', "expected an object with text as 'text', got ['text']"),
        ('"text"', "expected an object with text as 'text', got 'text'"),
        ('{"text": null}', "expected an object with text as 'text', got None"),
        ('{"body": "One."}', "expected an object with text as 'text', got only 'body'; name the one to read"),
        ("{}", "expected an object with text as 'text', got only nothing; name the one to read"),
        (r'{"text": "\ud800"}', r"""expected an object as JSON, got b'{"text": "\\ud800"}': 'utf-8' codec can't"""),
        ("[" * 100_000, "expected an object as JSON, got b'[[[[[["),
    ],
)
def test_a_line_that_is_no_object_with_text_is_refused_by_number(write, line, said):
    path = write('{"text": "One."}\n\n' + line + "\n", "text.jsonl")
    assert f"{path}: line 3: {said}" in refused(path)


def test_bad_utf8_in_an_object_is_refused_by_line_and_byte(write):
    path = write(b'{"text": "One."}\n{"text": "Tw\xe4"}\n', "text.jsonl")
    assert f"{path}: line 2, byte 29: expected UTF-8, got the byte 0xe4" in refused(path)


def test_an_object_that_is_too_large_is_refused(write, monkeypatch):
    monkeypatch.setattr(text, "LARGEST", 1000)
    fits = json.dumps({"text": "x" * 987})
    assert len(fits) == 999
    assert read(write(fits + "\n", "text.jsonl")) == [["x" * 987]]
    path = write(f"{fits}\n[{fits}]\n", "text.jsonl")
    assert f"{path}: line 2: expected an object of at most 1,000 bytes on a line of its own, got more" in refused(path)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"One.\n", "text.gz", "expected .gz that can be read: Not a gzipped file"),
        (gzip.compress(b"One." * 1000)[:-9], "text.gz", "expected .gz that can be read: Compressed file ended"),
        (b"One.\n", "text.xz", "expected .xz that can be read: Input format not supported"),
        (lzma.compress(b"One." * 1000)[:-9], "text.xz", "expected .xz that can be read: Compressed file ended"),
        (gzip.compress(b"One." * 1000)[:20] + b"x" * 40, "text.gz", "expected .gz that can be read: "),
    ],
)
def test_a_packed_file_that_is_none_or_not_whole_is_refused(write, content, name, said):
    path = write(content, name)
    assert f"{path}: {said}" in refused(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "none.txt"
    assert refused(path) == f"{path}: expected a file that can be read: [Errno 2] No such file or directory: '{path}'"
    assert f"{tmp_path}: expected a file that can be read: " in refused(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "poems"}, "form = 'poems': expected sentences, paragraphs, lines or running"),
        ({"share": 1.0}, "share = 1.0: expected 0 or more, and less than 1"),
        ({"share": -0.1}, "share = -0.1: expected 0 or more, and less than 1"),
        ({"held_out": True}, "held_out: expected a share of the documents to hold out, got share = 0"),
        ({"separator": "("}, "separator = '(': expected a regular expression: missing )"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(options, said):
    with pytest.raises(InputError) as error:
        read_sentences("none.txt", TextOptions(**options))
    assert said in str(error.value)


# find_files


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt", "deep/a.txt", "odd[1].txt", ".hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def names(*patterns) -> list[str]:
    return [path.as_posix() for path in find_files(patterns)]


def test_files_are_found_sorted_and_once(tree):
    assert names("b.txt", "?.txt", "./a.txt", tree / "b.txt", "c.md") == ["a.txt", "b.txt", "c.md"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "deep/a.txt", "deep/er/d.txt", "odd[1].txt"]
    assert names("~/*.md") == [f"{tree.as_posix()}/c.md"]
    assert names("odd[1].txt") == ["odd[1].txt"]
    assert names("*") == ["a.txt", "b.txt", "c.md", "odd[1].txt"]  # no directory
    assert names() == []


def test_a_link_is_the_file_that_it_leads_to(tree):
    (tree / "z.txt").symlink_to("a.txt")
    assert names("a.txt", "z.txt") == ["a.txt"]


@pytest.mark.parametrize("pattern", ["*.csv", "none.txt", "deep", "none/**", ""])
def test_a_pattern_of_nothing_is_named(tree, pattern):
    with pytest.raises(InputError) as error:
        find_files(["a.txt", pattern])
    said = f"{pattern}: expected a file, or a pattern of some like texts/**/*.txt; there is none"
    assert str(error.value) == said
