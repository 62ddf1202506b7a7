"""The true pairs of sampled rows, found without cells: what recall is measured against."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import halves, products, sketch
from curation.duplicates import recall as recalls
from curation.duplicates.cells import Cells
from curation.duplicates.members import Members
from curation.duplicates.scratch import Scratch
from curation.duplicates.stored import Sampled, rows_name
from curation.duplicates.tasks import JoinOptions, Spread
from curation.order import hash_keys

FIRST_WORDS = 4
TILE_ROWS = 4096
"""Rows whose sketches stay in a core's cache while all queries pass over them."""
TRIED = 64
"""Queries and rows that tell how dense a piece is."""
DENSE = 0.5
"""Share of pairs whose first words are near, above which float32 products cost less than sketches."""
VERIFY_PAIRS = 1 << 15


@dataclass(frozen=True)
class Truth:
    """Finds the true pairs of sampled rows, piece by piece."""

    members: Members
    options: JoinOptions
    scratch: Scratch
    spread: Spread
    share: float = 1.0
    """Of the old rows, those that are compared with."""

    def pairs(self, asked: Sampled, cells: Cells) -> np.ndarray:
        """(p,) SAMPLE_PAIR, ordered by query and node."""
        if not len(asked.node):
            return np.empty(0, recalls.SAMPLE_PAIR)
        vectors = asked.vectors(self.scratch)
        shared = (asked, vectors, sketch.sketches(vectors), cells, self.members.half, self.options)
        calls = [
            (rows_name(number), (self.scratch, number, 1.0 if piece.fresh else self.share))
            for number, piece in enumerate(self.members.pieces)
        ]
        results = sorted(self.spread(search_queries, calls, shared=shared), key=lambda item: item[0])
        return np.sort(np.concatenate([found for _, found in results]), order=["query", "node"])


def search_queries(scratch: Scratch, piece: int, share: float, shared: Any) -> np.ndarray:
    """The true pairs of the queries with one piece's rows, or with `share` of them, as (p,) SAMPLE_PAIR.

    A row counts for all its equals, and for those that were not drawn.
    """
    sampled, asked, mine, cells, half, options = shared
    queries = sampled.node
    nodes, bits, stored, copies = (scratch.get(rows_name(piece), k) for k in ("nodes", "sketches", "vectors", "copies"))
    if share < 1:
        drawn = scratch.get(rows_name(piece), "sampled")
        nodes, stored, copies = nodes[drawn], stored[drawn], copies[drawn]
    if not len(nodes):
        return np.empty(0, recalls.SAMPLE_PAIR)
    own = np.where(sampled.piece == piece, sampled.row, -1)
    parts = [np.empty(0, recalls.SAMPLE_PAIR)]
    lefts, rights = [], []
    for near, near_rows in _candidates(asked, mine, stored, np.asarray(bits), options.threshold):
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
            pairs["similarity"], pairs["weight"] = values[true], weight[part][true] / share
            parts.append(pairs)
            lefts.append(one[true])
            rights.append(other_row[true])
    found = np.concatenate(parts)
    if len(found):
        left, right = np.concatenate(lefts), np.concatenate(rights)
        for begin in range(0, len(found), VERIFY_PAIRS):
            part = slice(begin, begin + VERIFY_PAIRS)
            found[part] = recalls.described(found[part], asked, stored, left[part], right[part], cells)
    return found


def _candidates(
    asked: np.ndarray, mine: np.ndarray, stored: np.ndarray, bits: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (query, row) that may be above the threshold: by sketches, or by products where sketches tell little."""
    first, middle, whole = (
        sketch.distance_at(threshold, w, recalls.TRUTH_DEVIATIONS) for w in (FIRST_WORDS, sketch.HALF, sketch.WORDS)
    )
    tried = mine[:: max(1, len(mine) // TRIED)]
    apart = np.bitwise_count(tried[:, None, :FIRST_WORDS] ^ bits[None, :TRIED, :FIRST_WORDS]).sum(axis=2)
    if (apart <= first).mean() > DENSE:
        wide = halves.widen(stored)
        return products.nominate(asked, wide, threshold, np.zeros(len(asked), np.int64))
    return _scanned(mine, bits, (first, middle, whole))


def _scanned(mine: np.ndarray, bits: np.ndarray, cuts: tuple[int, int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    starts = np.zeros(len(mine), np.int64)
    for begin in range(0, len(bits), TILE_ROWS):
        for near, rows in sketch.scan(mine, bits[begin : begin + TILE_ROWS], starts, FIRST_WORDS, cuts):
            yield near, rows + begin


def _verified(left: np.ndarray, rows: np.ndarray, read: Any, columns: np.ndarray, half: bool) -> np.ndarray:
    """(m,) float32 similarities by definition; read(unique columns) gives the stored vectors of the right side."""
    wanted, place = np.unique(columns, return_inverse=True)
    used, mine = np.unique(rows, return_inverse=True)
    return products.defined(left[used].astype(np.float32), read(wanted).astype(np.float32), mine, place, half=half)
