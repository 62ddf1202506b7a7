"""Which images of the pool stay: components, the guards that split them, and a representative in each.

Representatives that an earlier generation chose stay; new images choose only where there is none.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curation import parquet, storage
from curation.duplicates import components, medoid, split
from curation.duplicates.forest import EDGE
from curation.duplicates.members import Members
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import Spread
from pipelines.duplicate_forests import StoredForest
from pipelines.duplicate_forgotten import apart
from pipelines.run_directory import Generation

if TYPE_CHECKING:
    from pipelines.stages.dedup import DedupConfig

BRIDGED = "bridged.json"
BRIDGED_LISTED = 1000
NEW = 1
"""Rank of an image of this generation in an election; older ones that are no representatives have 0."""


@dataclass
class Choice:
    """What the self graph says of the pool."""

    labels: np.ndarray
    """(n,) uint32: the smallest node of each node's component, after splitting."""
    stays: np.ndarray
    """(n,) bool: representatives, of this generation or an earlier one."""
    links: StoredForest | np.ndarray
    """The edges that make the components, and others below the threshold."""
    cuts: list[dict[str, Any]]
    """Components cut by `max_component`."""
    stars: int
    """By how many components stars are more than what they were made of."""
    bridged: list[dict[str, Any]]
    """Older components that new images joined to one."""


def choose(
    config: "DedupConfig",
    pool: Members,
    forest: StoredForest,
    fresh: np.ndarray,
    value: np.ndarray | None,
    earlier: Sequence[Generation],
    scratch: Scratch,
    spread: Spread,
    memory_bytes: int,
    joint: np.ndarray | None = None,
    gone: np.ndarray | None = None,
) -> Choice:
    """Components at the threshold, split as asked, and who stays.

    fresh: (n,) bool, nodes of this generation. value: (n,) what the representative is chosen by, largest first; None:
    the smallest id. joint, gone: (n,) bool, forgotten images, and those of them that stood for their component: with
    an earlier generation nobody is elected in their place.
    """
    count, ids = pool.count, forest.nodes.ids[0]
    links: StoredForest | np.ndarray = forest
    cuts: list[dict[str, Any]] = []
    if config.max_component is not None:
        whole = np.concatenate([np.empty(0, EDGE), *forest])
        links, cuts = split.fitting(whole, count, config.threshold, config.max_component)
        cuts = [{"component_id": int(ids[one.pop("label")]), **one} for one in cuts]
    labels = components.components(links, count, config.threshold)
    before = earlier_images(earlier, ids, ("kept", "reference"))
    if joint is not None:
        labels = apart(labels, joint)
    if gone is not None and earlier:
        before |= gone
    bridged = _bridged(labels, before, ids, earlier)
    by_mean = config.representative == "medoid"
    if config.split == "star":
        rank = np.where(before, np.uint8(split.STAYS), fresh.astype(np.uint8) * np.uint8(NEW))
        found, stays = split.stars(
            pool,
            labels,
            links,
            split.Election(None if by_mean else value, rank, by_mean),
            config.threshold,
            scratch,
            spread,
            memory_bytes,
        )
        stars = _number(found) - _number(labels)
        stays &= before | fresh
        return Choice(found, stays, links, cuts, stars, bridged)
    if by_mean:
        chosen = medoid.medoids(pool, labels, scratch, spread, memory_bytes)
    elif value is not None:
        chosen = components.best_members(labels, value, fresh.view(np.uint8) if earlier else None)
    else:
        chosen = components.earliest_members(labels)
    return Choice(labels, _with_older(labels, chosen, before, fresh), links, cuts, 0, bridged)


def _with_older(labels: np.ndarray, chosen: np.ndarray, before: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """(n,) bool who stays: the older ones; where a component has none, the chosen if it is new, else its first new."""
    has = np.zeros(len(labels), bool)
    has[labels[before]] = True
    stays = np.asarray(before | (chosen & fresh & ~has[labels]))
    has[labels[stays]] = True
    nobody = np.flatnonzero(fresh & ~has[labels])
    _, first = np.unique(labels[nobody], return_index=True)
    stays[nobody[first]] = True
    return stays


def earlier_images(earlier: Iterable[Generation], ids: np.ndarray, reasons: Sequence[str]) -> np.ndarray:
    """(n,) bool: ids whose row an earlier generation wrote with one of these reasons. ids: (n,) ascending."""
    found = np.zeros(len(ids), bool)
    if not len(ids):
        return found
    for path in (path for generation in earlier for path in generation.part_paths):
        table = parquet.read_table(path, ["image_id", "reason"])
        reason = table["reason"].to_numpy(zero_copy_only=False)
        mine = table["image_id"].to_numpy()[np.isin(reason, reasons)]
        at = np.minimum(np.searchsorted(ids, mine), len(ids) - 1)
        found[at[ids[at] == mine]] = True
    return found


def _bridged(
    labels: np.ndarray, before: np.ndarray, ids: np.ndarray, earlier: Sequence[Generation]
) -> list[dict[str, Any]]:
    """Components with several older representatives that no earlier generation has told of."""
    told = {
        tuple(one["representatives"])
        for generation in earlier
        if BRIDGED in generation.files
        for one in json.loads(storage.read_bytes(generation.file(BRIDGED)))
    }
    nodes = np.flatnonzero(before)
    label, count = np.unique(labels[nodes], return_counts=True)
    nodes = nodes[np.isin(labels[nodes], label[count > 1])]
    groups: dict[int, list[int]] = {}
    for node in nodes.tolist():
        groups.setdefault(int(ids[labels[node]]), []).append(int(ids[node]))
    return [
        {"component_id": key, "representatives": value}
        for key, value in sorted(groups.items())
        if tuple(value) not in told
    ]


def _number(labels: np.ndarray) -> int:
    return int(components.earliest_members(labels).sum())
