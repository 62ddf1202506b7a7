"""Chains: components whose members are not all copies of each other.

A chain a - b - c joins images that nobody would call copies. For the largest components: the least similar pair, the
chain that joins it, and the share of members not above the threshold to their representative; that share also over a
sample of the members of all components.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from curation.duplicates.components import component_sizes
from curation.duplicates.forest import EDGE, Nodes, cut, path, pieces_of
from curation.duplicates.members import Members
from curation.duplicates.tasks import Spread, gather, serial
from curation.order import hash_keys, take_hashed

COMPONENTS = 100
MEMBERS_COMPARED = 1000
"""Components of at most so many members are compared exactly; of larger ones as many members, chosen by hash."""
MEMBERS_LISTED = 50
MEMBERS_SAMPLED = 2000
CHAIN_EDGES = 1 << 24
"""Components of more edges get no chain."""
CHUNK = 1 << 20


def report(
    forest: np.ndarray | Iterable[np.ndarray],
    labels: np.ndarray,
    kept: np.ndarray,
    members: Members,
    nodes: Nodes,
    threshold: float,
    spread: Spread = serial,
    limit: int = COMPONENTS,
    joints: np.ndarray | None = None,
) -> dict[str, Any]:
    """`largest`: a description of each of the largest components of several images; `members`: a sample of all.

    forest: its edges above the threshold are the links of the components. labels: (n,) uint32. kept: (n,) bool, the
    representatives. `sampled` of a component: its least similar pair and its share are those of `members_compared` of
    its members, an upper bound and an estimate. joints: (n,) bool, nodes without a vector, which are not spoken of.
    """
    if joints is not None and joints.any():
        labels, kept = _without(labels, joints), kept & ~joints
    chosen, sizes = _largest(labels, limit)
    place = np.full(len(labels), -1, np.int16)
    place[chosen] = np.arange(len(chosen))
    groups = _groups(labels, place, len(chosen))
    compared = [_compared(group, nodes) for group in groups]
    representatives = [group[kept[group]] for group in groups]
    some, theirs = _sampled(labels, kept, nodes)
    wanted = np.unique(np.concatenate([np.empty(0, np.uint32), *compared, *representatives, some, theirs]))
    _, vectors = gather(members, wanted, spread) if len(wanted) else (None, np.empty((0, 1)))
    links = _links(forest, labels, place, threshold, len(chosen))
    found = []
    for k, (label, group, mine, stay) in enumerate(zip(chosen, groups, compared, representatives, strict=True)):
        similarity = _products(vectors[np.searchsorted(wanted, mine)])
        a, b = np.unravel_index(int(similarity.argmin()), similarity.shape)
        one, other = sorted((int(mine[a]), int(mine[b])))
        chain = path(links[k], one, other) if len(links[k]) <= CHAIN_EDGES else []
        far = _far(vectors[np.searchsorted(wanted, mine)], vectors[np.searchsorted(wanted, stay)], threshold)
        found.append(
            {
                "component_id": int(nodes.image_id(np.array([label]))[0]),
                "images": int(sizes[k]),
                "representatives": nodes.image_id(stay[:MEMBERS_LISTED]).tolist(),
                "least_similar": nodes.image_id(np.array([one, other])).tolist(),
                "least_similarity": float(similarity[a, b]),
                "chain": [
                    {"image_id": int(nodes.image_id(np.array([node]))[0]), "similarity": value} for node, value in chain
                ],
                "not_above_threshold_to_representative": round(float(far.mean()), 6),
                "members_compared": len(mine),
                "sampled": len(mine) < len(group),
                "members": nodes.image_id(group[:MEMBERS_LISTED]).tolist(),
            }
        )
    return {"largest": found, "members": _share(some, theirs, labels, wanted, vectors, threshold)}


def _without(labels: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """Labels with every joint on its own, and the others of its component labelled by the smallest of them."""
    nodes = np.flatnonzero(~joints)
    _, first, place = np.unique(labels[nodes], return_index=True, return_inverse=True)
    found = np.arange(len(labels), dtype=labels.dtype)
    found[nodes] = nodes[first][place]
    return found


def _largest(labels: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """((k,) int64 labels of the largest components of several images, (k,) their sizes): by size, then label."""
    sizes = component_sizes(labels)
    best = np.empty(0, np.int64)
    for begin in range(0, len(sizes), CHUNK):
        here = np.flatnonzero(sizes[begin : begin + CHUNK] > 1) + begin
        both = np.concatenate([best, here])
        best = both[np.lexsort((both, -sizes[both].astype(np.int64)))][:limit]
    return best, sizes[best]


def _groups(labels: np.ndarray, place: np.ndarray, count: int) -> list[np.ndarray]:
    """The members of each chosen component, ascending."""
    parts: list[list[np.ndarray]] = [[] for _ in range(count)]
    for begin in range(0, len(labels), CHUNK):
        at = place[labels[begin : begin + CHUNK]]
        here = np.flatnonzero(at >= 0)
        order = here[np.argsort(at[here], kind="stable")]
        bounds = np.searchsorted(at[order], np.arange(count + 1))
        for k in np.flatnonzero(np.diff(bounds)).tolist():
            parts[k].append((order[bounds[k] : bounds[k + 1]] + begin).astype(np.uint32))
    return [np.concatenate(part) for part in parts]


def _links(
    forest: np.ndarray | Iterable[np.ndarray], labels: np.ndarray, place: np.ndarray, threshold: float, count: int
) -> list[np.ndarray]:
    """The edges above the threshold of each chosen component."""
    parts: list[list[np.ndarray]] = [[np.empty(0, EDGE)] for _ in range(count)]
    for rows in pieces_of(forest):
        above = cut(rows, threshold)
        at = place[labels[above["low"]]]
        at[labels[above["low"]] != labels[above["high"]]] = -1
        for k in np.unique(at[at >= 0]).tolist():
            parts[k].append(above[at == k])
    return [np.concatenate(part) for part in parts]


def _compared(group: np.ndarray, nodes: Nodes) -> np.ndarray:
    if len(group) <= MEMBERS_COMPARED:
        return group
    return np.sort(group[take_hashed(nodes.image_id(group), MEMBERS_COMPARED, 0, "component members")])


def _sampled(labels: np.ndarray, kept: np.ndarray, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """(members that are no representatives, first in hash order; the representatives of their components)."""
    several = component_sizes(labels) > 1
    some = np.empty(0, np.uint32)
    for begin in range(0, len(labels), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        here = (np.flatnonzero(several[labels[chunk]] & ~kept[chunk]) + begin).astype(np.uint32)
        both = np.concatenate([some, here])
        keys = hash_keys(nodes.image_id(both), 0, "members of components")
        some = both[np.argsort(keys, kind="stable")[:MEMBERS_SAMPLED]]
    asked = np.zeros(len(labels), bool)
    asked[labels[some]] = True
    return np.sort(some), np.flatnonzero(kept & asked[labels]).astype(np.uint32)


def _share(
    some: np.ndarray, theirs: np.ndarray, labels: np.ndarray, wanted: np.ndarray, vectors: np.ndarray, threshold: float
) -> dict[str, Any]:
    """Of the sampled members, the share not above the threshold to any representative of their component."""
    order = np.argsort(labels[theirs], kind="stable")
    theirs = theirs[order]
    low = np.searchsorted(labels[theirs], labels[some])
    high = np.searchsorted(labels[theirs], labels[some], side="right")
    far = 0
    for member, first, end in zip(some.tolist(), low.tolist(), high.tolist(), strict=True):
        mine = vectors[np.searchsorted(wanted, [member])]
        far += int(_far(mine, vectors[np.searchsorted(wanted, theirs[first:end])], threshold)[0])
    share = round(far / len(some), 6) if len(some) else 0.0
    return {"not_above_threshold_to_representative": share, "members_sampled": len(some)}


def _products(vectors: np.ndarray) -> np.ndarray:
    """(n, n) float32 similarities; float64 products rounded, as the definition."""
    wide = vectors.astype(np.float64)
    return np.asarray((wide @ wide.T).astype(np.float32))


def _far(some: np.ndarray, representatives: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool: whose nearest representative is not above the threshold."""
    if not len(representatives):
        return np.ones(len(some), bool)
    nearest = (some.astype(np.float64) @ representatives.astype(np.float64).T).max(axis=1)
    return np.asarray(nearest.astype(np.float32) <= np.float32(threshold))
