"""A random order of [0, n) that takes no memory: position to element by arithmetic, so that it can be entered anywhere.

A balanced Feistel network over the least even number of bits that holds n, with cycle walking for what falls outside
(Black, Rogaway 2002: ciphers with arbitrary finite domains). Its keys come from (seed, purpose).
"""

import numba
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
        self._keys = hash_keys(np.arange(ROUNDS, dtype=np.uint64), seed, f"permutation:{purpose}")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(k,) int64 in [0, n) -> (k,) int64 in [0, n)."""
        return _walk(positions, np.array([self.n]), np.zeros(1, np.uint64), self._keys)


def permute_each(positions: np.ndarray, sizes: np.ndarray, tweaks: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Each position under a permutation of its own: of [0, sizes[i]), chosen by tweaks[i]. All (k,), int64."""
    keys = hash_keys(np.arange(ROUNDS, dtype=np.uint64), seed, f"permutations:{purpose}")
    return _walk(positions, sizes, hash_keys(tweaks, seed, purpose), keys)


@numba.njit(cache=True, nogil=True)
def _walk(positions: np.ndarray, sizes: np.ndarray, tweaks: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """sizes, tweaks: of each position, or one for all."""
    found = np.empty(len(positions), np.int64)
    for i in range(len(positions)):
        size = np.uint64(sizes[i if len(sizes) > 1 else 0])
        tweak = tweaks[i if len(tweaks) > 1 else 0]
        half = np.uint64(LEAST_HALF_BITS)
        while (np.uint64(1) << (half + half)) < size:
            half += np.uint64(1)
        mask = (np.uint64(1) << half) - np.uint64(1)
        value = np.uint64(positions[i])
        while True:  # a few times: the domain is less than 4 n, or 256
            left, right = value >> half, value & mask
            for k in range(len(keys)):
                left, right = right, left ^ (_scrambled(right ^ _scrambled(keys[k] ^ tweak)) & mask)
            value = (left << half) | right
            if value < size:
                break
        found[i] = value
    return found


@numba.njit(inline="always")
def _scrambled(z: np.uint64) -> np.uint64:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
