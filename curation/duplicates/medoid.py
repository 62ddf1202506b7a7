"""The medoid of each component: the member nearest to the mean of its members."""

from collections.abc import Sequence

import numpy as np

from curation.duplicates.join import Spread, serial
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Scratch


def medoids(
    members: Members, labels: np.ndarray, scratch: Scratch, spread: Spread = serial, memory_bytes: int = 4 << 30
) -> np.ndarray:
    """(count,) bool: the medoid of each component (ties: the smallest node); images alone are their own.

    labels: (count,) uint32. Members of components are shuffled by component to scratch; a task takes a range of
    components and sums in the order of the pieces, in float64.
    """
    sizes = np.bincount(labels, minlength=members.count)
    several = np.flatnonzero(sizes > 1).astype(np.uint32)
    kept = sizes > 0
    kept[several] = False
    calls = [
        (f"medoid/{k:05d}", (scratch, f"medoid/{k:05d}", piece, members.dimension, _mine(piece, labels, sizes)))
        for k, piece in enumerate(members.pieces)
    ]
    groups = [name for name, _ in calls]
    for _ in spread(_store, [call for call in calls if not scratch.has(call[0])]):
        pass
    step = max(1, memory_bytes // 8 // (8 * members.dimension))
    ranges = [(f"components {k}", (scratch, groups, several[k : k + step])) for k in range(0, len(several), step)]
    for _, chosen in spread(_medoids, ranges):
        kept[chosen] = True
    return np.asarray(kept)


def _mine(piece: Piece | Bundle, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(rows,) int64 label of each row that has company, -1 for the others."""
    mine = labels[piece.numbers()].astype(np.int64)
    return np.where(sizes[mine] > 1, mine, -1)


def _store(scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, labels: np.ndarray, _: object) -> None:
    order = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
    nodes, vectors = piece.read(dimension)
    scratch.put(name, {"labels": labels[order], "nodes": nodes[order], "vectors": vectors[order]})


def _medoids(scratch: Scratch, groups: Sequence[str], wanted: np.ndarray, _: object) -> np.ndarray:
    """(k,) uint32 medoids of the components `wanted` (ascending labels)."""
    low, high = int(wanted[0]), int(wanted[-1]) + 1
    slices = []
    for group in groups:
        labels = scratch.get(group, "labels")
        span = slice(*np.searchsorted(labels, [low, high]))
        place = np.searchsorted(wanted, labels[span])
        slices.append((place, np.array(scratch.get(group, "nodes")[span]), scratch.get(group, "vectors")[span]))
    sums = np.zeros((len(wanted), slices[0][2].shape[1]), np.float64)
    for place, _nodes, vectors in slices:
        np.add.at(sums, place, vectors.astype(np.float64))
    best = np.full(len(wanted), -np.inf)
    chosen = np.zeros(len(wanted), np.uint32)
    for place, nodes, vectors in slices:
        value = np.einsum("nd,nd->n", vectors.astype(np.float64), sums[place])
        order = np.lexsort((nodes, -value, place))
        first = order[np.concatenate([[True], place[order][1:] != place[order][:-1]])] if len(order) else order
        at, node, score = place[first], nodes[first], value[first]
        better = (score > best[at]) | ((score == best[at]) & (node < chosen[at]))
        best[at[better]], chosen[at[better]] = score[better], node[better]
    return chosen
