"""A corpus of drawn pictures with the labels and packages of the real one."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from demo.corpus import PACKAGES, Corpus, Picture

PACKAGE_OF = {
    "animal": "tuxpaint-stamps-default",
    "plant": "tuxpaint-stamps-default",
    "nebula": "stellarium-data",
    "texture": "ufoai-textures",
    "photo": "opencv-doc",
    "art4apps": "pysiogame",
}


def draw(path: Path, number: int, size: tuple[int, int]) -> None:
    """Random shapes over a gradient: no two numbers give like pictures."""
    random = np.random.default_rng(number)
    ramp = np.linspace(0, 255, size[0])[None, :, None] * random.random((1, 1, 3)) * np.ones((size[1], 1, 1))
    image = Image.fromarray(ramp.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, r = (int(v) for v in random.integers(0, max(size), 3))
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        (pen.ellipse if random.random() < 0.5 else pen.rectangle)([x, y, x + r // 2, y + r // 3], fill=colour)
    noise = random.integers(-9, 10, (size[1], size[0], 3))
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def drawn_corpus(folder: Path, counts: dict[str, int], size: tuple[int, int] = (180, 140)) -> Corpus:
    """`counts` pictures of each label, and a few that are too small or too long."""
    pictures = []
    shapes = [(label, size) for label, count in counts.items() for _ in range(count)]
    shapes += [("photo", (40, 44))] * 2 + [("photo", (400, 90))] * 2
    for number, (label, shape) in enumerate(shapes):
        path = f"{PACKAGE_OF[label]}/{label}-{number}.png"
        draw(folder / path, number, shape)
        data = (folder / path).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        pictures.append(Picture(path, PACKAGE_OF[label], label, "CC0", digest, *shape, len(data)))
    packages = tuple(p for p in PACKAGES if p.name in set(PACKAGE_OF.values()))
    return Corpus(folder, tuple(pictures), packages, (), True)
