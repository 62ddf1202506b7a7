"""Two runs side by side: which images entered the dataset, which left, by what brought them and by cluster.

Images are the same when their ids are, if both runs registered the same sources; else when their downloaded bytes are.
The result is a few tables beside the index, made once for two states of the runs.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import UserError
from curation.hidden import hidden_ids, hide
from pipelines.description import current_generations, current_parts
from pipelines.run_directory import RunDirectory
from pipelines.server.columns import Rows, RowsWriter
from pipelines.server.parts import CUT, stream

REVISION = 1
COLUMNS = ("image_id", "sha256", "url", "width", "height", "shard", "offset", "length", "nsfw", "label", "caption")
LISTED = (*COLUMNS, "clusters", "sources")
MEMORY = "512MB"
SIDES = ("entered", "left")


class Comparison:
    """What one run has that the other has not."""

    def __init__(self, folder: str, run: RunDirectory, other: RunDirectory) -> None:
        with open(os.path.join(folder, "comparison.json"), encoding="utf-8") as file:
            self.document: dict[str, Any] = json.load(file)
        self.run, self.other = run, other
        self.lists = {side: Rows(os.path.join(folder, f"{side}.arrow")) for side in SIDES}

    @classmethod
    def make(
        cls, run: RunDirectory, other: RunDirectory, root: str, tell: Callable[[str], None] = lambda text: None
    ) -> "Comparison":
        """Compare, or find what was compared before. Raises UserError for a run without a manifest."""
        key = _key(run, other)
        folder = os.path.join(root, "comparisons", key)
        if not os.path.exists(os.path.join(folder, "comparison.json")):
            tell(f"comparing with {other.root}")
            aside = os.path.join(root, f".{uuid.uuid4().hex}.tmp")
            try:
                os.makedirs(aside)
                _compare(run, other, aside, key)
                os.makedirs(os.path.dirname(folder), exist_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(aside, folder)
            except OSError as error:
                raise storage.cannot_write(root, error) from error
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return cls(folder, run, other)

    def is_current(self) -> bool:
        """Whether both runs are still as they were compared."""
        return bool(self.document["key"] == _key(self.run, self.other))

    def images(self, side: str, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """(images that entered or left, by id, how many there are)."""
        held = self.lists[side]
        start = min(max(start, 0), len(held))
        return held.take(np.arange(start, min(start + limit, len(held)))), len(held)

    def left_row(self, image_id: int) -> dict[str, Any] | None:
        """The row of an image that left, by halving: the list is sorted by id."""
        held, low, high = self.lists["left"], 0, len(self.lists["left"])
        while low < high:
            middle = (low + high) // 2
            row = held.take(np.array([middle]))[0]
            if int(row["image_id"]) == image_id:
                return row
            low, high = (middle + 1, high) if int(row["image_id"]) < image_id else (low, middle)
        return None


def _key(run: RunDirectory, other: RunDirectory) -> str:
    state = [
        [[g.digest for g in current_generations(one, "manifest")], hidden_ids(one.root).tobytes().hex()]
        for one in (run, other)
    ]
    text = json.dumps([REVISION, os.path.abspath(other.root) if storage.is_local(other.root) else other.root, state])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _compare(run: RunDirectory, other: RunDirectory, folder: str, key: str) -> None:
    import duckdb

    by_id = _sources(run) == _sources(other)
    db = duckdb.connect(os.path.join(folder, "work.duckdb"))
    try:
        db.execute(f"SET memory_limit='{MEMORY}'")
        db.execute("SET temp_directory=?", [folder])
        for name, one in (("new", run), ("old", other)):
            _load(db, name, one)
        same = "image_id" if by_id else "sha256"
        document: dict[str, Any] = {"key": key, "by": "image_id" if by_id else "sha256 of the bytes as downloaded"}
        for side, name, against in (("entered", "new", "old"), ("left", "old", "new")):
            found = f"(SELECT * FROM {name} ANTI JOIN {against} USING ({same}))"
            reader = db.sql(f"SELECT * FROM {found} ORDER BY image_id").to_arrow_reader(1 << 16)
            writer = RowsWriter(os.path.join(folder, f"{side}.arrow"), reader.schema)
            for batch in reader:
                writer.append(pa.Table.from_batches([batch]))
            writer.close()
            document[side] = writer.count
            document[f"{side}_by_source"] = _counts(db, f"SELECT unnest(list_distinct(sources)) AS name FROM {found}")
            document[f"{side}_by_cluster"] = _counts(
                db, f"SELECT clusters[1] AS name FROM {found} WHERE len(clusters) > 0"
            )
        for name in ("new", "old"):
            document[name] = db.sql(f"SELECT count(*) FROM {name}").fetchall()[0][0]
            document[f"{name}_by_source"] = _counts(db, f"SELECT unnest(list_distinct(sources)) AS name FROM {name}")
        document["stayed"] = document["new"] - document["entered"]
    finally:
        db.close()
    os.unlink(os.path.join(folder, "work.duckdb"))
    with open(os.path.join(folder, "comparison.json"), "w", encoding="utf-8") as file:
        json.dump(document, file)


def _counts(db: Any, query: str) -> list[dict[str, Any]]:
    counted = f"SELECT name, count(*) AS images FROM ({query}) GROUP BY name ORDER BY images DESC, name LIMIT 500"
    return list(db.sql(counted).to_arrow_table().to_pylist())


def _load(db: Any, name: str, run: RunDirectory) -> None:
    paths = current_parts(run, "manifest")
    if not paths:
        raise UserError(f"{run.root}: no manifest yet; run `curate manifest` before two runs are compared", exit_code=1)
    hidden = hidden_ids(run.root)
    first = True
    for block in _blocks(paths):
        shown = hide(block, hidden)
        db.register("part", shown)
        db.execute(f"CREATE TABLE {name} AS SELECT * FROM part" if first else f"INSERT INTO {name} SELECT * FROM part")
        db.unregister("part")
        first = False


def _blocks(paths: list[str]) -> Iterator[pa.Table]:
    import pyarrow.compute as pc

    for batch in stream(paths, LISTED):
        table = pa.Table.from_batches([batch])
        for column, limit in CUT.items():
            at = table.schema.get_field_index(column)
            if at >= 0:
                table = table.set_column(at, column, pc.utf8_slice_codeunits(table[column], 0, limit))
        yield table


def _sources(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(s.number, s.name, s.digest) for s in run.sources()]
