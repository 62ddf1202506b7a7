"""The exact join: every pair of vectors, tile by tile of the upper half."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import products
from curation.device import heavy
from curation.duplicates.forest import edges
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import JoinOptions, Reducer, Spread, collect

TILE_ROWS = 8192
TILE_BYTES = 1 << 26


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


@heavy
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
