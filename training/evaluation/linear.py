"""The linear probe: a layer trained by SGD on frozen features, one for each learning rate of a grid, all at once.

DINOv2's grid, momentum 0.9, no weight decay, cosine to zero; features are computed once from the centre crop, so
there is no augmentation. The best rate is chosen on a held-out part of the training set, never on the test set.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curation.order import generator

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""For a batch of 256, as DINOv2 gives them; scaled by batch / 256."""
BATCH, STEPS, MOMENTUM, STD = 128, 1250, 0.9, 0.01


@dataclass(frozen=True)
class Heads:
    """weight: (rates, d, classes), bias: (rates, classes)."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, d) -> (rates, n) int64."""
        x = torch.from_numpy(features).to(self.weight)
        return (torch.einsum("nd,rdc->rnc", x, self.weight) + self.bias[:, None]).argmax(-1).cpu().numpy()


def train_heads(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    seed: int,
    rates: tuple[float, ...] = RATES,
    steps: int,
    batch: int = BATCH,
    device: str = "cpu",
) -> Heads:
    """One head per rate, on the same batches from the same start. features: (n, d) float32, labels: (n,) int64."""
    random = generator(seed, "linear probe")
    x = torch.from_numpy(features).to(device)
    y = torch.from_numpy(labels).to(device)
    start = torch.from_numpy(random.normal(0, STD, (x.shape[1], classes)).astype(np.float32)).to(device)
    weight = start.expand(len(rates), -1, -1).clone().requires_grad_(True)
    bias = torch.zeros(len(rates), classes, device=device, requires_grad=True)
    speed = torch.tensor(rates, device=device) * (batch / 256)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(steps):
        chosen = torch.from_numpy(random.integers(0, len(features), batch)).to(device)
        scores = torch.einsum("nd,rdc->rnc", x[chosen], weight) + bias[:, None]
        target = y[chosen].expand(len(rates), -1)
        # A mean per head, a sum over heads: no head's gradient knows of another's.
        loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum") / batch
        gradients = torch.autograd.grad(loss, [weight, bias])
        rate = speed * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for value, moved, gradient in zip((weight, bias), velocity, gradients, strict=True):
                moved.mul_(MOMENTUM).add_(gradient)
                value.sub_(rate.view(-1, *[1] * (value.ndim - 1)) * moved)
    return Heads(weight.detach(), bias.detach())
