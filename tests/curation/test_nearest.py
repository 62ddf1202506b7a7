"""Nearest centroids: those of float64 whatever is known before, and of the groups visited when there are very many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import clusters, nearest
from curation.halves import widen
from curation.nearest import Grouping, nearest_centroid, squared_distances
from curation.seeding import cell_seeds, seeds_due, shared_out


def naive(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    exact = ((vectors[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    return exact.argmin(axis=1), exact.min(axis=1)


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 40), st.sampled_from([1, 3, 8, 19]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_labels_are_those_of_float64_and_ties_go_to_the_first(
    seed: int, rows: int, count: int, dimension: int, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    vectors, centroids = random.standard_normal((rows, dimension)), random.standard_normal((count, dimension))
    if coarse:  # whole numbers: many exact ties, many equal centroids
        vectors, centroids = np.round(vectors), np.round(centroids)
    vectors, centroids = vectors.astype(np.float32), centroids.astype(np.float32)
    labels, squares = nearest_centroid(vectors, centroids)
    if coarse:
        assert np.array_equal(labels, naive(vectors, centroids)[0])
    assert np.allclose(squares, naive(vectors, centroids)[1], atol=1e-9)
    assert np.allclose(squares, ((vectors.astype(np.float64) - centroids[labels]) ** 2).sum(-1))


@given(st.integers(0, 10**6), st.floats(0, 0.5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_a_step_knows_of_the_last_one_changes_nothing(seed: int, move: float, equal: bool) -> None:
    random = np.random.default_rng(seed)
    centroids = random.standard_normal((70, 5)).astype(np.float32)
    vectors = (centroids[random.integers(0, 70, 600)] + 0.3 * random.standard_normal((600, 5))).astype(np.float32)
    if equal:
        centroids[30:40] = centroids[3]
    grouping = Grouping.of(random.integers(0, 9, 70))
    known = nearest.nearest(vectors, centroids, grouping)[2]
    for _ in range(3):
        after = centroids + (move * random.random((70, 1)) * random.standard_normal((70, 5))).astype(np.float32)
        moved = np.sqrt(squared_distances(after, centroids, np.arange(70)))
        labels, squares, known = nearest.nearest(vectors, after, grouping, known, moved)
        plain_labels, plain_squares, _ = nearest.nearest(vectors, after)
        assert np.array_equal(labels, plain_labels)
        assert squares.tobytes() == plain_squares.tobytes()
        centroids = after


def test_a_lloyd_with_bounds_is_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3000, 8)).astype(np.float16)
    found = []
    for bounded in (64, 10**9):
        monkeypatch.setattr(clusters, "BOUNDED", bounded)
        points = clusters.ArrayPoints((vectors[:1700], vectors[1700:]))
        found.append(clusters.kmeans(points, 90, seed=0, purpose="test", iterations=15))
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    assert found[0].objective == found[1].objective


def test_a_search_by_groups_finds_nearly_all_and_says_the_true_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, 16))
    centroids = np.repeat(centres, 10, axis=0) + 0.3 * random.standard_normal((400, 16))
    centroids = centroids.astype(np.float32)
    vectors = (centroids[random.integers(0, 400, 2000)] + 0.2 * random.standard_normal((2000, 16))).astype(np.float16)
    monkeypatch.setattr(nearest, "FLAT", 300)
    grouping = clusters.wide_grouping(centroids)
    assert grouping is not None
    assert sorted(grouping.members.tolist()) == list(range(400))
    labels, squares = nearest_centroid(vectors, centroids, grouping)
    exact, least = naive(vectors, centroids)
    assert np.mean(labels == exact) > 0.98
    assert np.allclose(squares, ((vectors.astype(np.float64) - centroids[labels]) ** 2).sum(-1))
    assert np.all(squares >= least - 1e-9)
    found = clusters.kmeans(clusters.ArrayPoints((vectors,)), 350, seed=0, purpose="wide", iterations=5)
    assert found.objective < least.mean()


def test_half_precision_is_widened_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][None, :]
    assert widen(finite).tobytes() == finite.astype(np.float32).tobytes()


def test_seeds_of_a_cell_are_distinct_vectors_and_gain_what_they_say() -> None:
    vectors = np.repeat(np.random.default_rng(0).standard_normal((30, 6)), 2, axis=0).astype(np.float32)
    rows, gains = cell_seeds(vectors, 60, np.random.default_rng(1))
    assert len({vectors[row].tobytes() for row in rows}) == len(rows) == 30
    left = naive(vectors, vectors[rows[:10]])[1].sum()
    assert naive(vectors, vectors[rows[:1]])[1].sum() - gains[1:10].sum() == pytest.approx(left, rel=1e-4)


def test_the_greatest_gains_are_shared_out_and_no_cell_is_due_more_than_it_holds() -> None:
    found = [(np.array([4, 7]), np.array([np.inf, 1.0])), (np.array([1, 9, 3]), np.array([np.inf, 2.0, 5.0]))]
    assert shared_out(found, 4).tolist() == [4, 1, 9, 3]
    assert seeds_due(np.array([0.0, 9.0, 1.0]), np.array([2, 100, 3]), 20).tolist() == [2, 31, 3]
