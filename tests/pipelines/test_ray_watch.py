"""A driver does not outlive the Ray that it started, whatever it waits for."""

import subprocess
import sys
import time

import pytest

DRIVER = """
import subprocess, sys, time
import psutil, ray
from pipelines import ray_watch

victim, when = sys.argv[1:]
ray_watch.POLL_S = ray_watch.START_POLL_S = 0.05
ray_watch.GRACE_S, ray_watch.START_GRACE_S = 0.3, 100 if when == "again" else 0.6
ray.is_initialized = lambda: when == "later"
processes = {name: subprocess.Popen(["sleep", "100"]) for name in ("raylet", "gcs_server", "other")}
names = {process.pid: name for name, process in processes.items()}
psutil.Process.name = lambda process: names.get(process.pid, "")
watch = ray_watch.Watch()
if when in ("later", "stopped"):
    watch.started.set()
print(processes["other"].pid, flush=True)
time.sleep(0.5)
processes[victim].kill()
time.sleep(0.2)
if when == "again":
    watch.stop()
time.sleep(3)
for process in processes.values():
    process.kill()
print("went on")
"""


def drive(victim: str, when: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", DRIVER, victim, when]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("when", ["starting", "later"])
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_driver_that_waits_for_a_dead_ray_ends_with_a_sentence_and_leaves_nobody_behind(
    victim: str, when: str
) -> None:
    began = time.monotonic()
    code, out, told = drive(victim, when)
    assert code == 1 and "run the same command again" in told and "went on" not in out
    assert not _lives(int(out.split()[0])) and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("victim", "when"), [("raylet", "stopped"), ("raylet", "again"), ("other", "later")], ids=lambda text: text
)
def test_a_driver_that_stopped_or_starts_ray_again_goes_on(victim: str, when: str) -> None:
    code, out, told = drive(victim, when)
    assert (code, told) == (0, "") and "went on" in out


def _lives(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
