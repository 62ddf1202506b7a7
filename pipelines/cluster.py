"""Ray: started in this process, or joined by address; tasks spread with a bounded number in flight."""

import contextlib
import json
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from curation import device, storage
from curation.errors import GO_ON, UserError, mendable
from pipelines.ray_watch import Watch

IN_FLIGHT_PER_SLOT = 3
"""What waits beyond what runs keeps workers busy, and is what an autoscaler sees."""
LOOK_AGAIN_S = 5.0
"""How often the size of the cluster is asked for: machines join and leave."""
LOSSES = 3
"""Times a task is handed in again after the machines that Ray itself tried it on were lost."""
PROBE_S = 120.0
START_ATTEMPTS = 3
WORKER_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "TOKENIZERS_PARALLELISM": "false"}
FOLDER = "CURATE_FOLDER"
"""Environment variable: where relative paths start, for the workers of a cluster that was joined."""
VARIABLES = "environment"
"""File beside the code of a submitted job: NAME=VALUE as a shell reads it."""
HOOK = "pipelines.cluster.set_up_worker"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in a submitted job, whose runtime environment the workers have already."""


@dataclass(frozen=True)
class Demand:
    """What one task asks a machine for. num_gpus: the share of a GPU that `curation.device` lends to it."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """By Ray's names, without what is not asked for."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_bytes or 0, **self.custom}
        return {name: amount for name, amount in named.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """As Ray's options."""
        asked = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "memory": self.memory_bytes}
        found: dict[str, Any] = {name: amount for name, amount in asked.items() if amount or name == "num_cpus"}
        return found | ({"resources": dict(self.custom)} if self.custom else {})


def start(address: str | None, workers: int | None) -> None:
    """Join the cluster at `address`, or start Ray in this process; nothing if it runs already."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of parts that nobody asks for once one has failed
    os.environ.setdefault("RAY_task_oom_retries", "3")  # Ray's own is for ever
    # Ray starts for ever where a worker that it starts ahead of any task dies while it registers.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    if ray.is_initialized():
        return
    os.environ |= {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    if address:
        _join(address)
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        watch = Watch()
        try:
            ray.init(
                address="local",
                num_cpus=workers or os.cpu_count(),
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=bool(os.environ.get("CURATE_WORKER_LOGS")),
            )
            watch.started.set()
            return
        except Exception as error:  # Ray raises bare Exceptions when a busy machine is late to start it
            watch.stop()
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise UserError(f"Ray cannot be started on this machine: {reason}", exit_code=1) from error


def _join(address: str) -> None:
    import ray

    try:
        with tempfile.TemporaryDirectory(prefix="curate-code-") as folder:
            ray.init(
                address=address,
                logging_level="ERROR",
                log_to_driver=bool(os.environ.get("CURATE_WORKER_LOGS")),
                runtime_env=_environment(folder),
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Ray cannot be reached at {address}: {reason}", exit_code=1) from error


def _environment(folder: str) -> dict[str, Any]:
    """The runtime environment of the workers: this very code, which a copy in `folder` ships to every machine."""
    from pipelines import submission

    if JOB in os.environ:
        given = json.loads(os.environ[JOB]).get("runtime_env", {}).get("env_vars", {})
        return {"env_vars": {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in given}}
    return {
        "env_vars": WORKER_ENVIRONMENT | {FOLDER: os.getcwd()},
        "py_modules": submission.copy_packages(folder),
        "worker_process_setup_hook": HOOK,
    }


def set_up_worker() -> None:
    """In a worker as it starts: relative paths begin where they do for the command that joined the cluster, and a
    job's environment variables are those of its driver."""
    with contextlib.suppress(OSError), open(VARIABLES, encoding="utf-8") as file:
        os.environ |= dict(line.split("=", 1) for line in shlex.split(file.read()))
    with contextlib.suppress(OSError):
        os.chdir(os.environ.get(FOLDER, "."))


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


def slots(demand: Demand, beside: Demand | None = None) -> int:
    """How many tasks with this demand the living machines can run at once; 0 where Ray does not run.

    beside: one task that has to fit on each machine as well, where it fits at all.
    """
    return sum(_fitting(demand.amounts, _left(node, beside.amounts if beside else {})) for node in _machines().values())


def _fitting(amounts: Mapping[str, float], node: Mapping[str, float]) -> int:
    return int(min((node.get(name, 0.0) / amount + 1e-9 for name, amount in amounts.items()), default=0.0))


def _left(node: Mapping[str, float], amounts: Mapping[str, float]) -> dict[str, float]:
    fits = all(node.get(name, 0.0) >= amount for name, amount in amounts.items())
    return {name: has - (amounts.get(name, 0.0) if fits else 0.0) for name, has in node.items()}


def living() -> frozenset[str]:
    """Ids of the machines that are there."""
    return frozenset(_machines())


def lacking(demand: Demand) -> str | None:
    """What no living machine has, as `8 CPU and 2 egress`; None where one has it all, or Ray does not run."""
    machines = _machines()
    amounts = {name: a for name, a in demand.amounts.items() if name != "GPU" or a > 1}
    if not machines or any(all(m.get(name, 0.0) >= a for name, a in amounts.items()) for m in machines.values()):
        return None
    short = {name: a for name, a in amounts.items() if all(m.get(name, 0.0) < a for m in machines.values())}
    return " and ".join(
        f"{amount / 2**30:.3g} GiB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in (short or amounts).items()
    )


def _machines() -> dict[str, dict[str, float]]:
    """Resources of each living machine, by its node id."""
    import ray

    if not ray.is_initialized():
        return {}
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


_seen: set[tuple[str, str]] = set()
"""(folder, node id) of what was found to be shared."""


def require_seen(folder: str, what: str) -> None:
    """A local folder must be the same one on every machine that runs tasks; nothing for an object store.

    Raises UserError that names a machine that does not see it. A machine that joins later is not asked.
    """
    if not storage.is_local(folder):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = os.path.abspath(storage.filesystem(folder)[1])
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and (path, node["NodeID"]) not in _seen
    ]
    if not others:
        return
    probe = os.path.join(path, f".seen-{uuid.uuid4().hex}")
    storage.write_whole(probe, b"")
    asking = {
        ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(probe): node
        for node in others
    }
    try:
        blind = []
        done, _ = ray.wait(list(asking), num_returns=len(asking), timeout=PROBE_S)
        for reference in done:
            # A machine that was lost before it answered sees nothing, and does no harm.
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(reference):
                    _seen.add((path, asking[reference]["NodeID"]))
                else:
                    blind.append(reference)
    finally:
        os.unlink(probe)
    if blind:
        first = asking[blind[0]]["NodeManagerAddress"]
        raise UserError(
            f"{what}: {folder} is not the same folder on {len(blind)} of the cluster's machines (first: {first}): "
            "put it on a file system that all of them mount, or on an object store (s3://bucket/...)"
        )


def spread(
    function: Callable[..., Any],
    calls: Iterable[tuple[str, tuple[Any, ...]]],
    *,
    shared: Any = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory_bytes: int | None = None,
    custom: Mapping[str, float] | None = None,
) -> Iterator[tuple[str, Any]]:
    """function(*arguments, shared) for each (name, arguments), in Ray tasks; yields (name, result) as they end.

    The rest is what each asks for, as in `Demand`. As many are in flight as the cluster can run, and some that wait;
    it is asked again all the time, so that machines that join get work. A task whose machine is lost is done again.
    """
    import ray

    demand = Demand(num_cpus, num_gpus, memory_bytes, custom or {})
    options = demand.options | {"max_retries": 3}
    if num_gpus:
        # Ray would end a worker after each task that has a share of a GPU; many take less than importing torch.
        options |= {"max_calls": 0}
    remote = ray.remote(**options)(_on_gpu(function) if num_gpus else function)
    common = ray.put(shared)
    pending: dict[Any, tuple[str, tuple[Any, ...]]] = {}
    losses: dict[str, int] = {}
    queue = iter(calls)
    limit, asked = 0, float("-inf")
    try:
        while True:
            if time.monotonic() - asked > LOOK_AGAIN_S:
                limit, asked = max(2, IN_FLIGHT_PER_SLOT * slots(demand)), time.monotonic()
            while len(pending) < limit:
                item = next(queue, None)
                if item is None:
                    break
                pending[remote.remote(*item[1], common)] = item
            if not pending:
                return
            for reference in finished(list(pending)):
                name, arguments = pending.pop(reference)
                try:
                    answer = result(reference, name)
                except LostError as lost:
                    losses[name] = losses.get(name, 0) + 1
                    if losses[name] > LOSSES:
                        raise gave_up(name, lost.kind) from lost
                    pending[remote.remote(*arguments, common)] = (name, arguments)
                    continue
                yield name, answer
    finally:
        for reference in pending:
            ray.cancel(reference, force=False)


def finished(references: list[Any], fetch: bool = True) -> list[Any]:
    """Those that are done: waits for one, LOOK_AGAIN_S at most, then takes what else there is.

    fetch: done once it has been brought to this machine as well.
    """
    import ray

    done, waiting = ray.wait(references, num_returns=1, timeout=LOOK_AGAIN_S, fetch_local=fetch)
    if done and waiting:
        more, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=fetch)
        done = [*done, *more]
    return list(done)


class LostError(Exception):
    """The machine that ran a task, or held its result, is gone; or the actor. worker: the actor is."""

    def __init__(self, kind: str, worker: bool = False) -> None:
        super().__init__(kind)
        self.kind, self.worker = kind, worker


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_gpu(*arguments: Any) -> Any:
        with device.lent():
            return function(*arguments)

    return on_gpu


def result(reference: Any, name: str) -> Any:
    """What a task or an actor made of `name`.

    Raises LostError where it may be tried again elsewhere, UserError for what a user can mend, else its own error.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        # What was raised as it was made stands in the last line; nothing else of Ray's text is for anybody's eyes.
        made = "creation task" in str(error)
        why = f"{_kind(error)}: {str(error).strip().splitlines()[-1].strip()}" if made else _kind(error)
        raise LostError(why, worker=True) from error
    except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError) as error:
        raise LostError(_kind(error)) from error
    except ray.exceptions.OutOfMemoryError as error:
        raise UserError(
            f"{name}: out of memory (Ray ended its worker, the machine had none left); "
            f"lower memory_per_worker or use fewer workers, then {GO_ON}",
            exit_code=1,
        ) from error
    except ray.exceptions.WorkerCrashedError as error:
        raise gave_up(name, _kind(error)) from error
    except ray.exceptions.RayTaskError as error:  # behind the others: a lost argument is one of both
        cause = getattr(error, "cause", None)
        told = mendable(cause, name) if isinstance(cause, Exception) else None
        if told is not None:
            raise told from None
        raise


def _kind(error: BaseException) -> str:
    """Ray's name of an error; that of its cause where a task or an actor could not get at its argument."""
    return type(getattr(error, "cause", None) or error).__name__


def gave_up(name: str, kind: str) -> UserError:
    """Said of what died too often."""
    return UserError(
        f"{name}: its worker died every time it was tried ({kind}); lower memory_per_worker or look at "
        "Ray's logs, then run the same command again: finished parts are kept",
        exit_code=1,
    )
