"""What changes from step to step, as functions of the step alone (DINOv2's public code and appendix B)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.config import ScheduleConfig


@dataclass(frozen=True)
class StepValues:
    """Of one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


def values_at(step: int, config: ScheduleConfig, steps: int, batch_size: int) -> StepValues:
    """Of step `step` of `steps`, counted from 0."""
    base = config.learning_rate * math.sqrt(batch_size / 1024)
    learning_rate = warmup_then_cosine(step, steps, 0.0, base, config.minimum_learning_rate, config.warmup_steps)
    frozen = step < config.freeze_last_layer_steps
    return StepValues(
        learning_rate=learning_rate,
        last_layer_learning_rate=0.0 if frozen else learning_rate,
        weight_decay=cosine(step, steps, *config.weight_decay),
        teacher_momentum=cosine(step, steps, *config.teacher_momentum),
        teacher_temperature=linear(step, config.teacher_temperature_steps, *config.teacher_temperature),
    )


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """From `first` at step 0 to `last` at `steps`, and there it stays."""
    if step >= steps:
        return last
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def linear(step: int, steps: int, first: float, last: float) -> float:
    """From `first` at step 0 to `last` at step `steps` - 1, and there it stays."""
    return last if step >= steps else first + (last - first) * step / max(steps - 1, 1)


def warmup_then_cosine(step: int, steps: int, start: float, peak: float, last: float, warmup: int) -> float:
    """Linear to `peak` within `warmup` steps, then a cosine to `last`."""
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, steps - warmup, peak, last)
