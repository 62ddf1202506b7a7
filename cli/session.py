"""From options to a stage's context and back to the screen: what every stage command shares."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from cli.options import split_lists
from cli.terminal import ProgressDisplay, print_result
from curation import storage
from curation.errors import UserError
from pipelines import configuration, lock
from pipelines.context import Context, Outcome, Resources
from pipelines.events import Events
from pipelines.run_directory import RunDirectory

RunArgument = Annotated[
    str | None, typer.Argument(help="the run directory (a path or an fsspec URL)", show_default=False)
]
RayOption = Annotated[
    str | None, typer.Option("--ray-address", help="Ray cluster to use; default: this machine", show_default=False)
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="CPU cores to use; default: all", show_default=False)
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory-per-worker", help="memory one task may use, e.g. 4GiB", show_default=False)
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="of every random choice", show_default=False)]
RebuildOption = Annotated[bool, typer.Option("--rebuild", help="make the stage again from nothing")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def stored_block(run: str | None, block: str) -> dict[str, Any]:
    """The block of RUN/run.yaml that a stage command starts from; {} without one."""
    if run is None:
        return {}
    path = storage.join(run, "run.yaml")
    if not storage.exists(path):
        return {}
    document = configuration.load(path).model_dump(mode="json", by_alias=True)
    return dict(document.get(block) or {})


def stored_seed(run: str | None) -> int:
    """The seed of RUN/run.yaml, else 0."""
    if run is None or not storage.exists(storage.join(run, "run.yaml")):
        return 0
    return configuration.load(storage.join(run, "run.yaml")).seed


def resolve[M: BaseModel](model: type[M], run: str | None, block: str, overrides: dict[str, Any]) -> M:
    """The stage's configuration: defaults, then RUN/run.yaml, then the options given."""
    merged = stored_block(run, block) | split_lists(model, overrides)
    return configuration.check(model, merged, "the options" if overrides else "")


def context(
    run: str | None,
    *,
    out: str | None = None,
    seed: int | None = None,
    rebuild: bool = False,
    ray_address: str | None = None,
    workers: int | None = None,
    memory_per_worker: str | None = None,
    stage: str | None = None,
    display: ProgressDisplay,
) -> Context:
    """A stage's surroundings. With `out` and no run, results go directly into that folder.

    stage: whose entry of `resources.stages` counts.
    """
    root = run if run is not None else out
    if root is None:
        raise UserError("give a run directory, or --embeddings and --out")
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    stored = stored_block(run, "resources")
    merged = stored | {name: value for name, value in resources.items() if value is not None}
    events = Events(storage.join(root, "events.jsonl") if run is not None else None, display)
    made = Context(
        run=RunDirectory(root),
        seed=stored_seed(run) if seed is None else seed,
        resources=configuration.check(Resources, merged, ""),
        events=events,
        rebuild=rebuild,
        out=out if run is None else None,
    )
    return made.for_stage(stage) if stage else made


def carry_out(execute: Callable[[Context], Outcome], as_json: bool, *, run: str | None, **surroundings: Any) -> Outcome:
    """Run a stage under the lock of its folder and print what it did. surroundings: as `context` takes them.

    Raises UserError for a run directory that is not there.
    """
    if run is not None and not storage.exists(run):
        raise UserError(
            f"{run}: no such run directory; `curate run CONFIG`, `curate download` or `curate import` makes one"
        )
    with ProgressDisplay(quiet=as_json) as display:
        made = context(run, display=display, **surroundings)
        with lock.hold(made.run.root):
            outcome = execute(made)
    print_outcome(outcome, as_json)
    return outcome


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The closing lines of a stage command."""
    document = {
        "stage": outcome.stage,
        "skipped": outcome.skipped,
        "rows": outcome.rows,
        "out": outcome.out,
        "summary": outcome.summary,
    }
    state = "already done, nothing to do" if outcome.skipped else f"{outcome.rows:,} rows"
    lines = [f"{outcome.stage}: {state} in {outcome.out}"]
    lines += [
        f"  {name}: {value:,}" if isinstance(value, int) else f"  {name}: {value}"
        for name, value in outcome.summary.items()
        if not isinstance(value, (dict, list))
    ]
    print_result(document, lines, as_json)
