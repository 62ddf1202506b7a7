"""Numbered rows brought together by a hash of them, through scratch files: no process holds them all.

Each writer sorts its rows by bucket into one raw file and hands back where the buckets begin; the reader of a bucket
reads its range of every file. Scratch is not part of a run: it is deleted when its stage is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curation import storage

ROWS_PER_BUCKET = 4_000_000


@dataclass(frozen=True)
class Scattered:
    """One scratch file. offsets: (buckets + 1,) the first row of each bucket."""

    path: str
    offsets: np.ndarray


def bucket_count(rows: int) -> int:
    """A power of two, so that a bucket holds about ROWS_PER_BUCKET rows at most."""
    return 1 << max(0, (rows - 1).bit_length() - (ROWS_PER_BUCKET.bit_length() - 1)) if rows > 1 else 1


def scatter(path: str, rows: np.ndarray, bucket: np.ndarray, buckets: int) -> Scattered:
    """Write rows (n,) of a structured type, grouped by bucket (n,) int64 in 0..buckets."""
    order = np.argsort(bucket, kind="stable")
    offsets = np.searchsorted(bucket[order], np.arange(buckets + 1))
    storage.write_whole(path, rows[order].tobytes())
    return Scattered(path, offsets)


def gather(files: Sequence[Scattered], bucket: int, kind: np.dtype) -> np.ndarray:
    """The rows of one bucket, in the order of files."""
    pieces = [np.empty(0, kind)]
    for file in files:
        first, last = int(file.offsets[bucket]), int(file.offsets[bucket + 1])
        if last > first:
            data = storage.read_bytes(file.path, first * kind.itemsize, (last - first) * kind.itemsize)
            pieces.append(np.frombuffer(data, kind))
    return np.concatenate(pieces)


def remove(folder: str) -> None:
    """Delete a scratch folder, if it is there."""
    storage.remove_folder(folder)
