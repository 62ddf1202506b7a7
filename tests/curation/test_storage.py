"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import storage, vectors
from curation.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "part.parquet")
    storage.write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk") as caught:
        storage.write_whole(path, b"new")
    assert caught.value.exit_code == 1
    assert Path(path).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["part.parquet"]


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        storage.write_whole(str(tmp_path / "file" / "part.parquet"), b"")


def test_other_filesystems_work_the_same() -> None:
    storage.write_whole("memory://run/a/part-0.parquet", b"abc")
    assert storage.list_files("memory://run/a", ".parquet") == ["memory://run/a/part-0.parquet"]
    assert storage.read_bytes("memory://run/a/part-0.parquet", 1, 2) == b"bc"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_come_back_as_written(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(300, 24))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(dtype)
    ids = np.arange(300, dtype=np.uint64) << np.uint64(33)
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 24)
    column = pa.FixedSizeListArray.from_arrays(pa.array(unit.reshape(-1)), 24).cast(kind)
    pq.write_table(pa.table({"image_id": ids, "embedding": column}), tmp_path / "a.parquet")
    opened = vectors.open_folder(str(tmp_path))
    back_ids, back = opened.read(opened.partitions[0])
    assert np.array_equal(back_ids, ids)
    assert np.array_equal(back, unit) and back.dtype == dtype


def test_equal_tables_give_equal_bytes() -> None:
    ids = np.arange(10, dtype=np.uint64)
    unit = np.eye(10, 16, dtype=np.float32)
    first = storage.table_bytes(vectors.embeddings_table(ids, unit), {"curate.model": "{}"})
    assert first == storage.table_bytes(vectors.embeddings_table(ids, unit), {"curate.model": "{}"})


def write(path: Path, ids: list[int], rows: list[list[float]], model: str | None = None) -> None:
    column = pa.array(rows, pa.list_(pa.float32(), len(rows[0])))
    table = pa.table({"image_id": pa.array(ids, pa.uint64()), "embedding": column})
    if model:
        table = table.replace_schema_metadata({vectors.MODEL_KEY: model})
    pq.write_table(table, path)


def read_all(folder: Path) -> None:
    for _ in vectors.open_folder(str(folder)).blocks():
        pass


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], "image_id 8 has a zero vector"),
        ([[1.0, 0.0], [float("nan"), 1.0]], "image_id 8 has NaN"),
        ([[float("inf"), 0.0], [0.0, 1.0]], "image_id 7 has NaN or infinite"),
    ],
)
def test_hostile_vectors_are_refused_by_id(tmp_path: Path, rows: list[list[float]], sentence: str) -> None:
    write(tmp_path / "a.parquet", [7, 8], rows)
    with pytest.raises(UserError, match=sentence):
        read_all(tmp_path)


def test_long_vectors_are_made_unit_length(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 2], [[3.0, 4.0], [0.6, 0.8]])
    opened = vectors.open_folder(str(tmp_path))
    _, back = opened.read(opened.partitions[0])
    assert np.allclose(back, [[0.6, 0.8], [0.6, 0.8]])


def test_two_models_or_dimensions_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1], [[1.0, 0.0]], '{"name": "one"}')
    write(tmp_path / "b.parquet", [2], [[1.0, 0.0]], '{"name": "two"}')
    with pytest.raises(UserError, match=r"made by two, but .* by one"):
        vectors.open_folder(str(tmp_path))
    write(tmp_path / "b.parquet", [2], [[1.0, 0.0, 0.0]], '{"name": "one"}')
    with pytest.raises(UserError, match="3 dimensions beside 2"):
        vectors.open_folder(str(tmp_path))


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(UserError, match="image_id 5 occurs more than once"):
        vectors.refuse_repeated_ids(np.array([1, 5, 2, 5], np.uint64), "DIR")
    vectors.refuse_repeated_ids(np.array([3, 1, 2], np.uint64), "DIR")
