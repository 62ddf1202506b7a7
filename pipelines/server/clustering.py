"""The clusters of an index: lists by size with labels and what was drawn, how even, how pure, where they lie."""

import numpy as np
import pyarrow as pa

from curation import storage
from curation.audit import measures
from curation.audit.cluster_tables import centroid_vectors, centroids, labels_by_cluster
from curation.audit.sections.balance import evenness
from curation.audit.sections.clusters import Tree, level_figures, seed_entropy
from pipelines.server.columns import ColumnWriter
from pipelines.server.workshop import Workshop

MOST_BROUGHT, MOST_LABELS = 40, 4
"""The row of a cluster holds so many of what brought its images, and of its labels: the most frequent."""
MOST_PLACES = 1 << 16
"""Clusters that have a place on the map."""
SHARES = ("pool", "balanced sample", "dataset")
"""Of what the shares of clusters are told."""
DRAWN = "retrieve:"
"""What stands before a seed set's name in the sources of a mix."""


def clusters(work: Workshop) -> None:
    """Lists and figures of every level, leaf first. Holds a few numbers per leaf cluster."""
    levels = range(1, work.levels + 1)
    path = ", ".join(f"cluster_{level}" for level in levels)
    work.db.execute(
        f"CREATE TABLE tree AS SELECT {path}, sum(images)::BIGINT AS images, sum(chosen)::BIGINT AS chosen, "
        f"sum(distance) AS distance FROM sizes GROUP BY {path} ORDER BY cluster_1"
    )
    if not work.tables.mix:
        work.db.execute("CREATE TABLE brought (cluster INTEGER, name VARCHAR, images BIGINT)")
    counts, share = labels_by_cluster(work.tables.images, work.tables.clusters)
    work.db.register("labels", counts)
    *paths, images, chosen = work.arrays(f"SELECT {path}, images, chosen FROM tree ORDER BY cluster_1")
    drawn: dict[int, dict[str, int]] = {}
    for row in work.dictionaries(
        f"SELECT cluster, substr(name, {len(DRAWN) + 1}) AS name, sum(images)::BIGINT AS images FROM brought "
        f"WHERE starts_with(name, '{DRAWN}') GROUP BY ALL ORDER BY ALL"
    ):
        drawn.setdefault(row["cluster"], {})[row["name"]] = row["images"]
    tree = Tree(np.stack(paths, axis=1).astype(np.int64), images, drawn, counts)
    work.document["levels"] = level_figures(tree)
    work.document["seed_entropy"] = seed_entropy(drawn, len(images))[:1000]
    work.document["entropy"] = measures.entropy(images)
    work.document["drawn_from"] = len(drawn)
    work.document["label_share"] = share
    sampled = {
        row["cluster"]: row["images"]
        for row in work.dictionaries(
            "SELECT cluster, sum(images)::BIGINT AS images FROM brought WHERE name = 'balance' GROUP BY cluster"
        )
    }
    balanced = np.array([sampled.get(leaf, 0) for leaf in paths[0].tolist()], np.int64)
    work.document["evenness"] = {}
    for level in levels:
        _shares(work, level, paths[level - 1], dict(zip(SHARES, (images, balanced, chosen), strict=True)))
        _rows(work, level)
    work.db.unregister("labels")


def _shares(work: Workshop, level: int, cluster: np.ndarray, of_leaves: dict[str, np.ndarray]) -> None:
    """How even the clusters of a level are; their counts, in the order of the clusters, in files of numbers."""
    _, group = np.unique(cluster, return_inverse=True)
    even = {}
    for name, counts in of_leaves.items():
        summed = np.bincount(group, weights=counts)
        if not summed.any():
            continue
        even[name] = evenness(summed) | {"clusters": int((summed > 0).sum())}
        column = ColumnWriter(f"{work.folder}/shares/{level}/{name}", np.float64)
        column.append(summed)
        column.close()
    work.document["evenness"][str(level)] = even


def _rows(work: Workshop, level: int) -> None:
    """The list of a level, the largest first, and where in it each cluster stands."""
    above = f"any_value(cluster_{level + 1})" if level < work.levels else "NULL::INTEGER"
    work.db.execute(
        f"CREATE OR REPLACE TABLE listed AS SELECT *, (row_number() OVER (ORDER BY images DESC, cluster) - 1)"
        f"::UINTEGER AS row FROM (SELECT cluster_{level} AS cluster, sum(images)::BIGINT AS images, "
        f"sum(chosen)::BIGINT AS chosen, sum(distance) / sum(images) AS distance, {above} AS parent "
        f"FROM tree GROUP BY cluster_{level})"
    )
    work.groups(f"listed_{level}", "SELECT cluster AS key, row FROM listed ORDER BY key")
    if level < work.levels:
        work.groups(f"below_{level + 1}", "SELECT parent AS key, row FROM listed ORDER BY key, row")
    places = _places(work, level)
    work.db.register("places", places)
    within = f"JOIN (SELECT cluster_1 AS leaf, cluster_{level} AS k FROM tree) ON leaf = cluster"
    brought = _commonest(f"SELECT k, name, sum(images)::BIGINT AS n FROM brought {within} GROUP BY ALL", MOST_BROUGHT)
    labels = _commonest(
        f"SELECT k, label AS name, sum(images)::BIGINT AS n FROM labels {within} GROUP BY ALL", MOST_LABELS
    )
    work.write_rows(
        f"clusters_{level}",
        "SELECT l.cluster, l.images, l.chosen, l.distance, p.x, p.y, l.parent, b.named AS brought, "
        "n.named AS labels, coalesce(n.total, 0)::BIGINT AS labelled "
        f"FROM listed l LEFT JOIN places p USING (cluster) LEFT JOIN ({brought}) b ON b.k = l.cluster "
        f"LEFT JOIN ({labels}) n ON n.k = l.cluster ORDER BY l.row",
    )
    work.db.unregister("places")


def _commonest(query: str, most: int) -> str:
    """A query for the `most` most frequent names of each k, as a list, and their total."""
    return (
        f"SELECT k, list({{'name': name, 'images': n}} ORDER BY n DESC, name)[:{most}] AS named, sum(n) AS total "
        f"FROM ({query}) GROUP BY k"
    )


def _places(work: Workshop, level: int) -> pa.Table:
    """`cluster`, `x`, `y`: the centroids of a level on their two principal components; empty without centroids."""
    path = storage.join(work.tables.clusters[-1].rsplit("/", 1)[0], "centroids", f"level-{level}.parquet")
    kinds = {"cluster": pa.int32(), "x": pa.float32(), "y": pa.float32()}
    held = (
        centroids(path, limit=MOST_PLACES) if storage.exists(path) else pa.table({"cluster": pa.array([], pa.int32())})
    )
    if not held.num_rows:
        return pa.table({name: pa.array([], kind) for name, kind in kinds.items()})
    at = measures.plane(centroid_vectors(held), held["size"].to_numpy())
    columns = [held["cluster"], *(pa.array(at[:, axis], pa.float32()) for axis in range(2))]
    return pa.table(dict(zip(kinds, columns, strict=True)))
