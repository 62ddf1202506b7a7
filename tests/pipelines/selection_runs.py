"""Small runs for the selection stages: vectors of known concepts, tables of known content, Ray's work done in place."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.schemas import DUPLICATES, IMAGES, image_id
from curation.vectors import embeddings_table
from pipelines.context import Context
from pipelines.run_directory import RunDirectory, Source
from tests.pipelines.synthetic_run import finish

CONCEPTS = 12
DIMENSION = 16
WEB, MORE, BIRDS, CARS, EVALUATION = range(5)
NAMES = ("pool:web", "pool:more", "seed:birds", "seed:cars", "reference:evaluation")
ROWS = {WEB: 500, MORE: 200, BIRDS: 24, CARS: 9, EVALUATION: 5}
EMBED = "embed/mobilenet_v2"
METADATA = {"curate.model": '{"name": "mobilenet_v2"}'}


def centres() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((CONCEPTS, DIMENSION))


def concept_vectors(concepts: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors around their concepts."""
    found = centres()[concepts] + 0.25 * np.random.default_rng(seed).standard_normal((len(concepts), DIMENSION))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def concepts_of(source: int, rows: int) -> np.ndarray:
    """Zipf in the pools; birds are concepts 8 and 9, cars are 10."""
    random = np.random.default_rng(source)
    if source == BIRDS:
        return random.choice([8, 9], rows)
    if source == CARS:
        return np.full(rows, 10)
    share = 1 / np.arange(1, CONCEPTS + 1)
    return random.choice(CONCEPTS, rows, p=share / share.sum())


def ids_of(source: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = ROWS[source] if stop is None else stop
    return np.array([image_id(source, row) for row in range(start, stop)], np.uint64)


def vectors_of(source: int) -> np.ndarray:
    return concept_vectors(concepts_of(source, ROWS[source]), source)


def embed_parts(sources: Iterable[int], part_rows: int = 120) -> dict[str, pa.Table]:
    """Tables of vectors by part name, a part having at most `part_rows`."""
    parts = {}
    for source in sources:
        ids, rows = ids_of(source), vectors_of(source)
        for index, start in enumerate(range(0, len(ids), part_rows)):
            cut = slice(start, start + part_rows)
            parts[f"part-{source:03d}-{index:06d}"] = embeddings_table(ids[cut], rows[cut])
    return parts


def register(run: RunDirectory, sources: Iterable[int]) -> None:
    for number in sources:
        run.register(
            Source(number, NAMES[number], "folder", "x", ROWS[number], "d", "import", number, exempt=number == CARS)
        )


def make_run(folder: Path, sources: Iterable[int] = (WEB, BIRDS, CARS)) -> Context:
    """A run embedded, its sources all registered, `sources` among them embedded."""
    run = RunDirectory(str(folder))
    register(run, range(5))
    finish(run, EMBED, embed_parts(sources), metadata=METADATA)
    return Context(run)


def add_filter(context: Context, dropped: Iterable[int] = ()) -> None:
    """The table of `filter`: every registered image ok but for `dropped`."""
    gone, parts = set(dropped), {}
    for source, rows in ROWS.items():
        ids = ids_of(source).tolist()
        columns: dict[str, Any] = {name: [None] * rows for name in IMAGES.names}
        columns |= {"image_id": ids, "source": [NAMES[source]] * rows}
        columns["status"] = ["dropped" if i in gone else "ok" for i in ids]
        parts[f"part-{source:03d}-000000"] = pa.table(columns, schema=IMAGES)
    finish(context.run, "filter", parts)


def add_dedup(context: Context, rejected: Iterable[int] = (), reason: str = "self") -> None:
    """The table of `dedup`: all kept but for `rejected`."""
    gone, parts = set(rejected), {}
    for source in (WEB, MORE, BIRDS, CARS):
        ids = ids_of(source).tolist()
        columns: dict[str, Any] = {name: [None] * len(ids) for name in DUPLICATES.names}
        columns |= {"image_id": ids, "component_id": ids, "kept": [i not in gone for i in ids]}
        columns["reason"] = [reason if i in gone else "kept" for i in ids]
        parts[f"part-{source:03d}-000000"] = pa.table(columns, schema=DUPLICATES)
    finish(context.run, "dedup", parts)


def plain_folder(folder: Path, source: int, parts: int = 3, vectors: np.ndarray | None = None) -> str:
    """A folder of embeddings such as users bring: names of their own, nothing in the footer."""
    folder.mkdir(parents=True)
    ids, rows = ids_of(source), vectors_of(source) if vectors is None else vectors
    ids = ids[: len(rows)]
    for index, (i, r) in enumerate(zip(np.array_split(ids, parts), np.array_split(rows, parts), strict=True)):
        pq.write_table(embeddings_table(i, r), folder / f"{index}.parquet")
    return str(folder)


def plain_context(out: Path) -> Context:
    return Context(RunDirectory(str(out)), out=str(out))


def in_place(
    function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]], *, shared: Any = None, **_: Any
) -> Iterator[tuple[str, Any]]:
    """What `pipelines.cluster.spread` does, in this process, and with the results arriving last first."""
    yield from [(name, function(*arguments, shared)) for name, arguments in calls][::-1]


def tables(context: Context, stage: str, generation: int = -1) -> pa.Table:
    """All rows of a generation of a stage."""
    found = context.stage(stage).generations()[generation]
    return pa.concat_tables([pq.read_table(path) for path in found.part_paths])


def contents(folder: str) -> dict[str, bytes]:
    """Every file that must be equal in two runs, by its path."""
    fs, inner = storage.filesystem(folder)
    files = [f for f in fs.find(inner) if not f.rsplit("/", 1)[-1].startswith(("_timings", "events"))]
    return {f[len(inner) :]: storage.read_bytes(f) for f in files}
