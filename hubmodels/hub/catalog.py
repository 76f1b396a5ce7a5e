"""What there is to load."""

from typing import Any

from ..catalog import manifest


def catalog() -> list[dict[str, Any]]:
    """catalog()

    Every weights name of this version: name, family, parameters (without heads), megabytes of the
    weights file, licence, and revision, the commit that pins the file (None: it is part of this repository).

    >>> [row["family"] for row in catalog() if row["name"] == "bert-nano"]
    ['bert']
    """
    return [
        {
            "name": record.name,
            "family": record.family,
            "parameters": record.parameters,
            "megabytes": round(record.megabytes, 1),
            "licence": record.licence,
            "revision": record.revision,
        }
        for record in manifest().values()
    ]
