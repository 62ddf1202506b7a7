"""Which code computes targets and cross-entropies: all that `kernels.losses` and `kernels.student_logits` decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from training.kernels import prototypes, require_triton
from training.losses import streaming, terms
from training.losses.centering import Centering, Columns, Targets, sinkhorn_columns
from training.model import Factored

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

    from training.config import KernelConfig


class CrossEntropies(Protocol):
    """DINO's and iBOT's losses, and the targets in the form that they take. Rows of `dino` are crop-major."""

    def targets(self, centering: Centering, logits: Tensor, temperature: float) -> Tensor | Targets:
        """Of the teacher's logits, (n, prototypes)."""

    def dino(self, logits: Tensor | Factored, targets: Tensor | Targets, temperature: float) -> Float[Tensor, ""]:
        """logits: of the global crops, then of the local ones."""

    def ibot(
        self,
        logits: Tensor | Factored,
        targets: Tensor | Targets,
        weights: Float[Tensor, "patches"],
        crops: int,
        temperature: float,
    ) -> Float[Tensor, ""]:
        """weights: of the patches; crops: global ones."""


class WithMatrices:
    """The reference: targets as matrices, losses left to autograd."""

    def targets(self, centering: Centering, logits: Tensor, temperature: float) -> Tensor:
        return centering.targets(logits, temperature)

    def dino(self, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        global_logits, local_logits = logits.split([len(targets), len(logits) - len(targets)])
        return terms.dino_loss(global_logits, local_logits, targets, temperature)

    def ibot(self, logits: Tensor, targets: Tensor, weights: Tensor, crops: int, temperature: float) -> Tensor:
        return terms.ibot_loss(logits, targets, weights, crops, temperature)


class Streamed:
    """Targets as potentials, no matrix of them; the student's logits may be `Factored`."""

    def __init__(self, backend: streaming.Backend) -> None:
        self.backend = backend

    def targets(self, centering: Centering, logits: Tensor, temperature: float) -> Targets:
        return centering.potentials(logits, temperature)

    def dino(self, logits: Tensor | Factored, targets: Targets, temperature: float) -> Tensor:
        module = prototypes if isinstance(logits, Factored) else streaming
        return module.dino_loss(logits, targets, temperature, self.backend)

    def ibot(
        self, logits: Tensor | Factored, targets: Targets, weights: Tensor, crops: int, temperature: float
    ) -> Tensor:
        module = prototypes if isinstance(logits, Factored) else streaming
        return module.ibot_loss(logits, targets, weights, crops, temperature, self.backend)


def choose(config: KernelConfig, device: torch.device) -> tuple[CrossEntropies, Columns]:
    """(losses, what computes Sinkhorn-Knopp's columns). Raises UserError for kernels that cannot run here."""
    if config.losses == "triton":
        require_triton("kernels.losses: triton", device.type)
        from training.kernels import cross_entropy
        from training.kernels.sinkhorn import sinkhorn_columns as columns

        return Streamed(streaming.Backend(cross_entropy.row_losses, cross_entropy.gradient)), columns
    if config.student_logits == "chunked":
        return Streamed(streaming.Backend()), sinkhorn_columns
    return WithMatrices(), sinkhorn_columns
