"""The permutation is one, is random, and can be entered anywhere."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.data.permutation import Permutation, permute_each


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), seed=st.integers(0, 1 << 40))
def test_every_element_comes_once(n: int, seed: int) -> None:
    np.testing.assert_array_equal(np.sort(Permutation(n, seed, "x")(np.arange(n))), np.arange(n))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 1 << 45), data=st.data())
def test_a_seek_gives_what_a_walk_gives(n: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.int64)
    whole = Permutation(n, 7, "x")(positions)
    assert whole.tolist() == [int(Permutation(n, 7, "x")(positions[i : i + 1])[0]) for i in range(len(positions))]
    assert whole.min() >= 0 and whole.max() < n


def test_places_are_uniform_and_neighbours_are_not_kept() -> None:
    n = 50
    found = np.stack([Permutation(n, seed, "x")(np.arange(n)) for seed in range(600)])
    for place in (0, 17, n - 1):  # where an element lands
        assert stats.chisquare(np.bincount(found[:, place], minlength=n)).pvalue > 1e-3
    steps = np.bincount((found[:, 1:] - found[:, :-1]).ravel() % n, minlength=n)[1:]
    assert stats.chisquare(steps).pvalue > 1e-3
    large = Permutation(142_000_000, 1, "x")(np.arange(20_000))
    assert stats.kstest(large / 142e6, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.03


def test_permutations_side_by_side_are_permutations() -> None:
    sizes = np.repeat([1, 5, 40, 1000], [1, 5, 40, 1000])
    positions = np.concatenate([np.arange(n) for n in (1, 5, 40, 1000)])
    found = permute_each(positions, sizes, sizes * 7, 0, "x")
    for n in (1, 5, 40, 1000):
        np.testing.assert_array_equal(np.sort(found[sizes == n]), np.arange(n))
    other = permute_each(positions, sizes, sizes * 7 + 1, 0, "x")
    assert (found == other).mean() < 0.2


def test_seed_and_purpose_change_the_order() -> None:
    orders = {tuple(Permutation(100, s, p)(np.arange(100))) for s, p in ((0, "a"), (1, "a"), (0, "b"))}
    assert len(orders) == 3
