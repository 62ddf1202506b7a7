"""Exact neighbours against float64 search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.neighbours import NO_ID, Neighbours, nearest_neighbours


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def naive_neighbours(
    seeds: np.ndarray, ids: np.ndarray, pool: np.ndarray, count: int
) -> tuple[list[list[int]], list[list[float]]]:
    """By the definition: float64 products, rounded to float32, ties by id."""
    similar = (seeds.astype(np.float64) @ pool.astype(np.float64).T).astype(np.float32)
    order = [sorted(range(len(pool)), key=lambda i, row=row: (-row[i], ids[i]))[:count] for row in similar]
    return [[int(ids[i]) for i in mine] for mine in order], [
        [float(similar[m][i]) for i in mine] for m, mine in enumerate(order)
    ]


@pytest.mark.parametrize(
    ("pool_rows", "count", "kind"), [(300, 4, np.float16), (300, 9, np.float32), (5, 8, np.float16)]
)
def test_neighbours_are_those_of_exact_float64_search(pool_rows: int, count: int, kind: type) -> None:
    seeds, pool = unit(30, 24, 0).astype(kind), unit(pool_rows, 24, 1).astype(kind)
    ids = np.random.default_rng(2).permutation(10_000)[:pool_rows].astype(np.uint64)
    found = nearest_neighbours(seeds, ids, pool, count)
    exact, similarity = naive_neighbours(seeds, ids, pool, count)
    kept = min(count, pool_rows)
    assert found.ids[:, :kept].tolist() == exact
    assert np.allclose(found.similarity[:, :kept], similarity, atol=0)
    assert np.all(found.ids[:, kept:] == NO_ID)


def test_many_equal_images_are_ranked_by_id() -> None:
    seeds, pool = unit(5, 16, 0), unit(60, 16, 1)
    pool = np.concatenate([pool, np.repeat(seeds[:1], 100, axis=0)])
    ids = np.random.default_rng(0).permutation(len(pool)).astype(np.uint64)
    found = nearest_neighbours(seeds, ids, pool, 6)
    assert found.ids.tolist() == naive_neighbours(seeds, ids, pool, 6)[0]
    assert found.ids[0].tolist() == sorted(ids[60:].tolist())[:6]


@given(st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_merged_parts_give_the_neighbours_of_the_whole_in_any_order(order: list[int]) -> None:
    seeds, pool, ids = unit(7, 8, 0), unit(50, 8, 1), np.arange(50, dtype=np.uint64)
    merged = Neighbours.none(7, 4)
    for part in order:
        merged = merged.merge(nearest_neighbours(seeds, ids[part::5], pool[part::5], 4))
    whole = nearest_neighbours(seeds, ids, pool, 4)
    assert np.array_equal(merged.ids, whole.ids)
    assert np.array_equal(merged.similarity, whole.similarity)
