"""A random order of [0, n) that takes no memory: position to element by arithmetic, so that it can be entered anywhere.

A balanced Feistel network over the least even number of bits that holds n, with cycle walking for what falls outside
(Black, Rogaway 2002: ciphers with arbitrary finite domains). Its keys come from (seed, purpose).
"""

import numpy as np

from curation.order import hash_keys

ROUNDS = 6
LEAST_HALF_BITS = 4


class Permutation:
    """A bijection of [0, n)."""

    def __init__(self, n: int, seed: int, purpose: str) -> None:
        if n < 1:
            raise ValueError("a permutation needs at least one element")
        self.n = n
        self._half = np.uint64(max(LEAST_HALF_BITS, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = hash_keys(np.arange(ROUNDS, dtype=np.uint64), seed, f"permutation:{purpose}")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(k,) int64 in [0, n) -> (k,) int64 in [0, n)."""
        found = self._mix(positions.astype(np.uint64))
        outside = np.flatnonzero(found >= self.n)
        while len(outside):  # at most a few times: the domain is less than 4 n, or 256
            found[outside] = self._mix(found[outside])
            outside = outside[found[outside] >= self.n]
        return found.astype(np.int64)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scrambled(right ^ key) & self._mask)
        return (left << self._half) | right


def _scrambled(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
