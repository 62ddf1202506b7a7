"""From a stream of samples to the batches of one process: which samples, in which form, made by whom.

The global batch of step s is samples [s B, (s + 1) B) of an endless stream. Process r of w holds a contiguous part of
it, in `accumulate` micro-batches; groups of `group_size` samples never straddle two of them. What is drawn depends on
(seed, sample number) alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curation.errors import UserError
from training.data.config import DataConfig


@dataclass(frozen=True)
class Batch:
    """What one process gets for one micro-step; crop-major: all samples' first crop, then all samples' second."""

    global_crops: Tensor
    """(2 b, 3, H, W) float32, normalised."""
    local_crops: Tensor
    """(local_crops b, 3, h, w) float32, normalised."""
    masks: Tensor
    """(2 b, patches) bool, all False for crops that are not masked."""
    image_ids: Tensor
    """(b,) int64."""
    sample_numbers: Tensor
    """(b,) int64: position in the stream, step * global batch + index in the global batch."""
    replaced: int
    """Broken images that were skipped and replaced in this micro-batch."""


def micro_batch_size(global_batch: int, world_size: int, accumulate: int, group_size: int) -> int:
    """Samples of one micro-batch. Raises UserError where the numbers do not divide."""
    if global_batch % (world_size * accumulate):
        raise UserError(
            f"a global batch of {global_batch} cannot be cut into {world_size} processes x {accumulate} accumulated "
            "micro-batches; choose a multiple"
        )
    size = global_batch // (world_size * accumulate)
    if size % group_size:
        raise UserError(
            f"a micro-batch of {size} ({global_batch} over {world_size} processes x {accumulate} micro-batches) is not a "
            f"multiple of group_size {group_size}; choose another batch, group_size or number of processes"
        )
    return size


def batches(
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    group_size: int,
    patch_size: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    device: Any = "cpu",
) -> Iterator[Batch]:
    """Endless: step after step from `first_step`, `accumulate` micro-batches each. Tensors on `device`."""
    raise NotImplementedError
