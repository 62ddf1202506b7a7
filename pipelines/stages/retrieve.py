"""Retrieve: the pool images that the seed sets draw, by nearest neighbours or by cluster (curation/retrieval.py).

All seed sets share one pass over the pool's partitions. What a seed set drew, chose and collided with stands in
`seed_sets.json` beside the parts; part-SSS holds the rows of seed set number SSS, sorted by image_id.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import hierarchy, order, retrieval, vectors
from curation.clusters import nearest_centroid
from curation.errors import UserError
from curation.hierarchy import Hierarchy
from curation.retrieval import Draws, Neighbours
from curation.schemas import RETRIEVAL
from curation.vectors import VectorSet
from pipelines import embedded
from pipelines.context import Context, Outcome, StageConfig
from pipelines.embedded import EmbeddingPart
from pipelines.run_directory import Generation

NAME = "retrieve"
REVISION = 1
LIBRARIES = ("faiss-cpu", "numpy")
SAMPLE_ABOVE = 1_000_000
"""Mode `auto`: seed sets of more images go by sample, others by cluster (DINOv2, appendix A.4)."""
SLAB_ROWS = 65_536
TASK_ROWS = 262_144
"""Pool images compared at a time, and per task; the result depends on neither."""
PART_ROWS = 1_000_000
NEXT_BEST_DEPTHS = (8, 32, 128)
"""Policy next_best looks at so many times `neighbours` images per seed: further, when some find too few."""

Mode = Literal["auto", "sample", "cluster", "none"]


class SeedSetConfig(StageConfig):
    """What one seed set does otherwise; what is not given is as for all sets."""

    mode: Mode | None = Field(None, description="auto, sample, cluster or none (draw nothing)")
    neighbours: int | None = Field(None, ge=1, description="sample mode: pool images per seed image")
    per_cluster: int | None = Field(None, ge=1, description="cluster mode: images from each chosen cluster")
    min_seeds: int | None = Field(None, ge=1, description="cluster mode: seeds that choose a cluster")
    cap: int | None = Field(None, ge=1, description="cluster mode: images in all")


class RetrieveConfig(StageConfig):
    """Options of `curate retrieve`."""

    model: str | None = Field(None, description="embedding to search; default: the first of embed.models")
    mode: Mode = Field("auto", description="auto: sample for seed sets over 1,000,000 images, else cluster")
    neighbours: int = Field(4, ge=1, description="sample mode: pool images per seed image")
    per_cluster: int = Field(10_000, ge=1, description="cluster mode: images from each chosen cluster")
    min_seeds: int = Field(4, ge=1, description="cluster mode: a cluster with so many seeds is chosen")
    cap: int = Field(
        1_000_000, ge=1, description="cluster mode: images per seed set at most, round-robin over clusters"
    )
    collisions: Literal["keep_all", "unique", "next_best"] = Field(
        "keep_all",
        description="sample mode, an image near several seeds: a row for each (the paper), for the nearest only, "
        "or for the nearest while the others take their next one",
    )
    seed_sets: dict[str, SeedSetConfig] = Field(default_factory=dict, description="per seed set: what differs")


@dataclass
class SeedSet:
    """A seed set and its settings, with its mode decided."""

    number: int
    name: str
    parts: list[EmbeddingPart]
    mode: Literal["sample", "cluster", "none"]
    neighbours: int
    per_cluster: int
    min_seeds: int
    cap: int

    @property
    def paths(self) -> list[str]:
        return [part.path for part in self.parts if part.rows]

    @property
    def seeds(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass
class Retrieved:
    """What a seed set drew. clusters: (n,) int32 of each row in cluster mode."""

    draws: Draws
    clusters: np.ndarray | None
    counts: dict[str, Any]
    chosen: list[dict[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """The pool, the seed sets and the clusters that the stage reads."""

    stages: list[str]
    extra: dict[str, Any]
    pool: list[EmbeddingPart]
    opened: VectorSet
    sets: list[SeedSet]
    clusters: list[str]
    hierarchy: Hierarchy | None


def execute(
    context: Context,
    config: RetrieveConfig,
    *,
    embeddings: str | None = None,
    seeds: Mapping[str, str] | None = None,
    clusters: str | None = None,
) -> Outcome:
    """Retrieve for the seed sets of a run, or for the plain folders `seeds` (by name) from the pool `embeddings`."""
    if embeddings is not None:
        inputs = _plain_inputs(context, config, embeddings, seeds or {}, clusters)
    else:
        inputs = _run_inputs(context, config)
    options = config.fingerprint_options()
    options["model"] = inputs.stages[0] if inputs.stages else None
    generation = context.begin_snapshot(NAME, REVISION, options, inputs.stages, LIBRARIES, inputs.extra)
    if generation is None:
        return context.skipped(NAME)
    if not inputs.sets:
        context.events.emit("warning", NAME, text="the run has no seed sets: nothing is retrieved")
    with embedded.bad_input_taken_back(context, generation):
        found = _sampled(context, config, inputs) | _clustered(context, config, inputs)
        return _write(context, generation, inputs, found)


# ---- what is read ---------------------------------------------------------------------------------------------------


def _run_inputs(context: Context, config: RetrieveConfig) -> Inputs:
    stage = embedded.stage_of(context, config.model)
    generations = context.run.stage(stage).generations()
    pool = embedded.pool_parts(context, generations)
    opened = embedded.open_parts(pool)
    sets = _seed_sets(config, embedded.seed_parts(context, generations))
    _check_seeds(sets, opened, context.run.path(stage))
    folder, paths = None, []
    if any(s.mode == "cluster" for s in sets):
        clustered = context.run.stage("cluster").generations()
        if not clustered:
            raise UserError(
                f"{context.run.path('cluster')}: no clusters; run `curate cluster` first, or use mode sample"
            )
        if stage not in clustered[-1].consumed:
            raise UserError(
                f"{context.run.path('cluster')} was made from {', '.join(clustered[-1].consumed)}, not {stage}"
            )
        done = {number for generation in clustered for number in generation.consumed.get(stage, [])}
        if any(generation.number not in done for generation in generations):
            raise UserError(f"{context.run.path('cluster')} lacks the newest images; run `curate cluster` first")
        folder = clustered[-1].directory
        paths = [path for generation in clustered for path in generation.part_paths]
    built = hierarchy.read_hierarchy(folder)[0] if folder else None
    return Inputs([stage, "cluster"], {}, pool, opened, sets, paths, built)


def _plain_inputs(
    context: Context, config: RetrieveConfig, embeddings: str, seeds: Mapping[str, str], clusters: str | None
) -> Inputs:
    opened, pool = embedded.folder_parts(embeddings)
    vectors.refuse_repeated_ids(opened.all_ids(), embeddings)
    extra: dict[str, Any] = {"embeddings": embedded.files_digest(part.path for part in pool)}
    parts: dict[str, list[EmbeddingPart]] = {}
    for name, folder in seeds.items():
        seed_vectors, parts[name] = embedded.folder_parts(folder)
        vectors.refuse_other_model(opened, seed_vectors, embeddings, folder)
        vectors.refuse_repeated_ids(seed_vectors.all_ids(), folder)
        extra[f"seeds {name}"] = embedded.files_digest(part.path for part in parts[name])
    sets = _seed_sets(config, parts)
    by_cluster = next((s for s in sets if s.mode == "cluster"), None)
    if by_cluster is None:
        return Inputs([], extra, pool, opened, sets, [], None)
    if clusters is None:
        raise UserError(
            f"seed set {by_cluster.name} ({by_cluster.seeds:,} seeds) goes by cluster: "
            "give --clusters DIR (of `curate cluster`), or --mode sample"
        )
    paths = embedded.cluster_paths(clusters)
    built, _, model = hierarchy.read_hierarchy(clusters)
    if built.dimension != opened.dimension or (model and opened.model and model != opened.model):
        raise UserError(
            f"{clusters} was made from embeddings of another model than {embeddings}; cluster this pool first"
        )
    pool_ids = embedded.ids_digest(context, (part.path for part in pool))
    if embedded.ids_digest(context, paths) != pool_ids:
        raise UserError(f"{clusters} holds clusters of another pool than {embeddings}; cluster this pool first")
    extra["clusters"] = embedded.files_digest([*paths, *hierarchy.level_paths(clusters)])
    return Inputs([], extra, pool, opened, sets, paths, built)


def _seed_sets(config: RetrieveConfig, parts: Mapping[str, list[EmbeddingPart]]) -> list[SeedSet]:
    for name in config.seed_sets:
        if name not in parts:
            close = difflib.get_close_matches(name, parts, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(parts) or 'none'}"
            raise UserError(f"retrieve.seed_sets.{name}: no such seed set; {hint}")
    return [_settled(config, number, name, parts[name]) for number, name in enumerate(parts)]


def _settled(config: RetrieveConfig, number: int, name: str, parts: list[EmbeddingPart]) -> SeedSet:
    own = config.seed_sets.get(name, SeedSetConfig())  # type: ignore[call-arg]
    mode = own.mode or config.mode
    if mode == "auto":
        mode = "sample" if sum(part.rows for part in parts) > SAMPLE_ABOVE else "cluster"
    return SeedSet(
        number,
        name,
        parts,
        mode,
        own.neighbours or config.neighbours,
        own.per_cluster or config.per_cluster,
        own.min_seeds or config.min_seeds,
        own.cap or config.cap,
    )


def _check_seeds(sets: Sequence[SeedSet], opened: VectorSet, where: str) -> None:
    for seed_set in sets:
        if seed_set.paths:
            vectors.refuse_other_model(opened, vectors.open_files(seed_set.paths), where, f"seed set {seed_set.name}")


# ---- sample mode ----------------------------------------------------------------------------------------------------


def _sampled(context: Context, config: RetrieveConfig, inputs: Inputs) -> dict[str, Retrieved]:
    found: dict[str, Retrieved] = {}
    left = [s for s in inputs.sets if s.mode == "sample"]
    for depth in NEXT_BEST_DEPTHS if config.collisions == "next_best" else (1,):
        best = _nearest(context, inputs, left, depth) if left else []
        found |= {s.name: _drawn(config, s, neighbours) for s, neighbours in zip(left, best, strict=True)}
        # A seed that found all its neighbours taken looks further, as far as the pool goes.
        further = depth * min((s.neighbours for s in left), default=0) < inputs.opened.rows
        left = [s for s in left if further and found[s.name].counts.get("missing")]
    return found


def _nearest(context: Context, inputs: Inputs, sets: Sequence[SeedSet], depth: int) -> list[Neighbours]:
    """The depth * neighbours nearest pool images of every seed of these sets, in one pass over the pool."""
    asked = [(s.paths, min(depth * s.neighbours, inputs.opened.rows)) for s in sets]
    best = [Neighbours.none(s.seeds, count) for s, (_, count) in zip(sets, asked, strict=True)]
    bundles = _bundles([part for part in inputs.pool if part.rows])
    context.events.emit("parts", NAME, total=len(bundles), done=0)
    calls = ((str(i), (paths, inputs.opened.dimension)) for i, paths in enumerate(bundles))
    for done, (name, found) in enumerate(context.spread(_search, calls, shared=asked), 1):
        best = [old.merge(new) for old, new in zip(best, found, strict=True)]
        context.events.emit("part", NAME, part=name, rows=0, done=done, total=len(bundles))
    return best


def _drawn(config: RetrieveConfig, seed_set: SeedSet, neighbours: Neighbours) -> Retrieved:
    seed_ids = vectors.open_files(seed_set.paths).all_ids() if seed_set.paths else np.empty(0, np.uint64)
    draws = retrieval.all_draws(seed_ids, neighbours, seed_set.neighbours)
    counts: dict[str, Any] = {"neighbours": seed_set.neighbours, **retrieval.collisions(draws)}
    if config.collisions == "unique":
        draws = retrieval.unique_draws(draws)
    elif config.collisions == "next_best":
        draws = retrieval.next_best_draws(seed_ids, neighbours, seed_set.neighbours)
        counts["missing"] = seed_set.seeds * seed_set.neighbours - len(draws)
    return Retrieved(draws, None, counts)


def _bundles(parts: Sequence[EmbeddingPart]) -> list[list[str]]:
    """Consecutive parts of about TASK_ROWS images."""
    bundles: list[list[str]] = []
    rows = TASK_ROWS
    for part in parts:
        if rows + part.rows > TASK_ROWS:
            bundles.append([])
            rows = 0
        bundles[-1].append(part.path)
        rows += part.rows
    return bundles


def _search(paths: Sequence[str], dimension: int, asked: Sequence[tuple[list[str], int]]) -> list[Neighbours]:
    """Nearest images of a bundle for every seed set, asked: (paths of its seeds, neighbours)."""
    best: list[list[Neighbours]] = [[] for _ in asked]
    for ids, pool in _slabs(paths, dimension):
        for mine, (seed_paths, count) in zip(best, asked, strict=True):
            for index, path in enumerate(seed_paths):
                _, seeds = vectors.read_vectors(path, dimension)
                found = retrieval.nearest_neighbours(seeds, ids, pool, count)
                if index < len(mine):
                    mine[index] = mine[index].merge(found)
                else:
                    mine.append(found)
    return [
        Neighbours(np.concatenate([b.ids for b in mine]), np.concatenate([b.similarity for b in mine]))
        if mine
        else Neighbours.none(0, count)
        for mine, (_, count) in zip(best, asked, strict=True)
    ]


def _slabs(paths: Sequence[str], dimension: int) -> Any:
    """(ids, vectors) of about SLAB_ROWS images at a time: small parts are joined, so that seeds are read less often."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for index, path in enumerate(paths):
        held.append(vectors.read_vectors(path, dimension))
        if sum(len(ids) for ids, _ in held) >= SLAB_ROWS or index == len(paths) - 1:
            yield np.concatenate([ids for ids, _ in held]), np.concatenate([rows for _, rows in held])
            held = []


# ---- cluster mode ---------------------------------------------------------------------------------------------------


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
    seeds: np.ndarray
    seed_ids: np.ndarray
    seed_leaves: np.ndarray


def _clustered(context: Context, config: RetrieveConfig, inputs: Inputs) -> dict[str, Retrieved]:
    sets = [s for s in inputs.sets if s.mode == "cluster"]
    if not sets:
        return {}
    assert inputs.hierarchy is not None
    centroids = inputs.hierarchy.centroids[0]
    seed_leaves = _seed_leaves(context, sets, centroids)
    chosen = {s.name: retrieval.chosen_clusters(seed_leaves[s.name], s.min_seeds) for s in sets}
    wanted = []
    for s in sets:
        mask = np.zeros(len(centroids), bool)
        mask[chosen[s.name][0]] = True
        wanted.append(ChosenClusters(s.name, mask, np.where(mask, s.per_cluster, 0)))
    taken = [order.FirstPerGroup(w.limits) for w in wanted]
    calls = ((path, (path, context.seed)) for path in inputs.clusters)
    for _, found in context.spread(_members_of_part, calls, shared=wanted):
        for mine, part in zip(taken, found, strict=True):
            mine.add(*part)
    found_members, ranks, rows = {}, {}, {}
    for s, mine in zip(sets, taken, strict=True):
        leaves, keys, ids, rank = mine.result()
        kept = retrieval.round_robin(rank, keys, s.cap)
        kept = kept[np.argsort(ids[kept])]
        seed_ids, seed_vectors, labels = _seeds_in(s, seed_leaves[s.name], chosen[s.name][0], inputs.opened.dimension)
        found_members[s.name] = Members(ids[kept], leaves[kept], seed_vectors, seed_ids, labels)
        ranks[s.name], rows[s.name] = rank[kept], len(ids)
    nearest = _nearest_seeds(context, inputs, found_members)
    result = {}
    for s in sets:
        members = found_members[s.name]
        seed_id, similarity = nearest[s.name]
        draws = Draws(members.ids, seed_id, ranks[s.name].astype(np.int32), similarity)
        clusters, seeds = chosen[s.name]
        counts = {
            "clusters": len(clusters),
            "seeds_in_clusters": int(seeds.sum()),
            "before_cap": rows[s.name],
            **retrieval.collisions(draws),
        }
        per_cluster = np.bincount(members.leaves, minlength=len(centroids))
        listed = [
            {"cluster": int(c), "seeds": int(n), "images": int(per_cluster[c])}
            for c, n in zip(clusters, seeds, strict=True)
        ]
        result[s.name] = Retrieved(draws, members.leaves, counts, listed)
    return result


def _seed_leaves(context: Context, sets: Sequence[SeedSet], centroids: np.ndarray) -> dict[str, np.ndarray]:
    """The leaf cluster of every seed, in the order of its set's parts."""
    paths = [path for s in sets for path in s.paths]
    calls = ((path, (path, centroids.shape[1])) for path in paths)
    labels = dict(context.spread(_assign_seeds, calls, shared=centroids))
    return {s.name: np.concatenate([np.empty(0, np.int32), *(labels[path] for path in s.paths)]) for s in sets}


def _assign_seeds(path: str, dimension: int, centroids: np.ndarray) -> np.ndarray:
    return nearest_centroid(vectors.read_vectors(path, dimension)[1], centroids)[0]


def _members_of_part(
    path: str, seed: int, wanted: Sequence[ChosenClusters]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per seed set (leaf, key, image_id) of what one part of the clusters can give."""
    ids, leaves = embedded.read_columns(path, ["image_id", "cluster_1"])
    found = []
    for one in wanted:
        mine = one.chosen[leaves]
        groups, members = leaves[mine], ids[mine]
        keys = retrieval.member_keys(members, seed, one.name)
        rows, _ = order.first_per_group(groups, keys, members, one.limits)
        found.append((groups[rows], keys[rows], members[rows]))
    return found


def _seeds_in(
    seed_set: SeedSet, leaves: np.ndarray, chosen: np.ndarray, dimension: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, vectors, leaves) of the seeds that lie in chosen clusters."""
    ids, rows, labels, first = [np.empty(0, np.uint64)], [np.empty((0, dimension), np.float16)], [leaves[:0]], 0
    for path in seed_set.paths:
        part_ids, part_rows = vectors.read_vectors(path, dimension)
        mine = leaves[first : first + len(part_ids)]
        first += len(part_ids)
        inside = np.isin(mine, chosen)
        ids.append(part_ids[inside])
        rows.append(part_rows[inside])
        labels.append(mine[inside])
    return np.concatenate(ids), np.concatenate(rows), np.concatenate(labels)


def _nearest_seeds(
    context: Context, inputs: Inputs, members: Mapping[str, Members]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(seed_id, similarity) of every member of every set, in a second pass over the pool."""
    names = list(members)
    found = {
        name: (np.full(len(m.ids), retrieval.NO_ID, np.uint64), np.zeros(len(m.ids), np.float32))
        for name, m in members.items()
    }
    calls = ((part.path, (part.path, inputs.opened.dimension)) for part in inputs.pool if part.rows)
    for _, parts in context.spread(_nearest_in_part, calls, shared=[members[name] for name in names]):
        for name, (places, seed_ids, similarity) in zip(names, parts, strict=True):
            found[name][0][places] = seed_ids
            found[name][1][places] = similarity
    for name in names:
        if np.any(found[name][0] == retrieval.NO_ID):
            raise UserError(
                f"seed set {name}: the clusters hold images that the pool does not; cluster this pool first"
            )
    return found


def _nearest_in_part(
    path: str, dimension: int, members: Sequence[Members]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per seed set (places in its members, seed ids, similarities) of the members in one part of the pool."""
    ids, rows = vectors.read_vectors(path, dimension)
    found = []
    for one in members:
        place = np.searchsorted(one.ids, ids)
        here = np.flatnonzero(place < len(one.ids))
        here = here[one.ids[place[here]] == ids[here]]
        places = place[here]
        nearest = retrieval.nearest_seed(rows[here], one.leaves[places], one.seeds, one.seed_ids, one.seed_leaves)
        found.append((places, *nearest))
    return found


# ---- what is written ------------------------------------------------------------------------------------------------


def _write(context: Context, generation: Generation, inputs: Inputs, found: Mapping[str, Retrieved]) -> Outcome:
    generation.parts = []
    report: dict[str, Any] = {}
    drawn = [np.empty(0, np.uint64)]
    for s in inputs.sets:
        one = found.get(s.name)
        report[s.name] = {"mode": s.mode, "seeds": s.seeds}
        if one is None:
            continue
        for index, start in enumerate(range(0, len(one.draws), PART_ROWS)):
            table = _table(s, one, slice(start, start + PART_ROWS))
            generation.parts.append(generation.writer.write(f"part-{s.number:03d}-{index:06d}", table))
        report[s.name] |= {**one.counts, "rows": len(one.draws)}
        drawn.append(np.unique(one.draws.image_id))
        if not len(one.draws):
            context.events.emit(
                "warning", NAME, text=f"seed set {s.name} ({s.seeds:,} seeds, mode {s.mode}) drew nothing"
            )
    everything, times = np.unique(np.concatenate(drawn), return_counts=True)
    document = {
        name: counts | ({"chosen": found[name].chosen} if name in found and found[name].chosen else {})
        for name, counts in report.items()
    }
    generation.put_file("seed_sets.json", (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    summary = {
        "rows": sum(len(one.draws) for one in found.values()),
        "images": len(everything),
        "images_of_several_sets": int((times > 1).sum()),
        "seed_sets": report,
    }
    return context.finish(generation, summary)


def _table(seed_set: SeedSet, one: Retrieved, rows: slice) -> pa.Table:
    draws = one.draws
    count = len(draws.image_id[rows])
    clusters = pa.nulls(count, pa.int32()) if one.clusters is None else pa.array(one.clusters[rows], pa.int32())
    columns = [
        pa.array(draws.image_id[rows], pa.uint64()),
        pa.array([seed_set.name] * count, pa.string()),
        pa.array(draws.seed_id[rows], pa.uint64()),
        pa.array([seed_set.mode] * count, pa.string()),
        pa.array(draws.rank[rows], pa.int32()),
        pa.array(draws.similarity[rows], pa.float32()),
        clusters,
    ]
    return pa.Table.from_arrays(columns, schema=RETRIEVAL)
