"""Cluster: k-means, flat or hierarchical, of the kept pool images; every image gets its path through the levels.

The centroids are trained on a seeded sample, a Lloyd step being one Ray task per block of it, then every partition is
assigned to them. Every step is kept, so that a stage that was killed goes on from there. A later generation assigns
its rows to the stored centroids: clusters never change under what was built on them.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from curation import hierarchy, order, storage, vectors
from curation.clusters import (
    ArrayPoints,
    BlockSums,
    Points,
    Progress,
    Step,
    block_sums,
    seeds_of_cell,
    split_rows,
    wide_grouping,
)
from curation.errors import UserError
from curation.halves import widen
from curation.hierarchy import Hierarchy
from curation.nearest import CHUNK, FLAT, Grouping, Known, nearest_centroid
from curation.vectors import MODEL_KEY, VectorSet
from pipelines import embedded
from pipelines.context import Context, Outcome, StageConfig
from pipelines.embedded import SCRATCH, EmbeddingPart
from pipelines.run_directory import Generation, PartRecord, PartWriter

NAME = "cluster"
REVISION = 2
LIBRARIES = ("numba", "numpy")
HEAVY = 1 << 21
"""Multiply-adds of a vector from which a GPU is worth asking for; reading the vector costs a core as much as some
hundred thousand."""
BLOCK_ROWS = 65_536
"""Training vectors per block, about, and at least twice the clusters: a block is one task of a Lloyd step."""


class ClusterConfig(StageConfig):
    """Options of `curate cluster`."""

    levels: list[int] = Field([100], min_length=1, description="clusters per level, leaf first, e.g. 1000,100,10")
    model: str | None = Field(None, description="embedding to cluster; default: the first of embed.models")
    iterations: int = Field(50, ge=1, description="Lloyd steps at most; they stop when the objective does")
    points_per_centroid: int = Field(256, ge=1, description="training sample: so many images per leaf cluster")
    spherical: bool = Field(False, description="keep centroids at unit length: clusters by cosine")
    resample_steps: list[int] = Field(
        [],
        description="per level, leaf first: re-runs of k-means on the points nearest each centroid; default 0,10,10,…",
    )
    resample_size: list[int] = Field(
        [], description="per level: points nearest each centroid to re-run on; default half the mean cluster"
    )

    @field_validator("levels")
    @classmethod
    def _shrinking(cls, levels: list[int]) -> list[int]:
        if any(count < 1 for count in levels):
            raise ValueError("a level has at least 1 cluster")
        if any(coarse >= fine for fine, coarse in itertools.pairwise(levels)):
            raise ValueError("every level needs fewer clusters than the one before it (leaf first)")
        return levels

    @model_validator(mode="after")
    def _one_per_level(self) -> "ClusterConfig":
        for name, least in (("resample_steps", 0), ("resample_size", 1)):
            given = getattr(self, name)
            if given and len(given) != len(self.levels):
                raise ValueError(f"{name} has {len(given)} values for {len(self.levels)} levels")
            if any(value < least for value in given):
                raise ValueError(f"{name} has a value below {least}")
        return self


def execute(context: Context, config: ClusterConfig, *, embeddings: str | None = None) -> Outcome:
    """Cluster the pool of a run, or the plain folder `embeddings`. Raises UserError for more clusters than images."""
    options = config.fingerprint_options()
    inputs: list[str] = []
    extra: dict[str, Any] = {}
    if embeddings is not None:
        opened, parts = embedded.folder_parts(embeddings)
        _refuse_too_few(opened.rows, config, embeddings)
        _refuse_too_large(context, config, opened.dimension)
        ids = opened.all_ids()
        vectors.refuse_repeated_ids(ids, embeddings)
        extra = {"embeddings": embedded.files_digest(part.path for part in parts)}
    else:
        inputs = [embedded.stage_of(context, config.model)]
        first = not context.stage(NAME).generations() or context.rebuild
        everything = context.run.stage(inputs[0]).generations()
        if first:
            rows = sum(part.rows for part in embedded.pool_parts(context, everything))
            _refuse_too_few(rows, config, context.run.path(inputs[0]))
        # Which model was meant is said by the input; its name in the options may be left out.
        options["model"] = inputs[0]
    generation = context.begin_rows(NAME, REVISION, options, inputs, LIBRARIES, extra)
    if generation is None:
        return context.skipped(NAME)
    if embeddings is None:
        numbers = generation.consumed[inputs[0]]
        mine = [g for g in context.run.stage(inputs[0]).generations() if g.number in numbers]
        parts = embedded.pool_parts(context, mine)
    with embedded.bad_input_taken_back(context, generation):
        return _cluster(context, config, generation, parts)


def _refuse_too_few(rows: int, config: ClusterConfig, where: str) -> None:
    if config.levels[0] > rows:
        raise UserError(
            f"cluster.levels: {config.levels[0]:,} clusters of {rows:,} images in {where}; "
            "ask for at most as many clusters as images"
        )


def _refuse_too_large(context: Context, config: ClusterConfig, dimension: int) -> None:
    need, given = task_bytes(config.levels[0], dimension), context.resources.memory_bytes
    if need > given:
        raise UserError(
            f"cluster.levels: {config.levels[0]:,} clusters of {dimension:,} dimensions take {need / 2**30:.1f} GiB in "
            f"every worker, and resources.memory_per_worker is {context.resources.memory_per_worker}: "
            "raise it, or ask for fewer leaf clusters"
        )


def task_bytes(clusters: int, dimension: int) -> int:
    """Memory that one task of a Lloyd step takes: centroids twice, the float64 sums, a block and its products."""
    block = _block_rows(clusters)
    centroids = 8 * clusters * dimension
    sums = 8 * min(clusters, block) * dimension
    vectors = 4 * dimension * (block if clusters <= FLAT else CHUNK) + 1024 * block
    products = 8 * CHUNK * (clusters if clusters <= FLAT else 4 * int(clusters**0.5))
    return centroids + sums + vectors + products + (200 << 20)


def is_heavy(clusters: int, dimension: int) -> bool:
    """Whether the search for the nearest of so many centroids is worth a share of a GPU."""
    return dimension * (clusters if clusters <= FLAT else 6 * int(clusters**0.5)) >= HEAVY


def _block_rows(clusters: int) -> int:
    return max(BLOCK_ROWS, 2 * clusters)


def _cluster(context: Context, config: ClusterConfig, generation: Generation, parts: list[EmbeddingPart]) -> Outcome:
    earlier = [g for g in context.stage(NAME).generations() if g.number < generation.number]
    summary: dict[str, Any] = {}
    if earlier:
        built, sizes, model = hierarchy.read_hierarchy(earlier[-1].directory)
    else:
        opened = embedded.open_parts(parts)
        _refuse_too_large(context, config, opened.dimension)
        built, summary = _trained(context, config, generation, opened)
        sizes, model = [np.zeros(count, np.int64) for count in built.levels], opened.model
    metadata = {MODEL_KEY.decode(): model} if model else {}
    tasks = [(part.name, part) for part in parts]
    context.map_parts(
        generation,
        tasks,
        _assign_part,
        shared=(built, wide_grouping(built.centroids[0]), metadata),
        heavy=is_heavy(*built.centroids[0].shape),
    )
    counted = embedded.leaf_sizes(context, generation.part_paths, built.levels[0])
    sizes = [old + new for old, new in zip(sizes, built.sizes(counted), strict=True)]
    for level in range(len(built.levels)):
        data = hierarchy.level_bytes(built, level, sizes[level], metadata)
        generation.put_file(hierarchy.level_file(level), data)
    rows = sum(part.rows for part in generation.parts)
    summary = {
        "images": int(sizes[0].sum()),
        "levels": list(built.levels),
        **summary,
        "mean_squared_distance": round(generation.total("squares") / rows, 9) if rows else 0.0,
        "largest_cluster": int(sizes[0].max()),
        "empty_clusters": int((sizes[0] == 0).sum()),
        "effective_clusters": [round(hierarchy.effective_number(level), 3) for level in sizes],
    }
    embedded.remove_scratch(generation)
    return context.finish(generation, summary)


def _assign_part(
    writer: PartWriter, name: str, part: EmbeddingPart, shared: tuple[Hierarchy, Grouping | None, dict[str, str]]
) -> PartRecord:
    built, grouping, metadata = shared
    ids, rows = vectors.read_vectors(part.path, built.dimension)
    labels, squares = nearest_centroid(rows, built.centroids[0], grouping)
    table = hierarchy.clusters_table(ids, built, labels, squares)
    return writer.write(name, table, counts={"squares": float(squares.sum())}, metadata=metadata)


# ---- training -------------------------------------------------------------------------------------------------------


def _trained(
    context: Context, config: ClusterConfig, generation: Generation, opened: VectorSet
) -> tuple[Hierarchy, dict[str, Any]]:
    """The centroids: made, or found again where an interrupted attempt left them."""
    path = generation.file(f"{SCRATCH}/trained.npz")
    digest = generation.fingerprint.digest
    if storage.exists(path):
        with np.load(io.BytesIO(storage.read_bytes(path))) as found:
            if str(found["fingerprint"]) == digest:
                levels = len(config.levels)
                built = Hierarchy(
                    tuple(found[f"centroids_{k}"] for k in range(levels)),
                    tuple(found[f"parents_{k}"] for k in range(levels - 1)),
                )
                return built, {
                    "sample": int(found["sample"]),
                    "objective": found["objective"].tolist(),
                    "iterations": found["iterations"].tolist(),
                }
    points = _sample(context, config, generation, opened)
    built, reports = hierarchy.build(
        points,
        config.levels,
        seed=context.seed,
        iterations=config.iterations,
        spherical=config.spherical,
        resample_steps=config.resample_steps,
        resample_size=config.resample_size,
        watch=ScratchWatch(context, generation.file(SCRATCH), digest),
    )
    summary = {
        "sample": sum(points.block_rows),
        "objective": [report.objective for report in reports],
        "iterations": [report.iterations for report in reports],
    }
    arrays = {f"centroids_{k}": array for k, array in enumerate(built.centroids)}
    arrays |= {f"parents_{k}": array for k, array in enumerate(built.parents)}
    data = io.BytesIO()
    arrays |= {name: np.asarray(value) for name, value in summary.items()}
    arrays["fingerprint"] = np.array(digest)
    np.savez(data, **arrays)  # type: ignore[arg-type]
    storage.write_whole(path, data.getvalue())
    return built, summary


def _sample(context: Context, config: ClusterConfig, generation: Generation, opened: VectorSet) -> "ScratchPoints":
    """The training vectors, first in hash order of their ids, as raw blocks in the generation's scratch folder."""
    wanted = min(opened.rows, config.points_per_centroid * config.levels[0])
    wanted = max(wanted, config.levels[0])
    partitions = opened.partitions
    cut = np.uint64(2**64 - 1)
    if wanted < opened.rows:
        # Keys are uniform: six standard deviations more than the expected number hold the ones wanted.
        bound = min(1.0, (wanted + 6 * wanted**0.5 + 6) / opened.rows)
        key_calls = ((p.path, (p.path, context.seed, int(bound * (2**64 - 1)))) for p in partitions)
        keys = np.concatenate([found for _, found in context.spread(_low_keys, key_calls)])
        cut = np.partition(keys, wanted - 1)[wanted - 1] if len(keys) >= wanted else cut
    share = wanted / opened.rows
    groups: list[list[str]] = [[]]
    expected = 0.0
    for partition in partitions:
        if groups[-1] and expected + partition.rows * share > _block_rows(config.levels[0]):
            groups.append([])
            expected = 0.0
        groups[-1].append(partition.path)
        expected += partition.rows * share
    names = [generation.file(f"{SCRATCH}/sample-{index:06d}.npy") for index in range(len(groups))]
    calls = (
        (name, (name, paths, opened.dimension, context.seed, int(cut)))
        for name, paths in zip(names, groups, strict=True)
    )
    rows = dict(context.spread(_write_sample, calls))
    blocks = tuple(ScratchBlock(name, rows[name], None, f"{name}.known") for name in names if rows[name])
    need = task_bytes(config.levels[0], opened.dimension)
    return ScratchPoints(context, opened.dimension, blocks, generation.file(SCRATCH), need)


def _low_keys(path: str, seed: int, bound: int, _: None) -> np.ndarray:
    (ids,) = embedded.read_columns(path, ["image_id"])
    keys = order.hash_keys(ids, seed, "cluster sample")
    return np.asarray(keys[keys <= np.uint64(bound)])


def _write_sample(name: str, paths: Sequence[str], dimension: int, seed: int, cut: int, _: None) -> int:
    if storage.exists(name):
        return len(_load(name))
    chosen = []
    for path in paths:
        ids, rows = vectors.read_vectors(path, dimension)
        chosen.append(rows[order.hash_keys(ids, seed, "cluster sample") <= np.uint64(cut)])
    data = io.BytesIO()
    np.save(data, np.concatenate(chosen))
    storage.write_whole(name, data.getvalue())
    return sum(len(rows) for rows in chosen)


@dataclass(frozen=True)
class ScratchWatch:
    """`curation.clusters.Watch`: the last step of every k-means in the scratch folder, its objective in the events."""

    context: Context
    folder: str
    digest: str

    def found(self, purpose: str) -> Progress | None:
        path = self._path(purpose)
        if not storage.exists(path):
            return None
        with np.load(io.BytesIO(storage.read_bytes(path))) as kept:
            return Progress(int(kept["step"]), kept["centroids"], float(kept["before"]))

    def keep(self, purpose: str, progress: Progress) -> None:
        data = io.BytesIO()
        np.savez(data, step=progress.step, centroids=progress.centroids, before=progress.before)
        storage.write_whole(self._path(purpose), data.getvalue())

    def tell(self, purpose: str, step: int, objective: float, empty: int) -> None:
        moved = f", {empty:,} empty clusters" if empty else ""
        text = f"{purpose}: step {step}, mean squared distance {objective:.6f}{moved}"
        self.context.events.emit("message", NAME, text=text, purpose=purpose, step=step, objective=objective)

    def _path(self, purpose: str) -> str:
        word = hashlib.blake2b(f"{self.digest}:{purpose}".encode(), digest_size=8).hexdigest()
        return f"{self.folder}/progress-{word}.npz"


@dataclass(frozen=True)
class ScratchBlock:
    """A raw file of vectors. chosen: the rows that count, None for all. known: the file a step leaves for the next."""

    path: str
    rows: int
    chosen: np.ndarray | None
    known: str

    def read(self, rows: np.ndarray | None = None) -> np.ndarray:
        """All that count, or those of these rows."""
        array = _load(self.path)
        if self.chosen is not None:
            rows = self.chosen if rows is None else self.chosen[rows]
        return array if rows is None else array[rows]


def _load(path: str) -> np.ndarray:
    if storage.is_local(path):
        return np.asarray(np.load(storage.filesystem(path)[1], mmap_mode="r"))
    return np.asarray(np.load(io.BytesIO(storage.read_bytes(path))))


@dataclass(frozen=True)
class ScratchPoints:
    """`curation.clusters.Points` on disk: one Ray task per block and step, and per cell of the seeding."""

    context: Context
    dimension: int
    blocks: tuple[ScratchBlock, ...]
    folder: str
    task_memory: int

    @property
    def block_rows(self) -> Sequence[int]:
        return [block.rows for block in self.blocks]

    def sums(self, step: Step) -> Iterator[BlockSums]:
        heavy = is_heavy(*step.centroids.shape)
        return self._in_order(_sum_block, ((block,) for block in self.blocks), step, heavy)

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shared = (centroids, wide_grouping(centroids))
        heavy = is_heavy(*centroids.shape)
        found = list(self._in_order(_assign_block, ((block,) for block in self.blocks), shared, heavy))
        return np.concatenate([labels for labels, _ in found]), np.concatenate([squares for _, squares in found])

    def seeds(
        self, cells: Sequence[np.ndarray], counts: Sequence[int], seed: int, purpose: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        numbered = enumerate(zip(cells, counts, strict=True))
        calls = ((rows, count, seed, f"{purpose}, cell {number}") for number, (rows, count) in numbered)
        return list(self._in_order(_seed_cell, calls, self.blocks))

    def take(self, rows: np.ndarray) -> np.ndarray:
        return _take(self.blocks, rows)

    def subset(self, rows: np.ndarray) -> "ScratchPoints":
        parts = split_rows(rows, self.block_rows)
        blocks = tuple(
            ScratchBlock(
                block.path,
                len(local),
                local if block.chosen is None else block.chosen[local],
                f"{block.known}-{hashlib.blake2b(local.tobytes(), digest_size=8).hexdigest()}",
            )
            for block, local in zip(self.blocks, parts, strict=True)
            if len(local)
        )
        return replace(self, blocks=blocks)

    def hold(self, vectors: np.ndarray, name: str) -> Points:
        """In memory as long as they are few."""
        if len(vectors) <= BLOCK_ROWS:
            return ArrayPoints((vectors,))
        blocks = []
        for index, start in enumerate(range(0, len(vectors), BLOCK_ROWS)):
            path = f"{self.folder}/{name}-{index:06d}.npy"
            data = io.BytesIO()
            np.save(data, vectors[start : start + BLOCK_ROWS])
            storage.write_whole(path, data.getvalue())
            blocks.append(ScratchBlock(path, len(vectors[start : start + BLOCK_ROWS]), None, f"{path}.known"))
        return replace(self, blocks=tuple(blocks))

    def _in_order(
        self, function: Any, calls: Iterable[tuple[Any, ...]], shared: Any, heavy: bool = False
    ) -> Iterator[Any]:
        """Results in the order of the calls, whatever order they arrive in."""
        named = ((str(number), arguments) for number, arguments in enumerate(calls))
        waiting: dict[int, Any] = {}
        following = 0
        spread = self.context.spread(function, named, shared=shared, memory_bytes=self.task_memory, heavy=heavy)
        for name, result in spread:
            waiting[int(name)] = result
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _take(blocks: Sequence[ScratchBlock], rows: np.ndarray) -> np.ndarray:
    parts = split_rows(rows, [block.rows for block in blocks])
    return np.concatenate([widen(b.read(local)) for b, local in zip(blocks, parts, strict=True) if len(local)])


def _sum_block(block: ScratchBlock, step: Step) -> BlockSums:
    known: Known | None = None
    if step.before and storage.exists(block.known):
        with np.load(io.BytesIO(storage.read_bytes(block.known))) as kept:
            if str(kept["key"]) == step.before:
                known = Known(kept["labels"], kept["norms"], kept["lower"])
    sums, known = block_sums(block.read(), step, known)
    if known is not None:
        data = io.BytesIO()
        np.savez(data, key=np.array(step.key), labels=known.labels, norms=known.norms, lower=known.lower)
        storage.write_whole(block.known, data.getvalue())
    return sums


def _assign_block(block: ScratchBlock, shared: tuple[np.ndarray, Grouping | None]) -> tuple[np.ndarray, np.ndarray]:
    return nearest_centroid(block.read(), *shared)


def _seed_cell(
    rows: np.ndarray, count: int, seed: int, purpose: str, blocks: tuple[ScratchBlock, ...]
) -> tuple[np.ndarray, np.ndarray]:
    return seeds_of_cell(lambda wanted: _take(blocks, wanted), rows, count, seed, purpose)
