"""AdamW over groups of parameters that share their factors, as DINOv2 forms them; clipping per module.

The learning rate decays by `layer_decay` per layer downwards and is lower for the patch embedding; biases, norms and
LayerScale are not decayed; the prototypes (`last_layer`) follow a learning rate of their own, zero at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from training.config import OptimizerConfig
    from training.model import Network
    from training.schedules import StepValues

BEFORE_THE_BLOCKS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def factors(name: str, depth: int, config: OptimizerConfig) -> tuple[float, float, bool]:
    """(of the learning rate, of the weight decay, whether it is a last layer) of a parameter of a Network."""
    layer = depth + 1
    if name.startswith("backbone."):
        if any(part in name for part in BEFORE_THE_BLOCKS):
            layer = 0
        elif ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".", maxsplit=1)[0]) + 1
    rate = config.layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        rate *= config.patch_embed_factor
    decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return rate, float(decayed), "last_layer" in name


def make_optimizer(network: Network, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups in order of first appearance, one per distinct factors."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(factors(name, network.backbone.config.depth, config), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": members, "rate_factor": rate, "decay_factor": decay, "last_layer": last}
        for (rate, decay, last), members in groups.items()
    ]
    return torch.optim.AdamW(described, lr=0.0, betas=config.betas, fused=True)


def set_values(optimizer: torch.optim.AdamW, values: StepValues) -> None:
    """The step's learning rates and weight decay, times each group's factors."""
    for group in optimizer.param_groups:
        rate = values.last_layer_learning_rate if group["last_layer"] else values.learning_rate
        group["lr"] = rate * group["rate_factor"]
        group["weight_decay"] = values.weight_decay * group["decay_factor"]


def clip_per_module(network: Network, largest: float | None) -> dict[str, Tensor]:
    """Bound the gradient norm of the backbone and of each head by itself; the norms before, by module."""
    norms = {}
    for name, module in network.named_children():
        gradients = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(gradients, torch.inf if largest is None else largest)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms
