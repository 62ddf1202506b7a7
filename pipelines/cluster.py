"""Ray: started in this process, or joined by address; tasks spread with a bounded number in flight."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from curation import device
from curation.errors import UserError

IN_FLIGHT_PER_CPU = 3
START_ATTEMPTS = 3
WORKER_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(address: str | None, workers: int | None) -> None:
    """Join the cluster at `address`, or start Ray in this process; nothing if it runs already."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if ray.is_initialized():
        return
    os.environ |= {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    if address:
        try:
            ray.init(address=address, logging_level="ERROR", runtime_env={"env_vars": WORKER_ENVIRONMENT})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"Ray cannot be reached at {address}: {str(error).splitlines()[0]}", exit_code=1) from error
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=workers or os.cpu_count(),
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=bool(os.environ.get("CURATE_WORKER_LOGS")),
            )
            return
        except Exception as error:  # Ray raises bare Exceptions when a busy machine is late to start it
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise UserError(f"Ray cannot be started on this machine: {reason}", exit_code=1) from error


def stop() -> None:
    """Leave or stop Ray."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def cpus() -> int:
    """CPU cores of the cluster."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus() -> float:
    """GPUs of the cluster; none where Ray does not run."""
    import ray

    if not ray.is_initialized():
        return 0.0
    return float(ray.cluster_resources().get("GPU", 0))


def gpu_name() -> str | None:
    """The type of GPU that the cluster offers, the first by name; None without one."""
    import ray

    if not gpus():
        return None
    kinds = sorted(name for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    return kinds[0].removeprefix("accelerator_type:") if kinds else "GPU"


def spread(
    function: Callable[..., Any],
    calls: Iterable[tuple[str, tuple[Any, ...]]],
    *,
    shared: Any = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory_bytes: int | None = None,
) -> Iterator[tuple[str, Any]]:
    """function(*arguments, shared) for each (name, arguments), in Ray tasks; yields (name, result) as they end.

    num_gpus: the share of a GPU that `curation.device` lends to each.
    """
    import ray

    options: dict[str, Any] = {"num_cpus": num_cpus, "max_retries": 3}
    if memory_bytes:
        options["memory"] = memory_bytes
    if num_gpus:
        # Ray would end a worker after each task that has a share of a GPU; many take less than importing torch.
        options |= {"num_gpus": num_gpus, "max_calls": 0}
    remote = ray.remote(**options)(_on_gpu(function) if num_gpus else function)
    common = ray.put(shared)
    limit = max(2, IN_FLIGHT_PER_CPU * cpus())
    pending: dict[Any, str] = {}
    queue = iter(calls)
    try:
        while True:
            while len(pending) < limit:
                item = next(queue, None)
                if item is None:
                    break
                name, arguments = item
                pending[remote.remote(*arguments, common)] = name
            if not pending:
                return
            done, _ = ray.wait(list(pending), num_returns=1)
            for reference in done:
                name = pending.pop(reference)
                yield name, _result(reference, name)
    finally:
        for reference in pending:
            ray.cancel(reference, force=False)


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_gpu(*arguments: Any) -> Any:
        with device.lent():
            return function(*arguments)

    return on_gpu


def _result(reference: Any, name: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else None
        if isinstance(cause, UserError):
            raise cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"{name}: its worker died four times ({type(error).__name__}); lower memory_per_worker or look at "
            "Ray's logs, then run the same command again: finished parts are kept",
            exit_code=1,
        ) from error
