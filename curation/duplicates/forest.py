"""Maximum spanning forests: all that has to be kept of a graph of copies.

The components of a maximum spanning forest, cut at any threshold, are those of the whole graph cut there; and the
best edge of every node is in it. Edges are totally ordered (similarity descending, then the smaller ends), so the
forest is unique: it does not depend on how the work was cut or on which worker was first, and forests of parts merge
to the forest of the whole.

Inside an algorithm a node is a dense number in (space, id) order: space 0 the pool, space n the n-th reference set.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from curation.schemas import EDGES

EDGE = np.dtype([("low", "<u4"), ("high", "<u4"), ("similarity", "<f4")])
"""low < high: dense node numbers."""


def edges(one: np.ndarray, other: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """(m,) EDGE from two columns of nodes in any order."""
    result = np.empty(len(one), EDGE)
    result["low"] = np.minimum(one, other)
    result["high"] = np.maximum(one, other)
    result["similarity"] = similarity
    return result


def ordered(rows: np.ndarray) -> np.ndarray:
    """Edges by similarity descending, ties by (low, high)."""
    return rows[np.lexsort((rows["high"], rows["low"], -rows["similarity"]))]


def maximum_spanning_forest(rows: np.ndarray, count: int | None = None) -> np.ndarray:
    """Reduce edges to the forest that has the same components at every threshold.

    rows: (m,) EDGE, any order, repeats allowed. count: number of nodes, which saves numbering those that occur anew
    where most of them do. Returns at most (distinct nodes - 1) of them, ordered. Borůvka's
    rounds on one uint32 array of parents: no sort of all edges, so dense groups (a thousand copies of one image are
    half a million edges) reduce in a few passes.
    """
    if not len(rows):
        return rows
    if count is not None and 4 * len(rows) > count:
        low, high = np.ascontiguousarray(rows["low"]), np.ascontiguousarray(rows["high"])
    else:
        nodes, ends = np.unique(np.concatenate([rows["low"], rows["high"]]), return_inverse=True)
        low, high = ends[: len(rows)].astype(np.uint32), ends[len(rows) :].astype(np.uint32)
        count = len(nodes)
    chosen = _boruvka(low, high, np.ascontiguousarray(rows["similarity"]), count)
    return ordered(rows[chosen])


class ForestMerger:
    """Adds forests of parts in any order, holding at most the forest so far and a buffer."""

    def __init__(self, count: int | None = None, buffer_edges: int = 1 << 22) -> None:
        self.count = count
        self.buffer_edges = buffer_edges
        self._forest = np.empty(0, EDGE)
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    def add(self, rows: np.ndarray) -> None:
        self._buffer.append(rows)
        self._buffered += len(rows)
        if self._buffered > max(self.buffer_edges, len(self._forest) // 2):
            self._reduce()

    def result(self) -> np.ndarray:
        self._reduce()
        return self._forest

    def _reduce(self) -> None:
        if self._buffered:
            self._forest = maximum_spanning_forest(np.concatenate([self._forest, *self._buffer]), self.count)
            self._buffer, self._buffered = [], 0


NOBODY = np.uint32(0xFFFFFFFF)
"""No node: a graph has at most 2^32 - 1 of them."""


def pieces_of(forest: np.ndarray | Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """The pieces of what may be one array of edges."""
    return (forest,) if isinstance(forest, np.ndarray) else forest


def nearest(
    forest: np.ndarray | Iterable[np.ndarray], count: int, empty: Callable[[int, str], np.ndarray] = np.empty
) -> tuple[np.ndarray, np.ndarray]:
    """Each node's most similar neighbour in the graph the forest was made of (ties: the smallest node).

    By the cut property a node's best edge is in the forest. Returns (count,) uint32 with NOBODY for none, and
    (count,) float32 with NaN. empty: where the two arrays come from.
    """
    best, similarity = empty(count, "<u4"), empty(count, "<f4")
    best[:], similarity[:] = NOBODY, np.nan
    for rows in pieces_of(forest):
        _take_nearest(rows["low"], rows["high"], rows["similarity"], best, similarity)
    return best, similarity


def prune(rows: np.ndarray, per_node: int) -> np.ndarray:
    """The edges that are among the `per_node` best of at least one of their ends (ties: the smaller neighbour)."""
    if not len(rows):
        return rows
    rows = np.unique(rows)
    mine = np.concatenate([rows["low"], rows["high"]])
    other = np.concatenate([rows["high"], rows["low"]])
    order = np.lexsort((other, -np.concatenate([rows["similarity"]] * 2), mine))
    sorted_nodes = mine[order]
    first = np.flatnonzero(np.concatenate([[True], sorted_nodes[1:] != sorted_nodes[:-1]]))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    keep = np.zeros(len(rows), bool)
    keep[order[rank < per_node] % len(rows)] = True
    return np.asarray(rows[keep])


@dataclass(frozen=True)
class Nodes:
    """The ids behind dense node numbers: spaces one after the other, ids ascending in each."""

    ids: tuple[np.ndarray, ...]
    """One (n,) uint64 array per space."""

    @property
    def offsets(self) -> np.ndarray:
        """(spaces + 1,) int64: the first node of each space."""
        return np.concatenate([[0], np.cumsum([len(i) for i in self.ids])]).astype(np.int64)

    @property
    def count(self) -> int:
        return int(self.offsets[-1])

    def space(self, nodes: np.ndarray) -> np.ndarray:
        """(n,) uint8."""
        return (np.searchsorted(self.offsets, nodes, side="right") - 1).astype(np.uint8)

    def image_id(self, nodes: np.ndarray) -> np.ndarray:
        """(n,) uint64."""
        result = np.empty(len(nodes), np.uint64)
        spaces = self.space(nodes)
        for space in range(len(self.ids)):
            here = spaces == space
            result[here] = self.ids[space][nodes[here].astype(np.int64) - self.offsets[space]]
        return result

    def find(self, spaces: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 nodes of (space, id) pairs; -1 for those that are no node."""
        result = np.full(len(ids), -1, np.int64)
        for space, known in enumerate(self.ids):
            here = np.flatnonzero(spaces == space)
            if len(here) and len(known):
                place = np.minimum(np.searchsorted(known, ids[here]), len(known) - 1)
                found = known[place] == ids[here]
                result[here[found]] = place[found] + self.offsets[space]
        return result


def to_table(forest: np.ndarray, nodes: Nodes) -> pa.Table:
    """A forest as a table of schema EDGES."""
    return pa.Table.from_arrays(
        [
            pa.array(nodes.space(forest["low"])),
            pa.array(nodes.image_id(forest["low"])),
            pa.array(nodes.space(forest["high"])),
            pa.array(nodes.image_id(forest["high"])),
            pa.array(np.ascontiguousarray(forest["similarity"])),
        ],
        schema=EDGES,
    )


def from_table(table: pa.Table, nodes: Nodes) -> np.ndarray:
    """(m,) EDGE; edges with an end that is no node any more are left out."""
    low = nodes.find(table["low_space"].to_numpy(), table["low"].to_numpy())
    high = nodes.find(table["high_space"].to_numpy(), table["high"].to_numpy())
    here = (low >= 0) & (high >= 0)
    return edges(low[here], high[here], table["similarity"].to_numpy()[here])


def path(forest: np.ndarray, start: int, end: int) -> list[tuple[int, float | None]]:
    """The chain of copies that joins two nodes: (node, similarity to the one before), [] if nothing joins them.

    In a maximum spanning forest this is the chain whose weakest link is strongest.
    """
    ends = np.concatenate([forest["low"], forest["high"]])
    nodes, place = np.unique(ends, return_inverse=True)
    at = np.searchsorted(nodes, [start, end])
    if not len(nodes) or (np.take(nodes, at, mode="clip") != [start, end]).any():
        return []
    order = np.argsort(place, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(nodes)))])
    came = _walk(offsets, order, np.roll(place, len(forest)), int(at[0]))
    chain: list[tuple[int, float | None]] = []
    node = int(at[1])
    while came[node] >= 0:
        edge = int(came[node]) % len(forest)
        chain.append((int(nodes[node]), float(forest["similarity"][edge])))
        node = int(place[edge]) + int(place[edge + len(forest)]) - node
    return [(start, None), *reversed(chain)] if node == at[0] else []


def cut(forest: np.ndarray, threshold: float) -> np.ndarray:
    """The edges strictly above a threshold (compared as float32). forest: (m,) EDGE in any order."""
    return np.asarray(forest[forest["similarity"] > np.float32(threshold)])


def chunked(forest: np.ndarray, size: int = 1 << 20) -> Sequence[np.ndarray]:
    """Pieces of at most `size` edges, at least one piece."""
    return [forest[k : k + size] for k in range(0, max(1, len(forest)), size)]


@numba.njit(cache=True, nogil=True)
def numbered(count: int) -> np.ndarray:
    """(count,) uint32: 0, 1, 2, ...; without the eight bytes each that a cast of arange takes for a moment."""
    numbers = np.empty(count, np.uint32)
    for node in range(count):
        numbers[node] = node
    return numbers


@numba.njit(cache=True, nogil=True)
def _find(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True, nogil=True)
def _walk(offsets: np.ndarray, order: np.ndarray, other: np.ndarray, start: int) -> np.ndarray:
    """(n,) int64: by which end of an edge each node was reached from `start`; -1 for the start and the unreached."""
    came = np.full(len(offsets) - 1, -1, np.int64)
    seen = np.zeros(len(offsets) - 1, np.bool_)
    queue = np.empty(len(offsets) - 1, np.int64)
    queue[0], first, last = start, 0, 1
    seen[start] = True
    while first < last:
        node = queue[first]
        first += 1
        for place in range(offsets[node], offsets[node + 1]):
            following = other[order[place]]
            if not seen[following]:
                seen[following] = True
                came[following] = order[place]
                queue[last] = following
                last += 1
    return came


@numba.njit(cache=True, nogil=True)
def _take_nearest(
    low: np.ndarray, high: np.ndarray, values: np.ndarray, best: np.ndarray, similarity: np.ndarray
) -> None:
    for edge in range(len(low)):
        value = values[edge]
        for mine, other in ((low[edge], high[edge]), (high[edge], low[edge])):
            # NaN is above nothing: not (known >= value) holds for the first neighbour too.
            known = similarity[mine]
            if not known >= value or (known == value and other < best[mine]):
                best[mine] = other
                similarity[mine] = value


@numba.njit(cache=True, nogil=True)
def _boruvka(low: np.ndarray, high: np.ndarray, similarity: np.ndarray, count: int) -> np.ndarray:
    parent = numbered(count)
    # Four bytes each for a node's best edge and for an edge that is left: there are fewer than 2^32 - 1 of them.
    nothing = np.uint32(0xFFFFFFFF)
    best = np.full(count, nothing, np.uint32)
    alive = numbered(len(low))
    chosen = np.zeros(len(low), np.bool_)
    left = len(low)
    while left > 0:
        kept = 0
        for place in range(left):
            edge = alive[place]
            one, other = _find(parent, low[edge]), _find(parent, high[edge])
            if one == other:
                continue
            alive[kept] = edge
            kept += 1
            for root in (one, other):
                rival = best[root]
                if (
                    rival == nothing
                    or similarity[edge] > similarity[rival]
                    or (
                        similarity[edge] == similarity[rival]
                        and (low[edge] < low[rival] or (low[edge] == low[rival] and high[edge] < high[rival]))
                    )
                ):
                    best[root] = edge
        left = kept
        for root in range(count):
            edge = best[root]
            if edge != nothing:
                best[root] = nothing
                one, other = _find(parent, low[edge]), _find(parent, high[edge])
                if one != other:
                    chosen[edge] = True
                    parent[max(one, other)] = min(one, other)
    return chosen
