"""Attention of many short sequences in one matrix of tokens: overrides of `training.model.attend_per_length`.

`attend_triton` is ours, one launch per length; `attend_varlen` hands the same packed tensors to torch's `varlen_attn`
(CUDA only). Both read q, k and v where the projection left them and write tokens in order: neither pads nor copies.

Bytes of one layer with n tokens of `width` channels, e bytes each. Forward: 4 n width e (q, k, v in, mixture out) and
4 n heads of log-sum-exp. Backward: 7 n width e for sequences of one block (q, k, v, gradient in; dq, dk, dv out); for
longer ones q, k, v and the gradient twice, the output once, 12 n width e, with the second reading mostly from cache.
"""

# No `from __future__ import annotations`: torch reads the operators' annotations.
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.kernels import attention_kernels as kernels
from training.model import Layout


class Tiles(NamedTuple):
    """How a length is cut, for one kernel. Not measured on a device yet."""

    own: int
    """Rows that a program answers for."""
    others: int
    """Rows per block that it goes through."""
    warps: int
    stages: int

    def tail(self, length: int) -> int:
        """Width of the last, partial block; 0 where there is none."""
        rest = length % self.others
        return 0 if rest == 0 else power_of_two(rest)


WHOLE = 64
"""Up to this length one program computes all gradients of a sequence and head: five 64 x 64 products, bound by bytes
(25 operations per byte at 50 tokens, where an H100 has some 260 per byte)."""


def power_of_two(n: int) -> int:
    """The next one, and at least 16: what a matrix product needs."""
    return max(16, 1 << (n - 1).bit_length())


def tiles(kernel: str, length: int, channels: int, bytes_per_number: int) -> Tiles:
    """Of `forward`, `backward_queries` or `backward_keys`, by length alone, so that equal runs give equal bits."""
    if length <= WHOLE:
        return Tiles(power_of_two(length), 64, 4, 1)
    wide = channels > 64 or bytes_per_number > 2
    # dk and dv take most registers: with blocks of 32 three programs fit a multiprocessor, with 64 two (at 257 tokens).
    others = 32 if wide or kernel == "backward_keys" else 64
    if length <= 512 or wide:
        # 257 = 4 x 64 + 1: tiles of 128 would compute 384 rows, tiles of 64 compute 320.
        return Tiles(64, others, 4, 1 if wide else 2)
    return Tiles(128, others, 8, 2)


def attend_triton(qkv: Tensor, layout: Layout) -> Tensor:
    """Softmax attention of every sequence with itself.

    qkv: (tokens, 3, heads, channels), any strides with adjacent channels; channels up to 128. Returns (tokens, heads,
    channels). Float16, bfloat16 or float32; sums in float32.
    """
    mixed: Tensor = forward(qkv, list(layout.counts), list(layout.lengths))[0]
    return mixed


@torch.library.custom_op("curate::attention", mutates_args=())
def forward(qkv: Tensor, counts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(tokens, heads, channels), and the log-sum-exp of the scores in base 2: (heads, tokens) float32."""
    tokens, _, heads, channels = qkv.shape
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    out = torch.empty(tokens, heads, channels, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    first = 0
    for count, length in zip(counts, lengths, strict=True):
        cut = tiles("forward", length, channels, qkv.element_size())
        if count:
            kernels.forward[(count * heads * -(-length // cut.own),)](
                qkv, out, lse, first, tokens, heads, *qkv.stride()[:3], scale_of(channels),
                length, channels, power_of_two(channels), cut.own, cut.others, cut.tail(length),
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
        first += count * length
    return out, lse


@forward.register_fake
def _(qkv: Tensor, counts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens, _, heads, channels = qkv.shape
    return qkv.new_empty(tokens, heads, channels), qkv.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("curate::attention_backward", mutates_args=())
def backward(gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """(tokens, 3, heads, channels), laid out as the projection's output is."""
    tokens, _, heads, channels = qkv.shape
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    result = torch.empty(tokens, 3, heads, channels, dtype=qkv.dtype, device=qkv.device)
    corrections = torch.empty_like(lse) if max(lengths, default=0) > WHOLE else lse
    width, first = power_of_two(channels), 0
    for count, length in zip(counts, lengths, strict=True):
        place = (first, tokens, heads, *qkv.stride()[:3], *gradient.stride()[:2], scale_of(channels), length, channels)
        first += count * length
        if count == 0:
            continue
        if length <= WHOLE:
            cut = tiles("backward_whole", length, channels, qkv.element_size())
            kernels.backward_whole[(count * heads,)](
                qkv, gradient, lse, result, *place, width, cut.own, num_warps=cut.warps, num_stages=cut.stages
            )
            continue
        for name, tensors in (
            ("backward_queries", (qkv, out, gradient, lse, corrections, result)),
            ("backward_keys", (qkv, gradient, lse, corrections, result)),
        ):
            cut = tiles(name, length, channels, qkv.element_size())
            getattr(kernels, name)[(count * heads * -(-length // cut.own),)](
                *tensors, *place, width, cut.own, cut.others, cut.tail(length),
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
    return result


@backward.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.counts, ctx.lengths = inputs
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return backward(gradient, *ctx.saved_tensors, ctx.counts, ctx.lengths), None, None


forward.register_autograd(_backward, setup_context=_keep)


def scale_of(channels: int) -> float:
    """1 / sqrt(channels), for scores in base 2."""
    return math.log2(math.e) / math.sqrt(channels)


def attend_varlen(qkv: Tensor, layout: Layout) -> Tensor:
    """The same through torch's `varlen_attn` (FlashAttention, or cuDNN): CUDA, float16 or bfloat16.

    Its backward's gradients of q, k and v are three tensors, which are stacked: one copy more than ours.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    ends, longest = boundaries(layout, qkv.device), max(layout.lengths)
    mixed: Tensor = varlen_attn(q, k, v, ends, ends, longest, longest)
    return mixed


_boundaries: dict[tuple[Layout, torch.device], Tensor] = {}


def boundaries(layout: Layout, device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each begins; computed on the device, so that nothing waits for a copy."""
    if torch.compiler.is_compiling():
        return _computed(layout, device)
    if (layout, device) not in _boundaries:
        with torch.inference_mode(False):  # an evaluation may be the first to ask, and a training wants to keep them
            _boundaries[layout, device] = _computed(layout, device)
    return _boundaries[layout, device]


def _computed(layout: Layout, device: torch.device) -> Tensor:
    parts, first = [], 0
    for count, length in zip(layout.counts, layout.lengths, strict=True):
        parts.append(torch.arange(count, dtype=torch.int32, device=device) * length + first)
        first += count * length
    return torch.cat([*parts, torch.full((1,), first, dtype=torch.int32, device=device)])
