"""A transformer block between whose matrix products each row is read and written once: `compute_triton`.

The reference (`training.model.compute_block`) gathers the kept sequences' rows, normalises, scales and adds them in
passes of their own. Here what lies between two branches is one pass: x' = x + scale x scatter(part), y =
LayerNorm(gather(x')). LayerScale costs no pass at all: it is folded into the weights of the branch's last projection
(gamma x W, gamma x b), which are smaller than the tokens, and the branch's output need not be kept for gamma's
gradient: it follows from W's.

With n tokens of `width` channels, e bytes each, a share p of them kept, in units of n width e: from branch to branch 2
+ 2 p forward (x, part in; x', y out) and 2 + 3 p backward (gradients of x' and y and the rows of x' in; gradients of x
and part out); before the first branch 2 p and 2 + 2 p, after the last 2 + p and 2 p. Counted in the reference: 2 + 13 p
forward and 4 + 18 p backward per branch.
"""

# No `from __future__ import annotations`: torch reads the operators' annotations.
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.kernels import branch_kernels as kernels
from training.kernels.swiglu import gelu_project, swiglu_project
from training.model import Block, Kept, Layout
from training.model.vision_transformer import SwiGLU

PROGRAMS = 264
"""That share the rows backward at most, two per multiprocessor of an H100: as many partial sums for LayerNorm's
weights. Decided by the number of rows alone, so that the order of summation is. Not measured on a device yet."""


class Place(NamedTuple):
    """Where the tokens of a branch come from and go to."""

    places: Tensor | None
    """(sequences,) int32: first row of each in the branch's matrix, -1: dropped; None: all are kept, in order."""
    scales: list[float]
    tokens: int
    layout: Layout


def compute_triton(
    block: Block,
    x: Tensor,
    layout: Layout,
    kept_attention: Kept | None = None,
    kept_feed_forward: Kept | None = None,
) -> Tensor:
    """(tokens, width) -> (tokens, width): what `compute_block` does, up to rounding. Float16, bfloat16 or float32."""
    counts, lengths = list(layout.counts), list(layout.lengths)
    attention, feed_forward = place_of(kept_attention, layout), place_of(kept_feed_forward, layout)

    x, y = Begin.apply(x.contiguous(), *of_norm(block.norm1), attention.places, attention.tokens, counts, lengths)
    qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).unflatten(-1, (3, block.attn.heads, -1))
    part = F.linear(block.attn.attend(qkv, attention.layout).flatten(1), *folded(block.attn.proj, block.ls1))
    x, y = Join.apply(
        x, part, attention.places, attention.scales, *of_norm(block.norm2), feed_forward.places, feed_forward.tokens,
        counts, lengths,
    )  # fmt: skip
    if isinstance(block.mlp, SwiGLU):
        hidden = F.linear(y, block.mlp.w12.weight, block.mlp.w12.bias)
        part = swiglu_project(hidden, *folded(block.mlp.w3, block.ls2))
    else:
        hidden = F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)
        part = gelu_project(hidden, *folded(block.mlp.fc2, block.ls2))
    moved: Tensor = End.apply(x, part, feed_forward.places, feed_forward.scales, counts, lengths)
    return moved


def place_of(kept: Kept | None, layout: Layout) -> Place:
    """Of what a branch keeps."""
    if kept is not None and kept.places is None:
        raise ValueError("kept sequences without their places")
    if kept is None:
        return Place(None, [1.0] * len(layout.counts), sum(layout.tokens), layout)
    return Place(kept.places, list(kept.scales), sum(kept.layout.tokens), kept.layout)


def of_norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def folded(projection: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection and the LayerScale behind it."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return projection.weight, projection.bias
    return projection.weight * gamma.unsqueeze(1), projection.bias * gamma


class Begin(torch.autograd.Function):
    """x, LayerNorm(gather(x)). x is passed on, so that its gradient comes back to be added to in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        places: Tensor | None,
        tokens: int,
        counts: list[int],
        lengths: list[int],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, places)
        ctx.eps, ctx.layout = eps, (counts, lengths)
        return x, begin(x, weight, bias, eps, places, tokens, counts, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, gradient_normed: Tensor) -> tuple[Any, ...]:
        x, weight, places = ctx.saved_tensors
        found = begin_backward(
            gradient.contiguous(), gradient_normed.contiguous(), x, weight, ctx.eps, places, *ctx.layout
        )
        return *found, None, None, None, None, None


class Join(torch.autograd.Function):
    """x' = x + scale x scatter(part), LayerNorm(gather(x')): the end of one branch and the beginning of the next."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        part: Tensor,
        places: Tensor | None,
        scales: list[float],
        weight: Tensor,
        bias: Tensor,
        eps: float,
        next_places: Tensor | None,
        tokens: int,
        counts: list[int],
        lengths: list[int],
    ) -> tuple[Tensor, Tensor]:
        moved, normed = join(
            x, part.contiguous(), places, scales, weight, bias, eps, next_places, tokens, counts, lengths
        )
        ctx.save_for_backward(moved, weight, places, next_places)
        ctx.scales, ctx.eps, ctx.tokens, ctx.layout = scales, eps, len(part), (counts, lengths)
        return moved, normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, gradient_normed: Tensor) -> tuple[Any, ...]:
        moved, weight, places, next_places = ctx.saved_tensors
        dx, dpart, dweight, dbias = join_backward(
            gradient.contiguous(), gradient_normed.contiguous(), moved, places, ctx.scales, ctx.tokens, weight, ctx.eps,
            next_places, *ctx.layout,
        )  # fmt: skip
        return dx, dpart, None, None, dweight, dbias, None, None, None, None, None


class End(torch.autograd.Function):
    """x + scale x scatter(part)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        part: Tensor,
        places: Tensor | None,
        scales: list[float],
        counts: list[int],
        lengths: list[int],
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.scales, ctx.tokens, ctx.layout = scales, len(part), (counts, lengths)
        moved: Tensor = end(x, part.contiguous(), places, scales, counts, lengths)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        dpart = gather(gradient.contiguous(), places, ctx.scales, ctx.tokens, *ctx.layout)
        return gradient, dpart, None, None, None, None


def rows_and_block(width: int) -> tuple[int, int]:
    """Rows of a program's tile and its width: about 4,096 numbers, 32 per thread forward and 16 backward."""
    block = max(16, 1 << (width - 1).bit_length())
    return max(1, min(16, 4096 // block)), block


def launches(counts: list[int], lengths: list[int]) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(which length, (first row, first sequence, rows, length)) of every length that has sequences."""
    found, first, sequence = [], 0, 0
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count:
            found.append((i, (first, sequence, count * length, length)))
        first, sequence = first + count * length, sequence + count
    return found


@torch.library.custom_op("curate::branch_begin", mutates_args=())
def begin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    places: Tensor | None,
    tokens: int,
    counts: list[int],
    lengths: list[int],
) -> Tensor:
    """(tokens, width): LayerNorm of the kept rows of x."""
    normed = torch.empty(tokens, x.shape[1], dtype=x.dtype, device=x.device)
    rows, block = rows_and_block(x.shape[1])
    for _, place in launches(counts, lengths):
        kernels.forward[(-(-place[2] // rows),)](
            x, None, None, weight, bias, places, None, normed, *place, 1.0, eps,
            False, False, True, places is not None, x.shape[1], block, rows, num_warps=4,
        )  # fmt: skip
    return normed


@begin.register_fake
def _(x, weight, bias, eps, places, tokens, counts, lengths):  # type: ignore[no-untyped-def]
    return x.new_empty(tokens, x.shape[1])


@torch.library.custom_op("curate::branch_join", mutates_args=())
def join(
    x: Tensor,
    part: Tensor,
    places: Tensor | None,
    scales: list[float],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    next_places: Tensor | None,
    tokens: int,
    counts: list[int],
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """x', (tokens, width) normalised."""
    moved, normed = torch.empty_like(x), torch.empty(tokens, x.shape[1], dtype=x.dtype, device=x.device)
    rows, block = rows_and_block(x.shape[1])
    for i, place in launches(counts, lengths):
        kernels.forward[(-(-place[2] // rows),)](
            x, part, places, weight, bias, next_places, moved, normed, *place, scales[i], eps,
            True, places is not None, True, next_places is not None, x.shape[1], block, rows, num_warps=4,
        )  # fmt: skip
    return moved, normed


@join.register_fake
def _(x, part, places, scales, weight, bias, eps, next_places, tokens, counts, lengths):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(tokens, x.shape[1])


@torch.library.custom_op("curate::branch_end", mutates_args=())
def end(
    x: Tensor, part: Tensor, places: Tensor | None, scales: list[float], counts: list[int], lengths: list[int]
) -> Tensor:
    """x'."""
    moved = torch.empty_like(x)
    rows, block = rows_and_block(x.shape[1])
    for i, place in launches(counts, lengths):
        kernels.forward[(-(-place[2] // rows),)](
            x, part, places, None, None, None, moved, None, *place, scales[i], 0.0,
            True, places is not None, False, False, x.shape[1], block, rows, num_warps=4,
        )  # fmt: skip
    return moved


@end.register_fake
def _(x, part, places, scales, counts, lengths):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("curate::branch_begin_backward", mutates_args=())
def begin_backward(
    gradient: Tensor,
    gradient_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    places: Tensor | None,
    counts: list[int],
    lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    dx, _, dweight, dbias = _backward(
        gradient, gradient_normed, x, None, [1.0] * len(counts), None, weight, eps, places, counts, lengths
    )
    return dx, dweight, dbias


@begin_backward.register_fake
def _(gradient, gradient_normed, x, weight, eps, places, counts, lengths):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("curate::branch_join_backward", mutates_args=())
def join_backward(
    gradient: Tensor,
    gradient_normed: Tensor,
    moved: Tensor,
    places: Tensor | None,
    scales: list[float],
    tokens: int,
    weight: Tensor,
    eps: float,
    next_places: Tensor | None,
    counts: list[int],
    lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, part, weight, bias."""
    dpart = torch.empty(tokens, moved.shape[1], dtype=moved.dtype, device=moved.device)
    return _backward(gradient, gradient_normed, moved, places, scales, dpart, weight, eps, next_places, counts, lengths)


@join_backward.register_fake
def _(gradient, gradient_normed, moved, places, scales, tokens, weight, eps, next_places, counts, lengths):  # type: ignore[no-untyped-def]
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    return torch.empty_like(moved), moved.new_empty(tokens, moved.shape[1]), dweight, dbias


def _backward(
    gradient: Tensor,
    gradient_normed: Tensor,
    x: Tensor,
    places: Tensor | None,
    scales: list[float],
    dpart: Any,
    weight: Tensor,
    eps: float,
    next_places: Tensor | None,
    counts: list[int],
    lengths: list[int],
) -> tuple[Tensor, Any, Tensor, Tensor]:
    width, (rows, block), parts = x.shape[1], rows_and_block(x.shape[1]), launches(counts, lengths)
    dx = torch.empty_like(x)
    programs = min(PROGRAMS, max((-(-total // rows) for _, (_, _, total, _) in parts), default=1))
    sums = torch.empty(len(parts), 2, programs, width, dtype=torch.float32, device=x.device)
    for (i, place), own in zip(parts, sums, strict=True):
        kernels.backward[(programs,)](
            gradient, gradient_normed, x, places, weight, next_places, dx, dpart, own, *place, scales[i], eps,
            dpart is not None, places is not None, next_places is not None, width, block, rows, programs, num_warps=8,
        )  # fmt: skip
    dweight, dbias = sums.sum((0, 2)).to(weight.dtype).unbind(0)
    return dx, dpart, dweight.clone(), dbias.clone()


@torch.library.custom_op("curate::branch_gather", mutates_args=())
def gather(
    gradient: Tensor,
    places: Tensor | None,
    scales: list[float],
    tokens: int,
    counts: list[int],
    lengths: list[int],
) -> Tensor:
    """(tokens, width): the kept rows, scaled."""
    dpart = torch.empty(tokens, gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    rows, block = rows_and_block(gradient.shape[1])
    for i, place in launches(counts, lengths):
        kernels.gather[(-(-place[2] // rows),)](
            gradient, places, dpart, *place, scales[i], places is not None, gradient.shape[1], block, rows, num_warps=4
        )
    return dpart


@gather.register_fake
def _(gradient, places, scales, tokens, counts, lengths):  # type: ignore[no-untyped-def]
    return gradient.new_empty(tokens, gradient.shape[1])
