"""What stands on the pages, a module per subject as in `curation/audit/sections`: rows of the index and summaries of
the stages in the words, tables and charts of the report.

A page is a mapping for its template: `lead`, `links`, `facts`, `sections`, ... A section has `title` and `text`, and
any of: `charts` (words, chart), `columns` with `rows`, `pairs` of images, `groups` (words, images), `cards`, `more`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.server.opened import Opened

Values = dict[str, Any]
Onward = Callable[..., str]
CARDS, TILES, TABLE = 16, 4, 100
BESIDE = 6
"""Images of a row of examples."""


@dataclass(frozen=True)
class Card:
    """A group on a page of groups."""

    href: str
    title: str
    text: str
    images: list[Values]


def row(*cells: Any, value: float = 0.0) -> Values:
    """A row of a table; a cell is a text, or (text, where it leads)."""
    made = [{"text": str(c[0]), "href": c[1]} if isinstance(c, tuple) else {"text": str(c), "href": ""} for c in cells]
    return {"cells": made, "value": value}


def table(title: str, words: Sequence[str], numbers: Sequence[str], rows: Sequence[Values], **more: Any) -> Values:
    """A section with a table: columns of words first, then of numbers.

    more: `text`, `empty`, `of` (the largest value of a row: a bar behind each) with its `kind`.
    """
    columns = [*((name, False) for name in words), *((name, True) for name in numbers)]
    return {"title": title, "columns": columns, "rows": list(rows), **more}


def by_id(index: Opened, ids: Sequence[int | None]) -> dict[int, Values]:
    """Rows of these images for tiles, by id; hidden ones are left out."""
    found = index.some({int(i) for i in ids if i is not None}, index.tiles)
    return {int(entry["image_id"]): entry for entry in found}


def noted(image: Mapping[str, Any] | None, note: str) -> Values | None:
    """A tile with a note; None stays None."""
    return None if image is None else {**image, "note": note}


def counted(value: float, noun: str) -> str:
    """`1 image`, `2,345 images`."""
    return f"{int(value):,} {noun}{'' if value == 1 else 's'}"
