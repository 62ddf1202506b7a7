"""Shows that the trainer learns: k-NN accuracy of a tiny ViT before and after training on a demo's manifest.

    python -m benchmarks.train_learns --manifest demo-run --out benchmarks/results/train_learns.json

Trained on what `make demo` curated (some hundred pictures: photographs, textures, drawings), asked on Fashion-MNIST
(Debian's dataset-fashion-mnist, MIT): 28 x 28 grey photographs of products in ten classes, in neither pool nor seeds,
enlarged to the model's size. Per seed: the network as it begins, and the averaged teacher at the end, both 10-NN with a
95 % Wilson interval. Beside them raw pixels and the MobileNetV2 that the demo curates with (trained on ImageNet with
labels). With --distill a smaller student of that teacher, and the same student from scratch in as many steps.
"""

import argparse
import gzip
import hashlib
import json
import math
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine

CLASSES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PACKAGE, FILES = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
NEIGHBOURS = 10
STUDENT = {
    "size": "small",
    "width": 128,
    "depth": 3,
    "heads": 2,
    "patch_size": 8,
    "image_size": 64,
    "layer_scale": None,
    "drop_path": 0.1,
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t for so many values."""


def fashion_mnist(cache: Path, train: int, test: int) -> tuple[Path, str]:
    """(folder with train/CLASS/*.png and test/CLASS/*.png, sha256 of the package); the first images of each class."""
    folder = cache / f"fashion-mnist-{train}-{test}"
    note = folder / "package.json"
    if note.exists():
        return folder, json.loads(note.read_text())["sha256"]
    import cv2

    work = cache / "fashion-mnist-package"
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True, capture_output=True)
    archive = next(work.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "tree")], check=True)
    for split, stem, count in (("train", "train", train), ("test", "t10k", test)):
        with gzip.open(work / "tree" / FILES / f"{stem}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(work / "tree" / FILES / f"{stem}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for row in np.flatnonzero(labels == number)[: count // len(CLASSES)]:
                cv2.imwrite(str(folder / split / name / f"{row:05d}.png"), images[row])
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    note.write_text(json.dumps({"package": archive.name, "sha256": digest}))
    return folder, digest


def accuracy(encoder: Any, folder: Path) -> dict[str, Any]:
    """Of 10-NN, with its interval."""
    from training.evaluation import knn_accuracy

    return knn_accuracy(encoder, str(folder / "train"), str(folder / "test"), NEIGHBOURS)


def of_weights(weights: str, folder: Path) -> dict[str, Any]:
    """Of a checkpoint's folder `model`."""
    from embeddings.models import checkpoint

    return accuracy(checkpoint.load(f"checkpoint:{weights}", "cpu"), folder)


def configuration(options: dict[str, Any], output: Path, **changes: Any) -> Any:
    """The YAML with the options of this program; the schedule is compressed into its steps."""
    import yaml

    from training.config import TrainConfig, compressed

    document = yaml.safe_load(Path(options["config"]).read_text())
    told = {"output": str(output), "data": {"source": options["manifest"]}, "steps": options["steps"]}
    return TrainConfig.model_validate(compressed(compressed(document, told), changes))


def before_and_after(options: dict[str, Any], seed: int, output: Path, folder: Path) -> dict[str, Any]:
    """One training, and the same network untrained."""
    import torch

    from training import parallel
    from training.assembly import assemble
    from training.evaluation import BackboneEncoder
    from training.loop import train
    from training.model import VisionTransformer

    torch.set_num_threads(options["threads"])
    config = configuration(options, output, seed=seed)
    random = VisionTransformer(config.model.backbone())
    began = assemble(config, parallel.start()).learners[0].average.backbone.state_dict()
    random.load_state_dict({name: value.full_tensor() for name, value in began.items()})
    before = accuracy(BackboneEncoder(random, size=config.data.global_size), folder)
    start = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - start
    after = of_weights(result.models[0], folder)
    return {
        "seed": seed,
        "random": before,
        "trained": after,
        "training_seconds": seconds,
        "figures": result.figures,
        "weights": result.models[0],
    }


def students(options: dict[str, Any], teacher: str, output: Path, folder: Path) -> dict[str, Any]:
    """A smaller model from the teacher, and from nothing, in as many steps."""
    import torch

    from training.loop import train

    torch.set_num_threads(options["threads"])
    distilled = configuration(
        options, output / "distilled", distill={"teacher": teacher, "students": {"student": STUDENT}}
    )
    scratch = configuration(options, output / "scratch", model=STUDENT)
    return {
        "distilled": of_weights(train(distilled).models[0], folder),
        "from_scratch": of_weights(train(scratch).models[0], folder),
    }


def references(folder: Path) -> dict[str, Any]:
    """What needs no training of ours."""
    from embeddings.models import mobilenet
    from training.evaluation import PixelEncoder

    return {
        "pixels": accuracy(PixelEncoder(), folder),
        "mobilenet_v2": accuracy(mobilenet.load("mobilenet_v2", "cpu"), folder),
    }


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="demo-run", help="run of `make demo`")
    parser.add_argument("--config", default="configs/train/tiny.yaml")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".cache/train-learns"), help="checkpoints and images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", type=int, default=3000, help="labelled images that vote")
    parser.add_argument("--test", type=int, default=2000, help="labelled images that are asked")
    parser.add_argument("--distill", action="store_true")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("manifest", "config", "steps", "threads")}
    folder, digest = fashion_mnist(arguments.work.resolve(), arguments.train, arguments.test)
    rows = []
    for seed in arguments.seeds:
        output = arguments.work / f"steps-{arguments.steps}-seed-{seed}"
        row, cost = machine.measured(before_and_after, options, seed, output, folder)
        rows.append({**row, "cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes})
        print(json.dumps(rows[-1]), flush=True)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.train_learns",
        "manifest": arguments.manifest,
        **options,
        "evaluation": {"package": PACKAGE, "sha256": digest, "train": arguments.train, "test": arguments.test},
        "machine": machine.facts(),
        "versions": machine.versions(("torch", "numpy", "opencv-python-headless")),
        "seeds": rows,
        "random": over_seeds([row["random"]["value"] for row in rows]),
        "trained": over_seeds([row["trained"]["value"] for row in rows]),
        "references": machine.measured(references, folder)[0],
    }
    document["separated"] = all(row["trained"]["low"] > row["random"]["high"] for row in rows)
    if arguments.distill:
        output = arguments.work / f"steps-{arguments.steps}-students"
        document["distillation"] = {
            "student": STUDENT,
            **machine.measured(students, options, rows[0]["weights"], output, folder)[0],
        }
    for row in rows:
        del row["weights"]
    print(json.dumps({name: document.get(name) for name in ("random", "trained", "references", "distillation")}))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
