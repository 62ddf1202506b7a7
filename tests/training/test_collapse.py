"""Without centering and KoLeo every image falls on one prototype; with them the prototypes are shared."""

import math
from typing import Any

import torch

from tests.training.tiny import tiny
from training import parallel
from training.assembly import assemble
from training.data.batches import Batch
from training.schedules import values_at
from training.step import Models, train_step

STEPS, IMAGES = 60, 64
_random = torch.Generator().manual_seed(0)
POOL = torch.nn.functional.interpolate(torch.randn(IMAGES, 3, 4, 4, generator=_random), size=16, mode="bilinear")
"""Smooth coloured patterns; a crop is one of them, or a corner of it, under noise."""


def batch(step: int, samples: int, local_crops: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(IMAGES, (samples,), generator=random)
    crops = [POOL[ids] + 0.3 * torch.randn(samples, 3, 16, 16, generator=random) for _ in range(2)]
    local = []
    for _ in range(local_crops):
        y, x = torch.randint(9, (2,), generator=random).tolist()
        local.append(POOL[ids][:, :, y : y + 8, x : x + 8] + 0.3 * torch.randn(samples, 3, 8, 8, generator=random))
    masks = torch.rand(2 * samples, 16, generator=random) < 0.3
    masks[::2] = False
    return Batch(torch.cat(crops), torch.cat(local), masks, ids, torch.arange(samples) + step * samples, 0)


def trained(**losses: Any) -> Models:
    schedule = {
        "learning_rate": 0.02,
        "warmup_steps": 5,
        "teacher_momentum": [0.9, 1.0],
        "teacher_temperature": [0.04, 0.04],
        "freeze_last_layer_steps": 0,
    }
    model = {"width": 32, "drop_path": 0.0, "layer_scale": 1.0}
    config = tiny(steps=STEPS, batch_size=16, group_size=8, losses=losses, model=model, schedule=schedule)
    models = assemble(config, parallel.start())
    for step in range(STEPS):
        values = values_at(step, config.schedule, STEPS, config.batch_size)
        train_step(models, [batch(step, 16, config.data.local_crops)], values, config)
    return models


def entropy_of_mean_assignment(models: Models) -> float:
    """Over log K: 1 where all prototypes are used alike, 0 where all images share one."""
    with torch.no_grad():
        logits = models.teacher([POOL], torch.arange(0)).dino[0]
    # Without what Sinkhorn does to them: its targets are even by construction.
    mean = torch.softmax(logits / 0.04, dim=1).mean(0).double()
    return float(-(mean * mean.clamp_min(1e-300).log()).sum() / math.log(len(mean)))


def test_without_centering_and_koleo_it_collapses() -> None:
    torch.set_num_threads(1)
    assert entropy_of_mean_assignment(trained()) > 0.7
    assert entropy_of_mean_assignment(trained(centering="none", koleo_weight=0.0)) < 0.1
