"""Halves read from the pages of a file: what Arrow reads, or nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import half_columns, vectors


def write(path: Path, rows: int, dimension: int, **options: Any) -> np.ndarray:
    random = np.random.default_rng(rows)
    made = random.standard_normal((rows, dimension))
    table = vectors.embeddings_table(np.arange(rows, dtype=np.uint64), made)
    pq.write_table(table, path, **{"compression": "none", "use_dictionary": False, **options})
    column = pq.read_table(path)["embedding"].combine_chunks()
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(rows, dimension)


def read(path: Path, dimension: int) -> list[np.ndarray | None]:
    """What comes of each row group."""
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    level = file.schema.column(1).max_definition_level
    with open(path, "rb") as opened:
        return [half_columns.read(opened, group.column(1), level, group.num_rows, dimension) for group in groups]


@pytest.mark.parametrize(
    ("rows", "dimension", "options"),
    [
        (1, 8, {}),
        (700, 64, {}),
        (700, 64, {"row_group_size": 130}),
        (3000, 100, {"data_page_size": 1000}),
        (3000, 100, {"data_page_size": 4096, "row_group_size": 999, "write_statistics": False}),
        (500, 513, {"data_page_size": 100_000}),
    ],
)
def test_plain_pages_are_read_to_the_bit_that_arrow_reads(
    tmp_path: Path, rows: int, dimension: int, options: dict[str, Any]
) -> None:
    expected = write(tmp_path / "a.parquet", rows, dimension, **options)
    parts = read(tmp_path / "a.parquet", dimension)
    assert all(part is not None for part in parts)
    found = np.concatenate([part for part in parts if part is not None])
    assert found.tobytes() == expected.tobytes()
    assert vectors.read_vectors(str(tmp_path / "a.parquet"), dimension)[1].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"use_byte_stream_split": ["embedding.list.element"]},
    ],
)
def test_any_other_layout_is_left_to_arrow(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = write(tmp_path / "a.parquet", 900, 32, **options)
    assert read(tmp_path / "a.parquet", 32) == [None]
    assert vectors.read_vectors(str(tmp_path / "a.parquet"), 32)[1].tobytes() == expected.tobytes()


def test_nulls_and_lists_of_other_lengths_are_not_taken_for_vectors(tmp_path: Path) -> None:
    values = pa.array([1.0, None, 2.0, 3.0] * 10, pa.float16())
    ids = pa.array(range(20), pa.uint64())
    nulls = pa.table({"image_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(values, 2)})
    offsets = pa.array([0, 1, 4, *range(6, 42, 2)], pa.int32())
    ragged = pa.ListArray.from_arrays(offsets, pa.array(np.ones(40, np.float16)))
    for number, table in enumerate((nulls, pa.table({"image_id": ids, "embedding": ragged}))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False)
        assert read(path, 2) == [None]


def test_pages_that_lie_are_left_to_arrow(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 300, 16, data_page_size=2000)
    whole = (tmp_path / "a.parquet").read_bytes()
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
    random = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        broken[column.data_page_offset + int(random.integers(0, 40))] ^= 1 << int(random.integers(0, 8))
        (tmp_path / "b.parquet").write_bytes(broken)
        with open(tmp_path / "b.parquet", "rb") as opened:
            found = half_columns.read(opened, column, 2, 300, 16)
        assert found is None or found.shape == (300, 16)
