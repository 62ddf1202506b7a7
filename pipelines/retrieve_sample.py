"""Retrieval by sample: the N nearest pool images of every seed, all seed sets in one pass over the pool.

One task calibrates the search on a sample; one per block of seeds finds there how near its neighbours are at least. A
task searches a range of the pool for a block of seeds and keeps what it found (pipelines/retrieve_kept.py); another
brings the ranges of a block together. The driver holds N neighbours per seed and nothing per pool image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import neighbours, order, retrieval, seed_calibration, seed_plan, seed_search, vectors
from curation.errors import UserError
from curation.halves import widen
from curation.neighbours import Neighbours
from curation.seed_plan import SearchPlan
from curation.seed_search import SeedBlock, Stretch
from pipelines import retrieve_kept
from pipelines.context import Context
from pipelines.retrieve_inputs import (
    Inputs,
    Piece,
    RetrieveConfig,
    Retrieved,
    SeedSet,
    read_stretch,
    stretches,
)
from pipelines.run_directory import Generation

SLAB_VALUES = 1 << 25
"""Numbers in the stretch of the pool that is in memory at a time."""
TASK_ROWS = 524_288
RANGES = 256
"""Pool images per task, and the most ranges that a pool is cut into: they bound what a kill loses and what is kept."""
BLOCK_ROWS = 65_536
BLOCK_NEIGHBOURS = 1 << 23
"""Seeds in a block at most, and neighbours held for them."""
SAMPLE_PLACES = 64
"""Places in the pool whose first rows are the sample that a search is calibrated on."""
NEXT_BEST_DEPTHS = (8, 32, 128)
"""Policy next_best looks at so many times `neighbours` images per seed: further, when some find too few."""
FLOOR_ROWS = 32_768
"""Rows of the sample in which every seed looks for neighbours first: what it finds there bounds what it looks for."""
HELD_OUT_NEIGHBOURS, LEAST_HELD_OUT = 1024, 64
"""What the recall is measured on: neighbours of seeds that did not calibrate, at least so many of these."""


@dataclass(frozen=True)
class Search:
    """What every task of one pass knows."""

    dimension: int
    plan: SearchPlan | None
    """None: everything is compared."""
    held_out: np.ndarray
    """(h, d) seeds whose neighbours are surely found as well."""
    floors: np.ndarray
    """(h,) float32 of these."""


def sampled(
    context: Context, generation: Generation, config: RetrieveConfig, inputs: Inputs
) -> tuple[dict[str, Retrieved], dict[str, Any]]:
    """(what each seed set of mode sample drew, how the search was made and its recall)."""
    found: dict[str, Retrieved] = {}
    report: dict[str, Any] = {}
    left = [s for s in inputs.sets if s.mode == "sample"]
    for depth in NEXT_BEST_DEPTHS if config.collisions == "next_best" else (1,):
        if not left:
            break
        best, searched = _nearest(context, generation, config, inputs, left, depth)
        report = report or searched
        found |= {s.name: _drawn(config, s, mine) for s, mine in zip(left, best, strict=True)}
        # A seed that found all its neighbours taken looks further, as far as the pool goes.
        further = depth * min(s.neighbours for s in left) < inputs.opened.rows
        left = [s for s in left if further and found[s.name].counts.get("missing")]
    return found, report


def _nearest(
    context: Context,
    generation: Generation,
    config: RetrieveConfig,
    inputs: Inputs,
    sets: Sequence[SeedSet],
    depth: int,
) -> tuple[list[Neighbours], dict[str, Any]]:
    """The depth * neighbours nearest pool images of every seed of these sets, in one pass over the pool."""
    dimension, rows = inputs.opened.dimension, inputs.opened.rows
    asked = [min(depth * s.neighbours, rows) for s in sets]
    seeds = sum(s.seeds for s in sets)
    count = max(asked)
    slab_rows = max(1024, SLAB_VALUES // dimension)
    block_rows = max(1024, min(BLOCK_ROWS, BLOCK_NEIGHBOURS // count))
    _refuse_too_little_memory(context, min(slab_rows, rows), min(block_rows, seeds), dimension, count)
    slabs = stretches(inputs.pool, slab_rows)
    per_range = max(1, -(-TASK_ROWS // slab_rows), -(-len(slabs) // RANGES))
    ranges = [slabs[first : first + per_range] for first in range(0, len(slabs), per_range)]
    blocks = stretches([part for s in sets for part in s.parts], block_rows)
    prefix = f"sample-{depth}"
    search, floors, report = _search(context, generation, config, inputs, blocks, (prefix, seeds, count))
    names = [[f"{prefix}-{r:05d}-{b:05d}" for r in range(len(ranges))] for b in range(len(blocks))]
    calls = [
        (names[b][r], (part, block, floors[b], count, b == 0))
        for r, part in enumerate(ranges)
        for b, block in enumerate(blocks)
    ]
    retrieve_kept.spread(context, generation, search_range, calls, shared=search, heavy=search.plan is None)
    merges = (
        (f"{b:05d}", ([retrieve_kept.path_of(generation, name) for name in mine],)) for b, mine in enumerate(names)
    )
    merged = dict(context.spread(merge_ranges, merges))
    best = [Neighbours.none(0, count), *(merged[name] for name in sorted(merged))]
    together = Neighbours(np.concatenate([b.ids for b in best]), np.concatenate([b.similarity for b in best]))
    if len(search.held_out):
        report["recall"] = _recall(context, generation, names[0], together, report.pop("places"))
    ends = np.cumsum([s.seeds for s in sets])
    return [
        Neighbours(together.ids[end - s.seeds : end, :n], together.similarity[end - s.seeds : end, :n])
        for s, end, n in zip(sets, ends, asked, strict=True)
    ], report


def _search(
    context: Context,
    generation: Generation,
    config: RetrieveConfig,
    inputs: Inputs,
    blocks: Sequence[Sequence[Piece]],
    asked: tuple[str, int, int],
) -> tuple[Search, list[str], dict[str, Any]]:
    """How this pass searches, and where the floors of each block lie ("" without).

    By cells and codes, calibrated on a sample, where that costs less than comparing all.
    """
    prefix, seeds, count = asked
    dimension, rows = inputs.opened.dimension, inputs.opened.rows
    nothing = np.empty((0, dimension), np.float16), np.empty(0, np.float32)
    exact = Search(dimension, None, *nothing), [""] * len(blocks), {"search": "exact"}
    if config.recall == 1 or seed_plan.is_small(seeds, rows):
        return exact
    keys = order.take_hashed(np.arange(seeds, dtype=np.uint64), seeds, context.seed, "retrieve sample")
    tuning = min(seed_calibration.TUNING_SEEDS, seeds // 2)
    held = min(max(LEAST_HELD_OUT, -(-HELD_OUT_NEIGHBOURS // count)), seeds - tuning)
    tuned_on, held_out = np.sort(keys[:tuning]), np.sort(keys[tuning : tuning + held])
    sample = _spread_over(stretches(inputs.pool, seed_calibration.SAMPLE_ROWS // SAMPLE_PLACES), SAMPLE_PLACES)
    options = {"rows": rows, "seeds": seeds, "recall": config.recall, "seed": context.seed}
    name = f"{prefix}-plan"
    call = (name, (sample, blocks, tuned_on, held_out, count, dimension, options))
    retrieve_kept.spread(context, generation, make_plan, [call])
    arrays = retrieve_kept.load(retrieve_kept.path_of(generation, name))
    plan = SearchPlan.from_arrays(arrays)
    if plan.cost(seeds) >= seed_plan.exact_cost(seeds, dimension):
        return exact
    names = [f"{prefix}-floors-{b:05d}" for b in range(len(blocks))]
    calls = [
        (one, (retrieve_kept.path_of(generation, name), block, count, dimension))
        for one, block in zip(names, blocks, strict=True)
    ]
    retrieve_kept.spread(context, generation, find_floors, calls)
    paths = [retrieve_kept.path_of(generation, one) for one in names]
    floors = np.concatenate([retrieve_kept.load(path)["floors"] for path in paths])
    report = {
        "search": "cells and codes",
        "recall_asked": config.recall,
        "cells": len(plan.cells),
        "share_scanned": round(plan.share, 4),
        "places": held_out,
    }
    return Search(dimension, plan, arrays["held_out"], floors[held_out]), paths, report


def _spread_over(found: Sequence[Sequence[Piece]], count: int) -> list[Sequence[Piece]]:
    """About `count` of them, evenly spaced."""
    return [found[i] for i in sorted({round(i) for i in np.linspace(0, len(found) - 1, count)})]


def make_plan(
    sample: Sequence[Sequence[Piece]],
    blocks: Sequence[Sequence[Piece]],
    tuned_on: np.ndarray,
    held_out: np.ndarray,
    count: int,
    dimension: int,
    options: dict[str, Any],
    _: None,
) -> dict[str, np.ndarray]:
    """The plan as arrays, the seeds that are held out, (h, d), and rows of the pool to find floors in, as stored."""
    each = max(1, seed_calibration.SAMPLE_ROWS // len(sample))
    # Row groups may be far larger than what is wanted of them: their first rows are read.
    shares = (
        (piece, max(1, each * piece.rows // sum(p.rows for p in pieces))) for pieces in sample for piece in pieces
    )
    rows = np.concatenate([piece.read(dimension, min(piece.rows, share))[1] for piece, share in shares])
    chosen: dict[str, list[np.ndarray]] = {"tuned": [], "held": []}
    first = 0
    for block in blocks:
        for piece in block:
            places = {"tuned": tuned_on, "held": held_out}
            inside = {k: v[(v >= first) & (v < first + piece.rows)] - first for k, v in places.items()}
            if any(len(v) for v in inside.values()):
                seeds = piece.read(dimension)[1]
                for key, mine in inside.items():
                    chosen[key].append(seeds[mine])
            first += piece.rows
    tuning = widen(np.concatenate(chosen["tuned"]))
    plan = seed_calibration.calibrate(widen(rows), tuning, count, **options)
    step = -(-len(rows) // FLOOR_ROWS)
    return {**plan.arrays(), "held_out": np.concatenate(chosen["held"]), "sample": rows[::step]}


def find_floors(plan_path: str, block: Sequence[Piece], count: int, dimension: int, _: None) -> dict[str, np.ndarray]:
    """(m,) float32: what the count-th neighbour of each seed of a block is at least as similar as."""
    arrays = retrieve_kept.load(plan_path)
    plan, sample = SearchPlan.from_arrays(arrays), arrays["sample"]
    best = SeedBlock(plan, read_stretch(block, dimension)[1], count)
    best.add(Stretch.of(plan, np.arange(len(sample), dtype=np.uint64), sample))
    return {"floors": best.neighbours().similarity[:, -1].copy()}


def search_range(
    slabs: Sequence[Sequence[Piece]], block: Sequence[Piece], floors: str, count: int, measure: bool, search: Search
) -> dict[str, np.ndarray]:
    """The nearest of a range of the pool for a block of seeds; measure: for the held-out seeds too, surely."""
    _, seeds = read_stretch(block, search.dimension)
    if search.plan is None:
        found = Neighbours.none(len(seeds), count)
        for slab in slabs:
            ids, rows = read_stretch(slab, search.dimension)
            found = found.merge(neighbours.nearest_neighbours(seeds, ids, rows, count))
        return {"ids": found.ids, "similarity": found.similarity}
    plan, held = search.plan, len(search.held_out) if measure else 0
    best = SeedBlock(plan, seeds, count, retrieve_kept.load(floors)["floors"])
    held_out = SeedBlock(plan.surely(), search.held_out[:held], count, search.floors[:held])
    for slab in slabs:
        stretch = Stretch.of(plan, *read_stretch(slab, search.dimension))
        best.add(stretch)
        if held:
            held_out.add(stretch)
    found, exact = best.neighbours(), held_out.neighbours()
    return {
        "ids": found.ids,
        "similarity": found.similarity,
        "exact_ids": exact.ids,
        "exact_similarity": exact.similarity,
    }


def merge_ranges(paths: Sequence[str], _: None) -> Neighbours:
    """The best of all ranges of the pool for a block of seeds."""
    return _merged(paths, "")


def _merged(paths: Sequence[str], which: str) -> Neighbours:
    best: Neighbours | None = None
    for path in paths:
        arrays = retrieve_kept.load(path)
        found = Neighbours(arrays[f"{which}ids"], arrays[f"{which}similarity"])
        best = found if best is None else best.merge(found)
    assert best is not None
    return best


def _recall(
    context: Context, generation: Generation, names: Sequence[str], found: Neighbours, places: np.ndarray
) -> dict[str, Any]:
    exact = _merged([retrieve_kept.path_of(generation, name) for name in names], "exact_")
    return seed_search.recall_with_interval(Neighbours(found.ids[places], found.similarity[places]), exact)


def _drawn(config: RetrieveConfig, seed_set: SeedSet, found: Neighbours) -> Retrieved:
    seed_ids = vectors.open_files(seed_set.paths).all_ids() if seed_set.paths else np.empty(0, np.uint64)
    draws = retrieval.all_draws(seed_ids, found, seed_set.neighbours)
    counts: dict[str, Any] = {"neighbours": seed_set.neighbours, **retrieval.collisions(draws)}
    if config.collisions == "unique":
        draws = retrieval.unique_draws(draws)
    elif config.collisions == "next_best":
        draws = retrieval.next_best_draws(seed_ids, found, seed_set.neighbours)
        counts["missing"] = seed_set.seeds * seed_set.neighbours - len(draws)
    return Retrieved(draws, None, counts)


def _refuse_too_little_memory(context: Context, slab: int, block: int, dimension: int, count: int) -> None:
    needed = slab * dimension * 10 + block * (dimension * 16 + 64 * count) + (1 << 25)
    if needed > context.resources.memory_bytes:
        raise UserError(
            f"memory_per_worker: {context.resources.memory_per_worker} is too little to search vectors of "
            f"{dimension} dimensions; give at least {-(-needed >> 20)}MiB"
        )
