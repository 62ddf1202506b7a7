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
from curation.duplicates.cells import CELLS_PER_ROOT, TRAINING_PER_CELL, Cells, Rule, train
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
    chooses = min(recalls.CHOICE_QUERIES, len(asked.node) // 2)
    choice = search.pairs(asked.part(0, min(128, chooses)))
    _refuse_dense(choice, min(128, chooses), members, options)
    choice = np.concatenate([choice, search.pairs(asked.part(min(128, chooses), chooses))])
    with_copies = len(np.unique(choice["query"][choice["similarity"] > np.float32(options.target)])) / max(1, chooses)
    wanted = max(recalls.MEASURE_QUERIES, recalls.QUERIES_WITH_COPIES / max(with_copies, 1e-3) * 1.05)
    measures = min(math.ceil(wanted), recalls.MOST_QUERIES, len(asked.node) - chooses)
    measure = search.pairs(asked.part(chooses, chooses + measures))
    sample = draw(scratch, ids, every, MEETING, options.seed, f"{options.purpose} background").vectors(scratch)
    background = recalls.Background.of(cells, sample[: MEETING // 8], sample)
    attempts = 1
    if given is None:
        chosen, attempts = _choose(choice, measure, (chooses, measures), cells, background, options)
        if chosen is None or chosen.share * chosen.nanoseconds > members.dimension * PRODUCT_NANOSECONDS / 2:
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
    chosen = None
    for attempt in range(1, recalls.ATTEMPTS + 1):
        chosen = recalls.choose(choice, options.target, aim, cells, background)
        if chosen is None:
            return None, attempt
        found = recalls.nominated(measure, chosen.rule)
        result = recalls.measured(measure, found, options.target, queries[1])
        if result["low"] >= options.recall or not result["pairs"]:
            return chosen, attempt
        aim = (1 + aim) / 2
    return chosen, recalls.ATTEMPTS


def _refuse_dense(pairs: np.ndarray, queries: int, members: Members, options: JoinOptions) -> None:
    per_image = float(pairs["weight"].sum()) / max(1, queries)
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
    cuts = [sketch.distance_at(options.threshold, w, recalls.TRUTH_DEVIATIONS) for w in (TRUTH_WORDS, sketch.WORDS)]
    starts = np.zeros(len(queries), np.int64)
    parts = [np.empty(0, recalls.SAMPLE_PAIR)]
    lefts, rights = [], []
    for near, near_rows in sketch.scan(mine, np.asarray(bits), starts, TRUTH_WORDS, *cuts):
        times = copies[near_rows].astype(np.float32) - (own[near] == near_rows)
        near, near_rows, times = near[times > 0], near_rows[times > 0], times[times > 0]
        keys = hash_keys(nodes[near_rows].astype(np.uint64), 0, "recall pairs")
        kept, weight = recalls.thin(near, keys, len(queries))
        rows, columns, weight = near[kept], near_rows[kept], weight * times[kept]
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

    sizes: (4, cells) residents old and fresh, visitors old and fresh. The sketches a task holds stay below an eighth of
    the worker's memory.
    """
    old, fresh, old_visitors, fresh_visitors = sizes
    pairs = fresh * (fresh - 1) / 2 + old * fresh + fresh_visitors * (old + fresh) + old_visitors * fresh
    rows = old + fresh
    most = max(TASK_PAIRS, float(pairs.sum()) / MOST_TASKS)
    room = max(1024, memory_bytes // 8 // (3 * 8 * sketch.WORDS))
    tasks: list[CellTask] = []
    first, cost = 0, 0.0
    for cell in range(sizes.shape[1]):
        big = pairs[cell] > most or rows[cell] > room
        if first < cell and (big or cost + pairs[cell] > most):
            if cost > 0:
                tasks.append(CellTask(first, cell, tile_rows=room))
            first, cost = cell, 0.0
        if big and pairs[cell] > 0:
            queries = int(rows[cell] + old_visitors[cell] + fresh_visitors[cell])
            step = math.ceil(queries / max(1, math.ceil(pairs[cell] / most)))
            tasks += [
                CellTask(cell, cell + 1, begin, min(queries, begin + step), room) for begin in range(0, queries, step)
            ]
            first = cell + 1
        else:
            cost += pairs[cell]
    if first < sizes.shape[1] and cost > 0:
        tasks.append(CellTask(first, sizes.shape[1], tile_rows=room))
    return tasks


@dataclass(frozen=True)
class _Rows:
    """Rows of stored pieces that belong to one cell: (piece, place in the piece's order) with old rows first."""

    piece: np.ndarray
    place: np.ndarray
    old: int

    def __len__(self) -> int:
        return len(self.piece)

    def fetch(self, scratch: Reader, key: str, begin: int, end: int) -> np.ndarray:
        """`nodes` or `sketches` of rows begin .. end - 1."""
        parts = []
        for low, high in _runs(self.piece[begin:end]):
            array = scratch.get(f"cells/{int(self.piece[begin + low]):05d}", key)
            parts.append(array[self.place[begin + low : begin + high]])
        return np.concatenate(parts)

    def vectors(self, scratch: Reader, wanted: np.ndarray) -> np.ndarray:
        """(m, d) stored vectors of ascending rows."""
        parts = []
        for low, high in _runs(self.piece[wanted]):
            piece = int(self.piece[wanted[low]])
            rows = scratch.get(f"cells/{piece:05d}", "rows")[self.place[wanted[low:high]]]
            parts.append(scratch.get(_rows(piece), "vectors")[rows])
        return np.concatenate(parts)


def join_cells(scratch: Scratch, name: str, task: CellTask, half: bool, options: JoinOptions, shared: Any) -> str:
    """The forest of a bundle of cells, or of a slice of one."""
    kinds, rule = shared
    reducer, equal = Reducer(options.max_edges), [np.empty(0, EDGE)]
    reader = Reader(scratch)
    for residents, visitors in _cells(reader, task, kinds):
        for found, same in _join_cell(reader, task, residents, visitors, half, options.threshold, rule):
            reducer.add(found)
            equal.append(same)
    scratch.put(name, {"forest": reducer.result(), "equal": np.concatenate(equal)})
    return name


def _cells(scratch: Reader, task: CellTask, kinds: tuple[bool, ...]) -> Iterator[tuple[_Rows, _Rows]]:
    """(residents, visitors) of each cell of a task that has something to compare."""
    columns: dict[str, list[np.ndarray]] = {
        k: [] for k in ("home_cell", "home_piece", "home_row", "cell", "piece", "row")
    }
    pieces = [p for kind in (False, True) for p, fresh in enumerate(kinds) if fresh == kind]
    for piece in pieces:
        group = f"cells/{piece:05d}"
        for offsets_name, prefix in (("resident_offsets", "home_"), ("visitor_offsets", "")):
            offsets = np.array(scratch.get(group, offsets_name)[task.first : task.end + 1])
            rows: np.ndarray = np.arange(offsets[0], offsets[-1])
            if prefix == "":
                rows = np.array(scratch.get(group, "visitors")[offsets[0] : offsets[-1]])
            columns[prefix + "cell"].append(np.repeat(np.arange(task.first, task.end), np.diff(offsets)))
            columns[prefix + "piece"].append(np.full(len(rows), piece, np.int32))
            columns[prefix + "row"].append(rows.astype(np.int64))
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    is_fresh = np.array(kinds)

    def grouped(prefix: str) -> Iterator[_Rows]:
        cell, piece, row = (joined[prefix + key] for key in ("cell", "piece", "row"))
        order = np.argsort(cell, kind="stable")
        bounds = np.searchsorted(cell[order], np.arange(task.first, task.end + 1))
        for low, high in itertools.pairwise(bounds):
            mine = order[low:high]
            yield _Rows(piece[mine], row[mine], int((~is_fresh[piece[mine]]).sum()))

    for residents, visitors in zip(grouped("home_"), grouped(""), strict=True):
        if len(residents) and (residents.old < len(residents) or visitors.old < len(visitors)):
            yield residents, visitors


def _join_cell(
    scratch: Reader,
    task: CellTask,
    residents: _Rows,
    visitors: _Rows,
    half: bool,
    threshold: float,
    rule: Rule,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(edges, those of them between equal vectors) of one cell, block by block.

    Query q is resident q, or visitor q - len(residents).
    """
    count = len(residents)
    stop = count + len(visitors) if task.stop is None else task.stop
    for low in range(0, count, task.tile_rows):
        high = min(count, low + task.tile_rows)
        tile, tile_nodes = residents.fetch(scratch, "sketches", low, high), residents.fetch(scratch, "nodes", low, high)
        for group, first, last in (
            (residents, min(task.begin, count), min(stop, count)),
            (visitors, max(task.begin, count) - count, max(stop, count) - count),
        ):
            for begin in range(first, last, QUERY_ROWS):
                end = min(last, begin + QUERY_ROWS)
                place = np.arange(begin, end)
                # Each pair once, and none of two old ends: a resident meets the fresh ones behind it, an old
                # visitor the fresh residents, a fresh visitor all.
                starts = (
                    np.maximum(place + 1, residents.old)
                    if group is residents
                    else np.where(place < visitors.old, residents.old, 0)
                )
                if int(starts.min()) >= high:
                    continue
                queries, nodes = group.fetch(scratch, "sketches", begin, end), group.fetch(scratch, "nodes", begin, end)
                near = sketch.scan(
                    queries, tile, np.maximum(starts - low, 0), rule.first_words, rule.first_cut, rule.cut
                )
                for rows, columns in near:
                    for at in range(0, len(rows), VERIFY_PAIRS):
                        one, other = rows[at : at + VERIFY_PAIRS], columns[at : at + VERIFY_PAIRS]
                        values, same = _compared(
                            scratch, group, begin + one, residents, low + other, half, (queries, one), (tile, other)
                        )
                        found = edges(nodes[one], tile_nodes[other], values)
                        above = values > np.float32(threshold)
                        yield found[above], found[above & same]


def _compared(
    scratch: Reader,
    left: _Rows,
    rows: np.ndarray,
    right: _Rows,
    columns: np.ndarray,
    half: bool,
    *bits: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """((m,) float32 similarities by definition of left[rows] and right[columns], (m,) bool whether they are equal).

    bits: the sketches of both sides and which of them: only vectors of one sketch can be equal.
    """
    one, mine = np.unique(rows, return_inverse=True)
    other, place = np.unique(columns, return_inverse=True)
    lefts, rights = left.vectors(scratch, one).astype(np.float32), right.vectors(scratch, other).astype(np.float32)
    (first, first_rows), (second, second_rows) = bits
    same = first[first_rows, 0] == second[second_rows, 0]
    same[same] = (lefts[mine[same]] == rights[place[same]]).all(axis=1)
    return products.defined(lefts, rights, mine, place, half=half), same
