"""The step reads nothing back to the host, and its logs go where they are asked to."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from curation.errors import UserError
from tests.training.tiny import make_batch, run_here, tiny
from training import parallel
from training.assembly import assemble
from training.config import LogConfig
from training.logs import Log
from training.schedules import values_at
from training.step import train_step


class NoReading(TorchDispatchMode):
    """Fails where a floating number leaves its device: on a GPU the host would have to wait for it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            assert not args[0].is_floating_point(), "a figure was read within the step"
        return operation(*args, **(kwargs or {}))


def test_a_step_reads_no_figure() -> None:
    for centering in ("sinkhorn", "softmax"):
        config = tiny(losses={"centering": centering})
        models = assemble(config, parallel.start())
        values = values_at(1, config.schedule, config.steps, config.batch_size)
        train_step(models, [make_batch(config, 0, 12)], values, config)
        with NoReading():
            figures = train_step(models, [make_batch(config, 12, 12)], values, config)
            with pytest.raises(AssertionError, match="read within"):
                float(figures["model"]["loss"])


def test_figures_go_to_tensorboard_and_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    run = types.SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_here(tmp_path, steps=2, logging={"every": 1, "tensorboard": True, "wandb": "a-project"})
    assert [step for step, _ in sent] == [1, 2] and all("loss" in numbers for _, numbers in sent)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "pretrain/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(sent[1][1]["loss"])


def test_a_logger_that_is_not_installed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="Weights & Biases is not installed"):
        Log(tmp_path, "pretrain", LogConfig(wandb="a-project"), 0, None)


def test_lines_are_means_over_windows_and_lines_past_a_checkpoint_are_taken_back(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    log = Log(tmp_path, "pretrain", LogConfig(every=2), 0, events.append)
    for step in range(1, 5):
        log.add(step, {"loss": float(step), "data_wait_s": 0.0, "replaced": 0.0}, {"learning_rate": 0.1}, 8, 0.0)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.5), (4, 3.5)]
    assert [event["event"] for event in events] == ["figures"] * 2
    with open(log.path, "a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    Log(tmp_path, "pretrain", LogConfig(every=2), 3, None)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [2]
