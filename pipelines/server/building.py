"""`curate serve RUN --index`: the side tables that look-ups and pages read, made in one pass over the run's Parquet.

Keys are sorted by DuckDB, which spills to disk: memory stays bounded at any number of rows. An index lies in a folder
named by the digest of what it was made of; it is there when its `index.json` is.
"""

import hashlib
import json
import os
import resource
import shutil
import time
import uuid
from functools import partial
from typing import Any

from curation import storage
from curation.errors import UserError
from pipelines.description import current_generations, stage_names
from pipelines.run_directory import RunDirectory
from pipelines.server import clustering, collecting, summing, vectors
from pipelines.server import parts as run_tables
from pipelines.server.workshop import Tell, Workshop

REVISION = 2
FOLDER = ".index"
DONE = "index.json"


def digest(run: RunDirectory) -> str:
    """Of all that an index is made of."""
    import duckdb

    stages = {
        name: [generation.digest for generation in current_generations(run, name)]
        for name in stage_names(run)
        if name not in ("report", "manifest", "balance", "dedup-search")
    }
    key = {"revision": REVISION, "duckdb": duckdb.__version__, "stages": stages}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def index_root(run: RunDirectory, folder: str | None) -> str:
    """Where indexes of a run lie. Raises UserError for a run on an object store without a folder of its own."""
    if folder is not None:
        return folder
    if not storage.is_local(run.root):
        raise UserError(f"{run.root} is not on this machine: say where its index shall lie with --index-folder DIR")
    return os.path.join(storage.filesystem(run.root)[1], FOLDER)


def find(run: RunDirectory, root: str) -> str | None:
    """The folder of the index that fits the run as it is now, None without one."""
    folder = os.path.join(root, digest(run))
    return folder if os.path.exists(os.path.join(folder, DONE)) else None


def build(run: RunDirectory, root: str, tell: Tell = lambda text: None) -> str:
    """Make the index of a run, remove those of former states, return its folder. Raises UserError."""
    tables = run_tables.run_parts(run)
    name = digest(run)
    if not tables.images:
        raise UserError(f"{run.root}: no images yet; there is nothing to index", exit_code=1)
    aside = os.path.join(root, f".{uuid.uuid4().hex}.tmp")
    try:
        os.makedirs(aside)
        with open(os.path.join(root, ".gitignore"), "w", encoding="ascii") as file:
            file.write("*\n")
        started, cpu = time.monotonic(), time.process_time()
        document: dict[str, Any] = {"digest": name, "stages": {}}
        _make(Workshop(tables, aside, tell, document))
        document["seconds"] = round(time.monotonic() - started, 2)
        document["cpu_seconds"] = round(time.process_time() - cpu, 2)
        document["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        document["bytes"] = _size(aside)
        with open(os.path.join(aside, DONE), "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        final = os.path.join(root, name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    except OSError as error:
        raise storage.cannot_write(root, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for other in os.listdir(root):
        if other not in (name, ".gitignore") and os.path.exists(os.path.join(root, other, DONE)):
            shutil.rmtree(os.path.join(root, other), ignore_errors=True)
    return final


def _size(folder: str) -> dict[str, int]:
    """Bytes on disk by the first name under the folder."""
    sizes: dict[str, int] = {}
    for where, _, files in os.walk(folder):
        inside = os.path.relpath(where, folder).split(os.sep)
        for file in files:
            key = "/".join(inside[:2]) if inside[0] != "." else file.removesuffix(".every")
            sizes[key] = sizes.get(key, 0) + os.path.getsize(os.path.join(where, file))
    return sizes


def _make(work: Workshop) -> None:
    try:
        work.stage("images", partial(collecting.collect, work))
        work.stage("groups", partial(collecting.sort_groups, work))
        work.stage("words", partial(collecting.sort_words, work))
        work.stage("orders", partial(collecting.sort_scores, work))
        work.stage("lists", partial(summing.lists, work))
        if work.levels:
            work.stage("clusters", partial(clustering.clusters, work))
        if work.tables.retrieval:
            work.stage("retrieval", partial(summing.retrieval, work))
    finally:
        work.close()
    work.document["spaces"] = {}
    for space, paths in work.tables.embeddings.items():
        work.stage(f"vectors of {space}", partial(_vectors, work, space, paths))


def _vectors(work: Workshop, space: str, paths: tuple[str, ...]) -> None:
    found = vectors.build(paths, f"{work.folder}/ids", os.path.join(work.folder, "vectors", space), work.tell)
    if found is not None:
        work.document["spaces"][space] = found


def described(folder: str) -> dict[str, Any]:
    """What an index says of itself."""
    with open(os.path.join(folder, DONE), encoding="utf-8") as file:
        return dict(json.load(file))
