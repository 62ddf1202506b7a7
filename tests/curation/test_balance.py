"""Balanced sampling: exact targets, the naive rule, and more concepts than random or flat sampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import balance, hierarchy
from curation.clusters import ArrayPoints
from curation.nearest import nearest_centroid
from curation.order import first_per_group, hash_keys


def naive_split(sizes: list[int], target: int, keys: list[int]) -> list[int]:
    """One image a round to every cluster that has more; the last round in the order of keys."""
    given_out = [0] * len(sizes)
    while target > 0:
        able = sorted((i for i in range(len(sizes)) if given_out[i] < sizes[i]), key=lambda i: keys[i])
        for i in able[:target]:
            given_out[i] += 1
        target -= min(target, len(able))
    return given_out


@given(st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_targets_are_those_of_giving_one_a_round(families: list[list[int]], data: st.DataObject) -> None:
    targets = [data.draw(st.integers(0, sum(sizes))) for sizes in families]
    sizes = np.array([size for family in families for size in family], np.int64)
    parents = np.repeat(np.arange(len(families)), [len(family) for family in families]).astype(np.int32)
    keys = hash_keys(np.arange(len(sizes), dtype=np.uint64), 3, "test")
    naive = [
        naive_split(family, target, keys[parents == parent].tolist())
        for parent, (family, target) in enumerate(zip(families, targets, strict=True))
    ]
    found = balance.split_targets(sizes, parents, np.array(targets, np.int64), 3, "test")
    assert found.tolist() == [n for one in naive for n in one]


@given(st.lists(st.integers(0, 40), min_size=8, max_size=8), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_leaves_add_up_to_the_target_or_to_all_there_is(leaf_sizes: list[int], target: int) -> None:
    parents = [np.array([0, 0, 1, 1, 2, 2, 3, 3], np.int32), np.array([0, 1, 1, 0], np.int32)]
    sizes = [np.array(leaf_sizes, np.int64)]
    for parent, count in zip(parents, (4, 2), strict=True):
        sizes.append(np.bincount(parent, weights=sizes[-1], minlength=count).astype(np.int64))
    wanted = balance.leaf_targets(sizes, parents, target, 0)
    assert wanted.sum() == min(target, sum(leaf_sizes))
    assert np.all((wanted >= 0) & (wanted <= sizes[0]))
    top = np.bincount(parents[1][parents[0]], weights=wanted, minlength=2)
    assert abs(top[0] - top[1]) <= 1 or np.any(top == sizes[2])


def test_a_target_above_the_images_of_a_cluster_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="above what its cluster holds"):
        balance.split_targets(np.array([1, 2]), np.array([0, 0]), np.array([4]), 0, "test")


def test_nearest_members_come_first_when_asked_for() -> None:
    random = np.random.default_rng(0)
    ids, distances = random.permutation(50).astype(np.uint64), random.random(50).astype(np.float32)
    keys = balance.member_keys(ids, distances, "nearest", 0)
    taken, _ = first_per_group(np.zeros(50, np.int32), keys, ids, np.array([10]))
    assert taken.tolist() == np.argsort(distances)[:10].tolist()


def test_a_balanced_sample_holds_more_concepts_than_a_random_or_a_flat_one() -> None:
    concepts, rows, target = 100, 4000, 800
    random = np.random.default_rng(0)
    zipf = 1 / np.arange(1, concepts + 1)
    concept = random.choice(concepts, rows, p=zipf / zipf.sum())
    vectors = random.standard_normal((concepts, 32))[concept] + 0.3 * random.standard_normal((rows, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    ids = np.arange(rows, dtype=np.uint64)

    def concepts_of(levels: list[int]) -> float:
        built, _ = hierarchy.build(ArrayPoints((vectors,)), levels, seed=0)
        leaves, _ = nearest_centroid(vectors, built.centroids[0])
        sizes = built.sizes(np.bincount(leaves, minlength=levels[0]))
        wanted = balance.leaf_targets(sizes, built.parents, target, 0)
        taken, _ = first_per_group(leaves, hash_keys(ids, 0, "balance"), ids, wanted)
        assert len(taken) == target
        return hierarchy.effective_number(np.bincount(concept[taken], minlength=concepts))

    drawn = hierarchy.effective_number(np.bincount(concept[random.permutation(rows)[:target]], minlength=concepts))
    flat, balanced = concepts_of([400]), concepts_of([400, 100])
    assert flat > 1.2 * drawn
    assert balanced > 1.2 * flat
