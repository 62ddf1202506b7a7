"""A run that is killed at any stage goes on with the same command and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.e2e.pictures import write_config

MODEL = "sscd_distilled"
"""Also as the semantic model: it starts in a third of the time that torch takes."""
FEW = (f"embed/{MODEL}",)
EVERY = (
    "import",
    "score",
    "filter",
    "dedup",
    f"embed/{MODEL}",
    "cluster",
    "retrieve",
    "balance",
    "mix",
    "manifest",
)
"""Stages in which the driver is killed, one kill each, in one chain of attempts."""


def configured(root: Path, name: str) -> Path:
    """One worker where the whole run has two: half of the processes to start after every kill."""
    return write_config(root, root / name, MODEL, workers=1, detectors=False)


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "curate"), "run", str(config), "--json"]
    with open(config.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(config: Path) -> None:
    process = start(config)
    assert process.wait(timeout=240) == 0, config.with_suffix(".log").read_text()[-3000:]


def stage_began(run: Path, stage: str, after: int) -> bool:
    """Whether a stage_start of `stage` stands in the events behind byte `after`."""
    events = run / "events.jsonl"
    if not events.exists():
        return False
    with open(events, "rb") as file:
        file.seek(after)
        lines = file.read().splitlines()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the line being written
            continue
        if event["event"] in ("stage_start", "parts") and event["stage"] == stage:
            return True
    return False


def kill_in(config: Path, run: Path, stage: str, wait_s: float, *, worker_in: str | None = None) -> bool:
    """Start a run and kill -9 its driver shortly after `stage` began, and before it a worker at work in `worker_in`.

    False if the run ended before.
    """
    after = (run / "events.jsonl").stat().st_size if (run / "events.jsonl").exists() else 0
    process = start(config)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if worker_in is not None and stage_began(run, worker_in, after) and kill_a_worker(process.pid):
            worker_in = None
        if stage_began(run, stage, after):
            assert worker_in is None, "no worker was seen at work"
            time.sleep(wait_s)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.05)
    return False


def kill_a_worker(driver: int) -> bool:
    """Kill -9 one Ray worker of the driver that is at work. False if none is seen."""
    for process in psutil.Process(driver).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::Map"):
            process.kill()
            return True
    return False


def results(run: Path) -> dict[str, bytes]:
    """Everything a run promises to reproduce: all Parquet and the data card."""
    kept = [*run.rglob("*.parquet"), *run.rglob("manifest.json")]
    return {str(p.relative_to(run)): p.read_bytes() for p in kept}


def run_here(root: Path) -> dict[str, Any]:
    """`curate run` in this process and its Ray, uninterrupted, with two workers; its last line."""
    done = CliRunner().invoke(app, ["run", str(write_config(root, root / "whole", MODEL, detectors=False)), "--json"])
    assert done.exit_code == 0, done.output
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("faults")
    assert not any(stage["skipped"] for stage in run_here(root)["stages"])
    return root, results(root / "whole")


def check_kills(root: Path, expected: dict[str, bytes], name: str, stages: tuple[str, ...]) -> None:
    """Kill the driver once in each of the stages, and a worker of the image pass; then compare every byte."""
    config = configured(root, name)
    killed = [
        stage
        for number, stage in enumerate(stages)
        if kill_in(config, root / name, stage, 0.05 * number, worker_in=None if number else "score")
    ]
    assert len(killed) >= max(1, len(stages) - 1), (
        f"only killed in {killed}: {config.with_suffix('.log').read_text()[-2000:]}"
    )
    finish(config)
    found = results(root / name)
    assert found.keys() == expected.keys()
    different = [path for path in expected if expected[path] != found[path]]
    assert not different


@pytest.mark.timeout(600)
def test_killed_drivers_and_workers_end_with_the_same_bytes(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    check_kills(*uninterrupted, "killed", FEW)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_driver_killed_in_every_stage_ends_with_the_same_bytes(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    check_kills(*uninterrupted, "killed-often", (f"embed/{MODEL}", *EVERY[5:]))
    config = configured(uninterrupted[0], "killed-early")
    for stage in EVERY[:5]:
        kill_in(config, uninterrupted[0] / "killed-early", stage, 0.3)
    finish(config)
    assert results(uninterrupted[0] / "killed-early") == uninterrupted[1]


def test_the_second_run_skips_everything(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    root, expected = uninterrupted
    assert all(stage["skipped"] for stage in run_here(root)["stages"])
    assert results(root / "whole") == expected
