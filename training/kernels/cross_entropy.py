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

TILE, SAMPLES_PER_PROGRAM, STAGES = 2048, 8, 3
"""Columns of a program of 4 warps, 32 bytes of bfloat16 per thread; teacher rows that it sees where each has a single
student row; rows under way ahead of the one at hand, without which every sum over the tile would wait for its row. Not
measured on a device yet."""


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
            STAGES=STAGES,
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
            STAGES=STAGES,
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
def _load(pointer, row, stride, column, inside):
    return tl.load(pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _softmax(x, inside):
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
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0) % tiles  # neighbours in memory run at one time
    start = (tl.program_id(0) // tiles * SAMPLES).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < prototypes
    potential = tl.zeros([TILE], tl.float32)
    if HAS_COLUMNS:
        potential = tl.load(columns + column, mask=inside, other=0.0) * LOG2E
    plane = tl.cast(samples, tl.int64) * crops * tiles
    if CROSSED:
        x = _load(teacher, start, teacher_stride, column, inside)
        z = _load(teacher, samples + start, teacher_stride, column, inside)
        first, first_sum = _softmax(x * teacher_scale + potential, inside)
        second, second_sum = _softmax(z * teacher_scale + potential, inside)
        tl.store(of_teacher + start * tiles + tile, first_sum)
        tl.store(of_teacher + (samples + start) * tiles + tile, second_sum)
        for crop in tl.range(0, crops, num_stages=STAGES):
            row = crop * samples + start
            s = _load(student, row, student_stride, column, inside)
            _, total = _softmax(s * student_scale, inside)
            out = of_student + row * tiles + tile
            tl.store(out, total)
            tl.store(out + plane, tl.sum(first * s, axis=0))
            tl.store(out + 2 * plane, tl.sum(second * s, axis=0))
    else:
        for i in tl.range(0, tl.minimum(SAMPLES, samples - start.to(tl.int32)), num_stages=STAGES):
            row = start + i
            x = _load(teacher, row, teacher_stride, column, inside)
            s = _load(student, row, student_stride, column, inside)
            weights, total = _softmax(x * teacher_scale + potential, inside)
            tl.store(of_teacher + row * tiles + tile, total)
            _, total = _softmax(s * student_scale, inside)
            out = of_student + row * tiles + tile
            tl.store(out, total)
            tl.store(out + plane, tl.sum(weights * s, axis=0))


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
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    start = (tl.program_id(0) // tiles * SAMPLES).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < prototypes
    potential = tl.zeros([TILE], tl.float32)
    if HAS_COLUMNS:
        potential = tl.load(columns + column, mask=inside, other=0.0) * LOG2E
    if CROSSED:
        x = _load(teacher, start, teacher_stride, column, inside) * teacher_scale + potential
        z = _load(teacher, samples + start, teacher_stride, column, inside) * teacher_scale + potential
        first = tl.exp2(x - tl.load(teacher_sums + start) * LOG2E)
        second = tl.exp2(z - tl.load(teacher_sums + samples + start) * LOG2E)
        for crop in tl.range(0, crops, num_stages=STAGES):
            row = crop * samples + start
            s = _load(student, row, student_stride, column, inside)
            p = tl.exp2(s * student_scale - tl.load(student_sums + row) * LOG2E)
            from_first, from_second = tl.where(crop == 0, 0.0, 1.0), tl.where(crop == 1, 0.0, 1.0)
            p = (from_first + from_second) * p - (from_first * first + from_second * second)
            p *= tl.load(coefficients + row) * factor
            tl.store(out + row * out_stride + column, p.to(out.dtype.element_ty), mask=inside)
    else:
        for i in tl.range(0, tl.minimum(SAMPLES, samples - start.to(tl.int32)), num_stages=STAGES):
            row = start + i
            x = _load(teacher, row, teacher_stride, column, inside)
            s = _load(student, row, student_stride, column, inside)
            q = tl.exp2(x * teacher_scale + potential - tl.load(teacher_sums + row) * LOG2E)
            p = tl.exp2(s * student_scale - tl.load(student_sums + row) * LOG2E)
            p = (p - q) * (tl.load(coefficients + row) * factor)
            tl.store(out + row * out_stride + column, p.to(out.dtype.element_ty), mask=inside)
