"""The mix: one row per image, what brought it, how often, and its weight.

DINOv2's 142 M counts an image once per retrieval; here an image is one row, `nominal` keeps the paper's count, and
`weight` says how often a trainer should draw it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.schemas import MIX

SHARES_TOLERANCE = 1e-6


def merge_sources(image_ids: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group (image, source) rows: (ids (n,) ascending, starts (n,) of their runs, rows (m, 2)).

    image_ids: (r,) uint64, sources: (r,) integers, one row per time a source brought an image. `rows` are the
    distinct (source, times) in order of id, then source.
    """
    order = np.lexsort((sources, image_ids))
    ids, kinds = image_ids[order], sources[order]
    if not len(ids):
        return ids, np.empty(0, np.int64), np.empty((0, 2), np.int64)
    new_pair = np.r_[True, (ids[1:] != ids[:-1]) | (kinds[1:] != kinds[:-1])]
    pairs = np.flatnonzero(new_pair)
    times = np.diff(np.r_[pairs, len(ids)])
    pair_ids = ids[pairs]
    starts = np.flatnonzero(np.r_[True, pair_ids[1:] != pair_ids[:-1]])
    return pair_ids[starts], starts, np.stack([kinds[pairs].astype(np.int64), times], axis=1)


def share_groups(names: Sequence[str], shares: Mapping[str, float]) -> tuple[np.ndarray, list[str]]:
    """(group of each source (s,), names of the groups): a source's own name before its kind.

    names: `seed:birds`, `retrieve:birds`, `balance`. shares: by those names, or by kind (`seed`, `retrieve`).
    Raises UserError for a share of nothing, a source without a share, or shares that do not add up to 1.
    """
    groups = list(shares)
    of = np.full(len(names), -1, np.int64)
    for index, name in enumerate(names):
        key = name if name in shares else name.split(":", 1)[0]
        if key not in shares:
            raise UserError(
                f"mix.shares: no share for {name}, which brings images; name it, or {key} for all of its kind"
            )
        of[index] = groups.index(key)
    idle = [key for index, key in enumerate(groups) if index not in of and shares[key] > 0]
    if idle:
        raise UserError(f"mix.shares: {idle[0]} brings no images; known: {', '.join(names) or 'none'}")
    if any(share < 0 for share in shares.values()):
        raise UserError("mix.shares: a share is below 0; shares are parts of 1")
    total = sum(shares.values())
    if abs(total - 1) > SHARES_TOLERANCE:
        raise UserError(f"mix.shares: they add up to {total:g}, not to 1")
    return of, groups


def group_weights(shares: Sequence[float], group_images: Sequence[int], images: int) -> np.ndarray:
    """(g,) float64: what an image gets from each group that brought it, so that draws have these shares, mean 1.

    group_images: images that the group brought, each counted once; images: all images of the mix.
    """
    counts = np.asarray(group_images, np.float64)
    return np.where(counts > 0, np.asarray(shares) * images / np.maximum(counts, 1), 0.0)


def group_members(starts: np.ndarray, rows: np.ndarray, group_of: np.ndarray, groups: int) -> np.ndarray:
    """(n, g) bool: whether a group brought the image. starts, rows: of `merge_sources`; group_of: (s,)."""
    image = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(rows)]))
    member = np.zeros((len(starts), groups), bool)
    member[image, group_of[rows[:, 0]]] = True
    return member


def nominal_counts(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) int64: times each image was brought."""
    return np.add.reduceat(rows[:, 1], starts) if len(starts) else np.empty(0, np.int64)


def mix_table(
    ids: np.ndarray, starts: np.ndarray, rows: np.ndarray, names: Sequence[str], weights: np.ndarray
) -> pa.Table:
    """Rows of the `mix` table. ids, starts, rows: of `merge_sources`; weights: (n,) float."""
    offsets = pa.array(np.r_[starts, len(rows)], pa.int32())
    values = pa.array(list(names), pa.string()).take(pa.array(rows[:, 0], pa.int64()))
    columns = [
        pa.array(ids, pa.uint64()),
        pa.ListArray.from_arrays(offsets, values),
        pa.array(nominal_counts(starts, rows), pa.int64()),
        pa.array(weights.astype(np.float32), pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=MIX)
