"""Teacher logits to targets that cannot all be the same prototype: Sinkhorn-Knopp, or softmax around a moving mean.

Sinkhorn-Knopp: Cuturi 2013, as in SwAV and DINOv2; here in the log domain, because exp(logit / temperature) overflows
float32 where a logit is above 88 x temperature. Softmax with centering: DINO (Caron et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from training.collectives import maximum_over_processes, sum_over_processes

if TYPE_CHECKING:
    from jaxtyping import Float


class Targets(NamedTuple):
    """A softmax of logits / temperature + columns: what every centering comes to, before anybody writes it out."""

    logits: Float[Tensor, "n prototypes"]
    temperature: float
    columns: Float[Tensor, "prototypes"] | None = None
    """float32; None: zeros."""

    def matrix(self) -> Float[Tensor, "n prototypes"]:
        """(n, prototypes) float32, rows that sum to 1."""
        scores = self.logits.float() / self.temperature
        return normalised(scores if self.columns is None else scores + self.columns)

    def rows(self, rows: slice, halves: int = 1) -> Targets:
        """Of those rows of each of `halves` equal parts."""
        return self._replace(logits=self.logits.unflatten(0, (halves, -1))[:, rows].flatten(0, 1))


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "n prototypes"], temperature: float, iterations: int = 3
) -> Float[Tensor, "n prototypes"]:
    """Rows that sum to 1, columns nearly to rows / prototypes, over the rows of all processes together.

    A process may hold another number of rows than its neighbours, none included.
    """
    scores = logits.float() / temperature
    return normalised(scores + _columns(scores, iterations))


@torch.no_grad()
def sinkhorn_columns(
    logits: Float[Tensor, "n prototypes"], temperature: float, iterations: int = 3
) -> Float[Tensor, "prototypes"]:
    """What Sinkhorn-Knopp adds per prototype, float32; the rows' part follows from rows that sum to 1."""
    return _columns(logits.float() / temperature, iterations)[0]


def _columns(scores: Float[Tensor, "n prototypes"], iterations: int) -> Float[Tensor, "1 prototypes"]:
    rows = scores.new_full((), len(scores))
    log_share = math.log(scores.shape[1]) - sum_over_processes(rows).log()
    of_row, of_column = scores.new_zeros(len(scores), 1), scores.new_zeros(1, scores.shape[1])
    for iteration in range(iterations):
        of_column = -(logsumexp_over_processes(scores + of_row) + log_share)
        if iteration < iterations - 1:
            of_row = -torch.logsumexp(scores + of_column, dim=1, keepdim=True)
    return of_column


def normalised(scores: Float[Tensor, "n prototypes"]) -> Float[Tensor, "n prototypes"]:
    """The last row pass of Sinkhorn-Knopp."""
    return torch.exp(scores - torch.logsumexp(scores, dim=1, keepdim=True))


def logsumexp_over_processes(x: Float[Tensor, "n prototypes"]) -> Float[Tensor, "1 prototypes"]:
    """Over the rows of every process."""
    highest = x.amax(0, keepdim=True) if len(x) else x.new_full((1, x.shape[1]), -math.inf)
    highest = maximum_over_processes(highest)
    return highest + sum_over_processes(torch.exp(x - highest).sum(0, keepdim=True)).log()


Columns = Callable[[Tensor, float, int], Tensor]
"""(logits, temperature, iterations) -> column potentials: `sinkhorn_columns`, or its kernel."""


class Center(nn.Module):
    """Softmax around a moving mean of the logits.

    The targets of a step use the mean of the steps before; `update` moves it once per step by all that was seen since,
    in all micro-batches of all processes.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(1, prototypes))
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Float[Tensor, "n prototypes"]:
        """(n, prototypes), rows that sum to 1."""
        logits = logits.float()
        rows = logits.new_full((1, 1), len(logits))
        self._seen.append(torch.cat([logits.sum(0, keepdim=True), rows], dim=1))
        return torch.softmax((logits - self.mean) / temperature, dim=1)

    @torch.no_grad()
    def potentials(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Targets:
        """The same, not written out."""
        rows = torch.full((1, 1), len(logits), dtype=torch.float32, device=logits.device)
        self._seen.append(torch.cat([logits.sum(0, keepdim=True, dtype=torch.float32), rows], dim=1))
        return Targets(logits, temperature, self.mean[0] / -temperature)

    @torch.no_grad()
    def update(self) -> None:
        """At the end of a step."""
        if self._seen:
            seen = sum_over_processes(torch.stack(self._seen).sum(0))
            rows = seen[:, -1:]  # none where no patch was masked: the mean stays
            self.mean.lerp_(seen[:, :-1] / rows.clamp(min=1), (rows > 0) * (1 - self.momentum))
            self._seen = []


class SinkhornKnopp(nn.Module):
    """Sinkhorn-Knopp over the micro-batch of all processes; keeps nothing between steps."""

    def __init__(self, iterations: int = 3, columns: Columns = sinkhorn_columns) -> None:
        super().__init__()
        self.iterations = iterations
        self.columns = columns

    def targets(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Float[Tensor, "n prototypes"]:
        """(n, prototypes), rows that sum to 1."""
        return sinkhorn(logits, temperature, self.iterations)

    @torch.no_grad()
    def potentials(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Targets:
        """The same, not written out."""
        return Targets(logits, temperature, self.columns(logits, temperature, self.iterations))

    def update(self) -> None:
        """Nothing to do."""


class Uncentered(nn.Module):
    """The plain softmax: what makes DINO collapse, kept to show it."""

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Float[Tensor, "n prototypes"]:
        """(n, prototypes), rows that sum to 1."""
        return torch.softmax(logits.float() / temperature, dim=1)

    def potentials(self, logits: Float[Tensor, "n prototypes"], temperature: float) -> Targets:
        """The same, not written out."""
        return Targets(logits, temperature)

    def update(self) -> None:
        """Nothing to do."""


Centering = Center | SinkhornKnopp | Uncentered


def make_centering(
    kind: str, prototypes: int, iterations: int = 3, momentum: float = 0.9, columns: Columns = sinkhorn_columns
) -> Centering:
    """kind: sinkhorn, softmax or none. columns: who computes Sinkhorn-Knopp."""
    if kind == "softmax":
        return Center(prototypes, momentum)
    return SinkhornKnopp(iterations, columns) if kind == "sinkhorn" else Uncentered()
