"""Any model of timm by name (DINOv2 included), pooled features without the classifier."""

import functools
import hashlib
from typing import Any

import numpy as np

from curation.errors import UserError
from embeddings.models.floats import run
from embeddings.models.hub import weights_of
from embeddings.preprocessing import Preparation

LIBRARIES = ("torch", "timm")
MODES = {"center": "crop", "squash": "squash", "border": "pad"}


def preparation(name: str) -> Preparation:
    """As timm evaluates the model: its input size, crop and interpolation."""
    settings = _settings(name)
    size = int(settings["input_size"][-1])
    mode = MODES[settings.get("crop_mode") or "center"]
    short = int(size / float(settings["crop_pct"])) if mode == "crop" else 0
    interpolation = (
        settings["interpolation"] if settings["interpolation"] in ("bilinear", "bicubic", "lanczos") else "bicubic"
    )
    return Preparation(mode, size, resize=short, interpolation=interpolation)  # type: ignore[arg-type]


def check(name: str) -> None:
    """Raise UserError if timm knows no such model, or its weights are neither here nor to be had."""
    identity(name)


def uses_gpu(name: str) -> bool:
    """Whether a GPU would be used."""
    return True


@functools.lru_cache(maxsize=4)
def identity(name: str) -> dict[str, Any]:
    """The digest of the weights as loaded, and the preprocessing. Downloads them if a hub answers."""
    _settings(name)
    return load(name, "cpu").identity


def load(name: str, device: str) -> "Timm":
    """The network with the weights of its hub."""
    return Timm(name, device)


class Timm:
    """A timm network without its head."""

    def __init__(self, name: str, device: str, *, pretrained: bool = True) -> None:
        import timm

        settings = _settings(name)
        with weights_of(name):
            self._network = timm.create_model(name.split(":", 1)[1], pretrained=pretrained, num_classes=0).eval()
        self._network.to(device)
        self._device = device
        self._mean, self._std = tuple(settings["mean"]), tuple(settings["std"])
        self._preparation = preparation(name)
        self.dimension = int(self._network.num_features)
        self.batch_size = 32 if device == "cuda" else 8
        self.identity: dict[str, Any] = {
            "name": name,
            "weights": state_digest(self._network),
            "preprocessing": {**self._preparation.describe(), "mean": list(self._mean), "std": list(self._std)},
            "dimension": self.dimension,
        }

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        return run(self._network, batch, self._mean, self._std, self._device)


def state_digest(module: Any) -> str:
    """sha256 over the names, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(_bytes_type()).numpy().tobytes())
    return digest.hexdigest()


def _bytes_type() -> Any:
    import torch

    return torch.uint8


def _settings(name: str) -> dict[str, Any]:
    import timm
    from timm.models import get_pretrained_cfg

    architecture = name.split(":", 1)[1]
    if not timm.is_model(architecture.split(".")[0]):
        raise UserError(
            f"model {name}: timm has no architecture `{architecture}`; `timm.list_models('*dinov2*')` lists names"
        )
    try:
        found = get_pretrained_cfg(architecture)
    except RuntimeError:  # a tag it does not know
        found = None
    if found is None or not found.has_weights:
        raise UserError(
            f"model {name}: timm has no pretrained weights of that name; `timm.list_pretrained()` lists those there are"
        )
    return dict(found.to_dict())
