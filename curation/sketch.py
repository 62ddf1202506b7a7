"""Sign sketches: bits whose Hamming distance tells the angle of two vectors, as a filter before exact products.

Bit k of a vector is the side of the k-th hyperplane it lies on, so two vectors differ in a share angle / pi of their
bits (Charikar 2002). The hyperplanes are rows of randomised Hadamard rotations (Ailon and Chazelle 2009; orthogonal
ones scatter less than independent ones: Ji et al. 2012), taken in integers: equal vectors have equal bits on every
machine, however they are batched. Comparing 1,024 bits costs a tenth of 512 float32 products.
"""

import math
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from curation import halves
from curation.order import hash_keys

WORDS = 16
"""Words of 64 bits in a sketch."""
HALF = 8
LONGEST_FIRST = 4
SCALE_BITS = 15
LANES = 16
CHUNK = 1024
PAIRS_HELD = 1 << 20


def sketches(vectors: np.ndarray, words: int = WORDS) -> np.ndarray:
    """(n, words) uint64 sign bits of (n, d) float16 or float32 vectors of at most unit length (and rounding).

    A shorter sketch is the beginning of a longer one. Values are rounded to multiples of 2^-15.
    """
    count, dimension = vectors.shape
    width = max(64, 1 << (dimension - 1).bit_length())
    result = np.empty((count, words), np.uint64)
    rotations = -(-words * 64 // width)
    for rotation in range(rotations):
        keys = hash_keys(np.arange(2 * width, dtype=np.uint64), rotation, "sketch signs")
        signs = np.where(keys >> np.uint64(63), -1, 1).astype(np.int32).reshape(2, width)
        first = rotation * width // 64
        last = min(words, first + width // 64)
        step = 1 << 14
        for begin in range(0, count, step):
            block = halves.widen(vectors[begin : begin + step])
            _rotated_signs(block, signs, width, result[begin : begin + step, first:last])
    return result


def distance_at(cosine: float, words: int, deviations: float) -> int:
    """Distance in bits that a pair at `cosine` exceeds by so many deviations of independent bits (ours vary less)."""
    bits = 64 * words
    share = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    spread = math.sqrt(bits * share * (1 - share))
    return min(bits, math.ceil(bits * share + deviations * spread))


def distances(left: np.ndarray, right: np.ndarray, words: int) -> np.ndarray:
    """(p,) int32 Hamming distances over the first `words` of the rows of two (p, w) arrays."""
    return np.asarray(np.bitwise_count(left[:, :words] ^ right[:, :words]).sum(axis=1, dtype=np.int32))


def scan(
    queries: np.ndarray,
    columns: np.ndarray,
    starts: np.ndarray,
    first_words: int,
    cuts: tuple[int, int, int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j >= starts[i]) whose sketches are near in the first words, in HALF, and as a whole.

    queries: (a, w) uint64, w >= HALF. columns: (b, w) uint64. starts: (a,) int64. first_words: 1 to LONGEST_FIRST.
    cuts: the greatest distance in `first_words`, HALF and all words. Yields (m,) int64 rows and columns, row-major.
    """
    by_word = np.ascontiguousarray(columns[:, :first_words].T)
    room = max(PAIRS_HELD, 2 * len(columns))
    rows, found = np.empty(room, np.int32), np.empty(room, np.int32)
    row = 0
    while row < len(queries):
        count, row = _scan(queries, by_word, columns, starts, cuts, row, rows, found)
        if count:
            yield rows[:count].astype(np.int64), found[:count].astype(np.int64)


@intrinsic
def _ones(typing_context: Any, word: Any) -> Any:
    """Number of bits set in a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@numba.njit(cache=True, nogil=True)
def _rotated_signs(vectors: np.ndarray, signs: np.ndarray, width: int, words: np.ndarray) -> None:
    """Fill words (n, w) with the signs of H D2 H D1 x. LANES vectors go side by side, so that every step is SIMD."""
    lanes = np.zeros(width * LANES, np.int32)
    for begin in range(0, len(vectors), LANES):
        held = min(LANES, len(vectors) - begin)
        _load(vectors[begin : begin + held], lanes)
        for turn in range(2):
            for k in range(width):
                if signs[turn, k] < 0:
                    _negate(lanes[k * LANES : (k + 1) * LANES])
            half = LANES
            while half < width * LANES:
                for block in range(0, width * LANES, 2 * half):
                    _butterfly(lanes[block : block + half], lanes[block + half : block + 2 * half])
                half *= 2
        _pack(lanes, words[begin : begin + held])


# Functions of their own, so that the compiler sees slices that do not overlap and loops of known length.


@numba.njit(cache=True, nogil=True)
def _load(vectors: np.ndarray, lanes: np.ndarray) -> None:
    scale = np.float32(1 << SCALE_BITS)
    lanes[vectors.shape[1] * LANES :] = 0
    for lane in range(len(vectors)):
        vector = vectors[lane]
        for k in range(len(vector)):
            lanes[k * LANES + lane] = np.int32(np.rint(vector[k] * scale))


@numba.njit(cache=True, nogil=True)
def _negate(values: np.ndarray) -> None:
    for k in range(LANES):
        values[k] = -values[k]


@numba.njit(cache=True, nogil=True)
def _butterfly(left: np.ndarray, right: np.ndarray) -> None:
    for k in range(len(left)):
        one, other = left[k], right[k]
        left[k] = one + other
        right[k] = one - other


@numba.njit(cache=True, nogil=True)
def _pack(lanes: np.ndarray, words: np.ndarray) -> None:
    packed = np.empty(LANES, np.uint64)
    for w in range(words.shape[1]):
        packed[:] = 0
        for bit in range(64):
            row = lanes[(64 * w + bit) * LANES : (64 * w + bit + 1) * LANES]
            for lane in range(LANES):
                packed[lane] |= np.uint64(row[lane] > 0) << np.uint64(bit)
        for lane in range(len(words)):
            words[lane, w] = packed[lane]


# Unsigned places: numba compiles a test for negative ones into every access by a signed number it cannot bound.


@numba.njit(cache=True, nogil=True)
def _scan(
    queries: np.ndarray,
    by_word: np.ndarray,
    columns: np.ndarray,
    starts: np.ndarray,
    cuts: tuple[int, int, int],
    row: int,
    rows: np.ndarray,
    found: np.ndarray,
) -> tuple[int, int]:
    """(pairs written, the row to go on with)."""
    written, one, none = np.uint64(0), np.uint64(1), np.uint64(0)
    first_words, width = by_word.shape
    near = np.empty(CHUNK + 1, np.int32)
    apart = np.empty(CHUNK, np.uint16)
    limit = np.uint16(min(cuts[0], 64 * first_words))
    while row < len(queries):
        if np.int64(written) + width > len(rows):
            break
        query = queries[row]
        for begin in range(max(0, starts[row]), width, CHUNK):
            size = min(width - begin, CHUNK)
            _first_distances(query, by_word, begin, size, apart)
            for at in range(_below(apart, size, limit, near)):
                place = np.uint64(near[at])
                column = columns[np.uint64(begin) + place]
                total = np.int64(apart[place])
                for w in range(first_words, HALF):
                    total += np.int64(_ones(query[w] ^ column[w]))
                if total > cuts[1]:
                    continue
                for w in range(HALF, columns.shape[1]):
                    total += np.int64(_ones(query[w] ^ column[w]))
                rows[written] = row
                found[written] = begin + near[at]
                written += one if total <= cuts[2] else none
        row += 1
    return int(written), row


@numba.njit(cache=True, nogil=True)
def _first_distances(query: np.ndarray, by_word: np.ndarray, begin: int, size: int, apart: np.ndarray) -> None:
    """Distances over the first words; a loop for each number of them, so that each is SIMD without a second pass."""
    end, words = begin + size, len(by_word)
    a, ones_a = query[0], by_word[0, begin:end]
    b, ones_b = query[min(1, words - 1)], by_word[min(1, words - 1), begin:end]
    c, ones_c = query[min(2, words - 1)], by_word[min(2, words - 1), begin:end]
    d, ones_d = query[min(3, words - 1)], by_word[min(3, words - 1), begin:end]
    if words == 1:
        for k in range(size):
            apart[k] = np.uint16(_ones(a ^ ones_a[k]))
    elif words == 2:
        for k in range(size):
            apart[k] = np.uint16(_ones(a ^ ones_a[k]) + _ones(b ^ ones_b[k]))
    elif words == 3:
        for k in range(size):
            apart[k] = np.uint16(_ones(a ^ ones_a[k]) + _ones(b ^ ones_b[k]) + _ones(c ^ ones_c[k]))
    else:
        for k in range(size):
            half = _ones(a ^ ones_a[k]) + _ones(b ^ ones_b[k])
            apart[k] = np.uint16(half + _ones(c ^ ones_c[k]) + _ones(d ^ ones_d[k]))


@numba.njit(cache=True, nogil=True)
def _below(apart: np.ndarray, size: int, limit: int, near: np.ndarray) -> int:
    """Write the places whose distance is at most `limit`; blocks of 32 without any are passed over at SIMD speed."""
    kept, one, none = np.uint64(0), np.uint64(1), np.uint64(0)
    whole = size // 32 * 32
    for begin in range(0, whole, 32):
        block = apart[begin : begin + 32]
        least = np.uint16(65535)
        for k in range(32):
            least = min(least, block[k])
        if least <= limit:
            for k in range(32):
                near[kept] = begin + k
                kept += one if block[k] <= limit else none
    for k in range(whole, size):
        near[kept] = k
        kept += one if apart[k] <= limit else none
    return int(kept)
