"""The Triton programs of packed attention; `training.kernels.attention` launches them.

After FlashAttention-2 (Dao 2023), with what equal lengths allow: the length is known when a program is compiled, so
keys come in full blocks without masks and one narrower tail (257 = 4 x 64 + 16 wide, not 5 x 64), and a sequence of at
most one block needs neither the online softmax's loop nor, backward, the output. Nothing is added by atomics.

Scores are in base 2: `scale` holds log2(e) / sqrt(channels). A row past the end of its sequence is loaded as zeros,
which adds nothing to a sum over rows; a key past the end is masked.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b):
    """a @ b in float32. The interpreter's own product of bfloat16 is wrong: there the operands are widened."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32x3")  # for float32 alone: three products on the matrix units


@triton.jit
def place(TILES: tl.constexpr, heads):
    """(tile, head, sequence) of this program; tiles of one sequence and head lie beside each other, for the cache."""
    program = tl.program_id(0)
    return program % TILES, (program // TILES) % heads, (program // (TILES * heads)).to(tl.int64)


@triton.jit
def load(
    pointer, rows, stride, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr
):
    """(rows, WIDTH); zeros past LENGTH, where RAGGED says that there may be such rows, and past CHANNELS."""
    columns = tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if RAGGED and CHANNELS < WIDTH:
        return tl.load(pointers, mask=(rows[:, None] < LENGTH) & (columns[None, :] < CHANNELS), other=0.0)
    if RAGGED:
        return tl.load(pointers, mask=rows[:, None] < LENGTH, other=0.0)
    if CHANNELS < WIDTH:
        return tl.load(pointers, mask=columns[None, :] < CHANNELS, other=0.0)
    return tl.load(pointers)


@triton.jit
def store(pointer, rows, stride, x, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    mask = (rows[:, None] < LENGTH) & (columns[None, :] < CHANNELS)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def attend_keys(
    q, k_pointer, v_pointer, keys, stride, scale, highest, total, mixed,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running (maximum, sum, mixture) of an online softmax."""
    k = load(k_pointer, keys, stride, LENGTH, CHANNELS, WIDTH, RAGGED)
    scores = product(q, tl.trans(k)) * scale
    if RAGGED:
        scores = tl.where(keys[None, :] < LENGTH, scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(highest - new)
    v = load(v_pointer, keys, stride, LENGTH, CHANNELS, WIDTH, RAGGED)
    mixed = mixed * shrink[:, None] + product(weights.to(v.dtype), v)
    return new, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def forward(
    qkv, out, lse, first, tokens, heads, stride, stride_part, stride_head, scale,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """QUERIES rows of one sequence and head. Reads q once and k and v once per tile of queries; writes out and lse."""
    tile, head, sequence = place((LENGTH + QUERIES - 1) // QUERIES, heads)
    token = first + sequence * LENGTH
    start = qkv + token * stride + head * stride_head
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    q = load(start, rows, stride, LENGTH, CHANNELS, WIDTH, LENGTH % QUERIES != 0)
    k_pointer, v_pointer = start + stride_part, start + 2 * stride_part
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for block in range(0, LENGTH // KEYS):
        keys = block * KEYS + tl.arange(0, KEYS)
        highest, total, mixed = attend_keys(
            q, k_pointer, v_pointer, keys, stride, scale, highest, total, mixed, LENGTH, CHANNELS, WIDTH, False
        )
    if TAIL > 0:
        keys = LENGTH // KEYS * KEYS + tl.arange(0, TAIL)
        highest, total, mixed = attend_keys(
            q, k_pointer, v_pointer, keys, stride, scale, highest, total, mixed, LENGTH, CHANNELS, WIDTH, True
        )
    start_out = out + (token * heads + head) * CHANNELS
    store(start_out, rows, heads * CHANNELS, mixed / total[:, None], LENGTH, CHANNELS, WIDTH)
    tl.store(lse + head.to(tl.int64) * tokens + token + rows, highest + tl.log2(total), mask=rows < LENGTH)


@triton.jit
def backward_whole(
    qkv, gradient, lse, gradient_qkv, first, tokens, heads, stride, stride_part, stride_head,
    stride_gradient, stride_gradient_head, scale,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence and head at once, LENGTH <= BLOCK. Reads q, k, v and the gradient once, writes dq, dk, dv once.

    The softmax's correction, rowsum(gradient * out), is rowsum(weights * gradient_weights) as well, which is at hand.
    """
    _, head, sequence = place(1, heads)
    token = first + sequence * LENGTH
    start = qkv + token * stride + head * stride_head
    rows = tl.arange(0, BLOCK)
    q = load(start, rows, stride, LENGTH, CHANNELS, WIDTH, LENGTH < BLOCK)
    k = load(start + stride_part, rows, stride, LENGTH, CHANNELS, WIDTH, LENGTH < BLOCK)
    v = load(start + 2 * stride_part, rows, stride, LENGTH, CHANNELS, WIDTH, LENGTH < BLOCK)
    of_head = gradient + token * stride_gradient + head * stride_gradient_head
    do = load(of_head, rows, stride_gradient, LENGTH, CHANNELS, WIDTH, LENGTH < BLOCK)
    logarithm = tl.load(lse + head.to(tl.int64) * tokens + token + rows, mask=rows < LENGTH, other=0.0)

    weights = tl.exp2(product(q, tl.trans(k)) * scale - logarithm[:, None])
    if LENGTH < BLOCK:
        weights = tl.where(rows[None, :] < LENGTH, weights, 0.0)
    gradient_weights = product(do, tl.trans(v))
    correction = tl.sum(weights * gradient_weights, 1)
    scores = (weights * (gradient_weights - correction[:, None])).to(q.dtype)

    row, part = 3 * heads * CHANNELS, heads * CHANNELS
    target = gradient_qkv + token * row + head * CHANNELS
    natural = scale * LN2
    store(target, rows, row, product(scores, k) * natural, LENGTH, CHANNELS, WIDTH)
    store(target + part, rows, row, product(tl.trans(scores), q) * natural, LENGTH, CHANNELS, WIDTH)
    store(target + 2 * part, rows, row, product(tl.trans(weights.to(do.dtype)), do), LENGTH, CHANNELS, WIDTH)


@triton.jit
def queries_of_keys(
    q, do, logarithm, correction, k_pointer, v_pointer, keys, stride, scale, sum_q,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a tile of queries."""
    k = load(k_pointer, keys, stride, LENGTH, CHANNELS, WIDTH, RAGGED)
    v = load(v_pointer, keys, stride, LENGTH, CHANNELS, WIDTH, RAGGED)
    weights = tl.exp2(product(q, tl.trans(k)) * scale - logarithm[:, None])
    if RAGGED:
        weights = tl.where(keys[None, :] < LENGTH, weights, 0.0)
    scores = weights * (product(do, tl.trans(v)) - correction[:, None])
    return sum_q + product(scores.to(k.dtype), k)


@triton.jit
def backward_queries(
    qkv, out, gradient, lse, corrections, gradient_qkv, first, tokens, heads, stride, stride_part, stride_head,
    stride_gradient, stride_gradient_head, scale,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries over all keys; the softmax's corrections on the way, for `backward_keys`."""
    tile, head, sequence = place((LENGTH + QUERIES - 1) // QUERIES, heads)
    token = first + sequence * LENGTH
    start = qkv + token * stride + head * stride_head
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    q = load(start, rows, stride, LENGTH, CHANNELS, WIDTH, LENGTH % QUERIES != 0)
    of_head = gradient + token * stride_gradient + head * stride_gradient_head
    do = load(of_head, rows, stride_gradient, LENGTH, CHANNELS, WIDTH, LENGTH % QUERIES != 0)
    written = out + (token * heads + head) * CHANNELS
    o = load(written, rows, heads * CHANNELS, LENGTH, CHANNELS, WIDTH, LENGTH % QUERIES != 0)
    correction = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    of_row = head.to(tl.int64) * tokens + token + rows
    tl.store(corrections + of_row, correction, mask=rows < LENGTH)
    logarithm = tl.load(lse + of_row, mask=rows < LENGTH, other=0.0)
    k_pointer, v_pointer = start + stride_part, start + 2 * stride_part
    sum_q = tl.zeros([QUERIES, WIDTH], tl.float32)
    for block in range(0, LENGTH // KEYS):
        keys = block * KEYS + tl.arange(0, KEYS)
        sum_q = queries_of_keys(
            q, do, logarithm, correction, k_pointer, v_pointer, keys, stride, scale, sum_q,
            LENGTH, CHANNELS, WIDTH, False,
        )  # fmt: skip
    if TAIL > 0:
        keys = LENGTH // KEYS * KEYS + tl.arange(0, TAIL)
        sum_q = queries_of_keys(
            q, do, logarithm, correction, k_pointer, v_pointer, keys, stride, scale, sum_q,
            LENGTH, CHANNELS, WIDTH, True,
        )  # fmt: skip
    target = gradient_qkv + (token * 3 * heads + head) * CHANNELS
    store(target, rows, 3 * heads * CHANNELS, sum_q * (scale * LN2), LENGTH, CHANNELS, WIDTH)


@triton.jit
def keys_of_queries(
    k, v, q_pointer, gradient, logarithms, corrections, rows, stride, stride_gradient, scale, sum_k, sum_v,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a tile of keys and values; scores lie keys x queries."""
    q = load(q_pointer, rows, stride, LENGTH, CHANNELS, WIDTH, RAGGED)
    do = load(gradient, rows, stride_gradient, LENGTH, CHANNELS, WIDTH, RAGGED)
    if RAGGED:
        logarithm = tl.load(logarithms + rows, mask=rows < LENGTH, other=0.0)
        correction = tl.load(corrections + rows, mask=rows < LENGTH, other=0.0)
    else:
        logarithm = tl.load(logarithms + rows)
        correction = tl.load(corrections + rows)
    weights = tl.exp2(product(k, tl.trans(q)) * scale - logarithm[None, :])
    sum_v += product(weights.to(do.dtype), do)
    scores = weights * (product(v, tl.trans(do)) - correction[None, :])
    return sum_k + product(scores.to(q.dtype), q), sum_v


@triton.jit
def backward_keys(
    qkv, gradient, lse, corrections, gradient_qkv, first, tokens, heads, stride, stride_part, stride_head,
    stride_gradient, stride_gradient_head, scale,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys over all queries."""
    tile, head, sequence = place((LENGTH + KEYS - 1) // KEYS, heads)
    token = first + sequence * LENGTH
    start = qkv + token * stride + head * stride_head
    keys = tile * KEYS + tl.arange(0, KEYS)
    k = load(start + stride_part, keys, stride, LENGTH, CHANNELS, WIDTH, LENGTH % KEYS != 0)
    v = load(start + 2 * stride_part, keys, stride, LENGTH, CHANNELS, WIDTH, LENGTH % KEYS != 0)
    of_head = gradient + token * stride_gradient + head * stride_gradient_head
    logarithms = lse + head.to(tl.int64) * tokens + token
    of_rows = corrections + head.to(tl.int64) * tokens + token
    sum_k = tl.zeros([KEYS, WIDTH], tl.float32)
    sum_v = tl.zeros([KEYS, WIDTH], tl.float32)
    for block in range(0, LENGTH // QUERIES):
        rows = block * QUERIES + tl.arange(0, QUERIES)
        sum_k, sum_v = keys_of_queries(
            k, v, start, of_head, logarithms, of_rows, rows, stride, stride_gradient, scale, sum_k, sum_v,
            LENGTH, CHANNELS, WIDTH, False,
        )  # fmt: skip
    if TAIL > 0:
        rows = LENGTH // QUERIES * QUERIES + tl.arange(0, TAIL)
        sum_k, sum_v = keys_of_queries(
            k, v, start, of_head, logarithms, of_rows, rows, stride, stride_gradient, scale, sum_k, sum_v,
            LENGTH, CHANNELS, WIDTH, True,
        )  # fmt: skip
    row, part = 3 * heads * CHANNELS, heads * CHANNELS
    target = gradient_qkv + token * row + head * CHANNELS
    store(target + part, keys, row, sum_k * (scale * LN2), LENGTH, CHANNELS, WIDTH)
    store(target + 2 * part, keys, row, sum_v, LENGTH, CHANNELS, WIDTH)
