"""Processes, devices and what is applied to a network from outside: checkpointing, compile, FSDP2.

One process is the case of a mesh of one: the same code, the same checkpoints.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from curation.errors import UserError

if TYPE_CHECKING:
    from training.config import ParallelConfig
    from training.model import Network


def start() -> torch.device:
    """Join the other processes (torchrun, Ray Train), or begin alone. Returns this process's device."""
    # Our networks return views (logits split by crop size), and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """All processes in one row, or `replicate` rows of shards. Raises UserError where they do not divide."""
    size = dist.get_world_size()
    if size % config.replicate:
        raise UserError(f"parallel.replicate {config.replicate} does not divide {size} processes")
    if config.replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    shape = (config.replicate, size // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def apply(network: Network, config: ParallelConfig, mesh: DeviceMesh, *, trained: bool) -> None:
    """Recompute, compile and shard, in this order, in place. `trained`: whether a backward will follow.

    A network without a backward gives its parameters back after every forward, the root's included: what it keeps
    gathered is a copy, and a moving average written into that would be lost.
    """
    for block in network.backbone.blocks:
        if config.activation_checkpointing and trained:
            block.forward = recomputed(block.forward)
        if config.compile:
            block.compile()
    precision = MixedPrecisionPolicy()
    if config.precision == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    heads = [network.dino_head] if network.ibot_head is None else [network.dino_head, network.ibot_head]
    for module in (*network.backbone.blocks, *heads):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, mp_policy=precision, reshard_after_forward=not trained)


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps its inputs alone and computes the rest again backward.

    A function of ours around the library's: compile skips a frame that is the library's own, and with it the block.
    """

    def run(*inputs: Any) -> Tensor:
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False))

    return run


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without the host waiting for the device: that takes pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
