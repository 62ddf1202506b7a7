"""Checkpoints that appear whole or not at all, load on any number of processes, and are written while training goes on.

FOLDER/step-000001000/ holds the state in torch's distributed format (DCP), `state.json`, and for every learner
a folder `model` (in distillation `model-NAME`) with plain weights: what `curate embed`, `evaluate` and `export` take.
It is written as .step-000001000 and renamed when every file is on the disk. DCP's index is a pickle: resume from
checkpoints of your own only; the folder `model` holds none.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from curation.errors import UserError
from training.assembly import CONFIG, HEADS, STUDENT, WEIGHTS
from training.collectives import rank
from training.config import differences, identity

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.step import Learner, Models

STATE = "state.json"

WITHOUT_KERNELS = {"attention": "sdpa", "branches": "reference"}
"""What a checkpoint that does not say was computed with."""


class Checkpoints:
    """Of one stage: saves, loads, and removes what is older than the newest `keep`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder = folder
        self.config = config
        self.kernels: dict[str, str] = {}
        """What was chosen for this training: stored, and read back by `resume`."""
        # A group of its own: its collectives run in a thread beside those of the training.
        self._group = dist.new_group(backend="gloo")
        self._under_way: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last = 0
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier(self._group)

    def save(self, models: Models, step: int) -> None:
        """The state after `step` updates. With `asynchronous` it returns when everything is copied to memory."""
        self.wait()
        partial, final = self.folder / f".{_name(step)}", self.folder / _name(step)
        if step == self._last:
            return
        self._last = step
        weights = {learner.name: gathered_weights(learner) for learner in models.learners}
        state = state_of(models)
        try:
            if rank() == 0:
                partial.mkdir(parents=True, exist_ok=True)
            dist.barrier(self._group)
            written: Future[Any] | None = None
            if self.config.checkpoints.asynchronous:
                written = dcp.async_save(state, checkpoint_id=partial, process_group=self._group)
            else:
                dcp.save(state, checkpoint_id=partial, process_group=self._group)
        except Exception as error:
            raise self._told(step, error) from error
        self._under_way = threading.Thread(
            target=self._finish, args=(models.distils, weights, written, partial, final, step), daemon=True
        )
        self._under_way.start()
        if not self.config.checkpoints.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until what is under way is on the disk. Raises UserError where it could not be written."""
        if self._under_way is not None:
            self._under_way.join()
            self._under_way = None
        self.check()

    def check(self) -> None:
        """Raise UserError if the last save failed."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the last save failed."""
        return self._failure is not None

    def _finish(
        self,
        distils: bool,
        weights: dict[str, dict[str, dict[str, Tensor]]],
        written: Future[Any] | None,
        partial: Path,
        final: Path,
        step: int,
    ) -> None:
        try:
            if written is not None:
                written.result()
            if rank() == 0:
                for name, files in weights.items():
                    write_weights(partial / (f"model-{name}" if distils else "model"), files, self.config, name)
                document = {"step": step, "processes": dist.get_world_size(), "config": identity(self.config)}
                document["kernels"] = self.kernels
                _write(partial / STATE, json.dumps(document, indent=1).encode())
                partial.rename(final)
                _sync(self.folder)
                for old in self.all()[: -self.config.checkpoints.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            self._failure = self._told(step, error)
            shutil.rmtree(partial, ignore_errors=True)

    def _told(self, step: int, error: BaseException) -> UserError:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        kept = self.all()
        last = f"the last complete one is {kept[-1]}" if kept else "there is none yet"
        return UserError(
            f"the checkpoint of step {step} could not be written into {self.folder} ({reason}); {last}: make room and "
            "run the same command again to go on from there",
            exit_code=1,
        )

    def all(self) -> list[Path]:
        """Complete ones, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / STATE).exists())

    def resume(self, models: Models) -> int:
        """Load the newest into `models`; the updates done so far, 0 without one.

        Raises UserError for a checkpoint of another training.
        """
        found: list[Any] = [self.all()[-1:] if rank() == 0 else None]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if not found[0]:
            return 0
        path = found[0][0]
        document = json.loads((path / STATE).read_text())
        changed = differences(document["config"], json.loads(json.dumps(identity(self.config))))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{path}: is a checkpoint of another training ({changed[0]}{more} differs); take another "
                "`output`, or the configuration it was begun with"
            )
        state = state_of(models)
        dcp.load(state, checkpoint_id=path, process_group=self._group)
        set_state(models, state)
        self.kernels = document.get("kernels", WITHOUT_KERNELS)
        self._last = int(document["step"])
        return self._last


def state_of(models: Models) -> dict[str, Any]:
    """What a continuation needs, sharded as it is. The data's place is the step's number."""
    learners = {}
    for learner in models.learners:
        student, optimizer = get_state_dict(learner.student, learner.optimizer)
        learners[learner.name] = {
            "student": student,
            "optimizer": optimizer,
            "average": get_model_state_dict(learner.average),
        }
    centering = {"dino": models.dino_centering.state_dict(), "ibot": models.ibot_centering.state_dict()}
    return {"learners": learners, "centering": centering}


def set_state(models: Models, state: dict[str, Any]) -> None:
    """The reverse of `state_of`."""
    for learner in models.learners:
        of_learner = state["learners"][learner.name]
        set_state_dict(
            learner.student,
            learner.optimizer,
            model_state_dict=of_learner["student"],
            optim_state_dict=of_learner["optimizer"],
            options=StateDictOptions(strict=True),
        )
        set_model_state_dict(learner.average, of_learner["average"])
    models.dino_centering.load_state_dict(state["centering"]["dino"])
    models.ibot_centering.load_state_dict(state["centering"]["ibot"])


def gathered_weights(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by file and name, on the CPU of process 0 (empty elsewhere); every process must call it."""
    files: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, STUDENT: {}, HEADS: {}}
    for side, network in (("average", learner.average), ("student", learner.student)):
        for name, value in network.state_dict().items():
            complete = whole(value)
            if rank() == 0:
                backbone = name.startswith("backbone.")
                file = HEADS if not backbone else WEIGHTS if side == "average" else STUDENT
                files[file][name.removeprefix("backbone.") if backbone else f"{side}.{name}"] = (
                    complete.detach().cpu().clone()
                )
    return files


def whole(value: Tensor) -> Tensor:
    """A sharded tensor in full; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def write_weights(folder: Path, files: dict[str, dict[str, Tensor]], config: TrainConfig, name: str) -> None:
    """The folder `model`: plain weights and the shapes to read them with."""
    from safetensors.torch import save

    model = config.model if config.distill is None else config.distill.students[name]
    document = {
        "model": model.backbone().to_dict(),
        "heads": _heads_of(files[HEADS]),
        "preprocessing": {
            "size": config.data.global_size,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        },
    }
    folder.mkdir(exist_ok=True)
    for file, tensors in files.items():
        _write(folder / file, save({key: value.contiguous() for key, value in tensors.items()}))
    _write(folder / CONFIG, json.dumps(document, indent=1).encode())


def _heads_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, int] | None]:
    """The shapes of heads, from their weights."""
    found: dict[str, dict[str, int] | None] = {}
    for side in ("dino", "ibot"):
        direction = tensors.get(f"average.{side}_head.last_layer.direction")
        if direction is None:
            found[side] = None
            continue
        hidden = len(tensors[f"average.{side}_head.mlp.0.bias"])
        found[side] = {"hidden": hidden, "bottleneck": direction.shape[1], "prototypes": direction.shape[0]}
    return found


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_weights(folder: Path, name: str = "model") -> str | None:
    """The folder with plain weights of the newest complete checkpoint in a stage's folder `checkpoints`."""
    found = sorted(path for path in folder.glob("step-*") if (path / STATE).exists() and (path / name).exists())
    return str(found[-1] / name) if found else None
