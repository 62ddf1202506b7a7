"""A training that takes milliseconds per step: its configuration, and batches that depend on sample numbers alone."""

import copy
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from training.collectives import rank, world_size
from training.config import TrainConfig, merge
from training.data.batches import Batch
from training.loop import Result, train

TINY: dict[str, Any] = {
    "steps": 6,
    "batch_size": 12,
    "group_size": 2,
    "model": {
        "size": "small",
        "width": 16,
        "depth": 2,
        "heads": 2,
        "patch_size": 4,
        "image_size": 16,
        "drop_path": 0.3,
    },
    "heads": {
        "dino": {"hidden": 16, "bottleneck": 8, "prototypes": 32},
        "ibot": {"hidden": 16, "bottleneck": 8, "prototypes": 24},
    },
    "schedule": {
        "learning_rate": 0.05,
        "warmup_steps": 1,
        "teacher_momentum": [0.9, 1.0],
        "teacher_temperature_steps": 4,
        "freeze_last_layer_steps": 1,
    },
    "data": {"source": "synthetic", "global_size": 16, "local_size": 8, "local_crops": 3},
    "checkpoints": {"every": 100},
    "logging": {"every": 1},
}


def tiny(output: Path | str = "unused", **changes: Any) -> TrainConfig:
    """TINY with changes merged in."""
    return TrainConfig.model_validate(merge(copy.deepcopy(TINY), {"output": str(output), **changes}))


def make_batch(config: TrainConfig, first_sample: int, count: int) -> Batch:
    """Of samples [first_sample, first_sample + count): noise keyed by the sample's number."""
    data, patch = config.data, config.model.patch_size
    views: list[list[torch.Tensor]] = [[], [], []]
    for number in range(first_sample, first_sample + count):
        random = torch.Generator().manual_seed(number)
        views[0].append(torch.randn(2, 3, data.global_size, data.global_size, generator=random))
        views[1].append(torch.randn(data.local_crops, 3, data.local_size, data.local_size, generator=random))
        views[2].append(torch.rand(2, (data.global_size // patch) ** 2, generator=random) < 0.3)
    crops, local, masks = (torch.stack(v, dim=1).flatten(0, 1) for v in views)
    numbers = torch.arange(first_sample, first_sample + count)
    return Batch(crops, local, masks, numbers + 1000, numbers, 0)


def synthetic(config: TrainConfig, first_step: int) -> Iterator[Batch]:
    """This process's micro-batches."""
    own = config.batch_size // world_size()
    size = own // config.accumulate
    step = first_step
    while True:
        for micro in range(config.accumulate):
            yield make_batch(config, step * config.batch_size + rank() * own + micro * size, size)
        step += 1


def hanging_at(step: int, release: Path | None = None) -> Callable[[TrainConfig, int], Iterator[Batch]]:
    """A source that does not deliver the batch of a step before the file `release` is there."""

    def source(config: TrainConfig, first_step: int) -> Iterator[Batch]:
        for number, batch in enumerate(synthetic(config, first_step), first_step):
            while number == step and not (release is not None and release.exists()):
                time.sleep(0.01)
            yield batch

    return source


def figures(output: Path | str, stage: str = "pretrain") -> list[dict[str, float]]:
    """The log's losses and norms, by step; what time decides is left out."""
    told = ("step", "loss", "dino", "ibot", "koleo", "gradient_backbone", "gradient_dino_head", "gradient_ibot_head")
    lines = (Path(output) / stage / "log.jsonl").read_text().splitlines()
    return [{key: line[key] for key in told if key in line} for line in map(json.loads, lines)]


def run_here(output: Path | str, **changes: Any) -> Result:
    """One process, this one."""
    torch.set_num_threads(1)
    return train(tiny(output, **changes), source=synthetic)


SERVER = multiprocessing.get_context("forkserver")
"""Its server imports torch once; processes of trainings are forks of it, which no thread of the tests is in."""
SERVER.set_forkserver_preload(["tests.training.tiny"])


def start_processes(count: int, output: Path | str, hang_at: int | None = None, **changes: Any) -> list[Any]:
    """`count` new processes with a group of their own."""
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for number in range(count):
        told = (environment | {"RANK": str(number)}, str(output), hang_at, changes)
        processes.append(SERVER.Process(target=run_there, args=told, daemon=True))
        processes[-1].start()
    return processes


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_there(environment: dict[str, str], output: str, hang_at: int | None, changes: dict[str, Any]) -> None:
    """In a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    source = synthetic if hang_at is None else hanging_at(hang_at, Path(output) / "release")
    result = train(tiny(output, **changes), source=source)
    sys.exit(128 + signal.SIGTERM if result.stopped else 0)


def finish(processes: list[Any]) -> list[int]:
    """Their exit codes."""
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes]


def wait_for(condition: Callable[[], bool], seconds: float = 40) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
