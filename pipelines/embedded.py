"""Which embeddings the selection stages work on: the pool and the seed sets of a run, or folders from elsewhere."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from curation import parquet, storage, vectors
from curation.errors import UserError
from curation.order import hash_keys
from curation.vectors import VectorSet
from pipelines.context import Context
from pipelines.run_directory import Generation, Source

SCRATCH = "scratch"
PART = re.compile(r"^part-(\d+)-\d+")


@dataclass(frozen=True)
class EmbeddingPart:
    """One Parquet file of vectors and the name that rows made from it keep."""

    name: str
    path: str
    rows: int


def stage_of(context: Context, model: str | None) -> str:
    """`embed/FOLDER` of the model asked for; else of the first of the run's embed.models, or of the only one there."""
    from embeddings.models.registry import slug

    there = [name.removeprefix("embed/") for name in context.run.begun() if name.startswith("embed/")]
    if model is not None:
        if slug(model) not in there:
            known = f"there is {', '.join(there)}" if there else "there are none"
            raise UserError(
                f"{context.run.path('embed', slug(model))}: no embeddings of {model} ({known}); "
                "run `curate embed` first"
            )
        return f"embed/{slug(model)}"
    if not there:
        raise UserError(f"{context.run.path('embed')}: no embeddings; run `curate embed` first")
    configured = [slug(name) for name in _configured_models(context)]
    first = next((name for name in configured if name in there), None)
    if first is None and len(there) > 1:
        raise UserError(f"{context.run.path('embed')} holds {', '.join(there)}: choose one with --model")
    return f"embed/{first or there[0]}"


def _configured_models(context: Context) -> list[str]:
    path = context.run.path("run.yaml")
    if not storage.exists(path):
        return []
    from pipelines import configuration

    return list(getattr(configuration.load(path).embed, "models", []))


def source_number(part_name: str) -> int | None:
    """The source that a part's name gives: part-SSS-IIIIII."""
    match = PART.match(part_name)
    return int(match.group(1)) if match else None


def pool_parts(context: Context, generations: Iterable[Generation]) -> list[EmbeddingPart]:
    """The parts of pool images in these generations of an embed stage, in order."""
    return [part for source, part in _parts(context, generations) if source.role == "pool"]


def seed_parts(context: Context, generations: Iterable[Generation]) -> dict[str, list[EmbeddingPart]]:
    """The parts of each seed set, by its name, in the order of the sources."""
    found: dict[str, list[EmbeddingPart]] = {s.label: [] for s in context.run.sources() if s.role == "seed"}
    for source, part in _parts(context, generations):
        if source.role == "seed":
            found[source.label].append(part)
    return found


def _parts(context: Context, generations: Iterable[Generation]) -> list[tuple[Source, EmbeddingPart]]:
    sources = {source.number: source for source in context.run.sources()}
    found = []
    for generation in generations:
        for record in generation.parts:
            number = source_number(record.name)
            if number is None or number not in sources:
                raise UserError(f"{generation.writer.path(record.name)}: belongs to no source of this run", exit_code=1)
            part = EmbeddingPart(record.name, generation.writer.path(record.name), record.rows)
            found.append((sources[number], part))
    return found


def folder_parts(folder: str) -> tuple[VectorSet, list[EmbeddingPart]]:
    """A folder of embeddings from elsewhere. Names that begin with `part-` are kept, others are numbered."""
    opened = vectors.open_folder(folder)
    if not opened.rows:
        raise UserError(f"{folder}: its Parquet files hold no rows; there is nothing to work on")
    stems = [p.path.rsplit("/", 1)[-1].removesuffix(".parquet") for p in opened.partitions]
    keep = all(stem.startswith("part-") for stem in stems)
    named = [
        EmbeddingPart(stem if keep else f"part-{index:06d}", p.path, p.rows)
        for index, (stem, p) in enumerate(zip(stems, opened.partitions, strict=True))
    ]
    return opened, named


def open_parts(parts: Sequence[EmbeddingPart]) -> VectorSet:
    """The vectors of the parts that have rows."""
    return vectors.open_files([part.path for part in parts if part.rows])


def cluster_paths(folder: str) -> list[str]:
    """The parts of a folder that `curate cluster` wrote. Raises UserError for another folder."""
    paths = storage.list_files(folder, ".parquet")
    if not paths:
        where = "holds no *.parquet" if storage.exists(folder) else "does not exist"
        raise UserError(f"{folder}: {where}; give a folder that `curate cluster` wrote")
    for path in paths:
        names = parquet.schema(path).names
        missing = [name for name in ("image_id", "cluster_1", "distance") if name not in names]
        if missing:
            raise UserError(f"{path}: no column `{missing[0]}`; give a folder that `curate cluster` wrote")
    return paths


def leaf_sizes(context: Context, paths: Iterable[str], count: int) -> np.ndarray:
    """(count,) int64 images per leaf cluster in these parts of a table of clusters."""
    sizes = np.zeros(count, np.int64)
    for _, part in context.spread(_count_leaves, ((path, (path, count)) for path in paths)):
        sizes += part
    return sizes


def _count_leaves(path: str, count: int, _: None) -> np.ndarray:
    (leaves,) = read_columns(path, ["cluster_1"])
    if len(leaves) and (leaves.min() < 0 or leaves.max() >= count):
        raise UserError(f"{path}: a cluster outside the {count:,} of the centroids beside it; cluster the pool again")
    return np.bincount(leaves, minlength=count)


def ids_digest(context: Context, paths: Iterable[str]) -> tuple[int, int]:
    """(rows, sum of hashed ids modulo 2^64) of Parquet files: equal for equal sets of ids, however they are cut."""
    rows, total = 0, 0
    for _, (count, part) in context.spread(_digest_ids, ((path, (path,)) for path in paths)):
        rows += count
        total = (total + part) % 2**64
    return rows, total


def _digest_ids(path: str, _: None) -> tuple[int, int]:
    (ids,) = read_columns(path, ["image_id"])
    return len(ids), int(np.sum(hash_keys(ids, 0, "digest"), dtype=np.uint64))


@contextmanager
def bad_input_taken_back(context: Context, generation: Generation) -> Iterator[None]:
    """A first generation that bad input stops (UserError, exit code 2) is removed.

    The mended input would otherwise be refused as a change of what was begun.
    """
    try:
        yield
    except UserError as error:
        if error.exit_code == 2 and generation.number == 0 and not generation.complete:
            names = [path.rsplit("/", 1)[-1] for path in storage.list_files(generation.directory, ".parquet")]
            found = (generation.writer.find(name.removesuffix(".parquet")) for name in names)
            generation.parts = [record for record in found if record is not None]
            directory = context.stage(generation.fingerprint.stage)
            directory.save(generation)
            directory.clear()
            remove_scratch(generation)
        raise


def remove_scratch(generation: Generation) -> None:
    """Remove the folder of intermediate files."""
    storage.remove_folder(generation.file(SCRATCH))


def read_columns(path: str, columns: list[str]) -> list[np.ndarray]:
    """Columns of a Parquet file; nothing else of it is read."""
    table = parquet.read_table(path, columns)
    return [table[name].to_numpy() for name in columns]


def files_digest(paths: Iterable[str]) -> str:
    """sha256 over the names and contents of files: what stands for a folder in a fingerprint."""
    entries = []
    for path in paths:
        fs, inner = storage.filesystem(path)
        with fs.open(inner, "rb") as file:
            entries.append([path.rsplit("/", 1)[-1], hashlib.file_digest(file, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
