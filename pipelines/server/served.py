"""What a server holds of its run: the index that fits it, what is hidden, its progress, and who may do what next."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curation import hidden, storage
from curation.audit.run_tables import RunTables, open_run
from curation.errors import UserError
from pipelines import decisions, lock
from pipelines.decisions import Decision
from pipelines.description import stage_names
from pipelines.progress import Progress
from pipelines.run_directory import RunDirectory
from pipelines.server import building, parts
from pipelines.server.comparing import Comparison
from pipelines.server.opened import Opened
from pipelines.server.pictures import Pictures
from pipelines.server.scans import Scans

LOOK_AGAIN_S = 2.0
SMALL = 500_000
"""Runs of up to so many images are indexed by the server itself, when it starts and when their tables change."""


@dataclass
class Settings:
    """How a server was asked to be. token: asked of everyone, None on loopback alone."""

    token: str | None = None
    hosts: tuple[str, ...] = ()
    author: str = "auditor"
    index_folder: str | None = None
    compare: str | None = None


@dataclass
class Served:
    """A run, served. One object for all requests, safe for use from several threads."""

    run: RunDirectory
    settings: Settings
    opened: Opened | None = None
    state: str = ""
    """One sentence where the index is missing, being made or of a former state of the run."""
    hidden: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def __post_init__(self) -> None:
        self.root = building.index_root(self.run, self.settings.index_folder)
        self.progress = Progress(self.run.root)
        self.pictures = Pictures(self.run.root)
        self.scans = Scans()
        self.comparison: Comparison | None = None
        self._lock = threading.RLock()
        self._builder: threading.Thread | None = None
        self._looked = 0.0
        self._seen: Any = None
        self._seen_hidden: Any = None
        self._said: tuple[RunTables, dict[str, Any] | None] | None = None
        self.refresh(now=True)

    # What the run is now.

    def refresh(self, now: bool = False) -> None:
        """Look whether tables or decisions have changed; at most every LOOK_AGAIN_S. Raises UserError."""
        if not now and time.monotonic() - self._looked < LOOK_AGAIN_S:
            return
        with self._lock:
            self._looked = time.monotonic()
            seen = self._signature()
            if seen != self._seen or (self.opened is None and self._builder is None):
                self._seen, self._said = seen, None
                self._open()
            listed = [
                tuple(storage.list_files(self.run.path(name), ".parquet"))
                for name in (hidden.FORGOTTEN, hidden.DECIDED)
            ]
            if listed != self._seen_hidden:
                self._seen_hidden = listed
                self._hide()

    def _signature(self) -> Any:
        fs, _ = storage.filesystem(self.run.root)
        found = []
        for name in stage_names(self.run):
            try:
                info = fs.info(storage.filesystem(self.run.path(name, "_stage.json"))[1])
            except OSError:
                continue
            found.append((name, info.get("size"), str(info.get("mtime") or info.get("LastModified"))))
        return found

    def _open(self) -> None:
        folder = building.find(self.run, self.root)
        if folder is not None:
            self._take(folder)
            return
        rows = self._count()
        if not rows:
            self.state = "No image is in the run's tables yet."
        elif rows <= SMALL:
            self._start_builder()
        else:
            known = "is of a former state of the run" if self.opened else "is missing"
            self.state = f"The index {known}: stop the server and run `curate serve RUN --index` ({rows:,} images)."

    def _count(self) -> int:
        for stages in (("filter",), ("score",), ("download", "import")):
            rows = sum(p.rows for s in stages for g in self.run.stage(s).generations() for p in g.parts)
            if rows:
                return rows
        return 0

    def _start_builder(self) -> None:
        if self._builder is not None:
            return
        self.state = "The index is being made: look-ups follow in a moment."
        self._builder = threading.Thread(target=self._build, name="index", daemon=True)
        self._builder.start()

    def _build(self) -> None:
        try:
            folder = building.build(self.run, self.root)
            with self._lock:
                self._take(folder)
        except Exception as error:  # whatever it is, the server goes on and says so
            self.state = f"The index could not be made: {error}"
        finally:
            self._builder = None

    def wait(self) -> None:
        """Until an index that is being made is there."""
        builder = self._builder
        if builder is not None:
            builder.join()

    def _take(self, folder: str) -> None:
        opened = Opened(folder)
        opened.hide(self.hidden)
        # The former one is closed by no one: requests may still read it, its files go with the last of them.
        self.opened, self.state = opened, ""

    def _hide(self) -> None:
        self.hidden = hidden.hidden_ids(self.run.root)
        self._forgotten = hidden.forgotten_ids(self.run.root)
        if self.opened is not None:
            self.opened.hide(self.hidden)

    @property
    def index(self) -> Opened:
        """The index. Raises UserError (exit code 1) while there is none."""
        if self.opened is None:
            raise UserError(self.state or "no index yet", exit_code=1)
        return self.opened

    # What the stages say of themselves.

    @property
    def stages(self) -> RunTables:
        """Options and summaries of the stages, as the report reads them."""
        return self._read()[0]

    @property
    def card(self) -> dict[str, Any] | None:
        """The data card, None without a manifest."""
        return self._read()[1]

    def _read(self) -> tuple[RunTables, dict[str, Any] | None]:
        with self._lock:
            if self._said is None:
                stages = open_run(self.run.root)
                card = json.loads(storage.read_bytes(stages.card)) if stages.card else None
                self._said = stages, card
            return self._said

    def seed_sets(self) -> list[dict[str, Any]]:
        """What each seed set brought: of the manifest by the data card, else of the retrieval.

        Rows: `seed_set`, `planned`, `nominal`, `unique`, `colliding`, `shared`; None for what is not known.
        """
        names = ("planned", "nominal", "unique", "colliding", "shared")
        rows = (self.card or {}).get("seed_sets")
        if rows is None:
            said = self.stages.file("retrieve", "seed_sets") or {}
            rows = [{"seed_set": name, **figures} for name, figures in sorted(said.items())]
        return [{"seed_set": str(r["seed_set"]), **{n: r.get(n) for n in names}} for r in rows]

    # Decisions.

    def covered(self, scope: str, target: str) -> np.ndarray:
        """Ids of the images that a decision on this covers, uint64. Raises UserError for a target that is none."""
        index = self.index
        kind, value = _group_of(scope, target)
        if kind == "image":
            there = index.rows_of(np.array([value], np.uint64))[0] >= 0
            return np.array([value] if there else [], np.uint64)
        if kind not in index.groups:
            return np.empty(0, np.uint64)
        start, stop = index.groups[kind].find(index.key(kind, value))
        if kind == "component" and start == stop:  # a component of one is in no group
            return self.covered("image", target)
        rows = index.groups[kind].rows.read(start, stop)
        if len(rows) > 4096:
            return np.concatenate([index.ids.read(f, f + (1 << 20))[_within(rows, f)] for f in _firsts(rows)])
        return np.array([index.ids.read(int(row), int(row) + 1)[0] for row in rows], np.uint64)

    def decide(self, decision: Decision) -> dict[str, Any]:
        """Store a decision and act on it at once. Returns the batch's name and how many images it covers."""
        decision.checked()
        ids = self.covered(decision.scope, decision.target)
        ids = ids[~hidden.is_hidden(ids, self._forgotten)]
        name = decisions.write(self.run.root, decision, ids)
        with self._lock:
            self._seen_hidden = None
            self.refresh(now=True)
        return {"batch": name, "images": len(ids), "hidden": len(self.hidden)}

    # Others.

    def live(self) -> dict[str, Any]:
        """The run's progress and its driver."""
        with self._lock:
            held = lock.is_held(self.run.root)
            progress = self.progress.read()
            # Where no one works on it time stands still.
            document = progress.document(None if held else progress.last)
        document["driver"] = {k: v for k, v in lock.holder(self.run.root).items() if k in ("since",)} if held else None
        return document | {"index": self.state}

    def compared(self, tell: Callable[[str], None] = lambda text: None) -> Comparison:
        """The comparison with the other run. Raises UserError where none was asked for."""
        if self.settings.compare is None:
            raise UserError("no other run: start the server with `curate serve RUN --compare OTHER`", exit_code=1)
        with self._lock:
            if self.comparison is None or not self.comparison.is_current():
                self.comparison = Comparison.make(self.run, RunDirectory(self.settings.compare), self.root, tell)
            return self.comparison

    def parts(self) -> parts.RunParts:
        return parts.run_parts(self.run)

    def close(self) -> None:
        """End child processes."""
        self.pictures.close()


def _group_of(scope: str, target: str) -> tuple[str, Any]:
    try:
        if scope == "host":
            return "host", target.lower()
        if scope == "cluster":
            level, cluster = target.split(":")
            return f"cluster_{_number(level, 100)}", _number(cluster, 1 << 31)
        if scope in ("image", "component"):
            return scope, _number(target, 1 << 64)
    except ValueError:
        pass
    raise UserError(f"{scope} {target[:100]}: give an image id, a component id, LEVEL:CLUSTER or a host")


def _number(text: str, below: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 20 or int(text) >= below:
        raise ValueError(text)
    return int(text)


def _firsts(rows: np.ndarray) -> list[int]:
    return [int(f) << 20 for f in np.unique(rows >> np.uint32(20))]


def _within(rows: np.ndarray, first: int) -> np.ndarray:
    return rows[(rows >= first) & (rows < first + (1 << 20))].astype(np.int64) - first


def index_folders(root: str) -> list[str]:
    """Folders of indexes that are there."""
    if not os.path.isdir(root):
        return []
    return sorted(n for n in os.listdir(root) if os.path.exists(os.path.join(root, n, building.DONE)))
