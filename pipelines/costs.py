"""CPU seconds of the stages that work on vectors and tables, as sums of terms: a count from the algorithm times a rate.

A term is what one step of an algorithm does, counted from its constants (`curation/duplicates/cells.py` and so on); its
rate, nanoseconds of one core per unit, was measured by `benchmarks/plan.py`, which divides the CPU time of that step by
the units that this file counts. So a prediction is the same arithmetic with other counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curation import nearest, seed_calibration, seed_plan
from curation.clusters import SEEDING_POINTS
from curation.duplicates.cells import CELLS_PER_ROOT, COMPONENTS, TRAINING_PER_CELL, TRAINING_ROUNDS
from curation.quantised import pieces_of
from curation.seeding import CELL_POINTS
from pipelines.hardware import KNOWN
from pipelines.retrieve_cluster import TASK_ROWS as CLUSTER_ROWS
from pipelines.retrieve_sample import BLOCK_ROWS as SEED_BLOCK
from pipelines.retrieve_sample import HELD_OUT_NEIGHBOURS
from pipelines.stages.mix import PART_ROWS as RANGE_ROWS


@dataclass(frozen=True)
class Term:
    """One step of a stage. serial: it runs in the driver, on one core."""

    step: str
    formula: str
    units: float
    rate: str
    serial: bool = False

    def seconds(self, rates: Mapping[str, float] = KNOWN) -> float:
        return self.units * rates[self.rate] * 1e-9

    def line(self) -> str:
        each = KNOWN[self.rate]
        return f"{self.step}: {self.formula} = {self.units:.3g} x {each:.3g} ns = {self.seconds():,.3g} CPU s"


@dataclass(frozen=True)
class Meetings:
    """What decides how much the join compares; it belongs to the vectors, and each run measures it.

    share: of all rows, those a vector is compared with. visits: cells a vector goes to, its home included. queries:
    compared with everything to choose the rule and to measure the recall.
    """

    share: float
    visits: float
    queries: float

    @classmethod
    def of(cls, law: str, known: Mapping[str, float] = KNOWN) -> "Meetings":
        """law: `hard` or `easy` of `benchmarks/data.py`."""
        return cls(known[f"share_{law}"], known[f"visits_{law}"], known[f"queries_{law}"])


def cell_count(rows: int, dimension: int, memory_bytes: int) -> int:
    """Cells of the join, as `curation.duplicates.planning` trains them within the memory of a worker."""
    room = _training_room(dimension, memory_bytes)
    return int(min(max(16, round(CELLS_PER_ROOT * math.sqrt(rows))), rows, max(16, room // 8)))


def _training_room(dimension: int, memory_bytes: int) -> int:
    return memory_bytes // 4 // (6 * dimension)


def join(
    rows: int, dimension: int, memory_bytes: int = 4 << 30, law: str = "hard", meetings: Meetings | None = None
) -> list[Term]:
    """The self join of `curation.duplicates.join` through cells and sketches.

    law: `hard` or `easy` vectors of `benchmarks/data.py`. meetings: other than were calibrated for them.
    """
    meetings = Meetings.of(law) if meetings is None else meetings
    n, d, p = float(rows), dimension, min(COMPONENTS, dimension)
    cells = cell_count(rows, dimension, memory_bytes)
    sample = min(cells * TRAINING_PER_CELL, rows, _training_room(dimension, memory_bytes))
    train = float(sample) * (d * d + 2 * d * p + (TRAINING_ROUNDS + 1) * cells * p)
    share, visits, queries = meetings.share, meetings.visits, min(meetings.queries, rows)
    return [
        Term("rows stored with sketches", "n d", n * d, "store"),
        Term(
            "cells trained",
            f"{sample:,} rows (d^2 + 2 d p + {TRAINING_ROUNDS + 1} c p), c = {cells:,}, p = {p}",
            train,
            "train",
        ),
        Term("recall measured", f"{queries:,.0f} queries x n", queries * n, "truth"),
        Term("rule chosen, intervals", f"{queries:,.0f} queries", queries, "choose"),
        Term("rows assigned, products", "n p (d + c)", n * p * (d + cells), "assign"),
        Term("rows assigned, visits", "n c", n * cells, "visit"),
        Term("sketches compared", f"n^2 x {share:.4g}", n * n * share, f"scan_{law}"),
        Term("visits opened", f"n x {visits:.3g}", n * visits, "open"),
        Term("pairs verified, forests", "n", n, "verify"),
    ]


def exact_pairs(rows: int, dimension: int) -> list[Term]:
    """All pairs by products."""
    return [Term("all pairs", "d n^2 / 2", dimension * float(rows) * rows / 2, "product")]


def components(rows: int) -> list[Term]:
    """Components, representatives and tables in the driver of dedup."""
    return [Term("components, representatives, tables", "n", float(rows), "driver", serial=True)]


def searched(centroids: int) -> float:
    """Centroids that a vector is compared with to find its nearest: all, or by groups (`curation.nearest`)."""
    if centroids <= nearest.FLAT:
        return centroids
    groups = 2 * round(math.sqrt(centroids))
    return groups + nearest.VISITS * centroids / groups


def kmeans(points: int, count: int, dimension: int, steps: int, name: str = "leaf") -> list[Term]:
    """Seeding and Lloyd steps on `points` vectors."""
    coarse = max(1, round(math.sqrt(count)))
    members = min(CELL_POINTS, SEEDING_POINTS * count / coarse, points / coarse)
    seeding = coarse * members * members * dimension
    compared = searched(count)
    return [
        Term(f"{name}: seeds", f"{coarse:,} cells x {members:,.0f}^2 x d", seeding, "seeding"),
        Term(
            f"{name}: Lloyd steps",
            f"{points:,} x {compared:,.0f} centroids compared x d x {steps} steps at most",
            float(points) * compared * dimension * steps,
            "lloyd" if count <= nearest.FLAT else "product",
        ),
    ]


def cluster(
    rows: int, dimension: int, levels: Sequence[int], steps: int, per_centroid: int, resample: Sequence[int] = ()
) -> list[Term]:
    """Training on a sample, the levels above on the centroids below, assignment of all rows."""
    leaf = levels[0]
    terms = kmeans(min(rows, max(leaf, leaf * per_centroid)), leaf, dimension, steps)
    again = list(resample) or [0] + [10] * (len(levels) - 1)
    for points, count, repeats in zip(levels, levels[1:], again[1:], strict=False):
        for term in kmeans(points, count, dimension, steps, f"level of {count:,}"):
            terms.append(
                Term(term.step, f"({term.formula}) x {1 + repeats} samplings", term.units * (1 + repeats), term.rate)
            )
    terms.append(
        Term(
            "rows assigned",
            f"n x {searched(leaf):,.0f} centroids compared x d",
            float(rows) * searched(leaf) * dimension,
            "product",
        )
    )
    return terms


def retrieve(
    rows: int, dimension: int, near: int, by_cluster: int, leaf: int, share: float | None = None
) -> list[Term]:
    """Sample mode: cells and 4-bit codes, or everything where that is small. Cluster mode: seeds to leaf clusters."""
    n, d = float(rows), dimension
    terms = []
    if near and seed_plan.is_small(near, rows):
        terms.append(Term("sample mode: all compared", f"{near:,} seeds x n x d", near * n * d, "product"))
    elif near:
        share = KNOWN["share_scanned"] if share is None else share
        sample, held = min(rows, seed_calibration.SAMPLE_ROWS), HELD_OUT_NEIGHBOURS // 4
        cells, tuned = seed_calibration.cells_for(near, sample), min(seed_calibration.TUNING_SEEDS, near // 2)
        pieces, passes = pieces_of(dimension), -(-near // SEED_BLOCK)
        terms += [
            Term("sample mode: calibrated", f"{tuned} seeds x {sample:,} rows x d", float(tuned) * sample * d, "tune"),
            Term("sample mode: first neighbours", f"{near:,} seeds x d", float(near) * d, "warm"),
            Term("sample mode: rows coded", f"n d x {passes:,} blocks of seeds", n * d * passes, "code"),
            Term(
                "sample mode: rows to cells",
                f"n x {cells:,} cells x {pieces} pieces x {passes:,} blocks",
                n * cells * pieces * passes,
                "scan_code",
            ),
            Term(
                "sample mode: codes scanned, the near ones compared",
                f"n x {near:,} seeds x {share:.3g} x {pieces} pieces",
                n * near * share * pieces,
                "scan_code",
            ),
            Term("sample mode: recall measured", f"n x {held} seeds x {pieces} pieces", n * held * pieces, "scan_code"),
        ]
    if by_cluster:
        compared = searched(leaf)
        terms += [
            Term(
                "cluster mode: seeds to clusters",
                f"{by_cluster:,} seeds x {compared:,.0f} centroids compared x d",
                by_cluster * compared * d,
                "product",
            ),
            Term("cluster mode: rows in hash order", "n log2(rows of a task)", n * math.log2(CLUSTER_ROWS), "sort"),
        ]
    return terms


def balance(rows: int, target: int, part_rows: int = 1000) -> list[Term]:
    """Each part gives at most the whole target, so that small parts give nearly all of their rows."""
    parts = -(-rows // part_rows)
    given = min(rows, parts * target)
    return [
        Term(
            "parts put in hash order", "n log2(rows of a part)", rows * math.log2(max(2, min(rows, part_rows))), "sort"
        ),
        Term("what parts give put in order", f"{given:,} x log2", given * math.log2(max(2, given)), "sort"),
    ]


def mix(rows: int) -> list[Term]:
    """rows: the nominal count."""
    doublings = math.log2(max(2, min(rows, RANGE_ROWS)))
    return [Term("rows put in order of id", "rows brought x log2(rows of a range)", rows * doublings, "mix_row")]


def manifest(rows: int) -> list[Term]:
    return [Term("tables joined by id", "n", float(rows), "manifest_row")]


def seconds(terms: Sequence[Term], rates: Mapping[str, float] = KNOWN) -> float:
    return sum(term.seconds(rates) for term in terms)
