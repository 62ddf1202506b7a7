"""The benchmarks' data are what they say, and their truth is exact."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, truth
from curation import vectors


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PART_ROWS", 700)
    monkeypatch.setattr(data, "BLOCK_ROWS", 300)
    monkeypatch.setattr(truth, "TILE_ROWS", 500)


def test_equal_parameters_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (data.make("hard", tmp_path / name, 1500, dimension=32, seed=3) for name in ("a", "b"))
    files = sorted(p.name for p in Path(one.vectors).iterdir())
    assert len(files) == 3
    assert all((Path(one.vectors) / f).read_bytes() == (Path(two.vectors) / f).read_bytes() for f in files)
    other = data.make("hard", tmp_path / "c", 1500, dimension=32, seed=4)
    assert not np.array_equal(other.load(), one.load())


def test_copies_lie_at_the_cosine_written_down_and_are_a_quarter(tmp_path: Path) -> None:
    made = data.make("hard", tmp_path / "hard", 2000, dimension=64)
    rows, planted = made.load(), made.planted()
    assert len(np.unique(planted["copy"])) == 500
    assert not np.isin(planted["original"], planted["copy"]).any()
    similarity = vectors.similarity(rows[planted["copy"]], rows[planted["original"]])
    assert np.array_equal(similarity, planted["similarity"])
    assert 0.598 < similarity.min() < 0.62
    assert 0.97 < similarity.max() < 0.992


def test_groups_are_heavy_tailed_and_add_up() -> None:
    sizes = data.group_sizes(np.random.default_rng(0), 50_000, 150_000)
    assert sizes.sum() == 50_000
    assert 100 < sizes.max() <= data.LARGEST_GROUP
    assert np.median(sizes) == 1


def test_every_pair_and_every_pair_of_the_sample_are_those_of_float64(tmp_path: Path) -> None:
    made = data.make("hard", tmp_path / "hard", 1500, dimension=48)
    wide = made.load().astype(np.float64)
    low, high = np.nonzero(np.triu((wide @ wide.T).astype(np.float32) > np.float32(0.6), 1))
    pairs = truth.truth_pairs(made, 0.6)
    assert set(zip(pairs.low.tolist(), pairs.high.tolist(), strict=True)) == set(
        zip(low.tolist(), high.tolist(), strict=True)
    )
    sample = truth.sample_of(made, 0.6, queries=100)
    assert sample.at_random.sum() == sample.with_copy.sum() == 100
    expected = {(q, int(o)) for q in sample.queries.tolist() for o in np.r_[high[low == q], low[high == q]]}
    assert set(zip(sample.queries[sample.query].tolist(), sample.other.tolist(), strict=True)) == expected


def test_recall_is_the_share_of_nominated_pairs_from_either_side(tmp_path: Path) -> None:
    made = data.make("hard", tmp_path / "hard", 1500, dimension=48)
    pairs, sample = truth.truth_pairs(made, 0.6), truth.sample_of(made, 0.6, queries=200)
    assert sample.nominated(pairs.high, pairs.low).all()
    half = np.arange(len(pairs.low)) % 2 == 0
    found = sample.nominated(pairs.low[half], pairs.high[half])
    document = truth.recall(sample, found)
    both = document["both"]
    assert isinstance(both, dict)
    assert both["low"] < found.mean() == both["recall"] < both["high"]


@pytest.mark.parametrize(("kind", "low", "high"), [("giant_cell", 0.3, 0.6), ("uniform", -0.3, 0.3)])
def test_adversarial_sets_have_the_cosines_they_are_named_for(
    tmp_path: Path, kind: str, low: float, high: float
) -> None:
    rows = data.make(kind, tmp_path / kind, 600, dimension=256).load().astype(np.float32)
    cosines = (rows @ rows.T)[np.triu_indices(600, 1)]
    assert low < np.quantile(cosines, 0.02) < np.quantile(cosines, 0.98) < high


def test_all_equal_is_one_vector(tmp_path: Path) -> None:
    assert len(np.unique(data.make("all_equal", tmp_path / "same", 800, dimension=16).load(), axis=0)) == 1
