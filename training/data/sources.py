"""Where a training's images are listed: a manifest's parts and the folder its locations are relative to, or a tree.

`data.source` may be a run directory, a Parquet file, a folder of Parquet files (shards written by `curate pack`
included) or a folder of images.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
PACKED = "pack.json"


@dataclass(frozen=True)
class Listing:
    """parts: Parquet files with (image_id, shard, offset, length); none for a folder of images."""

    path: str
    root: str
    parts: tuple[str, ...]
    packed: bool
    run: str | None = None
    """The run that it was made in: what is hidden there (forgotten, or dropped by an auditor) is not trained on."""

    @property
    def is_tree(self) -> bool:
        return not self.parts


def find(source: str) -> Listing:
    """What `source` is. Raises UserError for what cannot be a source of images."""
    source = source.rstrip("/") if source not in ("/", "") else source
    if not source or not storage.exists(source):
        raise UserError(f"{source or 'data.source'}: not there; give a run directory, a manifest or a folder of images")
    if storage.exists(storage.join(source, "manifest", "_stage.json")):
        return Listing(source, source, _run_parts(source), False, source)
    if source.endswith(".parquet"):
        folder = source.rsplit("/", 1)[0] if "/" in source else "."
        return Listing(source, _root_of(folder), (source,), False, _run_of(folder))
    parts = storage.list_files(source, ".parquet")
    if parts:
        packed = storage.exists(storage.join(source, PACKED))
        return Listing(
            source, _root_of(source), tuple(parts), packed, _packed_from(source) if packed else _run_of(source)
        )
    if storage.exists(storage.join(source, "run.yaml")) or storage.exists(storage.join(source, "sources.json")):
        raise UserError(f"{source}: a run without a manifest; make it with `curate manifest {source}`")
    return Listing(source, source, (), False)


def _run_parts(run: str) -> tuple[str, ...]:
    path = storage.join(run, "manifest", "_stage.json")
    try:
        generations = json.loads(storage.read_bytes(path))["generations"]
        complete = [g for g in generations if g["complete"]]
        if not complete:
            raise UserError(f"{run}: its manifest is not finished; run `curate manifest {run}` again")
        folder = storage.join(run, "manifest", f"gen-{int(complete[-1]['generation']):04d}")
        return tuple(storage.join(folder, f"{part['name']}.parquet") for part in complete[-1]["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); make it again with `curate manifest {run} --rebuild`") from error


def _root_of(folder: str) -> str:
    """Locations are relative to the run for RUN/manifest/gen-NNNN, to the folder itself for any other."""
    parents = folder.split("/")
    if len(parents) > 2 and parents[-2] == "manifest" and parents[-1].startswith("gen-"):
        return "/".join(parents[:-2])
    return folder


def _run_of(folder: str) -> str | None:
    """The run that RUN/manifest/gen-NNNN belongs to."""
    root = _root_of(folder)
    return root if root != folder else None


def _packed_from(folder: str) -> str | None:
    """The run that shards were packed from, where it is still there."""
    try:
        run = json.loads(storage.read_bytes(storage.join(folder, PACKED))).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return run if run and storage.exists(run) else None


def walk(folder: str) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of the image files of a tree, in order of their names folder by folder."""
    if storage.is_local(folder):
        yield from _walk_local(storage.filesystem(folder)[1], "")
        return
    fs, inner = storage.filesystem(folder)
    found: dict[str, Any] = fs.find(inner, detail=True)
    for name in sorted(found):
        if name.lower().endswith(SUFFIXES):
            yield name[len(inner.rstrip("/")) + 1 :], int(found[name]["size"])


def _walk_local(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk_local(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name, entry.stat().st_size
