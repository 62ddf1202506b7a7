"""The probes by name, and the one shape that all have: a new one (depth, video, another suite) is a class and a line.

A probe takes features of a training set and of a test set and gives a document of figures with their intervals.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from curation.errors import UserError
from training.evaluation import intervals, knn, linear, logistic, retrieval, segmentation
from training.evaluation.encoders import BackboneEncoder, Encoder
from training.evaluation.features import FeatureSet, extract
from training.evaluation.labelled import LabelledSet, read_labelled

HELD_OUT = 0.1
NEIGHBOURS = (10, 20, 100, 200)


@dataclass(frozen=True)
class Task:
    """What is evaluated on: sources by their path, read when a probe asks."""

    encoder: Encoder
    train: str
    test: str
    seed: int = 0
    workers: int = 0
    device: str = "cpu"
    index_folder: str | None = None

    @property
    def leaves_one_out(self) -> bool:
        """Whether each image is told by all others: training and test set are one."""
        return self.train == self.test


class Features:
    """A task's features, computed when first asked for and shared by the probes."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @cached_property
    def sets(self) -> tuple[LabelledSet, LabelledSet]:
        """(train, test), with the same classes."""
        train = read_labelled(self.task.train, None, self.task.index_folder)
        return train, read_labelled(self.task.test, train.classes, self.task.index_folder)

    @cached_property
    def train(self) -> FeatureSet:
        return extract(self.task.encoder, self.sets[0], workers=self.task.workers)

    @cached_property
    def test(self) -> FeatureSet:
        if self.task.leaves_one_out:
            return self.train
        return extract(self.task.encoder, self.sets[1], workers=self.task.workers)

    @cached_property
    def held_out(self) -> np.ndarray:
        """(train,) bool: the part that choices are made on. Raises UserError without a test set of its own."""
        if self.task.leaves_one_out:
            raise UserError(f"{self.task.test}: a trained probe needs a test set that it was not trained on")
        _, held = self.sets[0].split(HELD_OUT, self.task.seed)
        return np.isin(self.train.image_ids, held.image_ids)


class Probe(Protocol):
    """An evaluation by name."""

    name: str

    def run(self, features: Features) -> dict[str, Any]:
        """Figures for JSON: each {value, low, high, n}. Raises UserError where the task is not its own."""
        ...


class KnnProbe:
    """DINOv2's weighted k-NN."""

    name = "knn"

    def run(self, features: Features) -> dict[str, Any]:
        train, test = features.train, features.test
        found = knn.predict(
            train.values,
            train.labels,
            test.values,
            NEIGHBOURS,
            len(train.classes),
            features.task.device,
            features.task.leaves_one_out,
        )
        return {f"accuracy_k{k}": intervals.share(int((p == test.labels).sum()), len(test)) for k, p in found.items()}


class LogisticProbe:
    """Logistic regression on normalised features, its strength chosen on held-out images."""

    name = "logistic"

    def run(self, features: Features) -> dict[str, Any]:
        train, test, held, device = features.train, features.test, features.held_out, features.task.device
        x, y, classes = _normalised(train.values), train.labels, len(train.classes)
        strength = logistic.choose(x[~held], y[~held], x[held], y[held], classes, logistic.STRENGTHS, device=device)
        model = logistic.fit(x, y, classes, strength, device=device)
        right = int((model.predict(_normalised(test.values)) == test.labels).sum())
        return {"accuracy": intervals.share(right, len(test)), "strength": strength}


class LinearProbe:
    """SGD over a grid of learning rates, on the class token and, for backbones of ours, the mean patch beside it."""

    name = "linear"

    def run(self, features: Features) -> dict[str, Any]:
        task, held = features.task, features.held_out
        encoder = task.encoder
        train, test = features.train, features.test
        if isinstance(encoder, BackboneEncoder):
            train, test = (
                extract(encoder, images, workers=task.workers, embed=encoder.linear_input) for images in features.sets
            )
        classes, options = len(train.classes), {"seed": task.seed, "device": task.device, "steps": linear.STEPS}
        tried = linear.train_heads(train.values[~held], train.labels[~held], classes, **options)  # type: ignore[arg-type]
        right = (tried.predict(train.values[held]) == train.labels[held]).sum(1)
        rate = linear.RATES[int(right.argmax())]
        final = linear.train_heads(train.values, train.labels, classes, rates=(rate,), **options)  # type: ignore[arg-type]
        correct = int((final.predict(test.values)[0] == test.labels).sum())
        return {"accuracy": intervals.share(correct, len(test)), "learning_rate": rate}


class RetrievalProbe:
    """Each test image looks for its label in the training set, or among the others if that is the test set."""

    name = "retrieval"

    def run(self, features: Features) -> dict[str, Any]:
        same = features.task.leaves_one_out
        test, train = features.test, features.test if same else features.train
        found: dict[str, Any] = {}
        for definition in ("sum", "trapezoid"):
            precisions = retrieval.average_precisions(
                test.values, test.labels, train.values, train.labels, same=same, definition=definition
            )
            known = precisions[~np.isnan(precisions)]
            if not len(known):
                raise UserError(f"{features.task.test}: no image has another of its label to find")
            found["map" if definition == "sum" else "map_trapezoid"] = intervals.mean(known, features.task.seed)
        return found


class SegmentationProbe:
    """A linear layer on patches; train and test are folders with images/ and masks/."""

    name = "segmentation"

    def run(self, features: Features) -> dict[str, Any]:
        task = features.task
        if not isinstance(task.encoder, BackboneEncoder):
            raise UserError("segmentation: only for checkpoints of ours, whose patches are known")
        train, masks = segmentation.patches_of(task.encoder, segmentation.read_pairs(task.train))
        test, truth = segmentation.patches_of(task.encoder, segmentation.read_pairs(task.test))
        classes = 1 + int(max(m[m != segmentation.IGNORED].max(initial=0) for m in (masks, truth)))
        layer = segmentation.fit_patches(train, masks, classes, task.encoder.patch_size, task.device)
        by_class = segmentation.intersection_over_union(layer, test, truth)
        return {"miou": float(np.nanmean(by_class)), "iou": [None if np.isnan(v) else float(v) for v in by_class]}


PROBES: dict[str, Probe] = {
    probe.name: probe for probe in (KnnProbe(), LogisticProbe(), LinearProbe(), RetrievalProbe(), SegmentationProbe())
}


def evaluate(task: Task, probes: tuple[str, ...] = ("knn",)) -> dict[str, Any]:
    """The documents of some probes by name, and what they were taken on. Raises UserError for an unknown probe."""
    unknown = [name for name in probes if name not in PROBES]
    if unknown:
        raise UserError(f"probe `{unknown[0]}` is unknown; known: {', '.join(PROBES)}")
    features = Features(task)
    found: dict[str, Any] = {name: PROBES[name].run(features) for name in probes}
    if set(probes) - {"segmentation"}:
        found["data"] = {
            "train": len(features.train),
            "test": len(features.test),
            "classes": len(features.train.classes),
            "broken": features.train.broken + features.test.broken,
        }
    return found


def knn_accuracy(
    encoder: Encoder, train: str, test: str, k: int = 10, *, workers: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """{value, low, high, n} of the k-NN accuracy: what a training measures on its way."""
    features = Features(Task(encoder, train, test, workers=workers, device=device))
    known, asked = features.train, features.test
    found = knn.predict(known.values, known.labels, asked.values, (k,), len(known.classes), device)[k]
    return intervals.share(int((found == asked.labels).sum()), len(asked))


def _normalised(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12), np.float32)
