"""Crops are distributed and rendered as torchvision's reference transforms do on Pillow images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as F

from tests.training.data.manifests import picture
from training.data import DataConfig, augmentation
from training.data.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, jitter

CONFIG = DataConfig(source="x")
ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
PHOTO = np.array(Image.open(Path(__file__).parents[2] / "embeddings/mona_lisa.jpg").convert("RGB"))


def reference(pixels: np.ndarray, crop: augmentation.Crop, size: int) -> np.ndarray:
    """The same crop by torchvision and Pillow, in the order of DINOv2's transforms."""
    image = F.resized_crop(
        Image.fromarray(pixels), crop.top, crop.left, crop.height, crop.width, [size, size], F.InterpolationMode.BICUBIC
    )
    image = F.hflip(image) if crop.flip else image
    for operation, factor in crop.jitter or ():
        image = ADJUST[operation](image, factor)
    image = F.to_grayscale(image, 3) if crop.grey else image
    image = F.gaussian_blur(image, [9, 9], [crop.blur, crop.blur]) if crop.blur else image
    image = ImageOps.solarize(image, 128) if crop.solarise else image
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("number", range(3))
def test_crops_look_as_torchvision_renders_them(number: int) -> None:
    size = 96
    random = np.random.default_rng(number)
    for solarise in (False, True):
        for _ in range(6):
            recipe = augmentation.CropRecipe(size, (0.05, 1.0), 0.5, float(solarise))
            crop = augmentation.draw(recipe, *PHOTO.shape[:2], random)
            out = np.empty((3, size, size), np.uint8)
            augmentation.render(PHOTO, crop, out)
            wanted = reference(PHOTO, crop, size)
            difference = np.abs(out.astype(int) - wanted)
            if solarise:  # a level more or less at 128 is another side of the threshold
                difference = np.minimum(difference, np.abs(out.astype(int) - 255 + wanted))
            assert difference.mean() < 0.3 and np.quantile(difference, 0.999) <= 4


def test_colour_operations_are_pillow_s_to_the_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)

    def jittered(operation: int, factor: float) -> np.ndarray:
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).reshape(3, -1)
        jitter(planes, np.array([operation]), np.array([factor], np.float32))
        return planes.reshape(3, 64, 48).transpose(1, 2, 0)

    for operation, factor in (
        (BRIGHTNESS, 1.3),
        (BRIGHTNESS, 0.7),
        (CONTRAST, 0.6),
        (CONTRAST, 1.4),
        (SATURATION, 1.2),
    ):
        theirs = np.asarray(ADJUST[operation](Image.fromarray(pixels), factor))
        np.testing.assert_array_equal(jittered(operation, factor), theirs)
    for factor in (-0.1, -0.03, 0.05, 0.1):  # a rounding of the hue apart in one of a thousand
        assert (jittered(HUE, factor) != np.asarray(F.adjust_hue(Image.fromarray(pixels), factor))).mean() < 0.003


@pytest.mark.parametrize(("scale", "height", "width"), [((0.32, 1.0), 375, 500), ((0.05, 0.32), 90, 333)])
def test_boxes_are_distributed_as_torchvision_s(scale: tuple[float, float], height: int, width: int) -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    blank = Image.new("L", (width, height))
    ours = np.array([augmentation.draw_box(scale, height, width, random) for _ in range(3000)], float)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)], float
    )
    for of in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3


def test_an_image_too_narrow_for_any_box_is_cut_at_its_centre() -> None:
    blank = Image.new("L", (1000, 20))
    theirs = transforms.RandomResizedCrop.get_params(blank, [0.9, 1.0], [3 / 4, 4 / 3])
    assert augmentation.draw_box((0.9, 1.0), 20, 1000, np.random.default_rng(0)) == theirs


def test_what_is_drawn_has_the_recipe_s_probabilities() -> None:
    random = np.random.default_rng(1)
    one, two, local = (augmentation.recipes(CONFIG)[i] for i in (0, 1, 2))
    assert (one.scale, two.scale, local.scale) == ((0.32, 1.0), (0.32, 1.0), (0.05, 0.32))
    for recipe, blur, solarise in ((one, 0.0, 0.0), (two, 0.9, 0.2), (local, 0.5, 0.0)):
        crops = [augmentation.draw(recipe, 300, 400, random) for _ in range(4000)]
        for got, wanted in (
            ([c.flip for c in crops], 0.5),
            ([c.jitter is not None for c in crops], 0.8),
            ([c.grey for c in crops], 0.2),
            ([c.blur is not None for c in crops], blur),
            ([c.solarise for c in crops], solarise),
        ):
            assert abs(np.mean(got) - wanted) < 4 * np.sqrt(0.25 / 4000)
        sigmas = [c.blur for c in crops if c.blur is not None]
        assert not sigmas or stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_jitter_is_drawn_as_torchvision_draws_it() -> None:
    random = np.random.default_rng(2)
    drawn = [augmentation.draw_jitter(random) for _ in range(4000)]
    reach = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    for operation, (low, high) in enumerate((reach.brightness, reach.contrast, reach.saturation, reach.hue)):
        factors = [dict(one)[operation] for one in drawn]
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    orders = np.unique([[o for o, _ in one] for one in drawn], axis=0, return_counts=True)[1]
    assert len(orders) == 24 and stats.chisquare(orders).pvalue > 1e-3


def test_images_of_one_pixel_and_long_strips_give_crops() -> None:
    config = DataConfig(source="x", global_size=28, local_size=14)
    for width, height in ((1, 1), (1, 700), (900, 2)):
        pixels = np.array(Image.open(io.BytesIO(picture(0, width, height))).convert("RGB"))
        large, small = augmentation.augment(pixels, config, np.random.default_rng(0))
        assert large.shape == (2, 3, 28, 28) and small.shape == (8, 3, 14, 14)


def test_shrinking_never_makes_a_crop_be_enlarged() -> None:
    side = augmentation.least_side(CONFIG)
    random = np.random.default_rng(0)
    boxes = [augmentation.draw_box(CONFIG.local_scale, side, side, random) for _ in range(3000)]
    assert min(min(h, w) for _, _, h, w in boxes) >= CONFIG.local_size
    boxes = [augmentation.draw_box(CONFIG.global_scale, side, side, random) for _ in range(3000)]
    assert min(min(h, w) for _, _, h, w in boxes) >= CONFIG.global_size
