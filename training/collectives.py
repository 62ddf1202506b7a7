"""Sums and maxima over all processes that also work where there is only one and no process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(x: Tensor) -> Tensor:
    """In place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.SUM)
    return x


def maximum_over_processes(x: Tensor) -> Tensor:
    """In place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
