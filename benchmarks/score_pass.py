"""Measures the pass over the pixels: CPU milliseconds of one core per image, for each thing that is computed.

    python -m benchmarks.score_pass --cache .cache/corpus --out benchmarks/results/score_pass.json

Real images of the demo's corpus, in hash order, one process and one thread; the decoder runs in this process here, in
a child of it in a run. CPU seconds, not wall time: other work on the machine still slows them through shared caches and
hyper-threads, so the load average stands beside them.
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from demo import corpus as corpora
from demo.originals import candidates, shuffled
from embeddings import faces, hashes, nsfw
from embeddings.decoding import DecodeError, decode
from embeddings.models import registry


def measure(cache: Path, count: int, side: int) -> dict[str, Any]:
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        spent[name] += time.process_time() - start
        return result

    found = corpora.collect(cache, lambda text: None)
    scorer, finder = nsfw.NsfwScorer(), faces.FaceFinder(side)
    prepared: dict[str, list[np.ndarray]] = {name: [] for name in registry.offline_models()}
    images = pixels_seen = 0
    for picture in shuffled(candidates(found), "score_pass")[:count]:
        data = (found.root / picture.path).read_bytes()
        try:
            pixels = timed("decode", decode, data)
        except DecodeError:
            continue
        images += 1
        pixels_seen += pixels.shape[0] * pixels.shape[1]
        timed("pixel_sha256", hashes.pixel_sha256, pixels)
        timed("luminance", hashes.luminance, pixels)
        timed("nsfw", scorer.score, pixels)
        boxes = timed("faces", finder.find, pixels, 0.5)
        if len(boxes):
            blurred = timed("blur", faces.blur, pixels, boxes)
            timed("encode", faces.encode, blurred, "JPEG")
        for name, rows in prepared.items():
            rows.append(timed(f"prepare for {name}", registry.preparation(name), pixels))
    for name, rows in prepared.items():
        timed(name, registry.embed_rows, registry.load(name, "cpu"), np.array(rows))
    milliseconds = {name: round(1000 * seconds / images, 2) for name, seconds in spent.items()}
    shared = sum(ms for name, ms in milliseconds.items() if not any(model in name for model in prepared))
    return {
        "images": images,
        "megapixels_each": round(pixels_seen / images / 1e6, 3),
        "milliseconds_per_image": milliseconds,
        "images_per_second_per_core": {
            name: round(1000 / (shared + milliseconds[name] + milliseconds[f"prepare for {name}"]), 1)
            for name in prepared
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the demo's corpus")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--face-side", type=int, default=480)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    measured = measure(arguments.cache, arguments.images, arguments.face_side)
    document = {
        "what": "CPU time of the pass over the pixels, one thread",
        "inputs": {"packages": [f"{p.name} {p.version}" for p in corpora.PACKAGES], "face_side": arguments.face_side},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load_average": [round(before, 1), round(os.getloadavg()[0], 1)],
        "versions": {name: version(name) for name in ("numpy", "pillow", "onnxruntime", "torch")},
        **measured,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
