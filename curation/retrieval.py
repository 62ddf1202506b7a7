"""Retrieval: which pool images a seed set draws (DINOv2, section 3 and appendix A.4).

Sample mode takes the N nearest pool images of each seed. Cluster mode takes images, in hash order, from every
cluster that holds enough seeds. Neighbours come from `curation.neighbours` or, for many seeds, `curation.seed_search`.
"""

from dataclasses import dataclass

import numba
import numpy as np

from curation.neighbours import NO_ID, Neighbours, nearest_neighbours
from curation.order import hash_keys


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
    rows, ranks = _settle(order, dense, width, seeds, len(images), count)
    found = Draws(flat_ids[rows], seed_ids[flat_seeds[rows]], ranks, flat_similarity[rows])
    return found.sorted()


@numba.njit(cache=True, nogil=True)
def _settle(
    order: np.ndarray, image_of: np.ndarray, width: int, seeds: int, images: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(places taken, rank of each with its seed) of pairs in `order`; place // width is the pair's seed."""
    taken = np.zeros(images, np.bool_)
    drawn = np.zeros(seeds, np.int32)
    places = np.empty(min(images, seeds * count), np.int64)
    ranks = np.empty(len(places), np.int32)
    found = 0
    for at in range(len(order)):
        seed, image = order[at] // width, image_of[at]
        if not taken[image] and drawn[seed] < count:
            taken[image] = True
            places[found], ranks[found] = order[at], drawn[seed]
            drawn[seed] += 1
            found += 1
    return places[:found], ranks[:found]


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


def rounds_needed(sizes: np.ndarray, per_cluster: int, cap: int) -> tuple[int, int]:
    """(images that each cluster needs to offer at most, images there are before the cap).

    sizes: (c,) int64 images per chosen cluster. Round-robin takes at most so many from any cluster, so no more of
    them need be held than `cap` and one per cluster.
    """
    offered = np.minimum(sizes, per_cluster)
    low, high = 0, int(offered.max(initial=0))
    while low < high:
        middle = (low + high) // 2
        if int(np.minimum(offered, middle).sum()) >= cap:
            high = middle
        else:
            low = middle + 1
    return high, int(offered.sum())


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
