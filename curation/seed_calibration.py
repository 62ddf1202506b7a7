"""The plan of a search for many seeds, measured on a sample of seeds and rows (`curation.seed_plan`).

How far below the best cell a seed looks, and how far below its N-th neighbour a code may lie, are quantiles over the
neighbours that other seeds have in the sample; each may lose a part of what the recall asked for allows.
"""

from dataclasses import replace

import numpy as np

from curation import quantised, shuffles
from curation.nearest import one_thread, squared_distances
from curation.order import generator
from curation.quantised import Codebook, Tables
from curation.search import require_faiss
from curation.seed_plan import SearchPlan
from curation.seed_search import SeedBlock, Stretch, recall_of

CELL_TRAINING = 64
"""Rows per cell that k-means sees."""
CELL_ITERATIONS = 6
TUNING_SEEDS = 1024
SAMPLE_ROWS = 65_536
ERROR_SEEDS, ERROR_ROWS, ERROR_NEAREST = 64, 16_384, 16
"""What the error of codes is measured on: so many nearest rows of so many seeds."""
SPENT = (4.0, 2.8, 2.4, 2.0, 1.7, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25)
"""Of the loss that the recall asked for allows, what each margin may lose by itself; tried from the first one on. Many
of these neighbours are found all the same, since only the last of a seed's is as low as its cut."""
LOSS = 0.75
"""Of the loss allowed, what a search of the sample may have; the rest is for other seeds than these."""


def calibrate(
    sample: np.ndarray, tuning: np.ndarray, count: int, *, rows: int, seeds: int, recall: float, seed: int
) -> SearchPlan:
    """The plan that finds a share `recall` of the `count` nearest, as measured on `tuning`.

    sample: (b, d) float32 rows drawn from the pool of `rows`; tuning: (t, d) float32 seeds of `seeds`.
    """
    with one_thread():
        codebook = quantised.train(sample, seed)
        cells = _trained_cells(sample, cells_for(seeds, len(sample)), seed)
        plan = SearchPlan(cells, np.zeros(len(cells), np.float32), codebook, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
        plan = _with_error(plan, sample, tuning)
        stretch = Stretch.of(plan, np.arange(len(sample), dtype=np.uint64), sample)
        sizes = np.bincount(stretch.labels, minlength=len(cells))
        plan = replace(plan, reach=_reach(plan, sample, stretch, sizes * (rows / len(sample))))
        # The nearest in the sample are no easier to find than the nearest in the pool, which lie higher.
        search = SeedBlock(plan.surely(), tuning, min(count, len(sample)))
        search.add(stretch)
        found = search.neighbours()
        nearest = found.ids.astype(np.int64)
        expected = plan.expected_best(tuning)
        missed = expected.max(axis=1, keepdims=True) - np.take_along_axis(expected, stretch.labels[nearest], axis=1)
        who = np.repeat(np.arange(len(tuning)), nearest.shape[1])
        lowest = found.similarity[:, -1].astype(np.float64)
        tables = codebook.tables(tuning)
        short = plan.slope * lowest[who] - _coded(codebook, tables, sample[nearest.ravel()], who)
        for spent in SPENT:
            allowed = (1 - recall) * spent
            plan = replace(plan, visit_margin=_upper(missed.ravel(), allowed), cut_margin=_upper(short, allowed))
            # As strict as the search can become: the last neighbour's similarity is known from the beginning.
            trial = SeedBlock(plan, tuning, nearest.shape[1], found.similarity[:, -1].copy())
            trial.add(stretch)
            hits, there = recall_of(trial.neighbours(), found)
            if hits >= (1 - LOSS * (1 - recall)) * there:
                break
        open_cells = plan.visits(tuning)[0]
        share = float((open_cells @ sizes).mean()) / len(sample)
        passing = _passing(codebook, tables, sample, stretch.labels, open_cells, plan.slope * lowest - plan.cut_margin)
    return replace(plan, share=share, passing=passing)


def _with_error(plan: SearchPlan, sample: np.ndarray, tuning: np.ndarray) -> SearchPlan:
    """With the slope of coded products against true ones, and the deviation from it, among near pairs."""
    faiss = require_faiss()
    seeds, rows = tuning[:ERROR_SEEDS], sample[: min(ERROR_ROWS, len(sample))]
    near, place = faiss.knn(seeds, rows, min(ERROR_NEAREST, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    who = np.repeat(np.arange(len(seeds)), near.shape[1])
    coded = _coded(plan.codebook, plan.codebook.tables(seeds), rows[place.ravel()], who)
    true = near.ravel().astype(np.float64)
    slope = max(0.0, float((coded * true).sum() / max((true * true).sum(), 1e-12)))
    deviation = float(np.sqrt(np.mean((slope * true - coded) ** 2)))
    return replace(plan, slope=slope, deviation=max(deviation, 1e-6))


def _trained_cells(sample: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(c, d) float32 centroids."""
    faiss = require_faiss()
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
    return np.asarray(found.centroids)


def _reach(plan: SearchPlan, sample: np.ndarray, stretch: Stretch, members: np.ndarray) -> np.ndarray:
    """(c,) float32: how far the best of so many normal values lies above their mean. members: (c,) of the pool."""
    squares = squared_distances(sample, plan.cells, stretch.labels)
    counts = np.bincount(stretch.labels, minlength=len(plan.cells))
    total = np.bincount(stretch.labels, squares, minlength=len(plan.cells))
    deviation = np.sqrt(total / np.maximum(counts, 1) / plan.cells.shape[1])
    return np.asarray(deviation * np.sqrt(2 * np.log(np.maximum(members, 2.0))), np.float32)


def cells_for(seeds: int, sample: int) -> int:
    """How many cells: assigning a row costs a product per cell; scanning it, a coded product per seed and visit."""
    count = int(np.clip(2 ** (1 + round(np.log2(max(1, seeds)) / 2)), 16, 1024))
    return max(1, min(count, sample // 16))


def _upper(values: np.ndarray, share: float) -> float:
    """What at most `share` of the values exceed; never below zero."""
    return max(0.0, float(np.quantile(values, 1 - share, method="higher")))


def _coded(codebook: Codebook, tables: Tables, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(n,) float64 products as the scan sees them, of row i with query queries[i]."""
    found = shuffles.pair_sums(shuffles.blocked(codebook.encode(rows)), tables.entries, queries)
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
    codes = shuffles.blocked(codebook.encode(sample[chosen]))
    found = quantised.sums(codes, tables.entries[:seeds])[:, : len(chosen)]
    coded = tables.base[:seeds, None] + tables.step[:seeds, None] * found
    visited = open_cells[:seeds][:, labels[chosen]]
    return float(((coded >= cuts[:seeds, None]) & visited).sum() / max(1, visited.sum()))
