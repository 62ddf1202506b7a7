"""Image towers of open_clip, by architecture and pretrained tag."""

import functools
from typing import Any

import numpy as np

from curation.errors import UserError
from embeddings.models.floats import run
from embeddings.models.hub import weights_of
from embeddings.models.timm import state_digest
from embeddings.preprocessing import Preparation

LIBRARIES = ("torch", "open_clip_torch")
MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preparation(name: str) -> Preparation:
    """As open_clip evaluates the model."""
    size, settings = _settings(name)
    mode = MODES[settings.get("resize_mode") or "shortest"]
    interpolation = settings.get("interpolation") or "bicubic"
    return Preparation(mode, size, resize=size if mode == "crop" else 0, interpolation=interpolation)  # type: ignore[arg-type]


def check(name: str) -> None:
    """Raise UserError if open_clip knows no such model, or its weights are neither here nor to be had."""
    identity(name)


def uses_gpu(name: str) -> bool:
    """Whether a GPU would be used."""
    return True


@functools.lru_cache(maxsize=4)
def identity(name: str) -> dict[str, Any]:
    """The digest of the weights as loaded, and the preprocessing. Downloads them if a hub answers."""
    _settings(name)
    return load(name, "cpu").identity


def load(name: str, device: str) -> "OpenClip":
    """The image tower with the weights of its hub."""
    return OpenClip(name, device)


class OpenClip:
    """The image tower; the text tower is dropped."""

    def __init__(self, name: str, device: str, *, pretrained: bool = True) -> None:
        import open_clip

        architecture, tag = _split(name)
        _, settings = _settings(name)
        with weights_of(name):
            model = open_clip.create_model(architecture, pretrained=tag if pretrained else None, device="cpu")
        self._tower = model.visual.eval().to(device)
        self._device = device
        self._mean, self._std = tuple(settings.get("mean") or MEAN), tuple(settings.get("std") or STD)
        self._preparation = preparation(name)
        self.batch_size = 32 if device == "cuda" else 8
        self.dimension = int(self.embed(np.zeros((1, *self._preparation.shape), np.uint8)).shape[1])
        self.identity: dict[str, Any] = {
            "name": name,
            "weights": state_digest(self._tower),
            "preprocessing": {**self._preparation.describe(), "mean": list(self._mean), "std": list(self._std)},
            "dimension": self.dimension,
        }

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        return run(self._forward, batch, self._mean, self._std, self._device)

    def _forward(self, images: Any) -> Any:
        rows = self._tower(images)
        return rows[0] if isinstance(rows, tuple) else rows


def _split(name: str) -> tuple[str, str]:
    architecture, separator, tag = name.split(":", 1)[1].rpartition("/")
    if not separator or not architecture or not tag:
        raise UserError(
            f"model {name}: write it as open_clip:ARCH/PRETRAINED, e.g. open_clip:ViT-B-32/laion2b_s34b_b79k"
        )
    return architecture, tag


def _settings(name: str) -> tuple[int, dict[str, Any]]:
    """(input side, open_clip's preprocessing of this tag)."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    architecture, tag = _split(name)
    model = open_clip.get_model_config(architecture)
    if model is None:
        raise UserError(
            f"model {name}: open_clip has no architecture `{architecture}`; `open_clip.list_models()` lists them"
        )
    tags = list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise UserError(
            f"model {name}: open_clip has no weights `{tag}` of {architecture}; there are: {', '.join(tags) or 'none'}"
        )
    size = model["vision_cfg"].get("image_size", 224)
    return int(size if isinstance(size, int) else size[0]), dict(get_pretrained_cfg(architecture, tag))
