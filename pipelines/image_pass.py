"""One pass over images in Ray: decoded by tasks on any CPU, through models on actors, a part at a time.

`decode(task, shared)` turns a part's task (about a thousand images) into small arrays; an actor turns those into the
part on disk and hands back its record alone. What is decoded lies in Ray's object store, read in place, and waits
there in bounded numbers. Batches never cross a part and models compute on one CPU thread, so the bytes are the same
with any number of workers. (Ray Data would do this too: it starts three more processes and imports pandas in each.)
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curation.errors import UserError, mendable
from pipelines import cluster
from pipelines.cluster import Demand
from pipelines.context import Context
from pipelines.events import failed
from pipelines.run_directory import Generation, PartRecord

Decoded = Mapping[str, Any]
"""What a decode worker hands to an actor: numpy arrays, bytes, anything picklable."""

RETRIES = 3
CPUS = 0.5
"""Of a decode task, and of an actor, where there is no GPU: as many of each as there are cores, so that whoever has
work uses them."""
QUEUED_PER_ACTOR = 2
"""Parts handed to one actor: the one it works on and the next."""


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
        for name, made in _Pass(missing, decode, shared, model, model_arguments, workers).run():
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
            workers = Demand(cpus or CPUS, 0, **more), Demand(cpus or CPUS, 0, **more)
        return Workers(*workers, context.resources.ray_address is not None)

    @property
    def both(self) -> Demand:
        """A decode task beside an actor."""
        one, other = self.decode, self.actor
        memory = (one.memory_bytes or 0) + (other.memory_bytes or 0)
        return Demand(one.num_cpus + other.num_cpus, other.num_gpus, memory, {k: 2 * v for k, v in one.custom.items()})

    def wanted(self, parts: int) -> int:
        """Actors for so many parts.

        Where the cluster may grow, one more than its GPUs: an autoscaler sees it wait. On CPUs it would take what
        decoding needs, and the autoscaler sees the decode tasks.
        """
        if not self.actor.num_gpus:
            return max(1, min(parts, cluster.cpus(), cluster.slots(self.both)))
        return max(1, min(parts, cluster.slots(self.actor, beside=self.decode) + self.grows))

    def decoders(self) -> int:
        """Decode tasks handed in at once; twice what fits where the cluster may grow."""
        return max(1, min(cluster.cpus(), cluster.slots(self.decode))) * (1 + self.grows)


class _Pass:
    """The tasks and actors of one pass, and where each part is between them."""

    def __init__(
        self,
        tasks: Sequence[tuple[str, Any]],
        decode: Callable[[Any, Any], Decoded],
        shared: Any,
        model: type,
        model_arguments: Mapping[str, Any],
        workers: Workers,
    ) -> None:
        import ray

        self._workers = workers
        self._left = len(tasks)
        self._tasks = deque(tasks)
        self._decode = ray.remote(max_retries=RETRIES, **workers.decode.options)(_decoded)
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **workers.actor.options)(_Actor)
        self._what = (decode, [ray.put(shared)])  # in a list, or Ray would read it again for each task
        self._model = ray.put((model, dict(model_arguments)))
        self._decoding: dict[Any, tuple[str, Any]] = {}
        self._waiting: deque[tuple[Any, tuple[str, Any], Collection[str]]] = deque()
        """What is decoded: its reference, its task, and the machines where it lies."""
        self._starting: dict[Any, Any] = {}
        self._queues: dict[Any, dict[Any, tuple[str, Any]]] = {}
        """By actor that has started: what it was handed, by the reference of its answer, in order."""
        self._machines: dict[Any, str] = {}
        self._deaths: Counter[str] = Counter()
        self._stillborn = 0
        self._looked = float("-inf")
        self._wanted = self._decoders = 1

    def run(self) -> Iterator[tuple[str, list[PartRecord]]]:
        """(part, its records) as they end. Raises UserError for what a user can mend, and after too many deaths."""
        try:
            while self._left:
                self._look()
                self._hand_out()
                answers = {answer: actor for actor, queue in self._queues.items() for answer in queue}
                for reference in cluster.finished([*self._starting, *self._decoding, *answers], fetch=False):
                    if reference in self._starting:
                        self._started(reference)
                    elif reference in self._decoding:
                        self._waiting.append((reference, self._decoding.pop(reference), _where(reference)))
                    elif (queue := self._queues.get(answers[reference])) and reference in queue:
                        made = self._answered(answers[reference], reference)
                        if made is not None:
                            self._left -= 1
                            self._stillborn = 0
                            yield made
        finally:
            self._end()

    def _look(self) -> None:
        """As many actors as the cluster has room for; looked at again all the time, or at once if there are none."""
        if time.monotonic() - self._looked <= cluster.LOOK_AGAIN_S and (self._starting or self._queues):
            return
        self._wanted, self._decoders = self._workers.wanted(self._left), self._workers.decoders()
        self._looked = time.monotonic()
        for _ in range(min(self._wanted, self._left) - len(self._starting) - len(self._queues)):
            actor = self._actor.remote(self._model)
            self._starting[actor.ready.remote()] = actor
        # Where a machine has left, actors would take what decoding needs for ever.
        idle = [actor for actor, queue in self._queues.items() if not queue]
        for _ in range(len(self._starting) + len(self._queues) - self._wanted):
            if self._starting:
                _kill(self._starting.popitem()[1])
            elif idle:
                self._end_actor(idle.pop())

    def _hand_out(self) -> None:
        """Decoded parts to the actors with the shortest queues; then tasks, if little enough waits to be computed."""
        while self._waiting and self._queues:
            actor, queue = min(self._queues.items(), key=lambda item: len(item[1]))
            if len(queue) >= QUEUED_PER_ACTOR:
                break
            place = nearest(self._machines[actor], [machines for _, _, machines in self._waiting])
            decoded, task, _ = self._waiting[place]
            del self._waiting[place]
            queue[actor.part.remote(task[0], decoded)] = task
        most = self._decoders + QUEUED_PER_ACTOR * max(1, len(self._queues))
        while self._tasks and len(self._decoding) < self._decoders and len(self._decoding) + len(self._waiting) < most:
            name, task = self._tasks.popleft()
            self._decoding[self._decode.remote(task, *self._what)] = (name, task)

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            self._machines[actor] = cluster.result(reference, "a model's worker")
            self._queues[actor] = {}
            self._stillborn = 0
        except cluster.LostError as lost:
            self._stillborn += 1
            if self._stillborn > RETRIES * self._wanted:
                raise cluster.gave_up("a model's worker", lost.kind) from lost

    def _answered(self, actor: Any, reference: Any) -> tuple[str, list[PartRecord]] | None:
        """The part and its records; None where the actor, or what it was to read, is lost."""
        name, task = self._queues[actor][reference]
        try:
            made = cluster.result(reference, name)
        except cluster.LostError as lost:
            if lost.worker and self._machines[actor] not in cluster.living():
                for other in [a for a, machine in self._machines.items() if machine == self._machines[actor]]:
                    self._end_actor(other)
                return None
            if lost.worker:
                # An actor works in order: it died of the first part, if of any.
                name, task = next(iter(self._queues[actor].values()))
                self._end_actor(actor)
            else:
                del self._queues[actor][reference]
                self._tasks.appendleft((name, task))
            self._deaths[name] += 1
            if self._deaths[name] > RETRIES:
                raise cluster.gave_up(name, lost.kind) from lost
            return None
        del self._queues[actor][reference]
        return name, [made] if isinstance(made, PartRecord) else list(made)

    def _end_actor(self, actor: Any) -> None:
        """Its parts are for others."""
        self._tasks.extendleft(reversed(self._queues.pop(actor).values()))
        del self._machines[actor]
        _kill(actor)

    def _end(self) -> None:
        """Nothing of the pass goes on: models free their memory and GPUs."""
        import ray

        for actor in [*self._starting.values(), *self._queues]:
            _kill(actor)
        for reference in self._decoding:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference, force=False)


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)


def nearest(machine: str, waiting: Sequence[Collection[str]]) -> int:
    """Which of the parts that wait, given the machines where each lies, to compute here: the first that lies here."""
    return next((place for place, machines in enumerate(waiting) if machine in machines), 0)


def _where(reference: Any) -> Collection[str]:
    """The machines where an object lies, as this process knows; none for a small one, which is part of the call."""
    from ray.experimental import get_local_object_locations

    return frozenset(get_local_object_locations([reference]).get(reference, {}).get("node_ids", ()))


def _decoded(task: Any, decode: Callable[[Any, Any], Decoded], shared: list[Any]) -> Decoded:
    return decode(task, _fetched(shared[0]))


_shared_values: dict[Any, Any] = {}


def _fetched(reference: Any) -> Any:
    """What all parts share, fetched once per worker process."""
    import ray

    if reference not in _shared_values:
        _shared_values.clear()
        _shared_values[reference] = ray.get(reference)
    return _shared_values[reference]


class _Actor:
    """Holds the model; one call is one part. What a user can mend of making it is raised by the calls."""

    def __init__(self, model: tuple[type, Mapping[str, Any]]) -> None:
        self._failure: UserError | None = None
        try:
            self._model = model[0](**model[1])
        except Exception as error:
            self._failure = mendable(error, "the model")
            if self._failure is None:
                raise

    def ready(self) -> str:
        """The machine it is on, once the model is there."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def part(self, name: str, decoded: Decoded) -> Any:
        if self._failure is not None:
            raise self._failure
        return self._model(name, decoded)
