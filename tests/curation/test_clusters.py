"""k-means: as good as scikit-learn's, equal bytes, no empty clusters; the hierarchy evens concepts out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import hierarchy
from curation.clusters import (
    ArrayPoints,
    Step,
    block_sums,
    kmeans,
    nearest_members,
    split_rows,
)
from curation.nearest import nearest_centroid


def blobs(rows: int, concepts: int, dimension: int = 16, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Unit vectors around Zipf-sized concepts, float16."""
    random = np.random.default_rng(seed)
    share = 1 / np.arange(1, concepts + 1)
    centres = random.standard_normal((concepts, dimension))
    found = centres[random.choice(concepts, rows, p=share / share.sum())]
    found = found + noise * random.standard_normal(found.shape)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("count", [7, 60, 400])
def test_objective_is_that_of_scikit_learn_within_three_per_cent(count: int) -> None:
    from sklearn.cluster import KMeans

    vectors = blobs(2000, 80)
    points = ArrayPoints((vectors[:900], vectors[900:]))
    ours = np.mean([kmeans(points, count, seed=s, purpose="test").objective for s in range(3)])
    theirs = [KMeans(count, n_init=1, random_state=s, max_iter=50).fit(vectors.astype(np.float32)) for s in range(3)]
    assert ours < 1.03 * np.mean([found.inertia_ for found in theirs]) / len(vectors)


def test_objective_is_the_mean_squared_distance_to_the_centroids_returned() -> None:
    vectors = blobs(500, 20)
    found = kmeans(ArrayPoints((vectors,)), 20, seed=0, purpose="test")
    distances = ((vectors[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(-1)
    assert found.objective == pytest.approx(distances.min(axis=1).mean(), rel=1e-6)


def test_nearest_centroid_is_that_of_float64() -> None:
    vectors, centroids = blobs(300, 20), blobs(40, 20, seed=1).astype(np.float32)
    exact = ((vectors[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    labels, squares = nearest_centroid(vectors, centroids)
    assert np.array_equal(labels, exact.argmin(axis=1))
    assert np.allclose(squares, exact.min(axis=1), atol=1e-12)


def test_block_sums_are_those_of_a_loop() -> None:
    vectors, centroids = blobs(200, 9), blobs(12, 9, seed=1).astype(np.float32)
    found, _ = block_sums(vectors, Step(centroids))
    labels, squares = nearest_centroid(vectors, centroids)
    for place, cluster in enumerate(found.clusters):
        members = np.flatnonzero(labels == cluster)
        assert found.counts[place] == len(members)
        assert np.allclose(found.sums[place], vectors[members].astype(np.float64).sum(axis=0))
        assert found.squares[place] == pytest.approx(squares[members].sum())
        assert squares[found.farthest[place]] == squares[members].max() == found.farthest_square[place]
    assert found.counts.sum() == len(vectors)


def test_equal_bytes_whatever_the_number_of_threads() -> None:
    from threadpoolctl import threadpool_limits

    points = ArrayPoints((blobs(900, 30),))
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            results.append(kmeans(points, 30, seed=0, purpose="test").centroids.tobytes())
    assert results[0] == results[1]


def test_another_seed_or_purpose_gives_other_centroids() -> None:
    points = ArrayPoints((blobs(300, 30),))
    results = {
        kmeans(points, 10, seed=s, purpose=p).centroids.tobytes() for s, p in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    }
    assert len(results) == 3


def test_no_cluster_is_empty_while_there_are_distinct_vectors() -> None:
    distinct = blobs(40, 40)
    crowded = np.concatenate([distinct, np.repeat(distinct[:1], 2000, axis=0)])
    found = kmeans(ArrayPoints((crowded,)), 40, seed=0, purpose="test")
    assert len(np.unique(nearest_centroid(crowded, found.centroids)[0])) == 40
    assert found.objective == pytest.approx(0, abs=1e-9)


def test_more_clusters_than_distinct_vectors_ends() -> None:
    vectors = np.repeat(blobs(3, 3), 10, axis=0)
    found = kmeans(ArrayPoints((vectors,)), 8, seed=0, purpose="test")
    assert found.centroids.shape == (8, 16)
    assert found.objective == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_equal_vectors_end_at_their_point(count: int) -> None:
    vectors = np.repeat(blobs(1, 1), 300, axis=0)
    found = kmeans(ArrayPoints((vectors[:90], vectors[90:])), count, seed=0, purpose="test")
    assert found.centroids.shape == (count, 16)
    assert found.objective == pytest.approx(0, abs=1e-12)


def test_one_giant_cluster_leaves_the_small_ones_their_centroids() -> None:
    random = np.random.default_rng(0)
    giant = random.standard_normal(16) + 1e-3 * random.standard_normal((9000, 16))
    small = np.repeat(5 * random.standard_normal((90, 16)), 12, axis=0)
    vectors = np.concatenate([giant, small]).astype(np.float32)
    found = kmeans(ArrayPoints((vectors,)), 100, seed=0, purpose="test")
    assert len(np.unique(nearest_centroid(small.astype(np.float32), found.centroids)[0])) == 90


def test_one_cluster_is_the_mean_and_n_clusters_are_the_vectors() -> None:
    vectors = blobs(30, 30)
    assert np.allclose(
        kmeans(ArrayPoints((vectors,)), 1, seed=0, purpose="t").centroids[0], vectors.astype(np.float64).mean(axis=0)
    )
    every = kmeans(ArrayPoints((vectors,)), 30, seed=0, purpose="t").centroids
    assert {row.tobytes() for row in every} == {row.tobytes() for row in vectors.astype(np.float32)}


def test_spherical_centroids_have_unit_length() -> None:
    centroids = kmeans(ArrayPoints((blobs(300, 10),)), 12, seed=0, purpose="t", spherical=True).centroids
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_split_over_blocks_are_the_same_rows(sizes: list[int], data: st.DataObject) -> None:
    everything = np.arange(sum(sizes))
    chosen = everything[np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))), bool)]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = split_rows(chosen, sizes)
    assert np.concatenate([p + s for p, s in zip(parts, starts, strict=True)]).tolist() == chosen.tolist()


def test_nearest_members_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    labels, squares = random.integers(0, 7, 200).astype(np.int32), random.random(200)
    naive = [
        row for c in range(7) for row in sorted(np.flatnonzero(labels == c), key=lambda row: (squares[row], row))[:5]
    ]
    assert nearest_members(labels, squares, 5).tolist() == sorted(naive)


# ---- hierarchy ------------------------------------------------------------------------------------------------------


def test_the_path_of_an_image_follows_the_parents_and_sizes_add_up() -> None:
    vectors = blobs(800, 50)
    built, reports = hierarchy.build(ArrayPoints((vectors,)), [60, 12, 3], seed=0)
    leaves, _ = nearest_centroid(vectors, built.centroids[0])
    path = built.path(leaves)
    sizes = built.sizes(np.bincount(leaves, minlength=60))
    assert [len(s) for s in sizes] == [60, 12, 3]
    for level, clusters in enumerate(path):
        assert np.array_equal(np.bincount(clusters, minlength=len(sizes[level])), sizes[level])
    for level, parents in enumerate(built.parents):
        assert np.array_equal(parents, nearest_centroid(built.centroids[level], built.centroids[level + 1])[0])
        assert len(np.unique(parents)) == len(built.centroids[level + 1])
    assert [r.resampled for r in reports] == [0, 10, 10]


def test_a_hierarchy_spreads_its_top_centroids_evenly_over_the_support() -> None:
    # 19 of 20 points lie in the left of two unit squares. In two dimensions the density of flat centroids goes with
    # the square root of that of the points: 1 / (1 + 19 ** 0.5) = 0.19 of them on the right; even would be 0.5.
    points = np.random.default_rng(0).random((6000, 2)).astype(np.float32)
    points[:300, 0] += 1
    held = ArrayPoints((points,))

    def on_the_right(seed: int) -> list[float]:
        flat = kmeans(held, 40, seed=seed, purpose="flat").centroids
        plain = hierarchy.build(held, [600, 40], seed=seed, resample_steps=[0, 0])[0].centroids[-1]
        resampled = hierarchy.build(held, [600, 40], seed=seed)[0].centroids[-1]
        return [float((centroids[:, 0] > 1).mean()) for centroids in (flat, plain, resampled)]

    flat, plain, resampled = np.mean([on_the_right(seed) for seed in range(2)], axis=0)
    assert flat == pytest.approx(0.19, abs=0.06)
    assert flat + 0.05 < plain < resampled - 0.05


def test_tables_of_centroids_are_read_back(tmp_path: object) -> None:
    built, _ = hierarchy.build(ArrayPoints((blobs(200, 9),)), [20, 4], seed=0)
    sizes = built.sizes(np.arange(20))
    from curation import storage

    for level in range(2):
        data = hierarchy.level_bytes(built, level, sizes[level], {"curate.model": "m"})
        storage.write_whole(f"{tmp_path}/{hierarchy.level_file(level)}", data)
    read, read_sizes, model = hierarchy.read_hierarchy(str(tmp_path))
    assert model == "m"
    assert all(np.array_equal(a, b) for a, b in zip(read.centroids, built.centroids, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(read.parents, built.parents, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(read_sizes, sizes, strict=True))


def test_effective_number_of_equal_clusters_is_their_count() -> None:
    assert hierarchy.effective_number(np.full(12, 5)) == pytest.approx(12)
    assert hierarchy.effective_number(np.array([7, 0, 0])) == pytest.approx(1)
    assert hierarchy.effective_number(np.zeros(3, int)) == 0
