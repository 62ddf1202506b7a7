"""Which attention and which blocks a training computes with: timed on its first start on a GPU, then kept.

Kernels differ in rounding, so a choice holds for the whole training: it is stored in the checkpoints and taken from
there. On a CPU nothing is timed and the references are taken. Process 0 decides for all.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from curation.errors import UserError
from training.collectives import rank, world_size
from training.kernels import INTERPRET, require_triton
from training.model import Attend, Block, Compute, Kept, Layout, Network, VisionTransformerConfig
from training.model import attend_per_length as sdpa
from training.model import compute_block as reference
from training.stochastic_depth import choose_kept

if TYPE_CHECKING:
    from training.config import KernelConfig, TrainConfig

REPEATS, WARM = 10, 3


@dataclass(frozen=True)
class Chosen:
    """Names, and what was timed for them."""

    attention: str = "sdpa"
    branches: str = "reference"
    timings: dict[str, dict[str, float | str]] = field(default_factory=dict)
    """Per option and candidate the seconds of one block forward and backward, or why it was left out."""

    def names(self) -> dict[str, str]:
        """What a checkpoint stores."""
        return {"attention": self.attention, "branches": self.branches}


class Shape(NamedTuple):
    """One block of a student in one pass."""

    backbone: VisionTransformerConfig
    layout: Layout
    kept: tuple[Kept, Kept] | None


def choose(config: TrainConfig, device: torch.device, stored: dict[str, str]) -> Chosen:
    """As told; where `auto` is told, `stored` (of the checkpoint that is gone on from) or the fastest here.

    Raises UserError for a kernel that cannot run here.
    """
    told, found = config.kernels, dict(stored)
    refuse_what_cannot_run(told, device, config.parallel.precision)
    timings: dict[str, dict[str, float | str]] = {}
    for option, default in (("attention", "sdpa"), ("branches", "reference")):
        asked = getattr(told, option)
        if asked != "auto":
            found[option] = asked
        elif not on_gpu(device):
            found[option] = default
        elif option not in found:
            sent: list[Any] = [None]
            if rank() == 0:
                try:
                    sent = [timed_here(option, found, config, device)]
                except Exception as error:  # the others wait for what is found: they shall hear of it too
                    sent = [error]
            if world_size() > 1:
                dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
            if isinstance(sent[0], Exception):
                raise sent[0]
            found[option], timings[option] = sent[0]
    return Chosen(found["attention"], found["branches"], timings)


def timed_here(
    option: str, found: dict[str, str], config: TrainConfig, device: torch.device
) -> tuple[str, dict[str, float | str]]:
    """The fastest of an option's candidates, and what each took."""
    kind = torch.bfloat16 if config.parallel.precision == "bfloat16" else torch.float32
    shapes = shapes_of(config, device)
    if option == "attention":
        candidates = attention_candidates(shapes, kind, device)
    else:
        attend = attention(found["attention"])
        candidates = block_candidates(shapes, attend, kind, device, config.parallel.compile)
    fastest_here = fastest(candidates, device)
    torch.cuda.empty_cache()
    if config.parallel.compile:
        torch._dynamo.reset()  # it compiles a block for so many cases and no more: these are not wanted again
    return fastest_here


def on_gpu(device: torch.device) -> bool:
    """Elsewhere nothing is timed."""
    return device.type != "cpu"


def refuse_what_cannot_run(config: KernelConfig, device: torch.device, precision: str) -> None:
    """Raises UserError."""
    for option, value in (("attention", config.attention), ("branches", config.branches)):
        name = f"kernels.{option}: {value}"
        if value == "triton":
            require_triton(name)
        if value in ("triton", "varlen") and device.type == "cpu" and not (value == "triton" and INTERPRET):
            raise UserError(f"{name} needs a GPU; set kernels.{option}: auto")
        if value == "varlen" and precision == "float32":
            raise UserError(
                f"{name} computes in half precision; set parallel.precision: bfloat16, or another attention"
            )


def attention(name: str) -> Attend:
    """By the name that the configuration has for it."""
    if name == "sdpa":
        return sdpa
    from training.kernels import attention as module

    return {"varlen": module.attend_varlen, "triton": module.attend_triton}[name]


def blocks(name: str) -> Compute:
    """By the name that the configuration has for them."""
    if name == "reference":
        return reference
    from training.kernels.branch import compute_triton

    return compute_triton


def use(chosen: Chosen, networks: Sequence[Network]) -> None:
    """From now on, in all of them; before the first pass of a compiled one."""
    for network in networks:
        network.backbone.use_attention(attention(chosen.attention))
        network.backbone.use_blocks(blocks(chosen.branches))


def shapes_of(config: TrainConfig, device: torch.device) -> list[Shape]:
    """Of every student's pass over a micro-batch of one process."""
    samples = config.batch_size // (world_size() * config.accumulate)
    students = [config.model] if config.distill is None else list(config.distill.students.values())
    shapes = []
    for model in students:
        backbone, sides = model.backbone(), (config.data.global_size, config.data.local_size)
        lengths = tuple(1 + backbone.registers + (side // backbone.patch_size) ** 2 for side in sides)
        layout = Layout((2 * samples, config.data.local_crops * samples), lengths)
        kept = choose_kept(
            layout,
            range(max(samples // config.group_size, 1)),
            group_size=min(config.group_size, samples),
            rate=model.drop_path if config.distill is None else 0.0,
            depth=1,
            seed=config.seed,
            device=device,
        )
        shapes.append(Shape(backbone, layout, None if kept is None else kept[0]))
    return shapes


def attention_candidates(
    shapes: Sequence[Shape], kind: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    """One layer's attention of every student, forward and backward, on random numbers."""
    random = torch.Generator(device).manual_seed(0)
    inputs = []
    for backbone, layout, kept in shapes:
        own = layout if kept is None else kept[0].layout
        shape = (sum(own.tokens), 3, backbone.heads, backbone.width // backbone.heads)
        qkv = torch.randn(shape, generator=random, device=device, dtype=kind).requires_grad_()
        inputs.append((qkv, own, torch.randn_like(qkv[:, 0])))

    def run(name: str) -> None:
        for qkv, layout, gradient in inputs:
            torch.autograd.grad(attention(name)(qkv, layout), qkv, gradient)

    names = ("sdpa", "triton") if kind == torch.float32 else ("sdpa", "varlen", "triton")
    return {name: lambda name=name: run(name) for name in names}  # type: ignore[misc]


def block_candidates(
    shapes: Sequence[Shape], attend: Attend, kind: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Callable[[], None]]:
    """One block of every student, forward and backward, on random numbers; compiled where the training is."""
    random = torch.Generator(device).manual_seed(0)
    prepared: dict[str, list[tuple[nn.Module, Any]]] = {}
    for backbone, layout, kept in shapes:
        x = torch.randn(sum(layout.tokens), backbone.width, generator=random, device=device, dtype=kind)
        for name in ("reference", "triton"):
            block = Block(backbone).to(device, kind)
            block.attn.attend, block.compute = attend, None
            if compiled:
                block.compile()
            prepared.setdefault(name, []).append((block, (x.requires_grad_(), layout, *(kept or ()))))

    def run(name: str) -> None:
        for block, inputs in prepared[name]:
            block.compute = blocks(name)
            out = block(*inputs)
            torch.autograd.grad(out, [inputs[0], *block.parameters()], torch.ones_like(out))

    return {name: lambda name=name: run(name) for name in prepared}  # type: ignore[misc]


def fastest(candidates: dict[str, Callable[[], None]], device: torch.device) -> tuple[str, dict[str, float | str]]:
    """(name, seconds of each); in the order given, the first of equals. One that fails is left out, with its reason."""
    found: dict[str, float | str] = {}
    for name, run in candidates.items():
        try:
            found[name] = seconds(run, device)
        except Exception as error:  # of a kernel that this machine's torch or GPU does not have
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    timed = {name: value for name, value in found.items() if isinstance(value, float)}
    if not timed:
        raise UserError(f"kernels: none of {', '.join(found)} runs here ({next(iter(found.values()))})", exit_code=1)
    return min(timed, key=lambda name: timed[name]), found


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median of the device's time, with the host running ahead as it does in a training."""
    for _ in range(WARM):
        run()
    moments = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    moments[0].record(torch.cuda.current_stream(device))
    for moment in moments[1:]:
        run()
        moment.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(moments))
