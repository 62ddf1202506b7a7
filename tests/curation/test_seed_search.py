"""The search by cells and codes against the exact one."""

import numpy as np
import pytest

from curation import seed_calibration, seed_search
from curation.halves import widen
from curation.neighbours import NO_ID, Neighbours, nearest_neighbours
from curation.seed_plan import SearchPlan
from curation.seed_search import SeedBlock, Stretch

DIMENSION = 64


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def pool_and_seeds(rows: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 20 topics, and seeds at cosines .3 to .8 of some of them."""
    random = np.random.default_rng(0)
    topics = unit(random.standard_normal((20, DIMENSION)))
    pool = unit(0.6 * topics[random.integers(0, 20, rows)] + 0.8 * unit(random.standard_normal((rows, DIMENSION))))
    cosine = random.uniform(0.3, 0.8, (seeds, 1))
    away = unit(random.standard_normal((seeds, DIMENSION)))
    return pool.astype(np.float16), unit(cosine * pool[:seeds] + (1 - cosine) * away).astype(np.float16)


def plan_for(pool: np.ndarray, seeds: np.ndarray, count: int, recall: float) -> SearchPlan:
    sample, tuning = widen(pool[::2]), widen(seeds[:200])
    return seed_calibration.calibrate(sample, tuning, count, rows=len(pool), seeds=len(seeds), recall=recall, seed=0)


@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_the_recall_asked_for_is_reached_on_other_seeds(recall: float) -> None:
    pool, seeds = pool_and_seeds(6000, 700)
    ids = np.random.default_rng(1).permutation(20_000)[:6000].astype(np.uint64)
    plan = plan_for(pool, seeds, 4, recall)
    block = SeedBlock(plan, seeds[200:], 4)
    for start in range(0, 6000, 1700):
        block.add(Stretch.of(plan, ids[start : start + 1700], pool[start : start + 1700]))
    found, exact = block.neighbours(), nearest_neighbours(seeds[200:], ids, pool, 4)
    hits, there = seed_search.recall_of(found, exact)
    assert there == 2000
    assert hits / there >= recall - 0.01
    same = found.ids == exact.ids
    assert np.array_equal(found.similarity[same], exact.similarity[same])
    assert plan.share < 1


def test_a_plan_is_the_same_when_kept_and_read() -> None:
    pool, seeds = pool_and_seeds(2000, 300)
    plan = plan_for(pool, seeds, 2, 0.95)
    again = SearchPlan.from_arrays(plan.arrays())
    one, other = (SeedBlock(p, seeds, 2) for p in (plan, again))
    for block in (one, other):
        block.add(Stretch.of(block.plan, np.arange(2000, dtype=np.uint64), pool))
    assert np.array_equal(one.neighbours().ids, other.neighbours().ids)


def test_equal_images_are_ranked_by_id_and_all_found() -> None:
    row = unit(np.random.default_rng(0).standard_normal((1, DIMENSION))).astype(np.float16)
    pool = np.repeat(row, 500, axis=0)
    plan = seed_calibration.calibrate(widen(pool), widen(pool[:40]), 3, rows=500, seeds=40, recall=0.99, seed=0)
    block = SeedBlock(plan, row, 3)
    block.add(Stretch.of(plan, np.arange(500, dtype=np.uint64)[::-1], pool))
    assert block.neighbours().ids.tolist() == [[0, 1, 2]]


def test_fewer_images_than_asked_for_leave_places_empty() -> None:
    pool, seeds = pool_and_seeds(64, 64)
    plan = plan_for(pool, seeds, 4, 0.99)
    block = SeedBlock(plan, seeds, 4)
    block.add(Stretch.of(plan, np.arange(2, dtype=np.uint64), pool[:2]))
    assert np.all(block.neighbours().ids[:, 2:] == NO_ID)


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_a_sure_search_finds_what_comparing_everything_does(stored: type) -> None:
    pool, seeds = (rows.astype(stored) for rows in pool_and_seeds(3000, 600))
    ids = np.random.default_rng(1).permutation(20_000)[:3000].astype(np.uint64)
    pool[100:140] = pool[7]
    plan = plan_for(pool, seeds, 4, 0.9).surely()
    exact = nearest_neighbours(seeds, ids, pool, 4)
    block = SeedBlock(plan, seeds, 4)
    for start in range(0, 3000, 700):
        block.add(Stretch.of(plan, ids[start : start + 700], pool[start : start + 700]))
    assert np.array_equal(block.neighbours().ids, exact.ids)
    assert np.array_equal(block.neighbours().similarity, exact.similarity)


def test_floors_spare_comparisons_and_lose_nothing_at_or_above_them() -> None:
    pool, seeds = pool_and_seeds(6000, 600)
    ids = np.arange(6000, dtype=np.uint64)
    plan = plan_for(pool, seeds, 4, 0.99)
    stretch = Stretch.of(plan, ids, pool)
    free = SeedBlock(plan, seeds, 4)
    free.add(stretch)
    floors = nearest_neighbours(seeds, ids, pool, 4).similarity[:, -1]
    bound = SeedBlock(plan, seeds, 4, floors)
    bound.add(stretch)
    assert bound.compared < free.compared
    above = free.neighbours().similarity >= floors[:, None]
    assert np.mean(bound.neighbours().ids[above] == free.neighbours().ids[above]) > 0.99


def test_interval_of_the_recall_holds_the_truth_and_narrows_with_seeds() -> None:
    random = np.random.default_rng(0)
    widths, held = [], 0
    for seeds in (100, 1600):
        for _ in range(20):
            exact = Neighbours.none(seeds, 4)
            exact.ids[:], exact.similarity[:] = 1, 0.5
            lost = random.random((seeds, 4)) < 0.03
            found = Neighbours(exact.ids, np.where(lost, 0.4, 0.5).astype(np.float32))
            got = seed_search.recall_with_interval(found, exact)
            held += got["low"] <= 0.97 <= got["high"]
        widths.append(got["high"] - got["low"])
    assert held >= 34 and widths[1] < widths[0] / 3
    every = seed_search.recall_with_interval(exact, exact)
    assert every["measured"] == 1 and 0.99 < every["low"] < 1


def test_recall_counts_a_neighbour_as_similar_as_the_last_one() -> None:
    exact = Neighbours(np.array([[1, 2], [3, 4]], np.uint64), np.array([[0.9, 0.5], [0.8, 0.7]], np.float32))
    found = Neighbours(np.array([[1, 7], [3, 9]], np.uint64), np.array([[0.9, 0.5], [0.8, 0.6]], np.float32))
    assert seed_search.recall_of(found, exact) == (3, 4)
