"""The Triton programs between two residual branches; `training.kernels.branch` launches them.

A launch covers the sequences of one length. Which of them a branch keeps is told per sequence: `places` has the first
row of each in the matrix of kept tokens, -1 where it is left out. Rows of a dropped sequence are neither loaded from
the branch nor stored to it. A row belongs to one program, so nothing is added by atomics.
"""

import triton
import triton.language as tl


@triton.jit
def rows_kept(places, rows, inside, first, first_sequence, length, GATHERED: tl.constexpr):
    """(row in the branch's matrix, whether it has one) of rows counted from `first`."""
    if GATHERED:
        sequence = rows // length
        begin = tl.load(places + first_sequence + sequence, mask=inside, other=-1).to(tl.int64)
        return begin + (rows - sequence * length), begin >= 0
    return first + rows.to(tl.int64), inside


@triton.jit
def statistics(x, columns, eps, WIDTH: tl.constexpr):
    """(normalised, 1 / deviation) of the rows of x, float32; zeros past WIDTH."""
    centred = tl.where(columns[None, :] < WIDTH, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    shrink = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * shrink[:, None], shrink


@triton.jit
def forward(
    x, part, places, weight, bias, next_places, out, normed,
    first, first_sequence, total, length, scale, eps,
    ADD: tl.constexpr, GATHERED: tl.constexpr, NORM: tl.constexpr, NEXT_GATHERED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = x + scale x scattered part (ADD); normed = gathered LayerNorm of that (NORM). One pass over all."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < total
    columns = tl.arange(0, BLOCK)
    within = columns[None, :] < WIDTH
    offsets = (first + rows.to(tl.int64))[:, None] * WIDTH + columns[None, :]
    if NORM:
        next_row, next_kept = rows_kept(next_places, rows, inside, first, first_sequence, length, NEXT_GATHERED)
    if ADD:
        values = tl.load(x + offsets, mask=inside[:, None] & within, other=0.0)
        row, kept = rows_kept(places, rows, inside, first, first_sequence, length, GATHERED)
        added = tl.load(part + row[:, None] * WIDTH + columns[None, :], mask=kept[:, None] & within, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32) * scale).to(out.dtype.element_ty)
        tl.store(out + offsets, values, mask=inside[:, None] & within)
    else:
        values = tl.load(x + offsets, mask=next_kept[:, None] & within, other=0.0)
    if NORM:
        unit, _ = statistics(values.to(tl.float32), columns, eps, WIDTH)
        factor = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        found = (unit * factor[None, :] + shift[None, :]).to(normed.dtype.element_ty)
        tl.store(normed + next_row[:, None] * WIDTH + columns[None, :], found, mask=next_kept[:, None] & within)


@triton.jit
def backward(
    gradient, gradient_normed, x, places, weight, next_places, gradient_x, gradient_part, sums,
    first, first_sequence, total, length, scale, eps,
    ADD: tl.constexpr, GATHERED: tl.constexpr, NEXT_GATHERED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PROGRAMS,
):  # fmt: skip
    """gradient_x = gradient + scattered LayerNorm's backward; gradient_part = its kept rows x scale (ADD).

    x is what was normalised: mean and deviation are computed again from the row at hand instead of being stored. Each
    of PROGRAMS goes through its rows and leaves its sums for LayerNorm's weight and bias in sums[2, PROGRAMS, WIDTH].
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    within = columns[None, :] < WIDTH
    factor = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(program, tl.cdiv(total, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = rows < total
        offsets = (first + rows.to(tl.int64))[:, None] * WIDTH + columns[None, :]
        next_row, next_kept = rows_kept(next_places, rows, inside, first, first_sequence, length, NEXT_GATHERED)
        mask = next_kept[:, None] & within
        passed = tl.load(gradient + offsets, mask=inside[:, None] & within, other=0.0).to(tl.float32)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(gradient_normed + next_row[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        normed = normed.to(tl.float32)
        unit, shrink = statistics(values, columns, eps, WIDTH)
        of_weight += normed * unit
        of_bias += normed
        scaled = normed * factor[None, :]
        along = tl.sum(scaled * unit, 1) / WIDTH
        mean = tl.sum(scaled, 1) / WIDTH
        passed += (scaled - unit * along[:, None] - mean[:, None]) * shrink[:, None]
        tl.store(gradient_x + offsets, passed.to(gradient_x.dtype.element_ty), mask=inside[:, None] & within)
        if ADD:
            row, kept = rows_kept(places, rows, inside, first, first_sequence, length, GATHERED)
            gathered = (passed * scale).to(gradient_part.dtype.element_ty)
            tl.store(gradient_part + row[:, None] * WIDTH + columns[None, :], gathered, mask=kept[:, None] & within)
    tl.store(sums + program * WIDTH + columns, tl.sum(of_weight, 0), mask=columns < WIDTH)
    tl.store(sums + (PROGRAMS + program) * WIDTH + columns, tl.sum(of_bias, 0), mask=columns < WIDTH)


@triton.jit
def gather(
    gradient, places, gradient_part, first, first_sequence, total, length, scale,
    GATHERED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """gradient_part = the kept rows of gradient x scale: what is left of `backward` where no norm follows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row, kept = rows_kept(places, rows, rows < total, first, first_sequence, length, GATHERED)
    mask = kept[:, None] & (columns[None, :] < WIDTH)
    offsets = (first + rows.to(tl.int64))[:, None] * WIDTH + columns[None, :]
    values = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    target = gradient_part + row[:, None] * WIDTH + columns[None, :]
    tl.store(target, values.to(gradient_part.dtype.element_ty), mask=mask)
