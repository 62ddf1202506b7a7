"""One pass over images on Ray Data: decoded on CPU workers, through models on actors, a part at a time.

A row of the data set is a part (about a thousand images). `decode(task, shared)` turns its task into small arrays
on any CPU; an actor turns those into the part on disk and hands back its record alone. Queues are bounded: at
most a few decoded parts wait. Batches never cross a part and models compute on one CPU thread, so the bytes
are the same with any number of workers.
"""

import itertools
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.errors import UserError, mendable
from pipelines import cluster
from pipelines.cluster import Demand
from pipelines.context import Context
from pipelines.events import failed
from pipelines.run_directory import Generation, PartRecord

Decoded = Mapping[str, Any]
"""What a decode worker hands to an actor: numpy arrays, bytes, anything picklable."""

PARTS_AT_ONCE = 4096
"""Parts of one Ray data set: millions of blocks in one would burden the driver."""
RETRIES = 3
REFUSED = "refused"
DECODE_CPUS, ACTOR_CPUS = 0.5, 0.4
"""Of a decode task, and of an actor, where there is no GPU: as many of each as there are cores, so that whoever has
work uses them. They differ because Ray Data would otherwise fuse the two steps into one that never overlaps."""
IN_FLIGHT_PER_ACTOR = 2


def image_pass(
    context: Context,
    generation: Generation | Sequence[Generation],
    tasks: Sequence[tuple[str, Any]],
    *,
    decode: Callable[[Any, Any], Decoded],
    model: type,
    model_arguments: Mapping[str, Any],
    shared: Any = None,
    num_gpus: float = 0,
    note: str = "",
) -> None:
    """Make the parts that are not there yet and put the records of all into `generation.parts`, in task order.

    tasks: (part name, anything picklable and small). decode(task, shared) -> Decoded, on CPU workers.
    model: a class; each actor makes `model(**model_arguments)` once and calls it with (part name, Decoded); it writes
    the part through the PartWriter that it was given and returns its PartRecord. With several generations (one decode
    for several models) it returns a list, one record per generation. A worker that dies is tried again; a
    UserError stops the stage.
    """
    several = [generation] if isinstance(generation, Generation) else list(generation)
    finished = [g.find(name for name, _ in tasks) for g in several]
    found = {name: [records.get(name) for records in finished] for name, _ in tasks}
    records: dict[str, list[PartRecord]] = {}
    for name, candidates in found.items():
        there = [record for record in candidates if record is not None]
        if len(there) == len(several):
            records[name] = there
    missing = [(name, task) for name, task in tasks if name not in records]
    extra = {"note": note} if note else {}
    for index, one in enumerate(several):
        one.parts = [made[index] for made in records.values()]
        context.events.emit("parts", one.fingerprint.stage, total=len(tasks), done=len(records), **extra)
    if missing:
        context.start()
        workers = Workers.of(context, num_gpus)
        for demand in (workers.decode, workers.actor):
            context.ask(demand, workers.both)
        for name, made in _persistently(missing, decode, shared, model, model_arguments, workers):
            records[name] = made
            for one, record in zip(several, made, strict=True):
                context.keep(one, record)
                context.events.emit(
                    "part",
                    one.fingerprint.stage,
                    part=name,
                    rows=record.rows,
                    done=len(records),
                    total=len(tasks),
                    **failed(record.counts),
                    **extra,
                )
    for index, one in enumerate(several):
        one.parts = [records[name][index] for name, _ in tasks]


@dataclass(frozen=True)
class Workers:
    """What a decode task and an actor ask for. grows: the actors follow the size of the cluster."""

    decode: Demand
    actor: Demand
    grows: bool

    @staticmethod
    def of(context: Context, num_gpus: float) -> "Workers":
        """From `resources.stages`, where the stage is named there. num_gpus: of an actor, if nothing else is said."""
        asks, cpus = context.asks, context.asks.cpus
        more: dict[str, Any] = {"memory_bytes": asks.memory_bytes, "custom": context.custom}
        if num_gpus:
            workers = Demand(cpus or 1, 0, **more), Demand(0, asks.gpus or num_gpus, **more)
        else:
            actor_cpus = ACTOR_CPUS if cpus is None else cpus * ACTOR_CPUS / DECODE_CPUS
            workers = Demand(cpus or DECODE_CPUS, 0, **more), Demand(actor_cpus, 0, **more)
        return Workers(*workers, context.resources.ray_address is not None)

    @property
    def both(self) -> Demand:
        """A decode task beside an actor."""
        one, other = self.decode, self.actor
        memory = (one.memory_bytes or 0) + (other.memory_bytes or 0)
        return Demand(one.num_cpus + other.num_cpus, other.num_gpus, memory, {k: 2 * v for k, v in one.custom.items()})

    def pool(self, parts: int) -> dict[str, int]:
        """Sizes of the pool of actors."""
        cores = min(cluster.cpus(), max(1, cluster.slots(self.both)))
        count = actors(parts, self.actor.num_gpus, cores, cluster.gpus())
        return {"min_size": 1, "initial_size": count, "max_size": parts} if self.grows else {"size": count}


def actors(parts: int, num_gpus: float, cpus: int, gpus: float) -> int:
    """How many model actors: one per GPU share where GPUs are used, else one per core; never more than parts."""
    most = int(gpus / num_gpus) if num_gpus else cpus
    return max(1, min(most, parts))


def _persistently(tasks: Sequence[tuple[str, Any]], *arguments: Any) -> Iterator[tuple[str, list[PartRecord]]]:
    """`_run`, started again for what is left when an actor died; given up after RETRIES deaths without a new part."""
    left = dict(tasks)
    deaths = 0
    while left:
        try:
            for name, made in _run(list(itertools.islice(left.items(), PARTS_AT_ONCE)), *arguments):
                del left[name]
                deaths = 0
                yield name, made
        except _WorkerDiedError as death:
            deaths += 1 if death.may_pass else RETRIES + 1
            if deaths > RETRIES:
                raise _give_up(death, left) from death


def _give_up(death: BaseException, left: Mapping[str, Any]) -> UserError:
    return UserError(
        f"the workers of the image pass keep dying ({death}); the first part left is {next(iter(left))}: "
        "use fewer workers or look at Ray's logs, then run the same command again (finished parts are kept)",
        exit_code=1,
    )


class _WorkerDiedError(Exception):
    """A process of the pass ended without an answer: an actor or a machine once, or a decode worker every time."""

    def __init__(self, kind: str, may_pass: bool) -> None:
        super().__init__(kind)
        self.may_pass = may_pass


def _run(
    tasks: Sequence[tuple[str, Any]],
    decode: Callable[[Any, Any], Decoded],
    shared: Any,
    model: type,
    model_arguments: Mapping[str, Any],
    workers: Workers,
) -> Iterator[tuple[str, list[PartRecord]]]:
    import ray
    import ray.data

    _configure(ray.data.DataContext.get_current())
    rows = [{"name": name, "task": pickle.dumps(task)} for name, task in tasks]
    dataset = _without_deprecations(
        lambda: (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                _decode_part,
                fn_kwargs={"decode": decode, "shared": ray.put(shared)},
                batch_size=None,
                batch_format="pyarrow",
                concurrency=None if workers.grows else min(cluster.cpus(), len(tasks)),
                max_retries=RETRIES,
                **_asked(workers.decode),
            )
            .map_batches(
                _Actor,
                fn_constructor_args=(model, dict(model_arguments)),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(
                    **workers.pool(len(tasks)), max_tasks_in_flight_per_actor=IN_FLIGHT_PER_ACTOR
                ),
                max_restarts=0,
                max_task_retries=0,
                **_asked(workers.actor),
            )
        )
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for name, text in zip(batch["name"].to_pylist(), batch["answer"].to_pylist(), strict=True):
                answer = json.loads(text)
                if REFUSED in answer:
                    raise UserError(*answer[REFUSED])
                yield name, [PartRecord(**entry) for entry in answer["records"]]
    except ray.exceptions.RayError as error:
        raise _translated(error) from error


def _asked(demand: Demand) -> dict[str, Any]:
    """A demand as Ray Data takes it."""
    asked = {"num_cpus": demand.num_cpus, "num_gpus": demand.num_gpus or None, "memory": demand.memory_bytes}
    return {k: v for k, v in asked.items() if v is not None} | ({"resources": demand.custom} if demand.custom else {})


def _decode_part(batch: pa.Table, decode: Callable[[Any, Any], Decoded], shared: Any) -> pa.Table:
    """One part: its task to its arrays, packed so that the actor reads them in place."""
    (name,), (task,) = batch["name"].to_pylist(), batch["task"].to_pylist()
    try:
        return pack(name, decode(pickle.loads(task), _fetched(shared)))
    except (UserError, MemoryError, OSError) as error:
        return pack(name, {REFUSED: _refused(error, name)})


_shared_values: dict[Any, Any] = {}


def _fetched(reference: Any) -> Any:
    """What all parts share, fetched once per worker process."""
    import ray

    if reference not in _shared_values:
        _shared_values.clear()
        _shared_values[reference] = ray.get(reference)
    return _shared_values[reference]


def _refused(error: Exception, name: str) -> tuple[str, int]:
    """What travels as an answer; raises the error if it is none that a user can mend."""
    told = mendable(error, name)
    if told is None:
        raise error
    return str(told), told.exit_code


class _Actor:
    """Holds the model; one call is one part. A UserError travels as an answer: Ray Data would bury its sentence."""

    def __init__(self, model: type, arguments: Mapping[str, Any]) -> None:
        self._refusal: UserError | None = None
        try:
            self._model = model(**arguments)
        except UserError as error:
            self._refusal = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        name, decoded = unpack(batch)
        try:
            answer = self._answer(name, decoded)
        except (UserError, MemoryError, OSError) as error:
            answer = {REFUSED: _refused(error, name)}
        return pa.table({"name": [name], "answer": [json.dumps(answer)]})

    def _answer(self, name: str, decoded: dict[str, Any]) -> dict[str, Any]:
        if REFUSED in decoded:
            return {REFUSED: decoded[REFUSED]}
        if self._refusal is not None:
            raise self._refusal
        made = self._model(name, decoded)
        made = [made] if isinstance(made, PartRecord) else list(made)
        return {"records": [asdict(record) for record in made]}


def pack(name: str, decoded: Decoded) -> pa.Table:
    """A table of one row whose arrays lie in one buffer (pickle protocol 5, out of band)."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(dict(decoded), protocol=5, buffer_callback=buffers.append)
    pieces = [buffer.raw() for buffer in buffers]
    lengths = json.dumps([piece.nbytes for piece in pieces])
    body = np.empty(sum(piece.nbytes for piece in pieces), np.uint8)
    at = 0
    for piece in pieces:
        body[at : at + piece.nbytes] = np.frombuffer(piece, np.uint8)
        at += piece.nbytes
    offsets = pa.array([0, len(body)], pa.int64()).buffers()[1]
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(body)])
    return pa.table({"name": [name], "lengths": [lengths], "head": pa.array([head], pa.large_binary()), "body": column})


def unpack(batch: pa.Table) -> tuple[str, dict[str, Any]]:
    """The inverse of `pack`; arrays are read-only views into the table."""
    body = memoryview(batch["body"].chunk(0)[0].as_buffer()).toreadonly()
    buffers, at = [], 0
    for length in json.loads(batch["lengths"][0].as_py()):
        buffers.append(body[at : at + length])
        at += length
    return batch["name"][0].as_py(), pickle.loads(batch["head"][0].as_py(), buffers=buffers)


def _configure(settings: Any) -> None:
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.max_consecutive_actor_init_deaths = RETRIES
    settings.execution_no_progress_timeout_s = -1
    log = logging.getLogger("ray.data")
    for handler in list(log.handlers):
        if type(handler).__name__ == "PlainRayHandler":  # the terminal is the command line's; the file keeps all
            log.removeHandler(handler)


def _without_deprecations[T](make: Callable[[], T]) -> T:
    """Ray 2.60 announces the end of max_retries and max_restarts in map_batches and offers nothing in their place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _translated(error: BaseException) -> BaseException:
    """_WorkerDiedError for a death; else the error, which is ours to mend."""
    import ray

    passing = (
        ray.exceptions.ActorDiedError,
        ray.exceptions.ActorUnavailableError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
    )
    deaths = (*passing, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
    chain: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is not None and one not in chain:
            chain.append(one)
            cause = getattr(one, "cause", None)
            queue += [one.__cause__, one.__context__, cause if isinstance(cause, BaseException) else None]
    for one in chain:
        if isinstance(one, deaths):
            return _WorkerDiedError(type(one).__name__, isinstance(one, passing))
    return error
