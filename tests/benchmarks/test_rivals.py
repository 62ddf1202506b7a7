"""A rival that looks everywhere finds every pair: so what it misses elsewhere is its own doing."""

from pathlib import Path

import pytest

from benchmarks import data, rivals, truth


@pytest.mark.parametrize("method", ["exact", "ivf_flat", "ivf_sqfp16", "ivf_flat_big_batch", "one_cell"])
def test_visiting_every_list_finds_every_pair(tmp_path: Path, method: str) -> None:
    made = data.make("hard", tmp_path / "hard", 1200, dimension=64)
    lists = 1 if method == "one_cell" else 8
    neighbours = 400 if method == "ivf_flat_big_batch" else None
    setting = rivals.Setting(method, lists=lists, visits=lists, radius=0.598, neighbours=neighbours)
    document = rivals.run(str(made.folder), 0.6, setting)
    pairs = truth.truth_pairs(made, 0.6)
    assert document["recall"]["both"]["recall"] == 1
    assert abs(document["pairs"] - len(pairs.low)) <= 2  # float32 products at the threshold itself


def test_tuned_visits_reach_the_recall_asked_for(tmp_path: Path) -> None:
    made = data.make("hard", tmp_path / "hard", 3000, dimension=64)
    setting = rivals.tune(str(made.folder), 0.6, rivals.Setting("ivf_flat", lists=32), 0.95)
    assert setting.visits is not None
    document = rivals.run(str(made.folder), 0.6, setting)
    assert 0.95 <= document["recall"]["both"]["recall"] < 1
