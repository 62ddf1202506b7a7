"""Rows of a join in scratch: vectors raw, sketches where recall is measured; equal vectors of a piece are one node.

Functions whose first argument is a `Scratch` run in workers.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from curation import halves, sketch, vectors
from curation.duplicates.forest import edges
from curation.duplicates.kept import digest
from curation.duplicates.members import Bundle, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.order import hash_keys


def rows_name(piece: int) -> str:
    return f"rows/{piece:05d}"


def store_piece(
    scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, share: float, seed: int, _: Any
) -> None:
    """Write one piece raw; of equal vectors only the smallest node, and an edge to it.

    share: of its rows, those that `truth` compares with, drawn by node; they are sketched.
    """
    nodes, stored = piece.read(dimension)
    contents = content(stored)
    stands_for, equal = distinct(nodes, stored, contents)
    kept = stands_for == np.arange(len(nodes))
    row_of = np.cumsum(kept)[stands_for] - 1
    arrays = {
        "nodes": nodes[kept],
        "vectors": stored if kept.all() else stored[kept],
        "contents": digest(contents[kept].tobytes()),
        "equal": equal,
        "all_nodes": nodes,
        "row_of": row_of.astype(np.uint32),
        "copies": np.bincount(row_of, minlength=int(kept.sum())).astype(np.uint32),
    }
    sampled = arrays["vectors"]
    if share < 1:
        limit = np.uint64(share * float(2**64 - 2**12))
        arrays["sampled"] = np.flatnonzero(hash_keys(nodes[kept].astype(np.uint64), seed, "measured") <= limit)
        sampled = sampled[arrays["sampled"]]
    scratch.put(name, arrays | {"sketches": sketch.sketches(sampled)})


def content(stored: np.ndarray) -> np.ndarray:
    """(n,) uint64, equal for equal rows of (n, d) and hardly ever for others."""
    words = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")
    factors = hash_keys(np.arange(words.shape[1], dtype=np.uint64), 0, "equal vectors") | np.uint64(1)
    return np.asarray(_mixed(words, factors))


def distinct(nodes: np.ndarray, stored: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n,) the row that stands for each, of equal ones the smallest node; (m,) EDGE from it to each of the others).

    nodes: (n,) uint32. stored: (n, d). key: (n,) their `content`.
    """
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
        """(n, d) float32."""
        return fetch(scratch, self.piece, self.row)


def draw(scratch: Scratch, ids: np.ndarray, pieces: Sequence[int], count: int, seed: int, purpose: str) -> Sampled:
    """The `count` nodes of these pieces that come first in the hash order of their ids; less where there are less."""
    held = [np.asarray(scratch.get(rows_name(piece), "all_nodes")) for piece in pieces]
    total = sum(len(nodes) for nodes in held)
    # Keys below `limit` are about a fifth more than are asked for: nothing of the size of the pool is sorted.
    share = (1.2 * count + 1000) / max(1, total)
    limit = np.uint64(min(1.0, share) * float(2**64 - 2**12))
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for piece, nodes in zip(pieces, held, strict=True):
        keys = hash_keys(ids[nodes], seed, purpose)
        mine = np.flatnonzero(keys <= limit) if share < 1 else np.arange(len(nodes))
        rows = scratch.get(rows_name(piece), "row_of")[mine].astype(np.int64)
        for column, values in zip(columns, (np.full(len(mine), piece), rows, nodes[mine], keys[mine]), strict=True):
            column.append(values)
    piece_of, row, node, key = (np.concatenate(column) if column else np.empty(0, np.int64) for column in columns)
    order = np.argsort(key, kind="stable")[:count]
    return Sampled(piece_of[order], row[order], node[order].astype(np.uint32))


def fetch(scratch: Scratch | Reader, piece: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(n, d) float32 vectors of stored rows in the order asked for, read in the order they lie in."""
    order = np.lexsort((row, piece))
    result: np.ndarray | None = None
    for low, high in runs(piece[order]):
        stored = scratch.get(rows_name(int(piece[order[low]])), "vectors")
        wide = halves.widen(stored, row[order[low:high]].astype(np.int64))
        if result is None:
            result = np.empty((len(order), wide.shape[1]), np.float32)
        result[order[low:high]] = wide
    assert result is not None
    return result


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of equal values."""
    if len(values):
        yield from itertools.pairwise(np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])))


@numba.njit(cache=True, nogil=True)
def _mixed(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """`content` of words (n, d)."""
    found = np.zeros(len(words), np.uint64)
    for i in range(len(words)):
        total = np.uint64(0)
        for k in range(words.shape[1]):
            total += np.uint64(words[i, k]) * factors[k]
        found[i] = total ^ (total >> np.uint64(32))
    return found
