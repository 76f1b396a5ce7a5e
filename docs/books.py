"""Books that stand one after another in a file -> a file each, a paragraph a line: text for `hubmodels pretrain`.

    python docs/books.py english_books.txt.xz books/

The file is of Project Gutenberg's: a book ends in a line that names it. Names of the new files are those names.
"""

import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Where the line is missing, as the editions of some years have it, several books make one.
_END_OF_BOOK = re.compile(
    r"(?mi)^[^\S\n]*(?:\*+\s*)?End of (?:the |this )?Project Gutenberg(?:['’]s)?(?: EBook| Etext)?(?: of)?[ \n]"
    r"(?P<title>.*(?:\n.+)*)"
)


def books(text: str) -> Iterator[tuple[str, str]]:
    """(closing words, which name it; text) of each"""
    begin = 0
    for match in _END_OF_BOOK.finditer(text):
        yield " ".join(match["title"].split()), text[begin : match.start()]
        begin = match.end()
    if text[begin:].strip():
        yield "the last book", text[begin:]


def paragraphs(text: str) -> Iterator[str]:
    """The text between blank lines, unwrapped; what has no lower-case word, a title or a number, goes."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.replace("_", " ").split())
        if re.search(r"[a-z]{3}", line) and not line.startswith(("Produced by", "[Illustration")):
            yield line


def main(source: str, directory: str) -> None:
    """Write the books of `source` into `directory`; books without a paragraph are left out."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    opener = lzma.open if source.endswith(".xz") else open
    with opener(source, "rt", encoding="utf-8") as file:
        text = file.read()
    for title, book in books(text):
        name = re.sub(r"\W+", "-", title).strip("-")[:80]
        if lines := list(paragraphs(book)):
            (Path(directory) / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
