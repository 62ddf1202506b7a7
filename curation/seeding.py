"""First centroids: greedy k-means++ inside coarse cells, the seeds shared out among the cells by what they gain.

k-means++ (Arthur and Vassilvitskii 2007; greedy trials as in its authors' code) is one long chain of draws over all
points. A k-means of about sqrt(k) cells cuts it into short chains over few points, each a task of its own: the cost
falls from n k d to about n sqrt(k) d. Every cell draws more seeds than it is due, and notes what each gains; the k
greatest gains are taken.
"""

import math
from collections.abc import Sequence

import numpy as np

from curation.nearest import squared_norms

MORE = 1.5
"""Seeds that a cell draws, over those due to it by its share of the objective."""
TRIALS = 16
"""Draws of which the best becomes a seed; the usual 2 + ln k gives objectives about 1 % higher."""
CELL_POINTS = 8192
"""Points of a cell that are looked at, all against all; a larger cell is sampled."""


def seeds_due(potentials: np.ndarray, members: np.ndarray, count: int) -> np.ndarray:
    """(m,) int64: how many seeds each cell draws. potentials: (m,) float64 objectives, members: (m,) int64."""
    share = potentials / max(float(potentials.sum()), 1e-300)
    most = np.minimum(members, CELL_POINTS)
    return np.asarray(np.minimum(most, np.ceil(MORE * count * share).astype(np.int64) + 4))


def cell_seeds(vectors: np.ndarray, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(s,) int64 rows of at most `count` seeds in the order drawn, (s,) float64 what each takes off the objective.

    vectors: (n, d) float32. The first gains infinitely. Fewer than `count` when only repeats of seeds are left.
    """
    between = _all_squares(vectors)
    candidates = random.integers(len(vectors), size=TRIALS)
    potential = np.full(len(vectors), np.inf, np.float32)
    total = math.inf
    rows: list[int] = []
    gains: list[float] = []
    while True:
        squares = np.minimum(between[candidates], potential)
        after = squares.sum(axis=1, dtype=np.float64)
        best = int(after.argmin())
        rows.append(int(candidates[best]))
        gains.append(total - float(after[best]))
        potential, total = squares[best].copy(), float(after[best])
        if len(rows) == count or total <= 0:
            return np.array(rows), np.array(gains)
        cumulative = np.cumsum(potential, dtype=np.float64)
        drawn = np.searchsorted(cumulative, random.random(TRIALS) * cumulative[-1], side="right")
        drawn = np.minimum(drawn, len(vectors) - 1)
        drawn = drawn[potential[drawn] > 0]
        candidates = drawn if len(drawn) else np.array([int(potential.argmax())])


def _all_squares(vectors: np.ndarray) -> np.ndarray:
    """(n, n) float32 squared distances; 0 below the rounding of a float32 product, where repeats lie."""
    norms = squared_norms(vectors).astype(np.float32)
    squares = vectors @ vectors.T
    squares *= np.float32(-2.0)
    squares += norms
    squares += norms[:, None]
    squares[squares < np.float32(1e-6) * norms.max()] = 0.0
    np.fill_diagonal(squares, 0.0)
    return np.asarray(squares)


def shared_out(found: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """At most `count` rows: the seeds of all cells with the greatest gains; a seed never goes before one drawn earlier.

    found: per cell, the rows of its seeds in the order drawn and their gains.
    """
    rows = np.concatenate([rows for rows, _ in found])
    gains = np.concatenate([np.minimum.accumulate(gains) for _, gains in found])
    return np.asarray(rows[np.argsort(-gains, kind="stable")[:count]])
