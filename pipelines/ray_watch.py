"""Ends a driver one of whose own Ray processes, the raylet or the server of the cluster's state, was killed.

Ray mostly ends such a driver itself, a minute later where it was the server; but where results of tasks were lost it
may wait for ever for them to be made again, on a machine that there no longer is.
"""

import os
import threading

import psutil

from curation.errors import GO_ON

NAMES = frozenset({"raylet", "gcs_server"})
POLL_S, START_POLL_S = 1.0, 0.2
"""How often to look, and while Ray starts."""
GRACE_S = 5.0
"""How long Ray has to end the driver by itself."""
START_GRACE_S = 45.0
"""For the raylet while Ray starts, which gives up after 30 s where it ended as it began, and is started again."""
SENTENCE = f"error: Ray's own process on this machine has ended (killed, or out of memory); {GO_ON}\n"


class Watch:
    """Watches the processes that this one starts, from before `ray.init` on. started: set when that is done."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="ray-watch").start()

    def stop(self) -> None:
        """Before this attempt's Ray is stopped in order."""
        self._stopped.set()

    def _watch(self) -> None:
        import ray

        seen: set[str] = set()
        missed = 0.0
        while not self._stopped.wait(poll := POLL_S if self.started.is_set() else START_POLL_S):
            if self.started.is_set() and not ray.is_initialized():  # stopped in order
                return
            there = _living()
            seen |= there
            gone = seen - there
            missed = missed + poll if gone else 0.0
            starts = gone == {"raylet"} and not self.started.is_set()
            if missed >= (START_GRACE_S if starts else GRACE_S):
                _leave()


def _living() -> set[str]:
    """Names of the processes of this Ray that live."""
    return {name for child in psutil.Process().children() if (name := _name(child)) in NAMES}


def _name(process: psutil.Process) -> str:
    """The name of a process, "" of one that has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _leave() -> None:
    """From a thread, while the main one waits in Ray's code for ever: there is no other way out."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os.write(2, SENTENCE.encode())
    os._exit(1)
