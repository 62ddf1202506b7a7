"""The run directory: RUN/<stage>/gen-0000/part-*.parquet and what is known about each part.

A part appears whole or not at all; its Parquet footer names the fingerprint it was made under and the
side files written before it, so that an interrupted stage finds its finished parts whatever else is lost.
`_stage.json` lists, per generation, the fingerprint, the inputs and each part's rows, bytes and sha256; it is written
now and then while a stage is under way, so that of a billion rows only the last parts have to be read again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from curation import parquet, storage
from curation.errors import UserError

FINGERPRINT_KEY = b"curate.fingerprint"
FILES_KEY = b"curate.files"
COUNTS_KEY = b"curate.counts"
LOOKS_AT_ONCE = 16


@dataclass(frozen=True)
class Fingerprint:
    """What decides a stage's output: its revision, options, inputs and backend."""

    stage: str
    revision: int
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    backend: Mapping[str, str]

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: "Fingerprint") -> str:
        """`what: was A, now B` for everything in which `other` differs from this one."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        rows = [
            f"{key}: was {mine.get(key, 'absent')}, now {theirs.get(key, 'absent')}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]
        return "; ".join(rows[:6]) + (f"; and {len(rows) - 6} more" if len(rows) > 6 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        rows: dict[str, str] = {}
        for key, inner in value.items():
            rows |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return rows
    text = json.dumps(value, sort_keys=True, default=str)
    return {prefix: text if len(text) < 80 else text[:60] + "…" + hashlib.sha256(text.encode()).hexdigest()[:8]}


@dataclass(frozen=True)
class PartRecord:
    """A finished part. files: side files, relative to the generation, with their bytes and sha256."""

    name: str
    rows: int
    bytes: int
    sha256: str
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PartWriter:
    """Writes parts of one generation; small and picklable, it travels to the workers."""

    directory: str
    fingerprint: str

    def write(
        self,
        name: str,
        table: pa.Table,
        files: Mapping[str, bytes] | None = None,
        counts: Mapping[str, float] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PartRecord:
        """Write side files, then the part itself: `name`.parquet. The part being there says that all is.

        files: bytes by path relative to the generation. counts: figures summed over parts for the report;
        they must not depend on timing. metadata: extra Parquet file metadata.
        """
        records: dict[str, dict[str, Any]] = {}
        for relative, data in sorted((files or {}).items()):
            storage.write_whole(storage.join(self.directory, relative), data)
            records[relative] = {"bytes": len(data), "sha256": storage.sha256(data)}
        data = storage.table_bytes(
            table,
            {
                **(metadata or {}),
                FINGERPRINT_KEY.decode(): self.fingerprint,
                FILES_KEY.decode(): json.dumps(records, sort_keys=True),
                COUNTS_KEY.decode(): json.dumps(dict(counts or {}), sort_keys=True),
            },
        )
        storage.write_whole(self.path(name), data)
        return PartRecord(name, table.num_rows, len(data), storage.sha256(data), records, dict(counts or {}))

    def path(self, name: str) -> str:
        """Where a part lies."""
        return storage.join(self.directory, f"{name}.parquet")

    def find(self, name: str) -> PartRecord | None:
        """The part, if it is there, was made under this fingerprint, and is with its side files what was written."""
        path = self.path(name)
        try:
            data = storage.read_bytes(path)
            file = parquet.open_bytes(data)
            metadata = file.schema_arrow.metadata or {}
            if metadata.get(FINGERPRINT_KEY, b"").decode() != self.fingerprint:
                return None
            for group in range(file.num_row_groups):
                file.read_row_group(group, use_threads=False)
            files = json.loads(metadata.get(FILES_KEY, b"{}"))
            for relative, record in files.items():
                if storage.sha256(storage.read_bytes(storage.join(self.directory, relative))) != record["sha256"]:
                    return None
        except (OSError, pa.ArrowInvalid):
            return None
        counts = json.loads(metadata.get(COUNTS_KEY, b"{}"))
        return PartRecord(name, file.metadata.num_rows, len(data), storage.sha256(data), files, counts)

    def is_there(self, record: PartRecord) -> bool:
        """Whether a part that `_stage.json` knows has its size, and so have its side files; nothing is read."""
        sizes = {f"{record.name}.parquet": record.bytes} | {k: int(v["bytes"]) for k, v in record.files.items()}
        return all(storage.size(storage.join(self.directory, name)) == size for name, size in sizes.items())


@dataclass
class Generation:
    """One generation of a stage, finished or under way."""

    number: int
    directory: str
    fingerprint: Fingerprint
    consumed: dict[str, list[int]]
    complete: bool = False
    parts: list[PartRecord] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None
    """`digest` as it was before images were taken out: what was made of the generation stays made of it."""
    certificates: list[str] = field(default_factory=list)
    """Under RUN/forgotten: by which images were taken out of it, and its parts got new checksums."""

    @property
    def writer(self) -> PartWriter:
        return PartWriter(self.directory, self.fingerprint.digest)

    @property
    def digest(self) -> str:
        """Of the content as it was made: what the next stage's fingerprint names as its input."""
        if self.identity is not None:
            return self.identity
        text = json.dumps([[p.name, p.rows, p.sha256] for p in self.parts] + [self.files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def part_paths(self) -> list[str]:
        """Paths of the parts, in name order."""
        return [self.writer.path(part.name) for part in self.parts]

    def find(self, names: Iterable[str]) -> dict[str, PartRecord]:
        """Those of these parts that are finished: by `_stage.json`, or by what they say themselves."""
        known = {part.name: part for part in self.parts}

        def look(name: str) -> PartRecord | None:
            record = known.get(name)
            return record if record is not None and self.writer.is_there(record) else self.writer.find(name)

        wanted = list(names)
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            found = zip(wanted, pool.map(look, wanted), strict=True)
            return {name: record for name, record in found if record is not None}

    def put_file(self, relative: str, data: bytes) -> None:
        """Write a file that belongs to the whole generation (centroids, a fitted model)."""
        storage.write_whole(self.file(relative), data)
        self.files[relative] = {"bytes": len(data), "sha256": storage.sha256(data)}

    def file(self, relative: str) -> str:
        """Path of a side file."""
        return storage.join(self.directory, relative)

    def total(self, count: str) -> float:
        """Sum of a count over the parts."""
        return sum(part.counts.get(count, 0) for part in self.parts)


class StageDirectory:
    """RUN/<stage>, or a flat --out folder that holds the parts of one stage directly."""

    def __init__(self, root: str, name: str, *, flat: bool = False) -> None:
        self.root = root
        self.name = name
        self.flat = flat
        self.directory = root if flat else storage.join(root, name)

    @property
    def _path(self) -> str:
        return storage.join(self.directory, "_stage.json")

    def all_generations(self) -> list[Generation]:
        """Every generation, the unfinished one (at most one, the last) included."""
        if not storage.exists(self._path):
            return []
        try:
            document = json.loads(storage.read_bytes(self._path))
            return [self._from_json(entry) for entry in document["generations"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}: damaged ({error}); restore it or rebuild the stage", exit_code=1) from error

    def generations(self) -> list[Generation]:
        """The complete generations."""
        return [generation for generation in self.all_generations() if generation.complete]

    def part_paths(self) -> list[str]:
        """Parts of all complete generations, in order."""
        return [path for generation in self.generations() for path in generation.part_paths]

    def generation_directory(self, number: int) -> str:
        return self.directory if self.flat else storage.join(self.directory, f"gen-{number:04d}")

    def save(self, generation: Generation) -> None:
        """Put a generation into `_stage.json`, in the place of the one with its number."""
        others = [g for g in self.all_generations() if g.number != generation.number]
        document = {
            "stage": self.name,
            "generations": [_to_json(g) for g in sorted([*others, generation], key=lambda g: g.number)],
        }
        storage.write_whole(self._path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    def clear(self) -> None:
        """Remove every generation (`--rebuild`). In a flat folder only our own files are removed."""
        if not self.flat:
            storage.remove(self._path)  # by its name: a listing may not show it yet
            storage.remove_folder(self.directory)
            return
        for generation in self.all_generations():
            mine = [f"{p.name}.parquet" for p in generation.parts] + list(generation.files)
            mine += [relative for part in generation.parts for relative in part.files]
            for relative in mine:
                storage.remove(generation.file(relative))
        storage.remove(self._path)

    def _from_json(self, entry: Mapping[str, Any]) -> Generation:
        return Generation(
            number=int(entry["generation"]),
            directory=self.generation_directory(int(entry["generation"])),
            fingerprint=Fingerprint(**entry["fingerprint"]),
            consumed={k: list(v) for k, v in entry["consumed"].items()},
            complete=bool(entry["complete"]),
            parts=[PartRecord(**part) for part in entry["parts"]],
            files=dict(entry["files"]),
            summary=dict(entry["summary"]),
            identity=entry.get("identity"),
            certificates=list(entry.get("certificates", [])),
        )


def _to_json(generation: Generation) -> dict[str, Any]:
    forgotten = {"identity": generation.identity, "certificates": generation.certificates}
    return (forgotten if generation.certificates or generation.identity is not None else {}) | {
        "generation": generation.number,
        "complete": generation.complete,
        "fingerprint": asdict(generation.fingerprint),
        "fingerprint_digest": generation.fingerprint.digest,
        "consumed": generation.consumed,
        "parts": [asdict(part) for part in generation.parts],
        "files": generation.files,
        "summary": generation.summary,
        "digest": generation.digest,
    }


@dataclass(frozen=True)
class Source:
    """A registered list, folder or set of tars: its number is the high part of its image ids."""

    number: int
    name: str
    kind: str
    origin: str
    rows: int
    digest: str
    stage: str
    generation: int
    licence: str | None = None
    exempt: bool = False

    @property
    def role(self) -> str:
        """pool, seed or reference."""
        return self.name.split(":", 1)[0]

    @property
    def label(self) -> str:
        """The part of the name after the role."""
        return self.name.split(":", 1)[-1]


class RunDirectory:
    """RUN: its stages, sources and configuration."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def stage(self, name: str) -> StageDirectory:
        """The folder of a stage; names may hold a slash (`embed/mobilenet_v2`)."""
        return StageDirectory(self.root, name)

    def path(self, *names: str) -> str:
        return storage.join(self.root, *names)

    def relative(self, path: str) -> str:
        """A path inside the run relative to it, any other path as it is: what tables store."""
        prefix = self.root + "/"
        return path[len(prefix) :] if path.startswith(prefix) else path

    def resolve(self, location: str) -> str:
        """The inverse of `relative`."""
        return location if "://" in location or location.startswith("/") else self.path(location)

    def exists(self) -> bool:
        """Whether there is anything: by names that every run has, for a listing may not show what is new."""
        return any(storage.exists(path) for path in (self.root, self.path("run.yaml"), self.path("sources.json")))

    def begun(self) -> list[str]:
        """Names of the stages that have a folder, embeddings by model (`embed/MODEL`), in order.

        Listed, and on an object store, where a listing may lag, also read from RUN/stages.json.
        """
        models = {f"embed/{name}" for name in storage.list_folders(self.path("embed"))}
        names = {*storage.list_folders(self.root), *models, *self._noted()}
        return sorted(name for name in names if storage.exists(self.path(name, "_stage.json")))

    def note(self, stage: str) -> None:
        """Say on an object store that a stage is about to have a folder."""
        noted = self._noted()
        if not storage.is_local(self.root) and stage not in noted:
            data = json.dumps(sorted(noted | {stage}), indent=1) + "\n"
            storage.write_whole(self.path("stages.json"), data.encode())

    def _noted(self) -> set[str]:
        path = self.path("stages.json")
        return set(json.loads(storage.read_bytes(path))) if storage.exists(path) else set()

    def sources(self) -> list[Source]:
        """Registered sources, by number."""
        path = self.path("sources.json")
        if not storage.exists(path):
            return []
        return [Source(**entry) for entry in json.loads(storage.read_bytes(path))]

    def register(self, source: Source) -> None:
        """Store a source before anything of it is fetched. Its number must be the next one."""
        known = self.sources()
        if source.number != len(known):
            raise ValueError(f"source number {source.number}, expected {len(known)}")
        entries = [asdict(s) for s in [*known, source]]
        storage.write_whole(self.path("sources.json"), (json.dumps(entries, indent=1) + "\n").encode())
