"""Packed shards hold every image once, appear whole, and give streams that do not depend on how they are read."""

import itertools
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from tests.training.data.manifests import picture, small, write_manifest
from training.data import Batch, batches
from training.data.chunks import ChunkOrder, Chunks, Lanes
from training.data.packing import PackConfig, pack

IMAGES = [picture(i) for i in range(40)]
COMMON: dict[str, Any] = {"seed": 1, "global_batch": 8, "group_size": 2, "patch_size": 7}


def packed(root: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    config = PackConfig(str(root), str(out), 6 * len(IMAGES[0]), index_folder=f"{options.pop('index')}", **options)
    return pack(config)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def take(source: str, folder: Path, count: int = 6, **options: Any) -> list[Batch]:
    own = {key: options.pop(key) for key in ("workers",) if key in options}
    stream = batches(small(source, folder, chunk_images=4, shuffle_chunks=2, **own), **(COMMON | options))
    found = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return found


def test_every_image_is_in_one_shard_in_a_random_order(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "m", IMAGES)
    about = packed(root, tmp_path / "out", index=tmp_path / "i")
    rows = rows_of(tmp_path / "out")
    assert about["images"] == 40 and about["shards"] == len(list((tmp_path / "out").glob("*.tar"))) > 4
    assert sorted(row["image_id"] for row in rows) == list(range(100, 140))
    assert [row["image_id"] for row in rows] != sorted(row["image_id"] for row in rows)
    for row in rows:
        data = (tmp_path / "out" / row["shard"]).read_bytes()
        assert data[row["offset"] : row["offset"] + row["length"]] == IMAGES[row["image_id"] - 100]
    with tarfile.open(tmp_path / "out" / rows[0]["shard"]) as tar:  # and other tools read it
        members = tar.getmembers()
        assert tar.extractfile(members[0]).read() == IMAGES[rows[0]["image_id"] - 100]  # type: ignore[union-attr]
        assert members[0].name.endswith(".png")


def test_an_interrupted_pack_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_manifest(tmp_path / "m", IMAGES)
    packed(root, tmp_path / "whole", index=tmp_path / "i")
    real, calls = tarfile.TarFile.addfile, itertools.count()

    def failing(self: Any, member: Any, data: Any = None) -> None:
        if next(calls) == 15:
            raise KeyboardInterrupt
        real(self, member, data)

    monkeypatch.setattr(tarfile.TarFile, "addfile", failing)
    with pytest.raises(KeyboardInterrupt):
        packed(root, tmp_path / "cut", index=tmp_path / "i")
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("part-*")}
    assert 0 < len(before) < 7 and not (tmp_path / "cut/pack.json").exists()
    packed(root, tmp_path / "cut", index=tmp_path / "i", reads_in_flight=2)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before} == before


def test_weights_decide_how_often_an_image_is_packed(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "m", IMAGES, weight=[2.0] * 10 + [0.0] * 10 + [1.0] * 20)
    packed(root, tmp_path / "out", index=tmp_path / "i", sampling="weight")
    counts = np.bincount([row["image_id"] - 100 for row in rows_of(tmp_path / "out")], minlength=40)
    assert counts.tolist() == [2] * 10 + [0] * 10 + [1] * 20


def test_lost_images_are_counted_and_foreign_folders_refused(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "m", IMAGES, offset=[10**9 if i == 8 else 512 + (i % 8) for i in range(40)])
    with pytest.raises(UserError, match="were the images moved"):
        packed(write_manifest(tmp_path / "gone", IMAGES, shard=["x.tar"] * 40), tmp_path / "o", index=tmp_path / "i")
    about = packed(root, tmp_path / "out", index=tmp_path / "i")
    assert (about["images"], about["left_out"]) == (39, 1)
    with pytest.raises(UserError, match="another source, seed or size"):
        packed(root, tmp_path / "out", index=tmp_path / "i", seed=9)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 90),
    count=st.integers(1, 90),
    lanes=st.integers(1, 4),
    width=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_chunks_are_read_whole_and_every_row_comes_as_often(
    n: int, count: int, lanes: int, width: int, seed: int
) -> None:
    chunks = Chunks(n, min(count, n))
    window = 2
    order = ChunkOrder(chunks, Lanes(lanes, width), window, seed)
    # As many steps as take every lane through whole windows, and all lanes through whole epochs.
    steps = chunks.longest * window * chunks.count
    draws = np.arange(steps * lanes * width)
    rows = order.rows(draws)
    counts = np.bincount(rows, minlength=n)
    bounds = chunks.starts(np.arange(chunks.count + 1))
    sizes, epochs = np.diff(bounds), window * width * lanes
    assert counts.min() >= epochs
    np.testing.assert_array_equal(np.add.reduceat(counts, bounds[:-1]), epochs * chunks.longest)
    if n > 1:
        assert counts.max() <= epochs * (1 + 1 / sizes.min()) + 1
    if (sizes == chunks.longest).all():
        assert counts.min() == counts.max()
    assert all(chunks.starts(np.array(chunks.of(r))) <= r < chunks.starts(np.array(chunks.of(r) + 1)) for r in range(n))
    first = rows[: lanes * width * chunks.longest * window].reshape(-1, lanes, width)[:, 0].ravel()
    assert len({chunks.of(int(row)) for row in first}) <= window * width
    np.testing.assert_array_equal(order.rows(draws[-3:]), rows[-3:])


def test_far_shards_give_what_near_ones_give_by_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_manifest(tmp_path / "m", IMAGES)
    packed(root, tmp_path / "out", index=tmp_path / "i")
    memory = fsspec.filesystem("memory")
    for name, data in contents(tmp_path / "out").items():
        memory.pipe_file(f"/packed-test/{name}", data)
    requests: list[int] = []
    real = type(memory).cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if path.endswith(".tar"):
            requests.append(end - start)
        return real(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    near, far = take(str(tmp_path / "out"), tmp_path), take("memory://packed-test", tmp_path)
    for a, b in zip(near, far, strict=True):
        assert torch.equal(a.global_crops, b.global_crops) and torch.equal(a.image_ids, b.image_ids)
    assert len(requests) <= 20  # 56 images were read ahead


def test_a_packed_stream_does_not_depend_on_workers_processes_or_restarts(tmp_path: Path) -> None:
    packed(write_manifest(tmp_path / "m", IMAGES), tmp_path / "out", index=tmp_path / "i")
    source = str(tmp_path / "out")
    whole = take(source, tmp_path)
    drawn = torch.cat([batch.image_ids for batch in whole[:5]])
    assert len(set(drawn.tolist())) > 30
    for again in (take(source, tmp_path, 3, workers=1), take(source, tmp_path, 3, first_step=3)):
        start = int(again[0].sample_numbers[0]) // 8
        for a, b in zip(again, whole[start:], strict=False):
            assert torch.equal(a.global_crops, b.global_crops) and torch.equal(a.masks, b.masks)
    halves = [take(source, tmp_path, 1, rank=rank, world_size=2, first_step=2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([half.image_ids for half in halves]), whole[2].image_ids)
