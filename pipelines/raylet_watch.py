"""Ends a driver whose raylet, the process by which Ray works on this machine, was killed.

Ray mostly ends such a driver itself; but where results of tasks were lost it may wait for ever for them to be made
again, on a machine that there no longer is.
"""

import os
import threading
import time

import psutil

from curation.errors import GO_ON

POLL_S, GRACE_S = 1.0, 20.0
"""How often to look, and how long Ray has to end the driver by itself."""
SENTENCE = f"error: Ray's own process on this machine has ended (killed, or out of memory); {GO_ON}\n"


def begin() -> None:
    """Watch the raylets that this process has started; nothing without one."""
    if _raylets():
        threading.Thread(target=_watch, daemon=True, name="raylet-watch").start()


def _watch() -> None:
    import ray

    missed = 0.0
    while missed < GRACE_S:
        if not ray.is_initialized():  # stopped in order
            return
        missed = 0.0 if _raylets() else missed + POLL_S
        time.sleep(POLL_S)
    _leave()


def _leave() -> None:
    """From a thread, while the main one waits in Ray's code for ever: there is no other way out."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os.write(2, SENTENCE.encode())
    os._exit(1)


def _raylets() -> list[psutil.Process]:
    """Those that live."""
    return [child for child in psutil.Process().children() if _is_raylet(child)]


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
