"""A training's live line on a terminal; piped, a line per tenth of a stage."""

from typing import Any

from rich.progress import TaskID, TimeRemainingColumn

from cli.terminal import Display, console


class TrainingDisplay(Display):
    """Listens to the events of `training.loop`."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet, 0, TimeRemainingColumn())
        self.task: TaskID | None = None
        self.steps = 1

    def __call__(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        stage = event["stage"]
        if event["event"] == "stage":
            self.steps, self.said[stage] = event["steps"], 10 * event["first"] // event["steps"]
            if self.progress is not None:
                self.task = self.progress.add_task(stage, total=self.steps, completed=event["first"], note="")
            else:
                goes_on = f"goes on after step {event['first']}" if event["first"] else "starts"
                console.print(
                    f"{stage}: {goes_on}, {self.steps} steps, processes: {event['processes']}", soft_wrap=True
                )
        elif event["event"] == "kernels":
            console.print(f"{stage}: {describe_kernels(event)}", soft_wrap=True)
        elif event["event"] == "figures":
            note = describe(event)
            if self.progress is not None and self.task is not None:
                self.progress.update(self.task, completed=event["step"], note=note)
            elif self.a_tenth_further(stage, event["step"], self.steps):
                console.print(f"{stage}: step {event['step']} of {self.steps}, {note}", soft_wrap=True)


def describe_kernels(event: dict[str, Any]) -> str:
    """What was chosen, with the times of one block where it was timed."""
    parts = []
    for option, name in event["kernels"].items():
        timed = [
            f"{other} {taken * 1000:.2f} ms" if isinstance(taken, float) else f"{other} cannot run"
            for other, taken in event["timings_s"].get(option, {}).items()
        ]
        parts.append(f"{option} {name}" + (f" ({', '.join(timed)})" if timed else ""))
    return ", ".join(parts)


def describe(event: dict[str, Any]) -> str:
    """The figures a person watches."""
    losses = [f"{name} {event[name]:.3f}" for name in sorted(event) if name.split("/")[-1] == "loss"]
    parts = [*losses, *(f"{name} {value:.1%}" for name, value in event.items() if "accuracy" in name)]
    if "images_per_s" in event:
        parts += [f"{event['images_per_s']:.1f} images/s", f"{event['step_s'] * 1000:.0f} ms/step"]
        parts.append(f"data wait {event['data_wait_s'] * 1000:.0f} ms")
        parts.append(f"{event['memory_bytes'] / 2**30:.1f} GiB")
    if "mfu" in event:
        parts.append(f"MFU {event['mfu']:.0%}")
    if event.get("replaced"):
        parts.append(f"{event['replaced']:.1f} broken images replaced per step")
    return ", ".join(parts)
