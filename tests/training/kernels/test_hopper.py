"""Kernels that ran in the interpreter also compile for an H100, without spilling registers."""

import re

import torch

from tests.training.kernels.hopper import compile_launches


def test_losses_and_augmentation_compile_for_a_hopper_gpu() -> None:
    found = compile_launches(losses_and_augmentation)
    assert set(found) == {"_column_parts", "_row_parts", "_forward", "_backward", "_colour", "_finish"}
    assert not any(re.search(r"[1-9]\d* bytes spill", told) for told in found.values()), found


def losses_and_augmentation() -> None:
    from training.kernels import augmentation, cross_entropy
    from training.kernels.sinkhorn import sinkhorn_columns
    from training.losses import Targets

    teacher, student = (torch.zeros(rows, 65536, dtype=torch.bfloat16) for rows in (2, 10))
    sinkhorn_columns(teacher, 0.07)
    targets = Targets(teacher, 0.07, torch.zeros(65536))
    for rows, crossed in ((student, True), (student[:2], False)):
        sums = torch.zeros(len(rows)), torch.zeros(2)
        cross_entropy.row_losses(rows, targets, 0.1, crossed=crossed)
        cross_entropy.gradient(rows, targets, 0.1, *sums, torch.ones(len(rows)), rows, crossed=crossed)
    crops = torch.zeros(2, 3, 98, 98, dtype=torch.uint8)
    augmentation.finish(crops, torch.zeros(2, 11), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
