"""Chains: components whose members are not all copies of each other.

A chain a - b - c joins images that nobody would call copies. For the largest components: the least similar pair, the
chain that joins it, and the share of members not above the threshold to their representative.
"""

from typing import Any

import numpy as np

from curation.duplicates.forest import Nodes, cut, path
from curation.duplicates.join import Spread, gather, serial
from curation.duplicates.members import Members
from curation.order import take_hashed

COMPONENTS = 100
MEMBERS_COMPARED = 1000
MEMBERS_LISTED = 50


def largest_components(
    forest: np.ndarray,
    labels: np.ndarray,
    kept: np.ndarray,
    members: Members,
    nodes: Nodes,
    threshold: float,
    spread: Spread = serial,
    limit: int = COMPONENTS,
) -> list[dict[str, Any]]:
    """A description of each of the largest components of several images, for a report.

    labels: (n,) uint32. kept: (n,) bool, the representatives. Components of more than MEMBERS_COMPARED members are
    described by as many of them, chosen by hash.
    """
    sizes = np.bincount(labels, minlength=1)
    several = np.flatnonzero(sizes > 1)
    chosen = several[np.lexsort((several, -sizes[several]))][:limit]
    place = np.full(len(sizes), -1, np.int64)
    place[chosen] = np.arange(len(chosen))
    belongs = np.flatnonzero(place[labels] >= 0)
    order = np.argsort(place[labels[belongs]], kind="stable")
    groups = np.split(belongs[order], np.cumsum(sizes[chosen])[:-1]) if len(chosen) else []
    compared = [_compared(group, nodes) for group in groups]
    representatives = [group[kept[group]] for group in groups]
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *compared, *representatives]))
    _, vectors = gather(members, wanted.astype(np.uint32), spread) if len(wanted) else (None, np.empty((0, 1)))
    above = cut(forest, threshold)
    edge_place = place[labels[above["low"]]]
    found = []
    for k, (label, group, some, stay) in enumerate(zip(chosen, groups, compared, representatives, strict=True)):
        similarity = _products(vectors[np.searchsorted(wanted, some)])
        a, b = np.unravel_index(int(similarity.argmin()), similarity.shape)
        one, other = sorted((int(some[a]), int(some[b])))
        chain = path(above[edge_place == k], one, other)
        far = _far(vectors[np.searchsorted(wanted, some)], vectors[np.searchsorted(wanted, stay)], threshold)
        found.append(
            {
                "component_id": int(nodes.image_id(np.array([label]))[0]),
                "images": int(sizes[label]),
                "representatives": nodes.image_id(stay).tolist()[:MEMBERS_LISTED],
                "least_similar": nodes.image_id(np.array([one, other])).tolist(),
                "least_similarity": float(similarity[a, b]),
                "chain": [
                    {"image_id": int(nodes.image_id(np.array([node]))[0]), "similarity": value} for node, value in chain
                ],
                "not_above_threshold_to_representative": round(far, 6),
                "members_compared": len(some),
                "members": nodes.image_id(group[:MEMBERS_LISTED]).tolist(),
            }
        )
    return found


def _compared(group: np.ndarray, nodes: Nodes) -> np.ndarray:
    if len(group) <= MEMBERS_COMPARED:
        return group
    return np.sort(group[take_hashed(nodes.image_id(group), MEMBERS_COMPARED, 0, "component members")])


def _products(vectors: np.ndarray) -> np.ndarray:
    """(n, n) float32 similarities; float64 products rounded, as the definition."""
    wide = vectors.astype(np.float64)
    return np.asarray((wide @ wide.T).astype(np.float32))


def _far(some: np.ndarray, representatives: np.ndarray, threshold: float) -> float:
    """Share of `some` whose nearest representative is not above the threshold."""
    if not len(representatives):
        return 1.0
    nearest = (some.astype(np.float64) @ representatives.astype(np.float64).T).max(axis=1)
    return float((nearest.astype(np.float32) <= np.float32(threshold)).mean())
