"""Four-bit codes of vectors, and a scan of them that says which rows may be near a query.

A vector is cut into M pieces of a few dimensions and each piece is coded as one of 16 centroids (product quantisation,
Jégou et al. 2011). A query becomes a table of 16 small integers per piece, so that a register holds the table and one
byte shuffle looks up 32 rows (André et al. 2015; the layout of FAISS's FastScan). Unlike there, rows are compared
with a cut of the query's own and nothing is ranked, and the sums are integers: the rows that pass are the same on every
machine, with or without AVX2.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from curation import shuffles
from curation.order import generator
from curation.search import require_faiss
from curation.shuffles import GROUP, LANES

HIGHEST = 63
TYPICAL = 7
"""The largest entry of a table, and what the median piece's range becomes: sums of related vectors stay below 255.
Entries that reached only twice the typical range cut off the pieces that say most: more than twice as much passed."""
PIECE_DIMENSIONS = 2.5
TRAINING_ROWS = 4096
ITERATIONS = 6


@dataclass(frozen=True)
class Codebook:
    """16 centroids for each of M pieces. centroids: (M, piece, 16) float32; dimensions beyond d are zero."""

    centroids: np.ndarray
    dimension: int

    @property
    def pieces(self) -> int:
        return len(self.centroids)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """(blocks, M / 2, 32) uint8 codes of (n, d) float32 rows: the low half of a byte is the even piece's."""
        half_norms = 0.5 * np.einsum("mpj,mpj->mj", self.centroids, self.centroids)
        width = (0,) * self.centroids.shape[1]
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        return _encode(width, rows, self.centroids, half_norms)  # type: ignore[no-any-return]

    def tables(self, queries: np.ndarray) -> "Tables":
        """The tables of (m, d) float32 queries."""
        count = len(self.centroids)
        entries = np.empty((len(queries), count, 16), np.uint8)
        base, step = np.empty(len(queries)), np.empty(len(queries))
        _fill_tables(self._padded(queries), self.centroids, entries, base, step)
        return Tables(entries, base, step * (count // GROUP))

    def _padded(self, vectors: np.ndarray) -> np.ndarray:
        width = self.centroids.shape[0] * self.centroids.shape[1]
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
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
    """Centroids by k-means in every piece. sample: (n, d) float32, n >= 16."""
    faiss = require_faiss()
    dimension = sample.shape[1]
    count = pieces_of(dimension)
    width = -(-dimension // count)
    rows = sample
    if len(rows) > TRAINING_ROWS:
        rows = rows[generator(seed, "codebook").choice(len(rows), TRAINING_ROWS, replace=False)]
    rows = np.pad(rows, ((0, 0), (0, count * width - dimension))).astype(np.float32)
    quantiser = faiss.ProductQuantizer(count * width, count, 4)
    quantiser.cp.niter, quantiser.cp.seed, quantiser.cp.min_points_per_centroid = ITERATIONS, 1, 1
    quantiser.train(np.ascontiguousarray(rows))
    found = faiss.vector_to_array(quantiser.centroids).reshape(count, 16, width)
    return Codebook(np.ascontiguousarray(found.transpose(0, 2, 1)), dimension)


def pieces_of(dimension: int) -> int:
    """A power of two: two bits per dimension, or a little fewer."""
    count = GROUP
    while count * PIECE_DIMENSIONS < dimension:
        count *= 2
    return count


def sums(codes: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """(m, rows) uint8: the sum of every row for every query, as the scan compares it. For calibration and tests."""
    found = np.empty((len(entries), len(codes) * LANES), np.uint8)
    shuffles.all_sums(codes, entries, found)
    return found


def highest(codes: np.ndarray, tables: "Tables", offsets: np.ndarray) -> np.ndarray:
    """(blocks * 32,) int64: the query with the highest coded product plus offset, the first of equal ones.

    offsets: (m,) float32.
    """
    base, step = (tables.base + offsets).astype(np.float32), tables.step.astype(np.float32)
    return shuffles.highest_of(shuffles.shape_of(tables.entries.shape[1]), codes, tables.entries, base, step)  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True)
def _fill_tables(
    queries: np.ndarray, centroids: np.ndarray, entries: np.ndarray, base: np.ndarray, step: np.ndarray
) -> None:
    count, width = centroids.shape[:2]
    products = np.empty((count, 16), np.float32)
    least, spans = np.empty(count, np.float32), np.empty(count, np.float32)
    for query in range(len(queries)):
        base[query] = 0.0
        for piece in range(count):
            products[piece] = 0
            for k in range(width):
                x = queries[query, piece * width + k]
                for j in range(16):
                    products[piece, j] += x * centroids[piece, k, j]
            least[piece] = products[piece].min()
            spans[piece] = products[piece].max() - least[piece]
            base[query] += least[piece]
        span = max(np.float32(np.median(spans)), np.float32(1e-12))
        step[query] = np.float64(span) / TYPICAL
        scale = np.float32(TYPICAL) / span
        for piece in range(count):
            for j in range(16):
                entry = np.rint((products[piece, j] - least[piece]) * scale)
                entries[query, piece, j] = np.uint8(min(entry, np.float32(HIGHEST)))


@numba.njit(cache=True, nogil=True)
def _encode(width: tuple[int, ...], vectors: np.ndarray, centroids: np.ndarray, half_norms: np.ndarray) -> np.ndarray:
    """Codes of blocks of rows. width: so many zeros; its type tells the compiler the dimensions of a piece."""
    count, dimensions = len(half_norms), len(width)
    blocks = (len(vectors) + 31) // 32
    codes = np.zeros((blocks, count // 2, 32), np.uint8)
    # Rows side by side, so that a register works on several of them.
    lanes = np.zeros((count * dimensions, 32), np.float32)
    best = np.empty(32, np.uint8)
    for block in range(blocks):
        for lane in range(min(32, len(vectors) - block * 32)):
            row = vectors[block * 32 + lane]
            for k in range(len(row)):
                lanes[k, lane] = row[k]
        for piece in range(count):
            _nearest(
                width,
                lanes.ctypes.data + piece * dimensions * 128,
                centroids.ctypes.data + piece * dimensions * 64,
                half_norms.ctypes.data + piece * 64,
                best.ctypes.data,
            )
            shift = 4 * (piece % 2)
            for lane in range(32):
                codes[block, piece // 2, lane] |= best[lane] << shift
    return codes


@intrinsic  # type: ignore[untyped-decorator]
def _nearest(typing_context, width, lanes, centroids, half_norms, out):  # type: ignore[no-untyped-def]
    """The nearest centroid of one piece of 32 rows, in LLVM's words: its own loops over arrays stay scalar."""
    single, byte, word, address = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
    count, dimensions = 16, width.count
    floats, words, bytes_ = (ir.VectorType(kind, count) for kind in (single, word, byte))

    def at(builder: Any, base: Any, offset: int, kind: Any) -> Any:
        return builder.inttoptr(builder.add(base, ir.Constant(address, offset)), kind.as_pointer())

    def spread(builder: Any, value: Any) -> Any:
        first = builder.insert_element(ir.Constant(floats, ir.Undefined), value, ir.Constant(word, 0))
        return builder.shuffle_vector(first, first, ir.Constant(words, [0] * count))

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _, rows, table, norms, result = arguments
        for part in range(2):
            x = [builder.load(at(builder, rows, k * 128 + part * 64, floats), align=4) for k in range(dimensions)]
            highest, best = None, ir.Constant(words, [0] * count)
            for j in range(16):
                score = builder.fneg(spread(builder, builder.load(at(builder, norms, j * 4, single), align=4)))
                for k in range(dimensions):
                    c = spread(builder, builder.load(at(builder, table, k * 64 + j * 4, single), align=4))
                    score = builder.fadd(score, builder.fmul(c, x[k], flags=("contract",)), flags=("contract",))
                if highest is None:
                    highest = score
                    continue
                better = builder.fcmp_ordered(">", score, highest)
                highest = builder.select(better, score, highest)
                best = builder.select(better, ir.Constant(words, [j] * count), best)
            builder.store(builder.trunc(best, bytes_), at(builder, result, part * count, bytes_), align=1)
        return context.get_dummy_value()

    return types.void(width, *[types.intp] * 4), generate
