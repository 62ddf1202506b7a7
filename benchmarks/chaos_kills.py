"""Kills at random moments of a run: when, whom, and what of its processes and events is looked at for them."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

VICTIMS = {"driver": 3, "worker": 3, "raylet": 2, "gcs": 1, "machine": 1}
"""Whom to kill, and how often of ten. machine: driver, raylet and workers in one moment."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes without which the raylet ends; by their titles they look like workers."""
START = "start"
"""In place of a stage: the time in which a command starts, before its first stage."""
POLL_S = 0.05
HUNG_S = 240.0
"""A driver that neither ends nor goes on for so long after a kill has hung."""


@dataclass(frozen=True)
class Plan:
    """When to kill, and whom. share: of the time that the untouched run took for `stage`, from its begin on."""

    victim: str
    stage: str
    share: float


@dataclass
class Kill:
    """One kill. after_s: since the start of the command. stage: the last one that had begun by the events."""

    victim: str
    after_s: float
    stage: str | None
    exit_code: int | None = None
    said: str = ""


def drawn(choice: random.Random, victims: Sequence[str], stages: Sequence[str]) -> list[Plan]:
    """One plan per victim, in the order of the stages; starts of commands anywhere among them."""
    plans = [Plan(victim, choice.choice(stages), choice.random()) for victim in victims]
    places = {
        plan: choice.randrange(len(stages)) if plan.stage == START else stages.index(plan.stage) for plan in plans
    }
    return sorted(plans, key=places.__getitem__)


def carried_out(
    plan: Plan,
    process: subprocess.Popen[bytes],
    run: Path,
    *,
    seen: int,
    began: float,
    spans: Mapping[str, float],
    choice: random.Random,
) -> Kill | None:
    """Wait for the planned moment of a command, and kill. None: the command has ended before.

    seen: events of the run that are older than the command, which began at `began`. spans: of `spans_of`.
    """
    if not reached(process, run, plan.stage, seen) or ended_within(process, plan.share * spans[plan.stage]):
        return None
    while (kill := strike(process, plan.victim, choice, run, began)) is None:  # no worker just now
        if ended_within(process, choice.uniform(0, 1)):
            return None
    return kill


def reached(process: subprocess.Popen[bytes], run: Path, stage: str, seen: int) -> bool:
    """Wait until `stage` began or was found to be done, by the events behind the first `seen`.

    False: the command ended before, or hangs.
    """
    waited = time.monotonic()
    while stage != START and not any(e["stage"] == stage for e in events(run)[seen:]):
        if ended_within(process, POLL_S) or time.monotonic() - waited > HUNG_S:
            return False
    return process.poll() is None


def strike(
    process: subprocess.Popen[bytes], victim: str, choice: random.Random, run: Path, began: float
) -> Kill | None:
    """Kill -9. None if there is no such process, or the driver has ended."""
    stage = last_stage(run)
    if victim == "machine":
        if process.poll() is not None:
            return None
        os.killpg(process.pid, signal.SIGKILL)
        return Kill(victim, round(time.monotonic() - began, 2), stage)
    family = [(p, name) for p in children_of(process.pid) if (name := title_of(p)) is not None]
    targets = {
        "driver": [psutil.Process(process.pid)] if process.poll() is None else [],
        "worker": [p for p, name in family if name.startswith("ray::") and not name.startswith(AGENTS)],
        "raylet": [p for p, name in family if "/raylet" in name.split(" ")[0] or name.startswith(AGENTS)],
        "gcs": [p for p, name in family if "/gcs_server" in name.split(" ")[0]],
    }
    if not targets[victim]:
        return None
    try:
        choice.choice(targets[victim]).kill()
    except psutil.Error:
        return None
    return Kill(victim, round(time.monotonic() - began, 2), stage)


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def title_of(process: psutil.Process) -> str | None:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return None


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def events(run: Path) -> list[dict[str, Any]]:
    """RUN/events.jsonl; lines cut by a kill, or not yet whole, are empty events."""
    try:
        lines = (run / "events.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    return [_event(line) for line in lines]


def _event(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        return {"event": None, "stage": None}


def last_stage(run: Path) -> str | None:
    """The stage that began last."""
    return next((str(e["stage"]) for e in reversed(events(run)) if e["event"] == "stage_start"), None)


def spans_of(found: Sequence[dict[str, Any]], clock: float) -> dict[str, float]:
    """Seconds of the start of a command, which was at `clock`, and of each stage, in the order of their begins."""
    begins = [event for event in found if event["event"] == "stage_start"]
    ends = {event["stage"]: event["time"] for event in found if event["event"] == "stage_end"}
    first = {event["stage"]: event["time"] for event in reversed(begins)}
    names = dict.fromkeys(event["stage"] for event in begins)
    return {START: begins[0]["time"] - clock} | {name: ends[name] - first[name] for name in names}
