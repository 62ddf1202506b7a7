"""Pixels to the small fixed-shape uint8 arrays that models take; done on the workers that decode.

Pillow's resize is integer arithmetic on uint8, so its bits are the same on every machine.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Preparation:
    """Resize to (height, width, 3) uint8.

    squash: both sides to `size`, the aspect ratio lost. crop: the short side to `resize`, then the centre
    `size` x `size`. pad: the long side to `size`, the rest filled with grey `fill`.
    """

    mode: Literal["squash", "crop", "pad"]
    size: int
    resize: int = 0
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    fill: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 3)

    def describe(self) -> dict[str, Any]:
        """For a model's identity."""
        return asdict(self)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """pixels: (h, w, 3) uint8 RGB. Returns `shape` uint8."""
        from PIL import Image

        filters = {
            "bilinear": Image.Resampling.BILINEAR,
            "bicubic": Image.Resampling.BICUBIC,
            "lanczos": Image.Resampling.LANCZOS,
        }
        image = Image.fromarray(np.ascontiguousarray(pixels))
        width, height = self._resized(image.width, image.height)
        if self.mode == "crop":
            box = _centre_box(image.width, image.height, width, height, self.size)
            return np.asarray(image.resize((self.size, self.size), filters[self.interpolation], box=box))
        resized = image.resize((width, height), filters[self.interpolation])
        if self.mode == "squash":
            return np.asarray(resized)
        canvas = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
        canvas.paste(resized, ((self.size - width) // 2, (self.size - height) // 2))
        return np.asarray(canvas)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.mode == "squash":
            return self.size, self.size
        if self.mode == "crop":
            short = self.resize or self.size
            if width <= height:
                return short, max(short, int(short * height / width))
            return max(short, int(short * width / height)), short
        scale = self.size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


def _centre_box(width: int, height: int, resized_width: int, resized_height: int, size: int) -> tuple[float, ...]:
    """The part of the source that becomes the centre crop: a panorama is never resized whole, only what is kept."""
    left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
    across, down = width / resized_width, height / resized_height
    return (
        max(0.0, left * across),
        max(0.0, top * down),
        min(float(width), (left + size) * across),
        min(float(height), (top + size) * down),
    )
