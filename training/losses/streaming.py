"""DINO's and iBOT's cross-entropies from `Targets`: forward keeps a number per row, backward makes the gradient anew.

`row_losses` and `gradient` here are plain torch, and what the kernels of `training.kernels.cross_entropy` are held to;
both work in either place. Rows are crop-major. `crossed`: targets hold two teacher rows per sample, of its
first and its second global crop; the student's first crop learns from the second teacher, its second from the
first, and every other crop from both. Otherwise every student row has one teacher row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from training.losses.centering import Targets

if TYPE_CHECKING:
    from jaxtyping import Float


def row_losses(
    student: Float[Tensor, "rows prototypes"], targets: Targets, temperature: float, *, crossed: bool
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "teacher_rows"]]:
    """(cross-entropy of every student row, log-sum-exp of every student row, of every teacher row), float32."""
    scores = student.float() / temperature
    student_sums = torch.logsumexp(scores, dim=1)
    matrix = _of_student_rows(targets, len(student), crossed)
    losses = matrix.sum(1) * student_sums - (matrix * scores).sum(1)
    return losses, student_sums, torch.logsumexp(_scores(targets), dim=1)


def gradient(
    student: Float[Tensor, "rows prototypes"],
    targets: Targets,
    temperature: float,
    student_sums: Float[Tensor, "rows"],
    teacher_sums: Float[Tensor, "teacher_rows"],
    coefficients: Float[Tensor, "rows"],
    out: Float[Tensor, "rows prototypes"],
    *,
    crossed: bool,
) -> None:
    """out <- coefficient / temperature x (weight of the targets x softmax(student / temperature) - targets).

    `out` may be `student` itself.
    """
    matrix = _of_student_rows(targets, len(student), crossed)
    softmax = torch.exp(student.float() / temperature - student_sums[:, None])
    out.copy_((matrix.sum(1, keepdim=True) * softmax - matrix) * (coefficients / temperature)[:, None])


class Backend(NamedTuple):
    """Who computes: plain torch, or the kernels with the same signatures."""

    row_losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = row_losses
    gradient: Callable[..., None] = gradient


def dino_loss(
    logits: Float[Tensor, "crops_b prototypes"], targets: Targets, temperature: float, backend: Backend
) -> Float[Tensor, ""]:
    """As `terms.dino_loss`: global crops, then local ones, against the targets of the two global crops."""
    return StreamedCrossEntropy.apply(logits, targets, temperature, *dino_weights(len(logits), targets), True, backend)


def ibot_loss(
    logits: Float[Tensor, "patches prototypes"],
    targets: Targets,
    weights: Float[Tensor, "patches"],
    crops: int,
    temperature: float,
    backend: Backend,
) -> Float[Tensor, ""]:
    """As `terms.ibot_loss`."""
    return StreamedCrossEntropy.apply(logits, targets, temperature, weights, 1 / crops, False, backend)


def dino_weights(rows: int, targets: Targets) -> tuple[None, float]:
    """(weights of rows, factor of all): the mean over terms, 2 x local crops + 2 per sample."""
    samples = len(targets.logits) // 2
    return None, 1 / (2 * rows - 2 * samples)


class StreamedCrossEntropy(torch.autograd.Function):
    """factor x sum of weight_i x cross-entropy_i, of logits that are there."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        targets: Targets,
        temperature: float,
        weights: Tensor | None,
        factor: float,
        crossed: bool,
        backend: Backend,
    ) -> Tensor:
        losses, *sums = backend.row_losses(student, targets, temperature, crossed=crossed)
        ctx.save_for_backward(student, targets.logits, targets.columns, weights, *sums)
        ctx.told = targets.temperature, temperature, factor, crossed, backend
        return weighted_sum(losses, weights, factor)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        student, logits, columns, weights, *sums = ctx.saved_tensors
        teacher_temperature, temperature, factor, crossed, backend = ctx.told
        targets = Targets(logits, teacher_temperature, columns)
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        coefficients = (outer.float() * factor).expand(len(student)) if weights is None else outer * factor * weights
        backend.gradient(student, targets, temperature, *sums, coefficients.contiguous(), out, crossed=crossed)
        return out, *[None] * 6


def weighted_sum(losses: Float[Tensor, "rows"], weights: Tensor | None, factor: float) -> Float[Tensor, ""]:
    """factor x sum of weight_i x loss_i."""
    return (losses if weights is None else losses * weights).sum() * factor


def _scores(targets: Targets) -> Float[Tensor, "n prototypes"]:
    scores = targets.logits.float() / targets.temperature
    return scores if targets.columns is None else scores + targets.columns


def _of_student_rows(targets: Targets, rows: int, crossed: bool) -> Float[Tensor, "rows prototypes"]:
    matrix = targets.matrix()
    if not crossed:
        return matrix
    first, second = matrix.chunk(2)
    return torch.cat([second, first, *[first + second] * (rows // len(first) - 2)])
