"""Schedules, groups of parameters and stochastic depth are the recipe's: against transcriptions of the public code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.training.tiny import tiny
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig, compressed, stages
from training.flops import forward_of_crop
from training.model import SIZES, HeadConfig, Layout, Network, VisionTransformer, VisionTransformerConfig
from training.optimizer import clip_per_module, factors, make_optimizer, set_values
from training.schedules import values_at
from training.stochastic_depth import choose_kept


class CosineScheduler:
    """As in dinov2/utils/utils.py."""

    def __init__(
        self, base: float, final: float, total: int, warmup: int = 0, start: float = 0, freeze: int = 0
    ) -> None:
        steps = np.arange(total - warmup - freeze)
        cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
        self.schedule = np.concatenate((np.zeros(freeze), np.linspace(start, base, warmup), cosine))
        self.final, self.total = final, total

    def __getitem__(self, step: int) -> float:
        return self.final if step >= self.total else float(self.schedule[step])


@given(st.integers(2, 60), st.integers(0, 30), st.integers(0, 40), st.integers(0, 10), st.integers(8, 4096))
def test_schedules_are_those_of_the_public_code(steps: int, warmup: int, warm: int, freeze: int, batch: int) -> None:
    warmup = min(warmup, steps - 1)
    config = ScheduleConfig(warmup_steps=warmup, teacher_temperature_steps=warm, freeze_last_layer_steps=freeze)
    rate = CosineScheduler(2e-4 * math.sqrt(batch / 1024), 1e-6, steps, warmup)
    last = CosineScheduler(2e-4 * math.sqrt(batch / 1024), 1e-6, steps, warmup)
    last.schedule[:freeze] = 0
    decay, momentum = CosineScheduler(0.04, 0.2, steps), CosineScheduler(0.994, 1.0, steps)
    temperature = CosineScheduler(0.07, 0.07, warm, warm, 0.04)
    for step in range(steps):
        got = values_at(step, config, steps, batch)
        expected = (rate[step], last[step], decay[step], momentum[step], temperature[step])
        found = (
            got.learning_rate,
            got.last_layer_learning_rate,
            got.weight_decay,
            got.teacher_momentum,
            got.teacher_temperature,
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def rate_of_the_public_code(name: str, decay: float, blocks: int, backbone: bool) -> float:
    """get_vit_lr_decay_rate of dinov2/utils/param_groups.py."""
    layer = blocks + 1
    if backbone:
        if any(n in name for n in ("pos_embed", "patch_embed", "mask_token", "cls_token")):
            layer = 0
        elif "blocks." in name:
            layer = int(name[name.find("blocks.") :].split(".")[1]) + 1
    return decay ** (blocks + 1 - layer)


def test_groups_of_parameters_are_those_of_the_public_code() -> None:
    shape = VisionTransformerConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2, registers=1)
    network = Network(shape, HeadConfig(8, 4, 16), HeadConfig(8, 4, 16))
    config = OptimizerConfig(layer_decay=0.9)
    for name, _ in network.named_parameters():
        module, _, short = name.partition(".")
        backbone = module == "backbone"
        if "register_tokens" in name:  # the public code forgets them; they stand beside the class token
            assert factors(name, 3, config) == factors("backbone.cls_token", 3, config)
            continue
        rate = rate_of_the_public_code(short, 0.9, 3 if backbone else 0, backbone)
        rate *= 0.2 if "patch_embed" in name else 1
        decayed = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
        assert factors(name, 3, config) == (pytest.approx(rate), decayed, "last_layer" in name), name
    optimizer = make_optimizer(network, config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(network.parameters())) == len({id(p) for p in held})
    schedule = ScheduleConfig(warmup_steps=2, freeze_last_layer_steps=4)
    set_values(optimizer, values_at(3, schedule, 10, 1024))
    for group in optimizer.param_groups:
        assert (group["lr"] == 0) == group["last_layer"]
        assert (group["weight_decay"] == 0) == (group["decay_factor"] == 0)


def test_gradients_are_clipped_per_module() -> None:
    shape = VisionTransformerConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2)
    network = Network(shape, HeadConfig(8, 4, 16), HeadConfig(8, 4, 16))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {n: torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for n, m in network.named_children()}  # type: ignore[union-attr]
    for name, norm in clip_per_module(network, 3.0).items():
        torch.testing.assert_close(norm, before[name])
        after = torch.cat([p.grad.flatten() for p in getattr(network, name).parameters()]).norm()
        torch.testing.assert_close(after, torch.tensor(3.0), rtol=1e-4, atol=0)


def test_stochastic_depth_belongs_to_groups_and_not_to_processes() -> None:
    options = {"group_size": 4, "rate": 0.4, "depth": 3, "seed": 5}
    both = choose_kept(Layout((16, 24), (17, 5)), [6, 7], **options)  # type: ignore[arg-type]
    first, second = (choose_kept(Layout((8, 12), (17, 5)), [n], **options) for n in (6, 7))  # type: ignore[arg-type]
    assert both is not None and first is not None and second is not None

    def crops(kept: object, samples: int, offset: int) -> list[set[tuple[int, int, int]]]:
        """(size, view, sample) of what a branch keeps."""
        rows, layout, *_ = kept  # type: ignore[misc]
        found, start, at = [], 0, 0
        for size, (count, length) in enumerate(zip(layout.counts, layout.lengths, strict=True)):
            places = (rows[at : at + count * length].reshape(count, length)[:, 0] - start) // length
            found.append({(size, int(p) // samples, int(p) % samples + offset) for p in places})
            at += count * length
            start += samples * (2, 3)[size] * length
        return found

    for block in range(3):
        for branch in range(2):
            whole = crops(both[block][branch], 8, 0)
            parts = [crops(first[block][branch], 4, 0), crops(second[block][branch], 4, 4)]
            assert whole == [parts[0][size] | parts[1][size] for size in range(2)]
            assert [len(kept) for kept in parts[0]] == [int(8 * 0.6), int(12 * 0.6)]
    assert both[0][0].scales == (8 / 4, 12 / 7) and not torch.equal(both[0][0].rows, both[0][1].rows)


def test_every_crop_is_kept_equally_often() -> None:
    counts = np.zeros(8)
    for group in range(400):
        kept = choose_kept(Layout((8,), (2,)), [group], group_size=4, rate=0.5, depth=1, seed=0)
        assert kept is not None
        np.add.at(counts, kept[0][0].rows[::2].numpy() // 2, 1)
    assert counts.sum() == 1600 and abs(counts - 200).max() < 5 * math.sqrt(200 * 0.5)


def test_other_steps_compress_the_schedule() -> None:
    base = {"steps": 1000, "schedule": {"warmup_steps": 100, "teacher_temperature_steps": 300}, "data": {"source": "x"}}
    short = compressed(base, {"steps": 10})["schedule"]
    assert (short["warmup_steps"], short["teacher_temperature_steps"]) == (1, 3)
    assert short["freeze_last_layer_steps"] == round(1250 / 100)  # the default is scaled as well
    assert compressed(base, {"steps": 10, "schedule": {"warmup_steps": 7}})["schedule"]["warmup_steps"] == 7


def test_a_stage_is_the_configuration_with_its_changes() -> None:
    config = tiny(stages=[{"name": "one"}, {"name": "two", "steps": 3, "data": {"global_size": 32}}])
    (one, first), (two, second) = stages(config)
    assert (one, two) == ("one", "two") and first.steps == 6
    assert (second.steps, second.data.global_size, second.data.local_size) == (3, 32, 8)
    assert (
        second.schedule.teacher_temperature_steps == 2 and second.schedule.learning_rate == first.schedule.learning_rate
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "not a multiple of group_size"),
        ({"data": {"global_size": 18}}, "not a multiple of patch_size"),
        ({"steps": 1}, "warmup_steps 1 is not below steps 1"),
        ({"model": {"heads": 3}}, "width 16 is not a multiple of heads 3"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stands twice"),
        ({"output": "s3://bucket/run"}, "output s3://bucket/run is not a folder"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**changes)  # type: ignore[arg-type]


def test_operations_are_counted_as_torch_counts_them() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({}, {"feed_forward": "swiglu", "registers": 2}):
        shape = VisionTransformerConfig(image_size=28, width=96, depth=2, heads=2, **changes)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            VisionTransformer(shape)(torch.randn(1, 3, 28, 28))
        assert forward_of_crop(shape, 28) == pytest.approx(counter.get_total_flops(), rel=1e-3)


CONFIGURATIONS = sorted((Path(__file__).parents[2] / "configs/train").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = TrainConfig.model_validate(yaml.safe_load(path.read_text()))
    for _, stage in stages(config):
        assert stage.steps > stage.schedule.warmup_steps


@pytest.mark.parametrize(
    ("name", "width", "hidden", "parameters"),
    [("vit-l14", 1024, 2736, 304e6), ("vit-g14", 1536, 4096, 1136e6), ("vit-l16-fast", 1024, 4096, 303e6)],
)
def test_configurations_have_the_sizes_of_the_paper(name: str, width: int, hidden: int, parameters: float) -> None:
    path = Path(__file__).parents[2] / f"configs/train/{name}.yaml"
    config = TrainConfig.model_validate(yaml.safe_load(path.read_text()))
    with torch.device("meta"):
        network = VisionTransformer(config.model.backbone())
    mlp = network.blocks[0].mlp
    assert network.config.width == width and (mlp.w3 if hasattr(mlp, "w3") else mlp.fc2).in_features == hidden
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.01)
    assert SIZES["giant"]["width"] == 1536
