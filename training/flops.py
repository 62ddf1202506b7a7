"""Floating-point operations of a training step, counted from shapes, for the share of a GPU's peak that is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.model import VisionTransformerConfig

PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "4090": 165e12,
}
"""Dense, as the makers state them; the first name that the device's name holds counts."""


def forward_of_crop(shape: VisionTransformerConfig, side: int) -> float:
    """One crop of side x side pixels through the backbone; two per multiply-add."""
    tokens = 1 + shape.registers + (side // shape.patch_size) ** 2
    hidden = int(shape.width * shape.mlp_ratio)
    if shape.feed_forward == "swiglu":
        hidden = 3 * ((int(hidden * 2 / 3) + 7) // 8 * 8) / 2  # three matrices in place of two
    per_token = 4 * shape.width**2 + 2 * shape.width * hidden
    attention = 2 * tokens * shape.width
    patches = (tokens - 1 - shape.registers) * shape.channels * shape.patch_size**2 * shape.width
    return 2 * (shape.depth * tokens * (per_token + attention) + patches)


def training_of_image(config: TrainConfig) -> float:
    """Backbones alone: the teacher's forward on two global crops, every student's forward and backward on all crops."""
    data = config.data

    def of(shape: VisionTransformerConfig, local_crops: int) -> float:
        return 2 * forward_of_crop(shape, data.global_size) + local_crops * forward_of_crop(shape, data.local_size)

    students = [config.model] if config.distill is None else list(config.distill.students.values())
    drop = [model.drop_path if config.distill is None else 0.0 for model in students]
    trained = sum(3 * (1 - p) * of(m.backbone(), data.local_crops) for m, p in zip(students, drop, strict=True))
    return trained + (of(config.model.backbone(), 0) if config.distill is None else 0)


def peak_flops(device_name: str) -> float | None:
    """Per second, bfloat16; None for a device that is not listed."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
