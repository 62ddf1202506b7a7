"""A run that is killed at any stage goes on with the same command and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.pictures import write_config

KILL_AT = ("score", "dedup", "embed/mobilenet_v2", "retrieve", "manifest")
"""Stages in which the driver is killed, one kill each, in one chain of attempts."""


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


def kill_in(config: Path, run: Path, stage: str, wait_s: float) -> bool:
    """Start a run and kill -9 its driver shortly after `stage` began. False if it ended before."""
    after = (run / "events.jsonl").stat().st_size if (run / "events.jsonl").exists() else 0
    process = start(config)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if stage_began(run, stage, after):
            time.sleep(wait_s)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    return False


def results(run: Path) -> dict[str, bytes]:
    """Everything a run promises to reproduce: all Parquet and the data card."""
    kept = [*run.rglob("*.parquet"), *run.rglob("manifest.json")]
    return {str(p.relative_to(run)): p.read_bytes() for p in kept}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("faults")
    config = write_config(root, root / "whole")
    finish(config)
    return root, results(root / "whole")


@pytest.mark.timeout(420)
def test_a_killed_driver_goes_on_to_the_same_bytes(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    root, expected = uninterrupted
    config = write_config(root, root / "killed")
    killed = [stage for n, stage in enumerate(KILL_AT) if kill_in(config, root / "killed", stage, 0.05 + 0.1 * n)]
    assert len(killed) >= 4, f"only killed in {killed}: {config.with_suffix('.log').read_text()[-2000:]}"
    finish(config)
    found = results(root / "killed")
    assert found.keys() == expected.keys()
    different = [name for name in expected if expected[name] != found[name]]
    assert not different


@pytest.mark.timeout(300)
def test_a_killed_worker_is_replaced(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    root, expected = uninterrupted
    config = write_config(root, root / "worker")
    process = start(config)
    deadline = time.monotonic() + 200
    victims: list[psutil.Process] = []
    while process.poll() is None and time.monotonic() < deadline:
        if stage_began(root / "worker", "score", 0):
            busy = [p for p in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(_name(p))]
            victims = [p for p in busy if not any(idle in " ".join(_name(p)) for idle in ("IDLE", "Agent"))]
            if victims:
                victims[-1].kill()
                break
        time.sleep(0.02)
    assert victims, "no Ray worker was seen at work"
    assert process.wait(timeout=240) == 0, config.with_suffix(".log").read_text()[-3000:]
    assert results(root / "worker") == expected


def _name(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_second_run_skips_everything(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    root, expected = uninterrupted
    config = write_config(root, root / "whole")
    process = start(config)
    assert process.wait(timeout=120) == 0
    last = json.loads(config.with_suffix(".log").read_text().strip().splitlines()[-1])
    assert all(stage["skipped"] for stage in last["stages"])
    assert results(root / "whole") == expected
