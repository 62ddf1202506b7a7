"""A run that is killed at any stage, or has no memory or no disk left, goes on with the same command and loses nothing.

Kills at random times: tests/e2e/test_chaos.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cli.main import app
from curation.errors import UserError
from pipelines.context import Context
from pipelines.run_directory import PartRecord, PartWriter, RunDirectory
from tests.e2e.pictures import write_config

MODEL = "sscd_distilled"
"""Also as the semantic model: it starts in a third of the time that torch takes."""
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
        if name.startswith(("ray::_decoded", "ray::_Actor.")):
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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_driver_killed_in_every_stage_ends_with_the_same_bytes(uninterrupted: tuple[Path, dict[str, bytes]]) -> None:
    check_kills(*uninterrupted, "killed-often", (f"embed/{MODEL}", *EVERY[5:]))
    config = configured(uninterrupted[0], "killed-early")
    for stage in EVERY[:5]:
        kill_in(config, uninterrupted[0] / "killed-early", stage, 0.3)
    finish(config)
    assert results(uninterrupted[0] / "killed-early") == uninterrupted[1]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_whose_disk_fills_up_again_and_again_goes_on_with_more(
    uninterrupted: tuple[Path, dict[str, bytes]], small_disk: Callable[[str], Path]
) -> None:
    root, expected = uninterrupted
    sizes, refused = ["200k", "400k", "700k", "1200k", "64m"], 0
    for size in sizes:
        run = small_disk(size) / "run"
        config = write_config(root, run, MODEL, detectors=False)
        process = start(config)
        code = process.wait(timeout=400)
        log = config.with_suffix(".log").read_text()
        assert "Traceback" not in log, log[-3000:]
        if code:
            refused += 1
            assert "no space left on the disk; free some and run the same command again" in log, log[-3000:]
        else:
            assert results(run) == expected
        config.with_suffix(".log").unlink()
    assert code == 0 and refused >= 3


def grow(writer: PartWriter, name: str, task: int, shared: int) -> PartRecord:
    """Parts of 300 KB that do not compress."""
    values = np.random.default_rng(task).integers(0, 2**63, 300_000 // 8)
    return writer.write(name, pa.table({"image_id": values.astype(np.uint64)}))


def hog(writer: PartWriter, name: str, task: int, shared: int) -> PartRecord:
    """Asks for more than there is, but for the first two parts."""
    return grow(writer, name, len(bytearray(1 << 60)) if task >= shared else task, shared)


def stage(root: Path, function: Any, shared: int = 0) -> None:
    context = Context(RunDirectory(str(root)))
    generation = context.begin_rows("stage", 1, {}, [])
    assert generation is not None
    context.map_parts(generation, [(f"part-{i}", i) for i in range(6)], function, shared=shared)
    context.finish(generation, {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a size that can be changed: a tmpfs."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")

    def resized(size: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
        return place

    try:
        yield resized
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def test_a_full_disk_is_one_sentence_and_the_stage_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Callable[[str], Path], ray_session: None
) -> None:
    stage(tmp_path / "roomy", grow)
    run = small_disk("1m") / "run"
    with pytest.raises(UserError, match=r"run/stage/.*no space left on the disk; free some") as caught:
        stage(run, grow)
    assert caught.value.exit_code == 1
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("part-*.parquet")}
    assert kept and not list(run.rglob(".*.tmp"))
    small_disk("8m")
    stage(run, grow)
    assert results(run) == results(tmp_path / "roomy")
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items()), "a finished part was made again"


def test_a_task_out_of_memory_is_one_sentence_and_finished_parts_stay(tmp_path: Path, ray_session: None) -> None:
    stage(tmp_path / "whole", grow)
    with pytest.raises(UserError, match=r"part-\d: out of memory .*lower memory_per_worker.*finished parts") as caught:
        stage(tmp_path / "run", hog, shared=2)
    assert caught.value.exit_code == 1
    assert {path.name for path in (tmp_path / "run").rglob("*.parquet")} <= {"part-0.parquet", "part-1.parquet"}
    stage(tmp_path / "run", grow)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


HOGGED = """
import os, psutil, time
m = psutil.virtual_memory()
os.environ["RAY_memory_usage_threshold"] = str(round((m.total - m.available + 1.5e9) / m.total, 3))
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
from pipelines import cluster
cluster.start(None, 1)
def hog(shared):
    held = []
    for _ in range(60):
        held.append(bytearray(os.urandom(1 << 20) * 100))
        time.sleep(0.05)
try:
    list(cluster.spread(hog, [("part-0", ())]))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_machine_out_of_memory_is_one_sentence_and_not_tried_for_ever() -> None:
    done = subprocess.run([sys.executable, "-c", HOGGED], capture_output=True, text=True, check=False, timeout=500)
    assert done.stdout.splitlines()[-1].startswith(
        "UserError: part-0: out of memory (Ray ended its worker, the machine"
    )
