"""A linear layer on patches that says what they show: mean intersection over union on pixels.

A set is a folder with `images/` and `masks/` of the same stems; a mask is an image of class numbers, 255 ignored. The
layer is fitted on the class most frequent in each patch, and its scores are enlarged to the pixels of the crop.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from curation.errors import UserError
from embeddings.decoding import DecodeError, Decoder
from training.data.sources import SUFFIXES
from training.evaluation.encoders import BackboneEncoder
from training.evaluation.logistic import Linear, fit

IGNORED = 255
STRENGTH = 1.0


def read_pairs(folder: str) -> list[tuple[Path, Path]]:
    """(image, mask) by stem. Raises UserError for images without a mask."""
    root = Path(folder)
    masks = {path.stem: path for path in sorted((root / "masks").glob("*")) if path.suffix.lower() == ".png"}
    images = [path for path in sorted((root / "images").glob("*")) if path.suffix.lower() in SUFFIXES]
    missing = [path for path in images if path.stem not in masks]
    if not images or missing:
        what = f"{missing[0].name} has no mask" if missing else "no images"
        raise UserError(f"{folder}: {what}; a segmentation set has images/NAME.jpg and masks/NAME.png")
    return [(path, masks[path.stem]) for path in images]


def patches_of(encoder: BackboneEncoder, pairs: list[tuple[Path, Path]]) -> tuple[np.ndarray, np.ndarray]:
    """(n, grid, grid, width) float32 features and (n, size, size) uint8 masks, of the pairs that can be decoded."""
    grid = encoder.size // encoder.patch_size
    features, masks = [], []
    with Decoder() as decoder:
        for image, mask in pairs:
            try:
                pixels, classes = decoder.decode(image.read_bytes()), _mask(mask)
            except (DecodeError, OSError):
                continue
            prepared = encoder.prepare(pixels)[None]
            features.append(encoder.patches(prepared).reshape(grid, grid, -1))
            masks.append(_cropped(classes, encoder.size, encoder.prepare.resize))
    if not features:
        raise UserError("no pair of image and mask can be decoded", 1)
    return np.stack(features), np.stack(masks)


def _mask(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in ("L", "P"):
            raise UserError(f"{path}: a mask is a PNG of class numbers (mode L or P), not {image.mode}")
        return np.asarray(image, np.uint8)


def _cropped(mask: np.ndarray, size: int, short: int) -> np.ndarray:
    """The crop of `Preparation`, by nearest neighbour: classes do not mix."""
    height, width = mask.shape
    new_height = max(short, short * height // width) if width <= height else short
    new_width = short if width <= height else max(short, short * width // height)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    rows = ((top + np.arange(size) + 0.5) * height / new_height).astype(int)
    columns = ((left + np.arange(size) + 0.5) * width / new_width).astype(int)
    return mask[np.minimum(rows, height - 1)][:, np.minimum(columns, width - 1)]


def patch_labels(masks: np.ndarray, patch: int) -> np.ndarray:
    """(n, size, size) uint8 -> (n, grid, grid): the most frequent class that counts, or 255."""
    n, size, _ = masks.shape
    grid = size // patch
    blocks = masks.reshape(n, grid, patch, grid, patch).transpose(0, 1, 3, 2, 4).reshape(-1, patch * patch)
    counts = np.zeros((len(blocks), IGNORED + 1), np.int32)
    np.add.at(counts, (np.arange(len(blocks))[:, None], blocks), 1)
    counts[:, IGNORED] = 0
    found = np.where(counts.any(1), counts.argmax(1), IGNORED)
    return found.reshape(n, grid, grid).astype(np.uint8)


def fit_patches(features: np.ndarray, masks: np.ndarray, classes: int, patch: int, device: str = "cpu") -> Linear:
    """The layer. features: (n, grid, grid, d)."""
    labels = patch_labels(masks, patch).reshape(-1)
    counted = labels != IGNORED
    return fit(
        features.reshape(-1, features.shape[-1])[counted],
        labels[counted].astype(np.int64),
        classes,
        STRENGTH,
        device=device,
    )


def intersection_over_union(layer: Linear, features: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(classes,) float64 over all pixels that count; nan for a class that neither occurs nor is predicted."""
    classes = len(layer.bias)
    confusion = np.zeros((classes, classes), np.int64)
    for grid_features, mask in zip(features, masks, strict=True):
        scores = torch.from_numpy(grid_features).to(layer.weight) @ layer.weight.T + layer.bias
        enlarged = F.interpolate(scores.permute(2, 0, 1)[None], mask.shape, mode="bilinear", align_corners=False)
        predicted = enlarged[0].argmax(0).cpu().numpy()
        counted = mask != IGNORED
        pairs = mask[counted].astype(np.int64) * classes + predicted[counted]
        confusion += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    inside = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - inside
    return np.where(union > 0, inside / np.maximum(union, 1), np.nan)
