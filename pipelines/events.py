"""RUN/events.jsonl: what happened and when, one JSON object a line; and whoever watches it live."""

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from curation import secrets, storage

Listener = Callable[[dict[str, Any]], None]


class Events:
    """Appends events to a file and hands them to a listener (the terminal's progress display).

    kinds: stage_start, stage_skip, stage_end, part, message, warning. Each has `time` (seconds since
    1970) and, but for messages of no stage, `stage`.
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
