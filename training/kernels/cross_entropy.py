"""Cross-entropy between the teacher's targets and the student's logits, with no target ever stored.

A target is a softmax of logits / temperature + columns (`Targets`), so its row sum, the last row pass of
Sinkhorn-Knopp, comes out of the same reading that the loss needs: sums of exp(t), exp(t) s and exp(s) per tile of
columns. DINO's crops share their teachers' tiles: both teachers' weights are computed once per sample and stay in
registers while all crops of the sample pass (the loss is linear in the targets). Backward reads teacher and student
once more. Per row x prototype in bfloat16: 4 bytes forward, 6 backward; with the column passes 20.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from training.losses.centering import Targets

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

TILE, SAMPLES_PER_PROGRAM = 2048, 8
"""Columns of a program of 4 warps, 32 bytes of bfloat16 per thread; teacher rows that it sees where each has a single
student row. Not measured on a device yet."""


def row_losses(
    student: Float[Tensor, "rows prototypes"], targets: Targets, temperature: float, *, crossed: bool
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "teacher_rows"]]:
    """(cross-entropy of every student row, log-sum-exp of every student row, of every teacher row), float32.

    The kernel of `training.losses.streaming.row_losses`, which says what `crossed` is. Reads teacher and student once.
    """
    samples, crops = shape(student, targets, crossed)
    student, teacher = by_rows(student), by_rows(targets.logits)
    prototypes = student.shape[1]
    tile = min(TILE, triton.next_power_of_2(prototypes))
    tiles = triton.cdiv(prototypes, tile)
    options = {"dtype": torch.float32, "device": student.device}
    of_teacher = torch.empty(len(teacher), tiles, **options)
    of_student = torch.empty(3 if crossed else 2, len(student), tiles, **options)
    per_program = 1 if crossed else SAMPLES_PER_PROGRAM
    if samples:
        _forward[tiles * triton.cdiv(samples, per_program),](
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            targets.columns,
            of_teacher,
            of_student,
            samples,
            crops,
            prototypes,
            tiles,
            1 / (targets.temperature * math.log(2)),
            1 / (temperature * math.log(2)),
            HAS_COLUMNS=targets.columns is not None,
            CROSSED=crossed,
            SAMPLES=per_program,
            TILE=tile,
            num_warps=4,
        )
    # One number per row and tile is left: torch puts the tiles together.
    teacher_sums = torch.logsumexp(of_teacher, dim=1)
    student_sums = torch.logsumexp(of_student[0], dim=1)
    share = torch.exp(of_teacher - teacher_sums[:, None])  # of a teacher row's weight that lies in a tile
    if not crossed:
        losses = student_sums - (share * of_student[1]).sum(1) / temperature
    else:
        expected = (share.view(2, 1, samples, tiles) * of_student[1:].view(2, crops, samples, tiles)).sum(-1)
        weights = teacher_weights(crops, student.device)
        losses = weights.sum(0) * student_sums.view(crops, samples) - (weights * expected).sum(0) / temperature
    return losses.flatten(), student_sums, teacher_sums


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

    `out` may be `student` itself. Reads teacher and student once, writes once.
    """
    samples, crops = shape(student, targets, crossed)
    student, teacher = by_rows(student), by_rows(targets.logits)
    assert out.stride(1) == 1, "the gradient is written in place of rows"
    prototypes = student.shape[1]
    tile = min(TILE, triton.next_power_of_2(prototypes))
    tiles = triton.cdiv(prototypes, tile)
    per_program = 1 if crossed else SAMPLES_PER_PROGRAM
    if samples:
        _backward[tiles * triton.cdiv(samples, per_program),](
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            targets.columns,
            teacher_sums,
            student_sums,
            coefficients,
            out,
            out.stride(0),
            samples,
            crops,
            prototypes,
            tiles,
            1 / (targets.temperature * math.log(2)),
            1 / (temperature * math.log(2)),
            1 / temperature,
            HAS_COLUMNS=targets.columns is not None,
            CROSSED=crossed,
            SAMPLES=per_program,
            TILE=tile,
            num_warps=4,
        )


def shape(student: Tensor, targets: Targets, crossed: bool) -> tuple[int, int]:
    """(samples, crops of each): a sample has two teacher rows where they are crossed, otherwise one."""
    if not crossed:
        assert len(student) == len(targets.logits)
        return len(student), 1
    samples = len(targets.logits) // 2
    return samples, len(student) // samples if samples else 0


def teacher_weights(crops: int, device: Any) -> Float[Tensor, "2 crops 1"]:
    """Which crop learns from which teacher: the first two from the other's, all others from both."""
    weights = torch.ones(2, crops, 1, device=device)
    weights[0, 0] = weights[1, 1] = 0
    return weights


def by_rows(x: Float[Tensor, "n prototypes"]) -> Float[Tensor, "n prototypes"]:
    """With columns one beside the other; rows may lie any stride apart."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _load_logits(pointer, row, stride, column, inside):
    return tl.load(pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weights(x, inside):
    """(weights that sum to 1 over the tile, log-sum-exp) of x in units of ln 2."""
    x = tl.where(inside, x, float("-inf"))
    highest = tl.max(x, axis=0)
    e = tl.exp2(x - highest)
    total = tl.sum(e, axis=0)
    return e / total, (highest + tl.log2(total)) * LN2


@triton.jit(do_not_specialize=["samples", "crops"])
def _forward(
    student,
    student_stride,
    teacher,
    teacher_stride,
    columns,
    of_teacher,
    of_student,
    samples,
    crops,
    prototypes,
    tiles,
    teacher_scale,
    student_scale,
    HAS_COLUMNS: tl.constexpr,
    CROSSED: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0) % tiles  # neighbours in memory run at one time
    block = tl.program_id(0) // tiles
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < prototypes
    potential = tl.zeros([TILE], tl.float32)
    if HAS_COLUMNS:
        potential = tl.load(columns + column, mask=inside, other=0.0) * LOG2E
    plane = tl.cast(samples, tl.int64) * crops * tiles
    start = (block * SAMPLES).to(tl.int64)
    for i in range(0, tl.minimum(SAMPLES, samples - block * SAMPLES)):
        sample = start + i
        x = _load_logits(teacher, sample, teacher_stride, column, inside)
        first, total = _weights(x * teacher_scale + potential, inside)
        tl.store(of_teacher + sample * tiles + tile, total)
        if CROSSED:
            x = _load_logits(teacher, samples + sample, teacher_stride, column, inside)
            second, total = _weights(x * teacher_scale + potential, inside)
            tl.store(of_teacher + (samples + sample) * tiles + tile, total)
        for crop in range(0, crops):
            row = crop * samples + sample
            s = _load_logits(student, row, student_stride, column, inside)
            y = tl.where(inside, s * student_scale, float("-inf"))
            highest = tl.max(y, axis=0)
            out = of_student + row * tiles + tile
            tl.store(out, (highest + tl.log2(tl.sum(tl.exp2(y - highest), axis=0))) * LN2)
            tl.store(out + plane, tl.sum(first * s, axis=0))
            if CROSSED:
                tl.store(out + 2 * plane, tl.sum(second * s, axis=0))


@triton.jit(do_not_specialize=["samples", "crops"])
def _backward(
    student,
    student_stride,
    teacher,
    teacher_stride,
    columns,
    teacher_sums,
    student_sums,
    coefficients,
    out,
    out_stride,
    samples,
    crops,
    prototypes,
    tiles,
    teacher_scale,
    student_scale,
    factor,
    HAS_COLUMNS: tl.constexpr,
    CROSSED: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < prototypes
    potential = tl.zeros([TILE], tl.float32)
    if HAS_COLUMNS:
        potential = tl.load(columns + column, mask=inside, other=0.0) * LOG2E
    start = (block * SAMPLES).to(tl.int64)
    for i in range(0, tl.minimum(SAMPLES, samples - block * SAMPLES)):
        sample = start + i
        x = _load_logits(teacher, sample, teacher_stride, column, inside) * teacher_scale + potential
        first = tl.exp2(x - tl.load(teacher_sums + sample) * LOG2E)
        if CROSSED:
            x = _load_logits(teacher, samples + sample, teacher_stride, column, inside) * teacher_scale + potential
            second = tl.exp2(x - tl.load(teacher_sums + samples + sample) * LOG2E)
        for crop in range(0, crops):
            row = crop * samples + sample
            s = _load_logits(student, row, student_stride, column, inside)
            p = tl.exp2(s * student_scale - tl.load(student_sums + row) * LOG2E)
            if CROSSED:
                from_first = tl.where(crop == 0, 0.0, 1.0)
                from_second = tl.where(crop == 1, 0.0, 1.0)
                p = (from_first + from_second) * p - (from_first * first + from_second * second)
            else:
                p = p - first
            p *= tl.load(coefficients + row) * factor
            place = out + row * out_stride + column
            tl.store(place, p.to(out.dtype.element_ty), mask=inside)
