"""What a person sees: progress on a terminal, plain lines when piped, one sentence for an error."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from curation.errors import GO_ON, UserError, mendable

console = Console(stderr=True, highlight=False)


def handle_errors(call: Callable[[], Any]) -> Any:
    """Run a command; what a user can mend becomes one sentence and its exit code, Ctrl-C exit code 130."""
    try:
        return call()
    except (UserError, OSError, MemoryError) as error:
        told = mendable(error, "curate")
        if told is None:
            raise
        console.print(f"[bold red]error:[/] {_plain(str(told))}", soft_wrap=True)
        raise typer.Exit(told.exit_code) from None
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on: finished parts are kept")
        raise typer.Exit(130) from None
    except Exception as error:
        if not _is_rays(error):
            raise
        kind = type(error).__name__
        sentence = f"Ray's own processes have ended or cannot be reached ({kind}); {GO_ON}"
        console.print(f"[bold red]error:[/] {sentence}", soft_wrap=True)
        raise typer.Exit(1) from None


def _is_rays(error: Exception) -> bool:
    """Whether Ray itself failed; what a task of ours raised is not that. By names: only pipelines import ray."""
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("ray.")}
    return "RayError" in kinds and "RayTaskError" not in kinds


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def print_result(document: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """The end of a command: JSON for machines on stdout, or lines for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, default=str) + "\n")
    else:
        for line in lines:
            typer.echo(line)


class Display:
    """Bars on a terminal, for as long as the block lasts; nothing of its own where output is piped."""

    def __init__(self, quiet: bool, width: int, *columns: ProgressColumn) -> None:
        """columns: between the count and the note. width: of the names, characters."""
        self.quiet = quiet
        live = console.is_terminal and not quiet and os.environ.get("TERM") != "dumb"
        name, note = TextColumn(f"[bold]{{task.description:<{width}}}"), TextColumn("{task.fields[note]}")
        bars = (name, BarColumn(bar_width=32), MofNCompleteColumn(), *columns, note)
        self.progress = Progress(*bars, console=console) if live else None
        self.said: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def a_tenth_further(self, name: str, done: int, total: int) -> bool:
        """Whether to say so in a line: once per tenth, where there is no bar."""
        tenth = 10 * done // total
        if tenth <= self.said.get(name, 0):
            return False
        self.said[name] = tenth
        return True


class ProgressDisplay(Display):
    """Listens to events. On a terminal a bar per stage; piped, a line when a stage starts, moves on and ends."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet, 24, TimeElapsedColumn(), TimeRemainingColumn())
        self.tasks: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        kind, stage = event["event"], event.get("stage") or ""
        if kind in ("message", "warning"):
            prefix = "[yellow]warning:[/] " if kind == "warning" else ""
            console.print(prefix + (f"{stage}: " if stage else "") + _plain(str(event["text"])), soft_wrap=True)
        elif self.progress is not None:
            self._bar(kind, stage, event)
        else:
            self._line(kind, stage, event)

    def _bar(self, kind: str, stage: str, event: dict[str, Any]) -> None:
        assert self.progress is not None
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=None, note="")
        task = self.tasks[stage]
        if kind in ("parts", "part"):
            self.progress.update(task, total=event["total"], completed=event["done"], note=event.get("note", ""))
        elif kind == "stage_skip":
            self.progress.update(task, total=1, completed=1, note="already done")
        elif kind == "stage_end":
            finished = self.progress.tasks[self.progress.task_ids.index(task)]
            self.progress.update(
                task, total=finished.total or 1, completed=finished.total or 1, note=f"{event['rows']:,} rows"
            )

    def _line(self, kind: str, stage: str, event: dict[str, Any]) -> None:
        if kind == "stage_start":
            console.print(f"{stage}: {'goes on' if event.get('resumed') else 'starts'}")
        elif kind == "stage_skip":
            console.print(f"{stage}: already done")
        elif kind == "stage_end":
            console.print(f"{stage}: {event['rows']:,} rows in {event['seconds']:.1f} s")
        elif (
            kind == "part"
            and event["done"] < event["total"]
            and self.a_tenth_further(stage, event["done"], event["total"])
        ):
            console.print(f"{stage}: {event['done']} of {event['total']} parts")
