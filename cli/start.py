"""`curate init`, `run`, `status` and `doctor`: a run from its first file to its last stage."""

import dataclasses
import time
from importlib import resources
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cli import session
from cli.terminal import ProgressDisplay, handle_errors, print_result
from curation import storage
from curation.errors import UserError
from pipelines import configuration
from pipelines.configuration import RunConfig
from pipelines.context import Outcome, Resources
from pipelines.hardware import Hardware

ConfigArgument = Annotated[
    str, typer.Argument(help="configuration (YAML), or a run directory to go on with", show_default=False)
]
FromOption = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="first stage to run")]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="last stage to run")]
RebuildOption = Annotated[
    str | None, typer.Option("--rebuild", metavar="STAGE", help="make STAGE and all after it again from nothing")
]
PlanOption = Annotated[bool, typer.Option("--plan", help="print rows, bytes, FLOP, memory and hours; do nothing")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="with --plan: the arithmetic and its assumptions")]
HardwareOption = Annotated[str, typer.Option("--hardware", help="with --plan: this, v100x160 or h100x8")]
NodesOption = Annotated[int | None, typer.Option("--nodes", min=1, help="with --plan: machines")]
GpusOption = Annotated[int | None, typer.Option("--gpus-per-node", min=0, help="with --plan: GPUs in each")]
CoresOption = Annotated[int | None, typer.Option("--cores-per-node", min=1, help="with --plan: CPU cores in each")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("init")(init)
    app.command("run")(run)
    app.command("status")(status)
    app.command("doctor")(doctor)


def init(
    path: Annotated[str, typer.Argument(help="file to write")] = "run.yaml",
    template: Annotated[str, typer.Option("--template", help="run, or a recipe: lvd142m, lvd1689m")] = "run",
) -> None:
    """Write a commented configuration to start from.

    Example: curate init my-run.yaml
    """
    handle_errors(lambda: _init(path, template))


def _init(path: str, template: str) -> None:
    folder = resources.files("cli") / "configs"
    shipped = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    if template not in shipped:
        raise UserError(f"--template {template}: no such template; there are {', '.join(sorted(shipped))}")
    if storage.exists(path):
        raise UserError(f"{path} is there already: choose another name, or remove it first")
    storage.write_whole(path, shipped[template].read_bytes())
    typer.echo(f"wrote {path}: edit its sources, then `curate run {path} --plan` and `curate run {path}`")


def run(
    config: ConfigArgument,
    first: FromOption = None,
    until: UntilOption = None,
    rebuild: RebuildOption = None,
    plan: PlanOption = False,
    verbose: VerboseOption = False,
    hardware: HardwareOption = "this",
    nodes: NodesOption = None,
    gpus_per_node: GpusOption = None,
    cores_per_node: CoresOption = None,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    as_json: session.JsonOption = False,
) -> None:
    """Carry out a whole configuration; the same command again goes on where it was stopped.

    Relative paths in the YAML start at the current folder, as on the command line.

    Example: curate run run.yaml --until dedup
    """

    def call() -> None:
        from pipelines import hardware as machines

        loaded = _load(config, {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker})
        if plan:
            machine = machines.hardware(
                hardware, nodes=nodes, gpus_per_node=gpus_per_node, cores_per_node=cores_per_node
            )
            _plan(loaded, machine, first, until, verbose, as_json)
        else:
            _run(loaded, first, until, rebuild, as_json)

    handle_errors(call)


def _load(path: str, resources: dict[str, object]) -> RunConfig:
    stored = storage.join(path, "run.yaml")
    loaded = configuration.load(stored if storage.exists(stored) else path)
    given = {name: value for name, value in resources.items() if value is not None}
    merged = loaded.resources.model_dump() | given
    return loaded.model_copy(update={"resources": configuration.check(Resources, merged, "the options")})


def _run(config: RunConfig, first: str | None, until: str | None, rebuild: str | None, as_json: bool) -> None:
    from pipelines import preflight
    from pipelines import run as driver
    from pipelines.events import Events

    config = preflight.resolve(config)
    started = time.monotonic()
    with ProgressDisplay(quiet=as_json) as display:
        events = Events(storage.join(config.run, "events.jsonl"), display)
        outcomes = driver.run(config, first=first, last=until, rebuild=rebuild, events=events)
    seconds = round(time.monotonic() - started, 1)
    document = {"run": config.run, "seconds": seconds, "stages": [dataclasses.asdict(outcome) for outcome in outcomes]}
    print_result(document, _summary(config.run, outcomes, seconds), as_json)


def _summary(run: str, outcomes: list[Outcome], seconds: float) -> list[str]:
    table = _table("stage", "rows", "result")
    for outcome in outcomes:
        table.add_row(
            outcome.stage, f"{outcome.rows:,}", "already done" if outcome.skipped else _counts(outcome.summary)
        )
    lines = [_drawn(table), f"{run}: {len(outcomes)} steps in {seconds:,.1f} s"]
    report = storage.join(run, "report", "index.html")
    if storage.exists(report):
        lines.append(f"look at {report}")
    return lines


def _counts(summary: dict[str, object]) -> str:
    shown = [
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return ", ".join(shown[:5])


def _plan(
    config: RunConfig, machine: Hardware, first: str | None, until: str | None, verbose: bool, as_json: bool
) -> None:
    from pipelines import plan, preflight

    planned = plan.plan(preflight.resolve(config), machine, first=first, last=until)
    table = _table(
        "stage", "rows in", "rows out", "read", "written", "FLOP", "CPU s", "memory/worker", "hours", "bound by"
    )
    for stage in planned.stages:
        table.add_row(
            stage.stage,
            f"{stage.rows_in:,}",
            f"{stage.rows_out:,}",
            storage.in_units(stage.bytes_read),
            storage.in_units(stage.bytes_written),
            f"{stage.flop:.1e}" if stage.flop else "-",
            f"{stage.cpu_seconds:,.2g}" if stage.cpu_seconds < 100 else f"{stage.cpu_seconds:.1e}",
            storage.in_units(stage.memory_per_worker),
            _hours(stage.hours),
            stage.bound,
        )
    lines = [f"plan of {config.run} on {planned.hardware.describe()}; nothing is done", _drawn(table)]
    lines.append(f"in all: {_hours(planned.hours)} hours, {storage.in_units(planned.bytes_written)} written")
    lines += [f"{name}: {value:,}" for name, value in planned.nominal.items()]
    if verbose:
        lines += ["", "arithmetic:"]
        lines += [f"  {stage.stage}: {line}" for stage in planned.stages for line in stage.arithmetic]
        lines += ["", "assumptions:"]
        lines += [f"  {a.name} = {a.value:g} {a.unit} ({a.origin})" for a in planned.assumptions]
    else:
        lines.append("CPU s rest on measured rates, other throughputs and shares kept on assumptions: -v shows each")
    lines += [f"note: {note}" for note in planned.notes]
    print_result(planned.document(), lines, as_json)


def status(
    run: Annotated[str, typer.Argument(help="the run directory")],
    verify: Annotated[bool, typer.Option("--verify", help="read every file and compare its checksum")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="with --verify: let the next `curate run` make damaged parts again")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="go on and show rates and remaining time, until Ctrl-C")
    ] = False,
    as_json: session.JsonOption = False,
) -> None:
    """Show how far a run is: stages, rows, failures by reason, times, bytes; with --verify whether every file is whole.

    Example: curate status runs/first --verify
    """

    def call() -> None:
        from pipelines import status as looking

        if verify or repair:
            _verify(run, repair, as_json)
            return
        if watch:
            from cli import watching

            watching.watch(run, as_json)
            return
        found = looking.status(run)
        table = _table("stage", "state", "generations", "parts", "rows", "time", "on disk")
        for stage in found.stages:
            absent = stage.state == "absent"
            table.add_row(
                stage.folder,
                stage.state,
                "" if absent else str(len(stage.generations)),
                "" if absent else f"{stage.parts:,}",
                "" if absent else f"{stage.rows:,}",
                f"{stage.seconds:,.1f} s" if stage.seconds else "",
                "" if absent else storage.in_units(stage.bytes),
            )
        lines = [_drawn(table), f"{found.run}: {storage.in_units(found.bytes)}, {len(found.sources)} sources"]
        if found.driver:
            lines.append(
                f"process {found.driver['pid']} on {found.driver['host']} works on it since {found.driver['since']}"
            )
        for stage in found.stages:
            lines += [f"{stage.folder}: {count:,} {reason}" for reason, count in stage.failures.items()]
        lines += _hidden_lines(found.hidden, run)
        print_result(found.document(), lines, as_json)

    handle_errors(call)


def _hidden_lines(hidden: dict[str, int], run: str) -> list[str]:
    """What no reader of the run shows."""
    lines = []
    if hidden.get("forgotten"):
        lines.append(f"{hidden['forgotten']:,} images were forgotten: the certificates are in {run}/forgotten")
    if hidden.get("dropped"):
        lines.append(f"{hidden['dropped']:,} images are dropped by decisions of an auditor: no reader shows them")
    if hidden.get("unfinished"):
        lines.append(
            f"`curate forget {run}` was stopped: its images are hidden, but not yet gone; the same call goes on"
        )
    return lines


def _verify(run: str, repair: bool, as_json: bool) -> None:
    """Prints what is damaged. Ends with exit code 1 if anything was, also where it is taken out to be made again."""
    from pipelines import repair as checking

    found = checking.verify(run)
    stages = checking.repair(run, found.damaged) if repair and found.damaged else []
    lines = [f"{damage.path}: {damage.reason}" for damage in found.damaged]
    lines.append(f"{run}: {found.files:,} files, {storage.in_units(found.bytes)} read, {len(found.damaged):,} damaged")
    if stages:
        lines.append(f"taken out of {', '.join(stages)}: run the same `curate run` again to make them anew")
    elif found.damaged:
        lines.append("`--repair` takes them out, and the next `curate run` makes them again")
    print_result(dataclasses.asdict(found) | {"repaired": stages}, lines, as_json)
    if found.damaged:
        raise typer.Exit(1)


def doctor(
    folder: Annotated[str, typer.Argument(help="where a run would lie")] = ".",
    as_json: session.JsonOption = False,
) -> None:
    """Say what of this machine will be used, what is missing, and the command that brings it.

    Example: curate doctor
    """

    def call() -> None:
        from pipelines import doctor as examining

        findings = examining.examine(folder)
        table = _table("", "what", "found", "to do")
        marks = {"ok": "ok", "optional": "-", "missing": "MISSING", "broken": "BROKEN"}
        for finding in findings:
            table.add_row(marks[finding.state], finding.topic, finding.found, finding.remedy or "")
        healthy = all(finding.state in ("ok", "optional") for finding in findings)
        document = {"healthy": healthy, "findings": [dataclasses.asdict(finding) for finding in findings]}
        closing = "a run can start" if healthy else "mend what is MISSING or BROKEN before a run"
        print_result(document, [_drawn(table), closing], as_json)
        if not healthy:
            raise typer.Exit(1)

    handle_errors(call)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    words = {"", "stage", "what", "found", "to do", "state", "result", "bound by"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    return table


def _drawn(table: Table) -> str:
    """The table as text: as wide as the terminal, or as it needs where the output is piped."""
    console = Console(highlight=False)
    width = console.width if console.is_terminal else 200
    drawing = Console(width=width, highlight=False, no_color=True)
    with drawing.capture() as capture:
        drawing.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").split("\n"))


def _hours(hours: float) -> str:
    if hours == 0:
        return "0"
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"
