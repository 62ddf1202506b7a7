"""An auditor's decisions: one Parquet file per batch in RUN/decisions, resolved to the images they cover.

Files are written whole and never changed; `curation/hidden.py` reads them back and the last decision on an image
counts.
"""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from curation import parquet, storage
from curation.errors import UserError
from curation.hidden import DECIDED
from curation.schemas import ACTIONS, DECISIONS, SCOPES

NOTE_CHARACTERS, AUTHOR_CHARACTERS, TARGET_CHARACTERS = 2_000, 100, 400
MOST_LISTED = 10_000
"""Batches that a list of decisions looks at."""


@dataclass(frozen=True)
class Decision:
    """What was decided, on what, by whom and why."""

    action: str
    scope: str
    target: str
    author: str
    note: str = ""

    def checked(self) -> "Decision":
        """The decision; raises UserError for one that cannot be stored."""
        if self.action not in ACTIONS or self.scope not in SCOPES:
            raise UserError(f"{self.action} {self.scope}: an action is {', '.join(ACTIONS)}, on {', '.join(SCOPES)}")
        if not self.author.strip():
            raise UserError("who decides? give an author")
        for name, limit in (("author", AUTHOR_CHARACTERS), ("note", NOTE_CHARACTERS), ("target", TARGET_CHARACTERS)):
            if len(getattr(self, name)) > limit:
                raise UserError(f"{name}: {len(getattr(self, name)):,} characters, at most {limit:,}")
        if self.action == "note" and not self.note.strip():
            raise UserError("a note without words says nothing")
        return self


def write(run: str, decision: Decision, ids: np.ndarray, now: datetime | None = None) -> str:
    """Store a batch, return its name. ids: uint64, what the decision covers now; a note on a scope has none.

    Raises UserError for a decision that covers nothing, or a folder that cannot be written.
    """
    decision.checked()
    on_scope = decision.action == "note" and decision.scope != "image"
    covered = pa.nulls(1, pa.uint64()) if on_scope else pa.array(np.unique(np.asarray(ids, np.uint64)), pa.uint64())
    if not len(covered):
        raise UserError(f"{decision.scope} {decision.target}: no image of the run belongs to it")
    made = now or datetime.now(UTC)
    given = {name: _storable(getattr(decision, name)) for name in ("action", "scope", "target", "author", "note")}
    given |= {"note": given["note"] or None, "made_at": made}  # type: ignore[dict-item]
    columns = [
        covered if field.name == "image_id" else pa.repeat(pa.scalar(given[field.name], field.type), len(covered))
        for field in DECISIONS
    ]
    table = pa.Table.from_arrays(columns, schema=DECISIONS)
    name = f"{made.strftime('%Y%m%dT%H%M%S%f')}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_whole(storage.join(run, DECIDED, name), storage.table_bytes(table))
    return name


def listed(run: str, start: int = 0, limit: int = 50) -> tuple[list[dict[str, Any]], int]:
    """(batches, the newest first, and how many there are): what was decided, when, by whom, on how many images."""
    paths = storage.list_files(storage.join(run, DECIDED), ".parquet")[::-1][:MOST_LISTED]
    found = []
    for path in paths[start : start + limit]:
        entry: dict[str, Any] = {"batch": path.rsplit("/", 1)[-1]}
        try:
            file = parquet.open_bytes(storage.read_bytes(path))
            first = next(iter(file.iter_batches(1))).to_pylist()[0]
        except (OSError, StopIteration, pa.ArrowException) as error:
            entry |= {"error": f"not readable ({str(error)[:200]})", "images": 0}
        else:
            names = ("action", "scope", "target", "author", "made_at", "note")
            images = file.metadata.num_rows if first["image_id"] is not None else 0
            entry |= {name: first[name] for name in names} | {"images": images}
        found.append(entry)
    return found, len(paths)


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
