"""The nearest pool images of many seeds, at a recall that is asked for, in one pass over a pool of any size.

The plan (`curation.seed_plan`, measured by `curation.seed_calibration`) says which cells a seed visits and which codes
pass there; the definition of similarity decides. The pool is never shuffled: each stretch of it is coded, scanned and
forgotten. A seed looks at its best cell first and never at rows below a floor that is known from a sample of the pool:
a cut is as strong as the best found so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numba
import numpy as np

from curation import shuffles
from curation.duplicates.recall import wilson
from curation.halves import stored_bits, widen, widen_row
from curation.nearest import one_thread
from curation.neighbours import NO_ID, Neighbours
from curation.order import generator
from curation.quantised import Tables
from curation.seed_plan import SearchPlan
from curation.shuffles import masks_of, padded, sum_of_products, trailing_zeros

CHUNK = 2048
RESAMPLES = 1000
SCAN_ROWS = 4096
FIXED = 32_000
"""Steps in 1 of the int16 of a seed; a row has 127 steps in its largest value. So are the codes' nominees compared:
half the bytes of float16 come from memory."""
ROUNDING = 1.8
"""Steps of a row that such a product may be off: six standard deviations of rounding, and the seed's own."""


@dataclass(frozen=True)
class Stretch:
    """Rows of the pool, coded; several blocks of seeds may look at it."""

    ids: np.ndarray
    bits: np.ndarray
    """(n, d): see `stored_bits`."""
    labels: np.ndarray
    """(n,) int64 cell of each row."""
    parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    """(cell, (k,) int64 rows of it, their codes in blocks, (k, padded(d)) int8 and (k,) float32 steps of them)."""

    @classmethod
    def of(cls, plan: SearchPlan, ids: np.ndarray, rows: np.ndarray) -> "Stretch":
        """ids: (n,) uint64; rows: (n, d) as stored."""
        small = np.zeros((len(rows), padded(rows.shape[1])), np.int8)
        steps = np.empty(len(rows), np.float32)
        codes = np.empty((len(rows), plan.codebook.pieces // 2), np.uint8)
        labels = np.empty(len(rows), np.int64)
        buffer = np.empty((min(CHUNK, len(rows)), rows.shape[1]), np.float32)
        # So few at a time stay in the processor's caches from one step to the next.
        for chunk in (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)):
            wide = widen(rows[chunk], out=buffer)
            codes[chunk] = plan.codebook.encode(wide)
            labels[chunk] = plan.assign(shuffles.blocked(codes[chunk]))[: len(wide)]
            _round_rows(wide, small[chunk], steps[chunk])
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(plan.cells) + 1))
        parts = [
            (cell, at, shuffles.gathered(codes, at), small[at], steps[at])
            for cell in range(len(plan.cells))
            for at in _cut(order[starts[cell] : starts[cell + 1]])
        ]
        return cls(ids, stored_bits(rows), labels, parts)


def _cut(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), SCAN_ROWS):
        yield rows[start : start + SCAN_ROWS]


@dataclass
class SeedBlock:
    """Seeds that are searched for together, and the best found for them so far."""

    plan: SearchPlan
    seeds: np.ndarray
    """(m, d) as stored."""
    count: int
    floors: np.ndarray | None = None
    """(m,) float32: similarities that `count` images of the pool are known to reach. None: not known."""
    _wide: np.ndarray = field(init=False)
    _fixed: np.ndarray = field(init=False)
    _tables: Tables = field(init=False)
    _cuts: np.ndarray = field(init=False)
    _visits: list[tuple[np.ndarray, np.ndarray]] = field(init=False)
    _best: Neighbours = field(init=False)
    compared: int = field(init=False, default=0)
    """Pairs that the codes passed."""

    def __post_init__(self) -> None:
        self._wide = widen(self.seeds)
        self._fixed = np.zeros((len(self._wide), padded(self._wide.shape[1])), np.int16)
        _round(self._wide, self._fixed)
        with one_thread():
            self._tables = self.plan.codebook.tables(self._wide)
            visited, best = self.plan.visits(self._wide)
        # The best cell first: what is found there spares much in the others.
        first = np.zeros_like(visited)
        first[np.arange(len(best)), best] = True
        self._visits = [_by_cell(first), _by_cell(visited & ~first)]
        if self.floors is None:
            self.floors = np.full(len(self.seeds), -np.inf, np.float32)
        self._cuts = np.array(
            [_cut_at(*pair, self.plan.slope, self.plan.cut_margin) for pair in self._known()], np.uint8
        ).reshape(-1)
        self._best = Neighbours.none(len(self.seeds), self.count)

    def _known(self) -> Iterator[tuple[np.float32, np.float64, np.float64]]:
        assert self.floors is not None
        yield from zip(self.floors, self._tables.base, self._tables.step, strict=True)

    def add(self, stretch: Stretch) -> None:
        """Look at the next stretch of the pool."""
        shape = shuffles.shape_of(self.plan.codebook.pieces)
        for seeds, starts in self._visits:
            for cell, at, codes, small, steps in stretch.parts:
                visitors = seeds[starts[cell] : starts[cell + 1]]
                if len(visitors):
                    self.compared += _scan(
                        shape,
                        codes,
                        at,
                        small,
                        steps,
                        stretch.bits,
                        stretch.ids,
                        visitors,
                        self._wide,
                        self._fixed,
                        self._tables.entries,
                        self._tables.base,
                        self._tables.step,
                        self.plan.slope,
                        self.plan.cut_margin,
                        self.floors,
                        self._cuts,
                        self._best.ids,
                        self._best.similarity,
                    )

    def neighbours(self) -> Neighbours:
        """The best of all that was added, none below the floors."""
        return self._best


def _by_cell(visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seeds in order of the cell they visit, (c + 1,) where each cell's begin)."""
    cell, seed = np.nonzero(visits.T)
    return seed, np.searchsorted(cell, np.arange(visits.shape[1] + 1))


@numba.njit(cache=True, nogil=True)
def _cut_at(lowest: float, base: float, step: float, slope: float, margin: float) -> int:
    """The least sum of codes of a row that may reach a similarity."""
    return int(min(255.0, max(0.0, np.floor((slope * lowest - margin - base) / step))))


@numba.njit(cache=True, nogil=True)
def _round_rows(rows: np.ndarray, small: np.ndarray, steps: np.ndarray) -> None:
    """Rows as multiples of 1 / 127 of their largest value."""
    for i in range(len(rows)):
        largest = np.float32(1e-12)
        for k in range(rows.shape[1]):
            largest = max(largest, abs(rows[i, k]))
        steps[i] = largest / np.float32(127)
        scale = np.float32(127) / largest
        for k in range(rows.shape[1]):
            small[i, k] = np.int8(np.rint(rows[i, k] * scale))


@numba.njit(cache=True, nogil=True)
def _round(rows: np.ndarray, fixed: np.ndarray) -> None:
    """Multiples of 1 / FIXED: products of unit vectors and all partial sums fit in 32 bits."""
    for i in range(len(rows)):
        for k in range(rows.shape[1]):
            fixed[i, k] = np.int16(np.rint(rows[i, k] * np.float32(FIXED)))


@numba.njit(cache=True, nogil=True)
def _scan(  # type: ignore[no-untyped-def]
    shape,
    codes,
    at,
    small_rows,
    steps,
    bits,
    ids,
    visitors,
    seeds,
    fixed_seeds,
    entries,
    base,
    step,
    slope,
    cut_margin,
    floors,
    cuts,
    best_ids,
    best,
):
    """The scan of one part of a cell for the seeds that visit it; how many pairs were compared."""
    masks = np.zeros(4, np.uint32)
    queries = np.zeros(4, np.int64)
    passed, count = np.empty((4, len(codes) * 32), np.int32), np.zeros(4, np.int64)
    compared = 0
    row_bits = np.empty(bits.shape[1], np.uint32)
    values = row_bits.view(np.float32)
    for start in range(0, len(visitors), 4):
        asking = min(4, len(visitors) - start)
        for i in range(4):
            queries[i] = visitors[start + min(i, asking - 1)]
            count[i] = 0
        # All codes before any row: rows would push the tables out of the nearest cache.
        for block in range(len(codes)):
            masks_of(shape, codes[block], entries, queries, cuts, masks)
            for i in range(asking):
                found = masks[i]
                while found:
                    passed[i, count[i]] = block * 32 + trailing_zeros(found)
                    count[i] += 1
                    found &= found - np.uint32(1)
        for i in range(asking):
            seed = queries[i]
            for place in range(count[i]):
                row = passed[i, place]
                if row >= len(at):
                    break
                compared += 1
                lowest = max(best[seed, -1], floors[seed])
                product = np.float32(sum_of_products(shape, fixed_seeds, seed, small_rows, row))
                if (product * np.float32(1.0 / FIXED) + np.float32(ROUNDING)) * steps[row] < lowest:
                    continue
                widen_row(bits[at[row]], row_bits, values)
                similar = _definition(seeds[seed], values)
                if similar >= floors[seed] and _insert(best_ids[seed], best[seed], ids[at[row]], similar):
                    lowest = max(best[seed, -1], floors[seed])
                    cuts[seed] = np.uint8(_cut_at(lowest, base[seed], step[seed], slope, cut_margin))
    return compared


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


def hits_of(found: Neighbours, exact: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """((m,) neighbours found, (m,) neighbours there are); one as similar as the last of them counts as one of them."""
    there = exact.ids != NO_ID
    lowest = np.where(there, exact.similarity, np.inf).min(axis=1, initial=np.inf)
    hits = ((found.similarity >= lowest[:, None]) & (found.ids != NO_ID)).sum(axis=1)
    return np.minimum(hits, there.sum(axis=1)), there.sum(axis=1)


def recall_of(found: Neighbours, exact: Neighbours) -> tuple[int, int]:
    """(neighbours found, neighbours there are) of all seeds."""
    hits, there = hits_of(found, exact)
    return int(hits.sum()), int(there.sum())


def recall_with_interval(found: Neighbours, exact: Neighbours) -> dict[str, float]:
    """Recall and its 95 % interval: a bootstrap over seeds, whose neighbours are found and missed together.

    Where all were found it is Wilson's for so many neighbours.
    """
    hits, there = hits_of(found, exact)
    share = float(hits.sum() / max(1, there.sum()))
    if share in (0.0, 1.0):
        low, high = wilson(share, max(1, int(there.sum())))
    else:
        drawn = generator(0, "recall of seeds").poisson(1.0, (RESAMPLES, len(hits)))
        low, high = (float(x) for x in np.quantile((drawn @ hits) / np.maximum(drawn @ there, 1), [0.025, 0.975]))
    return {
        "measured": round(share, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "seeds": len(hits),
        "neighbours": int(there.sum()),
    }
