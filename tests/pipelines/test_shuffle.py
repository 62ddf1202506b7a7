"""Rows scattered by bucket come back together, each once."""

from pathlib import Path

import numpy as np

from pipelines import shuffle


def test_every_row_comes_back_in_its_bucket_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    kind = np.dtype([("value", "<u8"), ("flag", "?")])
    files, rows = [], []
    for number in range(3):
        made = np.zeros(number * 50, kind)
        made["value"] = random.integers(0, 2**63, len(made))
        rows.append(made)
        bucket = (made["value"] % 8).astype(np.int64)
        files.append(shuffle.scatter(str(tmp_path / f"{number}.bin"), made, bucket, 8))
    whole = np.concatenate(rows)
    for bucket in range(8):
        expected = whole[whole["value"] % 8 == bucket]
        np.testing.assert_array_equal(shuffle.gather(files, bucket, kind), expected)


def test_buckets_are_a_power_of_two_that_bounds_their_rows() -> None:
    for rows in (0, 1, 1000, 4_000_000, 9_000_000, 1_300_000_000):
        buckets = shuffle.bucket_count(rows)
        assert buckets.bit_count() == 1 and rows / buckets <= shuffle.ROWS_PER_BUCKET


def test_scratch_that_is_not_there_is_removed_silently(tmp_path: Path) -> None:
    shuffle.remove(str(tmp_path / "none"))
