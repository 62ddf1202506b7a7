"""Clusters: a map of the centroids, sizes, members near and far, who drew from them; a page per shown cluster above
the leaves, so that one can go down through the levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit import charts, measures
from curation.audit.cluster_tables import (
    centroid_vectors,
    centroids,
    cluster_levels,
    cluster_members,
    hierarchy,
    labels_by_cluster,
    purity,
    selected_by_cluster,
)
from curation.audit.run_tables import RunTables
from curation.audit.scans import with_hash
from curation.audit.sections import SAMPLING, Section


@dataclass(frozen=True)
class Tree:
    """The hierarchy in arrays. paths: (leaves, levels) int, clusters of each leaf, leaf first; images: (leaves,) int.

    drawn: per leaf the images that each seed set drew into the manifest.
    """

    paths: np.ndarray
    images: np.ndarray
    drawn: Mapping[int, Mapping[str, int]]
    labels: pa.Table

    @property
    def levels(self) -> int:
        return int(self.paths.shape[1])

    def under(self, level: int, cluster: int) -> np.ndarray:
        """Rows of the leaves below a cluster; level from 1."""
        return np.flatnonzero(self.paths[:, level - 1] == cluster)

    def drawn_below(self, rows: np.ndarray) -> list[tuple[str, int]]:
        """Seed sets and what they drew from these leaves, most first."""
        total: dict[str, int] = {}
        for leaf in self.paths[rows, 0].tolist():
            for name, images in self.drawn.get(leaf, {}).items():
                total[name] = total.get(name, 0) + images
        return sorted(total.items(), key=lambda item: (-item[1], item[0]))


def section(run: RunTables) -> Section | None:
    """The overview of the clusters; under `pages` the pages of clusters above the leaves."""
    if not run.clusters:
        return None
    tree, share = _tree(run)
    chosen = choose_leaves(tree)
    members: dict[int, list[dict[str, Any]]] = {}
    for row in cluster_members(run.clusters, list(chosen), SAMPLING.cluster_members, 0, run.hidden):
        members.setdefault(row["cluster"], []).append(row)
    labels = _commonest(tree.labels, list(chosen))
    leaves = {c: _leaf(tree, c, choice, members.get(c, []), labels.get(c)) for c, choice in chosen.items()}
    counts = np.unique(tree.images, return_counts=True)
    sizes = list(zip(*(c.tolist() for c in counts), strict=True))
    top = tree.levels
    found = _page(run, tree, leaves, top + 1, None)
    return {
        **found,
        "levels": level_figures(tree),
        "clusters": len(tree.paths),
        "median": float(np.median(tree.images)) if len(tree.images) else 0.0,
        "largest": int(tree.images.max()) if len(tree.images) else 0,
        "touched": len(tree.drawn),
        "full_entropy": measures.entropy(tree.images),
        "shown_leaves": len(leaves),
        "leaf_pages": {
            c: "clusters" if top == 1 else name_of(2, int(tree.paths[tree.under(1, c)[0], 1])) for c in leaves
        },
        "label_share": share,
        "seed_entropy": seed_entropy(tree.drawn, len(tree.paths))[: SAMPLING.table_rows],
        "figure": charts.sizes(sizes, "Leaf clusters by size (heights grow with the logarithm)", "clusters"),
        "pages": [
            _page(run, tree, leaves, level, cluster)
            for level in range(top, 1, -1)
            for cluster in sorted({int(tree.paths[tree.under(1, c)[0], level - 1]) for c in leaves})
        ],
    }


def choose_leaves(tree: Tree) -> dict[int, str]:
    """Leaves to show and why: all where they are few, else the largest, those drawn from most, and random ones."""
    ids = tree.paths[:, 0]
    by_size = ids[np.lexsort((ids, -tree.images))].tolist()
    if len(by_size) <= SAMPLING.leaves:
        return dict.fromkeys(sorted(by_size), "")
    chosen = dict.fromkeys(by_size[: SAMPLING.largest_leaves], "one of the largest")
    by_draw = sorted(tree.drawn, key=lambda c: (-sum(tree.drawn[c].values()), c))
    known = set(by_size)
    for cluster in [c for c in by_draw if c not in chosen and c in known][: SAMPLING.drawn_leaves]:
        chosen[cluster] = "one that seed sets drew from most"
    rest = pa.table({"cluster": pa.array(ids[~np.isin(ids, list(chosen))], pa.uint64())})
    hashed = with_hash(rest, 0, "report clusters", "cluster").sort_by("hash")
    for cluster in hashed["cluster"].slice(0, SAMPLING.random_leaves).to_pylist():
        chosen[cluster] = "a random one"
    return chosen


def seed_entropy(drawn: Mapping[int, Mapping[str, int]], leaves: int) -> list[dict[str, Any]]:
    """Per seed set over how many leaves its images of the manifest are spread: entropy in bits, effective clusters."""
    by_set: dict[str, list[int]] = {}
    for row in drawn.values():
        for name, images in row.items():
            by_set.setdefault(name, []).append(images)
    return [
        {
            "seed_set": name,
            "images": sum(counts),
            "clusters": len(counts),
            "of": leaves,
            "entropy": measures.entropy(np.array(counts)),
            "effective": measures.effective(np.array(counts)),
            "most": max(counts) / sum(counts),
        }
        for name, counts in sorted(by_set.items())
    ]


def _tree(run: RunTables) -> tuple[Tree, float]:
    rows = hierarchy(run.clusters)
    names = cluster_levels(run.clusters)
    paths = np.stack([rows[name].to_numpy() for name in names], axis=1).astype(np.int64)
    drawn: dict[int, dict[str, int]] = {}
    for row in selected_by_cluster(run.manifest).to_pylist():
        drawn.setdefault(row["cluster"], {})[row["seed_set"]] = row["images"]
    labels, share = labels_by_cluster(run.images, run.clusters)
    return Tree(paths, rows["images"].to_numpy(), drawn, labels), share


def level_figures(tree: Tree) -> list[dict[str, Any]]:
    """Per level, leaf first: how many clusters, how large, how even, how pure."""
    found = []
    largest_leaf = int(tree.paths[:, 0].max()) + 1 if len(tree.paths) else 0
    for level in range(1, tree.levels + 1):
        _, group = np.unique(tree.paths[:, level - 1], return_inverse=True)
        sizes = np.bincount(group, weights=tree.images)
        group_of = np.zeros(largest_leaf, np.int64)
        group_of[tree.paths[:, 0]] = tree.paths[:, level - 1]
        found.append(
            {
                "level": level,
                "clusters": len(sizes),
                "median": float(np.median(sizes)) if len(sizes) else 0.0,
                "largest": float(sizes.max()) if len(sizes) else 0.0,
                "share": float(sizes.max() / sizes.sum()) if len(sizes) else 0.0,
                "gini": measures.gini(sizes),
                "effective": measures.effective(sizes),
                "purity": purity(tree.labels, group_of),
            }
        )
    return found


def _commonest(labels: pa.Table, leaves: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Of the leaves that hold labelled images: `labelled`, `purity` and the commonest (label, images)."""
    mine = labels.filter(pc.field("cluster").isin(pa.array(list(leaves), pa.int32())))
    found: dict[int, dict[str, Any]] = {}
    order = [("cluster", "ascending"), ("images", "descending"), ("label", "ascending")]
    for row in mine.sort_by(order).to_pylist():
        one = found.setdefault(row["cluster"], {"labelled": 0, "names": [], "most": row["images"]})
        one["labelled"] += row["images"]
        if len(one["names"]) < 4:
            one["names"].append((row["label"], row["images"]))
    for one in found.values():
        one["purity"] = one["most"] / one["labelled"]
    return found


def _leaf(
    tree: Tree, cluster: int, choice: str, members: list[dict[str, Any]], labels: dict[str, Any] | None
) -> dict[str, Any]:
    rows = tree.under(1, cluster)
    drawn = tree.drawn_below(rows)
    return {
        "cluster": cluster,
        "choice": choice,
        "images": int(tree.images[rows].sum()),
        "drawn": drawn,
        "entropy": measures.entropy(np.array([n for _, n in drawn])) if drawn else None,
        "members": members,
        "labels": labels,
    }


def name_of(level: int, cluster: int) -> str:
    """The file of the page of a cluster above the leaves, without its ending."""
    return f"cluster-{level}-{cluster}"


def _page(
    run: RunTables, tree: Tree, leaves: Mapping[int, dict[str, Any]], level: int, cluster: int | None
) -> dict[str, Any]:
    """The clusters one level below a cluster, those of the coarsest level for None: map, list, and leaves in full."""
    rows = np.arange(len(tree.paths)) if cluster is None else tree.under(level, cluster)
    below = level - 1
    children, more = _children(tree, leaves, rows, below)
    mapped, marks = below, children
    if cluster is None:
        # The finest level that a map can show whole.
        mapped = next((k for k in range(1, below) if len(np.unique(tree.paths[:, k - 1])) <= SAMPLING.map_marks), below)
        marks = _children(tree, leaves, rows, mapped, from_above=below > 1)[0]
    parents = [] if cluster is None else [int(c) for c in tree.paths[rows[0], level - 1 :]]
    mine = [leaves[c] for c in tree.paths[rows, 0].tolist() if c in leaves] if below == 1 else []
    images = [child["pictures"][0] for child in marks if child["pictures"]]
    images += [i for child in children for i in child["pictures"]]
    return {
        "level": level,
        "cluster": cluster,
        "below": below,
        "images_inside": int(tree.images[rows].sum()),
        "leaves_inside": len(rows),
        "drawn": tree.drawn_below(rows),
        "crumbs": [(k + level, c) for k, c in enumerate(parents)][::-1],
        "children": children,
        "more_children": more,
        "leaves": sorted(mine, key=lambda leaf: (-leaf["images"], leaf["cluster"])),
        "mapped": mapped,
        "map": _map(run, mapped, cluster, marks),
        "images": list(dict.fromkeys([*images, *[m["image_id"] for leaf in mine for m in leaf["members"]]])),
    }


def _children(
    tree: Tree, leaves: Mapping[int, dict[str, Any]], rows: np.ndarray, level: int, from_above: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """The clusters of a level that hold the leaves of these rows: those with a page first, then by size; how many
    smaller ones are left out. from_above: their links are those of a page above their own."""
    ids, group = np.unique(tree.paths[rows, level - 1], return_inverse=True)
    sizes = np.bincount(group, weights=tree.images[rows]).astype(np.int64) if len(rows) else np.empty(0, np.int64)
    shown: dict[int, list[dict[str, Any]]] = {}
    for row in rows[np.isin(tree.paths[rows, 0], list(leaves))].tolist():
        shown.setdefault(int(tree.paths[row, level - 1]), []).append(leaves[int(tree.paths[row, 0])])
    by_size = np.lexsort((ids, -sizes)).tolist()
    listed = [i for i in by_size if int(ids[i]) in shown]
    listed += [i for i in by_size if int(ids[i]) not in shown][: max(0, SAMPLING.table_rows - len(listed))]
    found = []
    for i in listed:
        child, below = int(ids[i]), rows[group == i]
        drawn = tree.drawn_below(below)
        page = f"{name_of(2, int(tree.paths[below[0], 1]))}.html" if from_above and tree.levels > 1 else ""
        link = f"{page}#c-{child}" if level == 1 else f"{name_of(level, child)}.html"
        found.append(
            {
                "cluster": child,
                "images": int(sizes[i]),
                "drawn": drawn,
                "entropy": measures.entropy(np.array([n for _, n in drawn])) if drawn else None,
                "leaves": len(below),
                "href": link if child in shown else None,
                "pictures": _pictures(shown.get(child, []), 4),
            }
        )
    return found, len(ids) - len(found)


def _pictures(leaves: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """The image nearest the centroid of each leaf, the largest leaf first, and their next ones while there is room."""
    ordered = sorted(leaves, key=lambda leaf: (-leaf["images"], leaf["cluster"]))
    near = [[m["image_id"] for m in leaf["members"] if m["choice"] == "nearest"] for leaf in ordered]
    found = [some[place] for place in range(count) for some in near if len(some) > place]
    return found[:count]


def _map(
    run: RunTables, level: int, parent: int | None, children: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Marks and dots of `charts.cluster_map`, pictures by image id; None where there are no centroids to place."""
    if len(run.centroids) < level:
        return None
    table = centroids(run.centroids[level - 1], None if parent is None else [parent], SAMPLING.map_dots)
    if table.num_rows < 3:
        return None
    sizes = table["size"].to_numpy().astype(np.float64)
    points = measures.plane(centroid_vectors(table), sizes)
    marked = [{**child, "image": child["pictures"][0] if child["pictures"] else None} for child in children]
    return arranged(table["cluster"].to_pylist(), points, sizes, marked)


def arranged(
    ids: Sequence[int], points: np.ndarray, sizes: np.ndarray, children: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Marks and dots of `charts.cluster_map`, moved apart where they overlap.

    ids, points (n, 2), sizes (n,): all clusters. children: those that are marked, {cluster, images, drawn: [(seed set,
    images)], href, image}; `image` becomes the mark's, whose `picture` is left to the page.
    """
    width, height = charts.MAP_SIZE
    low, high = np.quantile(points, 0.01, axis=0), np.quantile(points, 0.99, axis=0)
    scaled = np.clip((points - low) / np.maximum(high - low, 1e-12), 0, 1)
    places = 46 + scaled * (np.array([width, height]) - (92, 104))
    places[:, 1] = height - places[:, 1]
    at = {int(c): i for i, c in enumerate(ids)}
    marked = [child for child in children if child["cluster"] in at][: SAMPLING.map_marks]
    rows = np.array([at[child["cluster"]] for child in marked], np.int64)
    share = np.array([child["images"] for child in marked], float)
    radii = 14 + 22 * np.sqrt(share / max(1.0, share.max(initial=1)))
    radii *= min(2.2, float(np.sqrt(0.26 * width * height / max(1.0, (4 * radii**2).sum()))))
    moved = measures.spread_out(places[rows], radii * 1.3, width, height - 14)
    marks = [
        {
            "x": float(x),
            "y": float(y),
            "radius": float(radius),
            "href": child["href"],
            "name": str(child["cluster"]),
            "words": f"cluster {child['cluster']}: {child['images']:,} images"
            + (f", {sum(n for _, n in child['drawn']):,} drawn by seed sets" if child["drawn"] else ""),
            "drawn": bool(child["drawn"]),
            "image": child["image"],
        }
        for child, (x, y), radius in zip(marked, moved, radii, strict=True)
    ]
    shown = {child["cluster"] for child in marked}
    dots = [
        (float(x), float(y), float(2 + 8 * np.sqrt(size / sizes.max())))
        for c, (x, y), size in zip(ids, places, sizes, strict=True)
        if c not in shown
    ]
    return {"marks": marks, "dots": dots, "clusters": len(ids)}
