"""The N pool images nearest each seed, exactly: the definition of similarity decides, ties go to the smaller image_id.

Float32 products, of FAISS or a GPU, nominate every image that could be among the N nearest.
"""

from dataclasses import dataclass

import numpy as np

from curation import device
from curation.halves import widen
from curation.nearest import one_thread
from curation.search import require_faiss
from curation.vectors import similarity

NO_ID = np.uint64(2**64 - 1)
"""Stands where a seed has fewer neighbours than asked for; its similarity is -inf."""
QUERY_ROWS = 4096
POOL_ROWS = 65_536
PAIR_ROWS = 16_384
"""Bounds of what is compared at a time."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest pool images of m seeds: by similarity, then image_id."""

    ids: np.ndarray
    """(m, n) uint64, NO_ID where there is none."""
    similarity: np.ndarray
    """(m, n) float32, -inf where there is none."""

    @classmethod
    def none(cls, seeds: int, count: int) -> "Neighbours":
        return cls(np.full((seeds, count), NO_ID, np.uint64), np.full((seeds, count), -np.inf, np.float32))

    def merge(self, other: "Neighbours") -> "Neighbours":
        """The best of both, as many per seed as `self` has. Order does not matter: the ranking is total."""
        ids = np.concatenate([self.ids, other.ids], axis=1)
        found = np.concatenate([self.similarity, other.similarity], axis=1)
        order = np.lexsort((ids, -found), axis=1)[:, : self.ids.shape[1]]
        return Neighbours(np.take_along_axis(ids, order, axis=1), np.take_along_axis(found, order, axis=1))


def nearest_neighbours(seeds: np.ndarray, ids: np.ndarray, pool: np.ndarray, count: int) -> Neighbours:
    """The `count` pool images of greatest similarity to each seed.

    seeds: (m, d), pool: (n, d) stored unit vectors, float16 or float32; ids: (n,) uint64 of the pool.
    """
    result = Neighbours.none(len(seeds), count)
    for start in range(0, len(pool), POOL_ROWS):
        part = pool[start : start + POOL_ROWS]
        wide = widen(part)
        blocks = [
            _block(seeds[row : row + QUERY_ROWS], ids[start : start + POOL_ROWS], part, wide, count)
            for row in range(0, len(seeds), QUERY_ROWS)
        ]
        if blocks:
            found = Neighbours(np.concatenate([b.ids for b in blocks]), np.concatenate([b.similarity for b in blocks]))
            result = result.merge(found)
    return result


def _block(seeds: np.ndarray, ids: np.ndarray, pool: np.ndarray, wide: np.ndarray, count: int) -> Neighbours:
    # A float32 product of unit vectors is off by at most d * 2^-24; two of them by twice that.
    margin = 4.0 * seeds.shape[1] * 2.0**-24
    queries = widen(seeds)
    wanted = min(count, len(pool))
    looked_at = min(len(pool), wanted + max(8, wanted // 4))
    with one_thread():
        rough, nearest = _rough(queries, wide, looked_at)
        exact = np.empty((len(seeds), looked_at), np.float32)
        step = max(1, PAIR_ROWS // looked_at)
        for start in range(0, len(seeds), step):
            chosen = nearest[start : start + step]
            left = np.repeat(seeds[start : start + step], looked_at, axis=0)
            exact[start : start + step] = similarity(left, pool[chosen.ravel()]).reshape(chosen.shape)
        found = Neighbours(ids[nearest], exact)
        best = Neighbours.none(len(seeds), count).merge(found)
        if looked_at < len(pool):
            # Where more images crowd within the margin than were looked at (repeats), all of these are compared.
            crowded = np.flatnonzero(rough[:, wanted - 1] - rough[:, -1] <= margin)
            for row in crowded.tolist():
                close = np.flatnonzero(wide @ queries[row] >= rough[row, wanted - 1] - margin)
                left = np.broadcast_to(seeds[row], (len(close), seeds.shape[1]))
                again = Neighbours(ids[close][None], similarity(left, pool[close])[None])
                better = Neighbours.none(1, count).merge(again)
                best.ids[row], best.similarity[row] = better.ids[0], better.similarity[0]
    return best


def _rough(queries: np.ndarray, pool: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The greatest float32 products of each query, and the rows they are of: any, where several are equal."""
    on = device.current()
    if on is not None:
        return on.top(queries, pool, count)
    faiss = require_faiss()
    return faiss.knn(queries, pool, count, metric=faiss.METRIC_INNER_PRODUCT)  # type: ignore[no-any-return]
