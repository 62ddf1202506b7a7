"""k nearest neighbours as DINO and DINOv2 count them: votes weighted by exp(cosine / 0.07)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
QUERIES_AT_ONCE, TRAIN_AT_ONCE = 1024, 1 << 16


def predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    ks: tuple[int, ...],
    classes: int,
    device: str = "cpu",
    leave_one_out: bool = False,
) -> dict[int, np.ndarray]:
    """For each k the class of each test image. train: (n, d), test: (m, d) float32; labels: (n,) int64.

    Features are normalised here; a k beyond n counts all n. The training set is gone through in stretches.
    leave_one_out: the sets are one, and no image is its own neighbour.
    """
    most = min(max(ks), len(train) - leave_one_out)
    known = torch.from_numpy(labels).to(device)
    found: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for start in range(0, len(test), QUERIES_AT_ONCE):
        queries = _normalised(test[start : start + QUERIES_AT_ONCE], device)
        similarity, neighbours = _nearest(queries, train, most, start if leave_one_out else None)
        weights = torch.softmax(similarity.double() / TEMPERATURE, dim=1)
        votes_for = known[neighbours]
        for k in ks:
            votes = torch.zeros(len(queries), classes, dtype=torch.float64, device=device)
            votes.scatter_add_(1, votes_for[:, :k], weights[:, :k])
            found[k].append(votes.argmax(1).cpu().numpy())
    return {k: np.concatenate(parts) for k, parts in found.items()}


def _nearest(queries: Tensor, train: np.ndarray, k: int, own: int | None) -> tuple[Tensor, Tensor]:
    """own: the training image that the first query is, None where none is one."""
    device = str(queries.device)
    best = torch.empty(len(queries), 0, device=device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(train), TRAIN_AT_ONCE):
        part = queries @ _normalised(train[start : start + TRAIN_AT_ONCE], device).T
        if own is not None:
            part.diagonal(own - start).fill_(-torch.inf)
        values, at = part.topk(min(k, part.shape[1]), dim=1)
        best, rows = torch.cat([best, values], 1), torch.cat([rows, at + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows


def _normalised(values: np.ndarray, device: str) -> Tensor:
    return F.normalize(torch.from_numpy(np.ascontiguousarray(values)).to(device), dim=1)
