"""What is drawn how often, by weight, by seed set and by cluster; the same from any place of the stream."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from tests.training.data.manifests import small, write_manifest
from training.data.index import open_index
from training.data.sampling import GroupOrder, Members, UniformOrder, WeightOrder, order_of, quotas


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0.0625, 30, width=32)), min_size=1, max_size=60).filter(any),
    seed=st.integers(0, 99),
)
def test_an_epoch_draws_floor_or_ceil_of_the_weight(weights: list[float], seed: int) -> None:
    order = WeightOrder(np.array(weights, np.float32), seed)
    total = float(np.sum(np.array(weights, np.float32), dtype=np.float64))
    assert order.epoch == max(1, round(total))
    for epoch in (0, 5):
        drawn = order.rows(np.arange(epoch * order.epoch, (epoch + 1) * order.epoch))
        counts = np.bincount(drawn, minlength=len(weights))
        wanted = np.array(weights, np.float32).astype(np.float64) * order.epoch / total
        assert (np.abs(counts - wanted) < 1 + 1e-6).all()
        assert (counts[wanted == 0] == 0).all()


def test_weights_are_met_on_average_over_blocks_and_epochs() -> None:
    weights = np.random.default_rng(0).gamma(0.5, 1, 3000).astype(np.float32)
    order = WeightOrder(weights, 3)
    counts = np.bincount(order.rows(np.arange(8 * order.epoch)), minlength=3000) / 8
    np.testing.assert_allclose(counts, weights, atol=0.9)
    assert abs(counts[weights < 0.5].sum() / weights[weights < 0.5].sum() - 1) < 0.03


def test_equal_weights_draw_each_row_once_per_epoch_in_new_orders() -> None:
    order = UniformOrder(31, 0)
    epochs = order.rows(np.arange(93)).reshape(3, 31)
    assert (np.sort(epochs, axis=1) == np.arange(31)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_array_equal(order.rows(np.array([40, 3])), [epochs[1][9], epochs[0][3]])


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7), unequal=st.booleans())
def test_groups_have_their_shares_and_members_take_turns(sizes: list[int], unequal: bool) -> None:
    starts = np.r_[0, np.cumsum(sizes)]
    members = Members((), starts, np.arange(starts[-1], dtype=np.uint32))
    shares = np.arange(1.0, len(sizes) + 1) if unequal else np.ones(len(sizes))
    order = GroupOrder(members, shares, 5)
    draws = 60 * len(sizes)
    rows = order.rows(np.arange(draws))
    groups = np.searchsorted(starts, rows, side="right") - 1
    got = np.bincount(groups, minlength=len(sizes)) / draws
    np.testing.assert_allclose(got, shares / shares.sum(), atol=0.15 if unequal else 1e-12)
    if not unequal:
        for group, size in enumerate(sizes):
            counts = np.bincount(rows[groups == group] - starts[group], minlength=size)
            assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(order.rows(np.array([draws - 1, 4])), rows[[draws - 1, 4]])


def test_quotas_follow_the_shares() -> None:
    assert quotas(np.ones(4)).tolist() == [1, 1, 1, 1]
    found = quotas(np.array([1.0, 2.0, 1e-9]))
    assert found[2] == 1
    np.testing.assert_allclose(found[:2] / found.sum(), [1 / 3, 2 / 3], atol=1e-5)


def test_seed_sets_and_clusters_of_a_manifest(tmp_path: Path) -> None:
    sources = [["seed:cars"], ["retrieve:cars", "balance"], ["balance"], ["seed:cars", "retrieve:cars"]] * 5
    clusters = [[0, 1], [5, 1], None, [0, 2]] * 5
    manifest = write_manifest(tmp_path / "m", [b"x"] * 20, sources=sources, clusters=clusters)

    def drawn(**options: object) -> np.ndarray:
        config = small(manifest, tmp_path, **options)
        rows = order_of(config, open_index(manifest, config.index_folder), 0).rows(np.arange(6000))
        return np.bincount(rows, minlength=20) / 6000

    by_set = drawn(sampling="seed_set")  # 15 rows of cars, 10 of balance; rows 1 mod 4 are in both
    np.testing.assert_allclose(by_set[1::4], 1 / 30 + 1 / 20, atol=1e-3)
    np.testing.assert_allclose(by_set[0::4], 1 / 30, atol=1e-3)
    shared = drawn(sampling="seed_set", shares={"cars": 3, "balance": 1})
    np.testing.assert_allclose(shared[2::4], 1 / 40, atol=8e-3)
    leaves = drawn(sampling="cluster")
    np.testing.assert_allclose(leaves, np.tile([1 / 20, 1 / 10, 0, 1 / 20], 5), atol=1e-3)
    coarse = drawn(sampling="cluster", cluster_level=2)
    np.testing.assert_allclose(coarse, np.tile([1 / 20, 1 / 20, 0, 1 / 10], 5), atol=1e-3)
    for options, sentence in (
        ({"sampling": "cluster", "cluster_level": 3}, "no row has a cluster of level 3"),
        ({"sampling": "seed_set", "shares": {"cars": 1}}, "missing: balance"),
        ({"sampling": "cluster", "shares": {"cars": 1}}, "only with sampling: seed_set"),
    ):
        with pytest.raises(UserError, match=sentence):
            drawn(**options)
