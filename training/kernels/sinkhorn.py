"""Sinkhorn-Knopp without a matrix of its own: the teacher's logits are read twice per iteration and nothing is stored.

The assignment is exp(logit / temperature + u_i + v_j) at every moment, so the potentials u (rows) and v (columns) in
float32 are all there is to keep (log-domain Sinkhorn: Peyré and Cuturi 2019, section 4.4). A column pass is a
log-sum-exp over rows, a row pass one over columns; both leave one number per row or column and tile, which torch
adds up: no atomics, equal inputs give equal bits. The last row pass is not made here: the cross-entropy reads
the same logits and finds u on the way (`training.kernels.cross_entropy`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from training.collectives import sum_over_processes
from training.losses.centering import logsumexp_over_processes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Tiles, not measured on a device yet. A column tile is so wide that 4 warps reading 16 bytes per thread cover it: rows
# then lie within a thread, and nothing crosses threads before the end. A row tile of 2,048 is 32 bytes per thread;
# its sum waits for all of them, so the next rows are under way meanwhile.
COLUMN_TILE, ROWS_AT_ONCE, PROGRAMS = 1024, 8, 1024
ROW_TILE, ROWS_PER_PROGRAM, STAGES = 2048, 8, 3


@torch.no_grad()
def sinkhorn_columns(
    logits: Float[Tensor, "n prototypes"], temperature: float, iterations: int = 3
) -> Float[Tensor, "prototypes"]:
    """Column potentials, float32; rows that sum to 1 follow. logits: any floating type, rows any stride apart.

    Reads the logits 2 x iterations - 1 times: 10 bytes per row x prototype in bfloat16 with 3 iterations, and writes
    less than a hundredth of that. Over the rows of all processes; a process may hold none.
    """
    rows, prototypes = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    count = torch.full((), rows, dtype=torch.float32, device=logits.device)
    log_share = math.log(prototypes) - sum_over_processes(count).log()
    of_row, of_column = None, None
    for iteration in range(iterations):
        parts = column_parts(logits, temperature, of_row)
        of_column = -(logsumexp_over_processes(parts) + log_share)[0]
        if iteration < iterations - 1:
            of_row = -torch.logsumexp(row_parts(logits, temperature, of_column), dim=1)
    assert of_column is not None
    return of_column


def column_parts(
    logits: Float[Tensor, "n prototypes"], temperature: float, of_row: Float[Tensor, "n"] | None
) -> Float[Tensor, "splits prototypes"]:
    """log-sum-exp of logits / temperature + u over stretches of rows."""
    rows, prototypes = logits.shape
    tiles = triton.cdiv(prototypes, COLUMN_TILE)
    length = triton.cdiv(rows, max(1, min(PROGRAMS // tiles, triton.cdiv(rows, 4 * ROWS_AT_ONCE))))
    splits = triton.cdiv(rows, length) if rows else 0
    parts = torch.empty(splits, prototypes, dtype=torch.float32, device=logits.device)
    if rows:
        scale = 1 / (temperature * math.log(2))
        _column_parts[tiles, splits](
            logits,
            logits.stride(0),
            of_row,
            parts,
            rows,
            prototypes,
            length,
            scale,
            HAS_ROWS=of_row is not None,
            ROWS=ROWS_AT_ONCE,
            COLUMNS=min(COLUMN_TILE, triton.next_power_of_2(prototypes)),
            num_warps=4,
        )
    return parts


def row_parts(
    logits: Float[Tensor, "n prototypes"], temperature: float, of_column: Float[Tensor, "prototypes"]
) -> Float[Tensor, "n tiles"]:
    """log-sum-exp of logits / temperature + v over tiles of columns."""
    rows, prototypes = logits.shape
    tile = min(ROW_TILE, triton.next_power_of_2(prototypes))
    tiles = triton.cdiv(prototypes, tile)
    parts = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    if rows:
        scale = 1 / (temperature * math.log(2))
        _row_parts[tiles * triton.cdiv(rows, ROWS_PER_PROGRAM),](
            logits,
            logits.stride(0),
            of_column,
            parts,
            rows,
            prototypes,
            tiles,
            scale,
            ROWS=ROWS_PER_PROGRAM,
            TILE=tile,
            STAGES=STAGES,
            num_warps=4,
        )
    return parts


@triton.jit(do_not_specialize=["rows", "length"])
def _column_parts(
    logits,
    stride,
    of_row,
    parts,
    rows,
    prototypes,
    length,
    scale,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    inside = column < prototypes
    last = tl.minimum((split + 1) * length, rows)
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(split * length, last, ROWS):
        row = first + tl.arange(0, ROWS)
        given = row < last
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(logits + place, mask=given[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale
        if HAS_ROWS:
            x += tl.load(of_row + row, mask=given, other=0.0)[:, None] * LOG2E
        x = tl.where(given[:, None], x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher[None, :]), axis=0)
        highest = higher
    out = parts + split.to(tl.int64) * prototypes + column
    tl.store(out, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _row_parts(
    logits,
    stride,
    of_column,
    parts,
    rows,
    prototypes,
    tiles,
    scale,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0) % tiles  # neighbours in memory run at one time
    block = tl.program_id(0) // tiles
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < prototypes
    potential = tl.load(of_column + column, mask=inside, other=0.0) * LOG2E  # once for all rows of the program
    first = (block * ROWS).to(tl.int64)
    for i in tl.range(0, tl.minimum(ROWS, rows - block * ROWS), num_stages=STAGES):
        row = first + i
        x = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x * scale + potential, float("-inf"))
        highest = tl.max(x, axis=0)
        total = tl.sum(tl.exp2(x - highest), axis=0)
        tl.store(parts + row * tiles + tile, (highest + tl.log2(total)) * LN2)
