"""Small drawn images that differ from each other, for whole runs without a network."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def picture(number: int, side: int = 160, family: int = 0) -> Image.Image:
    """A drawing that depends on (number, family) alone: gradient, texture and shapes of the family's palette."""
    rng = np.random.default_rng([family, number])
    base = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    base[..., family % 3] = base[..., family % 3] // 2 + 120
    image = Image.fromarray(base).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers(0, side, 4)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        box = (int(x), int(y), int(x + w / 2 + 4), int(y + h / 2 + 4))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    noise = rng.normal(0, 12, (image.height, image.width, 3))
    pixels = np.clip(np.asarray(image, dtype=np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6))


def folder(path: Path, count: int, family: int = 0, first: int = 0) -> Path:
    """`count` JPEG drawings in a folder."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, family=family).save(path / f"{number:04d}.jpg", quality=92)
    return path


def pool_with_copies(path: Path, originals: int = 16) -> Path:
    """Originals of two families, each fourth also as an exact copy, as a smaller one and recompressed."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(originals):
        image = picture(number, family=number % 2)
        image.save(path / f"{number:04d}.jpg", quality=92)
        if number % 4 == 0:
            (path / f"{number:04d}-exact.jpg").write_bytes((path / f"{number:04d}.jpg").read_bytes())
            image.resize((112, 84), Image.Resampling.LANCZOS).save(path / f"{number:04d}-small.jpg", quality=90)
            image.save(path / f"{number:04d}-again.jpg", quality=55)
    return path


def write_config(root: Path, run: Path, model: str = "mobilenet_v2", workers: int = 2, detectors: bool = True) -> Path:
    """A whole small run over imported folders: pool with copies, two seed sets, one evaluation set with leaks.

    model: the semantic one. detectors: of faces and of NSFW, a tenth of a second per image.
    """
    if not (root / "pool").exists():
        pool_with_copies(root / "pool")
        folder(root / "seeds-even", 6, family=0, first=500)
        folder(root / "seeds-odd", 6, family=1, first=600)
        folder(root / "evaluation", 8, family=2, first=700)
        for number in (700, 701):  # leaks: smaller copies of evaluation images in the pool
            picture(number, family=2).resize((128, 96)).save(root / "pool" / f"leak-{number}.jpg", quality=88)
    path = root / f"{run.name}.yaml"
    path.write_text(
        f"""
run: {run}
seed: 5
sources:
  - {{as: "pool:web", folder: {root}/pool}}
  - {{as: "seed:even", folder: {root}/seeds-even}}
  - {{as: "seed:odd", folder: {root}/seeds-odd}}
  - {{as: "reference:evaluation", folder: {root}/evaluation}}
filter: {{copy_model: sscd_distilled, faces: {str(detectors).lower()}, nsfw: {str(detectors).lower()}}}
dedup: {{threshold: 0.8, against_threshold: 0.85}}
embed: {{models: [{model}]}}
cluster: {{levels: [6, 2]}}
retrieve: {{mode: sample, neighbours: 3}}
balance: {{target: 12}}
resources: {{workers: {workers}}}
"""
    )
    return path
