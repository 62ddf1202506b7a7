"""Whole probes on small labelled sets: manifests, folders, what cannot be evaluated, a probe from elsewhere."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import UserError
from tests.training.data.manifests import write_manifest
from training.evaluation import PROBES, BackboneEncoder, PixelEncoder, Task, evaluate, knn_accuracy, read_labelled
from training.evaluation.features import extract
from training.evaluation.segmentation import patch_labels
from training.model import VisionTransformer, VisionTransformerConfig

COLOURS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 200)}


def image(colour: str, seed: int) -> bytes:
    """Noise around a colour."""
    random = np.random.default_rng(seed)
    pixels = np.clip(np.array(COLOURS[colour]) + random.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    shape = VisionTransformerConfig(image_size=28, patch_size=14, width=48, depth=1, heads=2, layer_scale=None)
    return VisionTransformer(shape)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """(a training manifest, a test folder, the folder of indices)."""
    root = tmp_path_factory.mktemp("labelled")
    names = [list(COLOURS)[i % 3] for i in range(48)]
    images = [image(name, i) for i, name in enumerate(names)]
    images[5] = b"broken"
    labels: list[str | None] = [*names[:-1], None]
    train = write_manifest(root / "train", images, label=labels)
    for i in range(18):
        colour = list(COLOURS)[i % 3]
        (root / "test" / colour).mkdir(parents=True, exist_ok=True)
        (root / "test" / colour / f"{i}.png").write_bytes(image(colour, 100 + i))
    return train, str(root / "test"), str(root / "index")


def test_all_probes_of_images_tell_colours_apart(sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, index = sets
    monkeypatch.setattr("training.evaluation.linear.STEPS", 100)
    monkeypatch.setattr("training.evaluation.logistic.STRENGTHS", (1.0, 100.0))
    task = Task(BackboneEncoder(backbone()), train, test, index_folder=index)
    found = evaluate(task, ("knn", "logistic", "linear", "retrieval"))
    assert found["data"] == {"train": 46, "test": 18, "classes": 3, "broken": 1}
    assert found["knn"]["accuracy_k10"]["value"] > 0.9
    assert found["logistic"]["accuracy"]["value"] > 0.9
    assert found["linear"]["accuracy"]["value"] > 0.9
    assert 0.8 < found["retrieval"]["map"]["low"] <= found["retrieval"]["map"]["high"] <= 1
    pixels = knn_accuracy(PixelEncoder(), train, test)
    assert pixels["n"] == 18 and pixels["low"] <= pixels["value"] <= pixels["high"]


def test_labels_come_from_the_column_or_the_folder(sets: tuple[str, str, str]) -> None:
    train, test, index = sets
    known = read_labelled(train, index_folder=index)
    asked = read_labelled(test, known.classes, index)
    assert known.classes == asked.classes == ("blue", "green", "red")
    assert len(known) == 47 and known.labels[:3].tolist() == [2, 1, 0]
    assert np.bincount(asked.labels).tolist() == [6, 6, 6]
    rest, held = known.split(0.1, 0)
    assert len(rest) + len(held) == 47 and np.bincount(held.labels).tolist() == [2, 2, 2]
    assert not set(rest.image_ids.tolist()) & set(held.image_ids.tolist())


def test_worker_processes_change_no_feature(sets: tuple[str, str, str]) -> None:
    train, _, index = sets
    images, encoder = read_labelled(train, index_folder=index), PixelEncoder()
    ours, theirs = extract(encoder, images), extract(encoder, images, workers=1)
    np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(ours.image_ids, theirs.image_ids)
    assert 105 not in ours.image_ids


def test_a_probe_from_elsewhere_has_the_same_shape(sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Spread:
        name = "spread"

        def run(self, features: Any) -> dict[str, Any]:
            return {"rank": int(np.linalg.matrix_rank(features.test.values))}

    monkeypatch.setitem(PROBES, "spread", Spread())
    assert evaluate(Task(PixelEncoder(), *sets[:2], index_folder=sets[2]), ("spread",))["spread"]["rank"] > 3


def test_what_cannot_be_evaluated_is_one_sentence(sets: tuple[str, str, str], tmp_path: Path) -> None:
    train, test, index = sets
    bare = write_manifest(tmp_path / "bare", [image("red", 0)] * 2)
    other = write_manifest(tmp_path / "other", [image("red", 0)], label=["pink"])
    for arguments, probes, sentence in (
        ((train, test), ("depth",), "probe `depth` is unknown"),
        ((bare, test), ("knn",), "no image has a label"),
        ((train, other), ("knn",), "not in the training set, e.g. `pink`"),
        ((train, test), ("segmentation",), "only for checkpoints of ours"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate(Task(PixelEncoder(), *arguments, index_folder=index), probes)


def test_segmentation_finds_the_coloured_half(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("test", 4)):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for i in range(count):
            random = np.random.default_rng(i + 50 * (part == "test"))
            mask = np.zeros((64, 64), np.uint8)
            edge = int(random.integers(2, 6)) * 8
            mask[:, edge:] = 1
            mask[:2] = 255
            pixels = np.where(mask[..., None] == 1, (200, 60, 50), (40, 70, 190)) + random.normal(0, 15, (64, 64, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / part / "masks" / f"{i}.png")
    torch.manual_seed(0)
    shape = VisionTransformerConfig(image_size=56, patch_size=8 - 1, width=32, depth=1, heads=2, layer_scale=1e-5)
    encoder = BackboneEncoder(VisionTransformer(shape))
    found = evaluate(Task(encoder, str(tmp_path / "train"), str(tmp_path / "test")), ("segmentation",))
    assert found["segmentation"]["miou"] > 0.8
    with pytest.raises(UserError, match="has no mask"):
        (tmp_path / "test/masks/0.png").unlink()
        evaluate(Task(encoder, str(tmp_path / "train"), str(tmp_path / "test")), ("segmentation",))


def test_a_patch_has_its_most_frequent_class() -> None:
    masks = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (3, 12, 12))
    masks[0, :4, :4] = 255
    found = patch_labels(masks, 4)
    for n, y, x in np.ndindex(3, 3, 3):
        block = masks[n, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        counted = block[block != 255]
        assert found[n, y, x] == (np.bincount(counted).argmax() if len(counted) else 255)
