"""Components of a graph cut at a threshold, and which of their images stays.

One union-find on one uint32 array, 4 bytes per image, into which edges stream in any order and any number of pieces:
nothing else of the graph has to be in memory. A component's name is its smallest node, so the result does not depend
on the order of the edges.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np

from curation.duplicates.forest import numbered, pieces_of

NONE = -2.0
"""A threshold below every cosine."""


class UnionFind:
    """Disjoint sets of dense node numbers."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count, dtype=np.uint32)
        """(count,) uint32, never larger than the node: a root is the smallest node of its set."""
        self.sets = count

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Union the ends of edges. one, other: (m,) uint32."""
        self.sets -= int(_join(self.parent, one, other))

    def add(self, rows: np.ndarray, above: float = NONE, up_to: float = np.inf) -> None:
        """Union the ends of the edges with above < similarity <= up_to (as float32). rows: (m,) EDGE."""
        bounds = np.float32(above), np.float32(up_to)
        self.sets -= int(_join_between(self.parent, rows["low"], rows["high"], rows["similarity"], *bounds))

    def labels(self) -> np.ndarray:
        """(count,) uint32: the smallest node of each node's set. The array itself; edges may still follow."""
        _flatten(self.parent)
        return self.parent


def components(forest: np.ndarray | Iterable[np.ndarray], count: int, threshold: float = NONE) -> np.ndarray:
    """(count,) uint32: the smallest node of each node's component, over edges strictly above `threshold`.

    forest: (m,) EDGE, or pieces of it, in any order.
    """
    sets = UnionFind(count)
    for rows in pieces_of(forest):
        sets.add(rows, threshold)
    return sets.labels()


def component_sizes(labels: np.ndarray) -> np.ndarray:
    """(n,) uint32: how many nodes have this label; 0 for what is no label. labels: (n,) uint32."""
    return np.asarray(_sizes(labels))


def first_members(labels: np.ndarray, value: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """By label, each component's member of the highest rank, then the largest value, then the smallest node.

    labels: (n,) uint32 as from `components`. value: (n,) numbers, NaN counts as the smallest. rank: (n,) uint8; None:
    all equal. Returns (n,) uint32; what is no label names itself.
    """
    return np.asarray(_first(labels, value, np.zeros(1, np.uint8) if rank is None else rank))


def best_members(labels: np.ndarray, value: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """(n,) bool: the `first_members`."""
    kept = np.zeros(len(labels), bool)
    kept[first_members(labels, value, rank)[earliest_members(labels)]] = True
    return kept


def earliest_members(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: the smallest node of each component."""
    return np.asarray(labels == np.arange(len(labels), dtype=labels.dtype))


@dataclass(frozen=True)
class ThresholdCounts:
    """What the pool would be at another threshold."""

    threshold: float
    components: int
    components_of_several: int
    largest: int
    duplicates: int
    """Images that would be dropped: all but one of each component."""


def sweep(forest: np.ndarray | Iterable[np.ndarray], count: int, thresholds: Sequence[float]) -> list[dict[str, float]]:
    """ThresholdCounts at each threshold, as dictionaries: a re-read of the forest, no search.

    One union-find goes down through the thresholds, so that every edge is joined once.
    """
    found: dict[float, dict[str, float]] = {}
    sets, done = UnionFind(count), np.inf
    for threshold in sorted(set(thresholds), reverse=True):
        for rows in pieces_of(forest):
            sets.add(rows, threshold, done)
        several, largest = _counts(_sizes(sets.labels()))
        found[threshold] = asdict(ThresholdCounts(threshold, sets.sets, int(several), int(largest), count - sets.sets))
        done = threshold
    return [found[threshold] for threshold in thresholds]


# Rem's algorithm with splicing (Patwary, Blair and Manne, "Experiments on union-find algorithms for the disjoint-set
# data structure", 2010): both ends climb together and stop where their parents meet, mostly long before a root.


@numba.njit(cache=True, nogil=True)
def _union(parent: np.ndarray, one: Any, other: Any) -> int:
    """1 where two sets became one."""
    above, beyond = np.int64(parent[one]), np.int64(parent[other])
    while above != beyond:
        if above > beyond:
            parent[one] = beyond
            if one == above:
                return 1
            one = above
            above = np.int64(parent[one])
        else:
            parent[other] = above
            if other == beyond:
                return 1
            other = beyond
            beyond = np.int64(parent[other])
    return 0


@numba.njit(cache=True, nogil=True)
def _join(parent: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    joined = 0
    for edge in range(len(low)):
        joined += _union(parent, np.int64(low[edge]), np.int64(high[edge]))
    return joined


@numba.njit(cache=True, nogil=True)
def _join_between(
    parent: np.ndarray, low: np.ndarray, high: np.ndarray, similarity: np.ndarray, above: float, up_to: float
) -> int:
    joined = 0
    for edge in range(len(low)):
        if above < similarity[edge] <= up_to:
            joined += _union(parent, np.int64(low[edge]), np.int64(high[edge]))
    return joined


@numba.njit(cache=True, nogil=True)
def _flatten(parent: np.ndarray) -> None:
    # A parent is never larger than its child, so one ascending pass flattens every tree.
    for node in range(len(parent)):
        parent[node] = parent[parent[node]]


@numba.njit(cache=True, nogil=True)
def _sizes(labels: np.ndarray) -> np.ndarray:
    sizes = np.zeros(len(labels), np.uint32)
    for node in range(len(labels)):
        sizes[labels[node]] += np.uint32(1)
    return sizes


@numba.njit(cache=True, nogil=True)
def _counts(sizes: np.ndarray) -> tuple[int, int]:
    several, largest = 0, 0
    for size in sizes:
        several += size > 1
        largest = max(largest, size)
    return several, largest


@numba.njit(cache=True, nogil=True)
def _first(labels: np.ndarray, value: np.ndarray, rank: np.ndarray) -> np.ndarray:
    first: np.ndarray = numbered(len(labels))
    ranked = len(rank) == len(labels)
    for node in range(len(labels)):
        rival = first[labels[node]]
        if ranked and rank[node] != rank[rival]:
            better = rank[node] > rank[rival]
        else:
            # NaN is unequal to itself, and smaller than any number.
            better = value[node] > value[rival] or (value[rival] != value[rival] and value[node] == value[node])
        if better:
            first[labels[node]] = node
    return first
