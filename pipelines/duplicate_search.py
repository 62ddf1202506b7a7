"""Duplicates by bytes, pixels and PCA hash over all parts of the pool, no process holding more than a bucket of them.

Parts are read once into scratch files, grouped by the digest of the pixels; a task per bucket finds the groups of equal
pixels and scatters what stays by each band of the PCA hash; a task per band and bucket finds near hashes. What comes
back to the driver are numbers of dropped images (17 bytes each) and pairs of near hashes (18 bytes each), never rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import exact, thresholds
from curation.blocklist import REASON, BlockList
from curation.thresholds import Thresholds
from pipelines import shuffle
from pipelines.context import Context
from pipelines.image_parts import read_images, role
from pipelines.shuffle import Scattered

FILTER = "filter"
PARTS_PER_TASK = 64
COLUMNS = ("image_id", *thresholds.COLUMNS, "sha256", "stored_sha256", "pixel_sha256", "pca_hash")


@dataclass(frozen=True)
class Deciding:
    """What every task of the filter needs to know. distance: of PCA hashes, in bits; -1: not compared."""

    thresholds: Thresholds
    exempt: frozenset[str]
    scratch: str
    distance: int
    blocked: BlockList | None = None


class DuplicateSearch:
    """Finds the duplicates that a generation of the filter drops; earlier generations are never changed."""

    def __init__(self, context: Context, number: int, deciding: Deciding) -> None:
        self._context = context
        self._number = number
        self._deciding = deciding
        self._ranges: dict[str, tuple[int, int]] = {}

    def search(self, paths: Sequence[str], rows: int) -> np.ndarray:
        """paths: the parts of score to decide on, together `rows` rows. Returns (n,) exact.DROP, sorted by id."""
        known = [g for g in self._context.run.stage(FILTER).generations() if g.number < self._number]
        settled = [path for g in known for path in g.part_paths]
        buckets = shuffle.bucket_count(rows + sum(part.rows for g in known for part in g.parts))
        scattered = self._read(paths, settled, buckets)
        calls = [(f"pixels-{b:05d}", (b, [f for _, f in scattered], buckets)) for b in range(buckets)]
        found = dict(self._context.spread(search_bucket, calls, shared=self._deciding))
        exact_drops = np.concatenate([found[name][0] for name in sorted(found)])
        bands = range(self._deciding.distance + 1)
        banded = [(band, b, [found[name][1][band] for name in sorted(found)]) for band in bands for b in range(buckets)]
        band_calls = [(f"hashes-{band:02d}-{b:05d}", (band, b, files)) for band, b, files in banded]
        pairs = [np.empty(0, exact.PAIR)]
        pairs += [found for _, found in self._context.spread(search_band, band_calls, shared=self._deciding)]
        return exact.follow_drops(exact_drops, exact.follow_originals(np.concatenate(pairs)))

    def of_part(self, path: str, drops: np.ndarray) -> np.ndarray:
        """Those of the drops between the least and the greatest id of a part: all of its own, perhaps others."""
        low, high = self._ranges[path]
        first = np.searchsorted(drops["id"], np.uint64(low), "left")
        last = np.searchsorted(drops["id"], np.uint64(high), "right")
        return np.asarray(drops[first:last])

    def _read(self, paths: Sequence[str], settled: Sequence[str], buckets: int) -> list[tuple[str, Scattered]]:
        """The scratch files, in the order of their names."""
        groups = [
            (f"{kind}-{at // PARTS_PER_TASK:06d}", (group[at : at + PARTS_PER_TASK], kind == "settled", buckets))
            for kind, group in (("settled", settled), ("parts", paths))
            for at in range(0, len(group), PARTS_PER_TASK)
        ]
        calls = ((name, (name, *arguments)) for name, arguments in groups)
        scattered = []
        for name, (file, ranges) in self._context.spread(read_records, calls, shared=self._deciding):
            self._ranges.update(ranges)
            scattered.append((name, file))
        return sorted(scattered, key=lambda named: named[0])


def read_records(
    name: str, paths: Sequence[str], settled: bool, buckets: int, deciding: Deciding
) -> tuple[Scattered, dict[str, tuple[int, int]]]:
    """Scatter the pool images of these parts that pass the thresholds; and the least and greatest id of each part."""
    pieces = [np.empty(0, exact.RECORD)]
    ranges = {}
    for path in paths:
        table = read_images(path, COLUMNS)
        ids = table["image_id"].to_numpy()
        ranges[path] = (int(ids.min()), int(ids.max())) if len(ids) else (1, 0)
        # A part of an earlier generation has its final status: what is `ok` there has passed.
        dropped = np.zeros(len(ids), bool) if settled else _dropped(table, deciding)
        sources, status = table["source"].to_pylist(), table["status"].to_pylist()
        pool = np.array([role(s) == "pool" and state == "ok" for s, state in zip(sources, status, strict=True)], bool)
        chosen = table.filter(pool & ~dropped)
        files = chosen["sha256"].to_pylist()
        stored = chosen["stored_sha256"].to_pylist()
        pieces.append(
            exact.records_of(
                chosen["image_id"].to_numpy(),
                [given or kept for given, kept in zip(files, stored, strict=True)],
                chosen["pixel_sha256"].to_pylist(),
                chosen["pca_hash"].to_pylist(),
                settled,
            )
        )
    records = np.concatenate(pieces)
    path = f"{deciding.scratch}/{name}.bin"
    return shuffle.scatter(path, records, exact.bucket_of(records["digest"][:, 3], buckets), buckets), ranges


def reasons(table: pa.Table, deciding: Deciding) -> np.ndarray:
    """(n,) of str: why each row is dropped for what it is, empty where it passes: forgotten before anything else."""
    found = thresholds.reasons(table, deciding.thresholds, deciding.exempt)
    if deciding.blocked is not None:
        ids = table["image_id"].to_numpy()
        copies = deciding.blocked.same_pixels(ids, table["pixel_sha256"].to_pylist())
        copies |= deciding.blocked.near_hashes(ids, table["pca_hash"].to_pylist(), deciding.distance)
        found[copies & (np.array(table["status"].to_pylist(), object) == "ok")] = REASON
    return found


def _dropped(table: pa.Table, deciding: Deciding) -> np.ndarray:
    return np.asarray(reasons(table, deciding) != "")


def search_bucket(
    bucket: int, files: Sequence[Scattered], buckets: int, deciding: Deciding
) -> tuple[np.ndarray, list[Scattered]]:
    """(drops of equal pixels in a bucket, what stays scattered by each band of its hash)."""
    drops, stays = exact.equal_pixels(shuffle.gather(files, bucket, exact.RECORD))
    hashed = exact.hashed(stays)
    scattered = []
    for band in range(deciding.distance + 1):
        words = exact.band_word(hashed["hash"], exact.bands(deciding.distance)[band])
        path = f"{deciding.scratch}/band-{band:02d}-{bucket:05d}.bin"
        scattered.append(shuffle.scatter(path, hashed, exact.bucket_of(words, buckets), buckets))
    return drops, scattered


def search_band(band: int, bucket: int, files: Sequence[Scattered], deciding: Deciding) -> np.ndarray:
    """Near hashes of a bucket of one band: (n,) exact.PAIR."""
    return exact.band_pairs(shuffle.gather(files, bucket, exact.HASHED), deciding.distance, band)
