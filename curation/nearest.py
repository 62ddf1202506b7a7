"""The nearest centroid of every vector, exact by definition: the least float64 squared distance, ties to the first.

float32 products nominate, with a bound on their rounding; what they leave open the definition decides. So labels do
not depend on the BLAS, on how rows are cut, or on what was known before. Between Lloyd steps `Known` keeps what saves
most of the products (Ding et al., Yinyang k-means, ICML 2015): a lower bound of the distance to each group of
centroids, less what the group has moved since. Groups whose bound is above the distance to the old centroid are
passed over; nothing else about the result changes.

Beyond FLAT centroids comparing all is too much, and the search goes through the groups: the VISITS groups whose means
are nearest are searched exactly, others not at all. That one is not exact: see `Grouping.search`.

On a device (`curation.device`) all products are computed, without bounds; what its rounding leaves open is decided in
the same way, so labels are the same.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from curation import device
from curation.device import Device
from curation.halves import widen

CHUNK = 4096
"""Vectors compared at a time without bounds."""
DEVICE_ROWS = 65_536
"""Vectors that go to a device at a time."""
TILE = 256
"""Vectors compared at a time with bounds; those of one tile share the groups of centroids looked at."""
WORTHWHILE = 0.4
"""Bounds that leave more than this share of the groups open are not used: one large product costs less."""
FLAT = 16_384
"""Up to so many centroids the nearest is searched among all of them."""
VISITS = 8
"""Groups of centroids searched for each vector when there are more than FLAT."""


@dataclass(frozen=True)
class Grouping:
    """Centroids ordered so that those of a group lie together."""

    members: np.ndarray
    """(k,) int64 numbers of centroids, group by group, ascending in each."""
    starts: np.ndarray
    """(t + 1,) int64: group g is members[starts[g] : starts[g + 1]]; none is empty."""

    @classmethod
    def of(cls, groups: np.ndarray) -> "Grouping":
        """groups: (k,) any integers, the group of each centroid."""
        members = np.argsort(groups, kind="stable")
        ordered = groups[members]
        return cls(members, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]))

    def means(self, centroids: np.ndarray) -> np.ndarray:
        """(t, d) float32."""
        sums = np.add.reduceat(centroids[self.members].astype(np.float64), self.starts[:-1], axis=0)
        return np.asarray(sums / np.diff(self.starts)[:, None], np.float32)

    def columns(self, groups: np.ndarray) -> tuple[slice | np.ndarray, np.ndarray]:
        """Where the members of some groups (ascending) lie, and the (len + 1,) starts of these groups among them."""
        if len(groups) == len(self.starts) - 1:
            return slice(None), self.starts
        lengths = np.diff(self.starts)[groups]
        cuts = np.r_[0, np.cumsum(lengths)]
        return np.repeat(self.starts[groups] - cuts[:-1], lengths) + np.arange(cuts[-1]), cuts

    def searched(self, centroids: np.ndarray) -> "Searched":
        """What every search among these centroids needs."""
        grouped, means = centroids[self.members], self.means(centroids)
        return Searched(grouped, _half_norms(grouped), means, _half_norms(means))

    def search(
        self, vectors: np.ndarray, centroids: np.ndarray, among: "Searched | None" = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`, but only in the VISITS groups whose means are nearest: what lies elsewhere is missed.

        vectors: (n, d) float32. among: `searched` of the centroids. The best of each group is chosen by float32
        products, among these the definition decides.
        """
        among = among or self.searched(centroids)
        on = device.current()
        if on is not None:
            return self._search_on(on, vectors, centroids, among)
        best = self._visited(vectors, among)
        best.sort(axis=1)
        squares = np.stack([squared_distances(vectors, centroids, mine) for mine in best.T], axis=1)
        chosen = squares.argmin(axis=1)[:, None]
        return np.take_along_axis(best, chosen, 1)[:, 0].astype(np.int32), np.take_along_axis(squares, chosen, 1)[:, 0]

    def _visited(self, vectors: np.ndarray, among: "Searched") -> np.ndarray:
        """(n, visits) int64: the best centroid of each group that is searched."""
        visits = min(VISITS, len(self.starts) - 1)
        grouped, halves = among.grouped, among.halves
        scores = among.mean_halves[None, :] - vectors @ among.means.T
        visited = np.argpartition(scores, visits - 1, axis=1)[:, :visits].astype(np.int64)
        best = np.empty(visited.shape, np.int64)
        order = np.argsort(visited.ravel(), kind="stable")
        cuts = np.searchsorted(visited.ravel()[order], np.arange(len(self.starts)))
        for group in np.flatnonzero(np.diff(cuts)):
            here = slice(self.starts[group], self.starts[group + 1])
            for start in range(cuts[group], cuts[group + 1], CHUNK):
                places = order[start : min(start + CHUNK, cuts[group + 1])]
                found = (halves[here][None, :] - vectors[places // visits] @ grouped[here].T).argmin(axis=1)
                best.ravel()[places] = self.members[here][found]
        return best

    def _search_on(
        self, on: Device, vectors: np.ndarray, centroids: np.ndarray, among: "Searched"
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same; the vectors that rounding leaves open go the CPU's way, where it decides as well."""
        slack = 2 * _slack(vectors.shape[1], squared_norms(vectors), among.halves)
        visits = min(VISITS, len(self.starts) - 1)
        found, sure = on.search(vectors, among.grouped, among.halves, self.starts, among.means, visits, slack)
        labels = self.members[found].astype(np.int32)
        unsure = np.flatnonzero(~sure)
        with device.lent_nothing():
            for start in range(0, len(unsure), CHUNK):
                rows = unsure[start : start + CHUNK]
                labels[rows] = self.search(vectors[rows], centroids, among)[0]
        return labels, squared_distances(vectors, centroids, labels)


@dataclass(frozen=True)
class Searched:
    """Centroids in the order of groups, (k, d), and means of the groups, (t, d), each with half squared lengths."""

    grouped: np.ndarray
    halves: np.ndarray
    means: np.ndarray
    mean_halves: np.ndarray


@dataclass
class Known:
    """What a step of Lloyd leaves for the next one, for one block. Only saves time."""

    labels: np.ndarray
    """(n,) int32."""
    norms: np.ndarray
    """(n,) float64 squared lengths of the vectors."""
    lower: np.ndarray
    """(n, t) float32: no centroid of the group but the vector's own is nearer."""


def nearest_centroid(
    vectors: np.ndarray, centroids: np.ndarray, grouping: Grouping | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int32 nearest centroid of each vector, (n,) float64 squared Euclidean distance to it.

    vectors: (n, d) float16 or float32. centroids: (k, d) float32. grouping: search in its nearest groups only.
    """
    labels = np.empty(len(vectors), np.int32)
    squares = np.empty(len(vectors), np.float64)
    step = CHUNK if device.current() is None else DEVICE_ROWS
    among = grouping.searched(centroids) if grouping else None
    buffer = np.empty((min(step, len(vectors)), vectors.shape[1]), np.float32)
    with one_thread():
        for start in range(0, len(vectors), step):
            part = slice(start, start + step)
            chunk = widen(vectors[part], out=buffer)
            if grouping is None:
                labels[part], squares[part], _ = nearest(chunk, centroids)
            else:
                labels[part], squares[part] = grouping.search(chunk, centroids, among)
    return labels, squares


def nearest(
    vectors: np.ndarray,
    centroids: np.ndarray,
    grouping: Grouping | None = None,
    known: Known | None = None,
    moved: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, Known | None]:
    """(labels, squared distances) as `nearest_centroid`, exact; with a grouping also what the next step may know.

    vectors: (n, d) float32. known: of the step before, with the same grouping. moved: (k,) float64, how far each
    centroid has moved since.
    """
    on = device.current()
    if on is not None:
        return *_nearest_on(on, vectors, centroids), None
    # Without bounds to keep, short stretches of centroids only spare `_least` a second look at all of them.
    groups = grouping or Grouping(np.arange(len(centroids)), np.r_[0 : len(centroids) : 32, len(centroids)])
    grouped = np.ascontiguousarray(centroids[groups.members])
    halves = _half_norms(grouped)
    norms = known.norms if known else squared_norms(vectors)
    slack = _slack(vectors.shape[1], norms, halves)
    labels = known.labels.copy() if known else np.empty(len(vectors), np.int32)
    lower = np.empty((len(vectors), len(groups.starts) - 1), np.float32) if grouping else None
    for rows, looked_at in _tiles(vectors, centroids, groups, known, moved, lower):
        columns, cuts = groups.columns(looked_at)
        part = vectors[rows]
        products = part @ grouped[columns].T
        own = halves[columns]
        least, best, second, minima = _least(products, own, cuts)
        numbers = groups.members[columns]
        labels[rows] = numbers[best]
        unsure = np.flatnonzero(second <= least + 2 * slack)
        if len(unsure):
            pairs = (own[None, :] - products[unsure]) <= (least[unsure] + 2 * slack)[:, None]
            labels[rows[unsure]] = _decided(part[unsure], centroids, pairs, numbers)
            minima[unsure, np.searchsorted(cuts, best[unsure], side="right") - 1] = least[unsure]
        if lower is not None:
            squares = norms[rows][:, None] + 2.0 * (minima.astype(np.float64) - slack)
            found = np.sqrt(np.maximum(squares, 0.0)) * (1 - 1e-6)
            lower[rows[:, None], looked_at[None, :]] = found
    squares = squared_distances(vectors, centroids, labels)
    return labels, squares, None if lower is None else Known(labels, norms, lower)


def _nearest_on(on: Device, vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    halves = _half_norms(centroids)
    slack = 2 * _slack(vectors.shape[1], squared_norms(vectors), halves)
    labels = np.empty(len(vectors), np.int32)
    numbers = np.arange(len(centroids))
    for rows, best, unsure, pairs in on.nearest(vectors, centroids, halves, slack):
        part, mine = vectors[rows], best.astype(np.int32)
        for start in range(0, len(unsure), CHUNK):
            some = slice(start, start + CHUNK)
            mine[unsure[some]] = _decided(part[unsure[some]], centroids, pairs[some], numbers)
        labels[rows] = mine
    return labels, squared_distances(vectors, centroids, labels)


def _tiles(
    vectors: np.ndarray,
    centroids: np.ndarray,
    groups: Grouping,
    known: Known | None,
    moved: np.ndarray | None,
    lower: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, groups in which their nearest may lie); other rows stay, other bounds are carried over to `lower`."""
    count = len(vectors)
    every = np.arange(len(groups.starts) - 1)
    if known is None or moved is None or lower is None:
        yield from ((np.arange(start, min(start + CHUNK, count)), every) for start in range(0, count, CHUNK))
        return
    upper = (np.sqrt(squared_distances(vectors, centroids, known.labels)) * (1 + 1e-9))[:, None]
    farthest = np.maximum.reduceat(moved[groups.members], groups.starts[:-1])
    np.subtract(known.lower, (farthest * (1 + 1e-6) + 1e-6).astype(np.float32)[None, :], out=lower)
    group = np.empty(len(groups.members), np.int64)
    group[groups.members] = np.repeat(np.arange(len(every)), np.diff(groups.starts))
    open_ = lower <= upper
    if open_.mean() > WORTHWHILE:
        yield from ((np.arange(start, min(start + CHUNK, count)), every) for start in range(0, count, CHUNK))
        return
    rows = np.flatnonzero(open_.any(axis=1))
    open_ = open_[rows]
    open_[np.arange(len(rows)), group[known.labels[rows]]] = True
    # Vectors that look at the same groups come together, those that look at many last.
    signature = np.zeros((len(rows), 8 * -(-len(every) // 64)), np.uint8)
    packed = np.packbits(open_, axis=1)
    signature[:, : packed.shape[1]] = packed
    many = np.log2(open_.sum(axis=1)).astype(np.int8)
    order = np.lexsort((*signature.view(">u8").T[::-1], many))
    for start in range(0, len(rows), TILE):
        tile = order[start : start + TILE]
        yield rows[tile], np.flatnonzero(open_[tile].any(axis=0))


def _decided(vectors: np.ndarray, centroids: np.ndarray, pairs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(m,) int32: the nearest of the centroids that `pairs` (m, c) bool leaves open, by definition.

    numbers: (c,) the centroid of each column.
    """
    if pairs.sum() > 16 * len(pairs):
        # Equal centroids tie for every vector: only the first of them can win.
        _, first = np.unique(centroids, axis=0, return_index=True)
        pairs = pairs & np.isin(numbers, first)[None, :]
    rows, columns = np.nonzero(pairs)
    squares = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        squares[part] = squared_distances(vectors[rows[part]], centroids, numbers[columns[part]])
    order = np.lexsort((numbers[columns], squares, rows))
    _, first = np.unique(rows[order], return_index=True)
    return np.asarray(numbers[columns[order[first]]], np.int32)


def _slack(dimension: int, norms: np.ndarray, halves: np.ndarray) -> float:
    """How far half a squared distance, less half the vector's own norm, may be off in float32."""
    longest = float(np.sqrt(2.0 * halves.max(initial=0.0)))
    return device.slack(dimension, float(np.sqrt(norms.max(initial=0.0))), longest)


def _half_norms(vectors: np.ndarray) -> np.ndarray:
    """(n,) float32 halves of the squared lengths."""
    return np.asarray(squared_norms(vectors) / 2.0, np.float32)


def squared_norms(vectors: np.ndarray) -> np.ndarray:
    """(n,) float64."""
    return np.asarray(
        squared_distances(vectors, np.zeros((1, vectors.shape[1]), np.float32), np.zeros(len(vectors), int))
    )


def squared_distances(vectors: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) float64 between each vector (n, d) float32 and centroid labels[n] of (k, d) float32: the definition."""
    squares = np.empty(len(vectors))
    _squares(vectors, centroids, labels, squares)
    return squares


@numba.njit(cache=True, nogil=True)
def _squares(vectors: np.ndarray, centroids: np.ndarray, labels: np.ndarray, squares: np.ndarray) -> None:
    # Eight sums in a fixed order: processors with registers of any width get the same bits.
    dimension = vectors.shape[1]
    whole = dimension - dimension % 8
    for i in range(len(vectors)):
        x, c = vectors[i], centroids[labels[i]]
        a = b = d = e = f = g = h = k = 0.0
        for j in range(0, whole, 8):
            a += (np.float64(x[j]) - np.float64(c[j])) ** 2
            b += (np.float64(x[j + 1]) - np.float64(c[j + 1])) ** 2
            d += (np.float64(x[j + 2]) - np.float64(c[j + 2])) ** 2
            e += (np.float64(x[j + 3]) - np.float64(c[j + 3])) ** 2
            f += (np.float64(x[j + 4]) - np.float64(c[j + 4])) ** 2
            g += (np.float64(x[j + 5]) - np.float64(c[j + 5])) ** 2
            h += (np.float64(x[j + 6]) - np.float64(c[j + 6])) ** 2
            k += (np.float64(x[j + 7]) - np.float64(c[j + 7])) ** 2
        for j in range(whole, dimension):
            a += (np.float64(x[j]) - np.float64(c[j])) ** 2
        squares[i] = ((a + b) + (d + e)) + ((f + g) + (h + k))


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _least(
    products: np.ndarray, halves: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of halves - products, per row: the least, its column, the least but one, and the least of every group without it.

    A minimum is the same in any order, so nothing here depends on how the compiler vectorises.
    """
    rows, groups = len(products), len(starts) - 1
    infinite = np.float32(np.inf)
    least = np.empty(rows, np.float32)
    second = np.empty(rows, np.float32)
    best = np.empty(rows, np.int64)
    minima = np.empty((rows, groups), np.float32)
    for i in range(rows):
        row = products[i]
        chosen = 0
        for g in range(groups):
            low = infinite
            for j in range(starts[g], starts[g + 1]):
                score = halves[j] - row[j]
                low = min(low, score)
            minima[i, g] = low
            if low < minima[i, chosen]:
                chosen = g
        least[i] = minima[i, chosen]
        column = starts[chosen]
        while halves[column] - row[column] != least[i]:
            column += 1
        best[i] = column
        low = infinite
        for j in range(starts[chosen], column):
            score = halves[j] - row[j]
            low = min(low, score)
        for j in range(column + 1, starts[chosen + 1]):
            score = halves[j] - row[j]
            low = min(low, score)
        minima[i, chosen] = low
        low = infinite
        for g in range(groups):
            low = min(low, minima[i, g])
        second[i] = low
    return least, best, second, minima


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and OpenMP (so FAISS) on one thread; the former numbers afterwards. Free inside of itself."""
    if getattr(_limited, "already", False):
        yield
        return
    _limited.already = True
    try:
        with _controller(len(sys.modules)).limit(limits=1):
            yield
    finally:
        _limited.already = False


@lru_cache(maxsize=1)
def _controller(modules: int) -> Any:
    """Of the thread pools of this process: finding them takes milliseconds, and imports are what brings new ones."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


_limited = threading.local()
