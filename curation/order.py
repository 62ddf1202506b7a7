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
