"""Where an index is made: a database of DuckDB that spills to the disk, and the files of the index that it fills."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.server.columns import RowsWriter, write_groups
from pipelines.server.parts import RunParts, levels_of

MEMORY = "1GB"
"""What DuckDB may hold while it sorts; more goes to the disk."""
FETCH_ROWS = 1 << 19
Tell = Callable[[str], None]


class Workshop:
    """One index in the making. document: what the index will say of itself."""

    def __init__(self, tables: RunParts, folder: str, tell: Tell, document: dict[str, Any]) -> None:
        import duckdb

        self.tables, self.folder, self.tell, self.document = tables, folder, tell, document
        self.levels = levels_of(tables)
        self.work = os.path.join(folder, ".work")
        os.makedirs(self.work)
        self.db = duckdb.connect(os.path.join(self.work, "work.duckdb"))
        self.db.execute(f"SET memory_limit='{MEMORY}'")
        self.db.execute("SET temp_directory=?", [self.work])
        self.db.execute(f"SET threads={max(1, len(os.sched_getaffinity(0)))}")
        self.db.execute("SET preserve_insertion_order=false")
        self.db.execute("SET autoinstall_known_extensions=false; SET autoload_known_extensions=false")

    def close(self) -> None:
        """Remove the database."""
        self.db.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do a piece of work, and note how long it took."""
        self.tell(f"{name} …")
        started = time.monotonic()
        work()
        self.document["stages"][name] = round(time.monotonic() - started, 2)

    def into(self, table: str, query: str, columns: str) -> None:
        """Append what a query finds to a table of these columns."""
        self.db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        self.db.execute(f"INSERT INTO {table} {query}")

    def fetched(self, query: str) -> Iterator[list[np.ndarray]]:
        """The columns of what a query finds, in batches."""
        for batch in self.db.sql(query).to_arrow_reader(FETCH_ROWS):
            yield [column.to_numpy(zero_copy_only=False) for column in batch.columns]

    def arrays(self, query: str) -> list[np.ndarray]:
        """The columns of what a query finds, whole: for results of bounded size."""
        found = self.db.sql(query).to_arrow_table()
        return [column.to_numpy() for column in found.columns]

    def dictionaries(self, query: str) -> list[dict[str, Any]]:
        """The rows of what a query finds: for results of bounded size."""
        return list(self.db.sql(query).to_arrow_table().to_pylist())

    def groups(self, kind: str, query: str) -> None:
        """Write groups from (key, row) in the order of the query."""
        keys, rows = write_groups(f"{self.folder}/groups/{kind}", ((k, r) for k, r in self.fetched(query)))
        self.document.setdefault("groups", {})[kind] = {"keys": keys, "rows": rows}

    def write_rows(self, name: str, query: str) -> int:
        """Write a list in the order of the query; returns how many rows it has."""
        reader = self.db.sql(query).to_arrow_reader(FETCH_ROWS)
        writer = RowsWriter(f"{self.folder}/{name}.arrow", reader.schema)
        for batch in reader:
            writer.append(pa.Table.from_batches([batch]))
        writer.close()
        return writer.count
