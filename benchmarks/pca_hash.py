"""Measures the PCA hash: at which Hamming distance are copies found, and different images taken for copies?

    python -m benchmarks.pca_hash --cache .cache/corpus --out benchmarks/results/pca_hash.json

Real images of the demo's corpus, in hash order; copies of them resized, recompressed, both, cropped. Pairs of the
corpus's own images below a distance are judged by SSCD: a pair of similarity 0.6 or less is certainly no copy, one
above mostly is (the packages repeat themselves). Most of the corpus is not photographs: drawings and screenshots
collide most.
"""

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from curation import exact, vectors
from curation.order import take_hashed
from demo import corpus as corpora
from demo.originals import candidates, copy_vectors, shuffled
from embeddings import hashes
from embeddings.decoding import DecodeError, decode

DISTANCES = range(13)
SIDE = 128


def scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def saved(image: Image.Image, kind: str, **options: Any) -> np.ndarray:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return decode(sink.getvalue())


def cropped(image: Image.Image, share: float) -> Image.Image:
    across, down = round(image.width * share / 2), round(image.height * share / 2)
    return image.crop((across, down, image.width - across, image.height - down))


COPIES: dict[str, Callable[[Image.Image], np.ndarray]] = {
    "JPEG 90": lambda image: saved(image, "JPEG", quality=90),
    "JPEG 50": lambda image: saved(image, "JPEG", quality=50),
    "WebP 60": lambda image: saved(image, "WEBP", quality=60),
    "half size, PNG": lambda image: saved(scaled(image, 0.5), "PNG"),
    "half size, JPEG 75": lambda image: saved(scaled(image, 0.5), "JPEG", quality=75),
    "twice the size, JPEG 85": lambda image: saved(scaled(image, 2.0), "JPEG", quality=85),
    "cropped by 5 % of each length": lambda image: saved(cropped(image, 0.05), "JPEG", quality=85),
}


def measure(cache: Path, count: int) -> dict[str, Any]:
    found = corpora.collect(cache, lambda text: None)
    pictures = [p for p in shuffled(candidates(found), "pca_hash") if min(p.width, p.height) >= SIDE][:count]
    clock = time.process_time()
    luminances, of_copies, kept = [], {name: [] for name in COPIES}, []
    for picture in pictures:
        try:
            pixels = decode((found.root / picture.path).read_bytes())
        except DecodeError:
            continue
        kept.append(picture)
        luminances.append(hashes.luminance(pixels))
        for name, make in COPIES.items():
            of_copies[name].append(hashes.luminance(make(Image.fromarray(pixels))))
    array = np.array(luminances)
    # Fitted on half, measured on all: a run's sample is a part of its pool.
    sample = take_hashed(np.arange(len(kept), dtype=np.uint64), len(kept) // 2, 0, "pca_hash")
    fitted = hashes.fit(array[sample])
    assert fitted is not None
    codes = fitted(array)
    copies = {name: hashes.hamming(codes, fitted(np.array(made))) for name, made in of_copies.items()}
    return {
        "images": len(kept),
        "packages": {name: sum(p.package == name for p in kept) for name in sorted({p.package for p in kept})},
        "copies_found": {
            name: {str(d): round(float((distance <= d).mean()), 4) for d in DISTANCES}
            for name, distance in copies.items()
        },
        "different_images": different(kept, codes, found, cache),
        "cpu_seconds": round(time.process_time() - clock, 1),
    }


def different(pictures: list[Any], codes: np.ndarray, found: Any, cache: Path) -> dict[str, Any]:
    """Pairs of the corpus's own images within each distance, and who would be dropped for it."""
    apart = np.bitwise_count(codes[:, None] ^ codes[None, :])
    i, j = np.nonzero(np.triu(apart <= max(DISTANCES), 1))
    involved = np.unique(np.concatenate([i, j]))
    own = cache / "pca_hash"  # a demo that runs now keeps its own vectors
    own.mkdir(exist_ok=True)
    stored = copy_vectors(found, [pictures[k] for k in involved], own, lambda text: None)
    similarity = vectors.similarity(stored[np.searchsorted(involved, i)], stored[np.searchsorted(involved, j)])
    rows: dict[str, Any] = {}
    for d in DISTANCES:
        near = apart[i, j] <= d
        dropped = exact.hash_duplicates(np.arange(len(codes), dtype=np.uint64), codes, d)
        pairs = {(int(a), int(b)): float(s) for a, b, s in zip(i[near], j[near], similarity[near], strict=True)}
        wrong = [r for r in dropped.tolist() if pairs[(r[1], r[0])] <= 0.6]
        rows[str(d)] = {
            "pairs": int(near.sum()),
            "pairs_sscd_at_most_0.6": int((similarity[near] <= 0.6).sum()),
            "dropped": len(dropped),
            "dropped_sscd_at_most_0.6": len(wrong),
            "wrong_share": round(len(wrong) / len(codes), 5),
            "wrong_by_package": {
                name: sum(pictures[r[0]].package == name for r in wrong)
                for name in sorted({pictures[r[0]].package for r in wrong})
            },
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the demo's corpus")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    document = {
        "what": "Hamming distances of the PCA hash between copies and between different images",
        "inputs": {
            "corpus_revision": corpora.REVISION,
            "packages": [f"{p.name} {p.version}" for p in corpora.PACKAGES],
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("numpy", "pillow", "scikit-learn", "onnxruntime")},
        **measure(arguments.cache, arguments.images),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
