"""Crops finished on the device are those that the CPU renders with the same drawn numbers."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data.manifests import picture, small, write_manifest
from tests.training.tiny import make_batch, tiny
from training import finishing, parallel
from training.assembly import assemble
from training.data import augmentation, batches
from training.data.augmentation import Crop, drawn_numbers
from training.data.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION
from training.kernels import augmentation as kernel
from training.schedules import values_at
from training.step import train_step

PHOTO = np.array(Image.open(Path(__file__).parents[2] / "embeddings/mona_lisa.jpg").convert("RGB"))
LEVELS = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
"""A mean and a deviation that leave pixels as they are."""
PLAIN = Crop(0, 0, 0, 0, False, None, False, None, False)
FACTORS = {BRIGHTNESS: 1.37, CONTRAST: 0.62, SATURATION: 1.18, HUE: -0.09}


def cases() -> list[Crop]:
    """Every order of the colours, and every combination of what follows them."""
    orders = [tuple((int(o), FACTORS[o]) for o in order) for order in itertools.permutations(FACTORS)]
    crops = [replace(PLAIN, jitter=order) for order in orders]
    for grey, blur, solarise in itertools.product((False, True), (None, 0.11, 2.0), (False, True)):
        crops.append(replace(PLAIN, jitter=orders[len(crops) % 24], grey=grey, blur=blur, solarise=solarise))
    return [*crops, PLAIN]


def uncoloured(count: int, size: int) -> np.ndarray:
    """Parts of a photograph, contrast raised so that levels are cut off on both sides, (count, 3, size, size)."""
    random = np.random.default_rng(size)
    top, left = (random.integers(0, side - size, count) for side in PHOTO.shape[:2])
    crops = np.stack([PHOTO[y : y + size, x : x + size] for y, x in zip(top, left, strict=True)]).astype(float)
    noise = random.normal(0, 25, crops.shape)
    return np.ascontiguousarray(np.clip(2 * crops - 90 + noise, 0, 255).astype(np.uint8).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("name", "size"), [("plain", 24), ("plain", 9), ("plain", 98), ("triton", 24), ("triton", 40)])
def test_colours_are_the_cpu_s_to_the_bit_and_blurs_within_a_level(name: str, size: int) -> None:
    finish = finishing.finish if name == "plain" else kernel.finish
    # The interpreter is slow; 40 x 40 pixels are more than one tile.
    crops = cases() if name == "plain" else cases()[::7] if size == 24 else cases()[1::8]
    before = uncoloured(len(crops), size)
    wanted = before.copy()
    for crop, out in zip(crops, wanted, strict=True):
        augmentation.colour(out, crop)
    drawn = torch.from_numpy(np.stack([drawn_numbers(crop) for crop in crops]))
    got = finish(torch.from_numpy(before.copy()), drawn, *LEVELS).numpy()
    assert got.dtype == np.float32 and got.shape == before.shape
    difference = np.abs(got - wanted)
    for crop, of in zip(crops, difference, strict=True):
        if crop.blur is None:
            assert of.max() < 1e-3, crop
        elif not crop.solarise:  # a level at 128 is 127 away
            assert of.max() < 1.001 and (of > 0.5).mean() < 0.01, crop
        else:
            assert (of > 0.5).mean() < 0.01, crop


def test_kernel_and_reference_agree_on_normalised_crops_whatever_the_memory() -> None:
    config = augmentation.DataConfig(source="x")
    crops = torch.from_numpy(uncoloured(2, 17)).flip(-1)[:, :, ::1]
    drawn = torch.from_numpy(np.stack([drawn_numbers(crop) for crop in cases()[-3:-1]]))
    wanted = finishing.finish(crops, drawn, config.mean, config.std)
    got = kernel.finish(crops.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), drawn, config.mean, config.std)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_batches_left_to_the_device_become_those_of_the_cpu(tmp_path: Path) -> None:
    images = [picture(i, 50 + i, 60 - i) for i in range(8)]
    manifest = write_manifest(tmp_path / "m", images)
    told = {"seed": 3, "global_batch": 4, "group_size": 2, "patch_size": 7}
    here, there = (small(manifest, tmp_path, augment_on=where, std=(1 / 255,) * 3) for where in ("cpu", "device"))
    streams = [batches(config, **told) for config in (here, there)]
    for _ in range(2):
        mine, theirs = (next(stream) for stream in streams)
        assert theirs.drawn is not None and theirs.global_crops.dtype == torch.uint8 and mine.drawn is None
        parts = theirs.drawn.split([len(theirs.global_crops), len(theirs.local_crops)])
        for name, drawn in zip(("global_crops", "local_crops"), parts, strict=True):
            got = finishing.finish(getattr(theirs, name), drawn, there.mean, there.std)
            difference = (got - getattr(mine, name)).abs()
            assert float((difference > 0.01).float().mean()) < 0.01 and float(difference.median()) < 1e-3
        assert torch.equal(mine.masks, theirs.masks) and torch.equal(mine.image_ids, theirs.image_ids)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_a_step_on_crops_left_to_the_device_is_one_on_finished_crops() -> None:
    found = []
    for name in ("cpu", "reference", "triton"):
        config = tiny(kernels={"augmentation": "reference" if name == "cpu" else name}, batch_size=2)
        models = assemble(config, parallel.start())
        batch = make_batch(config, 0, 2)
        drawn = torch.from_numpy(np.stack([drawn_numbers(crop) for crop in cases()[:20:2]]))
        crops = [torch.from_numpy(uncoloured(n, size)) for n, size in ((4, 16), (6, 8))]
        if name == "cpu":
            parts = zip(crops, drawn.split([4, 6]), strict=True)
            crops = [finishing.finish(c, d, config.data.mean, config.data.std) for c, d in parts]
        batch = replace(batch, global_crops=crops[0], local_crops=crops[1], drawn=None if name == "cpu" else drawn)
        values = values_at(1, config.schedule, config.steps, config.batch_size)
        found.append({k: float(v) for k, v in train_step(models, [batch], values, config)["model"].items()})
    assert found[0] == found[1] and found[0] == pytest.approx(found[2], rel=1e-4)


def test_no_crop_at_all_is_none() -> None:
    for finish in (finishing.finish, kernel.finish):
        assert finish(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 11), *LEVELS).shape == (0, 3, 8, 8)


def test_every_pixel_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, 255))
    drawn = torch.from_numpy(np.stack([drawn_numbers(PLAIN), drawn_numbers(replace(PLAIN, blur=1.0))]))
    got = kernel.finish(torch.zeros(2, 3, 33, 33, dtype=torch.uint8), drawn, *LEVELS)
    assert torch.equal(got, torch.zeros(2, 3, 33, 33))
