"""A search for any substring has no index: it reads the whole column, one search at a time, and can be cancelled."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation import parquet
from curation.hidden import is_hidden

COLUMNS = ("caption", "url", "label")
BATCH_ROWS = 1 << 16
MOST_FOUND = 1_000
SAY_S = 0.5


class Busy(Exception):
    """Another scan is under way."""


class Scans:
    """At most one scan at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel: threading.Event | None = None

    @property
    def running(self) -> bool:
        return self._cancel is not None

    def begin(self) -> threading.Event:
        """Take the turn; returns what `run` looks at and `end` gives back. Raises Busy."""
        with self._lock:
            if self._cancel is not None:
                raise Busy
            self._cancel = threading.Event()
            return self._cancel

    def end(self, turn: threading.Event) -> None:
        """Give the turn back."""
        with self._lock:
            turn.set()
            if self._cancel is turn:
                self._cancel = None

    def cancel(self) -> bool:
        """Stop the scan that is under way; whether there was one."""
        turn = self._cancel
        if turn is not None:
            turn.set()
        return turn is not None


def run(
    paths: Sequence[str], column: str, text: str, hidden: np.ndarray, cancelled: threading.Event
) -> Iterator[dict[str, Any]]:
    """Events: {`found`: ids}, {`rows`, `of`} now and then, and last {`done`: complete | cancelled | enough}.

    paths: parts of images. text: what the column shall hold, case aside.
    """
    total = sum(parquet.open_file(path).metadata.num_rows for path in paths)
    seen = count = 0
    said = time.monotonic()
    yield {"rows": 0, "of": total}
    for path in paths:
        file = parquet.open_file(path)
        if column not in file.schema_arrow.names:
            continue
        for batch in file.iter_batches(BATCH_ROWS, columns=["image_id", column], use_threads=False):
            if cancelled.is_set():
                yield {"rows": seen, "of": total, "done": "cancelled"}
                return
            hits = pc.fill_null(pc.match_substring(batch[column], text, ignore_case=True), False)
            ids = batch["image_id"].filter(hits).to_numpy(zero_copy_only=False)
            ids = ids[~is_hidden(ids, hidden)][: MOST_FOUND - count]
            seen += batch.num_rows
            count += len(ids)
            if len(ids):
                yield {"found": [int(i) for i in ids]}
            if count >= MOST_FOUND:
                yield {"rows": seen, "of": total, "done": "enough"}
                return
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                yield {"rows": seen, "of": total}
    yield {"rows": seen, "of": total, "done": "complete"}
