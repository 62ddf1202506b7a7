"""`curate status --watch`: a table that follows a run's events; lines where output is piped, JSON for machines."""

import json
import sys
import time
from typing import Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines import lock, status
from pipelines.progress import Progress

EVERY_S = 1.0
FAILURES = 8


def watch(run: str, as_json: bool) -> None:
    """Follow a run. On a terminal until Ctrl-C; else until no process works on it. Raises UserError for no run."""
    status.status(run)
    progress = Progress(run)
    console = Console(highlight=False)
    if console.is_terminal and not as_json:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                live.update(drawn(_document(run, progress)), refresh=True)
                time.sleep(EVERY_S)
    said: dict[str, Any] = {}
    while True:
        document = _document(run, progress)
        if as_json:
            sys.stdout.write(json.dumps(document, default=str) + "\n")
            sys.stdout.flush()
        else:
            _say(document, said)
        if not document["driver"]:
            return
        time.sleep(5 * EVERY_S)


def _document(run: str, progress: Progress) -> dict[str, Any]:
    held = lock.is_held(run)
    document = progress.read().document(None if held else progress.last)
    return document | {"run": run, "driver": lock.holder(run) if held else None}


def _say(document: dict[str, Any], said: dict[str, Any]) -> None:
    """A line for every stage that has moved on."""
    for stage in document["stages"]:
        words = line(stage, bool(document["driver"]))
        if said.get(stage["stage"]) != words:
            said[stage["stage"]] = words
            typer.echo(words)


def line(stage: dict[str, Any], running: bool) -> str:
    """A stage in one line."""
    parts = f", {stage['done']:,} of {stage['total']:,} parts" if stage["total"] else ""
    rate = (
        f", {stage['rows_per_second']:,.1f} rows/s"
        if stage["rows_per_second"] and _state(stage, running) == "running"
        else ""
    )
    left = (
        f", {duration(stage['remaining_seconds'])} left" if running and stage["remaining_seconds"] is not None else ""
    )
    lost = f", {sum(stage['failures'].values()):,} failures" if stage["failures"] else ""
    return f"{stage['stage']}: {_state(stage, running)}{parts}, {stage['rows']:,} rows{rate}{left}{lost}"


def drawn(document: dict[str, Any]) -> Group:
    """The table that is drawn again and again."""
    running = bool(document["driver"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("state")
    table.add_column("parts", min_width=16)
    for name in ("done", "rows", "rows/s", "time", "left", "failures"):
        table.add_column(name, justify="right")
    styles = {"running": "bold cyan", "complete": "green", "stopped": "bold red"}
    for stage in document["stages"]:
        state = _state(stage, running)
        bar = ProgressBar(stage["total"], stage["done"], width=16) if stage["total"] else ""
        table.add_row(
            Text(_one_line(stage["stage"])),
            Text(state, styles.get(state, "")),
            bar,
            f"{stage['done']:,}/{stage['total']:,}" if stage["total"] else "",
            f"{stage['rows']:,}",
            f"{stage['rows_per_second']:,.1f}" if stage["rows_per_second"] else "",
            duration(stage["seconds"]) if state != "skipped" else "",
            duration(stage["remaining_seconds"]) if running else "",
            f"{sum(stage['failures'].values()):,}" if stage["failures"] else "",
        )
    lines = [Text(_driver(document))]
    for stage in document["stages"]:
        worst = (
            sorted(stage["failures"].items(), key=lambda f: (-f[1], f[0]))[:FAILURES]
            if _is_last(document, stage)
            else []
        )
        lines += [Text(f"{_one_line(stage['stage'])}: {count:,} {_one_line(reason)}") for reason, count in worst]
    lines += [Text(f"warning: {_one_line(w['text'])}", "yellow") for w in document["warnings"][-3:]]
    return Group(table, *lines)


def _is_last(document: dict[str, Any], stage: dict[str, Any]) -> bool:
    with_failures = [s for s in document["stages"] if s["failures"]]
    return bool(with_failures) and with_failures[-1] is stage


def _driver(document: dict[str, Any]) -> str:
    held = document["driver"]
    if not held:
        return f"{document['run']}: no process works on it"
    return f"{document['run']}: process {held.get('pid')} on {held.get('host')} works on it since {held.get('since')}"


def _state(stage: dict[str, Any], running: bool) -> str:
    return "stopped" if stage["state"] == "running" and not running else str(stage["state"])


def _one_line(words: Any) -> str:
    return "".join(c if c.isprintable() else "·" for c in str(words))[:200]


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
