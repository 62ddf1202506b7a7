"""Relative dedup: pool images that are copies of evaluation images (DINOv2, appendix A.3, cosine > 0.45).

The relative graph holds the kept pool images, the seeds that are not exempt, and the reference images. Its pool half
is joined like any pool; reference images are few and are compared with everything exactly. A component that holds a
reference image is discarded whole (`component`, the paper's rule), chains through kept pool images included; `direct`
discards only the images that are themselves above the threshold to a reference image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import products
from curation.device import heavy
from curation.duplicates.components import component_sizes, components
from curation.duplicates.forest import EDGE, ForestMerger, edges
from curation.duplicates.join import self_join
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import JoinOptions, Reducer, Spread, collect, serial
from curation.duplicates.tiles import Tile, exact_join, store, tiles

HITS_PER_SET = 8
HIT = np.dtype([("node", "<u4"), ("reference", "<u4"), ("similarity", "<f4")])
"""A direct hit: both nodes of the relative graph."""


@dataclass(frozen=True)
class RelativeJoin:
    """The relative graph as its forest, and the direct hits of the pool and seed images."""

    forest: np.ndarray
    hits: np.ndarray
    """(h,) HIT by (node, similarity descending, reference), at most HITS_PER_SET of each image and reference set."""
    references_hit: np.ndarray
    """Nodes of reference images with a direct hit, ascending."""
    report: dict[str, Any]
    cells: Any = None
    """The cells of the pool half, for later generations; None where it was compared exactly."""


def relative_join(
    images: Members,
    references: Members,
    ids: np.ndarray,
    offsets: np.ndarray,
    options: JoinOptions,
    scratch: Scratch,
    spread: Spread = serial,
    thresholds: Sequence[float] = (),
    **stored: Any,
) -> RelativeJoin:
    """Join pool and seed images, and reference images, with everything; pairs without a fresh end are left out.

    offsets: (spaces + 1,) int64, the first node of each space; images are space 0. ids: (images,) uint64 of space 0.
    stored: `cells` of an earlier generation, for the pool half.
    """
    parts = ForestMerger(images.count)
    report: dict[str, Any] = {"method": "exact", "vectors": images.rows, "recall": 1.0}
    cells = None
    if images.fresh_rows:
        found = self_join(images, ids, options, Scratch(f"{scratch.directory}/pool"), spread, thresholds, **stored)
        parts.add(found.forest)
        report, cells = found.report, getattr(found, "cells", None)
    between = Scratch(f"{scratch.directory}/references")
    store(references, between, spread)
    if references.fresh_rows:
        parts.add(exact_join(references, options, between, spread))
    cut = tiles(references)
    calls = [
        (f"cross/{k:05d}", (between, f"cross/{k:05d}", piece, images.dimension, cut, images.half, offsets, options))
        for k, piece in enumerate(images.pieces)
        if piece.fresh or any(tile.fresh for tile in cut)
    ]
    parts.add(collect(between, calls, join_references, spread, images.count, options))
    hits = [np.array(between.get(name, "hits")) for name, _ in calls]
    touched = [np.array(between.get(name, "touched")) for name, _ in calls]
    rows = np.concatenate([np.empty(0, HIT), *hits])
    order = np.lexsort((rows["reference"], -rows["similarity"], rows["node"]))
    return RelativeJoin(
        parts.result(), rows[order], np.unique(np.concatenate([np.empty(0, np.uint32), *touched])), report, cells
    )


@heavy
def join_references(
    scratch: Scratch,
    name: str,
    piece: Piece | Bundle,
    dimension: int,
    cut: Sequence[Tile],
    half: bool,
    offsets: np.ndarray,
    options: JoinOptions,
    _: Any,
) -> str:
    """One piece against all reference images: its forest, its best hits, the reference images it hits."""
    nodes, stored = piece.read(dimension)
    vectors = stored.astype(np.float32)
    reader = Reader(scratch)
    reducer = Reducer(options.max_edges)
    starts = np.zeros(len(nodes), np.int64)
    best = np.empty(0, HIT)
    touched: list[np.ndarray] = []
    for tile in cut:
        if not (piece.fresh or tile.fresh):
            continue
        others, right = tile.load(reader)
        for rows, columns, values in products.pairs_above(
            vectors, right, options.threshold, starts, half=half, on=products.device()
        ):
            reducer.add(edges(nodes[rows], others[columns], values))
            touched.append(np.unique(others[columns]))
            found = np.empty(len(rows), HIT)
            found["node"], found["reference"], found["similarity"] = nodes[rows], others[columns], values
            best = best_hits(np.concatenate([best, found]), offsets)
    scratch.put(
        name,
        {
            "forest": reducer.result(),
            "hits": best,
            "touched": np.unique(np.concatenate([np.empty(0, np.uint32), *touched])),
        },
    )
    return name


def best_hits(hits: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The HITS_PER_SET best of each image and reference set (ties: the smaller reference node)."""
    space = np.searchsorted(offsets, hits["reference"], side="right")
    order = np.lexsort((hits["reference"], -hits["similarity"], space, hits["node"]))
    hits, space = hits[order], space[order]
    new = (hits["node"][1:] != hits["node"][:-1]) | (space[1:] != space[:-1])
    first = np.flatnonzero(np.concatenate([[True], new]))
    place = np.arange(len(hits)) - np.repeat(first, np.diff(np.append(first, len(hits))))
    return np.asarray(hits[place < HITS_PER_SET])


@dataclass(frozen=True)
class Decontamination:
    """Which images the relative graph discards, by either rule, and what each reference set took."""

    labels: np.ndarray
    """(nodes,) uint32: smallest node of each node's component."""
    by_component: np.ndarray
    """(images,) bool: in a component that holds a reference image."""
    direct: np.ndarray
    """(images,) bool: itself above the threshold to a reference image."""
    largest: int
    """Images in the discarded component with the most of them."""
    sets: list[dict[str, Any]]


def decontaminate(
    forest: np.ndarray,
    hits: np.ndarray,
    references_hit: np.ndarray,
    offsets: np.ndarray,
    names: Sequence[str],
    threshold: float,
) -> Decontamination:
    """Both rules at a threshold. forest: (m,) EDGE of the relative graph; names: the reference sets in order."""
    images, nodes = int(offsets[1]), int(offsets[-1])
    labels = components(forest, nodes, threshold) if nodes else np.empty(0, np.uint32)
    above = hits[hits["similarity"] > np.float32(threshold)]
    # Images come first among the nodes: the label of an image is one.
    sizes = component_sizes(labels[:images])
    holds = np.zeros(nodes, bool)
    holds[labels[images:]] = True
    by_component = holds[labels[:images]]
    direct = np.zeros(images, bool)
    direct[above["node"]] = True
    sets = []
    for number, name in enumerate(names):
        low, high = int(offsets[number + 1]), int(offsets[number + 2])
        mine = np.zeros(nodes, bool)
        mine[labels[low:high]] = True
        in_set = (above["reference"] >= low) & (above["reference"] < high)
        touched = (references_hit >= low) & (references_hit < high)
        sets.append(
            {
                "reference_set": name,
                "images": high - low,
                "images_hit": int(touched.sum()),
                "direct": len(np.unique(above["node"][in_set])),
                "component": int(mine[labels[:images]].sum()),
                "largest_component": int(sizes[mine[:images]].max(initial=0)),
            }
        )
    return Decontamination(labels, by_component, direct, int(sizes[holds[:images]].max(initial=0)), sets)


def empty_relative() -> RelativeJoin:
    """The relative graph without reference images."""
    return RelativeJoin(np.empty(0, EDGE), np.empty(0, HIT), np.empty(0, np.uint32), {})
