"""Logistic regression on frozen features: multinomial, L2-regularised, solved to its optimum by L-BFGS.

The objective is scikit-learn's, C * sum of cross-entropies + |W|^2 / 2, intercepts free; the C is chosen on a tenth of
the training set, as DINOv2 does, and the model fitted again on all of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**exponent for exponent in np.linspace(-6, 5, 12))
ITERATIONS = 500


@dataclass(frozen=True)
class Linear:
    """weight: (classes, d), bias: (classes,) float64."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, d) -> (n,) int64."""
        scores = torch.from_numpy(features).to(self.weight) @ self.weight.T + self.bias
        return scores.argmax(1).cpu().numpy()


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    strength: float,
    start: Linear | None = None,
    device: str = "cpu",
    tolerance: float = 1e-7,
) -> Linear:
    """The optimum for C = strength, its gradient below `tolerance`. features: (n, d) float32, labels: (n,) int64."""
    x = torch.from_numpy(features).to(device, torch.float64)
    y = torch.from_numpy(labels).to(device)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=device)
    bias = torch.zeros(classes, dtype=torch.float64, device=device)
    if start is not None:
        weight, bias = start.weight.clone(), start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    scale = 1 / (strength * len(x))
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + scale * weight.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    return Linear(weight.detach(), bias.detach())


def choose(
    train: np.ndarray,
    train_labels: np.ndarray,
    held: np.ndarray,
    held_labels: np.ndarray,
    classes: int,
    strengths: tuple[float, ...],
    device: str = "cpu",
) -> float:
    """The strength with most held-out images right, the smallest of equal ones; each fit starts at the one before."""
    best, most, model = strengths[0], -1, None
    for strength in sorted(strengths):
        model = fit(train, train_labels, classes, strength, model, device, tolerance=1e-5)
        right = int((model.predict(held) == held_labels).sum())
        if right > most:
            best, most = strength, right
    return best
