"""The join of many vectors: cells say who meets, sketches who may be a copy, the definition of similarity decides.

Pieces are written to scratch once, raw, with their sketches; a piece lists its residents by home cell and its visitors
by visited cell; a task is a bundle of cells, or a slice of a big one, and compares residents with each other and with
visitors. Sketches (128 bytes) travel, vectors are read only for the pairs whose sketches are near. Vectors of a piece
that are equal to the last bit take part once.

Functions whose first argument is a `Scratch` run in workers.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import products, sketch, vectors
from curation.duplicates import recall as recalls
from curation.duplicates.cells import CELLS_PER_ROOT, TRAINING_PER_CELL, Cells, train
from curation.duplicates.components import components
from curation.duplicates.forest import EDGE, ForestMerger, edges
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import JoinOptions, Reducer, Spread, collect
from curation.errors import UserError
from curation.order import hash_keys

TASK_PAIRS = 5e8
"""Pairs of sketches of one task at least: a second or two of one core."""
MOST_TASKS = 20_000
QUERY_ROWS = 1 << 15
VERIFY_PAIRS = 1 << 15
MEETING = 2048
"""Sampled rows whose meetings tell what a rule costs; an eighth of them meet all."""
PRODUCT_NANOSECONDS = 1 / 30
"""Of a multiply-add in float32 products of everything; what a plan is compared with."""
COPIES_PER_IMAGE = 4096
"""More true pairs than so many per image are no copies: the vectors or the threshold are wrong."""
TRUTH_WORDS = 4


@dataclass(frozen=True)
class Plan:
    """Cells with their rule, and the sample that recall is measured on."""

    cells: Cells
    pairs: np.ndarray
    """(p,) SAMPLE_PAIR of the measuring queries."""
    queries: int
    share: float
    """Of all rows, those that a vector is compared with."""
    visits: float
    attempts: int


# ---- rows in scratch -------------------------------------------------------------------------------------------------


def _rows(piece: int) -> str:
    return f"rows/{piece:05d}"


def store_sketched(scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, _: Any) -> None:
    """Write one piece raw with its sketches; of equal vectors only the smallest node, and an edge to it."""
    nodes, stored = piece.read(dimension)
    bits = sketch.sketches(stored)
    stands_for, equal = distinct(nodes, stored, bits)
    kept = stands_for == np.arange(len(nodes))
    row_of = np.cumsum(kept)[stands_for] - 1
    scratch.put(
        name,
        {
            "nodes": nodes[kept],
            "vectors": stored[kept],
            "sketches": bits[kept],
            "equal": equal,
            "all_nodes": nodes,
            "row_of": row_of.astype(np.uint32),
            "copies": np.bincount(row_of, minlength=int(kept.sum())).astype(np.uint32),
        },
    )


def distinct(nodes: np.ndarray, stored: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n,) the row that stands for each, of equal ones the smallest node; (m,) EDGE from it to each of the others).

    nodes: (n,) uint32. stored: (n, d). bits: (n, w) uint64 sketches of them.
    """
    key = bits[:, 0] ^ (bits[:, 1] * np.uint64(0x9E3779B97F4A7C15))
    order = np.lexsort((nodes, key))
    new = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    repeated = np.flatnonzero(~new)
    row, first = order[repeated], order[start[repeated]]
    equal = np.ones(len(row), bool)
    for begin in range(0, len(row), 1 << 14):
        part = slice(begin, begin + (1 << 14))
        equal[part] = (stored[row[part]] == stored[first[part]]).all(axis=1)
    row, first = row[equal], first[equal]
    stands_for = np.arange(len(nodes))
    stands_for[row] = first
    values = np.empty(len(row), np.float32)
    for begin in range(0, len(row), 1 << 14):
        part = slice(begin, begin + (1 << 14))
        values[part] = vectors.similarity(stored[first[part]], stored[row[part]])
    return stands_for, edges(nodes[first], nodes[row], values)


@dataclass(frozen=True)
class Sampled:
    """Nodes drawn from scratch: (n,) each, and the piece and row where its vector lies."""

    piece: np.ndarray
    row: np.ndarray
    node: np.ndarray

    def part(self, begin: int, end: int) -> "Sampled":
        return Sampled(self.piece[begin:end], self.row[begin:end], self.node[begin:end])

    def vectors(self, scratch: Scratch | Reader) -> np.ndarray:
        """(n, d), as stored."""
        return _fetch(scratch, "rows", "vectors", self.piece, self.row)


def draw(scratch: Scratch, ids: np.ndarray, pieces: Sequence[int], count: int, seed: int, purpose: str) -> Sampled:
    """The `count` nodes of these pieces that come first in the hash order of their ids; less where there are less."""
    held = [np.asarray(scratch.get(_rows(piece), "all_nodes")) for piece in pieces]
    total = sum(len(nodes) for nodes in held)
    # Keys below `limit` are about a fifth more than are asked for: nothing of the size of the pool is sorted.
    share = (1.2 * count + 1000) / max(1, total)
    limit = np.uint64(min(1.0, share) * float(2**64 - 2**12))
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for piece, nodes in zip(pieces, held, strict=True):
        keys = hash_keys(ids[nodes], seed, purpose)
        mine = np.flatnonzero(keys <= limit) if share < 1 else np.arange(len(nodes))
        rows = scratch.get(_rows(piece), "row_of")[mine].astype(np.int64)
        for column, values in zip(columns, (np.full(len(mine), piece), rows, nodes[mine], keys[mine]), strict=True):
            column.append(values)
    piece_of, row, node, key = (np.concatenate(column) if column else np.empty(0, np.int64) for column in columns)
    order = np.argsort(key, kind="stable")[:count]
    return Sampled(piece_of[order], row[order], node[order].astype(np.uint32))


def _fetch(scratch: Scratch | Reader, folder: str, key: str, piece: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Rows of stored arrays in the order asked for, read in the order they lie in."""
    order = np.lexsort((row, piece))
    parts = []
    for low, high in _runs(piece[order]):
        array = scratch.get(f"{folder}/{int(piece[order[low]]):05d}", key)
        parts.append(array[row[order[low:high]]])
    joined = np.concatenate(parts)
    result = np.empty_like(joined)
    result[order] = joined
    return result


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of equal values."""
    if len(values):
        yield from itertools.pairwise(np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])))


# ---- the plan --------------------------------------------------------------------------------------------------------


def find_plan(
    members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread, cells: Cells | None
) -> Plan | None:
    """Store the rows, train cells, choose the rule, measure its recall; None where exact products cost less.

    Read back from scratch where an interrupted join has done so. Raises UserError where nearly everything is above
    the threshold.
    """
    calls = [
        (_rows(number), (scratch, _rows(number), piece, members.dimension))
        for number, piece in enumerate(members.pieces)
        if not scratch.has(_rows(number))
    ]
    for _ in spread(store_sketched, calls):
        pass
    if not scratch.has("plan"):
        scratch.put("plan", _make_plan(members, ids, options, scratch, spread, cells))
    numbers = np.array(scratch.get("plan", "numbers")).tolist()
    if not numbers:
        return None
    chosen = Cells.from_bytes(np.array(scratch.get("plan", "cells")).tobytes())
    return Plan(
        chosen, np.array(scratch.get("plan", "pairs")), int(numbers[0]), numbers[1], numbers[2], int(numbers[3])
    )


def _make_plan(
    members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread, given: Cells | None
) -> dict[str, np.ndarray]:
    every = list(range(len(members.pieces)))
    fresh = [number for number in every if members.pieces[number].fresh]
    cells = given if given is not None else _train(members, ids, options, scratch, spread)
    asked = draw(
        scratch, ids, fresh, recalls.CHOICE_QUERIES + recalls.MOST_QUERIES, options.seed, f"{options.purpose} recall"
    )
    search = _Truth(members, options, scratch, spread, cells)
    # A few first: where nearly everything is a copy, not even a sample can be compared.
    chooses = min(recalls.CHOICE_QUERIES, len(asked.node) // 2) if given is None else min(128, len(asked.node) // 2)
    choice = search.pairs(asked.part(0, min(128, chooses)))
    _refuse_dense(choice, min(128, chooses), members, options)
    choice = np.concatenate([choice, search.pairs(asked.part(min(128, chooses), chooses))])
    with_copies = len(np.unique(choice["query"][choice["similarity"] > np.float32(options.target)])) / max(1, chooses)
    # Cells that were chosen before are only measured again: that costs more than joining a few new images.
    wanted = 0.0 if given is not None else recalls.QUERIES_WITH_COPIES / max(with_copies, 1e-3) * 1.05
    measures = min(max(recalls.MEASURE_QUERIES, math.ceil(wanted)), recalls.MOST_QUERIES, len(asked.node) - chooses)
    measure = search.pairs(asked.part(chooses, chooses + measures))
    sample = draw(scratch, ids, every, MEETING, options.seed, f"{options.purpose} background").vectors(scratch)
    few = len(sample) // 8
    background = recalls.Background.of(cells, sample[:few], sample[few:])
    attempts = 1
    if given is None:
        chosen, attempts = _choose(choice, measure, (chooses, measures), cells, background, options)
        # The exact join compares equal vectors as well, this one does not.
        different = sum(len(scratch.get(_rows(number), "nodes")) for number in every) / members.rows
        exact = members.dimension * PRODUCT_NANOSECONDS / 2
        if chosen is None or chosen.share * chosen.nanoseconds * different**2 > exact:
            return {"numbers": np.empty(0)}
        cells = cells.with_rule(chosen.rule)
    rule = cells.rule
    assert rule is not None
    share, visits = background.visits(cells, rule)
    return {
        "cells": np.frombuffer(cells.to_bytes(), np.uint8),
        "pairs": measure,
        "numbers": np.array([measures, share, visits, attempts], np.float64),
    }


def _train(members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread) -> Cells:
    every = range(len(members.pieces))
    room = options.memory_bytes // 4 // (6 * members.dimension)
    rows = sum(len(scratch.get(_rows(number), "nodes")) for number in every)
    count = int(min(max(16, round(CELLS_PER_ROOT * math.sqrt(rows))), rows, max(16, room // 8)))
    sample = draw(scratch, ids, every, min(count * TRAINING_PER_CELL, room), options.seed, f"{options.purpose} cells")
    ((_, cells),) = spread(train_cells, [("cells", (scratch, sample, count, options.seed))])
    assert isinstance(cells, Cells)
    return cells


def train_cells(scratch: Scratch, sample: Sampled, count: int, seed: int, _: Any) -> Cells:
    """`cells.train` on sampled rows."""
    return train(count, seed, sample.vectors(scratch))


def _choose(
    choice: np.ndarray,
    measure: np.ndarray,
    queries: tuple[int, int],
    cells: Cells,
    background: recalls.Background,
    options: JoinOptions,
) -> tuple[recalls.Choice | None, int]:
    """The cheapest rule whose measured recall reaches what is asked with the lower end of its interval."""
    aim = options.recall + recalls.margin(choice, options.target, options.recall, cells, background, queries)
    chosen = recalls.choose(choice, options.target, aim, cells, background)
    for attempt in range(1, recalls.ATTEMPTS + 1):
        if chosen is None:
            return None, attempt
        result = recalls.measured(measure, recalls.nominated(measure, chosen.rule), options.target, queries[1])
        if result["low"] >= options.recall or result["recall"] == 1.0 or attempt == recalls.ATTEMPTS:
            return chosen, attempt
        if attempt < recalls.LEARNING_ATTEMPTS:
            aim = min((1 + aim) / 2, aim + 1.3 * (options.recall - result["low"]))
            chosen = recalls.choose(choice, options.target, aim, cells, background)
        else:
            # The sample has no more to teach: few copies, or all of them found.
            chosen = recalls.widened(chosen, cells, background)
    return chosen, recalls.ATTEMPTS


def _refuse_dense(pairs: np.ndarray, queries: int, members: Members, options: JoinOptions) -> None:
    # Equal vectors are one node and cost nothing: their sketches do not differ at all.
    per_image = float(pairs["weight"][pairs["distance"] > 0].sum()) / max(1, queries)
    if per_image > COPIES_PER_IMAGE and per_image > members.rows / 100:
        raise UserError(
            f"an image has {per_image:,.0f} others above cosine {options.threshold} on average, of {members.rows:,}: "
            "these vectors do not tell images apart at this threshold; raise it, or embed with a copy-detection model",
            exit_code=1,
        )


@dataclass(frozen=True)
class _Truth:
    """Finds the true pairs of sampled rows, piece by piece."""

    members: Members
    options: JoinOptions
    scratch: Scratch
    spread: Spread
    cells: Cells

    def pairs(self, asked: Sampled) -> np.ndarray:
        """(p,) SAMPLE_PAIR, ordered by query and node."""
        if not len(asked.node):
            return np.empty(0, recalls.SAMPLE_PAIR)
        shared = (asked, asked.vectors(self.scratch), self.cells, self.members.half, self.options)
        calls = [(_rows(number), (self.scratch, number)) for number in range(len(self.members.pieces))]
        results = sorted(self.spread(search_queries, calls, shared=shared), key=lambda item: item[0])
        return np.sort(np.concatenate([found for _, found in results]), order=["query", "node"])


def search_queries(scratch: Scratch, piece: int, shared: Any) -> np.ndarray:
    """The true pairs of the queries with one piece's rows, as (p,) SAMPLE_PAIR; a row counts for all its equals."""
    sampled, asked, cells, half, options = shared
    queries = sampled.node
    nodes, bits, stored, copies = (scratch.get(_rows(piece), k) for k in ("nodes", "sketches", "vectors", "copies"))
    own = np.where(sampled.piece == piece, sampled.row, -1)
    mine = sketch.sketches(asked)
    first, middle, whole = (
        sketch.distance_at(options.threshold, w, recalls.TRUTH_DEVIATIONS)
        for w in (TRUTH_WORDS, sketch.HALF, sketch.WORDS)
    )
    starts = np.zeros(len(queries), np.int64)
    parts = [np.empty(0, recalls.SAMPLE_PAIR)]
    lefts, rights = [], []
    for near, near_rows in sketch.scan(mine, np.asarray(bits), starts, TRUTH_WORDS, (first, middle, whole)):
        times = copies[near_rows].astype(np.float32) - (own[near] == near_rows)
        others = np.flatnonzero(times > 0)
        keys = hash_keys(nodes[near_rows[others]].astype(np.uint64), 0, "recall pairs")
        kept, weight = recalls.thin(near[others], keys, len(queries))
        rows, columns, weight = near[others[kept]], near_rows[others[kept]], weight * times[others[kept]]
        for begin in range(0, len(rows), VERIFY_PAIRS):
            part = slice(begin, begin + VERIFY_PAIRS)
            one, other_row = rows[part], columns[part]
            values = _verified(asked, one, lambda wanted: stored[wanted], other_row, half)
            true = values > np.float32(options.threshold)
            pairs = np.zeros(int(true.sum()), recalls.SAMPLE_PAIR)
            pairs["query"], pairs["node"] = queries[one[true]], nodes[other_row[true]]
            pairs["similarity"], pairs["weight"] = values[true], weight[part][true]
            for word in range(sketch.LONGEST_FIRST):
                pairs["first"][:, word] = sketch.distances(mine[one[true]], bits[other_row[true]], word + 1)
            pairs["half"] = sketch.distances(mine[one[true]], bits[other_row[true]], sketch.HALF)
            pairs["distance"] = sketch.distances(mine[one[true]], bits[other_row[true]], sketch.WORDS)
            parts.append(pairs)
            lefts.append(one[true])
            rights.append(other_row[true])
    found = np.concatenate(parts)
    if len(found):
        left, right = np.concatenate(lefts), np.concatenate(rights)
        for begin in range(0, len(found), VERIFY_PAIRS):
            part = slice(begin, begin + VERIFY_PAIRS)
            found["gap"][part] = cells.gaps(asked[left[part]], stored[right[part]])
    return found


def _verified(left: np.ndarray, rows: np.ndarray, read: Any, columns: np.ndarray, half: bool) -> np.ndarray:
    """(m,) float32 similarities by definition; read(unique columns) gives the stored vectors of the right side."""
    wanted, place = np.unique(columns, return_inverse=True)
    used, mine = np.unique(rows, return_inverse=True)
    return products.defined(left[used].astype(np.float32), read(wanted).astype(np.float32), mine, place, half=half)


# ---- the join --------------------------------------------------------------------------------------------------------


def join_by_cells(members: Members, cells: Cells, options: JoinOptions, scratch: Scratch, spread: Spread) -> np.ndarray:
    """The forest of the pairs that `cells` nominate; rows lie in scratch."""
    names = [f"cells/{number:05d}" for number in range(len(members.pieces))]
    calls = [(name, (scratch, name, _rows(number))) for number, name in enumerate(names) if not scratch.has(name)]
    for _ in spread(assign_piece, calls, shared=cells):
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
    equal = [scratch.get(_rows(number), "equal") for number, piece in enumerate(members.pieces) if piece.fresh]
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


def assign_piece(scratch: Scratch, name: str, rows: str, cells: Cells) -> None:
    """List one piece's residents by home cell, with their sketches, and its visitors by visited cell."""
    nodes, bits = scratch.get(rows, "nodes"), scratch.get(rows, "sketches")
    homes, visiting, visited = cells.visits(scratch.get(rows, "vectors"))
    order = np.argsort(homes, kind="stable")
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    by_cell = np.argsort(visited, kind="stable")
    scratch.put(
        name,
        {
            "nodes": nodes[order],
            "rows": order.astype(np.uint32),
            "sketches": bits[order],
            "resident_offsets": _offsets(homes, len(cells)),
            "visitors": place[visiting[by_cell]],
            "visitor_offsets": _offsets(visited, len(cells)),
        },
    )


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
    room = max(1024, memory_bytes // 4 // (2 * 8 * sketch.WORDS))
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
        near = sketch.scan(queries.bits, tile.bits, starts, rule.first_words, rule.cuts)
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
            pairs["same"] = queries.bits[one, 0] == tile.bits[other, 0]
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
        wide = _fetch(self.scratch, "rows", "vectors", places >> 32, places & 0xFFFFFFFF).astype(np.float32)
        one, other = at[: len(pairs)], at[len(pairs) :]
        values = products.defined(wide, wide, one, other, half=self.half)
        same = pairs["same"].copy()
        same[same] = (wide[one[same]] == wide[other[same]]).all(axis=1)
        above = values > self.threshold
        found = edges(pairs["one_node"], pairs["other_node"], values)
        self.reducer.add(found[above])
        self.equal.append(found[above & same])


_PAIR = np.dtype([("one_node", "<u4"), ("other_node", "<u4"), ("one", "<i8"), ("other", "<i8"), ("same", "?")])


def _bundle(scratch: Reader, task: CellTask, kinds: tuple[bool, ...]) -> Iterator[tuple[_Held, _Held, np.ndarray]]:
    """(queries, what they are compared with, first column of each query) of every cell of a task."""
    residents, bounds, old = _load(scratch, task, kinds, "resident_offsets")
    visitors, visitor_bounds, old_visitors = _load(scratch, task, kinds, "visitor_offsets")
    for cell in range(task.end - task.first):
        tile = residents.part(bounds[cell], bounds[cell + 1])
        coming = visitors.part(visitor_bounds[cell], visitor_bounds[cell + 1])
        if len(tile) > old[cell]:
            yield tile, tile, _resident_starts(np.arange(len(tile)), old[cell])
        if len(coming) > old_visitors[cell] or (len(coming) and len(tile) > old[cell]):
            yield coming, tile, _visitor_starts(np.arange(len(coming)), old_visitors[cell], old[cell])


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
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    old = np.zeros(cells, np.int64)
    at = 0
    for piece in [p for kind in (False, True) for p, fresh in enumerate(kinds) if fresh == kind]:
        group = f"cells/{piece:05d}"
        offsets = np.array(scratch.get(group, key)[task.first : task.end + 1])
        begin, end = int(offsets[0]), int(offsets[-1])
        cell = np.repeat(np.arange(cells), np.diff(offsets))
        if not kinds[piece]:
            old += np.diff(offsets)
        if high is not None:
            skipped, taken = max(0, low - at), max(0, min(high - at, end - begin))
            at += end - begin
            begin, end, cell = begin + skipped, begin + taken, cell[skipped:taken]
        if end <= begin:
            continue
        places: Any = slice(begin, end) if key == "resident_offsets" else scratch.get(group, "visitors")[begin:end]
        for column, values in zip(
            columns,
            (
                cell,
                np.full(end - begin, piece, np.int32),
                *(scratch.get(group, name)[places] for name in ("rows", "nodes", "sketches")),
            ),
            strict=True,
        ):
            column.append(values)
    empty = (np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint32), np.empty(0, np.uint32))
    whole = (*empty, np.empty((0, sketch.WORDS), np.uint64))
    cell, piece_of, row, node, bits = (
        np.concatenate([none, *parts]) for none, parts in zip(whole, columns, strict=True)
    )
    order = np.argsort(cell, kind="stable") if cells > 1 else np.arange(len(cell))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=cells))])
    return _Held(piece_of[order], row[order].astype(np.int64), node[order], bits[order]), bounds, old
