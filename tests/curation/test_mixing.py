"""The mix against a dictionary; weights that give the shares asked for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import mixing
from curation.errors import UserError
from curation.schemas import MIX

NAMES = ["seed:birds", "retrieve:birds", "retrieve:cars", "balance"]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_image_is_one_row_with_all_that_brought_it(brought: list[tuple[int, int]]) -> None:
    ids = np.array([image for image, _ in brought], np.uint64)
    sources = np.array([source for _, source in brought], np.int64)
    found, starts, rows = mixing.merge_sources(ids, sources)
    table = mixing.mix_table(found, starts, rows, NAMES, np.ones(len(found)))
    naive: dict[int, Counter[str]] = {}
    for image, source in brought:
        naive.setdefault(image, Counter())[NAMES[source]] += 1
    assert table.schema.equals(MIX)
    assert table["image_id"].to_pylist() == sorted(naive)
    for row in table.to_pylist():
        assert row["sources"] == sorted(naive[row["image_id"]], key=NAMES.index)
        assert row["nominal"] == naive[row["image_id"]].total()


def weights_for(brought: list[tuple[int, int]], shares: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    found, starts, rows = mixing.merge_sources(
        np.array([i for i, _ in brought], np.uint64), np.array([s for _, s in brought])
    )
    group_of, groups = mixing.share_groups(NAMES, shares)
    members = mixing.group_members(starts, rows, group_of, len(groups))
    per_group = mixing.group_weights([shares[g] for g in groups], members.sum(axis=0).tolist(), len(found))
    return members * per_group, members


def test_shares_are_the_expected_draws_and_the_mean_weight_is_one() -> None:
    random = np.random.default_rng(0)
    brought = [(int(i), s) for s, n in enumerate((20, 300, 50, 90)) for i in random.integers(0, 400, n)]
    shares = {"seed": 0.3, "retrieve:cars": 0.1, "retrieve": 0.4, "balance": 0.2}
    parts, _ = weights_for(brought, shares)
    assert parts.sum(axis=1).mean() == pytest.approx(1)
    assert parts.sum(axis=0) / parts.sum() == pytest.approx(list(shares.values()))


def test_images_that_one_group_alone_brought_weigh_the_same() -> None:
    parts, members = weights_for([(0, 0), (1, 0), (2, 1), (3, 1), (3, 2), (4, 3), (5, 0)], {
        "seed": 0.5, "retrieve": 0.25, "balance": 0.25,
    })  # fmt: skip
    weights = parts.sum(axis=1)
    assert weights[0] == weights[1] == weights[5] == pytest.approx(0.5 * 6 / 3)
    assert weights[2] == weights[3] == pytest.approx(0.25 * 6 / 2)
    assert members.sum() == 6


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"seed": 0.5, "retrieve": 0.5}, "no share for balance"),
        ({"seed": 0.5, "retrieve": 0.3, "balance": 0.1}, "add up to 0.9, not to 1"),
        ({"seed": 0.5, "retrieve": 0.3, "balance": 0.1, "retrieve:dogs": 0.1}, "retrieve:dogs brings no images"),
        ({"seed": -0.5, "retrieve": 1.3, "balance": 0.2}, "below 0"),
    ],
)
def test_impossible_shares_are_refused_in_one_sentence(shares: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        mixing.share_groups(NAMES, shares)


def test_an_empty_mix_is_an_empty_table() -> None:
    found, starts, rows = mixing.merge_sources(np.empty(0, np.uint64), np.empty(0, np.int64))
    assert mixing.mix_table(found, starts, rows, NAMES, np.empty(0)).num_rows == 0
