"""Components of a forest cut at a threshold, and which of their images stays."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numba
import numpy as np

from curation.duplicates.forest import cut


def components(forest: np.ndarray, count: int, threshold: float = -2.0) -> np.ndarray:
    """(count,) uint32: the smallest node of each node's component, over edges strictly above `threshold`.

    One union-find on one uint32 array: 4 bytes per image.
    """
    above = cut(forest, threshold)
    return np.asarray(_labels(np.ascontiguousarray(above["low"]), np.ascontiguousarray(above["high"]), count))


def best_members(labels: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Each component's member with the largest value (ties: the smallest node).

    labels: (n,) uint32 as from `components`. value: (n,) numbers, NaN counts as the smallest. Returns (n,) bool.
    """
    comparable = np.where(np.isnan(value), -np.inf, value) if value.dtype.kind == "f" else value
    return np.asarray(_best(labels, np.ascontiguousarray(comparable)))


def earliest_members(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: the smallest node of each component."""
    return np.asarray(labels == np.arange(len(labels), dtype=labels.dtype))


@dataclass(frozen=True)
class ThresholdCounts:
    """What the pool would be at another threshold."""

    threshold: float
    components: int
    components_of_several: int
    largest: int
    duplicates: int
    """Images that would be dropped: all but one of each component."""


def sweep(forest: np.ndarray, count: int, thresholds: Sequence[float]) -> list[dict[str, float]]:
    """ThresholdCounts at each threshold, as dictionaries: a re-read of the forest, no search."""
    rows = []
    for threshold in thresholds:
        sizes = np.bincount(components(forest, count, threshold), minlength=1)
        present = int((sizes > 0).sum())
        rows.append(
            asdict(
                ThresholdCounts(threshold, present, int((sizes > 1).sum()), int(sizes.max(initial=0)), count - present)
            )
        )
    return rows


@numba.njit(cache=True, nogil=True)
def _labels(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    parent = np.arange(count).astype(np.uint32)
    for edge in range(len(low)):
        one, other = np.int64(low[edge]), np.int64(high[edge])
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = np.int64(parent[one])
        while parent[other] != other:
            parent[other] = parent[parent[other]]
            other = np.int64(parent[other])
        if one < other:
            parent[other] = one
        elif other < one:
            parent[one] = other
    # A parent is never larger than its child, so one ascending pass flattens every tree.
    for node in range(count):
        parent[node] = parent[parent[node]]
    return parent


@numba.njit(cache=True, nogil=True)
def _best(labels: np.ndarray, value: np.ndarray) -> np.ndarray:
    chosen = np.arange(len(labels)).astype(np.uint32)
    for node in range(len(labels)):
        label = labels[node]
        if value[node] > value[chosen[label]]:
            chosen[label] = node
    kept = np.zeros(len(labels), np.bool_)
    for node in range(len(labels)):
        if labels[node] == node:
            kept[chosen[node]] = True
    return kept
