"""Balanced sampling from a hierarchy of clusters (Vo et al., arXiv 2405.15613, section 3.3).

From the top down, a cluster's target is split over its children: each gives n images or all it has, n being the
greatest cut with sum(min(n, size)) at most the target; what is left goes one by one to children in hash order.
"""

from collections.abc import Sequence

import numpy as np

from curation.order import hash_keys


def split_targets(sizes: np.ndarray, parents: np.ndarray, targets: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """(k,) int64: how many images each child gives; per parent they add up to its target exactly.

    sizes: (k,) int64 images below each child; parents: (k,) int32; targets: (p,) int64, none above the images below
    that parent. All parents are bisected at once.
    """
    available = _sum_by(sizes, parents, len(targets))
    if np.any(targets > available):
        raise ValueError("a target is above what its cluster holds")
    low = np.zeros(len(targets), np.int64)  # sum(min(low, size)) <= target
    high = np.full(len(targets), int(sizes.max(initial=0)) + 1, np.int64)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        fits = _sum_by(np.minimum(sizes, middle[parents]), parents, len(targets)) <= targets
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    given = np.minimum(sizes, low[parents])
    left = targets - _sum_by(given, parents, len(targets))
    able = np.flatnonzero(sizes > given)
    keys = hash_keys(able.astype(np.uint64), seed, purpose)
    able = able[np.lexsort((keys, parents[able]))]
    mine = parents[able]
    starts = np.searchsorted(mine, mine, side="left")
    given[able[np.arange(len(able)) - starts < left[mine]]] += 1
    return np.asarray(given)


def leaf_targets(sizes: Sequence[np.ndarray], parents: Sequence[np.ndarray], target: int, seed: int) -> np.ndarray:
    """(k_1,) int64 images to take from each leaf; they add up to `target`, or to all there are.

    sizes: images below the clusters of each level, leaf first; parents: per level but the coarsest.
    """
    wanted = np.array([min(target, int(sizes[-1].sum()))], np.int64)
    above = [*parents, np.zeros(len(sizes[-1]), np.int32)]
    for level in reversed(range(len(sizes))):
        wanted = split_targets(sizes[level], above[level], wanted, seed, f"balance level {level + 1}")
    return wanted


def member_keys(image_ids: np.ndarray, distances: np.ndarray, order: str, seed: int) -> np.ndarray:
    """(n,) uint64 keys: the members of a leaf are taken in ascending order of them.

    order: `random` (hash order) or `nearest` to the centroid (`distances`, (n,) float32, not negative).
    """
    if order == "random":
        return hash_keys(image_ids, seed, "balance")
    # The bits of floats that are not negative sort as the floats do.
    return np.asarray(distances.astype(np.float32).view(np.uint32).astype(np.uint64))


def _sum_by(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros(count, np.int64)
    np.add.at(sums, groups, values)
    return sums
