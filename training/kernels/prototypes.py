"""Prototype layer and cross-entropy in one, a few rows at a time: the student's logits are never all there.

Forward makes a chunk of logits by a plain product, has its loss and its gradient computed, the gradient in place of the
logits, and multiplies that into the gradients of features and prototypes at once (as Liger's fused linear
cross-entropy): the products of an ordinary forward and backward, none twice, and the memory of one chunk. Plain torch:
what computes losses and gradients of a chunk is given, kernels or their reference.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.losses.centering import Targets
from training.losses.streaming import Backend, dino_weights, weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float

    from training.model import Factored

CHUNK = 2**28
"""Logits at a time: half a gigabyte of bfloat16, 2,048 rows at 131,072 prototypes. More rows share one reading and
writing of the prototypes' float32 gradient. Not measured on a device yet."""


def dino_loss(logits: Factored, targets: Targets, temperature: float, backend: Backend) -> Float[Tensor, ""]:
    """As `training.losses.streaming.dino_loss`, of logits that are not there."""
    weights = dino_weights(len(logits.features), targets)
    return ChunkedCrossEntropy.apply(*logits, targets, temperature, *weights, True, backend, CHUNK)


def ibot_loss(
    logits: Factored,
    targets: Targets,
    weights: Float[Tensor, "patches"],
    crops: int,
    temperature: float,
    backend: Backend,
) -> Float[Tensor, ""]:
    """As `training.losses.streaming.ibot_loss`, of logits that are not there."""
    return ChunkedCrossEntropy.apply(*logits, targets, temperature, weights, 1 / crops, False, backend, CHUNK)


class ChunkedCrossEntropy(torch.autograd.Function):
    """factor x sum of weight_i x cross-entropy_i of features @ prototypes.T; gradients are made forward.

    The product is in the features' precision, whatever the prototypes'; the gradient of the prototypes adds up and
    stays in float32. Backward once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        targets: Targets,
        temperature: float,
        weights: Float[Tensor, "rows"] | None,
        factor: float,
        crossed: bool,
        backend: Backend,
        chunk: int,
    ) -> Tensor:
        teachers = 2 if crossed else 1
        samples = len(targets.logits) // teachers
        crops = len(features) // samples if samples else 1
        matrix = prototypes.to(features.dtype)
        by_crop = features.unflatten(0, (crops, samples))
        of_features = torch.empty_like(by_crop, memory_format=torch.contiguous_format)
        of_prototypes: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        for rows in even_slices(samples, max(1, chunk // (crops * len(prototypes)))):
            x = by_crop[:, rows].flatten(0, 1)
            logits = x @ matrix.T
            part = targets.rows(rows, teachers)
            losses, *sums = backend.row_losses(logits, part, temperature, crossed=crossed)
            of_rows = None if weights is None else weights.view(crops, samples)[:, rows].flatten()
            loss += weighted_sum(losses, of_rows, factor)
            coefficients = torch.full_like(losses, factor) if of_rows is None else of_rows * factor
            backend.gradient(logits, part, temperature, *sums, coefficients, logits, crossed=crossed)
            of_features[:, rows] = (logits @ matrix).unflatten(0, (crops, -1))
            product = float32_product(logits.T, x)
            of_prototypes = product if of_prototypes is None else of_prototypes.add_(product)
            del logits  # before the next chunk's are made
        if of_prototypes is None:
            of_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
        ctx.gradients = of_features.flatten(0, 1), of_prototypes
        ctx.dtype = prototypes.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        of_features, of_prototypes = ctx.gradients
        del ctx.gradients
        return of_features * outer.to(of_features.dtype), of_prototypes.mul_(outer).to(ctx.dtype), *[None] * 7


def even_slices(count: int, most: int) -> list[slice]:
    """`count` in as few slices of at most `most` as there can be, all about equally long."""
    parts = math.ceil(count / most)
    bounds = [count * part // parts for part in range(parts + 1)] if parts else []
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def float32_product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Of matrices in any precision, written as it was added up."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
