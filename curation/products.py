"""Blockwise products of vectors: which pairs may be above a threshold, and what their similarity is.

A product in any precision on any device only nominates pairs above threshold - margin; the definition
(`curation.vectors.similarity`: float64 dot product of the stored vectors, rounded to float32) decides. GPUs are used
through `curation.device`; on CPUs without bfloat16 arithmetic OpenBLAS's float32 was the fastest (59 GFLOP/s on one
core, torch float32 47, torch bfloat16 6).
"""

from collections.abc import Iterator

import numba
import numpy as np

from curation import device as devices
from curation.device import Device, margin
from curation.vectors import similarity

__all__ = ["defined", "device", "margin", "nominate", "pairs_above"]

BLOCK_ELEMENTS = 1 << 22
"""Products held at once: 16 MiB of float32."""
VERIFY_ROWS = 1 << 13


def device() -> Device | None:
    """The GPU that was lent to this task, None for the CPU; torch is not imported to find out that there is none."""
    return devices.current()


def nominate(
    left: np.ndarray, right: np.ndarray, threshold: float, starts: np.ndarray, on: Device | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) whose product may be above `threshold`: every pair above it, and few others.

    left: (a, d) float32. right: (b, d) float32. starts: (a,) int64; row i is compared with columns starts[i] and
    later (symmetric products need only the upper half). Yields (m,) int64 rows and columns, block by block, row-major.
    on: the CPU by default. Which others are nominated depends on the device.
    """
    bound = np.float32(threshold - margin(left.shape[1]))
    if on is not None:
        yield from on.above(left, right, float(bound), starts)
        return
    step = max(1, BLOCK_ELEMENTS // max(1, len(right)))
    for begin in range(0, len(left), step):
        block = starts[begin : begin + step]
        first = int(block.min())
        if first >= len(right):
            continue
        columns = right[first:]
        rows, found = _above(left[begin : begin + step], columns, bound, block - first)
        if len(rows):
            yield rows + begin, found + first


def pairs_above(
    left: np.ndarray,
    right: np.ndarray,
    threshold: float,
    starts: np.ndarray,
    *,
    half: bool,
    on: Device | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs strictly above `threshold` (compared as float32) with their similarity by definition.

    As `nominate`; half: the stored vectors are float16 (left and right hold the same values as float32).
    """
    exact = np.float32(threshold)
    for rows, columns in nominate(left, right, threshold, starts, on):
        values = defined(left, right, rows, columns, half=half)
        above = values > exact
        if above.any():
            yield rows[above], columns[above], values[above]


def defined(left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, half: bool) -> np.ndarray:
    """(m,) float32: `similarity` of left[rows] and right[columns], to the last bit.

    Products of float16 values are multiples of 2^-48, and sums of those of unit vectors stay below 2: float64 holds
    every partial sum without rounding, so the order of the terms is free and a fused loop gives the definition's
    bits. Vectors stored as float32 go through the definition itself.
    """
    if half:
        return np.asarray(_dots(left, right, rows, columns))
    values = [
        similarity(left[rows[k : k + VERIFY_ROWS]], right[columns[k : k + VERIFY_ROWS]])
        for k in range(0, len(rows), VERIFY_ROWS)
    ]
    return np.concatenate(values) if values else np.empty(0, np.float32)


def _above(left: np.ndarray, right: np.ndarray, bound: np.float32, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    products = np.matmul(left, right.T)
    counts = _count(products, bound, starts)
    rows, columns = _collect(products, bound, starts, counts)
    return rows, columns


@numba.njit(cache=True, nogil=True)
def _count(products: np.ndarray, bound: np.float32, starts: np.ndarray) -> np.ndarray:
    counts = np.zeros(len(products), np.int64)
    for row in range(len(products)):
        found = 0
        for column in range(max(0, starts[row]), products.shape[1]):
            found += products[row, column] > bound
        counts[row] = found
    return counts


@numba.njit(cache=True, nogil=True)
def _collect(
    products: np.ndarray, bound: np.float32, starts: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    total = counts.sum()
    rows = np.empty(total, np.int64)
    columns = np.empty(total, np.int64)
    place = 0
    for row in range(len(products)):
        if counts[row] == 0:
            continue
        for column in range(max(0, starts[row]), products.shape[1]):
            if products[row, column] > bound:
                rows[place] = row
                columns[place] = column
                place += 1
    return rows, columns


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dots(left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    values = np.empty(len(rows), np.float32)
    for pair in range(len(rows)):
        one, other = left[rows[pair]], right[columns[pair]]
        total = 0.0
        for k in range(left.shape[1]):
            total += np.float64(one[k]) * np.float64(other[k])
        values[pair] = np.float32(total)
    return values
