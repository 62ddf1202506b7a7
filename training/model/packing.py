"""Sequences of several lengths in one matrix of tokens, one behind another, without padding.

Crops of two sizes give 2 b sequences of 257 tokens and 8 b of 50. Linear layers, norms and activations see one
(tokens, width) matrix; attention alone must know where a sequence ends. `attend_per_length` is the reference, and the
CPU's path; a kernel with the same signature may take its place (`VisionTransformer.use_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # annotations alone need it: a machine with nothing but torch runs the model
    from jaxtyping import Float, Int


class Layout(NamedTuple):
    """`counts[i]` sequences of `lengths[i]` tokens each, in that order."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each set of equally long sequences."""
        return tuple(count * length for count, length in zip(self.counts, self.lengths, strict=True))

    def unpack(self, x: Float[Tensor, "tokens ..."]) -> list[Tensor]:
        """One (count, length, ...) view per length."""
        parts = x.split(self.tokens)
        return [part.unflatten(0, shape) for part, shape in zip(parts, zip(*self, strict=True), strict=True)]


class Kept(NamedTuple):
    """The sequences that one residual branch computes in one step; the others pass by it (stochastic depth)."""

    rows: Int[Tensor, "kept"]
    """Their tokens' rows in the packed matrix."""
    layout: Layout
    """Of those rows alone."""
    scales: tuple[float, ...]
    """Per length: sequences / kept sequences, so that the expectation stays."""
    places: Int[Tensor, "sequences"] | None = None
    """Of every sequence, the first of its rows among `rows`, -1 where it is left out: int32, for kernels."""


Attend = Callable[[Tensor, Layout], Tensor]
"""(tokens, 3, heads, channels), layout -> (tokens, heads, channels)"""


def attend_per_length(
    qkv: Float[Tensor, "tokens 3 heads channels"], layout: Layout
) -> Float[Tensor, "tokens heads channels"]:
    """Softmax attention of every sequence with itself: one batched product per length."""
    mixed = []
    for part in layout.unpack(qkv):
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (count, heads, length, channels)
        out = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def add_branch(
    x: Float[Tensor, "tokens width"],
    branch: Callable[[Tensor, Layout], Tensor],
    layout: Layout,
    kept: Kept | None,
) -> Float[Tensor, "tokens width"]:
    """x + branch(x), computed for the kept sequences only and scaled up there (DINOv2, section 5)."""
    if kept is None:
        return x + branch(x, layout)
    part = branch(x.index_select(0, kept.rows), kept.layout)
    if len(set(kept.scales)) == 1:
        return x.index_add(0, kept.rows, part, alpha=kept.scales[0])
    scaled = [piece * scale for piece, scale in zip(part.split(kept.layout.tokens), kept.scales, strict=True)]
    return x.index_add(0, kept.rows, torch.cat(scaled))
