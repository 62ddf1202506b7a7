"""Random order that depends on nothing but (seed, purpose, id): every "take M of these" uses it.

The hash is splitmix64 (Steele, Lea, Flood 2014), a bijection on 64-bit words: no two ids tie.
"""

import hashlib

import numpy as np


def hash_keys(image_ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Keys to sort by. image_ids: (n,) uint64. Returns (n,) uint64, distinct for distinct ids."""
    word = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    salt = np.uint64(int.from_bytes(word, "little"))
    with np.errstate(over="ignore"):
        z = image_ids.astype(np.uint64) + salt * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def take_hashed(image_ids: np.ndarray, count: int, seed: int, purpose: str) -> np.ndarray:
    """Positions of the `count` ids that come first in hash order, in that order.

    image_ids: (n,) uint64. Returns (min(n, count),) int64 positions into image_ids. The same ids are
    chosen whatever order they arrive in.
    """
    keys = hash_keys(image_ids, seed, purpose)
    return np.argsort(keys, kind="stable")[:count]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A numpy generator keyed by (seed, purpose); Philox, so that its stream is the same everywhere."""
    word = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(word, "little")))


def first_per_group(
    groups: np.ndarray, keys: np.ndarray, image_ids: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `limits[g]` members of each group g that come first by key, and their rank in the group.

    groups: (n,) int; keys: (n,) sortable, ties by image_ids (n,) uint64; limits: (highest group + 1,) int. Positions
    are ordered by group, then key.
    """
    order = np.lexsort((image_ids, keys, groups))
    if not len(order):
        return order, order
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    keep = rank < limits[ordered]
    return order[keep], rank[keep]


class FirstPerGroup:
    """`first_per_group` over parts that arrive in any order; holds at most about twice what it keeps."""

    def __init__(self, limits: np.ndarray) -> None:
        self.limits = limits
        self._kept = (np.empty(0, np.int32), np.empty(0, np.uint64), np.empty(0, np.uint64))
        self._new: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, groups: np.ndarray, keys: np.ndarray, image_ids: np.ndarray) -> None:
        """(n,) int32, (n,) uint64, (n,) uint64 of one part."""
        self._new.append((groups, keys, image_ids))
        if sum(len(g) for g, _, _ in self._new) > max(len(self._kept[0]), 1 << 20):
            self._reduce()

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(groups, keys, image_ids, ranks) of what comes first, ordered by group, then key."""
        ranks = self._reduce()
        return (*self._kept, ranks)

    def _reduce(self) -> np.ndarray:
        parts = [self._kept, *self._new]
        groups, keys, image_ids = (np.concatenate([part[i] for part in parts]) for i in range(3))
        positions, ranks = first_per_group(groups, keys, image_ids, self.limits)
        self._kept = (groups[positions], keys[positions], image_ids[positions])
        self._new = []
        return ranks
