"""A byte of a part that changed is found by whoever reads it."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation import parquet, storage, vectors
from curation.audit import scans

RANDOM = np.random.default_rng(0)
IDS = np.arange(500, dtype=np.uint64)
VECTORS = storage.table_bytes(vectors.embeddings_table(IDS, RANDOM.normal(size=(500, 32))))
TEXTS = storage.table_bytes(
    pa.table(
        {"image_id": IDS, "url": [f"http://example.org/{i * 7919 % 1000}.jpg" for i in IDS], "x": RANDOM.random(500)}
    )
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from([VECTORS, TEXTS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_before_the_footer_is_found(data: bytes, place: float, bit: int, tmp_path: Path) -> None:
    """Pages carry checksums. Parquet has none for its footer."""
    changed = bytearray(data)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    changed[int(place * (len(data) - footer))] ^= 1 << bit
    path = tmp_path / "part.parquet"
    path.write_bytes(changed)
    try:
        found = parquet.read_table(str(path))
    except parquet.DamagedError:
        return
    assert found.equals(pq.read_table(io.BytesIO(data)))  # the magic bytes at the front


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from([VECTORS, TEXTS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_footer_is_a_sentence_or_a_table(
    data: bytes, place: float, bit: int, tmp_path: Path
) -> None:
    """Never a crash or another kind of error; the sha256 in `_stage.json` finds what goes unnoticed here."""
    changed = bytearray(data)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    changed[len(data) - footer + int(place * footer)] ^= 1 << bit
    path = tmp_path / "part.parquet"
    path.write_bytes(changed)
    try:
        assert isinstance(parquet.read_table(str(path)), pa.Table)
    except parquet.DamagedError:
        return


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


def test_a_scan_of_several_parts_names_the_damaged_one(tmp_path: Path) -> None:
    changed = bytearray(TEXTS)
    changed[len(changed) // 3] ^= 1
    paths = [str(tmp_path / f"{n}.parquet") for n in range(3)]
    for path, data in zip(paths, (TEXTS, changed, TEXTS), strict=True):
        Path(path).write_bytes(data)
    with pytest.raises(parquet.DamagedError, match=r"1\.parquet: .*bytes have changed"):
        list(scans.stream(paths, ["url", "image_id", "x"]))


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(TEXTS)
    assert parquet.read_table(str(tmp_path / "part.parquet"), ["x", "image_id"]).column_names == ["x", "image_id"]
