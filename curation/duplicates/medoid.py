"""The medoid of each component: the member nearest to the mean of its members."""

import numpy as np

from curation.duplicates import grouped
from curation.duplicates.components import component_sizes
from curation.duplicates.grouped import Grouped
from curation.duplicates.members import Members
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import Spread, serial

BLOCK_ROWS = 4096


def medoids(
    members: Members, labels: np.ndarray, scratch: Scratch, spread: Spread = serial, memory_bytes: int = 4 << 30
) -> np.ndarray:
    """(count,) bool: the medoid of each component (ties: the smallest node); images alone are their own.

    labels: (count,) uint32. Sums are made in float64 in the order of the pieces.
    """
    sizes = component_sizes(labels)
    wanted = sizes[labels] > 1
    kept = (sizes > 0) & ~wanted
    stored = grouped.shuffle(members, labels, wanted, Scratch(f"{scratch.directory}/medoid"), spread)
    rows = max(1, memory_bytes // 8 // (8 * members.dimension))
    calls = [(f"components {low}", (stored, low, high)) for low, high in grouped.ranges(labels, wanted, rows)]
    for _, chosen in spread(_medoids, calls):
        kept[chosen] = True
    return np.asarray(kept)


def _medoids(stored: Grouped, low: int, high: int, _: object) -> np.ndarray:
    """(k,) uint32 medoids of the components with labels low .. high - 1."""
    reader = Reader(stored.scratch)
    present = np.unique(np.concatenate([np.unique(labels) for labels, _, _ in stored.slices(reader, low, high)]))
    sums = np.zeros((len(present), stored.dimension), np.float64)
    for labels, _nodes, vectors in stored.slices(reader, low, high):
        for begin in range(0, len(labels), BLOCK_ROWS):
            block = slice(begin, begin + BLOCK_ROWS)
            np.add.at(sums, np.searchsorted(present, labels[block]), vectors[block].astype(np.float64))
    best = np.full(len(present), -np.inf)
    chosen = np.zeros(len(present), np.uint32)
    for labels, nodes, vectors in stored.slices(reader, low, high):
        for begin in range(0, len(labels), BLOCK_ROWS):
            block = slice(begin, begin + BLOCK_ROWS)
            place = np.searchsorted(present, labels[block])
            value = np.einsum("nd,nd->n", vectors[block].astype(np.float64), sums[place])
            order = np.lexsort((nodes[block], -value, place))
            first = order[np.concatenate([[True], place[order][1:] != place[order][:-1]])]
            at, node, score = place[first], nodes[block][first], value[first]
            better = (score > best[at]) | ((score == best[at]) & (node < chosen[at]))
            best[at[better]], chosen[at[better]] = score[better], node[better]
    return chosen
