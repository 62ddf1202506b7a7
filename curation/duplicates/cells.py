"""Coarse cells of the join: where a vector is at home, which cells it visits, and which sketches count as near.

The recipe of IVF (Jégou et al. 2011) for both sides at once: a pair is compared when one end visits the home of the
other. Visits are adapted to each vector: a cell is visited when its centroid is nearly as close as the nearest one,
and big cells, which cost more, must be closer. Centroids lie in the leading principal components, where the assignment
costs a fraction and tells copies apart nearly as well.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numba
import numpy as np

from curation import halves, sketch
from curation.nearest import one_thread
from curation.search import require_faiss

CELLS_PER_ROOT = 2.0
TRAINING_PER_CELL = 48
TRAINING_ROUNDS = 4
COMPONENTS = 128
"""Principal components that cells are formed in."""
COMPONENT_ROWS = 1 << 15
"""Sampled vectors that the components are found in."""
SKETCH_WORDS = 8
LEFT_OUT = (0, 16, 64)
"""Leading components that sketches may not see, an eighth of all at most: one of these is chosen on a sample."""
BLOCK_ROWS = 1024
PAIR_ROWS = 128
"""Of a block where sampled pairs are looked at, of which a piece has few."""
BLOCK_SCORES = 1 << 24
EXPONENTS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
"""How much closer a cell must be per factor e of its size: one of these is chosen on a sample."""


@dataclass(frozen=True)
class Rule:
    """What is compared: cells within `reach` of the best, and among their members pairs whose sketches are near."""

    exponent: float
    """One of EXPONENTS."""
    reach: float
    first_words: int
    cuts: tuple[int, int]
    """Greatest distances of sketches in the first words and in all."""
    left_out: int = 0
    """One of LEFT_OUT."""


@dataclass(frozen=True)
class Cells:
    """Centroids and the rule of visits; small enough to be handed to every worker."""

    projection: np.ndarray
    """(d, p) float32 principal components."""
    centroids: np.ndarray
    """(c, p) float32, unit length."""
    sizes: np.ndarray
    """(c,) float32 share of the training sample at home in each, smoothed."""
    rule: Rule | None = None

    def __len__(self) -> int:
        return len(self.centroids)

    def with_rule(self, rule: Rule) -> "Cells":
        return replace(self, rule=rule)

    def handicap(self, exponent: float) -> np.ndarray:
        """(c,) float32, taken from the score of a cell that is visited."""
        return np.asarray(exponent * np.log(self.sizes * len(self.sizes)), np.float32)

    def scores(self, vectors: np.ndarray, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, (rows, c) float32 cosines with the centroids) of (n, d) stored vectors, a block at a time."""
        for rows, _, leading in self._blocks(vectors, block_rows):
            yield rows, self._cosines(leading)[: rows.stop - rows.start]

    def homes(self, vectors: np.ndarray) -> np.ndarray:
        """(n,) int32."""
        parts = [scores.argmax(axis=1).astype(np.int32) for _, scores in self.scores(vectors)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def sketches(self, vectors: np.ndarray, left_out: int) -> np.ndarray:
        """(n, SKETCH_WORDS) uint64 signs of what some leading components leave of (n, d) stored vectors.

        Strangers who meet in a cell resemble each other in just these components: a plain sketch would mostly say
        again what the cell has said. How many to leave out depends on how far true pairs resemble each other there.
        """
        result = np.empty((len(vectors), SKETCH_WORDS), np.uint64)
        for rows, wide, leading in self._blocks(vectors, PAIR_ROWS):
            result[rows] = self._sketched(wide, leading, left_out, rows.stop - rows.start)
        return result

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(homes (n,) int32, rows (v,) int64 and cells (v,) int32 of all further visits, sketches (n, w) uint64)."""
        assert self.rule is not None
        handicap, reach = self.handicap(self.rule.exponent), np.float32(self.rule.reach)
        homes = np.empty(len(vectors), np.int32)
        bits = np.empty((len(vectors), SKETCH_WORDS), np.uint64)
        found_rows, found_cells = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for block, wide, leading in self._blocks(vectors):
            bits[block] = self._sketched(wide, leading, self.rule.left_out, block.stop - block.start)
            scores = self._cosines(leading)[: block.stop - block.start]
            home = scores.argmax(axis=1)
            homes[block] = home
            rows, cells = _within(scores, home, handicap, reach)
            found_rows.append(rows + block.start)
            found_cells.append(cells)
        return homes, np.concatenate(found_rows), np.concatenate(found_cells), bits

    def _blocks(self, vectors: np.ndarray, most: int = BLOCK_ROWS) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(rows, (b, d) float32 vectors, (b, p) float32 components) a block at a time.

        Blocks have one shape, the last is padded: what is computed of a vector does not depend on its company.
        """
        size = max(64, min(most, BLOCK_SCORES // len(self.centroids) // 64 * 64))
        wide = np.zeros((size, vectors.shape[1]), np.float32)
        with one_thread():
            for begin in range(0, len(vectors), size):
                rows = slice(begin, min(len(vectors), begin + size))
                held = rows.stop - begin
                wide[:held] = halves.widen(vectors[rows])
                wide[held:] = 0
                yield rows, wide, wide @ self.projection

    def _cosines(self, leading: np.ndarray) -> np.ndarray:
        lengths = np.sqrt(np.einsum("nd,nd->n", leading, leading))
        unit = leading / np.maximum(lengths, np.float32(1e-20))[:, None]
        return np.asarray(unit @ self.centroids.T)

    def _sketched(self, wide: np.ndarray, leading: np.ndarray, left_out: int, held: int) -> np.ndarray:
        out = min(left_out, wide.shape[1] // 8)
        left = wide - np.ascontiguousarray(leading[:, :out]) @ self.projection[:, :out].T if out else wide
        return sketch.sketches(left[:held], SKETCH_WORDS)

    def gaps(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(p, len(EXPONENTS)) float32: the reach at which each pair of rows is compared, -1 for one home.

        left, right: (p, d) stored vectors.
        """
        result = np.empty((len(left), len(EXPONENTS)), np.float32)
        for (rows, one), (_, other) in zip(self.scores(left, PAIR_ROWS), self.scores(right, PAIR_ROWS), strict=True):
            place = np.arange(len(one))
            home_one, home_other = one.argmax(axis=1), other.argmax(axis=1)
            for k, exponent in enumerate(EXPONENTS):
                handicap = self.handicap(exponent)
                of_one = one[place, home_one] - (one[place, home_other] - handicap[home_other])
                of_other = other[place, home_other] - (other[place, home_one] - handicap[home_one])
                result[rows, k] = np.where(home_one == home_other, np.float32(-1), np.minimum(of_one, of_other))
        return result

    def to_bytes(self) -> bytes:
        """For `from_bytes`: a numpy archive without pickles."""
        rule = self.rule
        numbers = [] if rule is None else [rule.exponent, rule.reach, rule.first_words, *rule.cuts, rule.left_out]
        file = io.BytesIO()
        np.savez(
            file,
            projection=self.projection,
            centroids=self.centroids,
            sizes=self.sizes,
            rule=np.asarray(numbers, np.float64),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Cells":
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            numbers = file["rule"].tolist()
            rule = None
            if numbers:
                words, first, whole, left_out = (int(number) for number in numbers[2:])
                rule = Rule(numbers[0], numbers[1], words, (first, whole), left_out)
            return cls(file["projection"], file["centroids"], file["sizes"], rule)


def train(count: int, seed: int, sample: np.ndarray, threshold: float) -> Cells:
    """Cells of (n, d) sampled vectors: spherical k-means by FAISS in their principal components, on one thread.

    threshold: cosine above which two of the sample are copies; of copies one counts for the components, since a
    component that is a large group of copies would be missing from just their sketches.
    """
    faiss = require_faiss()
    wide = np.ascontiguousarray(sample, dtype=np.float32)
    with one_thread():
        few = _without_copies(wide[:COMPONENT_ROWS], threshold)
        _, axes = np.linalg.eigh((few.T @ few).astype(np.float64))
        projection = np.ascontiguousarray(axes[:, ::-1][:, : min(COMPONENTS, wide.shape[1])], dtype=np.float32)
        projected = wide @ projection
        projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), np.float32(1e-20))
        kmeans = faiss.Kmeans(
            projected.shape[1],
            count,
            niter=TRAINING_ROUNDS,
            seed=seed % (1 << 31),
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=TRAINING_PER_CELL + 1,
        )
        kmeans.train(projected)
        centroids = np.array(kmeans.centroids, dtype=np.float32)
    cells = Cells(projection, centroids, np.full(count, 1 / count, np.float32))
    members = np.bincount(cells.homes(sample), minlength=count) + 1.0
    return replace(cells, sizes=np.asarray(members / members.sum(), np.float32))


def _without_copies(rows: np.ndarray, threshold: float) -> np.ndarray:
    """The rows (n, d) that, as far as sketches tell, are no copy of an earlier one."""
    bits = sketch.sketches(rows, sketch.HALF)
    cut = sketch.distance_at(threshold, sketch.HALF, 1)
    cuts = (sketch.distance_at(threshold, sketch.LONGEST_FIRST, 2), cut, cut)
    copies = np.zeros(len(rows), bool)
    for _, later in sketch.scan(bits, bits, np.arange(1, len(bits) + 1), sketch.LONGEST_FIRST, cuts):
        copies[later] = True
    return rows[~copies]


@numba.njit(cache=True, nogil=True)
def _within(
    scores: np.ndarray, homes: np.ndarray, handicap: np.ndarray, reach: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cells, but for the homes, whose score less its handicap is within `reach` of the row's best score."""
    width = scores.shape[1]
    rows = np.empty(16 * len(scores) + width, np.int64)
    cells = np.empty(len(rows), np.int32)
    count, one, none = np.uint64(0), np.uint64(1), np.uint64(0)
    for row in range(len(scores)):
        if count + np.uint64(width) > np.uint64(len(rows)):
            more_rows, more_cells = np.empty(2 * len(rows) + width, np.int64), np.empty(2 * len(rows) + width, np.int32)
            more_rows[:count], more_cells[:count] = rows[:count], cells[:count]
            rows, cells = more_rows, more_cells
        mine = scores[row]
        least = mine[homes[row]] - reach
        for cell in range(width):
            rows[count] = row
            cells[count] = cell
            count += one if (mine[cell] - handicap[cell] >= least) & (cell != homes[row]) else none
    return rows[:count].copy(), cells[:count].copy()
