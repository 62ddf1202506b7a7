"""Batches depend on (seed, sample number) alone: not on workers, processes, restarts or what is broken elsewhere."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curation.errors import UserError
from tests.training.data.manifests import picture, small, write_manifest
from training.data import Batch, DataConfig, batches, micro_batch_size

COMMON = {"seed": 3, "global_batch": 8, "group_size": 2, "patch_size": 7}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    images = [picture(i, 40 + i, 60 - i, "JPEG" if i % 2 else "PNG") for i in range(30)]
    images[7], images[21] = b"\xff\xd8\xff broken", images[21][:200]
    return write_manifest(tmp_path_factory.mktemp("data") / "m", images, weight=np.linspace(0.2, 2, 30).tolist())


@pytest.fixture(scope="module")
def config(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small(manifest, tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def first(config: DataConfig) -> list[Batch]:
    return take(batches(config, **COMMON), 6)


def take(stream: Iterator[Batch], count: int) -> list[Batch]:
    found = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return found


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("global_crops", "local_crops", "masks", "image_ids", "sample_numbers"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.replaced == b.replaced


def test_shapes_and_numbers_are_those_of_the_contract(first: list[Batch]) -> None:
    batch = first[1]
    assert batch.global_crops.shape == (16, 3, 28, 28) and batch.global_crops.dtype == torch.float32
    assert batch.local_crops.shape == (16, 3, 14, 14)
    assert batch.masks.shape == (16, 16) and batch.masks.dtype == torch.bool
    assert batch.sample_numbers.tolist() == list(range(8, 16))
    assert batch.image_ids.dtype == torch.int64
    assert all(group.any(-1).sum() == 2 for group in batch.masks.view(2, 4, 2, 16).transpose(0, 1))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(config: DataConfig, first: list[Batch], workers: int) -> None:
    stream = batches(config.model_copy(update={"workers": workers}), **COMMON)
    assert_same(take(stream, 5), first[:5])


def test_a_restart_goes_on_where_it_was(config: DataConfig, first: list[Batch]) -> None:
    assert_same(take(batches(config, **COMMON, first_step=3), 3), first[3:])
    stream = batches(config.model_copy(update={"workers": 2}), **COMMON, first_step=4)
    assert_same(take(stream, 2), first[4:])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (2, 2), (1, 4)])
def test_processes_and_accumulation_cut_the_same_global_batch(
    config: DataConfig, first: list[Batch], world_size: int, accumulate: int
) -> None:
    parts: list[Batch] = []
    for rank in range(world_size):
        stream = batches(config, **COMMON, first_step=2, rank=rank, world_size=world_size, accumulate=accumulate)
        parts += take(stream, accumulate)

    def joined(name: str, crops: int) -> torch.Tensor:
        split = [getattr(part, name).unflatten(0, (crops, -1)) for part in parts]
        return torch.cat(split, dim=1).flatten(0, 1)

    whole = first[2]
    for name, crops in (("global_crops", 2), ("local_crops", 2), ("masks", 2), ("image_ids", 1), ("sample_numbers", 1)):
        assert torch.equal(joined(name, crops), getattr(whole, name)), name
    assert sum(part.replaced for part in parts) == whole.replaced


def test_broken_images_are_counted_and_replaced(first: list[Batch]) -> None:
    drawn = torch.cat([batch.image_ids for batch in first]).tolist()
    assert 107 not in drawn and 121 not in drawn
    assert sum(batch.replaced for batch in first) >= 2


def test_images_in_memory_and_in_a_folder(tmp_path: Path) -> None:
    images = [picture(i) for i in range(10)]
    far = small(write_manifest("memory://batches-test", images), tmp_path)
    near = small(write_manifest(tmp_path / "m", images), tmp_path)
    (tmp_path / "tree").mkdir()
    for i, data in enumerate(images):
        (tmp_path / f"tree/{i:02d}.png").write_bytes(data)
    ours, theirs, tree = (take(batches(c, **COMMON), 2) for c in (far, near, small(str(tmp_path / "tree"), tmp_path)))
    assert_same(ours, theirs)
    for a, b in zip(ours, tree, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.image_ids, b.image_ids + 100)


def test_crops_are_normalised(tmp_path: Path) -> None:
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (30, 30), (0, 0, 0)).save(sink, "PNG")
    config = small(write_manifest(tmp_path / "m", [sink.getvalue()] * 8), tmp_path, local_crops=0)
    (batch,) = take(batches(config, **COMMON), 1)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        assert batch.global_crops[0, channel].unique().item() == pytest.approx(-mean / std, rel=1e-6)


def sentence(config: DataConfig, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        take(batches(config, **(COMMON | options)), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_work_is_said_before_the_first_batch(config: DataConfig, tmp_path: Path) -> None:
    assert "30 images, fewer than one global batch of 64" in sentence(config, global_batch=64)
    assert "not a multiple of group_size 3" in sentence(config, group_size=3)
    assert "cannot be cut into 3 processes" in sentence(config, world_size=3)
    assert "not a multiple of the patch size 8" in sentence(config, patch_size=8)
    assert micro_batch_size(3072, 48, 2, 32) == 32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_broken_images_alone_ends_in_a_sentence(tmp_path: Path, workers: int) -> None:
    config = small(write_manifest(tmp_path / "m", [b"no image"] * 9), tmp_path, workers=workers)
    assert "17 images one after the other cannot be used" in sentence(config)


def test_a_killed_worker_ends_in_a_sentence(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(*_: Any, **__: Any) -> Iterator[Any]:
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")  # what torch says, within 5 s
        yield

    monkeypatch.setattr(sys.modules["training.data.batches"], "DataLoader", loader)
    said = sentence(config.model_copy(update={"workers": 1}))
    assert "a worker of the data loader was killed" in said


def test_a_process_ends_though_a_stream_was_never_closed(config: DataConfig) -> None:
    """It hung: the worker ignores SIGTERM, and multiprocessing waits for its children at exit."""
    program = f"""
from training.data import DataConfig, batches
config = DataConfig.model_validate_json({config.model_copy(update={"workers": 1}).model_dump_json()!r})
if __name__ == "__main__":
    stream = batches(config, **{COMMON!r})
    next(stream)
    kept = [stream]
    kept.append(kept)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
