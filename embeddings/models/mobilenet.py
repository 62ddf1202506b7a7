"""MobileNetV2 trained on ImageNet: 1280 pooled features, the embedder of meaning that needs no network."""

from typing import Any

import numpy as np

from embeddings import weights
from embeddings.models.floats import run
from embeddings.preprocessing import Preparation

LIBRARIES = ("torch", "torchvision")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preparation(name: str) -> Preparation:
    """Short side 256, centre 224, bilinear: as torchvision evaluates these weights."""
    return Preparation("crop", 224, resize=256, interpolation="bilinear")


def check(name: str) -> None:
    """Raise UserError if the weights were not fetched."""
    weights.weight_path("mobilenet_v2")


def load(name: str, device: str) -> "MobileNet":
    """The network without its classifier."""
    return MobileNet(device)


class MobileNet:
    """torchvision's layers with the packaged weights."""

    batch_size = 32
    dimension = 1280

    def __init__(self, device: str) -> None:
        import torch
        from torchvision.models import mobilenet_v2

        network = mobilenet_v2(weights=None)
        network.load_state_dict(torch.load(weights.weight_path("mobilenet_v2"), map_location="cpu", weights_only=True))
        self._features = network.features.eval().to(device)
        self._device = device
        self._preparation = preparation("mobilenet_v2")
        self.identity: dict[str, Any] = {
            "name": "mobilenet_v2",
            "weights": weights.entry("mobilenet_v2").sha256,
            "preprocessing": {**self._preparation.describe(), "mean": MEAN, "std": STD},
            "dimension": self.dimension,
        }

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        return run(lambda images: self._features(images).mean(dim=(2, 3)), batch, MEAN, STD, self._device)
