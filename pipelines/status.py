"""How far a run is: its stages, their generations, parts, rows, failures, times and bytes."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from curation import hidden, parquet, storage
from curation.errors import UserError
from pipelines import catalog, lock
from pipelines.events import failures
from pipelines.run_directory import FINGERPRINT_KEY, Generation, RunDirectory

State = Literal["complete", "unfinished", "absent"]


@dataclass
class GenerationStatus:
    """One generation of a stage. `parts` and `rows` of an unfinished one are those on disk so far."""

    number: int
    complete: bool
    parts: int
    rows: int
    seconds: float | None = None
    finished: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageStatus:
    """One folder of the run."""

    folder: str
    state: State
    generations: list[GenerationStatus] = field(default_factory=list)
    bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(generation.rows for generation in self.generations)

    @property
    def parts(self) -> int:
        return sum(generation.parts for generation in self.generations)

    @property
    def seconds(self) -> float:
        return sum(generation.seconds or 0 for generation in self.generations)


@dataclass
class RunStatus:
    """A whole run. `driver`: who works on it now, by its lock."""

    run: str
    sources: list[dict[str, Any]]
    stages: list[StageStatus]
    driver: dict[str, Any] | None
    hidden: dict[str, int] = field(default_factory=dict)
    """Images that no reader shows: `forgotten`, `dropped` by an auditor; `unfinished`: takedowns that were stopped."""

    @property
    def bytes(self) -> int:
        return sum(stage.bytes for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        document = asdict(self)
        for entry, stage in zip(document["stages"], self.stages, strict=True):
            entry |= {"rows": stage.rows, "parts": stage.parts, "seconds": stage.seconds}
        return document | {"bytes": self.bytes}


def status(root: str) -> RunStatus:
    """Look at a run directory; nothing is changed. Raises UserError where there is none."""
    run = RunDirectory(root)
    if not run.exists():
        raise UserError(f"{root}: no such run directory")
    fs, inner = storage.filesystem(root)
    if fs.isfile(inner):
        raise UserError(f"{root}: a file, where a run directory is expected")
    stages = [
        look(run, folder) for stage in catalog.STAGES for pattern in stage.folders for folder in folders(run, pattern)
    ]
    sources = [asdict(source) for source in run.sources()]
    if not sources and all(stage.state == "absent" for stage in stages) and not storage.exists(run.path("run.yaml")):
        raise UserError(f"{root}: not a run directory (no run.yaml, no sources.json, no stage in it)")
    driver = lock.holder(run.root) if lock.is_held(run.root) else None
    return RunStatus(run.root, sources, stages, driver, _hidden(run.root))


def _hidden(root: str) -> dict[str, int]:
    from pipelines import forget

    found = {
        "forgotten": len(hidden.forgotten_ids(root)),
        "dropped": len(hidden.dropped_ids(root)),
        "unfinished": len(forget.pending(root)),
    }
    return {name: count for name, count in found.items() if count}


def folders(run: RunDirectory, pattern: str) -> list[str]:
    """The folders under the run that a catalog entry names: `embed/*` is one per model, itself while there is none."""
    if not pattern.endswith("/*"):
        return [pattern]
    parent = pattern.removesuffix("/*")
    return [name for name in run.begun() if name.startswith(f"{parent}/")] or [pattern]


def look(run: RunDirectory, folder: str) -> StageStatus:
    """The state of one stage folder."""
    if folder.endswith("/*"):
        return StageStatus(folder, "absent")
    directory = run.stage(folder)
    generations = directory.all_generations()
    found = [_generation(directory.directory, generation) for generation in generations]
    state: State = "complete" if all(g.complete for g in generations) else "unfinished"
    return StageStatus(
        folder,
        state if generations else "absent",
        found,
        _bytes(directory.directory),
        _failures(generations) if folder in ("download", "import", "score", "filter") else {},
    )


def _generation(directory: str, generation: Generation) -> GenerationStatus:
    if not generation.complete:
        paths = storage.list_files(generation.directory, ".parquet")
        rows = [n for path in paths if (n := _rows_under(path, generation.fingerprint.digest)) is not None]
        return GenerationStatus(generation.number, False, len(rows), sum(rows))
    timing = _timing(directory, generation.number)
    return GenerationStatus(
        generation.number,
        True,
        len(generation.parts),
        sum(part.rows for part in generation.parts),
        timing.get("seconds"),
        timing.get("finished"),
        generation.summary,
    )


def _rows_under(path: str, fingerprint: str) -> int | None:
    try:
        with parquet.open_file(path) as file:
            if (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"").decode() != fingerprint:
                return None
            return int(file.metadata.num_rows)
    except (OSError, UserError):
        return None


def _timing(directory: str, number: int) -> dict[str, Any]:
    path = storage.join(directory, f"_timings-{number:04d}.json")
    try:
        found = json.loads(storage.read_bytes(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(directory: str) -> int:
    fs, inner = storage.filesystem(directory)
    return int(fs.du(inner)) if fs.exists(inner) else 0


def _failures(generations: list[Generation]) -> dict[str, int]:
    """Rows that are not usable, by reason: from the counts of the parts, from the table where a part has none."""
    counts: Counter[str] = Counter()
    for part, path in ((p, g.writer.path(p.name)) for g in generations if g.complete for p in g.parts):
        if not part.counts:
            counts.update(_reasons_in(path))
        counts.update(failures(part.counts))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _reasons_in(path: str) -> Counter[str]:
    table = parquet.read_table(path, ["status", "error"])
    counts: Counter[str] = Counter()
    for entry in table.group_by(["status", "error"]).aggregate([([], "count_all")]).to_pylist():
        if entry["status"] != "ok":
            counts[f"{entry['status']}: {(entry['error'] or 'unknown').split(':', 1)[0]}"] += entry["count_all"]
    return counts
