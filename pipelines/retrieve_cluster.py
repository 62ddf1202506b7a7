"""Retrieval by cluster: images in hash order from every cluster that holds enough seeds of a set.

Three passes, each over columns or parts read once: sizes of the clusters, the members that come first, and the nearest
seed of each. The last is made for one batch of clusters after the other, whose seeds fit into a quarter of a worker's
memory. The driver holds at most `cap` images and one per chosen cluster for every seed set, and the seeds of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curation import order, retrieval
from curation.errors import UserError
from curation.nearest import nearest_centroid
from curation.neighbours import NO_ID
from curation.retrieval import Draws
from pipelines import embedded, retrieve_kept
from pipelines.context import Context
from pipelines.retrieve_inputs import Inputs, Piece, Retrieved, SeedSet, stretches
from pipelines.run_directory import Generation

TASK_ROWS = 262_144
PATHS_PER_TASK = 64


@dataclass(frozen=True)
class ChosenClusters:
    """The clusters that a seed set chose, and the seeds in them."""

    name: str
    chosen: np.ndarray
    """(k,) bool."""
    limits: np.ndarray
    """(k,) int64 images to take from each."""


@dataclass(frozen=True)
class Members:
    """The images taken for a seed set, by id, and the seeds of their clusters."""

    ids: np.ndarray
    leaves: np.ndarray
    seed_ids: np.ndarray
    seeds: np.ndarray
    seed_leaves: np.ndarray


def clustered(context: Context, generation: Generation, inputs: Inputs) -> dict[str, Retrieved]:
    """What each seed set of mode cluster drew."""
    sets = [s for s in inputs.sets if s.mode == "cluster"]
    if not sets:
        return {}
    assert inputs.hierarchy is not None
    centroids = inputs.hierarchy.centroids[0]
    seed_leaves = _seed_leaves(context, sets, centroids)
    chosen = {s.name: retrieval.chosen_clusters(seed_leaves[s.name], s.min_seeds) for s in sets}
    sizes = embedded.leaf_sizes(context, inputs.clusters, len(centroids))
    wanted, before_cap = [], {}
    for s in sets:
        mask = np.zeros(len(centroids), bool)
        mask[chosen[s.name][0]] = True
        rounds, before_cap[s.name] = retrieval.rounds_needed(sizes[mask], s.per_cluster, s.cap)
        wanted.append(ChosenClusters(s.name, mask, np.where(mask, min(s.per_cluster, rounds), 0)))
    found_members, ranks = {}, {}
    for s, mine in zip(sets, _first_members(context, inputs.clusters, wanted), strict=True):
        leaves, keys, ids, rank = mine.result()
        kept = retrieval.round_robin(rank, keys, s.cap)
        kept = kept[np.argsort(ids[kept])]
        found_members[s.name] = ids[kept], leaves[kept]
        ranks[s.name] = rank[kept]
    nearest = {
        s.name: (np.full(len(ids), NO_ID, np.uint64), np.zeros(len(ids), np.float32))
        for s, (ids, _) in zip(sets, found_members.values(), strict=True)
    }
    per_leaf = np.zeros(len(centroids), np.int64)
    for s in sets:
        clusters, seeds = chosen[s.name]
        per_leaf[clusters] += seeds
    room = context.resources.memory_bytes // (4 * 4 * inputs.opened.dimension)
    for first, stop in leaf_batches(per_leaf, room):
        places = {
            s.name: np.flatnonzero((found_members[s.name][1] >= first) & (found_members[s.name][1] < stop))
            for s in sets
        }
        batch = {}
        for s in sets:
            clusters = chosen[s.name][0]
            those = clusters[(clusters >= first) & (clusters < stop)]
            held = _seeds_in(s, seed_leaves[s.name], those, inputs.opened.dimension)
            member_ids, member_leaves = (column[places[s.name]] for column in found_members[s.name])
            batch[s.name] = Members(member_ids, member_leaves, *held)
        found = _nearest_seeds(context, generation, inputs, batch, f"cluster-{first}-{stop}")
        for s in sets:
            nearest[s.name][0][places[s.name]] = found[s.name][0]
            nearest[s.name][1][places[s.name]] = found[s.name][1]
    result = {}
    for s in sets:
        member_ids, member_leaves = found_members[s.name]
        seed_id, similarity = nearest[s.name]
        draws = Draws(member_ids, seed_id, ranks[s.name].astype(np.int32), similarity)
        clusters, seeds = chosen[s.name]
        counts = {
            "clusters": len(clusters),
            "seeds_in_clusters": int(seeds.sum()),
            "before_cap": before_cap[s.name],
            **retrieval.collisions(draws),
        }
        per_cluster = np.bincount(member_leaves, minlength=len(centroids))
        listed = [
            {"cluster": int(c), "seeds": int(n), "images": int(per_cluster[c])}
            for c, n in zip(clusters, seeds, strict=True)
        ]
        result[s.name] = Retrieved(draws, member_leaves, counts, listed)
    return result


def leaf_batches(seeds: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Ranges of leaves that hold at most so many seeds together, or one leaf with seeds. seeds: (k,) of each leaf."""
    batches, first, held = [], 0, 0
    for leaf in np.flatnonzero(seeds).tolist():
        if held and held + seeds[leaf] > most:
            batches.append((first, leaf))
            first, held = leaf, 0
        held += int(seeds[leaf])
    return [*batches, (first, len(seeds))]


def _seed_leaves(context: Context, sets: Sequence[SeedSet], centroids: np.ndarray) -> dict[str, np.ndarray]:
    """The leaf cluster of every seed, in the order of its set's parts."""
    pieces = {s.name: [p for group in stretches(s.parts, TASK_ROWS) for p in group] for s in sets}
    calls = (
        (f"{name} {i:06d}", (piece, centroids.shape[1]))
        for name, mine in pieces.items()
        for i, piece in enumerate(mine)
    )
    labels = dict(context.spread(_assign_seeds, calls, shared=centroids))
    return {
        name: np.concatenate([np.empty(0, np.int32), *(labels[f"{name} {i:06d}"] for i in range(len(mine)))])
        for name, mine in pieces.items()
    }


def _assign_seeds(piece: Piece, dimension: int, centroids: np.ndarray) -> np.ndarray:
    return nearest_centroid(piece.read(dimension)[1], centroids)[0]


def _first_members(
    context: Context, paths: Sequence[str], wanted: Sequence[ChosenClusters]
) -> list[order.FirstPerGroup]:
    taken = [order.FirstPerGroup(w.limits) for w in wanted]
    groups = [paths[first : first + PATHS_PER_TASK] for first in range(0, len(paths), PATHS_PER_TASK)]
    calls = ((f"{i:06d}", (group, context.seed)) for i, group in enumerate(groups))
    for _, found in context.spread(_members_of_parts, calls, shared=wanted):
        for mine, part in zip(taken, found, strict=True):
            mine.add(*part)
    return taken


def _members_of_parts(
    paths: Sequence[str], seed: int, wanted: Sequence[ChosenClusters]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per seed set (leaf, key, image_id) of what these parts of the clusters can give."""
    taken = [order.FirstPerGroup(one.limits) for one in wanted]
    for path in paths:
        ids, leaves = embedded.read_columns(path, ["image_id", "cluster_1"])
        for mine, one in zip(taken, wanted, strict=True):
            inside = one.chosen[leaves]
            members = ids[inside]
            mine.add(leaves[inside], retrieval.member_keys(members, seed, one.name), members)
    return [mine.result()[:3] for mine in taken]


def _seeds_in(
    seed_set: SeedSet, leaves: np.ndarray, chosen: np.ndarray, dimension: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, vectors, leaves) of the seeds that lie in chosen clusters."""
    ids, rows, labels, first = [np.empty(0, np.uint64)], [np.empty((0, dimension), np.float16)], [leaves[:0]], 0
    for piece in (p for group in stretches(seed_set.parts, TASK_ROWS) for p in group):
        part_ids, part_rows = piece.read(dimension)
        mine = leaves[first : first + len(part_ids)]
        first += len(part_ids)
        inside = np.isin(mine, chosen)
        ids.append(part_ids[inside])
        rows.append(part_rows[inside])
        labels.append(mine[inside])
    return np.concatenate(ids), np.concatenate(rows), np.concatenate(labels)


def _nearest_seeds(
    context: Context, generation: Generation, inputs: Inputs, members: Mapping[str, Members], prefix: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(seed_id, similarity) of every member of every set, in a pass over the pool's vectors."""
    names = list(members)
    found = {
        name: (np.full(len(m.ids), NO_ID, np.uint64), np.zeros(len(m.ids), np.float32)) for name, m in members.items()
    }
    groups = stretches(inputs.pool, TASK_ROWS)
    calls = [(f"{prefix}-{i:06d}", (group, inputs.opened.dimension)) for i, group in enumerate(groups)]
    retrieve_kept.spread(context, generation, nearest_in_pieces, calls, shared=[members[name] for name in names])
    for call, _ in calls:
        arrays = retrieve_kept.load(retrieve_kept.path_of(generation, call))
        for number, name in enumerate(names):
            places = arrays[f"places{number}"]
            found[name][0][places] = arrays[f"seed_ids{number}"]
            found[name][1][places] = arrays[f"similarity{number}"]
    for name in names:
        if np.any(found[name][0] == NO_ID):
            raise UserError(
                f"seed set {name}: the clusters hold images that the pool does not; cluster this pool first"
            )
    return found


def nearest_in_pieces(pieces: Sequence[Piece], dimension: int, members: Sequence[Members]) -> dict[str, np.ndarray]:
    """Per seed set the places in its members, seed ids and similarities of the members in these parts of the pool."""
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in members]
    for piece in pieces:
        ids, rows = piece.read(dimension)
        for mine, one in zip(found, members, strict=True):
            place = np.searchsorted(one.ids, ids)
            here = np.flatnonzero(place < len(one.ids))
            here = here[one.ids[place[here]] == ids[here]]
            places = place[here]
            nearest = retrieval.nearest_seed(rows[here], one.leaves[places], one.seeds, one.seed_ids, one.seed_leaves)
            mine.append((places, *nearest))
    arrays = {}
    for number, mine in enumerate(found):
        for index, name in enumerate(("places", "seed_ids", "similarity")):
            arrays[f"{name}{number}"] = np.concatenate([part[index] for part in mine])
    return arrays
