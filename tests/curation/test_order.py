"""Hash order depends on nothing but (seed, purpose, id)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curation.order import generator, hash_keys, take_hashed

IDS = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=60)


@given(IDS, st.integers(0, 50), st.randoms())
def test_the_same_ids_are_taken_in_whatever_order_they_arrive(ids: list[int], count: int, random: object) -> None:
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = np.array(ids, np.uint64), np.array(shuffled, np.uint64)
    assert list(one[take_hashed(one, count, 3, "cap")]) == list(two[take_hashed(two, count, 3, "cap")])


@given(IDS)
def test_distinct_ids_have_distinct_keys(ids: list[int]) -> None:
    keys = hash_keys(np.array(ids, np.uint64), 0, "x")
    assert len(set(keys.tolist())) == len(ids)


def test_seed_and_purpose_change_the_order() -> None:
    ids = np.arange(1000, dtype=np.uint64)
    first = take_hashed(ids, 100, 0, "a")
    assert set(first) != set(take_hashed(ids, 100, 1, "a"))
    assert set(first) != set(take_hashed(ids, 100, 0, "b"))
    # Nothing of the ids' own order is left: the mean of a uniform sample of 0..999.
    assert abs(float(first.mean()) - 499.5) < 100
    assert generator(0, "a").integers(1 << 30) == generator(0, "a").integers(1 << 30)
