"""Retrieval against exact float64 search and naive versions of every rule."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import retrieval
from curation.neighbours import Neighbours, nearest_neighbours
from curation.order import FirstPerGroup, first_per_group, hash_keys
from curation.retrieval import Draws


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def few_images(seeds: int = 12, images: int = 9, depth: int = 9) -> tuple[np.ndarray, Neighbours]:
    """Seeds that collide: more draws than images."""
    seed_ids = np.arange(100, 100 + seeds, dtype=np.uint64)
    return seed_ids, nearest_neighbours(
        unit(seeds, 6, 3), np.arange(images, dtype=np.uint64), unit(images, 6, 4), depth
    )


def rows_of(draws: Draws) -> list[tuple[int, int, int]]:
    return list(zip(draws.image_id.tolist(), draws.seed_id.tolist(), draws.rank.tolist(), strict=True))


def test_keep_all_has_a_row_for_every_seed_and_rank() -> None:
    seed_ids, neighbours = few_images()
    draws = retrieval.all_draws(seed_ids, neighbours, 3)
    expected = [(int(neighbours.ids[s, r]), int(seed_ids[s]), r) for s in range(12) for r in range(3)]
    assert rows_of(draws) == sorted(expected)
    counts = retrieval.collisions(draws)
    drawn = [image for image, _, _ in expected]
    assert counts == {
        "nominal": 36,
        "unique": len(set(drawn)),
        "colliding": sum(drawn.count(image) > 1 for image in set(drawn)),
    }


def test_unique_leaves_an_image_with_its_most_similar_seed() -> None:
    seed_ids, neighbours = few_images()
    everything = retrieval.all_draws(seed_ids, neighbours, 3)
    draws = retrieval.unique_draws(everything)
    assert draws.image_id.tolist() == sorted(set(everything.image_id.tolist()))
    for image, similarity in zip(draws.image_id, draws.similarity, strict=True):
        assert similarity == everything.similarity[everything.image_id == image].max()


def test_next_best_settles_pairs_from_the_most_similar_down() -> None:
    seed_ids, neighbours = few_images(seeds=4, images=30, depth=30)
    draws = retrieval.next_best_draws(seed_ids, neighbours, 3)
    pairs = sorted(
        (-float(neighbours.similarity[s, r]), int(neighbours.ids[s, r]), s) for s in range(4) for r in range(30)
    )
    taken: dict[int, int] = {}
    drawn = [0] * 4
    expected = []
    for _, image, seed in pairs:
        if image not in taken and drawn[seed] < 3:
            taken[image] = seed
            expected.append((image, int(seed_ids[seed]), drawn[seed]))
            drawn[seed] += 1
    assert rows_of(draws) == sorted(expected)
    assert len(draws) == len(set(draws.image_id.tolist())) == 12


@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_next_best_is_that_of_a_loop_over_sorted_pairs(seeds: int, images: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few distinct similarities, so that ties decide.
    similar = random.integers(0, 4, (seeds, images)).astype(np.float32) / 4
    ids = np.argsort(-similar, axis=1, kind="stable")
    neighbours = Neighbours(ids.astype(np.uint64), np.take_along_axis(similar, ids, axis=1))
    seed_ids = random.permutation(100)[:seeds].astype(np.uint64)
    taken, drawn, expected = set(), dict.fromkeys(seed_ids.tolist(), 0), []
    pairs = [(-float(similar[s, i]), i, int(seed_ids[s])) for s in range(seeds) for i in range(images)]
    for _, image, who in sorted(pairs):
        if image not in taken and drawn[who] < count:
            taken.add(image)
            expected.append((image, who, drawn[who]))
            drawn[who] += 1
    assert rows_of(retrieval.next_best_draws(seed_ids, neighbours, count)) == sorted(expected)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 6), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_rounds_suffice_for_the_cap_and_one_fewer_would_not(sizes: list[int], per_cluster: int, cap: int) -> None:
    rounds, before = retrieval.rounds_needed(np.array(sizes, np.int64), per_cluster, cap)
    offered = [min(size, per_cluster) for size in sizes]
    assert before == sum(offered)
    assert sum(min(n, rounds) for n in offered) >= min(cap, before)
    assert rounds == 0 or sum(min(n, rounds - 1) for n in offered) < min(cap, before)


def test_next_best_leaves_seeds_short_when_the_pool_runs_out() -> None:
    seed_ids, neighbours = few_images()
    draws = retrieval.next_best_draws(seed_ids, neighbours, 3)
    assert sorted(draws.image_id.tolist()) == list(range(9))


def test_clusters_with_more_than_three_seeds_are_chosen() -> None:
    clusters, seeds = retrieval.chosen_clusters(np.array([5, 5, 5, 5, 2, 2, 2, 9, 9, 9, 9, 9]), 4)
    assert (clusters.tolist(), seeds.tolist()) == ([5, 9], [4, 5])


@given(
    st.lists(st.integers(0, 4), max_size=60), st.lists(st.integers(0, 12), min_size=5, max_size=5), st.integers(0, 9)
)
@settings(max_examples=80, deadline=None)
def test_first_per_group_is_that_of_a_loop_however_parts_arrive(
    groups: list[int], limits: list[int], seed: int
) -> None:
    ids = np.random.default_rng(seed).permutation(1000)[: len(groups)].astype(np.uint64)
    keys = hash_keys(ids, seed, "test") % np.uint64(7)
    member = np.array(groups, np.int32)
    naive = [
        (g, sorted((int(keys[i]), int(ids[i])) for i in range(len(groups)) if groups[i] == g)[: limits[g]])
        for g in range(5)
    ]
    expected = [(g, key, image, rank) for g, mine in naive for rank, (key, image) in enumerate(mine)]
    positions, ranks = first_per_group(member, keys, ids, np.array(limits))
    assert [
        (int(member[p]), int(keys[p]), int(ids[p]), int(r)) for p, r in zip(positions, ranks, strict=True)
    ] == expected
    taken = FirstPerGroup(np.array(limits))
    for part in np.array_split(np.random.default_rng(seed).permutation(len(groups)), 3):
        taken.add(member[part], keys[part], ids[part])
    assert list(zip(*(column.tolist() for column in taken.result()), strict=True)) == expected


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_cap_takes_one_image_a_round_from_every_cluster(sizes: list[int], cap: int) -> None:
    ranks = np.concatenate([np.arange(size) for size in sizes])
    keys = hash_keys(np.arange(len(ranks), dtype=np.uint64), 0, "test")
    kept = retrieval.round_robin(ranks, keys, cap)
    assert len(kept) == min(cap, len(ranks))
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    taken = np.bincount(cluster[kept], minlength=len(sizes))
    rounds = taken.max(initial=0)
    assert all(n == min(size, rounds) or n == min(size, rounds - 1) for n, size in zip(taken, sizes, strict=True))
    for index, n in enumerate(taken):
        assert ranks[kept][cluster[kept] == index].tolist() == list(range(n))


def test_the_seed_of_a_cluster_image_is_the_nearest_of_its_own_cluster() -> None:
    images, seeds = unit(40, 8, 0), unit(25, 8, 1)
    seed_ids = np.arange(25, dtype=np.uint64) + np.uint64(500)
    image_groups, seed_groups = np.arange(40) % 3, np.arange(25) % 3
    found, similarity = retrieval.nearest_seed(images, image_groups, seeds, seed_ids, seed_groups)
    for row in range(40):
        mine = np.flatnonzero(seed_groups == image_groups[row])
        exact = (seeds[mine].astype(np.float64) @ images[row].astype(np.float64)).astype(np.float32)
        assert similarity[row] == exact.max()
        assert found[row] == seed_ids[mine[exact.argmax()]]
