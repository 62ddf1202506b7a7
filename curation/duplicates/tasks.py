"""What every join is made of: its options, its tasks, and the forests they come back with.

Functions whose first argument is a `Scratch` run in workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.duplicates.forest import EDGE, ForestMerger, maximum_spanning_forest, prune
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Scratch
from curation.errors import UserError

Spread = Callable[..., Iterable[tuple[str, Any]]]
"""spread(function, [(name, arguments)], shared=...) -> (name, function(*arguments, shared)) in any order."""

EXACT_MULTIPLY_ADDS = 3e11
"""Below so many (34,000 vectors of 512 dimensions; 10 seconds of one core) every pair is compared."""
EDGES_HELD = 1 << 21


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


def serial(
    function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]], *, shared: Any = None
) -> Iterator[tuple[str, Any]]:
    """A `Spread` in this process, for notebooks and tests."""
    for name, arguments in calls:
        yield name, function(*arguments, shared)


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
