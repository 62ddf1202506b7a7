"""How a run is getting on, from its events: stages, parts, rates, remaining time, warnings.

The file is read on from where it was read before, so that watching a run of millions of parts costs what is new.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from curation import storage

WINDOW_S = 300.0
"""Rates are those of the last minutes."""
MOST_READ = 32 << 20
"""Bytes read at once; what a longer file holds before is skipped."""
MOST_LINE = 1 << 20
MESSAGES, MOST_REASONS = 20, 200


@dataclass
class StageProgress:
    """One stage as its last events tell it. state: running, complete, or skipped (it was there already)."""

    stage: str
    state: str = "running"
    started: float = 0.0
    ended: float | None = None
    done: int = 0
    total: int | None = None
    rows: int = 0
    note: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    marks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=4096), repr=False)

    def rate(self, now: float) -> tuple[float, float]:
        """(parts, rows) per second over the last WINDOW_S of work; 0 where nothing can be said."""
        marks = [m for m in self.marks if m[0] >= now - WINDOW_S] or list(self.marks)[-2:]
        before = next((m for m in reversed(self.marks) if m[0] < marks[0][0]), None) if marks else None
        first = before or (marks[0] if marks else None)
        if first is None:
            return 0.0, 0.0
        seconds = max((self.ended or now) - first[0], 1e-3)
        last = self.marks[-1]
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds

    def remaining(self, now: float) -> float | None:
        """Seconds until the stage is done at this rate; None where that is not known."""
        parts, _ = self.rate(now)
        if self.state != "running" or not self.total or parts <= 0:
            return None
        return (self.total - self.done) / parts

    def document(self, now: float) -> dict[str, Any]:
        """What pages and `--json` show."""
        shown = {k: v for k, v in asdict(self).items() if k != "marks"}
        parts, rows = self.rate(now)
        remaining = self.remaining(now)
        return shown | {
            "seconds": round((self.ended or now) - self.started, 1) if self.started else None,
            "parts_per_second": round(parts, 3),
            "rows_per_second": round(rows, 1),
            "remaining_seconds": None if remaining is None else round(remaining, 1),
        }


class Progress:
    """What has happened in RUN/events.jsonl so far; `read` goes on where it stopped."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.stages: dict[str, StageProgress] = {}
        self.warnings: deque[dict[str, Any]] = deque(maxlen=MESSAGES)
        self.last: float | None = None
        self.damaged = 0
        self._offset = 0
        self._objects: set[str] = set()

    def read(self) -> "Progress":
        """Take in what is new. A missing file is no event; a damaged line is counted and passed over."""
        path = storage.join(self.run, "events.jsonl")
        if storage.is_local(path):
            self._take(self._local(storage.filesystem(path)[1]))
            return self
        for name in storage.list_files(self.run, ".jsonl"):
            if name not in self._objects and name.rsplit("/", 1)[-1].startswith("events"):
                self._objects.add(name)
                self._take(storage.read_bytes(name).splitlines())
        return self

    def _local(self, path: str) -> list[bytes]:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:  # another run was begun here
                    self.__init__(self.run)  # type: ignore[misc]
                start = max(self._offset, size - MOST_READ)
                file.seek(start)
                data = file.read(MOST_READ)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1  # the last line may be under way
        self._offset = start + end
        lines = data[:end].splitlines()
        return lines[1:] if start > 0 and start == size - MOST_READ else lines

    def _take(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            try:
                event = json.loads(line) if len(line) <= MOST_LINE else None
                if not isinstance(event, dict) or not math.isfinite(event["time"]):
                    raise ValueError("not an event")
                self.take(event)
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged += bool(line.strip())

    def take(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        kind, stage, now = event["event"], event.get("stage"), float(event["time"])
        self.last = now
        if kind == "warning":
            self.warnings.append({"time": now, "stage": stage, "text": str(event.get("text", ""))[:2000]})
        if stage is None:
            return
        if kind == "stage_start" or stage not in self.stages:
            self.stages.pop(stage, None)  # a stage begun anew stands last
            self.stages[stage] = StageProgress(str(stage)[:200], started=now)
        known = self.stages[stage]
        if kind in ("parts", "part"):
            known.done, known.total = int(event["done"]), int(event["total"])
            known.note = str(event.get("note", ""))[:300]
            known.rows += int(event.get("rows", 0)) if kind == "part" else 0
            for reason, count in dict(event.get("failures") or {}).items():
                if reason in known.failures or len(known.failures) < MOST_REASONS:
                    known.failures[str(reason)[:200]] = known.failures.get(str(reason)[:200], 0) + int(count)
            known.marks.append((now, known.done, known.rows))
        elif kind == "stage_end":
            known.state, known.ended = "complete", now
            known.rows, known.summary = int(event.get("rows", known.rows)), dict(event.get("summary") or {})
            if known.total is not None:
                known.done = known.total
            errors = known.summary.get("errors")
            if isinstance(errors, dict):  # of the whole stage, also of parts made by an earlier attempt
                known.failures = {str(r)[:200]: int(n) for r, n in list(errors.items())[:MOST_REASONS]}
        elif kind == "stage_skip":
            if known.state != "complete":
                known.state, known.ended = "skipped", now
        elif kind == "message":
            known.note = str(event.get("text", ""))[:300]

    def document(self, now: float | None = None) -> dict[str, Any]:
        """Stages in the order in which they were begun, the newest warnings, the time of the last event."""
        now = time.time() if now is None else now
        return {
            "stages": [stage.document(now) for stage in self.stages.values()],
            "warnings": list(self.warnings),
            "last_event": self.last,
            "damaged_lines": self.damaged,
        }
