"""What the commands print: tables for people, JSON for machines."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=1))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell; long cells are not cut, so that what is shown can be copied."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())
