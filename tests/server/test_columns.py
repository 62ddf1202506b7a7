"""Side tables on disk against the naive thing in memory."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.server.columns import BATCH_ROWS, ColumnWriter, Groups, Rows, RowsWriter, Sorted, write_groups

PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000)), max_size=300)


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.integers(1, 50))
def test_groups_give_back_the_rows_of_every_key(pairs: list[tuple[int, int]], cut: int) -> None:
    pairs.sort()
    with tempfile.TemporaryDirectory() as folder:
        pieces = [pairs[i : i + cut] for i in range(0, len(pairs), cut)]
        arrays = ((np.array([p[0] for p in c], np.uint64), np.array([p[1] for p in c], np.uint32)) for c in pieces)
        assert write_groups(folder, arrays) == (len({k for k, _ in pairs}), len(pairs))
        groups = Groups(folder)
        for key in range(42):
            start, stop = groups.find(key)
            assert groups.rows.read(start, stop).tolist() == [row for k, row in pairs if k == key]
        groups.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=4000), st.lists(st.integers(0, 5001), min_size=1, max_size=30))
def test_sorted_column_searches_as_numpy_does(values: list[int], wanted: list[int]) -> None:
    values.sort()
    with tempfile.TemporaryDirectory() as folder:
        writer = ColumnWriter(f"{folder}/c", np.uint64, ordered=True)
        for start in range(0, len(values), 700):
            writer.append(np.array(values[start : start + 700], np.uint64))
        writer.close()
        column = Sorted(f"{folder}/c", np.uint64)
        held = np.array(values, np.uint64)
        for value in wanted:
            for side in ("left", "right"):
                assert column.search(value, side) == np.searchsorted(held, np.uint64(value), side)
        found = column.find(np.array(wanted, np.uint64))
        assert [at >= 0 for at in found] == [value in values for value in wanted]
        assert all(held[at] == value for at, value in zip(found, wanted, strict=True) if at >= 0)
        column.close()


def test_rows_are_read_by_number_however_they_were_written(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(1000)), "b": [f"text {i}" if i % 3 else None for i in range(1000)]})
    writer = RowsWriter(str(tmp_path / "t.arrow"), table.schema)
    for start, stop in ((0, 1), (1, BATCH_ROWS + 7), (BATCH_ROWS + 7, 990), (990, 1000)):
        writer.append(table.slice(start, stop - start))
    writer.close()
    rows = Rows(str(tmp_path / "t.arrow"))
    drawn = np.random.default_rng(0).integers(0, 1000, 200)
    assert len(rows) == 1000
    assert rows.take(drawn) == table.take(pa.array(drawn)).to_pylist()
