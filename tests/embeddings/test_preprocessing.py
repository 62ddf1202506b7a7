"""Preparation: fixed shapes, and the same pictures as the libraries whose models we run."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from embeddings.preprocessing import Preparation
from tests.embeddings.pictures import scene


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (31, 400), (1, 1)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_agrees_with_torchvision(size: tuple[int, int], interpolation: str) -> None:
    picture = scene(1, size)
    ours = Preparation("crop", 224, resize=256, interpolation=interpolation)(np.asarray(picture))  # type: ignore[arg-type]
    theirs = CenterCrop(224)(Resize(256, InterpolationMode(interpolation))(picture))
    assert ours.shape == (224, 224, 3)
    difference = np.abs(ours.astype(int) - np.asarray(theirs))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02  # the crop is resized, not the resized cropped


def test_squash_agrees_with_pillow_and_pad_keeps_the_aspect_ratio() -> None:
    picture = scene(2, (120, 60))
    squashed = Preparation("squash", 32, interpolation="bilinear")(np.asarray(picture))
    np.testing.assert_array_equal(squashed, np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)))
    padded = Preparation("pad", 32, fill=7)(np.asarray(picture))
    assert (padded[:8] == 7).all() and (padded[24:] == 7).all()
    np.testing.assert_array_equal(padded[8:24], np.asarray(picture.resize((32, 16), Image.Resampling.BICUBIC)))


def test_long_strip_is_not_blown_up() -> None:
    strip = np.zeros((2, 30_000, 3), np.uint8)
    assert Preparation("crop", 224, resize=256)(strip).shape == (224, 224, 3)
