"""The Triton programs of the feed-forward's activations; `training.kernels.swiglu` launches them."""

import triton
import triton.language as tl


@triton.jit
def activation(first, second, GATED: tl.constexpr):
    """(output, its derivative by first, by second): silu(first) x second, or GELU of first (exact, by erf)."""
    if GATED:
        logistic = tl.sigmoid(first)
        silu = first * logistic
        return silu * second, second * logistic * (1 + first - silu), silu
    normal = 0.5 * (1 + tl.erf(first * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * first * first)
    return first * normal, normal + first * density, first


@triton.jit
def place(n, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, which of them are there) of this program: a tile; wide rows are cut into pieces."""
    PIECES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // PIECES).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % PIECES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, columns, (rows < n) & (columns < WIDTH)


@triton.jit
def forward(
    hidden, out, n, stride, GATED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (n, WIDTH) of hidden (n, 2 WIDTH), or (n, WIDTH) without a gate."""
    rows, columns, inside = place(n, WIDTH, ROWS, BLOCK)
    source = hidden + rows * stride + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = first
    if GATED:
        second = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    value, _, _ = activation(first, second, GATED)
    tl.store(out + rows * WIDTH + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    gradient, hidden, gradient_hidden, out, n, stride, stride_gradient,
    GATED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of hidden, and the output again: the projection's weights need it, and it was not kept."""
    rows, columns, inside = place(n, WIDTH, ROWS, BLOCK)
    given = tl.load(gradient + rows * stride_gradient + columns, mask=inside, other=0.0).to(tl.float32)
    source = hidden + rows * stride + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = first
    if GATED:
        second = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    value, by_first, by_second = activation(first, second, GATED)
    tl.store(out + rows * WIDTH + columns, value.to(out.dtype.element_ty), mask=inside)
    parts: tl.constexpr = 2 if GATED else 1
    target = gradient_hidden + rows * (parts * WIDTH) + columns
    tl.store(target, (given * by_first).to(out.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(target + WIDTH, (given * by_second).to(out.dtype.element_ty), mask=inside)
