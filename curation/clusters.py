"""k-means over blocks of vectors: equal centroids whoever computes the blocks, and on however many workers.

A Lloyd step maps the blocks to counts and float64 sums and adds these in block order. Seeds are drawn by
`curation.seeding` from a sample. A cluster that falls empty moves to the farthest member of the cluster that fits
worst. `curation.nearest` finds the nearest centroid.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numba
import numpy as np

from curation import nearest as search
from curation.halves import widen
from curation.nearest import Grouping, Known, nearest_centroid, one_thread
from curation.order import generator
from curation.seeding import CELL_POINTS, cell_seeds, seeds_due, shared_out

SEEDING_POINTS = 32
"""Vectors per centroid that the seeding looks at."""
ONE_CELL = 32
"""Up to so many seeds are drawn in one chain."""
BOUNDED = 64
"""From so many centroids on the steps keep bounds, by groups of about GROUP centroids, at most MOST_GROUPS."""
GROUP = 12
MOST_GROUPS = 64
TOLERANCE = 1e-5
"""Lloyd stops when a step lowers the objective by less than this share of it."""
REPAIRS = 20
"""Further steps that may follow the last one while a cluster is empty."""


@dataclass(frozen=True)
class Step:
    """What every block needs for one Lloyd step."""

    centroids: np.ndarray
    """(k, d) float32."""
    grouping: Grouping | None = None
    """Bounds are kept by these groups; beyond `nearest.FLAT` centroids only the nearest groups are searched."""
    key: str = ""
    """Digest of the two; what a block knows is filed under it."""
    before: str = ""
    """Key of the step before, "" if what is known from it does not help."""
    moved: np.ndarray | None = None
    """(k,) float64: how far each centroid has moved since then."""


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

    def sums(self, step: Step) -> Iterable[BlockSums]:
        """`block_sums` of each block, in order."""

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`assigned` of all rows: (n,) int32, (n,) float64."""

    def seeds(
        self, cells: Sequence[np.ndarray], counts: Sequence[int], seed: int, purpose: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`cell_seeds` of the vectors of each cell (ascending rows), as rows of these points."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(m, d) float32 of the (m,) ascending row numbers."""

    def subset(self, rows: np.ndarray) -> "Points":
        """The points of these ascending rows alone."""

    def hold(self, vectors: np.ndarray, name: str) -> "Points":
        """Other vectors, (m, d) float32, kept in the same way."""


@dataclass(frozen=True)
class ArrayPoints:
    """Points in memory. blocks: arrays (n_i, d) of float16 or float32."""

    blocks: tuple[np.ndarray, ...]
    _known: dict[int, tuple[str, Known]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def block_rows(self) -> Sequence[int]:
        return [len(block) for block in self.blocks]

    @property
    def dimension(self) -> int:
        return int(self.blocks[0].shape[1])

    def sums(self, step: Step) -> Iterator[BlockSums]:
        for number, block in enumerate(self.blocks):
            key, known = self._known.get(number, ("", None))
            sums, known = block_sums(block, step, known if key and key == step.before else None)
            if known is not None:
                self._known[number] = (step.key, known)
            yield sums

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grouping = wide_grouping(centroids)
        found = [nearest_centroid(block, centroids, grouping) for block in self.blocks]
        return np.concatenate([labels for labels, _ in found]), np.concatenate([squares for _, squares in found])

    def seeds(
        self, cells: Sequence[np.ndarray], counts: Sequence[int], seed: int, purpose: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            seeds_of_cell(self.take, rows, count, seed, f"{purpose}, cell {number}")
            for number, (rows, count) in enumerate(zip(cells, counts, strict=True))
        ]

    def take(self, rows: np.ndarray) -> np.ndarray:
        parts = split_rows(rows, self.block_rows)
        taken = [widen(block[local]) for block, local in zip(self.blocks, parts, strict=True)]
        return np.concatenate(taken)

    def subset(self, rows: np.ndarray) -> "ArrayPoints":
        parts = split_rows(rows, self.block_rows)
        return ArrayPoints(tuple(block[local] for block, local in zip(self.blocks, parts, strict=True) if len(local)))

    def hold(self, vectors: np.ndarray, name: str) -> "ArrayPoints":
        return ArrayPoints((vectors,))


@dataclass(frozen=True)
class KMeans:
    """The result. objective: mean squared distance of the points to their centroid."""

    centroids: np.ndarray
    objective: float
    iterations: int


@dataclass(frozen=True)
class Progress:
    """Where Lloyd stands: enough to go on from here to the same bytes."""

    step: int
    centroids: np.ndarray
    before: float
    """The objective of the step before, infinite after a repair."""


class Watch(Protocol):
    """Keeps the progress of a k-means, and tells it."""

    def found(self, purpose: str) -> Progress | None:
        """What was kept last of the k-means of this purpose."""

    def keep(self, purpose: str, progress: Progress) -> None: ...

    def tell(self, purpose: str, step: int, objective: float, empty: int) -> None: ...


def kmeans(
    points: Points,
    count: int,
    *,
    seed: int,
    purpose: str,
    iterations: int = 50,
    spherical: bool = False,
    watch: Watch | None = None,
) -> KMeans:
    """`count` centroids, (count, d) float32. No cluster of `points` is empty while there are distinct points for all.

    purpose: keys the random choices together with `seed`. spherical: centroids are kept at unit length. Every step
    assigns exactly, up to `nearest.FLAT` centroids; beyond, see `nearest.Grouping.search`.
    """
    rows = sum(points.block_rows)
    if not 1 <= count <= rows:
        raise ValueError(f"{count} clusters of {rows} points")
    with one_thread():
        progress = watch.found(purpose) if watch else None
        if progress is None:
            progress = Progress(0, _first(points, count, seed, purpose, spherical), math.inf)
            if watch:
                watch.keep(purpose, progress)
        return _lloyd(points, progress, iterations, spherical, purpose, watch)


def _lloyd(
    points: Points, progress: Progress, iterations: int, spherical: bool, purpose: str, watch: Watch | None = None
) -> KMeans:
    rows = sum(points.block_rows)
    step, centroids, before = progress.step, progress.centroids, progress.before
    task = _next_step(None, centroids)
    while True:
        total = _Total(points, task)
        objective = float(total.squares.sum()) / rows
        empty = np.flatnonzero(total.counts == 0)
        donors = total.donors(len(empty))
        if watch:
            watch.tell(purpose, step, objective, len(empty))
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
        if watch:
            watch.keep(purpose, Progress(step, centroids, before))
        task = _next_step(task, centroids)


def _next_step(last: Step | None, centroids: np.ndarray) -> Step:
    """The step from these centroids. Groups are made once and then kept, for as long as assignment is exact."""
    if len(centroids) < BOUNDED:
        return Step(centroids)
    if len(centroids) > search.FLAT:
        return Step(centroids, wide_grouping(centroids))
    grouping = last.grouping if last else None
    if grouping is None:
        grouping = _grouped(centroids, min(MOST_GROUPS, len(centroids) // GROUP))
    digest = hashlib.blake2b(centroids.tobytes() + grouping.members.tobytes(), digest_size=16).hexdigest()
    if last is None:
        return Step(centroids, grouping, digest)
    moved = np.sqrt(search.squared_distances(centroids, last.centroids, np.arange(len(centroids))))
    return Step(centroids, grouping, digest, last.key, moved)


def wide_grouping(centroids: np.ndarray) -> Grouping | None:
    """Groups to search many centroids by, about 2 sqrt(k); None up to `nearest.FLAT`: all are searched."""
    return None if len(centroids) <= search.FLAT else _grouped(centroids, 2 * round(len(centroids) ** 0.5))


def _grouped(centroids: np.ndarray, count: int) -> Grouping:
    found = kmeans(ArrayPoints((centroids,)), count, seed=0, purpose="groups of centroids", iterations=4)
    return Grouping.of(nearest_centroid(centroids, found.centroids)[0])


def block_sums(vectors: np.ndarray, step: Step, known: Known | None = None) -> tuple[BlockSums, Known | None]:
    """A block's part of a Lloyd step, and what it may know at the next. vectors: (n, d)."""
    if len(step.centroids) > search.FLAT:
        labels, squares = nearest_centroid(vectors, step.centroids, step.grouping)
        rows = np.asarray(vectors)
    else:
        rows = widen(vectors)
        with one_thread():
            labels, squares, known = search.nearest(rows, step.centroids, step.grouping, known, step.moved)
    clusters, place = np.unique(labels, return_inverse=True)
    sums = BlockSums(
        clusters.astype(np.int64),
        np.bincount(place, minlength=len(clusters)),
        np.zeros((len(clusters), vectors.shape[1])),
        np.bincount(place, weights=squares, minlength=len(clusters)),
        np.zeros(len(clusters), np.int64),
        np.full(len(clusters), -1.0),
    )
    for start in range(0, len(rows), search.CHUNK):
        part = slice(start, start + search.CHUNK)
        _add(widen(rows[part]), place[part], squares[part], start, sums.sums, sums.farthest, sums.farthest_square)
    return sums, known


@numba.njit(cache=True, nogil=True)
def _add(
    vectors: np.ndarray,
    place: np.ndarray,
    squares: np.ndarray,
    first_row: int,
    sums: np.ndarray,
    farthest: np.ndarray,
    farthest_square: np.ndarray,
) -> None:
    for i in range(len(vectors)):
        mine = place[i]
        for j in range(vectors.shape[1]):
            sums[mine, j] += np.float64(vectors[i, j])
        if squares[i] > farthest_square[mine]:
            farthest_square[mine] = squares[i]
            farthest[mine] = first_row + i


def seeds_of_cell(
    take: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, count: int, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """`cell_seeds` of these ascending rows, at most CELL_POINTS of them, as rows; take: reads vectors of rows."""
    random = generator(seed, purpose)
    share = 1.0
    if len(rows) > CELL_POINTS:
        share = CELL_POINTS / len(rows)
        rows = np.sort(random.choice(rows, CELL_POINTS, replace=False))
    with one_thread():
        seeds, gains = cell_seeds(take(rows), count, random)
    return rows[seeds], gains / share


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


class _Total:
    """The sums of all blocks, added in block order."""

    def __init__(self, points: Points, step: Step) -> None:
        count = len(step.centroids)
        self.counts = np.zeros(count, np.int64)
        self.squares = np.zeros(count)
        self.farthest = np.zeros(count, np.int64)
        self._sums = np.zeros(step.centroids.shape)
        self._farthest_square = np.zeros(count)
        first_row = 0
        for block, rows in zip(points.sums(step), points.block_rows, strict=True):
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


def _first(points: Points, count: int, seed: int, purpose: str, spherical: bool) -> np.ndarray:
    """(count, d) float32 seeds, drawn from a sample."""
    random = generator(seed, purpose)
    sample = _drawn(points, max(SEEDING_POINTS * count, search.CHUNK), random)
    cells = [np.arange(sum(sample.block_rows))]
    due = np.array([count])
    if count > ONE_CELL:
        coarse = round(count**0.5)
        few = _drawn(sample, max(SEEDING_POINTS * 4 * coarse, search.CHUNK), random)
        found = kmeans(few, coarse, seed=seed, purpose=f"{purpose}, cells", iterations=4, spherical=spherical)
        labels, squares = sample.assign(found.centroids)
        members = np.bincount(labels, minlength=coarse)
        due = seeds_due(np.bincount(labels, weights=squares, minlength=coarse), members, count)
        cells = np.split(np.argsort(labels, kind="stable"), np.cumsum(members)[:-1])
        cells, due = [cell for cell in cells if len(cell)], due[members > 0]
    while True:
        found_seeds = sample.seeds(cells, due.tolist(), seed, purpose)
        chosen = shared_out(found_seeds, count)
        drawn = np.array([len(rows) for rows, _ in found_seeds])
        most = np.array([min(len(cell), CELL_POINTS) for cell in cells])
        if len(chosen) == count or not np.any((drawn == due) & (due < most)):
            break
        # Cells of many repeats had few seeds to give: the others draw more.
        due = np.where(drawn == due, np.minimum(2 * due, most), due)
    if len(chosen) < count:
        # Only repeats of the seeds are left in the cells, or what was not looked at: any will do.
        others = np.setdiff1d(np.arange(sum(sample.block_rows)), chosen)
        chosen = np.r_[chosen, random.permutation(others)[: count - len(chosen)]]
    centroids = sample.take(np.sort(chosen))
    if spherical:
        centroids = _unit(centroids)
    return centroids


def _drawn(points: Points, count: int, random: np.random.Generator) -> Points:
    rows = sum(points.block_rows)
    return points if count >= rows else points.subset(np.sort(random.choice(rows, count, replace=False)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
