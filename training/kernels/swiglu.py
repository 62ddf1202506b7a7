"""The feed-forward's activation and the projection behind it: SwiGLU (Shazeer 2020) and GELU, one pass each way.

The activation's output is the projection's input and would be kept for the gradient of its weights: of a block's stored
numbers a sixth (SwiGLU) or a quarter (GELU). It is computed again instead, in the pass that computes the gradient.

n rows of `width` hidden numbers, e bytes each: SwiGLU moves 3 n width e forward (both halves in, one out) and 6 n width
e backward (both halves and the gradient in; both gradients and the output again out), GELU 2 and 4.
"""

# No `from __future__ import annotations`: torch reads the operators' annotations.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.kernels import swiglu_kernels as kernels

NUMBERS = 2048
"""Of a program, 16 per thread. Not measured on a device yet."""


def swiglu_project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, 2 width) -> (n, d): silu(first half) x second half, times weight (d, width), plus bias."""
    projected: Tensor = Project.apply(hidden, weight, bias, True)
    return projected


def gelu_project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, width) -> (n, d): GELU, times weight (d, width), plus bias."""
    projected: Tensor = Project.apply(hidden, weight, bias, False)
    return projected


class Project(torch.autograd.Function):
    """Keeps what goes into the activation, not what comes out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, gated: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.gated = gated
        return F.linear(activate(hidden, gated), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        dhidden, activated = activate_backward(gradient @ weight, hidden, ctx.gated)
        return dhidden, gradient.T @ activated, gradient.sum(0), None


@torch.library.custom_op("curate::activate", mutates_args=())
def activate(hidden: Tensor, gated: bool) -> Tensor:
    """(n, width). Rows of hidden may lie apart."""
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    n, width = len(hidden), hidden.shape[1] // (1 + gated)
    out = torch.empty(n, width, dtype=hidden.dtype, device=hidden.device)
    if n:
        rows, block = tile(width)
        grid = (-(-n // rows) * -(-width // block),)
        kernels.forward[grid](hidden, out, n, hidden.stride(0), gated, width, rows, block, num_warps=4)
    return out


@activate.register_fake
def _(hidden, gated):  # type: ignore[no-untyped-def]
    return hidden.new_empty(len(hidden), hidden.shape[1] // (1 + gated))


@torch.library.custom_op("curate::activate_backward", mutates_args=())
def activate_backward(gradient: Tensor, hidden: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Gradient of hidden (n, its columns), and the activation again (n, width)."""
    hidden, gradient = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, gradient))
    n, width = gradient.shape
    out = torch.empty(n, width, dtype=hidden.dtype, device=hidden.device)
    dhidden = torch.empty(n, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    if n:
        rows, block = tile(width)
        kernels.backward[(-(-n // rows) * -(-width // block),)](
            gradient, hidden, dhidden, out, n, hidden.stride(0), gradient.stride(0),
            gated, width, rows, block, num_warps=4,
        )  # fmt: skip
    return dhidden, out


@activate_backward.register_fake
def _(gradient, hidden, gated):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), hidden.new_empty(gradient.shape)


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a program."""
    block = min(NUMBERS, 1 << (width - 1).bit_length())
    return NUMBERS // block, block
