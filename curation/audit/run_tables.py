"""A run as the audit reads it: the parts of its tables that count, what its stages say of themselves, what is hidden.

It reads `_stage.json` and needs nothing of `pipelines`: a notebook opens a run on a disk or in a bucket with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curation import hidden, storage
from curation.audit.scans import NOTHING
from curation.errors import UserError

CARD = "manifest.json"
"""The data card, beside the parts of a manifest."""
SNAPSHOTS = frozenset({"retrieve", "balance", "mix", "manifest"})
"""Stages whose newest generation replaces the older ones."""


@dataclass(frozen=True)
class RunTables:
    """Paths of the parts that count, empty where the run has no such stage.

    images: the newest table of images (of the filter, else of the scores, else what was fetched). fetched: the tables
    of download and import. centroids: a file per level, leaf first. hidden: ids not to be shown, sorted uint64.
    card: path of the data card, "" without a manifest.
    options: of the newest generation, by stage. files: the JSON files of the newest generation, by stage and name.
    """

    root: str = ""
    images: Sequence[str] = ()
    fetched: Sequence[str] = ()
    duplicates: Sequence[str] = ()
    self_forest: Sequence[str] = ()
    clusters: Sequence[str] = ()
    centroids: Sequence[str] = ()
    retrieval: Sequence[str] = ()
    balance: Sequence[str] = ()
    manifest: Sequence[str] = ()
    card: str = ""
    hidden: np.ndarray = field(default_factory=lambda: NOTHING)
    forgotten: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Sequence[Mapping[str, Any]] = ()

    def option(self, stage: str, name: str) -> float | None:
        """A number among a stage's options, None where there is none."""
        value = self.options.get(stage, {}).get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def file(self, stage: str, name: str) -> Any:
        """The content of a JSON file of a stage (`dedup`, `recall`), None where there is none."""
        return self.files.get(stage, {}).get(name)


def open_run(root: str) -> RunTables:
    """The tables of the run at a path or fsspec URL, finished or not. Raises UserError where there is no run."""
    root = root.rstrip("/")
    if not storage.exists(root):
        raise UserError(f"{root}: no such run directory")
    stages = {
        name: _generations(root, name)
        for name in ("download", "import", "score", "filter", "dedup", "cluster", "retrieve", "balance", "manifest")
    }
    fetched = [*_parts(stages["download"]), *_parts(stages["import"])]
    known = {name: found[-1] for name, found in stages.items() if found}
    path = storage.join(root, "sources.json")
    return RunTables(
        root=root,
        images=_parts(stages["filter"]) or _parts(stages["score"]) or fetched,
        fetched=fetched,
        duplicates=_parts(stages["dedup"]),
        self_forest=_files(known.get("dedup"), "self_forest/"),
        clusters=_parts(stages["cluster"]),
        centroids=next((found for g in reversed(stages["cluster"]) if (found := _files(g, "centroids/"))), []),
        retrieval=_parts(stages["retrieve"]),
        balance=_parts(stages["balance"]),
        manifest=_parts(stages["manifest"]),
        card=storage.join(known["manifest"]["folder"], CARD) if "manifest" in known else "",
        hidden=hidden.hidden_ids(root),
        forgotten=len(hidden.forgotten_ids(root)),
        options={name: g["fingerprint"]["options"] for name, g in known.items()},
        files={name: _documents(known[name]) for name in ("dedup", "retrieve") if name in known},
        sources=json.loads(storage.read_bytes(path)) if storage.exists(path) else [],
    )


def _generations(root: str, stage: str) -> list[dict[str, Any]]:
    """The complete generations that count, each with its `folder`."""
    path = storage.join(root, stage, "_stage.json")
    if not storage.exists(path):
        return []
    try:
        document = json.loads(storage.read_bytes(path))
        found = [
            {**entry, "folder": storage.join(root, stage, f"gen-{entry['generation']:04d}")}
            for entry in document["generations"]
            if entry["complete"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it or rebuild the stage", exit_code=1) from error
    return found[-1:] if stage in SNAPSHOTS else found


def _parts(generations: Sequence[Mapping[str, Any]]) -> list[str]:
    return [storage.join(g["folder"], f"{part['name']}.parquet") for g in generations for part in g["parts"]]


def _files(generation: Mapping[str, Any] | None, prefix: str) -> list[str]:
    """Parquet files beside the parts of a generation, by name; levels in the order of their numbers."""
    if generation is None:
        return []
    names = {*generation["files"], *(f for part in generation["parts"] for f in part["files"])}
    mine = [n for n in names if n.startswith(prefix) and n.endswith(".parquet")]
    return [storage.join(generation["folder"], n) for n in sorted(mine, key=lambda n: (len(n), n))]


def _documents(generation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removesuffix(".json"): json.loads(storage.read_bytes(storage.join(generation["folder"], name)))
        for name in sorted(generation["files"])
        if name.endswith(".json") and "/" not in name
    }
