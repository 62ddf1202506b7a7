"""A training on the workers of a Ray cluster: Ray Train starts the processes, `training.loop` does the rest.

Checkpoints and logs go to the training's `output`, which has to lie where every machine sees it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from curation.errors import UserError
from pipelines import cluster, preflight, submission
from training.config import TrainConfig
from training.loop import Result

RESULT = ".result.json"
PATHS = ("source", "index_folder", "teacher", "initial", "train", "test")
"""Keys of a training that hold paths, `output` aside."""


def train(
    config: TrainConfig, processes: int, address: str | None, listener: Callable[[dict[str, Any]], None] | None = None
) -> Result:
    """Run it to its end on `processes` workers, one GPU each where the cluster has GPUs. Raises UserError."""
    cluster.start(address, processes if address is None else None)
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError("--launcher ray: Ray Train is not installed; pip install 'lvd-curate[train]'") from error
    on_gpu = cluster.gpus() >= processes
    output = Path(config.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT).unlink(missing_ok=True)
    document = config.model_dump(mode="json") | {"output": str(output)}
    if listener is not None:
        listener({"event": "stage", "stage": "ray", "first": 0, "steps": config.steps, "processes": processes})
    trainer = TorchTrainer(
        work,
        train_loop_config=document,
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpu),
        run_config=RunConfig(name=output.name, storage_path=str(output / "ray")),
    )
    try:
        trainer.fit()
    except Exception as error:
        if not (output / RESULT).exists():
            reason = str(error).strip().splitlines()[-1][:300]
            raise UserError(f"the training on Ray ended: {reason}; logs are in {output}", exit_code=1) from error
    found = json.loads((output / RESULT).read_text())
    if "error" in found:
        raise UserError(found["error"], exit_code=found["exit_code"])
    return Result(**found)


def work(document: dict[str, Any]) -> None:
    """In every worker: Ray Train has joined the processes already."""
    from training.collectives import rank
    from training.loop import train as run

    config = TrainConfig.model_validate(document)
    try:
        found: dict[str, Any] = vars(run(config))
    except UserError as error:
        found = {"error": str(error), "exit_code": error.exit_code}
    if rank() == 0:
        (Path(config.output) / RESULT).write_text(json.dumps(found))


def submit(config: TrainConfig, command: str, processes: int, address: str) -> str:
    """Send the training to a cluster as a job that starts it there; the job's name. Raises UserError."""
    output = preflight.absolute(config.output)  # the job runs in a folder of its own
    text = yaml.safe_dump(_with_whole_paths(config.model_dump(mode="json") | {"output": output}), sort_keys=False)
    entry = [command, "--config", "train.yaml", "--launcher", "ray", "--processes", str(processes)]
    return submission.submit(address, [*entry, "--ray-address", "auto"], {"train.yaml": text}, run=output)


def _with_whole_paths(value: Any, key: str = "") -> Any:
    """What may be a path and is there from the current folder, whole."""
    if isinstance(value, dict):
        return {name: _with_whole_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_paths(item, key) for item in value]
    named = key in PATHS and isinstance(value, str) and "://" not in value
    return preflight.absolute(value) if named and Path(value).exists() else value
