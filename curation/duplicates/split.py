"""Guards against chains: cutting components that are too large, and stars, whose members are all copies of one image.

A chain a - b - c joins images that nobody would call copies. `fitting` cuts components of more than so many images at
higher thresholds, read from the stored forest; `stars` keeps with a representative only what is above the threshold to
it, and lets the others elect among themselves.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from curation import products, vectors
from curation.duplicates import grouped
from curation.duplicates.components import component_sizes, components, first_members
from curation.duplicates.forest import cut, numbered, ordered, pieces_of
from curation.duplicates.grouped import Grouped
from curation.duplicates.members import Members
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import Spread, serial

TABLE_MEMBERS = 2048
"""Components of at most so many members are elected from one table of all their similarities."""
BATCH = 1024
PAIRS_HELD = 1 << 22
ELECTION = "election"
STAYS = 255
"""Rank of a representative that an earlier generation chose."""

# ---- components that fit --------------------------------------------------------------------------------------------


def fitting(forest: np.ndarray, count: int, threshold: float, most: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The edges above `threshold` that leave no component of more than `most` images, and what was cut.

    forest: (m,) EDGE. A component too large is cut at its weakest similarity, the pieces too large again, and so on:
    what stays are the largest components of any higher threshold that fit. Images whose similarities are all equal
    (equal vectors) cannot be cut without being taken apart, and stay together whatever their number. Per component that
    was too large: its label, images, `cut_at` (the highest similarity cut, None for none), pieces, the largest one, and
    whether that one is `uncut`, too large still.
    """
    rows = cut(forest, threshold)
    if len(rows) and (np.diff(rows["similarity"]) > 0).any():
        rows = ordered(rows)
    kept = _fitting(rows["low"], rows["high"], rows["similarity"], count, most)
    fits = rows[kept]
    whole, pieces, gone = components(rows, count), components(fits, count), rows[~kept]
    large = np.flatnonzero(component_sizes(whole) > most)
    if not len(large):
        return fits, []
    highest = np.full(len(large), -np.inf, np.float32)
    np.maximum.at(highest, np.searchsorted(large, whole[gone["low"]]), gone["similarity"])
    place = np.minimum(np.searchsorted(large, whole), len(large) - 1)
    mine = np.flatnonzero(large[place] == whole)
    roots = mine[pieces[mine] == mine]
    number = np.bincount(place[roots], minlength=len(large))
    largest = np.zeros(len(large), np.int64)
    np.maximum.at(largest, place[roots], component_sizes(pieces)[roots])
    images = np.bincount(place[mine], minlength=len(large))
    return fits, [
        {
            "label": int(large[k]),
            "images": int(images[k]),
            "cut_at": float(highest[k]) if number[k] > 1 else None,
            "pieces": int(number[k]),
            "largest": int(largest[k]),
            "uncut": bool(largest[k] > most),
        }
        for k in range(len(large))
    ]


@numba.njit(cache=True, nogil=True)
def _root(parent: np.ndarray, node: Any) -> Any:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = np.int64(parent[node])
    return node


@numba.njit(cache=True, nogil=True)
def _fitting(low: np.ndarray, high: np.ndarray, similarity: np.ndarray, count: int, most: int) -> np.ndarray:
    """(m,) bool: edges inside a component that, at the edge's own similarity, fits. Edges by similarity descending."""
    parent = numbered(count)
    size = np.ones(count, np.uint32)
    strongest = np.full(count, -np.inf, np.float32)
    kept = np.zeros(len(low), np.bool_)
    begin = 0
    while begin < len(low):
        end = begin
        while end < len(low) and similarity[end] == similarity[begin]:
            one, other = _root(parent, np.int64(low[end])), _root(parent, np.int64(high[end]))
            if one != other:
                root, leaf = min(one, other), max(one, other)
                parent[leaf] = root
                size[root] += size[leaf]
                strongest[root] = max(strongest[root], strongest[leaf], similarity[end])
            end += 1
        for edge in range(begin, end):
            root = _root(parent, np.int64(low[edge]))
            kept[edge] = size[root] <= most or strongest[root] == similarity[edge]
        begin = end
    return kept


# ---- stars ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Election:
    """Who is asked first: the higher rank, then the larger value, then the smaller node."""

    value: np.ndarray | None = None
    """(count,) numbers, NaN counts as the smallest; None: by node."""
    rank: np.ndarray | None = None
    """(count,) uint8; who has STAYS is elected and never taken. None: all equal."""
    by_mean: bool = False
    """In place of `value`: the product with the sum of the component's vectors, as the medoid is chosen."""


def stars(
    members: Members,
    labels: np.ndarray,
    forest: np.ndarray | Iterable[np.ndarray],
    election: Election,
    threshold: float,
    scratch: Scratch,
    spread: Spread = serial,
    memory_bytes: int = 4 << 30,
) -> tuple[np.ndarray, np.ndarray]:
    """Split components into stars: (labels (count,) uint32, representatives (count,) bool).

    In each component the images are asked in the order of the election; one that nobody has taken is elected, and
    takes everyone left whose similarity to it is above the threshold. forest: edges that make `labels`; components
    whose first elected has an edge to every other member need no vectors.
    """
    sizes = component_sizes(labels)
    rank = np.zeros(len(labels), np.uint8) if election.rank is None else election.rank
    value = np.zeros(len(labels), np.int8) if election.value is None else election.value
    first = first_members(labels, value, rank)
    elected = np.zeros(len(labels), bool)
    wanted = sizes[labels] > 1
    if not election.by_mean:
        left = sizes.copy()
        _count_contested(labels, first, rank, left)
        for rows in pieces_of(forest):
            _count_settled(rows["low"], rows["high"], rows["similarity"], np.float32(threshold), labels, first, left)
        wanted &= left[labels] > 1
    elected[first[np.flatnonzero((sizes > 0) & ~wanted)]] = True
    result = labels.copy()
    mine = Scratch(f"{scratch.directory}/stars")
    stored = grouped.shuffle(members, labels, wanted, mine, spread)
    mine.put(ELECTION, {"value": value, "rank": rank})
    room = max(1, memory_bytes // 8 // (12 * members.dimension))
    calls = [
        (f"components {low}", (stored, low, high, room, threshold, members.half, election.by_mean))
        for low, high in grouped.ranges(labels, wanted, room)
    ]
    for _, (nodes, groups, chosen) in spread(elect, calls):
        result[nodes] = groups
        elected[chosen] = True
    return result, elected


@numba.njit(cache=True, nogil=True)
def _count_contested(labels: np.ndarray, first: np.ndarray, rank: np.ndarray, left: np.ndarray) -> None:
    """Components with a second member that stays are never settled by their first."""
    for node in range(len(labels)):
        if rank[node] == STAYS and first[labels[node]] != node:
            left[labels[node]] = len(labels)


@numba.njit(cache=True, nogil=True)
def _count_settled(
    low: np.ndarray,
    high: np.ndarray,
    similarity: np.ndarray,
    threshold: float,
    labels: np.ndarray,
    first: np.ndarray,
    left: np.ndarray,
) -> None:
    """left: (count,) by label, members without an edge to their first elected, which counts itself."""
    for edge in range(len(low)):
        label = labels[low[edge]]
        met = first[label] == low[edge] or first[label] == high[edge]
        if met and similarity[edge] > threshold and labels[high[edge]] == label:
            left[label] -= np.uint32(1)


def elect(
    stored: Grouped, low: int, high: int, room: int, threshold: float, half: bool, by_mean: bool, _: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elect in the components with labels low .. high - 1: (nodes (n,), new label of each (n,), the elected (k,))."""
    reader = Reader(stored.scratch)
    parts = [(labels, nodes) for labels, nodes, _ in stored.slices(reader, low, high)]
    labels, nodes = (np.concatenate(column) for column in zip(*parts, strict=True))
    value = reader.get(ELECTION, "value")[nodes].astype(np.float64)
    value[np.isnan(value)] = -np.inf
    rank = np.array(reader.get(ELECTION, "rank")[nodes])
    if len(nodes) > room:
        found = _Component(stored, reader, low, high, nodes, value, rank)
        return _groups(nodes, found.elect(threshold, half, by_mean, room))
    rows = np.concatenate([np.array(part) for _, _, part in stored.slices(reader, low, high)])
    order = np.lexsort((nodes, labels))
    labels, nodes, value, rank, rows = (column[order] for column in (labels, nodes, value, rank, rows))
    owner = np.empty(len(nodes), np.int64)
    starts = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])).tolist()
    for begin, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        span = slice(begin, end)
        one = _Loaded(nodes[span], value[span], rank[span], rows[span])
        owner[span] = one.elect(threshold, half, by_mean, room) + begin
    return _groups(nodes, owner)


def _groups(nodes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    smallest = np.full(len(nodes), np.iinfo(np.uint32).max, np.uint32)
    np.minimum.at(smallest, owner, nodes)
    return nodes, smallest[owner], nodes[np.unique(owner)]


@dataclass
class _Loaded:
    """One component in memory."""

    nodes: np.ndarray
    value: np.ndarray
    rank: np.ndarray
    rows: np.ndarray

    def blocks(self, room: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (n, d) vectors as stored), at most `room` of them."""
        del room
        yield 0, self.rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(k, d) vectors as stored."""
        return np.asarray(self.rows[rows])

    def elect(self, threshold: float, half: bool, by_mean: bool, room: int) -> np.ndarray:
        """(n,) int64: who each member belongs to, itself for the elected."""
        value = self._products_with_sum(room) if by_mean else self.value
        order = np.lexsort((self.nodes, -value, -self.rank.astype(np.int16)))
        if len(order) <= TABLE_MEMBERS:
            return _from_table(_above(self.take(np.arange(len(order))), threshold), order, self.rank == STAYS)
        return self._in_batches(order, threshold, half, room)

    def _products_with_sum(self, room: int) -> np.ndarray:
        total = None
        for _, block in self.blocks(room):
            wide = block.astype(np.float64)
            # Row after row, so that the sum does not depend on where blocks end.
            total = np.add.reduce(wide if total is None else np.concatenate([total[None], wide]), axis=0)
        assert total is not None
        return np.asarray(np.concatenate([block.astype(np.float64) @ total for _, block in self.blocks(room)]))

    def _in_batches(self, order: np.ndarray, threshold: float, half: bool, room: int) -> np.ndarray:
        owner = np.full(len(order), -1, np.int64)
        place, batch = 0, 1
        while place < len(order):
            free = order[place:][owner[order[place:]] < 0][:batch]
            if not len(free):
                break
            place = int(np.flatnonzero(order == free[-1])[0]) + 1
            asking, taken = self._near(free, threshold, half, room)
            bounds = np.searchsorted(asking, np.arange(len(free) + 1))
            for number, member in enumerate(free.tolist()):
                if owner[member] < 0:
                    near = taken[bounds[number] : bounds[number + 1]]
                    owner[near[(owner[near] < 0) & (self.rank[near] < STAYS)]] = member
                    owner[member] = member
            batch = min(BATCH, 2 * batch) if len(taken) < PAIRS_HELD // 4 else max(1, batch // 2)
        return owner

    def _near(self, asking: np.ndarray, threshold: float, half: bool, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (place in `asking`, member) above the threshold, by place."""
        left = self.take(asking).astype(np.float32)
        starts = np.zeros(len(left), np.int64)
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for first, block in self.blocks(room):
            wide = block.astype(np.float32)
            found += [
                (rows, columns + first)
                for rows, columns, _ in products.pairs_above(left, wide, threshold, starts, half=half)
            ]
        rows, columns = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(rows, kind="stable")
        return rows[order], columns[order]


class _Component(_Loaded):
    """One component that does not fit into memory: its vectors stay in scratch."""

    def __init__(
        self,
        stored: Grouped,
        reader: Reader,
        low: int,
        high: int,
        nodes: np.ndarray,
        value: np.ndarray,
        rank: np.ndarray,
    ) -> None:
        super().__init__(nodes, value, rank, np.empty(0))
        self._where = stored, reader, low, high

    def blocks(self, room: int) -> Iterator[tuple[int, np.ndarray]]:
        stored, reader, low, high = self._where
        first = 0
        for labels, _, rows in stored.slices(reader, low, high):
            for begin in range(0, len(labels), room):
                yield first + begin, rows[begin : begin + room]
            first += len(labels)

    def take(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray | None = None
        for first, block in self.blocks(1 << 30):
            inside = np.flatnonzero((rows >= first) & (rows < first + len(block)))
            if found is None:
                found = np.empty((len(rows), block.shape[1]), block.dtype)
            found[inside] = block[rows[inside] - first]
        assert found is not None
        return found


def _above(rows: np.ndarray, threshold: float) -> np.ndarray:
    """(n, n) bool by the definition of similarity. rows: (n, d) as stored."""
    wide = rows.astype(np.float64)
    table = wide @ wide.T
    above = table.astype(np.float32) > np.float32(threshold)
    # The sum's order may differ from the definition's in the last bit: where that could decide, the definition does.
    one, other = np.nonzero(np.abs(table - threshold) < 1e-6)
    if len(one):
        above[one, other] = vectors.similarity(rows[one], rows[other]) > np.float32(threshold)
    return above


def _from_table(above: np.ndarray, order: np.ndarray, stays: np.ndarray) -> np.ndarray:
    owner = np.full(len(order), -1, np.int64)
    free = ~stays
    for member in order.tolist():
        if owner[member] < 0:
            mine = above[member] & free
            owner[mine] = member
            owner[member] = member
            free &= ~mine
            free[member] = False
    return owner
