"""Cluster: k-means, flat or hierarchical, of the kept pool images; every image gets its path through the levels.

The centroids are trained on a seeded sample, then every partition is assigned to them. A later generation
assigns its rows to the stored centroids: clusters never change under what was built on them.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from curation import hierarchy, order, storage, vectors
from curation.clusters import BlockSums, block_sums, nearest_centroid, split_rows
from curation.errors import UserError
from curation.hierarchy import Hierarchy
from curation.vectors import MODEL_KEY, VectorSet
from pipelines import embedded
from pipelines.context import Context, Outcome, StageConfig
from pipelines.embedded import SCRATCH, EmbeddingPart
from pipelines.run_directory import Generation, PartRecord, PartWriter

NAME = "cluster"
REVISION = 1
LIBRARIES = ("faiss-cpu", "numpy")
BLOCK_ROWS = 65_536
"""Training vectors per block, about: a block is one task of a Lloyd step."""


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


def _cluster(context: Context, config: ClusterConfig, generation: Generation, parts: list[EmbeddingPart]) -> Outcome:
    earlier = [g for g in context.stage(NAME).generations() if g.number < generation.number]
    summary: dict[str, Any] = {}
    if earlier:
        built, sizes, model = hierarchy.read_hierarchy(earlier[-1].directory)
    else:
        opened = embedded.open_parts(parts)
        built, summary = _trained(context, config, generation, opened)
        sizes, model = [np.zeros(count, np.int64) for count in built.levels], opened.model
    metadata = {MODEL_KEY.decode(): model} if model else {}
    tasks = [(part.name, part) for part in parts]
    context.map_parts(generation, tasks, _assign_part, shared=(built, metadata))
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
    writer: PartWriter, name: str, part: EmbeddingPart, shared: tuple[Hierarchy, dict[str, str]]
) -> PartRecord:
    built, metadata = shared
    ids, rows = vectors.read_vectors(part.path, built.dimension)
    labels, squares = nearest_centroid(rows, built.centroids[0])
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
        if groups[-1] and expected + partition.rows * share > BLOCK_ROWS:
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
    blocks = tuple(ScratchBlock(name, rows[name], None) for name in names if rows[name])
    return ScratchPoints(context, opened.dimension, blocks)


def _low_keys(path: str, seed: int, bound: int, _: None) -> np.ndarray:
    (ids,) = embedded.read_columns(path, ["image_id"])
    keys = order.hash_keys(ids, seed, "cluster sample")
    return np.asarray(keys[keys <= np.uint64(bound)])


def _write_sample(name: str, paths: Sequence[str], dimension: int, seed: int, cut: int, _: None) -> int:
    chosen = []
    for path in paths:
        ids, rows = vectors.read_vectors(path, dimension)
        chosen.append(rows[order.hash_keys(ids, seed, "cluster sample") <= np.uint64(cut)])
    data = io.BytesIO()
    np.save(data, np.concatenate(chosen))
    storage.write_whole(name, data.getvalue())
    return sum(len(rows) for rows in chosen)


@dataclass(frozen=True)
class ScratchBlock:
    """A raw file of vectors. chosen: the rows that count, None for all."""

    path: str
    rows: int
    chosen: np.ndarray | None

    def read(self) -> np.ndarray:
        array: np.ndarray
        if storage.is_local(self.path):
            array = np.load(storage.filesystem(self.path)[1], mmap_mode="r")
        else:
            array = np.load(io.BytesIO(storage.read_bytes(self.path)))
        return array if self.chosen is None else array[self.chosen]


@dataclass(frozen=True)
class ScratchPoints:
    """`curation.clusters.Points` on disk: one Ray task per block and step."""

    context: Context
    dimension: int
    blocks: tuple[ScratchBlock, ...]

    @property
    def block_rows(self) -> Sequence[int]:
        return [block.rows for block in self.blocks]

    def sums(self, centroids: np.ndarray) -> Iterator[BlockSums]:
        return self._in_order(_sum_block, centroids)

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = list(self._in_order(_assign_block, centroids))
        return np.concatenate([labels for labels, _ in found]), np.concatenate([squares for _, squares in found])

    def take(self, rows: np.ndarray) -> np.ndarray:
        parts = split_rows(rows, self.block_rows)
        taken = [b.read()[local].astype(np.float32) for b, local in zip(self.blocks, parts, strict=True) if len(local)]
        return np.concatenate(taken)

    def subset(self, rows: np.ndarray) -> "ScratchPoints":
        parts = split_rows(rows, self.block_rows)
        blocks = [
            replace(block, rows=len(local), chosen=local if block.chosen is None else block.chosen[local])
            for block, local in zip(self.blocks, parts, strict=True)
            if len(local)
        ]
        return replace(self, blocks=tuple(blocks))

    def _in_order(self, function: Any, centroids: np.ndarray) -> Iterator[Any]:
        """Results in block order, whatever order they arrive in."""
        calls: Iterable[tuple[str, tuple[Any, ...]]] = ((str(i), (block,)) for i, block in enumerate(self.blocks))
        waiting: dict[int, Any] = {}
        following = 0
        for name, result in self.context.spread(function, calls, shared=centroids):
            waiting[int(name)] = result
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _sum_block(block: ScratchBlock, centroids: np.ndarray) -> BlockSums:
    return block_sums(block.read(), centroids)


def _assign_block(block: ScratchBlock, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return nearest_centroid(block.read(), centroids)
