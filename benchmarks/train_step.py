"""Measures a training step beside the same recipe put together from lightly's components, on the CPU.

    python -m benchmarks.train_step --out benchmarks/results/train_step.json

Both get the same weights and the same made batches: 2 x 224 and 8 x 98 crops, half of the global crops masked, DINO and
iBOT with heads of their own, softmax centering (lightly has no Sinkhorn-Knopp for DINO), KoLeo, AdamW, clipping, moving
average, float32, one thread, each in a process of its own. lightly's side follows the DINOv2 example of its
documentation: one pass per crop size, stochastic depth that multiplies by zero. The first loss of both, without
stochastic depth, is in the result: it must be the same.
"""

# The number of threads is set before torch is imported.
# ruff: noqa: E402
import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import torch

WIDTH, DEPTH, HEADS, PATCH = 192, 12, 3, 14
PROTOTYPES, HIDDEN, BOTTLENECK = 8192, 512, 128


def configuration(batch: int, drop_path: float) -> Any:
    """Of both."""
    from training.config import TrainConfig

    head = {"hidden": HIDDEN, "bottleneck": BOTTLENECK, "prototypes": PROTOTYPES}
    return TrainConfig.model_validate(
        {
            "steps": 100,
            "batch_size": batch,
            "group_size": batch,
            "model": {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "drop_path": drop_path},
            "heads": {"dino": head, "ibot": head},
            "losses": {"centering": "softmax"},
            "schedule": {"warmup_steps": 1, "freeze_last_layer_steps": 0, "teacher_temperature_steps": 1},
            "data": {"source": "made"},
        }
    )


def made_batch(config: Any, step: int) -> Any:
    """Noise, and masks of the recipe's mean size."""
    from training.data.batches import Batch

    random = torch.Generator().manual_seed(step)
    b, patches = config.batch_size, (config.data.global_size // PATCH) ** 2
    crops = torch.randn(2 * b, 3, config.data.global_size, config.data.global_size, generator=random)
    small = config.data.local_size
    local = torch.randn(config.data.local_crops * b, 3, small, small, generator=random)
    masks = torch.rand(2 * b, patches, generator=random) < 0.3
    masks[1::2] = False
    return Batch(crops, local, masks, torch.arange(b), torch.arange(b) + step * b, 0)


def ours(batch: int, drop_path: float, steps: int) -> dict[str, Any]:
    """The trainer's own step, as `curate train` runs it on one process."""
    from training import parallel
    from training.assembly import assemble
    from training.schedules import values_at
    from training.step import train_step

    torch.set_num_threads(1)
    config = configuration(batch, drop_path)
    models = assemble(config, parallel.start())

    def step(number: int) -> float:
        values = values_at(number + 1, config.schedule, config.steps, batch)
        return float(train_step(models, [made_batch(config, number)], values, config)["model"]["loss"])

    return timed(step, steps)


def theirs(batch: int, drop_path: float, steps: int) -> dict[str, Any]:
    """lightly's backbone, heads and losses."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_drop_path_rate, update_momentum
    from timm.models.vision_transformer import VisionTransformer

    from training.schedules import values_at

    torch.set_num_threads(1)
    config = configuration(batch, drop_path)

    class Side(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                img_size=224,
                patch_size=PATCH,
                embed_dim=WIDTH,
                depth=DEPTH,
                num_heads=HEADS,
                init_values=1e-5,
                num_classes=0,
                dynamic_img_size=True,
            )
            self.backbone = MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization="skip")
            self.dino_head = DINOv2ProjectionHead(WIDTH, HIDDEN, BOTTLENECK, PROTOTYPES)
            self.ibot_head = DINOv2ProjectionHead(WIDTH, HIDDEN, BOTTLENECK, PROTOTYPES)

    student, teacher = Side(), Side().requires_grad_(False).eval()
    for side in (student, teacher):
        load_our_weights(side, config)
    if drop_path:
        update_drop_path_rate(student.backbone.vit, drop_path, mode="uniform")
    student.train()
    dino, ibot, koleo = DINOLoss(PROTOTYPES), IBOTPatchLoss(PROTOTYPES), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> float:
        made = made_batch(config, number)
        values = values_at(number + 1, config.schedule, config.steps, batch)
        mask = torch.cat([torch.zeros(len(made.masks), 1, dtype=torch.bool), made.masks], dim=1)
        with torch.no_grad():
            seen = teacher.backbone.encode(made.global_crops)
            teacher_class = teacher.dino_head(seen[:, 0])
            teacher_patches = teacher.ibot_head(seen[mask])
        tokens = student.backbone.encode(made.global_crops, mask=mask)
        local_class = student.dino_head(student.backbone.encode(made.local_crops)[:, 0])
        global_class, patches = student.dino_head(tokens[:, 0]), student.ibot_head(tokens[mask])
        side = config.data.global_size // PATCH
        loss = dino(
            list(teacher_class.chunk(2)),
            [*global_class.chunk(2), *local_class.chunk(config.data.local_crops)],
            teacher_temp=values.teacher_temperature,
        )
        loss = loss + ibot(
            teacher_patches, patches, made.masks.unflatten(1, (side, side)), teacher_temp=values.teacher_temperature
        )
        loss = loss + 0.1 * sum(koleo(crop) for crop in tokens[:, 0].chunk(2))
        loss.backward()
        for module in student.children():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for mine, average in zip(student.children(), teacher.children(), strict=True):
            update_momentum(mine, average, values.teacher_momentum)
        return float(loss.detach())

    return timed(step, steps)


def load_our_weights(side: Any, config: Any) -> None:
    """What `assemble` begins with, in their names."""
    from training.model import Network

    torch.manual_seed(config.seed)
    shape = config.heads.dino.shape()
    network = Network(config.model.backbone(), shape, shape)
    state = network.backbone.state_dict()
    side.backbone.mask_token.data.copy_(state.pop("mask_token")[None])
    side.backbone.vit.load_state_dict(state)
    for mine, head in ((network.dino_head, side.dino_head), (network.ibot_head, side.ibot_head)):
        linear = [m for m in mine.mlp if isinstance(m, torch.nn.Linear)]
        their_linear = [m for m in head.layers if isinstance(m, torch.nn.Linear)]
        for one, other in zip(linear, their_linear, strict=True):
            other.load_state_dict(one.state_dict())
        head.last_layer.weight_v.data.copy_(mine.last_layer.direction.data)
        head.last_layer.weight_g.data.copy_(mine.last_layer.magnitude.data)


def timed(step: Any, steps: int) -> dict[str, Any]:
    """One step to warm up, then `steps`: the fastest and the mean, in CPU seconds."""
    first = step(0)
    machine.forget_peak()
    seconds = []
    for number in range(1, steps + 1):
        began = time.process_time()
        step(number)
        seconds.append(time.process_time() - began)
    return {
        "first_loss": first,
        "cpu_seconds_per_step": sum(seconds) / len(seconds),
        "fastest_cpu_seconds": min(seconds),
        "peak_bytes": machine.peak_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--drop-path", type=float, nargs="+", default=[0.0, 0.4])
    arguments = parser.parse_args()
    results = []
    for drop_path in arguments.drop_path:
        row: dict[str, Any] = {"drop_path": drop_path}
        for name, method in (("ours", ours), ("lightly", theirs)):
            row[name], _ = machine.measured(method, arguments.batch, drop_path, arguments.steps)
        row["time_ratio"] = row["ours"]["cpu_seconds_per_step"] / row["lightly"]["cpu_seconds_per_step"]
        row["memory_ratio"] = row["ours"]["peak_bytes"] / row["lightly"]["peak_bytes"]
        results.append(row)
        print(json.dumps(row), flush=True)
    model = f"ViT {WIDTH} wide, {DEPTH} blocks, patch {PATCH}; heads {HIDDEN}, {BOTTLENECK}, {PROTOTYPES} prototypes"
    document = {
        "command": "python -m benchmarks.train_step",
        "model": model,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "machine": machine.facts(),
        "versions": machine.versions(("torch", "lightly", "timm")),
        "results": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
