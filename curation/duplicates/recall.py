"""How many cells a vector must visit for the recall asked for, and what recall was reached.

A seeded sample of queries is compared with everything. For each pair found so, the number of visits the join would
have needed is the rank of one end's home among the cells nearest to the other end, whichever end has it lower: one
exact search gives the recall at every number of visits. Half of the queries choose the visits, the other half measures.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

CHOICE_QUERIES = 1024
MEASURE_QUERIES = 1024
PAIRS_PER_QUERY = 256
"""Kept of one query in one piece, by node hash; the others count through the weight of those."""

SAMPLE_PAIR = np.dtype([("query", "<u4"), ("node", "<u4"), ("similarity", "<f4"), ("visits", "<i4"), ("weight", "<f4")])
"""A true pair: the query's node, the other's, the visits it takes to be compared, and how many pairs it stands for."""


@dataclass(frozen=True)
class Recall:
    """A measured recall with its 95 % interval."""

    threshold: float
    recall: float
    low: float
    high: float
    pairs: int
    queries: int
    queries_with_pairs: int


def visits_needed(left: np.ndarray, right: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(p,) int32: visits at which pair (left[k], right[k]) is compared.

    left, right: (p, d) float32. centroids: (c, d) float32.
    """
    one, other = left @ centroids.T, right @ centroids.T
    rows = np.arange(len(left))
    home_one, home_other = one.argmax(axis=1), other.argmax(axis=1)
    of_one = (one > one[rows, home_other][:, None]).sum(axis=1)
    of_other = (other > other[rows, home_one][:, None]).sum(axis=1)
    return np.asarray(np.minimum(of_one, of_other) + 1, dtype=np.int32)


def choose_visits(pairs: np.ndarray, threshold: float, recall: float, cells: int, default: int = 16) -> int:
    """The fewest visits at which the sample's recall is `recall` with a quarter of the permitted loss in hand.

    pairs: (p,) SAMPLE_PAIR. Without pairs to learn from: `default`.
    """
    above = pairs[pairs["similarity"] > np.float32(threshold)]
    if not len(above):
        return min(default, cells)
    order = np.argsort(above["visits"], kind="stable")
    share = np.cumsum(above["weight"][order].astype(np.float64)) / above["weight"].sum(dtype=np.float64)
    wanted = recall + 0.25 * (1 - recall)
    place = min(int(np.searchsorted(share, wanted - 1e-12)), len(share) - 1)
    return int(min(above["visits"][order][place], cells))


def measured(pairs: np.ndarray, found: np.ndarray, threshold: float, queries: int) -> dict[str, float]:
    """Recall over the pairs above a threshold, as the fields of `Recall`.

    pairs: (p,) SAMPLE_PAIR. found: (p,) bool. The pairs of one query are found or missed together, so the interval is
    Wilson's for as many independent pairs as the variance between queries leaves.
    """
    mask = pairs["similarity"] > np.float32(threshold)
    above, hit = pairs[mask], found[mask]
    if not len(above):
        return asdict(Recall(threshold, 1.0, 0.0, 1.0, 0, queries, 0))
    nodes, cluster = np.unique(above["query"], return_inverse=True)
    weight = above["weight"].astype(np.float64)
    total = np.bincount(cluster, weight)
    hits = np.bincount(cluster, weight * hit)
    share = float(hits.sum() / total.sum())
    effective = _effective_pairs(total, hits, share)
    low, high = wilson(share, effective)
    return asdict(Recall(threshold, share, low, high, round(float(total.sum())), queries, len(nodes)))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` trials."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _effective_pairs(total: np.ndarray, hits: np.ndarray, share: float) -> float:
    queries = len(total)
    # Kish: unequal numbers of pairs per query count as fewer; a lower bound when all are found or all missed.
    kish = float(total.sum() ** 2 / (total**2).sum())
    if queries < 2 or share in (0.0, 1.0):
        return kish
    residual = hits - share * total
    variance = queries / (queries - 1) * float((residual**2).sum()) / float(total.sum()) ** 2
    return float(total.sum()) if variance == 0 else max(1.0, min(float(total.sum()), share * (1 - share) / variance))
