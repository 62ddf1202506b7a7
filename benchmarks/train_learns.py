"""Shows that the trainer learns: k-NN accuracy of a tiny ViT before and after training on a demo's manifest.

    python -m benchmarks.train_learns --manifest demo-run --out benchmarks/results/train_learns.json

Trained on what `make demo` curated (some hundred pictures: photographs, textures, drawings), asked on labelled
photographs that were in neither pool nor seeds (`benchmarks/labelled_images.py`). Per seed: the network as it begins,
and the averaged teacher at the end, both k-NN with a 95 % Wilson interval. Beside them raw pixels and the MobileNetV2
that the demo curates with (trained on ImageNet with labels). With --distill a smaller student of the first seed's
teacher, and the same student from scratch in as many steps.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import labelled_images, machine

NEIGHBOURS = 20
STUDENT = {
    "size": "small",
    "width": 96,
    "depth": 3,
    "heads": 2,
    "patch_size": 8,
    "image_size": 48,
    "layer_scale": None,
    "drop_path": 0.0,
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t for so many values."""
Sets = Mapping[str, Path]
"""Folders of labelled images by name."""


def accuracy(encoder: Any, sets: Sets) -> dict[str, Any]:
    """Of k-NN on every set, with its interval."""
    from training.evaluation import knn_accuracy

    return {
        name: knn_accuracy(encoder, str(folder / "train"), str(folder / "test"), NEIGHBOURS)
        for name, folder in sets.items()
    }


def of_weights(weights: str, sets: Sets) -> dict[str, Any]:
    """Of a checkpoint's folder `model`."""
    from embeddings.models import checkpoint

    return accuracy(checkpoint.load(f"checkpoint:{weights}", "cpu"), sets)


def configuration(options: dict[str, Any], output: Path, **changes: Any) -> Any:
    """The YAML with the options of this program; the schedule is compressed into its steps."""
    import yaml

    from training.config import TrainConfig, compressed

    document = yaml.safe_load(Path(options["config"]).read_text())
    told = {"output": str(output), "data": {"source": options["manifest"]}, "steps": options["steps"]}
    return TrainConfig.model_validate(compressed(compressed(document, told), changes))


def before_and_after(options: dict[str, Any], seed: int, output: Path, sets: Sets) -> dict[str, Any]:
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
    before = accuracy(BackboneEncoder(random, size=config.data.global_size), sets)
    start = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - start
    after = of_weights(result.models[0], sets)
    return {
        "seed": seed,
        "random": before,
        "trained": after,
        "training_seconds": seconds,
        "figures": result.figures,
        "weights": result.models[0],
    }


def students(options: dict[str, Any], teacher: str, output: Path, sets: Sets) -> dict[str, Any]:
    """A smaller model from the teacher, and from nothing, in as many steps."""
    import torch

    from training.loop import train

    torch.set_num_threads(options["threads"])
    distilled = configuration(
        options, output / "distilled", distill={"teacher": teacher, "students": {"student": STUDENT}}
    )
    scratch = configuration(options, output / "scratch", model=STUDENT)
    return {
        "distilled": of_weights(train(distilled).models[0], sets),
        "from_scratch": of_weights(train(scratch).models[0], sets),
    }


def references(sets: Sets) -> dict[str, Any]:
    """What needs no training of ours."""
    from embeddings.models import mobilenet
    from training.evaluation import PixelEncoder

    return {
        "pixels": accuracy(PixelEncoder(), sets),
        "mobilenet_v2": accuracy(mobilenet.load("mobilenet_v2", "cpu"), sets),
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
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", type=int, default=5000, help="labelled images that vote")
    parser.add_argument("--test", type=int, default=5000, help="labelled images that are asked")
    parser.add_argument("--distill", action="store_true")
    arguments = parser.parse_args()
    began = time.perf_counter()
    options = {name: getattr(arguments, name) for name in ("manifest", "config", "steps", "threads")}
    cache, counts = arguments.work.resolve(), (arguments.train, arguments.test)
    sets = {
        "cifar10": labelled_images.cifar10(cache, *counts),
        "fashion_mnist": labelled_images.fashion_mnist(cache, *counts),
    }
    rows = []
    for seed in arguments.seeds:
        output = arguments.work / f"steps-{arguments.steps}-seed-{seed}"
        row, cost = machine.measured(before_and_after, options, seed, output, sets)
        rows.append({**row, "cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes})
        print(json.dumps(rows[-1]), flush=True)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.train_learns",
        "neighbours": NEIGHBOURS,
        **options,
        "evaluation": {
            "train": arguments.train,
            "test": arguments.test,
            "packages": [
                f"{package.name} {package.version}"
                for package in (labelled_images.CIFAR10, labelled_images.FASHION_MNIST)
            ],
        },
        "machine": machine.facts(),
        "versions": machine.versions(("torch", "numpy", "opencv-python-headless")),
        "seeds": rows,
        "sets": {
            name: {
                "random": over_seeds([row["random"][name]["value"] for row in rows]),
                "trained": over_seeds([row["trained"][name]["value"] for row in rows]),
                "separated": all(row["trained"][name]["low"] > row["random"][name]["high"] for row in rows),
            }
            for name in sets
        },
        "references": machine.measured(references, sets)[0],
    }
    if arguments.distill:
        output = arguments.work / f"steps-{arguments.steps}-students"
        document["distillation"] = {
            "student": STUDENT,
            **machine.measured(students, options, rows[0]["weights"], output, sets)[0],
        }
    for row in rows:
        del row["weights"]
    document["seconds"] = round(time.perf_counter() - began)
    print(json.dumps({name: document.get(name) for name in ("sets", "references", "distillation", "seconds")}))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
