"""The hierarchy of clusters: who lies where, what was drawn from which cluster, how pure they are by the labels."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit.scans import (
    NOTHING,
    count_by,
    cut_text,
    firsts_per_group,
    merge_counts,
    open_parts,
    stream,
    with_hash,
)
from curation.order import hash_keys

LABELLED = 1 << 22
"""At most about so many labelled images are taken into account for the purity."""


def cluster_levels(paths: Sequence[str]) -> list[str]:
    """Names of the columns of a table of clusters, leaf first."""
    names = [n for n in open_parts(paths).schema.names if re.fullmatch(r"cluster_\d+", n)] if paths else []
    return sorted(names, key=lambda n: int(n.split("_")[1]))


def hierarchy(paths: Sequence[str]) -> pa.Table:
    """The leaf clusters that hold images: `cluster_1` ... `cluster_L`, `images`; by cluster_1."""
    return count_by(paths, {name: pc.field(name) for name in cluster_levels(paths)})


def cluster_members(
    paths: Sequence[str], chosen: Sequence[int], each: int, seed: int, hidden: np.ndarray = NOTHING
) -> list[dict[str, Any]]:
    """Images to show of the chosen leaf clusters: rows of `image_id`, `cluster`, `distance`, `choice`.

    choice: nearest to the centroid, farthest from it, random; `each` of every choice, an image once, by cluster.
    """
    columns = {"image_id": pc.field("image_id"), "cluster": pc.field("cluster_1"), "distance": pc.field("distance")}
    mine = pc.field("cluster_1").isin(pa.array(list(chosen), pa.int32()))
    orders = [("distance", "ascending"), ("distance", "descending"), ("hash", "ascending")]
    plans = [((place + 1) * each, [order, ("image_id", "ascending")]) for place, order in enumerate(orders)]
    tables = (with_hash(t, seed, "report clusters") for t in stream(paths, columns, mine, hidden))
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for choice, table in zip(
        ("nearest", "farthest", "random"), firsts_per_group(tables, "cluster", plans), strict=True
    ):
        taken: dict[int, int] = {}
        for row in [] if table is None else table.select(["image_id", "cluster", "distance"]).to_pylist():
            if row["image_id"] not in seen and taken.get(row["cluster"], 0) < each:
                seen.add(row["image_id"])
                taken[row["cluster"]] = taken.get(row["cluster"], 0) + 1
                found.append({**row, "choice": choice})
    return sorted(found, key=lambda row: row["cluster"])


def selected_by_cluster(manifest: Sequence[str]) -> pa.Table:
    """`cluster` (leaf), `seed_set`, `images`: what each seed set drew from each cluster into the manifest."""
    partial: list[pa.Table] = []
    for table in stream(manifest, ["clusters", "retrieved_by"], pc.list_value_length(pc.field("clusters")) > 0):
        leaf = pc.list_element(table["clusters"].combine_chunks(), 0)
        lists = table["retrieved_by"].combine_chunks()
        rows = pc.list_parent_indices(lists)
        flat = pa.table({"row": rows, "seed_set": pc.struct_field(lists.flatten(), "seed_set")})
        flat = flat.group_by(["row", "seed_set"]).aggregate([])
        flat = flat.append_column("cluster", pc.take(leaf, flat["row"]))
        counted = flat.group_by(["cluster", "seed_set"]).aggregate([([], "count_all")])
        partial.append(counted.rename_columns(["cluster", "seed_set", "images"]))
        if len(partial) > 64:
            partial = [merge_counts(partial, ["cluster", "seed_set"])]
    if not partial:
        kinds = {"cluster": pa.int32(), "seed_set": pa.string(), "images": pa.int64()}
        return pa.table({name: pa.array([], kind) for name, kind in kinds.items()})
    return merge_counts(partial, ["cluster", "seed_set"])


def centroids(path: str, parents: Sequence[int] | None = None, limit: int = 2048) -> pa.Table:
    """`cluster`, `parent`, `size`, `centroid` of the `limit` largest clusters of a level that hold images, by cluster.

    path: a file of centroids. parents: only clusters below these. Holds the limit and one row group.
    """
    where = pc.field("size") > 0
    if parents is not None:
        where &= pc.field("parent").isin(pa.array(list(parents), pa.int32()))
    best: pa.Table | None = None
    for table in stream([path], ["cluster", "parent", "size", "centroid"], where):
        both = table if best is None else pa.concat_tables([best, table])
        best = both.sort_by([("size", "descending"), ("cluster", "ascending")]).slice(0, limit).combine_chunks()
    if best is None:
        return pa.table({"cluster": pa.array([], pa.int32()), "size": pa.array([], pa.int64())})
    return best.sort_by("cluster").combine_chunks()


def centroid_vectors(table: pa.Table) -> np.ndarray:
    """(n, d) float32 of a table of `centroids`."""
    column = table["centroid"].combine_chunks()
    flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32)
    return flat.reshape(table.num_rows, -1)


def labels_by_cluster(images: Sequence[str], clusters: Sequence[str]) -> tuple[pa.Table, float]:
    """How often each label occurs in each leaf cluster: `cluster`, `label`, `images`; and the share looked at.

    Of more than LABELLED usable images with a label a sample in hash order is looked at. The last row of an id in
    `clusters` stands for all; images in no cluster do not count.
    """
    empty = pa.table({"cluster": pa.array([], pa.int32()), "label": pa.array([], pa.string())})
    empty = empty.append_column("images", pa.array([], pa.int64()))
    labelled = pc.is_valid(pc.field("label")) & (pc.field("status") == "ok")
    total = open_parts(images).count_rows(filter=labelled) if images and clusters else 0
    if not total:
        return empty, 1.0
    share = min(1.0, LABELLED / total)
    bound = np.uint64(min(2**64 - 1, int(share * 2**64)))
    ids, labels = [], []
    for table in stream(images, {"image_id": pc.field("image_id"), "label": cut_text("label")}, labelled):
        mine = hash_keys(table["image_id"].to_numpy(), 0, "report labels") <= bound
        ids.append(table["image_id"].to_numpy()[mine])
        labels.append(table["label"].filter(pa.array(mine)).combine_chunks().dictionary_encode())
    every = np.concatenate(ids)
    words = pa.chunked_array(labels).unify_dictionaries().combine_chunks()
    words = words.chunk(0) if isinstance(words, pa.ChunkedArray) else words
    order = np.argsort(every, kind="stable")
    every, codes = every[order], words.indices.to_numpy()[order]
    leaf = np.full(len(every), -1, np.int64)
    for table in stream(clusters, ["image_id", "cluster_1"]):
        wanted = table["image_id"].to_numpy()
        at = np.minimum(np.searchsorted(every, wanted), max(0, len(every) - 1))
        found = every[at] == wanted if len(every) else np.zeros(len(wanted), bool)
        leaf[at[found]] = table["cluster_1"].to_numpy()[found]
    inside = leaf >= 0
    names = len(words.dictionary)
    pairs, counts = np.unique(leaf[inside] * names + codes[inside], return_counts=True)
    if not len(pairs):
        return empty, share
    return (
        pa.table(
            {
                "cluster": pa.array(pairs // names, pa.int32()),
                "label": pc.take(words.dictionary, pa.array(pairs % names, pa.int64())),
                "images": pa.array(counts, pa.int64()),
            }
        ),
        share,
    )


def purity(counts: pa.Table, group_of: np.ndarray | None = None) -> dict[str, Any]:
    """Of `labels_by_cluster`: the share of images that have the commonest label of their cluster, and what says it.

    group_of: (leaves,) int, the coarser cluster of each leaf. Returns images, labels, clusters, `purity`, and `chance`:
    the share of the commonest label of all. Each cluster counts by its labelled images.
    """
    if not counts.num_rows:
        return {"images": 0, "labels": 0, "clusters": 0, "purity": None, "chance": None}
    group = counts["cluster"].to_numpy()
    group = group if group_of is None else group_of[group]
    table = pa.table({"group": pa.array(group), "label": counts["label"], "images": counts["images"]})
    merged = table.group_by(["group", "label"]).aggregate([("images", "sum")])
    best = merged.group_by("group").aggregate([("images_sum", "max")])
    total = int(pc.sum(counts["images"]).as_py())
    by_label = counts.group_by("label").aggregate([("images", "sum")])
    return {
        "images": total,
        "labels": by_label.num_rows,
        "clusters": best.num_rows,
        "purity": int(pc.sum(best["images_sum_max"]).as_py()) / total,
        "chance": int(pc.max(by_label["images_sum"]).as_py()) / total,
    }
