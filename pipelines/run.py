"""Runs a whole configuration: check everything, then the stages in the order of `pipelines/catalog.py`.

A run goes on where it was stopped: each stage skips what is there and makes what is missing. RUN/run.yaml is the
configuration as resolved; when it changes, the former one is kept in RUN/history/.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import yaml

from curation import storage
from curation.errors import UserError
from pipelines import catalog, configuration, forget, lock, preflight, status
from pipelines.catalog import Stage
from pipelines.configuration import RunConfig
from pipelines.context import Context, MadeOtherwiseError, Outcome
from pipelines.events import Events
from pipelines.run_directory import RunDirectory
from pipelines.sources import source_name


def run(
    config: RunConfig,
    *,
    first: str | None = None,
    last: str | None = None,
    rebuild: str | None = None,
    events: Events | None = None,
) -> list[Outcome]:
    """Carry out `config` from stage `first` to stage `last`; stages from `rebuild` on are made again from nothing.

    Raises UserError before anything starts for what can be checked before, or when a stage cannot go on.
    """
    config = preflight.resolve(config)
    steps = selected(config, first, last)
    again = len(catalog.STAGES) if rebuild is None else catalog.position(rebuild, "--rebuild")
    preflight.check(config)
    with lock.hold(config.run):
        events = events or Events(storage.join(config.run, "events.jsonl"))
        context = Context(run=RunDirectory(config.run), seed=config.seed, resources=config.resources, events=events)
        forget.finish_pending(context)
        _refuse_gap(context, config, first)
        if any(stage.name == "mix" for stage in steps):
            roles = [s.role.split(":")[0] for s in config.sources] + [s.role for s in context.run.sources()]
            preflight.check_something_enters(config, "seed" in roles)
        todo = [
            s.name for s in steps if catalog.position(s.name, "stage") >= again or not is_complete(context.run, s.name)
        ]
        preflight.check_models(config, todo)
        store_configuration(config, events)
        _name_strangers(context, config)
        outcomes: list[Outcome] = []
        try:
            for stage in steps:
                rebuilt = catalog.position(stage.name, "stage") >= again
                outcomes += _execute(stage, dataclasses.replace(context, rebuild=rebuilt), config)
        except MadeOtherwiseError as error:
            raise MadeOtherwiseError(str(error).replace("--rebuild", f"`--rebuild {stage.name}`")) from None
        finally:
            events.flush()
        return outcomes


def selected(config: RunConfig, first: str | None, last: str | None) -> list[Stage]:
    """The stages of the configuration between two of them, both included. Raises UserError for unknown names."""
    start = 0 if first is None else catalog.position(first, "--from")
    stop = len(catalog.STAGES) if last is None else catalog.position(last, "--until")
    if start > stop:
        raise UserError(f"--from {first} comes after --until {last}: nothing would run")
    return [stage for stage in enabled(config) if start <= catalog.position(stage.name, "stage") <= stop]


def enabled(config: RunConfig) -> list[Stage]:
    """The stages that the configuration does not leave out. One entry stands for download and import together."""
    return [
        stage
        for stage in catalog.STAGES
        if stage.name != "import" and (stage.block is None or getattr(config, stage.block) is not None)
    ]


def _execute(stage: Stage, context: Context, config: RunConfig) -> Iterator[Outcome]:
    if stage.name not in catalog.INGEST:
        yield stage.execute(context.for_stage(stage.name), getattr(config, stage.block or ""))
        return
    stages = {entry.name: entry for entry in catalog.STAGES}
    for source in config.sources:
        kind, origin = source.origin
        about = {"role": source.role, "licence": source.licence, "exempt": source.exempt}
        if kind == "urls":
            asking = context.for_stage("download")
            yield stages["download"].execute(asking, config.download, urls=origin, **about)
        else:
            asking = context.for_stage("import")
            yield stages["import"].execute(asking, kind=kind, origin=origin, label_column=source.label_column, **about)


def _refuse_gap(context: Context, config: RunConfig, first: str | None) -> None:
    """`--from X` needs the stages before X to be there: on nothing they would make empty tables."""
    if first is None:
        return
    start = catalog.position(first, "--from")
    for stage in enabled(config):
        if catalog.position(stage.name, "stage") >= start:
            return
        if not is_complete(context.run, stage.name):
            raise UserError(
                f"--from {first}: {stage.name} is not finished in {context.run.root}; "
                f"start there with `--from {stage.name}`, or leave --from out"
            )


def is_complete(run: RunDirectory, name: str) -> bool:
    """Whether a stage has been done, for all models, and nothing of it is left half done. Ingest is one step."""
    names = catalog.INGEST if name in catalog.INGEST else (name,)
    tables = [stage.folders[-1] for stage in catalog.STAGES if stage.name in names]
    found = [run.stage(folder).all_generations() for table in tables for folder in status.folders(run, table)]
    generations = [generation for there in found for generation in there]
    return bool(generations) and all(generation.complete for generation in generations)


def store_configuration(config: RunConfig, events: Events) -> None:
    """Write RUN/run.yaml; a former one that says something else goes to RUN/history/ first, and is named."""
    path = storage.join(config.run, "run.yaml")
    text = configuration.dump(config)
    if storage.exists(path):
        former = storage.read_bytes(path)
        if former.decode(errors="replace") == text:
            return
        kept = len(storage.list_files(storage.join(config.run, "history"), ".yaml"))
        name = f"history/run-{kept:04d}.yaml"
        storage.write_whole(storage.join(config.run, name), former)
        events.emit("message", None, text=f"run.yaml: {difference(former, text)}; the former one is kept as {name}")
    storage.write_whole(path, text.encode())


def difference(former: bytes, text: str) -> str:
    """`key: was A, now B` for the keys in which two configurations differ."""
    try:
        old, new = preflight.flat(yaml.safe_load(former)), preflight.flat(yaml.safe_load(text))
    except (yaml.YAMLError, UnicodeDecodeError):
        return "the former one is not valid YAML"
    rows = [
        f"{key}: was {_shown(old, key)}, now {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return "; ".join(rows[:6]) + (f"; and {len(rows) - 6} more" if len(rows) > 6 else "") or "written otherwise"


def _shown(document: dict[str, Any], key: str) -> str:
    return str(document[key]) if key in document else "absent"


def _name_strangers(context: Context, config: RunConfig) -> None:
    """Sources that the run holds and the configuration does not list stay in it: said, not guessed at."""
    listed = {source_name(source.role, source.origin[1]) for source in config.sources}
    strangers = [source.name for source in context.run.sources() if source.name not in listed]
    if strangers:
        context.events.emit(
            "warning",
            None,
            text=f"{context.run.root} also holds {', '.join(strangers)}, which the configuration does not list: "
            "they stay part of the run",
        )
