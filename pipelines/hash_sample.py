"""The sample of pool images on which the PCA hash is fitted: the first by hash of their ids, decoded for this alone."""

from collections.abc import Sequence

import numpy as np

from curation import locations, order
from embeddings import decoding, hashes
from pipelines.context import Context
from pipelines.image_parts import Part, read_images, role

PARTS_PER_TASK = 64
IMAGES_PER_TASK = 64


def sample_luminance(context: Context, parts: Sequence[Part], count: int) -> np.ndarray:
    """(n, 32, 32) uint8: luminances of up to `count` pool images, in hash order of their ids."""
    groups = [[part.path for part in parts[at : at + PARTS_PER_TASK]] for at in range(0, len(parts), PARTS_PER_TASK)]
    calls = ((f"sample-{number:06d}", (paths, count, context.seed)) for number, paths in enumerate(groups))
    best: list[tuple[int, str, int, int]] = []
    for _, rows in context.spread(sample_candidates, calls, shared=None):
        best = _first_hashed([*best, *rows], count, context.seed)
    ranks = sorted(range(len(best)), key=lambda rank: best[rank][1:])  # by place: neighbours share an open file
    chunks = [ranks[at : at + IMAGES_PER_TASK] for at in range(0, len(ranks), IMAGES_PER_TASK)]
    calls_2 = (
        (f"luminance-{number:06d}", (chunk, [best[rank][1:] for rank in chunk])) for number, chunk in enumerate(chunks)
    )
    found: dict[int, np.ndarray] = {}
    for _, pairs in context.spread(sample_luminances, calls_2, shared=context.run.root):
        found.update(pairs)
    side = hashes.LUMINANCE_SIDE
    return np.array([found[rank] for rank in sorted(found)], np.uint8).reshape(-1, side, side)


def sample_candidates(paths: Sequence[str], count: int, seed: int, _: None) -> list[tuple[int, str, int, int]]:
    """The `count` usable pool images of these parts that come first in hash order: (id, shard, offset, length)."""
    rows = []
    for path in paths:
        table = read_images(path, ["image_id", "source", "status", "shard", "offset", "length"])
        for row in table.to_pylist():
            if row["status"] == "ok" and role(row["source"]) == "pool":
                rows.append((row["image_id"], row["shard"], row["offset"], row["length"]))
    return _first_hashed(rows, count, seed)


def _first_hashed(rows: list[tuple[int, str, int, int]], count: int, seed: int) -> list[tuple[int, str, int, int]]:
    ids = np.array([row[0] for row in rows], np.uint64)
    return [rows[at] for at in order.take_hashed(ids, count, seed, "pca_hash")]


def sample_luminances(
    ranks: Sequence[int], places: Sequence[tuple[str, int, int]], root: str
) -> list[tuple[int, np.ndarray]]:
    """(rank, luminance) of the images that can be decoded."""
    decoder = decoding.worker_decoder()
    found = []
    for rank, data in zip(ranks, locations.read_ranges(root, places), strict=True):
        if isinstance(data, OSError):
            continue
        try:
            found.append((rank, hashes.luminance(decoder.decode(data))))
        except decoding.DecodeError:
            continue
    return found
