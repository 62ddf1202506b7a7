"""From pixels to features: our backbones, raw pixels as the floor, and anything with the shape of `Encoder`.

The models of `embeddings/models` have that shape; who calls an evaluation brings them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from embeddings.preprocessing import Preparation


class Encoder(Protocol):
    """What an evaluation asks of a model."""

    @property
    def dimension(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 -> the fixed-shape uint8 array that `embed` takes."""
        ...

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """(b, ...) uint8 -> (b, dimension) float32, not normalised."""
        ...


class BackboneEncoder:
    """The class token of a backbone of ours; `patches` and `linear_input` give more."""

    def __init__(
        self,
        backbone: Any,
        *,
        size: int | None = None,
        resize: int | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        device: Any = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.backbone, self.device, self.batch_size = backbone, torch.device(device), batch_size
        self.size = size or backbone.config.image_size
        self.patch_size: int = backbone.config.patch_size
        self.dimension: int = backbone.config.width
        self.prepare = Preparation("crop", self.size, resize=resize or self.size * 8 // 7)
        self._scale = torch.tensor(std, device=self.device).mul(255).reciprocal().view(1, 3, 1, 1)
        self._shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=self.device).view(1, 3, 1, 1)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """(b, size, size, 3) uint8 -> (b, width) float32."""
        return self._tokens(batch).class_token.float().cpu().numpy()

    def linear_input(self, batch: np.ndarray) -> np.ndarray:
        """(b, 2 width) float32: class token and mean of the patches, what DINOv2's linear probe takes."""
        tokens = self._tokens(batch)
        return torch.cat([tokens.class_token, tokens.patches.mean(1)], 1).float().cpu().numpy()

    def patches(self, batch: np.ndarray) -> np.ndarray:
        """(b, n, width) float32, row by row."""
        return self._tokens(batch).patches.float().cpu().numpy()

    def _tokens(self, batch: np.ndarray) -> Any:
        was_training = self.backbone.training
        self.backbone.eval()
        images = torch.tensor(batch, device=self.device).permute(0, 3, 1, 2).float() * self._scale - self._shift
        with torch.inference_mode():
            tokens = self.backbone.tokens(images)
        self.backbone.train(was_training)
        return tokens


class PixelEncoder:
    """The image at 32 x 32 pixels: what any feature should beat."""

    batch_size = 256
    dimension = 32 * 32 * 3

    def __init__(self) -> None:
        self.prepare = Preparation("crop", 32, resize=36)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """Centred on grey, so that a cosine tells something."""
        return batch.reshape(len(batch), -1).astype(np.float32) - 128
