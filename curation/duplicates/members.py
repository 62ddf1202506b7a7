"""The vectors that take part in a join: pieces of Parquet files and the dense node numbers of their rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curation import parquet
from curation.vectors import VectorSet, read_vectors

SMALLEST_BUNDLE = 8192
PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Piece:
    """Rows of one Parquet file, small enough for one task. `fresh` rows are compared, others only compared with."""

    path: str
    row_groups: tuple[int, ...] | None
    """None: the whole file."""
    positions: np.ndarray | None
    """(rows,) which rows of these row groups take part, ascending; None: all."""
    nodes: np.ndarray | int
    """(rows,) uint32 node of each, or the first of consecutive nodes."""
    rows: int
    fresh: bool = True
    generation: int = 0
    """What is added later has another one, and goes into bundles of its own."""
    name: str | None = None
    """Of a bundle, the same in later generations; None: nothing is kept of it."""

    def numbers(self) -> np.ndarray:
        """(rows,) uint32 nodes."""
        if isinstance(self.nodes, np.ndarray):
            return self.nodes
        return np.arange(self.nodes, self.nodes + self.rows, dtype=np.uint32)

    def read(self, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        """((rows,) uint32 nodes, (rows, d) vectors as stored)."""
        _, vectors = read_vectors(self.path, dimension, self.row_groups)
        whole = self.positions is None or len(self.positions) == len(vectors)
        return self.numbers(), vectors if whole else vectors[self.positions]


@dataclass(frozen=True)
class Bundle:
    """Small pieces of one generation that are worked on as one: a run's parts hold a thousand rows each."""

    pieces: tuple[Piece, ...]
    name: str | None = None

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def fresh(self) -> bool:
        return self.pieces[0].fresh

    def numbers(self) -> np.ndarray:
        """(rows,) uint32 nodes."""
        return np.concatenate([piece.numbers() for piece in self.pieces])

    def read(self, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        """((rows,) uint32 nodes, (rows, d) vectors as stored)."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(dimension)
        nodes, vectors = zip(*(piece.read(dimension) for piece in self.pieces), strict=True)
        return np.concatenate(nodes), np.concatenate(vectors)


def bundled(pieces: Sequence[Piece], max_rows: int) -> tuple[Bundle, ...]:
    """Pieces in bundles of one generation and about a 64th of its rows, at most `max_rows` where pieces allow.

    Tasks must be few (each keeps an offset per cell) and yet many enough to spread. What other generations hold does
    not matter, so that a generation's bundles are the same ones later.
    """
    generations: dict[int, list[Piece]] = {}
    for piece in pieces:
        generations.setdefault(piece.generation, []).append(piece)
    bundles: list[Bundle] = []
    for generation, mine in sorted(generations.items()):
        room = min(max_rows, max(SMALLEST_BUNDLE, sum(piece.rows for piece in mine) // 64))
        found: list[list[Piece]] = []
        filled = 0
        for piece in mine:
            if found and found[-1][0].fresh == piece.fresh and filled + piece.rows <= room:
                found[-1].append(piece)
                filled += piece.rows
            else:
                found.append([piece])
                filled = piece.rows
        bundles += [Bundle(tuple(group), f"{generation:04d}-{number:05d}") for number, group in enumerate(found)]
    return tuple(bundles)


@dataclass(frozen=True)
class Members:
    """All vectors of one join. `count` nodes exist; the members are some or all of them."""

    pieces: tuple[Piece | Bundle, ...]
    dimension: int
    half: bool
    """Stored as float16, else float32."""
    count: int

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def fresh_rows(self) -> int:
        return sum(piece.rows for piece in self.pieces if piece.fresh)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float16 if self.half else np.float32)


def file_pieces(
    path: str, nodes: np.ndarray, positions: np.ndarray | None, fresh: bool, max_rows: int, generation: int = 0
) -> list[Piece]:
    """A file's rows as pieces of about `max_rows` rows, cut between row groups.

    nodes: (k,) uint32, of the rows that take part. positions: (k,) rows of the file, ascending; None: all.
    """
    metadata = parquet.open_file(path).metadata
    if metadata.num_rows <= max_rows or metadata.num_row_groups == 1:
        return [_piece(path, None, nodes, positions, fresh, generation)] if len(nodes) else []
    pieces = []
    ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
    begin, groups = 0, list[int]()
    for group, end in enumerate(ends):
        groups.append(group)
        following = ends[group + 1] if group + 1 < len(ends) else None
        if following is not None and following - begin <= max_rows:
            continue
        low, high = (begin, end) if positions is None else np.searchsorted(positions, [begin, end])
        if high > low:
            mine = None if positions is None else positions[low:high] - begin
            pieces.append(_piece(path, tuple(groups), nodes[low:high], mine, fresh, generation))
        begin, groups = int(end), []
    return pieces


def whole_set(vectors: VectorSet, max_rows: int, first_node: int = 0, order: np.ndarray | None = None) -> list[Piece]:
    """Every row of a vector set as pieces. order: (rows,) uint32 rank of each dense row; None: rows are in id order."""
    pieces: list[Piece] = []
    for part in vectors.partitions:
        span = slice(part.first_row, part.first_row + part.rows)
        ranks = np.arange(span.start, span.stop, dtype=np.uint32) if order is None else order[span]
        pieces += file_pieces(part.path, (ranks + np.uint32(first_node)).astype(np.uint32), None, True, max_rows)
    return pieces


def rank(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(ids ascending, (n,) uint32 place of each row in that order, or None where rows are in order already)."""
    if len(ids) < 2 or bool((ids[1:] > ids[:-1]).all()):
        return ids, None
    order = np.argsort(ids, kind="stable")
    places = np.empty(len(ids), np.uint32)
    places[order] = np.arange(len(ids), dtype=np.uint32)
    return ids[order], places


def max_piece_rows(memory_bytes: int, dimension: int) -> int:
    """Rows of a piece: PIECE_BYTES of float16, so that how work is cut does not depend on a worker's memory; less only
    where reading a piece (stored, float32 and a copy) would take more than a quarter of it.
    """
    return max(1024, min(PIECE_BYTES // (2 * dimension), memory_bytes // 4 // (12 * dimension)))


def _piece(
    path: str,
    groups: tuple[int, ...] | None,
    nodes: np.ndarray,
    positions: np.ndarray | None,
    fresh: bool,
    generation: int,
) -> Piece:
    consecutive = bool((nodes[1:].astype(np.int64) - nodes[:-1] == 1).all())
    small: np.ndarray | int = int(nodes[0]) if consecutive else nodes.astype(np.uint32)
    places = None if positions is None else positions.astype(np.uint32, copy=False)
    return Piece(path, groups, places, small, len(nodes), fresh, generation)
