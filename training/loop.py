"""From a configuration to trained networks: stage after stage, step after step, stopped and resumed at any moment."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from curation.errors import UserError
from training import parallel
from training.assembly import assemble
from training.checkpoints import Checkpoints, newest_weights, whole
from training.collectives import rank, world_size
from training.config import TrainConfig, stages
from training.flops import peak_flops, training_of_image
from training.kernels import choice
from training.logs import Listener, Log
from training.model import VisionTransformer
from training.schedules import values_at
from training.step import Models, mean_over_processes, train_step

if TYPE_CHECKING:
    from training.data.batches import Batch

FAILED = 1e6
"""Sent in place of a request to stop by a process whose checkpoint could not be written."""

Source = Callable[[TrainConfig, int], "Iterator[Batch]"]
"""(configuration of the stage, first step) -> micro-batches of this process, endless."""


@dataclass(frozen=True)
class Result:
    """Of a training, or of the stage in which it was stopped."""

    stage: str
    step: int
    steps: int
    stopped: bool
    folder: str
    models: list[str]
    """Folders with the weights of the last checkpoint."""
    figures: dict[str, float]
    """Of the last step."""


def train(config: TrainConfig, listener: Listener | None = None, source: Source | None = None) -> Result:
    """Carry out every stage that is not finished. Raises UserError for what a user can mend."""
    device = parallel.start()
    result: Result | None = None
    before: str | None = None
    for name, told in stages(config):
        folder = Path(config.output) / name
        stage = with_teacher_of_a_stage(told, config)
        result = Stage(name, stage, folder, device, listener, source or manifest_batches).run(stage.initial or before)
        if result.stopped:
            break
        before = result.models[0]
    assert result is not None
    return result


def with_teacher_of_a_stage(stage: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Where `distill.teacher` is the name of an earlier stage, its newest weights in place of the name."""
    if stage.distill is None or stage.distill.teacher not in [name for name, _ in stages(config)]:
        return stage
    folder = Path(config.output) / stage.distill.teacher / "checkpoints"
    teacher = newest_weights(folder)
    if teacher is None:
        raise UserError(f"distill.teacher {stage.distill.teacher}: the stage has no checkpoint in {folder}")
    return stage.model_copy(update={"distill": stage.distill.model_copy(update={"teacher": teacher})})


def manifest_batches(config: TrainConfig, first_step: int) -> Iterator[Batch]:
    """What the block `data` describes, from sample `first_step` x batch size on."""
    from training.data.batches import batches

    return batches(
        config.data,
        seed=config.seed,
        global_batch=config.batch_size,
        group_size=config.group_size,
        patch_size=config.model.patch_size,
        first_step=first_step,
        rank=rank(),
        world_size=world_size(),
        accumulate=config.accumulate,
    )


@dataclass
class Pending:
    """A step whose figures may still be on their way from the device."""

    step: int
    names: list[str]
    means: Tensor
    arrived: torch.cuda.Event | None
    """None: they are there."""
    own: Tensor
    batches: list[Batch]
    waited_s: float


@dataclass
class Stage:
    """One stage of a training."""

    name: str
    config: TrainConfig
    folder: Path
    device: torch.device
    listener: Listener | None
    source: Source
    pending: deque[Pending] = field(default_factory=deque)

    def run(self, initial: str | None) -> Result:
        """From the newest checkpoint, or `initial`, to the last step or a signal to stop."""
        config = self.config
        models = assemble(config, self.device, initial)
        checkpoints = Checkpoints(self.folder / "checkpoints", config)
        first = checkpoints.resume(models)
        if first < config.steps:
            self.log = Log(self.folder, self.name, config.logging, first, self.listener)
            self._keep_configuration()
            self._say({"event": "stage", "first": first, "steps": config.steps, "processes": world_size()})
            self._choose_kernels(models, checkpoints, first)
        self.latest: dict[str, float] = {}
        self.flops = self._flops()
        step, stopped = first, False
        stream = self.source(config, first) if first < config.steps else iter(())
        try:
            with Signals() as signals:
                while step < config.steps and not stopped:
                    began = time.perf_counter()
                    micro_batches = [next(stream) for _ in range(config.accumulate)]
                    waited = time.perf_counter() - began
                    values = values_at(step, config.schedule, config.steps, config.batch_size)
                    figures = train_step(models, micro_batches, values, config)
                    step += 1
                    stop = FAILED if checkpoints.failed else float(signals.received)
                    self._hand_in(step, figures, micro_batches, waited, stop)
                    due = step % config.checkpoints.every == 0 or step == config.steps
                    stopped = self._read(0 if due else 1, checkpoints)
                    if due and not stopped:
                        checkpoints.save(models, step)
                    self._evaluate(models, step)
            stopped = self._read(0, checkpoints) or stopped
            if stopped:
                checkpoints.save(models, step)
            checkpoints.wait()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {step + 1}: the GPU's memory is full; raise `accumulate`, lower batch_size, or set "
                "parallel.activation_checkpointing: true",
                exit_code=1,
            ) from error
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
            if first < config.steps:
                self.log.close()
        dist.barrier()
        newest = checkpoints.all()[-1]
        weights = sorted(str(path) for path in newest.glob("model*"))
        return Result(self.name, step, config.steps, stopped, str(self.folder), weights, self.latest)

    def _choose_kernels(self, models: Models, checkpoints: Checkpoints, step: int) -> None:
        """Once per training: a continuation has them in its checkpoint. Plain torch that was not timed is not told."""
        chosen = choice.choose(self.config, self.device, checkpoints.kernels)
        learners = [network for learner in models.learners for network in (learner.student, learner.average)]
        choice.use(chosen, [*learners, models.teacher])
        checkpoints.kernels = chosen.names()
        if chosen != choice.Chosen():
            told = {"kernels": chosen.names(), "timings_s": chosen.timings}
            self.log.note({"stage": self.name, "step": step, **told})
            self._say({"event": "kernels", **told})

    def _hand_in(
        self, step: int, figures: dict[str, dict[str, Tensor]], batches: list[Batch], waited: float, stop: float
    ) -> None:
        """Start the figures' way to the host; a request to stop travels with them, so that all processes agree."""
        one = len(figures) == 1
        names = [name if one else f"{learner}/{name}" for learner, values in figures.items() for name in values]
        own = torch.stack([value.float() for values in figures.values() for value in values.values()])
        flag = {"": {"stop": torch.full((), stop, device=self.device)}}
        means = mean_over_processes(figures | flag).to("cpu", non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(Pending(step, names, means, arrived, own, batches, waited))

    def _read(self, leave: int, checkpoints: Checkpoints) -> bool:
        """Read figures but of the last `leave` steps, which the device may still compute. Whether to stop."""
        stop = False
        while len(self.pending) > leave:
            done = self.pending.popleft()
            if done.arrived is not None:
                done.arrived.synchronize()
            *numbers, flag = done.means.tolist()
            self.latest = dict(zip(done.names, numbers, strict=True))
            broken = [name for name, value in self.latest.items() if not math.isfinite(value)]
            if broken:
                self._report(done, broken, checkpoints)
            values = asdict(values_at(done.step - 1, self.config.schedule, self.config.steps, self.config.batch_size))
            extra = {"data_wait_s": done.waited_s, "replaced": float(sum(batch.replaced for batch in done.batches))}
            self.log.add(done.step, self.latest | extra, values, self.config.batch_size, self.flops)
            stop = stop or flag > 0
            if flag * world_size() >= FAILED:
                checkpoints.wait()
                raise UserError("another process could not write its checkpoint; see its message", exit_code=1)
        return stop

    def _report(self, done: Pending, broken: list[str], checkpoints: Checkpoints) -> None:
        """Save what the step saw, and stop. Every process writes the part it held."""
        terms = [name for name in broken if not name.split("/")[-1].startswith(("loss", "gradient"))]
        folder = self.folder / f"failure-step-{done.step:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "step": done.step,
            "not_finite": broken,
            "figures": {name: repr(value) for name, value in self.latest.items()},
            "figures_of_this_process": dict(zip(done.names, map(repr, done.own.tolist()), strict=True)),
            "image_ids": [int(i) for batch in done.batches for i in batch.image_ids],
            "sample_numbers": [int(i) for batch in done.batches for i in batch.sample_numbers],
        }
        (folder / f"process-{rank()}.json").write_text(json.dumps(document, indent=1))
        checkpoints.wait()
        kept = checkpoints.all()
        last = f"the last checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
        raise UserError(
            f"step {done.step}: {', '.join(terms or broken)} is not finite; the batch's image ids are in {folder}, "
            f"{last}; a lower schedule.learning_rate or optimizer.clip usually helps",
            exit_code=1,
        )

    def _flops(self) -> float:
        """Share of the peak per image and second: what the log multiplies; 0 without a known GPU."""
        if self.device.type != "cuda":
            return 0.0
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return training_of_image(self.config) * self.config.batch_size / (peak * world_size()) if peak else 0.0

    def _evaluate(self, models: Models, step: int) -> None:
        """k-NN of every average, where it is due: process 0 does it, with weights gathered from all."""
        knn = self.config.knn
        if knn is None or (step % knn.every and step != self.config.steps):
            return
        from training.evaluation import BackboneEncoder, knn_accuracy

        began, data = time.perf_counter(), self.config.data
        for learner in models.learners:
            named = {name: whole(value) for name, value in learner.average.backbone.state_dict().items()}
            if rank() != 0:
                continue
            backbone = VisionTransformer(learner.average.backbone.config)
            backbone.load_state_dict(named)
            encoder = BackboneEncoder(
                backbone.to(self.device), size=data.global_size, mean=data.mean, std=data.std, device=self.device
            )
            found = knn_accuracy(encoder, knn.train, knn.test, knn.neighbours, device=str(self.device))
            prefix = "" if len(models.learners) == 1 else f"{learner.name}/"
            line = {f"{prefix}knn_accuracy": found["value"], f"{prefix}knn_low": found["low"]}
            self.log.write({"stage": self.name, "step": step, **line, f"{prefix}knn_high": found["high"]})
        dist.barrier()
        self.log.leave_out(time.perf_counter() - began)

    def _keep_configuration(self) -> None:
        """What this stage was told, in full, beside its log."""
        if rank() == 0:
            text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def _say(self, event: dict[str, Any]) -> None:
        if self.listener is not None:
            self.listener({"stage": self.name} | event)


class Signals:
    """SIGTERM and SIGINT ask for a last checkpoint; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
