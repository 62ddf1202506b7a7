"""DINOv2's multi-crop augmentation: two global and some local crops of an image, uint8 in, uint8 out.

What torchvision's reference transforms do on Pillow images (RandomResizedCrop, flip, ColorJitter, grey, Gaussian
blur, solarise), in the same order with the same distributions; drawn first, from a generator of the sample's own,
and rendered after, so that both can be tested alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from training.data.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, grey, jitter, solarise, to_planes
from training.data.config import DataConfig
from training.finishing import GREY_AT, NUMBERS, OPERATIONS, SIGMA_AT, SOLARISE_AT

FLIP, JITTER, GREY, SOLARISE = 0.5, 0.8, 0.2, 0.2
BRIGHTNESS_RANGE = CONTRAST_RANGE = 0.4
SATURATION_RANGE, HUE_RANGE = 0.2, 0.1
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
BLUR_SIDE, BLUR_SIGMA = 9, (0.1, 2.0)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class CropRecipe:
    """One kind of crop. size in pixels; scale: share of the image's area."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarise: float = 0.0


@dataclass(frozen=True)
class Crop:
    """What was drawn for one crop. jitter: operations of `colour` in their order, with their factors; None: none."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[int, float], ...] | None
    grey: bool
    blur: float | None
    """Sigma in pixels."""
    solarise: bool


def recipes(config: DataConfig) -> list[CropRecipe]:
    """Of the two global crops, then of the local ones."""
    return [
        CropRecipe(config.global_size, config.global_scale, config.blur[0]),
        CropRecipe(config.global_size, config.global_scale, config.blur[1], SOLARISE),
        *[CropRecipe(config.local_size, config.local_scale, config.blur[2])] * config.local_crops,
    ]


def least_side(config: DataConfig) -> int:
    """The short side from which on no crop is enlarged, however it is drawn: larger JPEGs may be decoded smaller."""
    pairs = [(config.global_size, config.global_scale[0])]
    if config.local_crops:
        pairs.append((config.local_size, config.local_scale[0]))
    return max(math.ceil(size / math.sqrt(low * 3 / 4)) for size, low in pairs)


def draw(recipe: CropRecipe, height: int, width: int, random: np.random.Generator) -> Crop:
    """Draw one crop of an image of that size."""
    top, left, crop_height, crop_width = draw_box(recipe.scale, height, width, random)
    flip = random.random() < FLIP
    operations = draw_jitter(random) if random.random() < JITTER else None
    is_grey = random.random() < GREY
    blur = random.uniform(*BLUR_SIGMA) if random.random() < recipe.blur else None
    solarise = recipe.solarise > 0 and random.random() < recipe.solarise
    return Crop(top, left, crop_height, crop_width, flip, operations, is_grey, blur, solarise)


def draw_box(
    scale: tuple[float, float], height: int, width: int, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws it."""
    for _ in range(CROP_ATTEMPTS):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.random() * (height - h + 1)), int(random.random() * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width * 4 / 3)
    elif width / height > 4 / 3:
        w = round(height * 4 / 3)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(random: np.random.Generator) -> tuple[tuple[int, float], ...]:
    """The four operations of ColorJitter(0.4, 0.4, 0.2, 0.1) in a random order."""
    factors = {
        BRIGHTNESS: random.uniform(1 - BRIGHTNESS_RANGE, 1 + BRIGHTNESS_RANGE),
        CONTRAST: random.uniform(1 - CONTRAST_RANGE, 1 + CONTRAST_RANGE),
        SATURATION: random.uniform(1 - SATURATION_RANGE, 1 + SATURATION_RANGE),
        HUE: random.uniform(-HUE_RANGE, HUE_RANGE),
    }
    return tuple((int(operation), factors[int(operation)]) for operation in random.permutation(4))


def render(pixels: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """Write a crop of pixels, (h, w, 3) uint8, into out, (3, size, size) uint8."""
    cut(pixels, crop, out)
    colour(out, crop)


def cut(pixels: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """The geometry of `render`."""
    to_planes(resized(pixels, crop, out.shape[-1]), crop.flip, out)


def colour(out: np.ndarray, crop: Crop) -> None:
    """The rest of `render`, in place."""
    planes = out.reshape(3, -1)
    if crop.jitter is not None:
        jitter(planes, np.array([o for o, _ in crop.jitter]), np.array([f for _, f in crop.jitter], np.float32))
    if crop.grey:
        grey(planes)
    if crop.blur is not None:
        import cv2

        kernel = cv2.getGaussianKernel(BLUR_SIDE, crop.blur, cv2.CV_32F)
        for plane in out:  # three times as fast as cv2.GaussianBlur, and as near to torchvision's
            cv2.sepFilter2D(plane, -1, kernel, kernel, dst=plane, borderType=cv2.BORDER_REFLECT_101)
    if crop.solarise:
        solarise(planes)


def resized(pixels: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """(size, size, 3) uint8: antialiased bicubic of the crop alone; torch's integer kernel, Pillow's to one level."""
    import torch

    inside = torch.from_numpy(pixels)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if (crop.height, crop.width) == (size, size):
        return inside.numpy().copy()
    # In channels-last order the kernel is half as long at it, and needs no turning of its result.
    planes = inside.permute(2, 0, 1).unsqueeze(0).contiguous(memory_format=torch.channels_last)
    small = torch.ops.aten._upsample_bicubic2d_aa(planes, [size, size], False, None, None)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def augment(pixels: np.ndarray, config: DataConfig, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All crops of an image: (2, 3, H, H) and (local_crops, 3, h, h) uint8."""
    large = np.empty((2, 3, config.global_size, config.global_size), np.uint8)
    small = np.empty((config.local_crops, 3, config.local_size, config.local_size), np.uint8)
    for recipe, out in zip(recipes(config), [*large, *small], strict=True):
        render(pixels, draw(recipe, *pixels.shape[:2], random), out)
    return large, small


def cut_crops(
    pixels: np.ndarray, config: DataConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The crops of `augment`, only cut, and what was drawn for the rest, (2 + local_crops, 11) float32."""
    large = np.empty((2, 3, config.global_size, config.global_size), np.uint8)
    small = np.empty((config.local_crops, 3, config.local_size, config.local_size), np.uint8)
    crops = []
    for recipe, out in zip(recipes(config), [*large, *small], strict=True):
        crops.append(draw(recipe, *pixels.shape[:2], random))
        cut(pixels, crops[-1], out)
    return large, small, np.stack([drawn_numbers(crop) for crop in crops])


def drawn_numbers(crop: Crop) -> np.ndarray:
    """(11,) float32: all of a crop that is not geometry, as `training.finishing` takes it."""
    numbers = np.zeros(NUMBERS, np.float32)
    numbers[:OPERATIONS] = -1
    for place, (operation, factor) in enumerate(crop.jitter or ()):
        numbers[place], numbers[OPERATIONS + place] = operation, factor
    numbers[GREY_AT], numbers[SIGMA_AT], numbers[SOLARISE_AT] = crop.grey, crop.blur or 0, crop.solarise
    return numbers
