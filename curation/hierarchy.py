"""Hierarchical k-means: k-means of centroids, repeated, with resampling (Vo et al., arXiv 2405.15613).

Flat k-means puts its centroids where the data is dense; k-means of those centroids, again and again, tends to
spread them evenly over what the data supports. Resampling re-runs the k-means of a level on the few points
nearest each of its centroids, so that big clusters do not decide where the next centroids go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import parquet, storage
from curation.clusters import ArrayPoints, KMeans, Points, Watch, kmeans, nearest_members
from curation.errors import UserError
from curation.schemas import centroids_schema, clusters_schema
from curation.vectors import MODEL_KEY


@dataclass(frozen=True)
class Hierarchy:
    """Centroids of every level, leaf first, and how the levels hang together."""

    centroids: tuple[np.ndarray, ...]
    """(k_l, d) float32 each."""
    parents: tuple[np.ndarray, ...]
    """(k_l,) int32 each, but for the coarsest level: the cluster of the next level that holds it."""

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(len(c) for c in self.centroids)

    @property
    def dimension(self) -> int:
        return int(self.centroids[0].shape[1])

    def path(self, leaves: np.ndarray) -> list[np.ndarray]:
        """Clusters of every level, leaf first. leaves: (n,) int32."""
        path = [leaves]
        for parent in self.parents:
            path.append(parent[path[-1]])
        return path

    def sizes(self, leaf_sizes: np.ndarray) -> list[np.ndarray]:
        """(k_l,) int64 images below every cluster, leaf first."""
        sizes = [leaf_sizes.astype(np.int64)]
        for parent, coarser in zip(self.parents, self.centroids[1:], strict=True):
            above = np.zeros(len(coarser), np.int64)
            np.add.at(above, parent, sizes[-1])
            sizes.append(above)
        return sizes


@dataclass(frozen=True)
class LevelReport:
    """How the k-means of one level ended. objective: mean squared distance of its points to their centroid."""

    clusters: int
    points: int
    objective: float
    iterations: int
    resampled: int


def build(
    points: Points,
    levels: Sequence[int],
    *,
    seed: int,
    iterations: int = 50,
    spherical: bool = False,
    resample_steps: Sequence[int] = (),
    resample_size: Sequence[int] = (),
    watch: Watch | None = None,
) -> tuple[Hierarchy, list[LevelReport]]:
    """Cluster `points` into levels[0] leaves, their centroids into levels[1], and so on.

    resample_steps, resample_size: per level, leaf first; default `default_steps` and `default_size`. watch: keeps and
    tells the progress of levels that are not held in memory.
    """
    steps = list(resample_steps) or default_steps(len(levels))
    centroids: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    reports: list[LevelReport] = []
    below = points
    for level, count in enumerate(levels):
        rows = sum(below.block_rows)
        size = resample_size[level] if resample_size else default_size(rows, count)
        purpose = f"cluster {level + 1}"
        found, resampled = _level(below, count, steps[level], size, seed, purpose, iterations, spherical, watch)
        labels, squares = below.assign(found.centroids) if level or resampled else (np.empty(0, np.int32), np.empty(0))
        if level:
            parents.append(labels)
        objective = float(squares.sum()) / rows if len(squares) else found.objective
        reports.append(LevelReport(count, rows, objective, found.iterations, resampled))
        centroids.append(found.centroids)
        below = points.hold(found.centroids, f"level-{level + 1}")
        if isinstance(below, ArrayPoints):
            watch = None  # Few enough to do again.
    return Hierarchy(tuple(centroids), tuple(parents)), reports


def default_steps(levels: int) -> list[int]:
    """None at the leaves, where the points are the data themselves; 10 above (the paper's web pool)."""
    return [0] + [10] * (levels - 1)


def default_size(points: int, clusters: int) -> int:
    """About half the mean cluster, as the paper chooses."""
    return max(1, points // (2 * clusters))


def _level(
    points: Points,
    count: int,
    steps: int,
    size: int,
    seed: int,
    purpose: str,
    iterations: int,
    spherical: bool,
    watch: Watch | None,
) -> tuple[KMeans, int]:
    found = kmeans(points, count, seed=seed, purpose=purpose, iterations=iterations, spherical=spherical, watch=watch)
    done = 0
    for step in range(1, steps + 1):
        rows = nearest_members(*points.assign(found.centroids), size)
        if len(rows) < count:
            break
        found = kmeans(
            points.subset(rows),
            count,
            seed=seed,
            purpose=f"{purpose}, resampling {step}",
            iterations=iterations,
            spherical=spherical,
            watch=watch,
        )
        done = step
    return found, done


def effective_number(sizes: np.ndarray) -> float:
    """exp(entropy): how many clusters of equal size are as diverse. sizes: (k,) counts."""
    shares = sizes[sizes > 0] / max(1, sizes.sum())
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def clusters_table(ids: np.ndarray, hierarchy: Hierarchy, leaves: np.ndarray, squares: np.ndarray) -> pa.Table:
    """Rows of the `clusters` table. ids: (n,) uint64, leaves: (n,) int32, squares: (n,) float64."""
    path = [pa.array(clusters, pa.int32()) for clusters in hierarchy.path(leaves)]
    distance = pa.array(np.sqrt(squares).astype(np.float32))
    return pa.Table.from_arrays(
        [pa.array(ids, pa.uint64()), *path, distance], schema=clusters_schema(len(hierarchy.levels))
    )


def level_bytes(hierarchy: Hierarchy, level: int, sizes: np.ndarray, metadata: dict[str, str]) -> bytes:
    """`centroids/level-K.parquet` of level index `level` (0 is the leaf), sizes (k,) int64."""
    centroids = hierarchy.centroids[level]
    last = level == len(hierarchy.centroids) - 1
    parents = pa.nulls(len(centroids), pa.int32()) if last else pa.array(hierarchy.parents[level], pa.int32())
    schema = centroids_schema(hierarchy.dimension)
    values = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1), pa.float32()), hierarchy.dimension)
    columns = [pa.array(np.arange(len(centroids)), pa.int32()), parents, pa.array(sizes, pa.int64())]
    table = pa.Table.from_arrays([*columns, values.cast(schema.field("centroid").type)], schema=schema)
    return storage.table_bytes(table, metadata)


def level_file(level: int) -> str:
    """Where the centroids of level index `level` lie under the clusters' folder."""
    return f"centroids/level-{level + 1}.parquet"


def level_paths(folder: str) -> list[str]:
    """The files of centroids that are there, leaf first."""
    paths: list[str] = []
    while storage.exists(storage.join(folder, level_file(len(paths)))):
        paths.append(storage.join(folder, level_file(len(paths))))
    return paths


def read_hierarchy(folder: str) -> tuple[Hierarchy, list[np.ndarray], str | None]:
    """(hierarchy, sizes of every level, model) of a folder of clusters. Raises UserError."""
    paths = level_paths(folder)
    if not paths:
        where = "has no centroids/level-1.parquet" if storage.exists(folder) else "does not exist"
        raise UserError(f"{folder}: {where}; give a folder that `curate cluster` wrote")
    centroids, parents, sizes = [], [], []
    model: str | None = None
    for path in paths:
        try:
            table = parquet.read_table(path)
            flat = table["centroid"].combine_chunks().flatten().to_numpy()
            centroids.append(np.ascontiguousarray(flat.reshape(table.num_rows, -1), dtype=np.float32))
            parents.append(table["parent"].fill_null(-1).to_numpy().astype(np.int32))
            sizes.append(table["size"].to_numpy().astype(np.int64))
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a table of centroids ({str(error).splitlines()[0]})") from error
        found = (table.schema.metadata or {}).get(MODEL_KEY)
        model = found.decode() if found else None
    return Hierarchy(tuple(centroids), tuple(parents[:-1])), sizes, model
