"""A byte of a part that changed is found by whoever reads it."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation import footers, parquet, storage, vectors
from curation.audit import scans

RANDOM = np.random.default_rng(0)
IDS = np.arange(500, dtype=np.uint64)
VECTORS = storage.table_bytes(vectors.embeddings_table(IDS, RANDOM.normal(size=(500, 32))))
TEXTS = storage.table_bytes(
    pa.table(
        {"image_id": IDS, "url": [f"http://example.org/{i * 7919 % 1000}.jpg" for i in IDS], "x": RANDOM.random(500)}
    )
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from([VECTORS, TEXTS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(data: bytes, place: float, bit: int, tmp_path: Path) -> None:
    changed = bytearray(data)
    changed[int(place * len(data))] ^= 1 << bit
    path = tmp_path / "part.parquet"
    path.write_bytes(changed)
    try:
        found = parquet.read_table(str(path))
    except parquet.DamagedError:
        return
    assert found.equals(pq.read_table(io.BytesIO(data)))  # the magic bytes at the front, the mark


@pytest.mark.parametrize("data", [VECTORS, TEXTS])
def test_every_bit_of_a_footer_is_found(data: bytes) -> None:
    """Of each of them Arrow refuses some, ignores some, and takes some for other names, types or rows."""
    whole = footers.checked(io.BytesIO(data))
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    tail = data[begin - 8 :]
    for place in range(len(tail)):
        for bit in range(8):
            changed = bytearray(tail)
            changed[place] ^= 1 << bit
            try:
                found = footers.checked(io.BytesIO(changed))
            except (pa.ArrowInvalid, OSError):
                continue
            assert 4 <= place < 8 and found.equals(whole), "a bit of the mark alone says nothing"


def test_a_file_without_rows_and_with_a_long_footer_is_one(tmp_path: Path) -> None:
    schema = pa.schema([(f"column {number}", pa.int64()) for number in range(3000)])
    path = tmp_path / "part.parquet"
    pq.ParquetWriter(path, schema).close()
    assert parquet.read_table(str(path)).num_rows == 0
    path.write_bytes(footers.sealed(path.read_bytes()))
    assert parquet.read_table(str(path)).num_rows == 0


@pytest.mark.parametrize("columns", [1, 3000])
def test_a_file_without_the_mark_is_read_as_it_is(columns: int, tmp_path: Path) -> None:
    """As others write it; the larger footer is longer than what is read at first."""
    table = pa.table({f"column {number}": [number] for number in range(columns)})
    path = str(tmp_path / "part.parquet")
    pq.write_table(table, path)
    assert parquet.read_table(path).equals(table)
    data = footers.sealed(Path(path).read_bytes())
    Path(path).write_bytes(data)
    assert parquet.read_table(path).equals(table) and pq.read_table(path).equals(table)
    changed = bytearray(data)
    changed[-30] ^= 1
    Path(path).write_bytes(changed)
    with pytest.raises(parquet.DamagedError, match="bytes have changed since it was written"):
        parquet.open_file(path)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from([VECTORS, TEXTS]), share=st.floats(0, 1, exclude_max=True))
def test_a_part_that_was_cut_is_one_sentence(data: bytes, share: float, tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(parquet.DamagedError, match=r"part\.parquet: not a readable Parquet file") as caught:
        parquet.read_table(str(path), ["image_id"])
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_vectors_with_a_changed_byte_are_refused_by_every_way_in(tmp_path: Path) -> None:
    changed = bytearray(VECTORS)
    changed[len(changed) // 2] ^= 1
    (tmp_path / "part.parquet").write_bytes(changed)
    opened = vectors.open_folder(str(tmp_path))  # the footer is whole
    with pytest.raises(parquet.DamagedError, match="bytes have changed"):
        opened.read(opened.partitions[0])


@pytest.mark.parametrize("place", [len(TEXTS) // 3, -40], ids=["page", "footer"])
def test_a_scan_of_several_parts_names_the_damaged_one(place: int, tmp_path: Path) -> None:
    changed = bytearray(TEXTS)
    changed[place] ^= 1
    paths = [str(tmp_path / f"{n}.parquet") for n in range(3)]
    for path, data in zip(paths, (TEXTS, changed, TEXTS), strict=True):
        Path(path).write_bytes(data)
    with pytest.raises(parquet.DamagedError, match=r"1\.parquet: .*bytes have changed"):
        list(scans.stream(paths, ["url", "image_id", "x"]))


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(TEXTS)
    assert parquet.read_table(str(tmp_path / "part.parquet"), ["x", "image_id"]).column_names == ["x", "image_id"]
