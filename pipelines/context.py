"""What a stage is given: the run, the seed, the resources; and how its parts are spread over Ray.

A stage's `execute(context, config)` opens its generation with `begin_rows` (each input generation is
processed once, results add up) or `begin_snapshot` (the newest generation replaces the older ones), makes
its parts with `map_parts`, and ends with `finish`. Equal and complete: skipped; incomplete: the missing parts
are done; different: refused with the difference, unless told to rebuild.
"""

import dataclasses
import json
import math
import platform
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from curation import device, storage
from curation.errors import UserError
from pipelines import cluster, lock
from pipelines.events import Events, failed
from pipelines.resources import Resources, StageConfig, StageResources
from pipelines.run_directory import Fingerprint, Generation, PartRecord, PartWriter, RunDirectory, StageDirectory

__all__ = [
    "Context",
    "MadeOtherwiseError",
    "Outcome",
    "PartFunction",
    "Resources",
    "StageConfig",
    "StageResources",
    "backend",
]

SAVE_S = 30.0
"""How often a stage under way says in `_stage.json` which parts it has finished."""


class MadeOtherwiseError(UserError):
    """A stage's output is there, made with other options or inputs."""


@dataclass
class Outcome:
    """What a stage did, for the summary and `--json`."""

    stage: str
    skipped: bool
    rows: int
    summary: dict[str, Any]
    out: str


PartFunction = Callable[[PartWriter, str, Any, Any], PartRecord]
"""(writer, part name, the part's task, what all parts share) -> record. Runs in a Ray worker."""


@dataclass
class Context:
    """The surroundings of a stage. `out` is set when a command works on plain Parquet without a run."""

    run: RunDirectory
    seed: int = 0
    resources: Resources = field(default_factory=lambda: Resources())  # noqa: PLW0108 - mypy wants the call
    events: Events = field(default_factory=lambda: Events(None))
    rebuild: bool = False
    out: str | None = None
    asks: StageResources = field(default_factory=lambda: StageResources())  # noqa: PLW0108 - mypy wants the call
    _started: dict[str, float] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def for_stage(self, name: str) -> "Context":
        """The same surroundings with what `resources.stages` says of a stage: its tasks ask for that."""
        asks = self.resources.stages.get(name, StageResources())  # type: ignore[call-arg]
        return dataclasses.replace(self, resources=self.resources.of_stage(name), asks=asks)

    def stage(self, name: str) -> StageDirectory:
        """Where a stage's output lies: in the run, or directly in `out`."""
        if self.out is not None:
            return StageDirectory(self.out, name, flat=True)
        return self.run.stage(name)

    def begin_rows(
        self,
        name: str,
        revision: int,
        options: Mapping[str, Any],
        inputs: Sequence[str],
        libraries: Sequence[str] = (),
        extra_inputs: Mapping[str, Any] | None = None,
    ) -> Generation | None:
        """Open the generation that takes the input generations not yet processed; None: nothing to do.

        inputs: names of stages. extra_inputs: digests of further inputs (all of them in every generation).
        """
        available = {i: self._complete(i, name) for i in inputs}
        directory = self.stage(name)
        known = self._known(directory)
        done: dict[str, set[int]] = {i: set() for i in inputs}
        current: Generation | None = None
        for generation in known:
            consumed = {i: [g for g in available[i] if g.number in generation.consumed.get(i, [])] for i in inputs}
            wanted = self._fingerprint(name, revision, options, consumed, libraries, extra_inputs)
            self._refuse_difference(directory, generation, wanted)
            for i in inputs:
                done[i] |= set(generation.consumed.get(i, []))
            if not generation.complete:
                current = generation
        if current is not None:
            return self._open(directory, current)
        fresh = {i: [g for g in available[i] if g.number not in done[i]] for i in inputs}
        if known and not any(fresh.values()):
            self._skip(directory, known[-1])
            return None
        return self._create(directory, len(known), name, revision, options, fresh, libraries, extra_inputs)

    def begin_snapshot(
        self,
        name: str,
        revision: int,
        options: Mapping[str, Any],
        inputs: Sequence[str],
        libraries: Sequence[str] = (),
        extra_inputs: Mapping[str, Any] | None = None,
        renewed_by: Mapping[str, str] | None = None,
    ) -> Generation | None:
        """Open the generation made from all complete input generations; None: it is there already.

        renewed_by: digests of further inputs, "" for nothing, whose change is no refusal but the next generation.
        """
        renewed = {key: value for key, value in (renewed_by or {}).items() if value}
        available = {i: self._complete(i, name) for i in inputs}
        directory = self.stage(name)
        everything = {i: [g.number for g in available[i]] for i in inputs}
        known = self._known(directory)
        for generation in known:
            consumed = {i: [g for g in available[i] if g.number in generation.consumed.get(i, [])] for i in inputs}
            extra: Mapping[str, Any] = {**(extra_inputs or {}), **_recorded(generation, renewed_by)}
            if generation.complete and generation.consumed != everything:
                # About to be replaced: what it was made of beside the stages may have changed with them.
                extra = {k: v for k, v in generation.fingerprint.inputs.items() if k not in inputs}
            wanted = self._fingerprint(name, revision, options, consumed, libraries, extra)
            if generation is known[-1]:
                self._refuse_difference(directory, generation, wanted)
        number = len(known)
        if known and _recorded(known[-1], renewed_by) == renewed:
            if not known[-1].complete:
                return self._open(directory, known[-1])
            if known[-1].consumed == everything:
                self._skip(directory, known[-1])
                return None
        elif known and not known[-1].complete:
            number = known[-1].number  # begun with others: of another fingerprint, its parts count as not there
        extra = {**(extra_inputs or {}), **renewed}
        return self._create(directory, number, name, revision, options, available, libraries, extra)

    def begin_keyed(
        self,
        name: str,
        revision: int,
        options: Mapping[str, Any],
        key: Mapping[str, Any],
        libraries: Sequence[str] = (),
    ) -> Generation | None:
        """Open the generation whose inputs are `key` (a source's number and digest); None: it is complete.

        Stages that bring images in have one generation per source, and one per retry.
        """
        directory = self.stage(name)
        known = self._known(directory)
        wanted = Fingerprint(name, revision, {**options, "seed": self.seed}, dict(key), backend(libraries))
        for generation in known:
            if generation.fingerprint.inputs.get("source") == key.get("source") and generation.fingerprint.inputs.get(
                "retry"
            ) == key.get("retry"):
                self._refuse_difference(directory, generation, wanted)
                if not generation.complete:
                    return self._open(directory, generation)
                self._skip(directory, generation)
                return None
        generation = Generation(
            number=len(known),
            directory=directory.generation_directory(len(known)),
            fingerprint=wanted,
            consumed={},
        )
        self.run.note(name)
        directory.save(generation)
        self.events.emit("stage_start", name, generation=generation.number, resumed=False)
        return generation

    def map_parts(
        self,
        generation: Generation,
        tasks: Sequence[tuple[str, Any]],
        function: PartFunction,
        *,
        shared: Any = None,
        num_cpus: float = 1,
        memory_bytes: int | None = None,
        heavy: bool = False,
    ) -> None:
        """Make the parts that are not there yet: function(writer, name, task, shared) in Ray tasks.

        tasks: (part name, anything picklable and small), names unique and sorted in the order of rows.
        shared: put into Ray's object store once. A worker that dies is tried again; a UserError stops the stage.
        heavy: as for `spread`.
        """
        writer = generation.writer
        records = generation.find(part_name for part_name, _ in tasks)
        missing = [(part_name, task) for part_name, task in tasks if part_name not in records]
        generation.parts = list(records.values())
        stage = generation.fingerprint.stage
        self.events.emit("parts", stage, total=len(tasks), done=len(records))
        if missing:
            calls = ((part_name, (writer, part_name, task)) for part_name, task in missing)
            for part_name, record in self.spread(
                function, calls, shared=shared, num_cpus=num_cpus, memory_bytes=memory_bytes, heavy=heavy
            ):
                records[part_name] = record
                self.keep(generation, record)
                done = {"rows": record.rows, "done": len(records), "total": len(tasks), **failed(record.counts)}
                self.events.emit("part", stage, part=part_name, **done)
        generation.parts = [records[part_name] for part_name, _ in tasks]

    def spread(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        shared: Any = None,
        num_cpus: float = 1,
        memory_bytes: int | None = None,
        heavy: bool = False,
    ) -> Iterable[tuple[str, Any]]:
        """Run function(*arguments, shared) for each (name, arguments) on Ray; yields (name, result) as they end.

        A bounded number is in flight. Whoever sums results must do so in the order of names, not of arrival.
        heavy: these are tasks of products, as those of a function marked by `curation.device.heavy` always are: each is
        lent a share of a GPU where the cluster has any. The result is the same.
        """
        self.start()
        share = 0.0
        if heavy or device.is_heavy(function):
            share = self._gpu_share()
        demand = cluster.Demand(
            num_cpus=self.asks.cpus or num_cpus,
            num_gpus=share,
            memory_bytes=memory_bytes if self.asks.memory is None else self.asks.memory_bytes,
            custom=self.custom,
        )
        self.ask(demand)
        return cluster.spread(function, calls, shared=shared, **vars(demand))

    def start(self) -> None:
        """Join or start Ray. Raises UserError where it cannot be had, or where a machine of it does not see the run."""
        cluster.start(self.resources.ray_address, self.resources.workers)
        if self.resources.ray_address is not None:
            cluster.require_seen(self.out or self.run.root, "run")

    @property
    def custom(self) -> dict[str, float]:
        """Custom resources of a task: a cluster has them, Ray in this process does not."""
        return self.asks.custom if self.resources.ray_address is not None else {}

    def ask(self, demand: cluster.Demand, least: cluster.Demand | None = None) -> None:
        """Refuse what this machine can never give; on a cluster, which may grow, say that it is waited for.

        least: what has to fit on one machine where there is but one (`demand`, if not given).
        """
        joined = self.resources.ray_address is not None
        lacking = cluster.lacking(demand if joined else (least or demand))
        if lacking is None:
            return
        if not joined:
            raise UserError(f"resources: a task asks for {lacking}; ask for less in resources.stages")
        if lacking not in self._told:
            self._told.add(lacking)
            text = f"no machine of the cluster has {lacking} yet: tasks wait until one joins"
            self.events.emit("warning", None, text=text)

    def _gpu_share(self) -> float:
        """Of a GPU, for a task of products; 0: it has none."""
        if not cluster.gpus():
            return 0.0
        if self.asks.gpus is not None:
            return self.asks.gpus
        tasks = self.resources.tasks_per_gpu
        return math.floor(1e4 / tasks) / 1e4 if tasks else 0.0  # Ray counts so finely

    def keep(self, generation: Generation, record: PartRecord) -> None:
        """A part is finished. Now and then `_stage.json` is told, so that a resumed stage need not read it again."""
        generation.parts.append(record)
        stage, now = generation.fingerprint.stage, time.monotonic()
        if now >= self._due.setdefault(stage, now + SAVE_S):
            lock.confirm(self.run.root)
            self.stage(stage).save(generation)
            took_s = time.monotonic() - now
            self._due[stage] = time.monotonic() + max(SAVE_S, 20 * took_s)

    def finish(self, generation: Generation, summary: Mapping[str, Any]) -> Outcome:
        """Mark a generation complete. summary: counts for the report; no timings, hosts or paths."""
        lock.confirm(self.run.root)
        generation.summary = dict(summary)
        generation.complete = True
        stage = generation.fingerprint.stage
        directory = self.stage(stage)
        rows = sum(part.rows for part in generation.parts)
        seconds = round(time.time() - self._started.get(stage, time.time()), 3)
        timing = {
            "stage": stage,
            "generation": generation.number,
            "seconds": seconds,
            "rows": rows,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "python": platform.python_version(),
        }
        name = "_timings.json" if self.out is not None else f"_timings-{generation.number:04d}.json"
        storage.write_whole(storage.join(directory.directory, name), (json.dumps(timing, indent=1) + "\n").encode())
        directory.save(generation)
        self.events.emit("stage_end", stage, seconds=seconds, rows=rows, summary=dict(summary))
        return Outcome(stage, False, rows, dict(summary), generation.directory)

    def skipped(self, name: str) -> Outcome:
        """The outcome of a stage that was there already (or had nothing to do)."""
        directory = self.stage(name)
        generations = directory.generations()
        if not generations:
            return Outcome(name, True, 0, {}, directory.directory)
        last = generations[-1]
        return Outcome(name, True, sum(p.rows for p in last.parts), last.summary, last.directory)

    def _complete(self, stage: str, wanted_by: str) -> list[Generation]:
        generations = self.run.stage(stage).all_generations()
        if any(not g.complete for g in generations):
            raise UserError(
                f"{self.run.path(stage)} is not finished, and {wanted_by} needs it: finish `curate {stage}` first"
            )
        return generations

    def _known(self, directory: StageDirectory) -> list[Generation]:
        if self.rebuild and directory.name not in self._started:
            directory.clear()
        self._started[directory.name] = time.time()
        return directory.all_generations()

    def _fingerprint(
        self,
        name: str,
        revision: int,
        options: Mapping[str, Any],
        inputs: Mapping[str, Sequence[Generation]],
        libraries: Sequence[str],
        extra_inputs: Mapping[str, Any] | None,
    ) -> Fingerprint:
        digests: dict[str, Any] = {i: [g.digest for g in generations] for i, generations in inputs.items()}
        return Fingerprint(
            name, revision, {**options, "seed": self.seed}, {**digests, **(extra_inputs or {})}, backend(libraries)
        )

    def _refuse_difference(self, directory: StageDirectory, old: Generation, wanted: Fingerprint) -> None:
        if old.fingerprint.digest != wanted.digest:
            raise MadeOtherwiseError(
                f"{directory.directory} was made otherwise ({old.fingerprint.difference(wanted)}): "
                "use another output folder, go back to those settings, or pass --rebuild"
            )

    def _open(self, directory: StageDirectory, generation: Generation) -> Generation:
        self.events.emit("stage_start", directory.name, generation=generation.number, resumed=True)
        return generation

    def _skip(self, directory: StageDirectory, generation: Generation) -> None:
        self.events.emit("stage_skip", directory.name, generation=generation.number)

    def _create(
        self,
        directory: StageDirectory,
        number: int,
        name: str,
        revision: int,
        options: Mapping[str, Any],
        inputs: Mapping[str, Sequence[Generation]],
        libraries: Sequence[str],
        extra_inputs: Mapping[str, Any] | None,
    ) -> Generation:
        if directory.flat and storage.list_files(directory.directory, ".parquet"):
            raise UserError(
                f"{directory.directory} already holds Parquet files that `curate {name}` did not write: "
                "choose an empty folder for --out"
            )
        generation = Generation(
            number=number,
            directory=directory.generation_directory(number),
            fingerprint=self._fingerprint(name, revision, options, inputs, libraries, extra_inputs),
            consumed={i: [g.number for g in generations] for i, generations in inputs.items()},
        )
        if not directory.flat:
            self.run.note(name)
        directory.save(generation)
        self.events.emit("stage_start", name, generation=number, resumed=False)
        return generation


def _recorded(generation: Generation, renewed_by: Mapping[str, str] | None) -> dict[str, Any]:
    return {key: generation.fingerprint.inputs[key] for key in renewed_by or {} if key in generation.fingerprint.inputs}


def backend(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of the libraries whose arithmetic decides a stage's output."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
