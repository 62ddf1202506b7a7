"""A driver does not outlive the raylet that it started, whatever it waits for."""

import subprocess
import sys
import time

DRIVER = """
import subprocess, sys, time
import psutil, ray
from pipelines import raylet_watch

raylet_watch.POLL_S, raylet_watch.GRACE_S = 0.05, 0.3
ray.is_initialized = lambda: sys.argv[1] == "waits"
started = subprocess.Popen(["bash", "-c", "exec -a raylet sleep 100"])
other = subprocess.Popen(["sleep", "100"])
raylet_watch._is_raylet = lambda p: p.pid == started.pid and p.status() != psutil.STATUS_ZOMBIE
time.sleep(0.2)
raylet_watch.begin()
print(other.pid, flush=True)
time.sleep(0.5)
started.kill()
time.sleep(3)
other.kill()
print("went on")
"""


def drive(how: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", DRIVER, how], check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_driver_that_waits_for_a_dead_raylet_ends_with_a_sentence_and_leaves_nobody_behind() -> None:
    began = time.monotonic()
    code, out, told = drive("waits")
    assert code == 1 and "run the same command again" in told and "went on" not in out
    assert not _lives(int(out.split()[0])) and time.monotonic() - began < 30


def test_a_driver_that_stopped_ray_in_order_goes_on() -> None:
    code, out, told = drive("stopped")
    assert (code, told) == (0, "") and "went on" in out


def _lives(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
