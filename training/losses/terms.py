"""DINO, iBOT and KoLeo (DINOv2, section 4), with the divisors of the public code. Everything in float32.

b: samples of the micro-batch; crops are crop-major, all samples' first crop, then all samples' second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NEAR = 1e-6
"""KoLeo's epsilon: below this distance two samples do not push each other any harder."""


def cross_entropy(
    logits: Float[Tensor, "*n prototypes"], targets: Float[Tensor, "*n prototypes"], temperature: float
) -> Float[Tensor, "*n"]:
    """Between a target distribution and the softmax of logits / temperature."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


def dino_loss(
    global_logits: Float[Tensor, "b2 prototypes"],
    local_logits: Float[Tensor, "local_b prototypes"],
    targets: Float[Tensor, "b2 prototypes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Every crop of the student predicts every global crop of the teacher but itself; the mean over those terms.

    With two global and eight local crops: 2 x 8 + 2 = 18 terms over 18.
    """
    first, second = targets.chunk(2)
    samples = len(first)
    crossed = cross_entropy(global_logits, torch.cat([second, first]), temperature).sum()
    # The cross-entropy is linear in the targets: both teachers at once.
    locals_ = local_logits.unflatten(0, (len(local_logits) // samples, samples))
    to_both = cross_entropy(locals_, first + second, temperature).sum()
    return (crossed + to_both) / (samples * (2 + 2 * len(locals_)))


def ibot_loss(
    logits: Float[Tensor, "patches prototypes"],
    targets: Float[Tensor, "patches prototypes"],
    weights: Float[Tensor, "patches"],
    crops: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Masked patches predict what the teacher sees there: sum of w_i CE_i over all global crops, masked or not.

    weights: 1 / patches chosen in the same crop.
    """
    return (weights * cross_entropy(logits, targets, temperature)).sum() / crops


def koleo_loss(class_tokens: Float[Tensor, "b2 d"], group_size: int) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko: samples of a group spread out, each away from its nearest neighbour (Sablayrolles 2018).

    Per global crop and per group of `group_size` samples in a row; the sum over the two crops of the mean over samples.
    """
    x = F.normalize(class_tokens.float(), dim=-1, eps=1e-8).unflatten(0, (2, -1, group_size))
    with torch.no_grad():
        similarity = x @ x.transpose(-1, -2)
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)
        nearest = similarity.argmax(-1, keepdim=True)
    to_nearest = x - x.gather(-2, nearest.expand_as(x))
    # ½ log(|·|² + ε²) for log(|·| + ε): the same wherever it matters, and finite with its gradient at duplicates.
    return -(to_nearest.square().sum(-1) + NEAR**2).log().mean((1, 2)).sum() / 2


def chosen_patches(masks: Tensor) -> tuple[Int[Tensor, "patches"], Float[Tensor, "patches"]]:
    """Rows of the chosen patches among those of all crops, and their weights. masks: (2 b, n) bool, on the CPU."""
    weights = 1 / masks.sum(1, keepdim=True).clamp(min=1)
    return masks.flatten().nonzero().flatten(), weights.expand_as(masks)[masks]
