"""k-means over blocks of vectors: equal centroids whoever computes the blocks, and on however many workers.

A Lloyd step maps the blocks to counts and float64 sums and adds these in block order. Seeds are drawn by
k-means++ (Arthur and Vassilvitskii 2007, with its greedy trials). A cluster that falls empty moves to the
farthest member of the cluster that fits worst. FAISS finds the nearest centroid, always on one thread: with
another number of threads the last bits of its float32 products change.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from curation.order import generator
from curation.search import require_faiss

CHUNK = 8192
"""Vectors compared at a time: bounds the float32 and float64 copies."""
SEEDING_POINTS = 24
"""Vectors per centroid that the seeding looks at."""
ONE_BY_ONE = 64
"""Seeds that are drawn one at a time; more at once cost rows * k * d as well, but in few large products."""
TRIALS = 4
TOLERANCE = 1e-5
"""Lloyd stops when a step lowers the objective by less than this share of it."""
REPAIRS = 20
"""Further steps that may follow the last one while a cluster is empty."""


@dataclass(frozen=True)
class BlockSums:
    """What one block gives to a Lloyd step, for the t clusters that own vectors of it."""

    clusters: np.ndarray
    """(t,) int64, ascending."""
    counts: np.ndarray
    """(t,) int64."""
    sums: np.ndarray
    """(t, d) float64."""
    squares: np.ndarray
    """(t,) float64, sums of squared distances to the centroid."""
    farthest: np.ndarray
    """(t,) int64, row in the block of the member farthest from the centroid."""
    farthest_square: np.ndarray
    """(t,) float64."""


class Points(Protocol):
    """Vectors in blocks, in memory or on disk. Rows count through the blocks."""

    @property
    def block_rows(self) -> Sequence[int]: ...

    @property
    def dimension(self) -> int: ...

    def sums(self, centroids: np.ndarray) -> Iterable[BlockSums]:
        """`block_sums` of each block, in order."""

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`nearest_centroid` of all rows: (n,) int32, (n,) float64."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(m, d) float32 of the (m,) ascending row numbers."""

    def subset(self, rows: np.ndarray) -> "Points":
        """The points of these ascending rows alone."""


@dataclass(frozen=True)
class ArrayPoints:
    """Points in memory. blocks: arrays (n_i, d) of float16 or float32."""

    blocks: tuple[np.ndarray, ...]

    @property
    def block_rows(self) -> Sequence[int]:
        return [len(block) for block in self.blocks]

    @property
    def dimension(self) -> int:
        return int(self.blocks[0].shape[1])

    def sums(self, centroids: np.ndarray) -> Iterator[BlockSums]:
        return (block_sums(block, centroids) for block in self.blocks)

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [nearest_centroid(block, centroids) for block in self.blocks]
        return np.concatenate([labels for labels, _ in found]), np.concatenate([squares for _, squares in found])

    def take(self, rows: np.ndarray) -> np.ndarray:
        parts = split_rows(rows, self.block_rows)
        taken = [block[local].astype(np.float32) for block, local in zip(self.blocks, parts, strict=True)]
        return np.concatenate(taken)

    def subset(self, rows: np.ndarray) -> "ArrayPoints":
        parts = split_rows(rows, self.block_rows)
        return ArrayPoints(tuple(block[local] for block, local in zip(self.blocks, parts, strict=True) if len(local)))


@dataclass(frozen=True)
class KMeans:
    """The result. objective: mean squared distance of the points to their centroid."""

    centroids: np.ndarray
    objective: float
    iterations: int


def kmeans(
    points: Points, count: int, *, seed: int, purpose: str, iterations: int = 50, spherical: bool = False
) -> KMeans:
    """`count` centroids, (count, d) float32. No cluster of `points` is empty while there are distinct points for all.

    purpose: keys the random choices together with `seed`. spherical: centroids are kept at unit length.
    """
    rows = sum(points.block_rows)
    if not 1 <= count <= rows:
        raise ValueError(f"{count} clusters of {rows} points")
    centroids = _seeding(points, count, generator(seed, purpose))
    before, step = math.inf, 0
    while True:
        total = _Total(points, centroids)
        objective = float(total.squares.sum()) / rows
        empty = np.flatnonzero(total.counts == 0)
        donors = total.donors(len(empty))
        settled = step >= iterations or before - objective <= TOLERANCE * objective
        if (settled and not len(donors)) or step >= iterations + REPAIRS:
            return KMeans(centroids, objective, step)
        centroids = total.means(centroids)
        for cluster, row in zip(empty, total.farthest[donors], strict=False):
            centroids[cluster] = points.take(np.array([row]))[0]
        if spherical:
            centroids = _unit(centroids)
        before = math.inf if len(donors) else objective
        step += 1


def nearest_centroid(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int32 nearest centroid of each vector, (n,) float64 squared Euclidean distance to it.

    vectors: (n, d) float16 or float32. centroids: (k, d) float32. The choice is made in float32, the distance in
    float64.
    """
    faiss = require_faiss()
    labels = np.empty(len(vectors), np.int32)
    squares = np.empty(len(vectors), np.float64)
    with one_thread():
        for start in range(0, len(vectors), CHUNK):
            chunk = np.ascontiguousarray(vectors[start : start + CHUNK], dtype=np.float32)
            nearest = faiss.knn(chunk, centroids, 1)[1][:, 0]
            difference = chunk.astype(np.float64) - centroids[nearest]
            labels[start : start + CHUNK] = nearest
            squares[start : start + CHUNK] = np.einsum("nd,nd->n", difference, difference)
    return labels, squares


def block_sums(vectors: np.ndarray, centroids: np.ndarray) -> BlockSums:
    """A block's part of a Lloyd step. vectors: (n, d), centroids: (k, d) float32."""
    labels, squares = nearest_centroid(vectors, centroids)
    order = np.lexsort((np.arange(len(labels)), squares, labels))
    clusters, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    sums = np.zeros((len(clusters), centroids.shape[1]))
    place = np.searchsorted(clusters, labels)
    for start in range(0, len(vectors), CHUNK):
        local = place[start : start + CHUNK]
        by_cluster = np.argsort(local, kind="stable")
        mine, first = np.unique(local[by_cluster], return_index=True)
        sums[mine] += np.add.reduceat(vectors[start : start + CHUNK][by_cluster].astype(np.float64), first, axis=0)
    farthest = order[starts + counts - 1]
    return BlockSums(
        clusters.astype(np.int64),
        counts.astype(np.int64),
        sums,
        np.bincount(place, weights=squares, minlength=len(clusters)),
        farthest.astype(np.int64),
        squares[farthest],
    )


def nearest_members(labels: np.ndarray, squares: np.ndarray, size: int) -> np.ndarray:
    """Ascending rows of the `size` members nearest each centroid; ties by row. labels, squares: (n,)."""
    order = np.lexsort((np.arange(len(labels)), squares, labels))
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    return np.sort(order[rank < size])


def split_rows(rows: np.ndarray, block_rows: Sequence[int]) -> list[np.ndarray]:
    """Ascending global rows as rows of each block."""
    ends = np.cumsum(np.asarray(block_rows, np.int64))
    cuts = np.searchsorted(rows, ends)
    starts = np.r_[0, cuts[:-1]]
    return [rows[a:b] - (end - n) for a, b, end, n in zip(starts, cuts, ends, block_rows, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS and the BLAS of numpy on one thread; the former numbers afterwards."""
    from threadpoolctl import threadpool_limits

    faiss = require_faiss()
    former = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        faiss.omp_set_num_threads(former)


class _Total:
    """The sums of all blocks, added in block order."""

    def __init__(self, points: Points, centroids: np.ndarray) -> None:
        count = len(centroids)
        self.counts = np.zeros(count, np.int64)
        self.squares = np.zeros(count)
        self.farthest = np.zeros(count, np.int64)
        self._sums = np.zeros(centroids.shape)
        self._farthest_square = np.zeros(count)
        first_row = 0
        for block, rows in zip(points.sums(centroids), points.block_rows, strict=True):
            mine = block.clusters
            self.counts[mine] += block.counts
            self.squares[mine] += block.squares
            self._sums[mine] += block.sums
            farther = block.farthest_square > self._farthest_square[mine]
            self.farthest[mine[farther]] = block.farthest[farther] + first_row
            self._farthest_square[mine[farther]] = block.farthest_square[farther]
            first_row += rows

    def means(self, centroids: np.ndarray) -> np.ndarray:
        """The new centroids, float32; those of empty clusters stay."""
        means = centroids.copy()
        full = self.counts > 0
        means[full] = self._sums[full] / self.counts[full, None]
        return means

    def donors(self, wanted: int) -> np.ndarray:
        """Up to `wanted` clusters, worst objective first, that can give a member away."""
        order = np.lexsort((np.arange(len(self.squares)), -self.squares))
        able = (self.counts[order] > 1) & (self._farthest_square[order] > 1e-12)
        return np.asarray(order[able][:wanted])


def _seeding(points: Points, count: int, random: np.random.Generator) -> np.ndarray:
    """(count, d) float32 first centroids, from a random subset of the points."""
    rows = sum(points.block_rows)
    looked_at = min(rows, max(SEEDING_POINTS * count, CHUNK))
    chosen = np.arange(rows) if looked_at == rows else np.sort(random.choice(rows, looked_at, replace=False))
    vectors = points.take(chosen)
    with one_thread():
        return _plus_plus(vectors, count, random)


def _plus_plus(vectors: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """(count, d) seeds among (n, d) float32, each drawn in proportion to its squared distance to those before it.

    The first ONE_BY_ONE are the best of 2 + ln k draws each. From then on a sixteenth more is chosen at once: of
    TRIALS times as many draws those that lower the distances most, a vector counting for the draw nearest to it.
    """
    rows = len(vectors)
    norms = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    trials = 2 + int(math.log(count))
    taken = np.zeros(rows, bool)
    first = int(random.integers(rows))
    chosen, taken[first] = [first], True
    potential = _squares(vectors, norms, np.array([first]))[0]
    while len(chosen) < count and potential[~taken].any():
        share = np.where(taken, 0.0, potential)
        if len(chosen) < ONE_BY_ONE:
            candidates = _draw(share, trials, random)
            after = np.minimum(_squares(vectors, norms, candidates), potential)
            best = int(np.argmin(after.sum(axis=1)))
            potential, drawn = after[best], candidates[best : best + 1]
        else:
            wanted = min(len(chosen) // 16, count - len(chosen))
            candidates = _draw(share, TRIALS * wanted, random)
            gains = np.zeros(len(candidates))
            for part, nearest, squares in _nearest_candidates(vectors, norms, candidates):
                np.add.at(gains, nearest, np.maximum(potential[part] - squares, 0.0))
            drawn = np.sort(candidates[np.argsort(-gains, kind="stable")[:wanted]])
            for part, _, squares in _nearest_candidates(vectors, norms, drawn):
                potential[part] = np.minimum(potential[part], squares)
        chosen += drawn.tolist()
        taken[drawn] = True
    # When only repeats are left, any of them will do.
    chosen += np.flatnonzero(~taken)[: count - len(chosen)].tolist()
    return np.asarray(vectors[np.array(chosen)])


def _nearest_candidates(
    vectors: np.ndarray, norms: np.ndarray, candidates: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, place of the nearest candidate, squared distance to it) of a chunk of the vectors at a time."""
    for start in range(0, len(vectors), CHUNK):
        part = slice(start, start + CHUNK)
        squares = norms[candidates][None, :] - 2.0 * (vectors[part] @ vectors[candidates].T)
        nearest = squares.argmin(axis=1)
        yield part, nearest, _without_noise(squares[np.arange(len(nearest)), nearest] + norms[part], norms)


def _draw(shares: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Up to `count` distinct positions, each draw in proportion to `shares` (n,) float64."""
    cumulative = np.cumsum(shares)
    drawn = np.searchsorted(cumulative, random.random(count) * cumulative[-1], side="right")
    drawn = np.unique(np.minimum(drawn, len(shares) - 1))
    drawn = drawn[shares[drawn] > 0]
    return drawn if len(drawn) else np.array([int(np.argmax(shares))])


def _squares(vectors: np.ndarray, norms: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(m, n) float64 squared distances of all vectors to the candidates among them, never below 0."""
    products = vectors[candidates] @ vectors.T
    return _without_noise(norms[candidates][:, None] + norms[None, :] - 2.0 * products, norms)


def _without_noise(squares: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Squared distances below the rounding of a float32 product are those of repeats: 0."""
    return np.where(squares < 1e-6 * norms.max(), 0.0, squares)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
