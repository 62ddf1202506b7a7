"""Retrieval: which pool images a seed set draws (DINOv2, section 3 and appendix A.4).

Sample mode takes the N nearest pool images of each seed. Cluster mode takes images, in hash order, from every
cluster that holds enough seeds. Neighbours are exact: float32 products nominate every image that could be among
the N nearest, `curation.vectors.similarity` decides, ties go to the smaller image_id.
"""

from dataclasses import dataclass

import numpy as np

from curation.clusters import one_thread
from curation.order import hash_keys
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
        wide = np.ascontiguousarray(part, dtype=np.float32)
        blocks = [
            _block(seeds[row : row + QUERY_ROWS], ids[start : start + POOL_ROWS], part, wide, count)
            for row in range(0, len(seeds), QUERY_ROWS)
        ]
        if blocks:
            found = Neighbours(np.concatenate([b.ids for b in blocks]), np.concatenate([b.similarity for b in blocks]))
            result = result.merge(found)
    return result


def _block(seeds: np.ndarray, ids: np.ndarray, pool: np.ndarray, wide: np.ndarray, count: int) -> Neighbours:
    faiss = require_faiss()
    # A float32 product of unit vectors is off by at most d * 2^-24; two of them by twice that.
    margin = 4.0 * seeds.shape[1] * 2.0**-24
    queries = np.ascontiguousarray(seeds, dtype=np.float32)
    wanted = min(count, len(pool))
    looked_at = min(len(pool), wanted + max(8, wanted // 4))
    with one_thread():
        rough, nearest = faiss.knn(queries, wide, looked_at, metric=faiss.METRIC_INNER_PRODUCT)
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


@dataclass(frozen=True)
class Draws:
    """What a seed set drew, one row per (image, seed)."""

    image_id: np.ndarray
    """(n,) uint64."""
    seed_id: np.ndarray
    """(n,) uint64."""
    rank: np.ndarray
    """(n,) int32, from 0."""
    similarity: np.ndarray
    """(n,) float32."""

    def __len__(self) -> int:
        return len(self.image_id)

    def sorted(self) -> "Draws":
        """By image_id, then seed_id."""
        return self._at(np.lexsort((self.seed_id, self.image_id)))

    def _at(self, rows: np.ndarray) -> "Draws":
        return Draws(self.image_id[rows], self.seed_id[rows], self.rank[rows], self.similarity[rows])


def all_draws(seed_ids: np.ndarray, neighbours: Neighbours, count: int) -> Draws:
    """Policy keep_all, the paper's count: every seed draws its `count` nearest, whoever else drew them."""
    ids, found = neighbours.ids[:, :count], neighbours.similarity[:, :count]
    there = ids != NO_ID
    seeds = np.broadcast_to(seed_ids[:, None], ids.shape)
    ranks = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Draws(ids[there], seeds[there], ranks[there], found[there]).sorted()


def unique_draws(draws: Draws) -> Draws:
    """Policy unique: an image stays with the seed most similar to it (ties: the smaller seed_id)."""
    ordered = draws._at(np.lexsort((draws.seed_id, -draws.similarity, draws.image_id)))
    first = np.r_[True, ordered.image_id[1:] != ordered.image_id[:-1]] if len(ordered) else np.empty(0, bool)
    return ordered._at(np.flatnonzero(first))


def next_best_draws(seed_ids: np.ndarray, neighbours: Neighbours, count: int) -> Draws:
    """Policy next_best: as unique, and a seed whose neighbour went to another takes its next one.

    Pairs are settled from the most similar down (ties: image_id, then seed_id); a seed stops at `count`. Seeds that
    run out of `neighbours` stay short.
    """
    seeds, width = neighbours.ids.shape
    flat_ids = neighbours.ids.ravel()
    flat_similarity = neighbours.similarity.ravel()
    flat_seeds = np.repeat(np.arange(seeds), width)
    order = np.lexsort((seed_ids[flat_seeds], flat_ids, -flat_similarity))
    order = order[flat_ids[order] != NO_ID]
    images, dense = np.unique(flat_ids[order], return_inverse=True)
    taken = np.zeros(len(images), bool)
    drawn = np.zeros(seeds, np.int32)
    chosen: list[int] = []
    ranks: list[int] = []
    for place, image in zip(order.tolist(), dense.tolist(), strict=True):
        seed = place // width
        if not taken[image] and drawn[seed] < count:
            taken[image] = True
            chosen.append(place)
            ranks.append(int(drawn[seed]))
            drawn[seed] += 1
    rows = np.array(chosen, np.int64)
    found = Draws(flat_ids[rows], seed_ids[flat_seeds[rows]], np.array(ranks, np.int32), flat_similarity[rows])
    return found.sorted()


def collisions(draws: Draws) -> dict[str, int]:
    """nominal: draws; unique: images drawn; colliding: images that more than one seed drew."""
    _, counts = np.unique(draws.image_id, return_counts=True)
    return {"nominal": len(draws), "unique": len(counts), "colliding": int((counts > 1).sum())}


# ---- cluster mode ---------------------------------------------------------------------------------------------------


def chosen_clusters(seed_clusters: np.ndarray, min_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """(clusters (c,) int32 ascending, seeds in each (c,) int64) that hold at least `min_seeds` seeds."""
    clusters, counts = np.unique(seed_clusters, return_counts=True)
    enough = counts >= min_seeds
    return clusters[enough].astype(np.int32), counts[enough].astype(np.int64)


def member_keys(image_ids: np.ndarray, seed: int, seed_set: str) -> np.ndarray:
    """The hash order in which a seed set takes images. (n,) uint64."""
    return hash_keys(image_ids, seed, f"retrieve {seed_set}")


def round_robin(ranks: np.ndarray, keys: np.ndarray, cap: int) -> np.ndarray:
    """Ascending positions of the `cap` images taken when every cluster gives one a round, in its hash order.

    ranks: (n,) rank within its cluster; keys: (n,) uint64, the order within the last, unfinished round.
    """
    return np.sort(np.lexsort((keys, ranks))[:cap])


def nearest_seed(
    images: np.ndarray, image_groups: np.ndarray, seeds: np.ndarray, seed_ids: np.ndarray, seed_groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(seed_id (n,) uint64, similarity (n,) float32) of the nearest seed of its own group for each image.

    images: (n, d), seeds: (m, d) stored vectors. Every group of an image has a seed.
    """
    found_ids = np.full(len(images), NO_ID, np.uint64)
    found = np.full(len(images), -np.inf, np.float32)
    order = np.argsort(seed_groups, kind="stable")
    groups, starts = np.unique(seed_groups[order], return_index=True)
    members = dict(zip(groups.tolist(), np.split(order, starts[1:]), strict=True))
    for group in np.unique(image_groups).tolist():
        mine = np.flatnonzero(image_groups == group)
        theirs = members[group]
        best = nearest_neighbours(images[mine], seed_ids[theirs], seeds[theirs], 1)
        found_ids[mine], found[mine] = best.ids[:, 0], best.similarity[:, 0]
    return found_ids, found
