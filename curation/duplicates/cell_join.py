"""The join of many vectors: cells say who meets, sketches who may be a copy, the definition of similarity decides.

Pieces are written to scratch once (`stored`); a piece lists its residents by home cell, with their sketches, and its
visitors by visited cell; a task is a bundle of cells, or a slice of a big one, and compares residents with each other
and with visitors. Sketches (64 bytes) travel, vectors are read only for the pairs whose sketches are near.

Functions whose first argument is a `Scratch` run in workers.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from curation import products, sketch, storage
from curation.duplicates import kept
from curation.duplicates.cells import SKETCH_WORDS, Cells
from curation.duplicates.components import components
from curation.duplicates.forest import EDGE, ForestMerger, edges
from curation.duplicates.kept import Kept
from curation.duplicates.members import Members
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.stored import fetch, rows_name
from curation.duplicates.tasks import JoinOptions, Reducer, Spread, collect

TASK_PAIRS = 5e8
"""Pairs of sketches of one task at least: about a second of one core."""
MOST_TASKS = 20_000
QUERY_ROWS = 1 << 15
VERIFY_PAIRS = 1 << 16
ALIKE = np.float32(0.99)
"""Similarity that equal vectors exceed, of unit length and rounded to float16."""


def join_by_cells(
    members: Members, cells: Cells, options: JoinOptions, scratch: Scratch, spread: Spread, keep: Kept | None = None
) -> np.ndarray:
    """The forest of the pairs that `cells` nominate; rows lie in scratch."""
    names = assigned_names(members)
    places = [(None, None) if keep is None else keep.places(piece) for piece in members.pieces]
    calls = [
        (name, (scratch, name, rows_name(number), *places[number]))
        for number, name in enumerate(names)
        if not scratch.has(name)
    ]
    for _ in spread(assign_piece, calls, shared=(cells, storage.sha256(cells.to_bytes()))):
        pass
    sizes = np.zeros((4, len(cells)), np.int64)
    for name, piece in zip(names, members.pieces, strict=True):
        sizes[int(piece.fresh)] += np.diff(scratch.get(name, "resident_offsets"))
        sizes[2 + int(piece.fresh)] += np.diff(scratch.get(name, "visitor_offsets"))
    tasks = cell_tasks(sizes, options.memory_bytes)
    kinds = tuple(piece.fresh for piece in members.pieces)
    todo = []
    for task in tasks:
        name = f"forest/{task.first:07d}-{task.begin:012d}"
        todo.append((name, (scratch, name, task, members.half, options)))
    forest = collect(scratch, todo, join_cells, spread, members.count, options, shared=(kinds, cells.rule))
    equal = [scratch.get(rows_name(number), "equal") for number, piece in enumerate(members.pieces) if piece.fresh]
    equal += [scratch.get(name, "equal") for name, _ in todo]
    return with_equals(forest, [np.array(rows) for rows in equal], members.count, options.threshold)


def with_equals(forest: np.ndarray, equal: Sequence[np.ndarray], count: int, threshold: float) -> np.ndarray:
    """The forest in which equal vectors are one node, their smallest, and the others hang on it.

    forest, equal: (m,) EDGE; `equal` between equal vectors. What it gives does not depend on which pairs of equal
    vectors met, and so not on how the work was cut.
    """
    joined = np.concatenate([np.empty(0, EDGE), *equal])
    if not len(joined):
        return forest
    first = components(joined, count, -2.0)
    own = np.empty(count, np.float32)
    own[joined["low"]] = own[joined["high"]] = joined["similarity"]
    others = np.unique(np.concatenate([joined["low"], joined["high"]]))
    others = others[first[others] != others]
    stars = edges(first[others], others, own[others])
    inner = edges(first[forest["low"]], first[forest["high"]], forest["similarity"])
    merger = ForestMerger(count)
    merger.add(inner[inner["low"] != inner["high"]])
    merger.add(stars[stars["similarity"] > np.float32(threshold)])
    return merger.result()


def assigned_names(members: Members) -> list[str]:
    """The groups of `assign_piece`, by piece."""
    return [f"cells/{number:05d}" for number in range(len(members.pieces))]


def assign_piece(scratch: Scratch, name: str, rows: str, known: str | None, keep: str | None, shared: Any) -> None:
    """List one piece's residents by home cell, with their sketches, and its visitors by visited cell.

    known: the file where an earlier generation may have left them. keep: the file to leave them in otherwise.
    """
    cells, digest = shared
    made_of = kept.key(digest, scratch.get(rows, "contents"))
    arrays, record = kept.read(known, made_of), {}
    if arrays is None:
        arrays = _assigned(scratch.get(rows, "vectors"), cells)
        record = {} if keep is None else kept.write(keep, made_of, arrays)
    nodes = scratch.get(rows, "nodes")[arrays["rows"]]
    told = np.frombuffer(json.dumps(record).encode(), np.uint8)
    scratch.put(name, {"nodes": nodes, **arrays, kept.RECORD: told})


def _assigned(stored: np.ndarray, cells: Cells) -> dict[str, np.ndarray]:
    homes, visiting, visited, bits = cells.assign(stored)
    order = np.argsort(homes, kind="stable")
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    by_cell = np.argsort(visited, kind="stable")
    return {
        "rows": order.astype(np.uint32),
        "sketches": bits[order],
        "resident_offsets": _offsets(homes, len(cells)),
        "visitors": place[visiting[by_cell]],
        "visitor_offsets": _offsets(visited, len(cells)),
    }


def _offsets(cell: np.ndarray, cells: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=cells))]).astype(np.int64)


@dataclass(frozen=True)
class CellTask:
    """Cells first .. end - 1; of a big cell alone, queries begin .. stop - 1 (residents first, then visitors)."""

    first: int
    end: int
    begin: int = 0
    stop: int | None = None
    tile_rows: int = 1 << 20


def cell_tasks(sizes: np.ndarray, memory_bytes: int) -> list[CellTask]:
    """Bundle small cells and slice big ones.

    sizes: (4, cells) residents old and fresh, visitors old and fresh. The sketches a task holds stay below a quarter of
    the worker's memory.
    """
    old, fresh, old_visitors, fresh_visitors = sizes
    pairs = fresh * (fresh - 1) / 2 + old * fresh + fresh_visitors * (old + fresh) + old_visitors * fresh
    rows = sizes.sum(axis=0)
    most = max(TASK_PAIRS, float(pairs.sum()) / MOST_TASKS)
    room = max(1024, memory_bytes // 4 // (2 * 8 * SKETCH_WORDS))
    tasks: list[CellTask] = []
    first, cost, held = 0, 0.0, 0
    for cell in range(sizes.shape[1]):
        big = pairs[cell] > most or rows[cell] > room
        if first < cell and (big or cost + pairs[cell] > most or held + rows[cell] > room):
            if cost > 0:
                tasks.append(CellTask(first, cell))
            first, cost, held = cell, 0.0, 0
        if big and pairs[cell] > 0:
            queries = int(rows[cell])
            step = math.ceil(queries / max(1, math.ceil(pairs[cell] / most)))
            tasks += [
                CellTask(cell, cell + 1, begin, min(queries, begin + step), room // 2)
                for begin in range(0, queries, step)
            ]
            first = cell + 1
        else:
            cost += pairs[cell]
            held += int(rows[cell])
    if first < sizes.shape[1] and cost > 0:
        tasks.append(CellTask(first, sizes.shape[1]))
    return tasks


@dataclass(frozen=True)
class _Held:
    """Residents or visitors of cells, in memory but for their vectors; old ones first in each cell."""

    piece: np.ndarray
    row: np.ndarray
    node: np.ndarray
    bits: np.ndarray

    def __len__(self) -> int:
        return len(self.node)

    def part(self, low: int, high: int) -> "_Held":
        return _Held(self.piece[low:high], self.row[low:high], self.node[low:high], self.bits[low:high])


def join_cells(scratch: Scratch, name: str, task: CellTask, half: bool, options: JoinOptions, shared: Any) -> str:
    """The forest of a bundle of cells, or of a slice of one."""
    kinds, rule = shared
    reader = Reader(scratch)
    verifying = _Verifying(reader, half, options.threshold, Reducer(options.max_edges))
    blocks = _bundle(reader, task, kinds) if task.stop is None else _slice(reader, task, kinds)
    for queries, tile, starts in blocks:
        near = sketch.scan(queries.bits, tile.bits, starts, rule.first_words, (rule.cuts[0], *2 * rule.cuts[1:]))
        for rows, columns in near:
            verifying.add(queries, rows, tile, columns)
    verifying.flush()
    scratch.put(name, {"forest": verifying.reducer.result(), "equal": np.concatenate(verifying.equal)})
    return name


class _Verifying:
    """Collects pairs whose sketches are near, over many cells, and compares their vectors by definition."""

    def __init__(self, scratch: Reader, half: bool, threshold: float, reducer: Reducer) -> None:
        self.scratch, self.half, self.threshold, self.reducer = scratch, half, np.float32(threshold), reducer
        self.equal = [np.empty(0, EDGE)]
        self._held: list[np.ndarray] = []
        self._count = 0

    def add(self, queries: _Held, rows: np.ndarray, tile: _Held, columns: np.ndarray) -> None:
        for begin in range(0, len(rows), VERIFY_PAIRS):
            one, other = rows[begin : begin + VERIFY_PAIRS], columns[begin : begin + VERIFY_PAIRS]
            pairs = np.empty(len(one), _PAIR)
            pairs["one_node"], pairs["other_node"] = queries.node[one], tile.node[other]
            pairs["one"] = queries.piece[one].astype(np.int64) << 32 | queries.row[one]
            pairs["other"] = tile.piece[other].astype(np.int64) << 32 | tile.row[other]
            self._held.append(pairs)
            self._count += len(pairs)
            if self._count >= VERIFY_PAIRS:
                self.flush()

    def flush(self) -> None:
        if not self._count:
            return
        pairs = np.concatenate(self._held)
        self._held, self._count = [], 0
        places, at = np.unique(np.concatenate([pairs["one"], pairs["other"]]), return_inverse=True)
        wide = fetch(self.scratch, places >> 32, places & 0xFFFFFFFF)
        one, other = at[: len(pairs)], at[len(pairs) :]
        values = products.defined(wide, wide, one, other, half=self.half)
        same = values > ALIKE
        same[same] = (wide[one[same]] == wide[other[same]]).all(axis=1)
        above = values > self.threshold
        found = edges(pairs["one_node"], pairs["other_node"], values)
        self.reducer.add(found[above])
        self.equal.append(found[above & same])


_PAIR = np.dtype([("one_node", "<u4"), ("other_node", "<u4"), ("one", "<i8"), ("other", "<i8")])


def _bundle(scratch: Reader, task: CellTask, kinds: tuple[bool, ...]) -> Iterator[tuple[_Held, _Held, np.ndarray]]:
    """(queries, what they are compared with, first column of each query) of every cell of a task."""
    residents, bounds, old = _load(scratch, task, kinds, "resident_offsets")
    visitors, visitor_bounds, old_visitors = _load(scratch, task, kinds, "visitor_offsets")
    for cell in range(task.end - task.first):
        tile = residents.part(bounds[cell], bounds[cell + 1])
        coming = visitors.part(visitor_bounds[cell], visitor_bounds[cell + 1])
        if len(tile) > old[cell]:
            yield tile, tile, _resident_starts(np.arange(len(tile)), old[cell])
        before, new = coming.part(0, old_visitors[cell]), coming.part(old_visitors[cell], len(coming))
        if len(before) and len(tile) > old[cell]:
            # The few are the queries: a query has a cost of its own.
            yield (few := tile.part(old[cell], len(tile))), before, np.zeros(len(few), np.int64)
        if len(new) and len(tile):
            yield new, tile, np.zeros(len(new), np.int64)


def _slice(scratch: Reader, task: CellTask, kinds: tuple[bool, ...]) -> Iterator[tuple[_Held, _Held, np.ndarray]]:
    """The same of some queries of one big cell, tile by tile of its residents."""
    (count, old), (_, old_visitors) = (_sizes(scratch, task, kinds, k) for k in ("resident_offsets", "visitor_offsets"))
    assert task.stop is not None
    for low in range(0, count, task.tile_rows):
        high = min(count, low + task.tile_rows)
        tile, _, _ = _load(scratch, task, kinds, "resident_offsets", low, high)
        for key, first, last in (
            ("resident_offsets", min(task.begin, count), min(task.stop, count)),
            ("visitor_offsets", max(task.begin, count) - count, max(task.stop, count) - count),
        ):
            for begin in range(first, last, QUERY_ROWS):
                end = min(last, begin + QUERY_ROWS)
                place = np.arange(begin, end)
                starts = (
                    _resident_starts(place, old)
                    if key == "resident_offsets"
                    else _visitor_starts(place, old_visitors, old)
                )
                if int(starts.min()) < high:
                    queries, _, _ = _load(scratch, task, kinds, key, begin, end)
                    yield queries, tile, np.maximum(starts - low, 0)


# Each pair once, and none of two old ends: a resident meets the fresh ones behind it, an old visitor the fresh
# residents, a fresh visitor all.


def _resident_starts(place: np.ndarray, old: int) -> np.ndarray:
    return np.asarray(np.maximum(place + 1, old))


def _visitor_starts(place: np.ndarray, old_visitors: int, old: int) -> np.ndarray:
    return np.asarray(np.where(place < old_visitors, old, 0))


def _sizes(scratch: Reader, task: CellTask, kinds: tuple[bool, ...], key: str) -> tuple[int, int]:
    """(all, old) residents or visitors of a task's cells."""
    counts = [0, 0]
    for piece, fresh in enumerate(kinds):
        offsets = scratch.get(f"cells/{piece:05d}", key)
        counts[int(fresh)] += int(offsets[task.end] - offsets[task.first])
    return sum(counts), counts[0]


def _load(
    scratch: Reader, task: CellTask, kinds: tuple[bool, ...], key: str, low: int = 0, high: int | None = None
) -> tuple[_Held, np.ndarray, np.ndarray]:
    """(residents or visitors by cell, (cells + 1,) where each cell begins, (cells,) how many of each are old).

    low, high: of one cell, just these places.
    """
    cells = task.end - task.first
    pieces = [piece for kind in (False, True) for piece, fresh in enumerate(kinds) if fresh == kind]
    offsets = [
        np.array(scratch.get(f"cells/{piece:05d}", key)[task.first : task.end + 1], np.int64) for piece in pieces
    ]
    if high is not None:
        # Of one cell: each piece's places among those asked for.
        ends = np.cumsum([0, *(int(mine[-1] - mine[0]) for mine in offsets)])
        inside = np.clip(ends, low, high)
        offsets = [
            mine[0] + np.array([begin, end]) - first
            for mine, first, begin, end in zip(offsets, ends, inside, inside[1:], strict=False)
        ]
    counts = np.array([np.diff(mine) for mine in offsets]).reshape(len(pieces), cells)
    bounds = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    begins = bounds[:-1] + np.cumsum(counts, axis=0) - counts
    size = int(bounds[-1])
    held = _Held(
        np.empty(size, np.int32),
        np.empty(size, np.int64),
        np.empty(size, np.uint32),
        np.empty((size, SKETCH_WORDS), np.uint64),
    )
    for piece, mine, begin in zip(pieces, offsets, begins, strict=True):
        if mine[-1] == mine[0]:
            continue
        group = f"cells/{piece:05d}"
        rows, nodes, bits = (scratch.get(group, name) for name in ("rows", "nodes", "sketches"))
        if key == "resident_offsets":
            span = slice(int(mine[0]), int(mine[-1]))
            columns = (np.arange(span.stop - span.start, dtype=np.uint32), rows[span], nodes[span], bits[span])
        else:
            columns = (scratch.get(group, "visitors")[mine[0] : mine[-1]], rows, nodes, bits)
        _place(piece, mine - mine[0], begin, *columns, held.piece, held.row, held.node, held.bits)
    return held, bounds, counts[[not kinds[piece] for piece in pieces]].sum(axis=0)


@numba.njit(cache=True, nogil=True)
def _place(
    piece: int,
    offsets: np.ndarray,
    begins: np.ndarray,
    places: np.ndarray,
    rows: np.ndarray,
    nodes: np.ndarray,
    bits: np.ndarray,
    piece_of: np.ndarray,
    row_of: np.ndarray,
    node_of: np.ndarray,
    bits_of: np.ndarray,
) -> None:
    """Write one piece's residents or visitors of each cell from `begins` on."""
    for cell in range(len(begins)):
        at = begins[cell]
        for k in range(offsets[cell], offsets[cell + 1]):
            place = places[k]
            piece_of[at] = piece
            row_of[at] = rows[place]
            node_of[at] = nodes[place]
            for word in range(bits.shape[1]):
                bits_of[at, word] = bits[place, word]
            at += 1
