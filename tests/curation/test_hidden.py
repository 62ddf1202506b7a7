"""What a run hides: forgotten for good, dropped until somebody keeps it."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import hidden
from curation.errors import UserError
from curation.schemas import DECISIONS


def decide(run: Path, name: str, seconds: int, *rows: tuple[int | None, str]) -> None:
    made = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    folder = run / "decisions"
    folder.mkdir(exist_ok=True)
    entries = [
        {"image_id": i, "action": a, "scope": "image", "target": str(i), "author": "me", "made_at": made, "note": None}
        for i, a in rows
    ]
    pq.write_table(pa.Table.from_pylist(entries, DECISIONS), folder / f"{name}.parquet")


def test_the_last_decision_counts_whatever_the_names_of_the_files(tmp_path: Path) -> None:
    decide(tmp_path, "b", 1, (3, "drop"), (5, "drop"), (9, "drop"))
    decide(tmp_path, "a", 2, (5, "keep"), (9, "note"), (None, "note"))
    assert hidden.dropped_ids(str(tmp_path)).tolist() == [3, 9]


def test_what_is_forgotten_no_decision_brings_back(tmp_path: Path) -> None:
    (tmp_path / "forgotten").mkdir()
    pq.write_table(pa.table({"image_id": pa.array([7, 5, 7], pa.uint64())}), tmp_path / "forgotten" / "x.parquet")
    decide(tmp_path, "a", 2, (5, "keep"), (1 << 63, "drop"))
    assert hidden.hidden_ids(str(tmp_path)).tolist() == [5, 7, 1 << 63]


def test_hiding_equals_an_anti_join_and_leaves_null_ids_alone() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 1 << 62, 1000, np.uint64)
    gone = np.unique(random.choice(ids, 100))
    table = pa.table({"image_id": pa.array([*ids.tolist(), None], pa.uint64())})
    assert hidden.hide(table, gone)["image_id"].to_pylist() == [
        *[i for i in ids.tolist() if i not in set(gone.tolist())],
        None,
    ]
    assert hidden.hide(table, np.empty(0, np.uint64)) is table


def test_a_run_without_lists_hides_nothing_and_a_damaged_list_is_named(tmp_path: Path) -> None:
    assert not len(hidden.hidden_ids(str(tmp_path))) and hidden.digest(hidden.hidden_ids(str(tmp_path))) == ""
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x\.parquet: not a batch of decisions"):
        hidden.hidden_ids(str(tmp_path))
