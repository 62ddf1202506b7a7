"""Figures of a training: JSON lines always, TensorBoard and W&B where asked, a listener for a live line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from curation.errors import UserError
from training.collectives import rank

if TYPE_CHECKING:
    from training.config import LogConfig

Listener = Callable[[dict[str, Any]], None]


class Log:
    """Means over windows of `every` steps; process 0 writes. Lines past the step that is resumed are taken back."""

    def __init__(self, folder: Path, stage: str, config: LogConfig, first_step: int, listener: Listener | None) -> None:
        self.stage, self.config, self.listener = stage, config, listener
        self.path = folder / "log.jsonl"
        self._window: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._board: Any = None
        self._wandb: Any = None
        if rank() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        take_back(self.path, first_step)
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("logging.tensorboard: TensorBoard is not installed; pip install tensorboard") from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        if config.wandb is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError("logging.wandb: Weights & Biases is not installed; pip install wandb") from error
            self._wandb = wandb.init(project=config.wandb, name=f"{folder.parent.name}-{stage}", dir=str(folder))

    def add(self, step: int, figures: dict[str, float], values: dict[str, float], images: int, flops: float) -> None:
        """Of update number `step`, counted from 1. images and flops: of one update, all processes."""
        self._window.append(figures)
        if step % self.config.every:
            return
        now = time.perf_counter()
        seconds = (now - self._began) / len(self._window)
        keys = {key for line in self._window for key in line}
        means = {
            key: sum(line[key] for line in self._window if key in line) / sum(key in line for line in self._window)
            for key in sorted(keys)
        }
        line = {
            "stage": self.stage,
            "step": step,
            **means,
            **values,
            "step_s": round(seconds, 5),
            "images_per_s": round(images / seconds, 3),
            "memory_bytes": memory_bytes(),
        }
        if flops:
            line["mfu"] = round(flops / seconds, 4)
        self._window, self._began = [], now
        self.write(line)

    def leave_out(self, seconds: float) -> None:
        """Time that is no step's, an evaluation's say."""
        self._began += seconds

    def write(self, line: dict[str, Any]) -> None:
        """A line of its own, k-NN accuracy say. With a `step`."""
        if self.listener is not None:
            self.listener({"event": "figures", **line})
        self.note(line)
        if rank() != 0:
            return
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def note(self, line: dict[str, Any]) -> None:
        """A line of log.jsonl alone, of what is no figure. With a `step`."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Flush what is open."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def take_back(path: Path, step: int) -> None:
    """Remove lines of steps after `step`, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def memory_bytes() -> int:
    """The most that this process has held: on the GPU where there is one, else in memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
