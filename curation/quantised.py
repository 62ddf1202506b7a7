"""Four-bit codes of vectors, and a scan of them that says which rows may be near a query.

Every dimension is coded as one of four levels, and two dimensions make a piece of 16 codes: a product quantiser (Jégou
et al. 2011) of two bits per dimension whose coding is three comparisons. Sixteen free centroids per pair of dimensions
lose 5 % less of isotropic rows and take ten times as long. A query becomes a table of 16 small integers per piece, so
that a register holds the table and one byte shuffle looks up 32 rows (André et al. 2015; the layout of FAISS's
FastScan). Unlike there, rows are compared with a cut of the query's own and nothing is ranked, and the sums are
integers: the rows that pass are the same on every machine, with or without AVX2.
"""

from dataclasses import dataclass

import numba
import numpy as np

from curation import shuffles
from curation.order import generator
from curation.shuffles import GROUP, LANES

HIGHEST = 63
TYPICAL = 7
"""The largest entry of a table, and what the median piece's range becomes: sums of related vectors stay below 255.
Entries that reached only twice the typical range cut off the pieces that say most: more than twice as much passed."""
TRAINING_ROWS = 4096
ITERATIONS = 8


@dataclass(frozen=True)
class Codebook:
    """Four levels for each dimension, by which rows of M / 2 bytes are made.

    levels: (4, M / 2, 4) float32, ascending. Byte m holds dimensions m, m + M / 2, m + M and m + 3 M / 2, two bits
    each; dimensions beyond d are zero. The low half of the byte is piece 2 m, the high half piece 2 m + 1.
    """

    levels: np.ndarray
    dimension: int

    @property
    def pieces(self) -> int:
        return 2 * int(self.levels.shape[1])

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """(n, M / 2) uint8 codes of (n, d) float32 rows."""
        bounds = ((self.levels[..., 1:] + self.levels[..., :-1]) / 2).reshape(-1, 3)
        bounds[self.dimension :] = np.inf
        codes = np.empty((len(vectors), self.levels.shape[1]), np.uint8)
        _encode(self._padded(vectors), np.ascontiguousarray(bounds.T), codes)
        return codes

    def tables(self, queries: np.ndarray) -> "Tables":
        """The tables of (m, d) float32 queries."""
        entries = np.empty((len(queries), self.pieces, 16), np.uint8)
        base, step = np.empty(len(queries)), np.empty(len(queries))
        _fill_tables(self._padded(queries), self.levels, entries, base, step)
        return Tables(entries, base, step * (self.pieces // GROUP))

    def _padded(self, vectors: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        width = 2 * self.pieces
        return rows if width == self.dimension else np.pad(rows, ((0, 0), (0, width - self.dimension)))


@dataclass(frozen=True)
class Tables:
    """What the scan needs of the queries. A row's product is about base + step * its sum, a byte."""

    entries: np.ndarray
    """(m, M, 16) uint8, at most HIGHEST."""
    base: np.ndarray
    """(m,) float64."""
    step: np.ndarray
    """(m,) float64."""


def train(sample: np.ndarray, seed: int) -> Codebook:
    """Levels by k-means in every dimension. sample: (n, d) float32, n >= 4."""
    dimension = sample.shape[1]
    rows = sample
    if len(rows) > TRAINING_ROWS:
        rows = rows[generator(seed, "codebook").choice(len(rows), TRAINING_ROWS, replace=False)]
    levels = np.zeros((2 * pieces_of(dimension), 4), np.float32)
    levels[:dimension] = _levels(np.ascontiguousarray(rows.T, dtype=np.float32))
    return Codebook(levels.reshape(4, -1, 4), dimension)


def pieces_of(dimension: int) -> int:
    """A power of two, at least one for two dimensions."""
    count = GROUP
    while 2 * count < dimension:
        count *= 2
    return count


def sums(codes: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """(m, rows) uint8: the sum of every row for every query, as the scan compares it. For calibration and tests.

    codes: blocks, of `shuffles.blocked`.
    """
    found = np.empty((len(entries), len(codes) * LANES), np.uint8)
    shuffles.all_sums(codes, entries, found)
    return found


def highest(codes: np.ndarray, tables: "Tables", offsets: np.ndarray) -> np.ndarray:
    """(blocks * 32,) int64: the query with the highest coded product plus offset, the first of equal ones.

    codes: blocks, of `shuffles.blocked`. offsets: (m,) float32.
    """
    base, step = (tables.base + offsets).astype(np.float32), tables.step.astype(np.float32)
    return shuffles.highest_of(shuffles.shape_of(tables.entries.shape[1]), codes, tables.entries, base, step)  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def _levels(columns: np.ndarray) -> np.ndarray:
    """(d, 4) float32: Lloyd's four means of each of (d, n), from its quantiles on."""
    levels = np.empty((len(columns), 4), np.float32)
    for k in range(len(columns)):
        values = np.sort(columns[k])
        ends = np.array([0, len(values) // 4, len(values) // 2, 3 * len(values) // 4, len(values)])
        summed = np.zeros(len(values) + 1)
        for i in range(len(values)):
            summed[i + 1] = summed[i] + values[i]
        for _ in range(ITERATIONS):
            for j in range(4):
                held = ends[j + 1] - ends[j]
                if held:
                    levels[k, j] = np.float32((summed[ends[j + 1]] - summed[ends[j]]) / held)
                else:
                    levels[k, j] = values[min(ends[j], len(values) - 1)]
            for j in range(1, 4):
                ends[j] = np.searchsorted(values, (levels[k, j - 1] + levels[k, j]) / np.float32(2), "right")
    return levels


@numba.njit(cache=True, nogil=True)
def _encode(rows: np.ndarray, bounds: np.ndarray, codes: np.ndarray) -> None:
    """rows: (n, 2 M) float32; bounds: (3, 2 M) float32; codes: (n, M / 2) uint8, written."""
    size = codes.shape[1]
    low, middle, high = bounds[0], bounds[1], bounds[2]
    levels = np.empty(4 * size, np.uint8)
    for i in range(len(rows)):
        row = rows[i]
        for k in range(4 * size):
            levels[k] = np.uint8(row[k] > low[k]) + np.uint8(row[k] > middle[k]) + np.uint8(row[k] > high[k])
        for m in range(size):
            codes[i, m] = (
                levels[m] | (levels[m + size] << 2) | (levels[m + 2 * size] << 4) | (levels[m + 3 * size] << 6)
            )


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _fill_tables(
    queries: np.ndarray, levels: np.ndarray, entries: np.ndarray, base: np.ndarray, step: np.ndarray
) -> None:
    size = levels.shape[1]
    count = 2 * size
    # The level of both dimensions of a piece for each of its codes.
    first, second = np.empty((count, 16), np.float32), np.empty((count, 16), np.float32)
    for piece in range(count):
        half = 2 * (piece % 2)
        for j in range(16):
            first[piece, j] = levels[half, piece // 2, j & 3]
            second[piece, j] = levels[half + 1, piece // 2, j >> 2]
    products = np.empty((count, 16), np.float32)
    least, spans = np.empty(count, np.float32), np.empty(count, np.float32)
    for query in range(len(queries)):
        base[query] = 0.0
        for piece in range(count):
            at = piece // 2 + 2 * (piece % 2) * size
            x, y = queries[query, at], queries[query, at + size]
            low, high = np.float32(np.inf), np.float32(-np.inf)
            for j in range(16):
                product = x * first[piece, j] + y * second[piece, j]
                products[piece, j] = product
                low, high = min(low, product), max(high, product)
            least[piece], spans[piece] = low, high - low
            base[query] += low
        span = max(np.float32(np.median(spans)), np.float32(1e-12))
        step[query] = np.float64(span) / TYPICAL
        scale = np.float32(TYPICAL) / span
        for piece in range(count):
            for j in range(16):
                entry = np.rint((products[piece, j] - least[piece]) * scale)
                entries[query, piece, j] = np.uint8(min(entry, np.float32(HIGHEST)))
