"""The audit in a notebook: a run's tables as Arrow, its figures as matplotlib ones (docs/report.md).

Every function takes what `open_run` gives. What the run hides is in no table that names images; counts are of all rows,
as the stages made them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.audit import cluster_tables, figures, funnel, measures, retrieval_tables, score_tables, tables
from curation.audit.run_tables import RunTables
from curation.audit.sections import balance as balance_section
from curation.audit.sections import duplicates as duplicates_section
from curation.audit.sections import filters as filters_section
from curation.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def flow(run: RunTables) -> pa.Table:
    """`role`, `step`, `stage`, `images`, `lost`, `reasons` (list of {reason, images}): the funnel."""
    rows = [
        {
            "role": role,
            "step": step["step"],
            "stage": step["stage"],
            "images": step["images"],
            "lost": sum(entry["images"] for entry in step["lost"]),
            "reasons": step["lost"],
        }
        for role, steps in _funnel(run).items()
        for step in steps
    ]
    reasons = pa.list_(pa.struct([("reason", pa.string()), ("images", pa.int64())]))
    kinds = [pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64(), reasons]
    names = ["role", "step", "stage", "images", "lost", "reasons"]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(zip(names, kinds, strict=True))))


def failures(run: RunTables, hosts: int = 100) -> pa.Table:
    """`host`, `status`, `reason`, `images`: the most frequent of what was not fetched or not decoded."""
    return tables.host_failures(run.images, hosts)[0]


def scores(run: RunTables, name: str) -> pa.Table:
    """`low`, `high`, `images`: the histogram of a score: nsfw, contrast, min_side, aspect_ratio or faces."""
    score = _score(name)
    counts = score_tables.score_figures(run.images, {}, 1)[name]["counts"]
    return pa.table({"low": score.edges[:-1], "high": score.edges[1:], "images": counts})


def around_threshold(run: RunTables, name: str, each: int = 20) -> pa.Table:
    """`image_id`, `value`, `dropped_side`: the images nearest the threshold of a score, `each` on either side."""
    _score(name)
    limits = filters_section.limits(run.options.get("filter", {}))
    rows = score_tables.score_figures(run.images, {name: limits.get(name)}, each, run.hidden)[name]["around"]
    kinds = [("image_id", pa.uint64()), ("value", pa.float64()), ("dropped_side", pa.bool_())]
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def components(run: RunTables, largest: int = 20) -> pa.Table:
    """`component_id`, `images`: the largest components of near-duplicates."""
    _needs(run.duplicates, "dedup")
    chosen, _ = tables.components(run.duplicates, "component_id", largest, 0, 0)
    return chosen.select(["group", "images"]).rename_columns(["component_id", "images"])


def component_members(run: RunTables, component_id: int) -> pa.Table:
    """`image_id`, `kept`, `reason`, `nearest_id`, `similarity`: the members of a component, those kept first."""
    _needs(run.duplicates, "dedup")
    wanted = pa.array([component_id], pa.uint64())
    return tables.component_members(run.duplicates, "component_id", wanted, hidden=run.hidden).drop_columns(["group"])


def similarities(run: RunTables) -> pa.Table:
    """`low`, `high`, `images`: by the cosine of each image to its nearest one, from the lowest stored up."""
    _needs(run.duplicates, "dedup")
    counts, edges = duplicates_section.similarity_counts(run)
    return pa.table({"low": edges[:-1], "high": edges[1:], "images": counts})


def reference_hits(run: RunTables, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9)) -> pa.Table:
    """`reference_set`, `images` with a direct hit, `dropped` of these, `at`: counts above each threshold."""
    _needs(run.duplicates, "dedup")
    return tables.reference_summary(run.duplicates, thresholds)


def reference_matches(run: RunTables, each: int = 20) -> pa.Table:
    """`reference_set`, `choice` (best, weakest, random), `image_id`, `reference_id`, `similarity`, `kept`, `reason`."""
    _needs(run.duplicates, "dedup")
    names = [("reference_set", pa.string()), ("choice", pa.string()), ("image_id", pa.uint64())]
    names += [
        ("reference_id", pa.uint64()),
        ("similarity", pa.float32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
    rows = tables.reference_samples(run.duplicates, each, 0, run.hidden)
    return pa.Table.from_pylist([{n: row[n] for n, _ in names} for row in rows], schema=pa.schema(names))


def clusters(run: RunTables, level: int = 1) -> pa.Table:
    """`cluster`, `images`, `x`, `y`: clusters of a level and their centroids on two principal components."""
    _needs(run.clusters, "cluster")
    name = _level(run, level)
    sizes = cluster_tables.hierarchy(run.clusters).group_by(name).aggregate([("images", "sum")])
    sizes = sizes.rename_columns(["cluster", "images"]).sort_by("cluster")
    places: dict[int, tuple[float, float]] = {}
    if len(run.centroids) >= level:
        found = cluster_tables.centroids(run.centroids[level - 1], limit=1 << 16)
        if found.num_rows:
            points = measures.plane(cluster_tables.centroid_vectors(found), found["size"].to_numpy())
            places = dict(zip(found["cluster"].to_pylist(), map(tuple, points.tolist()), strict=True))
    for axis, column in enumerate(("x", "y")):
        values = [places[c][axis] if c in places else None for c in sizes["cluster"].to_pylist()]
        sizes = sizes.append_column(column, pa.array(values, pa.float64()))
    return sizes


def cluster_members(run: RunTables, cluster: int, each: int = 20) -> pa.Table:
    """`image_id`, `cluster`, `distance`, `choice`: members of a leaf nearest to the centroid, farthest, and random."""
    _needs(run.clusters, "cluster")
    names = [("image_id", pa.uint64()), ("cluster", pa.int32()), ("distance", pa.float32()), ("choice", pa.string())]
    rows = cluster_tables.cluster_members(run.clusters, [cluster], each, 0, run.hidden)
    return pa.Table.from_pylist(rows, schema=pa.schema(names))


def cluster_labels(run: RunTables) -> pa.Table:
    """`cluster` (leaf), `label`, `images`: of a sample where more than 4 million images have a label."""
    return cluster_tables.labels_by_cluster(run.images, run.clusters)[0]


def purity(run: RunTables) -> dict[str, Any]:
    """Of the leaves: `purity`, `chance`, and of how many `images`, `labels`, `clusters`; None without labels."""
    return cluster_tables.purity(cluster_labels(run))


def seed_sets(run: RunTables) -> pa.Table:
    """`seed_set`, `nominal`, `unique`, `colliding`, `shared`, `alone`: what each brought into the manifest."""
    _needs(run.manifest, "manifest")
    return tables.seed_set_counts(run.manifest)


def similarity_by_rank(run: RunTables) -> pa.Table:
    """`seed_set`, `mode`, `rank`, `low`, `median`, `high`: quantiles 0.1, 0.5 and 0.9 of the cosine to the seed."""
    _needs(run.retrieval, "retrieve")
    rows = []
    for (seed_set, mode), found in retrieval_tables.similarities(run.retrieval).items():
        for rank, (low, median, high) in zip(*(v.tolist() for v in found.curve()), strict=True):
            rows.append({"seed_set": seed_set, "mode": mode, "rank": rank, "low": low, "median": median, "high": high})
    return pa.Table.from_pylist(rows)


def retrieved(run: RunTables, seeds: int = 8, each: int = 8) -> pa.Table:
    """Rows of RETRIEVAL: some seeds of each seed set in hash order, and the most similar images each drew."""
    _needs(run.retrieval, "retrieve")
    return retrieval_tables.seed_samples(run.retrieval, seeds, each, 0, run.hidden)


def balance(run: RunTables) -> pa.Table:
    """`level`, `of` (pool, balanced sample, manifest), `clusters`, `effective`, `entropy` (bits), `gini`."""
    _needs(run.clusters, "cluster")
    rows = [
        {"level": level, "of": name, "clusters": len(counts), **balance_section.evenness(counts)}
        for level, by_name in balance_section.cluster_counts(run).items()
        for name, counts in by_name.items()
    ]
    return pa.Table.from_pylist(rows).select(["level", "of", "clusters", "effective", "entropy", "gini"])


def plot_flow(run: RunTables, role: str = "pool") -> "Figure":
    """The funnel of pool, seed or reference images."""
    return figures.flow(_funnel(run).get(role, []))


def plot_failures(run: RunTables, hosts: int = 20) -> "Figure":
    """The hosts that lost most."""
    found = tables.failing_hosts(run.images, hosts).to_pylist()
    return figures.bars([r["host"] or "(no URL)" for r in found], [r["images"] for r in found], "Rows lost by host")


def plot_scores(run: RunTables, name: str) -> "Figure":
    """The histogram of a score with its threshold."""
    score, table = _score(name), scores(run, name)
    limit = filters_section.limits(run.options.get("filter", {})).get(name)
    return figures.histogram(table["images"].to_numpy(), score.edges, score.title, limit, score.log)


def plot_similarities(run: RunTables) -> "Figure":
    """Cosines to the nearest image, with the threshold."""
    _needs(run.duplicates, "dedup")
    counts, edges = duplicates_section.similarity_counts(run)
    return figures.histogram(counts, edges, "Cosine to the nearest image", run.option("dedup", "threshold"))


def plot_clusters(run: RunTables, level: int = 1) -> "Figure":
    """The map of the centroids of a level. Raises UserError where the run has no centroids."""
    table = clusters(run, level)
    table = table.filter(pc.is_valid(table["x"]))
    if not table.num_rows:
        raise UserError(f"{run.root}: no centroids of level {level} are stored")
    places = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    return figures.plane(places, table["images"].to_numpy(), f"Clusters of level {level}")


def plot_retrieval(run: RunTables) -> "Figure":
    """Similarity by rank, a curve per seed set of sample mode (in cluster mode the rank is no order of similarity)."""
    _needs(run.retrieval, "retrieve")
    found = retrieval_tables.similarities(run.retrieval)
    curves = {seed_set: one.curve() for (seed_set, mode), one in found.items() if mode == "sample"}
    return figures.curves(curves, "Similarity of what the seeds drew")


def plot_balance(run: RunTables, level: int = 1) -> "Figure":
    """Shares of the clusters of a level in the pool and in what was drawn."""
    _needs(run.clusters, "cluster")
    counts = balance_section.cluster_counts(run)[_level(run, level)]
    after = counts.get(balance_section.AFTER, counts.get(balance_section.CHOSEN, counts[balance_section.BEFORE]))
    return figures.shares(counts[balance_section.BEFORE], after, f"Clusters of level {level}")


def _funnel(run: RunTables) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """As the data card has it, else counted from the tables."""
    if run.card:
        return dict(json.loads(storage.read_bytes(run.card))["counts"]["funnel"])
    fetched = tables.status_counts(run.fetched).to_pylist()
    filtered = tables.status_counts(run.images).to_pylist() if run.images != run.fetched else None
    duplicates = tables.duplicate_counts(run.duplicates).to_pylist() if run.duplicates else None
    return funnel.funnel(run.sources, fetched, filtered, duplicates, {}, None)


def _score(name: str) -> score_tables.Score:
    for score in score_tables.SCORES:
        if score.name == name:
            return score
    raise UserError(f"{name}: no such score; there are {', '.join(s.name for s in score_tables.SCORES)}")


def _level(run: RunTables, level: int) -> str:
    names = cluster_tables.cluster_levels(run.clusters)
    if not 1 <= level <= len(names):
        raise UserError(f"level {level}: the run has levels 1 (leaf) to {len(names)}")
    return names[level - 1]


def _needs(paths: Sequence[str], stage: str) -> None:
    if not paths:
        raise UserError(f"the run has no finished {stage} stage")
