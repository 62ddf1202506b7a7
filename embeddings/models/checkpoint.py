"""A checkpoint of our own trainer: a folder with model.safetensors and config.json.

config.json: {"model": fields of VisionTransformerConfig, "preprocessing": {"size", "resize", "interpolation", "mean",
"std"}}; what is missing of the second takes ImageNet's evaluation settings at the model's image size.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from curation.errors import UserError
from embeddings.models.floats import run
from embeddings.preprocessing import Preparation

LIBRARIES = ("torch",)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preparation(name: str) -> Preparation:
    """As the checkpoint's configuration says; by default the centre of an image whose short side is 8/7 of it."""
    config = _config(name)
    settings = config.get("preprocessing", {})
    size = int(settings.get("size", config["model"].get("image_size", 224)))
    return Preparation(
        "crop",
        size,
        resize=int(settings.get("resize", size * 8 // 7)),
        interpolation=settings.get("interpolation", "bicubic"),
    )


def check(name: str) -> None:
    """Raise UserError if the folder is not a checkpoint."""
    _network(name)


def uses_gpu(name: str) -> bool:
    """Whether a GPU would be used."""
    return True


def identity(name: str) -> dict[str, Any]:
    """Digest of the weights and the preprocessing; the folder's place does not matter."""
    settings = _config(name).get("preprocessing", {})
    with open(_folder(name) / WEIGHTS, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": f"checkpoint:{_folder(name).name}",
        "weights": digest,
        "preprocessing": {
            **preparation(name).describe(),
            "mean": list(settings.get("mean", MEAN)),
            "std": list(settings.get("std", STD)),
        },
        "dimension": int(_config(name)["model"].get("width", 384)),
    }


def load(name: str, device: str) -> "Checkpoint":
    """The network with its weights."""
    return Checkpoint(name, device)


class Checkpoint:
    """The class token of our Vision Transformer."""

    def __init__(self, name: str, device: str) -> None:
        self._network = _network(name).eval().to(device)
        self._device = device
        self._preparation = preparation(name)
        self.identity = identity(name)
        self.dimension: int = self.identity["dimension"]
        self.batch_size = 32 if device == "cuda" else 8

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        settings = self.identity["preprocessing"]
        return run(self._network, batch, settings["mean"], settings["std"], self._device)


def _folder(name: str) -> Path:
    return Path(name.split(":", 1)[1])


def _config(name: str) -> dict[str, Any]:
    folder = _folder(name)
    missing = [file for file in (WEIGHTS, CONFIG) if not os.path.isfile(folder / file)]
    if missing:
        raise UserError(f"model {name}: {folder} has no {' and no '.join(missing)}; `curate export` writes both")
    try:
        document = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"model {name}: {folder / CONFIG} is not JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise UserError(f"model {name}: {folder / CONFIG} has no block `model`; `curate export` writes it")
    return document


def _network(name: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from training.model import VisionTransformer, VisionTransformerConfig

    try:
        network = VisionTransformer(VisionTransformerConfig(**_config(name)["model"]))
        network.load_state_dict(load_file(_folder(name) / WEIGHTS))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name}: {WEIGHTS} and {CONFIG} do not fit this version's model ({reason})") from error
    return network
