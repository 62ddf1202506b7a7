"""What a figure was measured on and what it cost: processor, kernels and versions; CPU seconds and peak memory.

A figure is taken in a child process of its own (`measured`), so that neither memory nor caches of another method
count. Peak memory is the kernel's VmHWM: `ru_maxrss` outlives `exec` and would report the parent's.
"""

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def one_thread() -> None:
    """Ask every library for one thread; to be called before numpy is imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"


def facts() -> dict[str, Any]:
    """The machine, and which kernels the loaded libraries chose for it. Import the libraries first."""
    import threadpoolctl

    libraries = [
        {key: pool.get(key) for key in ("prefix", "version", "architecture", "num_threads")}
        for pool in threadpoolctl.threadpool_info()
    ]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
        "libraries": libraries,
        "load_average": list(os.getloadavg()),
    }


def processor() -> str:
    """The model name the kernel gives, with family and model number, which tell generations of one name apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return f"{known.get('model name', '?')} (family {known.get('cpu family')}, model {known.get('model')})"


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Of distributions, and of Python."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def peak_bytes() -> int:
    """The most memory this process has held since it began, or since `forget_peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The memory this process holds now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Start the measure of the peak anew; without effect where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass
class Phases:
    """CPU and wall seconds by phase of what runs in this process.

    with phases("training"): ...
    """

    cpu_seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu
            self.wall_seconds[name] = self.wall_seconds.get(name, 0.0) + time.perf_counter() - wall

    def document(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """For JSON; `without`: phases that are shown and do not count in the total."""
        counted = [name for name in self.cpu_seconds if name not in without]
        return {
            "cpu_seconds": round(sum(self.cpu_seconds[name] for name in counted), 2),
            "wall_seconds": round(sum(self.wall_seconds[name] for name in counted), 2),
            "cpu_seconds_by_phase": {name: round(seconds, 2) for name, seconds in self.cpu_seconds.items()},
        }


@dataclass(frozen=True)
class Cost:
    """Of a call in a child process. `start_bytes`: what the child held before the call, imports included."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    start_bytes: int


def measured(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    """function(*arguments) in a fresh process. The function must be a module's own, and its result picklable."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}: its process ended with code {process.exitcode}") from None
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{function.__name__} failed in its process:\n{answer}")
    result, cost = answer
    return result, cost


def _child(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        start = resident_bytes()
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*arguments)
        cost = Cost(time.process_time() - cpu, time.perf_counter() - wall, peak_bytes(), start)
        sender.send((result, cost))
    except BaseException:
        sender.send(traceback.format_exc())
