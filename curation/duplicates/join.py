"""The self join: every pair of vectors above a threshold, reduced to its maximum spanning forest.

Few vectors are compared exactly, tile by tile of the upper half. More go through cells (the recipe of IVF, both
sides at once): coarse centroids from a sample, each vector at home in its nearest cell and visiting more; vectors
are shuffled by home to scratch; each cell compares its residents with each other and with its visitors. There is no k:
a k cuts groups of more than k copies apart. Pairs found are true by definition, only recall can fall; it is measured,
and the visits are chosen for the recall asked for. Tasks return forests, never edges (`curation.duplicates.forest`).

Functions whose first argument is a `Scratch` run in workers.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import products
from curation.duplicates import recall as recalls
from curation.duplicates.components import components
from curation.duplicates.forest import EDGE, ForestMerger, edges, maximum_spanning_forest, prune
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.errors import UserError
from curation.order import hash_keys, take_hashed
from curation.search import require_faiss

Spread = Callable[..., Iterable[tuple[str, Any]]]
"""spread(function, [(name, arguments)], shared=...) -> (name, function(*arguments, shared)) in any order."""

EXACT_MULTIPLY_ADDS = 7e11
"""Below so many (50,000 vectors of 512 dimensions; 25 seconds of one core) every pair is compared."""
TILE_ROWS = 8192
TILE_BYTES = 1 << 26
TASK_PAIRS = 4e8
"""Pairs of one task of cells: some seconds of one core at 512 dimensions."""
EDGES_HELD = 1 << 21
CELLS_PER_ROOT = 4.0
TRAINING_PER_CELL = 24
TRAINING_ROUNDS = 4
SCORE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class JoinOptions:
    """What decides a join's result, and the memory one worker may use."""

    threshold: float
    recall: float = 0.99
    recall_threshold: float | None = None
    """Threshold above which `recall` is asked for; None: `threshold`."""
    seed: int = 0
    purpose: str = "self"
    max_edges: int | None = None
    memory_bytes: int = 4 << 30
    exact_multiply_adds: float = EXACT_MULTIPLY_ADDS

    @property
    def target(self) -> float:
        return self.threshold if self.recall_threshold is None else self.recall_threshold


@dataclass(frozen=True)
class JoinResult:
    """The forest over the pairs with a fresh end, and how they were searched."""

    forest: np.ndarray
    report: dict[str, Any]


def serial(
    function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]], *, shared: Any = None
) -> Iterator[tuple[str, Any]]:
    """A `Spread` in this process, for notebooks and tests."""
    for name, arguments in calls:
        yield name, function(*arguments, shared)


def self_join(
    members: Members,
    ids: np.ndarray,
    options: JoinOptions,
    scratch: Scratch,
    spread: Spread = serial,
    thresholds: Sequence[float] = (),
) -> JoinResult:
    """Join `members` with themselves; pairs without a fresh end are left out.

    ids: (members.count,) uint64, the id of each node, ascending. thresholds: where to report recall, beside the target.
    Equal vectors and options give an equal forest, however the work is cut and whoever is first.
    """
    fresh, rows = members.fresh_rows, members.rows
    pairs = fresh * rows - fresh * (fresh + 1) // 2
    if pairs * members.dimension <= options.exact_multiply_adds:
        return JoinResult(exact_join(members, options, scratch, spread), _exact_report(members, options))
    plan = _plan(members, ids, options, scratch, spread)
    if plan.visits_cost(rows) >= rows / 2:
        return JoinResult(exact_join(members, options, scratch, spread), _exact_report(members, options))
    forest = _by_cells(members, plan, options, scratch, spread)
    return JoinResult(forest, _cells_report(members, plan, forest, options, thresholds))


# ---- exact: tiles of the upper half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Rows of stored pieces, in order: (piece, first row, end row)."""

    spans: tuple[tuple[int, int, int], ...]
    fresh: bool

    def load(self, scratch: Scratch | Reader) -> tuple[np.ndarray, np.ndarray]:
        """((n,) uint32 nodes, (n, d) float32 vectors)."""
        nodes = [scratch.get(f"store/{p:05d}", "nodes")[a:b] for p, a, b in self.spans]
        vectors = [scratch.get(f"store/{p:05d}", "vectors")[a:b].astype(np.float32) for p, a, b in self.spans]
        return np.concatenate(nodes), np.concatenate(vectors)


def store(members: Members, scratch: Scratch, spread: Spread, folder: str = "store") -> None:
    """Copy the members' vectors to scratch, raw: one group of arrays per piece."""
    calls = [
        (f"{folder}/{number:05d}", (scratch, f"{folder}/{number:05d}", piece, members.dimension))
        for number, piece in enumerate(members.pieces)
        if not scratch.has(f"{folder}/{number:05d}")
    ]
    for _ in spread(store_piece, calls):
        pass


def store_piece(scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, _: Any) -> None:
    """Write one piece's nodes and vectors."""
    nodes, vectors = piece.read(dimension)
    scratch.put(name, {"nodes": nodes, "vectors": vectors})


def tiles(members: Members) -> list[Tile]:
    """Consecutive rows cut into tiles of one kind, fresh or not."""
    size = max(256, min(TILE_ROWS, TILE_BYTES // (4 * members.dimension)))
    result: list[Tile] = []
    for kind in (False, True):
        spans: list[tuple[int, int, int]] = []
        filled = 0
        for number, piece in enumerate(members.pieces):
            if piece.fresh != kind:
                continue
            begin = 0
            while begin < piece.rows:
                end = min(piece.rows, begin + size - filled)
                spans.append((number, begin, end))
                filled += end - begin
                begin = end
                if filled == size:
                    result.append(Tile(tuple(spans), kind))
                    spans, filled = [], 0
        if spans:
            result.append(Tile(tuple(spans), kind))
    return result


def exact_join(members: Members, options: JoinOptions, scratch: Scratch, spread: Spread) -> np.ndarray:
    """The forest of all pairs with a fresh end, tile by tile of the upper half."""
    store(members, scratch, spread)
    cut = tiles(members)
    calls = []
    for a, one in enumerate(cut):
        for b, other in enumerate(cut[a:], a):
            if one.fresh or other.fresh:
                name = f"forest/{a:05d}-{b:05d}"
                calls.append((name, (scratch, name, one, other, members.half, options)))
    return collect(scratch, calls, join_tiles, spread, members.count, options)


def join_tiles(scratch: Scratch, name: str, one: Tile, other: Tile, half: bool, options: JoinOptions, _: Any) -> str:
    """The forest of one pair of tiles."""
    nodes, vectors = one.load(scratch)
    if one == other:
        starts = np.arange(1, len(nodes) + 1)
        others, right = nodes, vectors
    else:
        starts = np.zeros(len(nodes), np.int64)
        others, right = other.load(scratch)
    reducer = Reducer(options.max_edges)
    for rows, columns, values in products.pairs_above(
        vectors, right, options.threshold, starts, half=half, on=products.device()
    ):
        reducer.add(edges(nodes[rows], others[columns], values))
    scratch.put(name, {"forest": reducer.result()})
    return name


class Reducer:
    """Edges of one task, reduced to a forest whenever they grow; pruned instead where `max_edges` is set."""

    def __init__(self, max_edges: int | None) -> None:
        self.max_edges = max_edges
        self._held: list[np.ndarray] = []
        self._count = 0
        self._limit = EDGES_HELD

    def add(self, rows: np.ndarray) -> None:
        self._held.append(rows)
        self._count += len(rows)
        if self._count > self._limit:
            reduced = self.result()
            self._held, self._count = [reduced], len(reduced)
            self._limit = max(EDGES_HELD, 2 * len(reduced))

    def result(self) -> np.ndarray:
        rows = np.concatenate(self._held) if self._held else np.empty(0, EDGE)
        return maximum_spanning_forest(rows) if self.max_edges is None else prune(rows, self.max_edges)


def collect(
    scratch: Scratch,
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    function: Callable[..., str],
    spread: Spread,
    count: int,
    options: JoinOptions,
    shared: Any = None,
) -> np.ndarray:
    """Run the tasks that an interrupted join has not done, and merge all their forests."""
    merger = ForestMerger(count)
    bounded: list[np.ndarray] = []

    def take(name: str) -> None:
        rows = np.array(scratch.get(name, "forest"))
        if options.max_edges is None:
            merger.add(rows)
            return
        bounded.append(rows)
        if sum(len(r) for r in bounded) * EDGE.itemsize > options.memory_bytes // 8:
            bounded[:] = [prune(np.concatenate(bounded), options.max_edges)]
            if len(bounded[0]) * EDGE.itemsize > options.memory_bytes // 12:
                raise UserError(
                    f"max_edges: {options.max_edges} edges per image do not fit into memory_per_worker; leave "
                    "max_edges out (a forest needs no such bound) or raise memory_per_worker",
                    exit_code=1,
                )

    missing = []
    for name, arguments in calls:
        if scratch.has(name):
            take(name)
        else:
            missing.append((name, arguments))
    for _, name in spread(function, missing, shared=shared):
        take(name)
    if options.max_edges is not None and bounded:
        merger.add(prune(np.concatenate(bounded), options.max_edges))
    return merger.result()


def _exact_report(members: Members, options: JoinOptions) -> dict[str, Any]:
    return {
        "method": "exact",
        "vectors": members.rows,
        "fresh": members.fresh_rows,
        "threshold": options.threshold,
        "recall": 1.0,
        "recall_low": 1.0,
        "recall_high": 1.0,
        "recall_asked": options.recall,
        "recall_threshold": options.target,
    }


# ---- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Coarse centroids, the visits of each vector, and the sample that recall is measured on."""

    centroids: np.ndarray
    visits: int
    measure_pairs: np.ndarray
    measure_queries: int
    choice_pairs: int
    imbalance: float
    """Mean number of a vector's cell mates over that of equal cells."""

    def visits_cost(self, rows: int) -> float:
        """Vectors compared with per vector, assignment included."""
        return len(self.centroids) + self.visits * self.imbalance * rows / len(self.centroids)


def _plan(members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread) -> Plan:
    """Train cells and choose visits; read back from scratch where an interrupted join has done so."""
    if not scratch.has("plan"):
        arrays = _make_plan(members, ids, options, spread)
        scratch.put("plan", arrays)
    queries, choice_pairs, visits, imbalance = np.array(scratch.get("plan", "numbers")).tolist()
    return Plan(
        np.array(scratch.get("plan", "centroids")),
        int(visits),
        np.array(scratch.get("plan", "measure")),
        int(queries),
        int(choice_pairs),
        float(imbalance),
    )


def _make_plan(members: Members, ids: np.ndarray, options: JoinOptions, spread: Spread) -> Mapping[str, np.ndarray]:
    present = np.sort(np.concatenate([piece.numbers() for piece in members.pieces]))
    keys = ids[present]
    room = options.memory_bytes // 4 // (4 * members.dimension)
    cells = int(min(max(16, round(CELLS_PER_ROOT * math.sqrt(members.rows))), members.rows, room // TRAINING_PER_CELL))
    training = take_hashed(keys, cells * TRAINING_PER_CELL, options.seed, f"{options.purpose} cells")
    fresh = np.sort(np.concatenate([piece.numbers() for piece in members.pieces if piece.fresh]))
    count = recalls.CHOICE_QUERIES + recalls.MEASURE_QUERIES
    queries = fresh[take_hashed(ids[fresh], count, options.seed, f"{options.purpose} recall")]
    # Every second one, so that a small set still leaves queries to measure with.
    choice, measure = queries[::2], queries[1::2]
    wanted = np.unique(np.concatenate([present[training], choice, measure]))
    _, vectors = gather(members, wanted, spread)
    sample = vectors[np.searchsorted(wanted, np.sort(present[training]))]
    ((_, centroids),) = spread(train_cells, [("cells", (cells, options.seed))], shared=sample)
    asked = np.sort(np.concatenate([choice, measure]))
    shared = (asked, vectors[np.searchsorted(wanted, asked)].astype(np.float32), centroids, options, members.half)
    calls = [(f"recall {k}", (piece, members.dimension)) for k, piece in enumerate(members.pieces)]
    results = sorted(spread(search_queries, calls, shared=shared), key=lambda item: int(item[0].split()[1]))
    pairs = np.sort(np.concatenate([found for _, (found, _) in results]), order=["query", "node"])
    residents = np.sum([homes for _, (_, homes) in results], axis=0, dtype=np.float64)
    chosen = np.isin(pairs["query"], choice)
    visits = recalls.choose_visits(pairs[chosen], options.target, options.recall, cells)
    imbalance = float((residents**2).sum() * cells / residents.sum() ** 2) if residents.sum() else 1.0
    return {
        "centroids": centroids,
        "measure": pairs[~chosen],
        "numbers": np.array([len(measure), int(chosen.sum()), visits, imbalance], np.float64),
    }


def gather(members: Members, nodes: np.ndarray, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """((n,) nodes, (n, d) vectors as stored) of some members. nodes: (n,) uint32, ascending."""
    calls = [(f"rows {k}", (piece, members.dimension)) for k, piece in enumerate(members.pieces)]
    vectors = np.zeros((len(nodes), members.dimension), members.dtype)
    for _, (found, rows) in spread(gather_piece, calls, shared=nodes):
        vectors[np.searchsorted(nodes, found)] = rows
    return nodes, vectors


def gather_piece(piece: Piece | Bundle, dimension: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a piece whose nodes are wanted."""
    wanted = np.isin(piece.numbers(), nodes)
    if not wanted.any():
        return np.empty(0, np.uint32), np.empty((0, dimension), np.float32)
    numbers, vectors = piece.read(dimension)
    return numbers[wanted], vectors[wanted]


def train_cells(cells: int, seed: int, sample: np.ndarray) -> np.ndarray:
    """(cells, d) float32 unit centroids. sample: (n, d). One thread, so that sums are always in the same order."""
    faiss = require_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            sample.shape[1],
            cells,
            niter=TRAINING_ROUNDS,
            seed=seed % (1 << 31),
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=TRAINING_PER_CELL + 1,
        )
        kmeans.train(np.ascontiguousarray(sample, dtype=np.float32))
        return np.array(kmeans.centroids, dtype=np.float32)
    finally:
        faiss.omp_set_num_threads(threads)


def search_queries(piece: Piece | Bundle, dimension: int, shared: Any) -> tuple[np.ndarray, np.ndarray]:
    """Exact search of the sampled queries in one piece.

    Returns (pairs (p,) SAMPLE_PAIR, (cells,) int64 of a sample of the piece's homes, for the cost of a visit).
    """
    queries, vectors, centroids, options, half = shared
    nodes, stored = piece.read(dimension)
    wide = stored.astype(np.float32)
    starts = np.zeros(len(queries), np.int64)
    parts = [np.empty(0, recalls.SAMPLE_PAIR)]
    for rows, columns, values in products.pairs_above(
        vectors, wide, min(options.threshold, options.target), starts, half=half, on=products.device()
    ):
        asked, other, cosine, weight = _thin(rows, columns, values, queries, nodes)
        part = np.empty(len(asked), recalls.SAMPLE_PAIR)
        part["query"], part["node"] = queries[asked], nodes[other]
        part["similarity"], part["weight"] = cosine, weight
        step = max(1, SCORE_ELEMENTS // len(centroids))
        for begin in range(0, len(part), step):
            chunk = slice(begin, begin + step)
            part["visits"][chunk] = recalls.visits_needed(vectors[asked[chunk]], wide[other[chunk]], centroids)
        parts.append(part)
    every = max(1, len(wide) // 512)
    homes = np.bincount((wide[::every] @ centroids.T).argmax(axis=1), minlength=len(centroids)) * every
    return np.concatenate(parts), homes


def _thin(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, queries: np.ndarray, nodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Leave out the query itself, and all but PAIRS_PER_QUERY pairs of a query; with the weight of those that stay."""
    other = queries[rows] != nodes[columns]
    rows, columns, values = rows[other], columns[other], values[other]
    keys = hash_keys(nodes[columns].astype(np.uint64), 0, "recall pairs")
    order = np.lexsort((keys, rows))
    counts = np.bincount(rows, minlength=len(queries))
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(len(order)) - first[rows[order]]
    kept = order[place < recalls.PAIRS_PER_QUERY]
    weight = counts[rows[kept]] / np.minimum(counts[rows[kept]], recalls.PAIRS_PER_QUERY)
    return rows[kept], columns[kept], values[kept], weight.astype(np.float32)


def _by_cells(members: Members, plan: Plan, options: JoinOptions, scratch: Scratch, spread: Spread) -> np.ndarray:
    calls = [
        (f"cells/{number:05d}", (scratch, f"cells/{number:05d}", piece, members.dimension, plan.visits))
        for number, piece in enumerate(members.pieces)
        if not scratch.has(f"cells/{number:05d}")
    ]
    for _ in spread(assign_piece, calls, shared=plan.centroids):
        pass
    cells = len(plan.centroids)
    sizes = np.zeros((4, cells), np.int64)
    for number, piece in enumerate(members.pieces):
        group = f"cells/{number:05d}"
        sizes[int(piece.fresh)] += np.diff(scratch.get(group, "resident_offsets"))
        sizes[2 + int(piece.fresh)] += np.diff(scratch.get(group, "visitor_offsets"))
    tasks = cell_tasks(sizes, members.dimension, options.memory_bytes)
    kinds = tuple(piece.fresh for piece in members.pieces)
    names = [f"forest/{task.first:07d}-{task.begin:012d}" for task in tasks]
    todo = [(name, (scratch, name, task, members.half, options)) for name, task in zip(names, tasks, strict=True)]
    return collect(scratch, todo, join_cells, spread, members.count, options, shared=kinds)


def assign_piece(
    scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, visits: int, centroids: np.ndarray
) -> None:
    """Shuffle one piece by home cell, and list its visitors by visited cell."""
    nodes, stored = piece.read(dimension)
    cells = len(centroids)
    home = np.empty(len(nodes), np.int32)
    more = np.empty((len(nodes), visits - 1), np.int32)
    step = max(1, SCORE_ELEMENTS // cells)
    for begin in range(0, len(nodes), step):
        scores = stored[begin : begin + step].astype(np.float32) @ centroids.T
        best = scores.argmax(axis=1)
        home[begin : begin + step] = best
        if visits > 1:
            scores[np.arange(len(scores)), best] = -np.inf
            more[begin : begin + step] = np.argpartition(-scores, visits - 2, axis=1)[:, : visits - 1]
    order = np.argsort(home, kind="stable")
    visited = more[order].ravel()
    by_cell = np.argsort(visited, kind="stable")
    visitor_rows = (by_cell // max(1, visits - 1)).astype(np.uint32)
    scratch.put(
        name,
        {
            "nodes": nodes[order],
            "vectors": stored[order],
            "resident_offsets": _offsets(home, cells),
            "visitors": visitor_rows,
            "visitor_offsets": _offsets(visited, cells),
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


def cell_tasks(sizes: np.ndarray, dimension: int, memory_bytes: int) -> list[CellTask]:
    """Bundle small cells and slice big ones.

    sizes: (4, cells) residents old and fresh, visitors old and fresh. A task's float32 vectors stay below a quarter
    of the worker's memory.
    """
    old, fresh, old_visitors, fresh_visitors = sizes
    pairs = fresh * (fresh - 1) / 2 + old * fresh + fresh_visitors * (old + fresh) + old_visitors * fresh
    rows = old + fresh
    room = max(1024, memory_bytes // 4 // (6 * dimension))
    tasks: list[CellTask] = []
    first, cost = 0, 0.0
    for cell in range(sizes.shape[1]):
        big = pairs[cell] > TASK_PAIRS or rows[cell] > room // 2
        if first < cell and (big or cost + pairs[cell] > TASK_PAIRS):
            if cost > 0:
                tasks.append(CellTask(first, cell, tile_rows=room // 2))
            first, cost = cell, 0.0
        if big and pairs[cell] > 0:
            queries = int(rows[cell] + old_visitors[cell] + fresh_visitors[cell])
            slices = max(1, math.ceil(pairs[cell] / TASK_PAIRS))
            step = math.ceil(queries / slices)
            tasks += [
                CellTask(cell, cell + 1, begin, min(queries, begin + step), room // 2)
                for begin in range(0, queries, step)
            ]
            first = cell + 1
        else:
            cost += pairs[cell]
    if first < sizes.shape[1] and cost > 0:
        tasks.append(CellTask(first, sizes.shape[1], tile_rows=room // 2))
    return tasks


@dataclass(frozen=True)
class _Rows:
    """Rows of stored pieces that belong to one cell: (piece, row) sorted so that old rows come first."""

    piece: np.ndarray
    row: np.ndarray
    old: int

    def __len__(self) -> int:
        return len(self.piece)

    def load(self, scratch: Reader, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """((n,) uint32 nodes, (n, d) float32 vectors) of rows begin .. end - 1."""
        pieces, rows = self.piece[begin:end], self.row[begin:end]
        nodes, vectors = [], []
        # Equal pieces are neighbours: one read per run.
        edges_at = np.flatnonzero(np.concatenate([[True], pieces[1:] != pieces[:-1], [True]]))
        for low, high in itertools.pairwise(edges_at):
            group = f"cells/{int(pieces[low]):05d}"
            nodes.append(scratch.get(group, "nodes")[rows[low:high]])
            vectors.append(scratch.get(group, "vectors")[rows[low:high]].astype(np.float32))
        return np.concatenate(nodes), np.concatenate(vectors)


def join_cells(
    scratch: Scratch, name: str, task: CellTask, half: bool, options: JoinOptions, kinds: tuple[bool, ...]
) -> str:
    """The forest of a bundle of cells, or of a slice of one."""
    reducer = Reducer(options.max_edges)
    reader = Reader(scratch)
    for residents, visitors in _cells(reader, task, kinds):
        for found in _join_cell(reader, task, residents, visitors, half, options):
            reducer.add(found)
    scratch.put(name, {"forest": reducer.result()})
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
    scratch: Reader, task: CellTask, residents: _Rows, visitors: _Rows, half: bool, options: JoinOptions
) -> Iterator[np.ndarray]:
    """Edges of one cell, block by block. Query q is resident q, or visitor q - len(residents)."""
    count = len(residents)
    stop = count + len(visitors) if task.stop is None else task.stop
    on = products.device()
    for low in range(0, count, task.tile_rows):
        high = min(count, low + task.tile_rows)
        nodes, tile = residents.load(scratch, low, high)
        for group, first, last in (
            (residents, min(task.begin, count), min(stop, count)),
            (visitors, max(task.begin, count) - count, max(stop, count) - count),
        ):
            for begin in range(first, last, TILE_ROWS):
                end = min(last, begin + TILE_ROWS)
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
                queries, vectors = group.load(scratch, begin, end)
                for rows, columns, values in products.pairs_above(
                    vectors, tile, options.threshold, np.maximum(starts - low, 0), half=half, on=on
                ):
                    yield edges(queries[rows], nodes[columns], values)


def _cells_report(
    members: Members, plan: Plan, forest: np.ndarray, options: JoinOptions, thresholds: Sequence[float]
) -> dict[str, Any]:
    pairs, queries = plan.measure_pairs, plan.measure_queries
    found = pairs["visits"] <= plan.visits
    target = recalls.measured(pairs, found, options.target, queries)
    labels = components(forest, members.count, options.target)
    together = labels[pairs["query"]] == labels[pairs["node"]]
    return {
        "method": "cells",
        "vectors": members.rows,
        "fresh": members.fresh_rows,
        "threshold": options.threshold,
        "cells": len(plan.centroids),
        "visits": plan.visits,
        "share_compared": round(plan.visits * plan.imbalance / len(plan.centroids), 6),
        "recall": target["recall"],
        "recall_low": target["low"],
        "recall_high": target["high"],
        "recall_asked": options.recall,
        "recall_threshold": options.target,
        "pairs_measured": target["pairs"],
        "queries": queries,
        "same_component": recalls.measured(pairs, together, options.target, queries)["recall"],
        "by_threshold": [recalls.measured(pairs, found, t, queries) for t in thresholds if t >= options.threshold],
    }
