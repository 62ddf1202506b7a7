"""RUN/events.jsonl: what happened and when, one JSON object a line; and whoever watches it live."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from curation import secrets, storage

COUNTED = ("error.", "dropped: ", "undecodable")
"""Beginnings of the names under which stages count their unusable rows by reason."""
Listener = Callable[[dict[str, Any]], None]


class Events:
    """Appends events to a file and hands them to a listener (the terminal's progress display).

    kinds: stage_start, stage_skip, stage_end, parts, part, message, warning. Each has `time` (seconds since
    1970) and, but for messages of no stage, `stage`. A part has `rows`, and `failures` by reason where it has any.
    """

    def __init__(self, path: str | None, listener: Listener | None = None) -> None:
        self.path = path
        self.listener = listener
        self._lock = threading.Lock()
        self._lines: list[str] = []

    def emit(self, kind: str, stage: str | None = None, **fields: Any) -> None:
        event = {"time": round(time.time(), 3), "event": kind, "stage": stage, **secrets.hide_all(fields)}
        with self._lock:
            if self.path is not None:
                line = json.dumps(event, default=str) + "\n"
                if storage.is_local(self.path):
                    os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
                    with open(self.path, "a", encoding="utf-8") as file:
                        file.write(line)
                else:
                    self._lines.append(line)
        if self.listener is not None:
            self.listener(event)

    def flush(self) -> None:
        """Put buffered lines on an object store, which has no append: one object per flush."""
        with self._lock:
            if self.path is not None and self._lines:
                name = f"{self.path.removesuffix('.jsonl')}-{time.time_ns()}.jsonl"
                storage.write_whole(name, "".join(self._lines).encode())
                self._lines = []


def failures(counts: Mapping[str, float]) -> dict[str, int]:
    """The unusable rows of a part by reason, from its counts."""
    return {k.removeprefix("error."): int(n) for k, n in sorted(counts.items()) if k.startswith(COUNTED) and n}


def failed(counts: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """What a `part` event says of its failures: nothing where there are none."""
    found = failures(counts)
    return {"failures": found} if found else {}
