"""One update, from a batch of crops to the moved teacher: read `train_step` from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.collectives import sum_over_processes, world_size
from training.finishing import Finish, finish
from training.losses import Centering, chosen_patches, koleo_loss
from training.losses.choice import CrossEntropies, WithMatrices
from training.model import Layout, Network, Outputs
from training.optimizer import clip_per_module, set_values
from training.parallel import to_device
from training.stochastic_depth import choose_kept

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.data.batches import Batch
    from training.schedules import StepValues

FIGURES = ("loss", "dino", "ibot", "koleo", "gradient_backbone", "gradient_dino_head", "gradient_ibot_head")
"""What `train_step` returns of every student; the last only where iBOT has a head of its own."""


@dataclass
class Learner:
    """A student, the moving average of its weights, and its optimizer."""

    name: str
    student: Network
    average: Network
    optimizer: torch.optim.AdamW
    drop_path: float


@dataclass
class Models:
    """All that a step reads and changes, and a checkpoint holds.

    In self-distillation there is one learner and its average is the teacher; in distillation the teacher is frozen.
    """

    learners: list[Learner]
    teacher: Network
    dino_centering: Centering
    ibot_centering: Centering
    device: torch.device
    cross_entropies: CrossEntropies = field(default_factory=WithMatrices)
    finish: Finish = finish

    @property
    def distils(self) -> bool:
        """Whether the teacher is a frozen network."""
        return self.teacher is not self.learners[0].average


def train_step(
    models: Models, micro_batches: Sequence[Batch], values: StepValues, config: TrainConfig
) -> dict[str, dict[str, Tensor]]:
    """One update of every student. Returns its figures by name, means over this process's samples, on the device."""
    losses, cross_entropies = config.losses, models.cross_entropies
    sums: dict[str, list[Tensor]] = {learner.name: [] for learner in models.learners}
    for number, batch in enumerate(micro_batches):
        # Indices are made on the CPU, where the masks are: the device never has to be waited for.
        masks = None if models.distils else batch.masks
        where, weights = chosen_patches(torch.ones_like(batch.masks) if masks is None else batch.masks)
        where, weights = to_device(where, models.device), to_device(weights, models.device)
        masks = None if masks is None else to_device(masks, models.device)
        crops = [to_device(batch.global_crops, models.device)]
        if len(batch.local_crops):
            crops.append(to_device(batch.local_crops, models.device))
        if batch.drawn is not None:
            drawn = batch.drawn.split([len(c) for c in crops])
            told = config.data.mean, config.data.std
            crops = [models.finish(c, numbers, *told) for c, numbers in zip(crops, drawn, strict=True)]

        # The teacher sees the global crops whole; its logits become targets.
        with torch.no_grad():
            seen: Outputs = models.teacher(crops[:1], where)
            temperature = values.teacher_temperature
            dino_targets = cross_entropies.targets(models.dino_centering, seen.class_logits, temperature)
            ibot_targets = cross_entropies.targets(models.ibot_centering, seen.ibot, temperature)

        for learner in models.learners:
            # The student sees the global crops masked, and the local crops, all packed into one pass.
            kept = choose_kept(
                crops_layout(crops, learner.student),
                group_numbers(batch, config.group_size),
                group_size=config.group_size,
                rate=learner.drop_path,
                depth=learner.student.backbone.config.depth,
                seed=config.seed,
                device=models.device,
            )
            synchronise_gradients(learner.student, number == len(micro_batches) - 1)
            out: Outputs = learner.student(crops, where, masks, kept)
            dino = cross_entropies.dino(out.class_logits, dino_targets, losses.student_temperature)
            ibot = cross_entropies.ibot(out.ibot, ibot_targets, weights, len(crops[0]), losses.student_temperature)
            koleo = koleo_loss(out.class_tokens, config.group_size)
            loss = losses.dino_weight * dino + losses.ibot_weight * ibot + losses.koleo_weight * koleo
            (loss / len(micro_batches)).backward()
            sums[learner.name].append(torch.stack([loss, dino, ibot, koleo]).detach())

    figures = {}
    for learner in models.learners:
        norms = clip_per_module(learner.student, config.optimizer.clip)
        set_values(learner.optimizer, values)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        move_average(learner.average, learner.student, values.teacher_momentum)
        means = torch.stack(sums[learner.name]).mean(0)
        figures[learner.name] = dict(zip(FIGURES, [*means, *norms.values()], strict=False))
    models.dino_centering.update()
    models.ibot_centering.update()
    return figures


@torch.no_grad()
def move_average(average: Network, student: Network, momentum: float) -> None:
    """average <- momentum x average + (1 - momentum) x student, on the shards that each process holds.

    A forward without gradients may leave FSDP's parameters gathered, and what is written into those is lost: both
    networks go back to their shards first.
    """
    for network in (average, student):
        if isinstance(network, FSDPModule):
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
    targets, sources = ([local(p) for p in network.parameters()] for network in (average, student))
    get_ema_multi_avg_fn(momentum)(targets, sources, None)


def local(parameter: Tensor) -> Tensor:
    """This process's shard of it, sharing its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def crops_layout(crops: Sequence[Tensor], network: Network) -> Layout:
    """How the network will pack them."""
    shape = network.backbone.config
    lengths = [
        1 + shape.registers + (c.shape[-2] // shape.patch_size) * (c.shape[-1] // shape.patch_size) for c in crops
    ]
    return Layout(tuple(len(c) for c in crops), tuple(lengths))


def group_numbers(batch: Batch, group_size: int) -> list[int]:
    """Of the groups of a micro-batch, counted over the whole training."""
    first = int(batch.sample_numbers[0]) // group_size
    return list(range(first, first + len(batch.sample_numbers) // group_size))


def synchronise_gradients(network: Network, wanted: bool) -> None:
    """Whether the next backward averages gradients over processes; only the last of a step's micro-batches does."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def mean_over_processes(figures: dict[str, dict[str, Tensor]]) -> Tensor:
    """(figures,) float32: all figures in order, one collective for all of them."""
    flat = torch.stack([figure.float() for of_learner in figures.values() for figure in of_learner.values()])
    return sum_over_processes(flat) / world_size()
