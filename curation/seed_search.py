"""The nearest pool images of many seeds, at a recall that is asked for, in one pass over a pool of any size.

Rows go to the nearest of some dozens of cells; a seed visits the cells that may hold a neighbour. In a visited cell the
four-bit codes of `curation.quantised` pass on rows that may be among the seed's N nearest, and `similarity` by the
definition decides. How far below the best cell a seed looks, and how far below its N-th neighbour a code may lie, are
measured on a sample of seeds and rows. The pool is never shuffled: each stretch of it is coded, scanned and forgotten.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numba
import numpy as np

from curation import quantised
from curation.halves import widen
from curation.nearest import one_thread
from curation.neighbours import NO_ID, Neighbours
from curation.order import generator
from curation.quantised import Codebook, Tables, masks_of
from curation.search import require_faiss

CELL_TRAINING = 64
"""Rows per cell that k-means sees."""
CELL_ITERATIONS = 8
TUNING_SEEDS = 384
SAMPLE_ROWS = 131_072
CHUNK = 8192
SCAN_ROWS = 2048
FIXED = 32_000
"""Steps in 1 of the int16 that codes' nominees are compared by: a value is below 1.002, its product with it 2^30."""
FEW_SEEDS, FEW_ROWS = 512, 65_536
"""Below either everything is compared: codes and cells would cost more than they save."""
EXACT_COST, CODE_COST, CODING_COST, CHECK_COST = 0.032, 0.014, 10.0, 0.12
"""Nanoseconds on one core of 2021: a product per dimension; a coded product per piece; coding a row, and checking one
against a seed, per dimension. Their ratios alone matter, and only for the choice between this search and the exact."""


@dataclass(frozen=True)
class SearchPlan:
    """What all stretches of the pool are searched with."""

    cells: np.ndarray
    """(c, d) float32 centroids."""
    reach: np.ndarray
    """(c,) float32: how far above its centroid's product the best of a cell is expected to be."""
    codebook: Codebook
    visit_margin: float
    """A seed visits the cells whose expected best is at most so far below that of its best cell."""
    slope: float
    cut_margin: float
    """A row whose coded product is at least slope * (the seed's N-th similarity) - cut_margin is compared."""
    share: float
    """Expected share of the (seed, row) pairs whose codes are looked at."""
    passing: float
    """Expected share of those that are compared."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be kept."""
        numbers = [self.visit_margin, self.slope, self.cut_margin, self.share, self.passing, self.codebook.dimension]
        return {
            "cells": self.cells,
            "reach": self.reach,
            "centroids": self.codebook.centroids,
            "numbers": np.array(numbers),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SearchPlan":
        *numbers, dimension = (float(x) for x in arrays["numbers"])
        return cls(arrays["cells"], arrays["reach"], Codebook(arrays["centroids"], int(dimension)), *numbers)

    def cost(self, seeds: int) -> float:
        """Expected nanoseconds per row of the pool."""
        pieces, dimension = self.codebook.pieces, self.codebook.dimension
        per_pair = self.share * (CODE_COST * pieces + self.passing * CHECK_COST * dimension)
        return seeds * per_pair + dimension * (EXACT_COST * len(self.cells) + CODING_COST)

    def _expected_best(self, seeds: np.ndarray) -> np.ndarray:
        """(m, c) float32: the product that the best row of each cell is expected to have with each seed."""
        return np.asarray(seeds @ self.cells.T + self.reach, dtype=np.float32)

    def visits(self, seeds: np.ndarray) -> np.ndarray:
        """(m, c) bool, for (m, d) float32 seeds."""
        expected = self._expected_best(seeds)
        return np.asarray(expected >= expected.max(axis=1, keepdims=True) - np.float32(self.visit_margin))

    def assign(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 nearest cell of (n, d) float32 rows."""
        norms = 0.5 * np.einsum("cd,cd->c", self.cells, self.cells)
        parts = [
            np.argmax(rows[start : start + CHUNK] @ self.cells.T - norms, axis=1)
            for start in range(0, len(rows), CHUNK)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def is_small(seeds: int, rows: int) -> bool:
    """Whether comparing everything costs least, by arithmetic on the sizes alone."""
    return seeds < FEW_SEEDS or rows < FEW_ROWS


def exact_cost(seeds: int, dimension: int) -> float:
    """Nanoseconds per row of the pool when everything is compared."""
    return seeds * dimension * EXACT_COST


def calibrate(
    sample: np.ndarray, tuning: np.ndarray, count: int, *, rows: int, seeds: int, recall: float, seed: int
) -> SearchPlan:
    """The plan that finds a share `recall` of the `count` nearest, as measured on `tuning`.

    sample: (b, d) float32 rows drawn from the pool of `rows`; tuning: (t, d) float32 seeds of `seeds`.
    """
    with one_thread():
        cells, reach, sizes, labels = _cells(sample, rows, seeds, seed)
        codebook = quantised.train(sample, seed)
        # The count-th of the pool lies among the first count * b / rows of the sample; its best is never easier.
        rank = max(1, -(-count * len(sample) // rows))
        nearest, similar = _exact(sample, tuning, min(rank, len(sample)))
        plan = SearchPlan(cells, reach, codebook, 0.0, 0.0, 0.0, 1.0, 1.0)
        expected = plan._expected_best(tuning)
        missed = expected.max(axis=1, keepdims=True) - np.take_along_axis(expected, labels[nearest], axis=1)
        # Two ways to lose a neighbour have a quarter each of what may be lost, the noise of the sample the rest.
        allowed = (1 - recall) / 4
        visit_margin = _upper(missed.ravel(), allowed)
        tables = codebook.tables(tuning)
        who = np.repeat(np.arange(len(tuning)), nearest.shape[1])
        coded = _coded(codebook, tables, sample[nearest.ravel()], who)
        lowest = similar[:, -1].astype(np.float64)[who]
        slope = max(0.0, float((coded * lowest).sum() / max((lowest * lowest).sum(), 1e-12)))
        cut_margin = _upper(slope * lowest - coded, allowed)
        open_cells = expected >= expected.max(axis=1, keepdims=True) - np.float32(visit_margin)
        share = float((open_cells @ sizes).mean() / max(1, sizes.sum()))
        passing = _passing(codebook, tables, sample, labels, open_cells, slope * similar[:, -1] - cut_margin)
    return SearchPlan(cells, reach, codebook, visit_margin, slope, cut_margin, share, passing)


def _cells(
    sample: np.ndarray, rows: int, seeds: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(cells, reach, rows of the sample in each, label of each row of the sample)."""
    faiss = require_faiss()
    # Assigning a row costs a product per cell; scanning it, a coded product per seed and visit.
    count = int(np.clip(2 ** round(np.log2(max(1, seeds)) / 2), 16, 1024))
    count = max(1, min(count, len(sample) // 16))
    training = sample
    if len(sample) > CELL_TRAINING * count:
        training = sample[generator(seed, "cells").choice(len(sample), CELL_TRAINING * count, replace=False)]
    found = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=CELL_ITERATIONS,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=CELL_TRAINING,
    )
    found.train(np.ascontiguousarray(training))
    plan = SearchPlan(found.centroids, np.zeros(count, np.float32), Codebook(np.empty((0, 0, 16)), 0), 0, 0, 0, 1, 1)
    labels = plan.assign(sample)
    sizes = np.bincount(labels, minlength=count)
    squares = np.bincount(labels, ((sample - found.centroids[labels]) ** 2).sum(axis=1), minlength=count)
    deviation = np.sqrt(squares / np.maximum(sizes, 1) / sample.shape[1])
    members = np.maximum(sizes * (rows / len(sample)), 2.0)
    return found.centroids, (deviation * np.sqrt(2 * np.log(members))).astype(np.float32), sizes, labels


def _exact(sample: np.ndarray, tuning: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    similar, nearest = require_faiss().knn(tuning, sample, count, metric=require_faiss().METRIC_INNER_PRODUCT)
    return nearest, similar


def _upper(values: np.ndarray, share: float) -> float:
    """What at most `share` of the values exceed; never below zero."""
    return max(0.0, float(np.quantile(values, 1 - share, method="higher")))


def _coded(codebook: Codebook, tables: Tables, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(n,) float64 products as the scan sees them, of row i with query queries[i]."""
    found = quantised.pair_sums(codebook.encode(rows), tables.entries, queries)
    return np.asarray(tables.base[queries] + tables.step[queries] * found)


def _passing(
    codebook: Codebook,
    tables: Tables,
    sample: np.ndarray,
    labels: np.ndarray,
    open_cells: np.ndarray,
    cuts: np.ndarray,
) -> float:
    """The share of visited (seed, row) pairs whose codes pass, on a part of the sample."""
    rows, seeds = min(len(sample), 2048), min(len(cuts), 32)
    step = max(1, len(sample) // rows)
    chosen = np.arange(0, rows * step, step)
    codes = codebook.encode(sample[chosen])
    found = quantised.sums(codes, tables.entries[:seeds])[:, : len(chosen)]
    coded = tables.base[:seeds, None] + tables.step[:seeds, None] * found
    visited = open_cells[:seeds][:, labels[chosen]]
    return float(((coded >= cuts[:seeds, None]) & visited).sum() / max(1, visited.sum()))


# ---- the search -----------------------------------------------------------------------------------------------------


@dataclass
class ExactBlock:
    """The nearest of a few seeds, exactly: every row is compared with every seed."""

    seeds: np.ndarray
    """(m, d) as stored."""
    count: int
    _wide: np.ndarray = field(init=False)
    _best: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._wide = widen(self.seeds)
        self._best = Neighbours.none(len(self.seeds), self.count)

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """ids: (n,) uint64; rows: (n, d) float32, the stored values."""
        margin = np.float32(4.0 * rows.shape[1] * 2.0**-24)
        _take(self._wide @ rows.T, self._wide, rows, ids, margin, self._best.ids, self._best.similarity)

    def neighbours(self) -> Neighbours:
        """The best of all that was added."""
        return self._best


@dataclass
class SeedBlock:
    """Seeds that are searched for together, and the best found for them so far."""

    plan: SearchPlan
    seeds: np.ndarray
    """(m, d) as stored."""
    count: int
    _wide: np.ndarray = field(init=False)
    _fixed: np.ndarray = field(init=False)
    _tables: Tables = field(init=False)
    _cuts: np.ndarray = field(init=False)
    _visits: tuple[np.ndarray, np.ndarray] = field(init=False)
    _best: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self._wide = widen(self.seeds)
        self._fixed = _rounded(self._wide)
        with one_thread():
            self._tables = self.plan.codebook.tables(self._wide)
            cell, seed = np.nonzero(self.plan.visits(self._wide).T)
        self._visits = seed, np.searchsorted(cell, np.arange(len(self.plan.cells) + 1))
        self._cuts = np.zeros(len(self.seeds), np.uint8)
        self._best = Neighbours.none(len(self.seeds), self.count)

    def add(self, ids: np.ndarray, rows: np.ndarray, beside: ExactBlock | None = None) -> None:
        """Look at the next stretch of the pool. ids: (n,) uint64; rows: (n, d) as stored; beside: sees it as well."""
        labels = np.empty(len(rows), np.int64)
        with one_thread():
            for chunk in (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)):
                wide = widen(rows[chunk])
                labels[chunk] = self.plan.assign(wide)
                if beside is not None:
                    beside.add(ids[chunk], wide)
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(self.plan.cells) + 1))
        seeds, first = self._visits
        shape = quantised.shape_of(self.plan.codebook.pieces)
        # Rounding moves a vector by at most sqrt(d) / 2 of a step, and a product of two by twice that and a little.
        margin = np.float32(1.1 * rows.shape[1] ** 0.5 / FIXED)
        for cell in range(len(self.plan.cells)):
            mine, visitors = order[starts[cell] : starts[cell + 1]], seeds[first[cell] : first[cell + 1]]
            if not len(mine) or not len(visitors):
                continue
            for start in range(0, len(mine), SCAN_ROWS):
                part = mine[start : start + SCAN_ROWS]
                members = widen(rows, part)
                _scan(
                    shape,
                    self.plan.codebook.encode(members),
                    members,
                    _rounded(members),
                    ids[part],
                    visitors,
                    self._wide,
                    self._fixed,
                    self._tables.entries,
                    self._tables.base,
                    self._tables.step,
                    self.plan.slope,
                    self.plan.cut_margin,
                    margin,
                    self._cuts,
                    self._best.ids,
                    self._best.similarity,
                )

    def neighbours(self) -> Neighbours:
        """The best of all that was added."""
        return self._best


def _rounded(rows: np.ndarray) -> np.ndarray:
    """(n, d) int16, multiples of 1 / FIXED: products of unit vectors fit in 32 bits, and so do all partial sums."""
    return np.asarray(_fixed(rows))


@numba.njit(cache=True, nogil=True)
def _fixed(rows: np.ndarray) -> np.ndarray:
    found = np.empty(rows.shape, np.int16)
    for i in range(len(rows)):
        for k in range(rows.shape[1]):
            found[i, k] = np.int16(np.rint(rows[i, k] * np.float32(FIXED)))
    return found


@numba.njit(cache=True, nogil=True)
def _scan(  # type: ignore[no-untyped-def]
    shape,
    codes,
    rows,
    fixed_rows,
    ids,
    visitors,
    seeds,
    fixed_seeds,
    entries,
    base,
    step,
    slope,
    cut_margin,
    margin,
    cuts,
    best_ids,
    best,
):
    """The scan of one cell for the seeds that visit it."""
    masks = np.zeros(4, np.uint32)
    queries = np.zeros(4, np.int64)
    for start in range(0, len(visitors), 4):
        asking = min(4, len(visitors) - start)
        for i in range(4):
            queries[i] = visitors[start + min(i, asking - 1)]
        for block in range(len(codes)):
            masks_of(shape, codes[block], entries, queries, cuts, masks)
            for i in range(asking):
                found = masks[i]
                row = block * 32
                while found and row < len(rows):
                    if found & 1:
                        seed = queries[i]
                        if _product(fixed_seeds, seed, fixed_rows, row) >= best[seed, -1] - margin and _insert(
                            best_ids[seed], best[seed], ids[row], _definition(seeds[seed], rows[row])
                        ):
                            lowest = slope * best[seed, -1] - cut_margin
                            cut = np.floor((lowest - base[seed]) / step[seed])
                            cuts[seed] = np.uint8(min(255.0, max(0.0, cut)))
                    found >>= np.uint32(1)
                    row += 1


@numba.njit(cache=True, nogil=True)
def _product(seeds: np.ndarray, seed: int, rows: np.ndarray, row: int) -> np.float32:
    """Of two vectors of `_fixed`: half the bytes of float32, and the processor adds pairs of products at once."""
    total = np.int32(0)
    for k in range(seeds.shape[1]):
        total = np.int32(total + np.int32(seeds[seed, k]) * np.int32(rows[row, k]))
    return np.float32(total) * np.float32(1.0 / (FIXED * FIXED))


@numba.njit(cache=True, nogil=True)
def _take(  # type: ignore[no-untyped-def]
    products, seeds, rows, ids, margin, best_ids, best
):
    for seed in range(len(seeds)):
        for row in range(len(rows)):
            if products[seed, row] >= best[seed, -1] - margin:
                _insert(best_ids[seed], best[seed], ids[row], _definition(seeds[seed], rows[row]))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _definition(one: np.ndarray, other: np.ndarray) -> np.float32:
    total = 0.0
    for k in range(len(one)):
        total += np.float64(one[k]) * np.float64(other[k])
    return np.float32(total)


@numba.njit(cache=True, nogil=True)
def _insert(ids: np.ndarray, best: np.ndarray, image: int, similar: np.float32) -> bool:
    """Put an image among the best, by similarity, then id; whether it came in."""
    last = len(ids) - 1
    if similar < best[last] or (similar == best[last] and image > ids[last]):
        return False
    place = last
    while place > 0 and (best[place - 1] < similar or (best[place - 1] == similar and ids[place - 1] > image)):
        best[place], ids[place] = best[place - 1], ids[place - 1]
        place -= 1
    best[place], ids[place] = similar, image
    return True


def recall_of(found: Neighbours, exact: Neighbours) -> tuple[int, int]:
    """(neighbours found, neighbours there are); one as similar as the last of them counts as one of them."""
    there = exact.ids != NO_ID
    lowest = np.where(there, exact.similarity, np.inf).min(axis=1, initial=np.inf)
    hits = ((found.similarity >= lowest[:, None]) & (found.ids != NO_ID)).sum(axis=1)
    return int(np.minimum(hits, there.sum(axis=1)).sum()), int(there.sum())
