"""Small pictures, encoded in many ways, for the tests of decoding and models."""

import io
from typing import Any

import numpy as np
from PIL import Image


def scene(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth random picture, (width, height): JPEG keeps it closely."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The picture as a file."""
    sink = io.BytesIO()
    if kind in ("JPEG", "WEBP", "AVIF"):
        options.setdefault("quality", 95)
    image.save(sink, kind, **options)
    return sink.getvalue()
