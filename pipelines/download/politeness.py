"""How often one host is asked: requests in flight and time between them, over all workers of a machine.

The workers of a machine share one file of byte-range locks: a slot is a locked byte, which the kernel
frees when its worker dies. Each machine of a cluster has limits of its own.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator

from pipelines.download.errors import FetchError

SLOTS_PER_HOST = 1024
_TIMES = 1 << 16
_HANDED_ON_S = 1.0


def machine_folder(token: str) -> str:
    """A folder of this machine and user, the same for every worker that gives the same token."""
    base = os.path.join(tempfile.gettempdir(), f"curate-{os.getuid()}")
    folder = os.path.join(base, hashlib.blake2b(token.encode(), digest_size=8).hexdigest())
    for path in (base, folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        if os.stat(path, follow_symlinks=False).st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
    return folder


class _Host:
    """The slots of one host that this process holds."""

    def __init__(self, lock: threading.Lock) -> None:
        self.freed = threading.Condition(lock)
        self.users = 0
        self.idle: list[tuple[int, float]] = []
        self.taken: set[int] = set()


class HostGate:
    """Bounds the requests in flight per host and spaces them. One per process: its locks are the process's."""

    def __init__(self, folder: str, per_host: int, interval_s: float, max_wait_s: float) -> None:
        self.per_host = min(per_host, SLOTS_PER_HOST)
        self.interval_s = interval_s
        self.max_wait_s = max_wait_s
        self._slots = os.open(os.path.join(folder, "slots"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._times = os.open(os.path.join(folder, "times"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._times).st_size < _TIMES * 8:
            os.ftruncate(self._times, _TIMES * 8)
        self._lock_of_hosts = threading.Lock()
        self._times_lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    @contextlib.contextmanager
    def slot(self, host: str, interval_s: float = 0.0) -> Iterator[None]:
        """Hold one of the host's slots. Raises FetchError(host_busy) when its turn is too far off."""
        limit = time.monotonic() + self.max_wait_s
        number, since = self._acquire(host, limit)
        try:
            if interval := max(interval_s, self.interval_s):
                time.sleep(self._turn(host, interval, limit))
            yield
        finally:
            self._release(host, number, since)

    def _acquire(self, host: str, limit: float) -> tuple[int, float]:
        with self._lock_of_hosts:
            state = self._hosts.setdefault(host, _Host(self._lock_of_hosts))
            state.users += 1
            while True:
                if state.idle:
                    return state.idle.pop()
                for number in range(self.per_host):
                    if number not in state.taken and self._lock(host, number):
                        state.taken.add(number)
                        return number, time.monotonic()
                remaining = limit - time.monotonic()
                if remaining <= 0:
                    self._leave(host, state)
                    raise FetchError("host_busy", f"no turn within {self.max_wait_s:g} s")
                state.freed.wait(min(remaining, 0.05))

    def _release(self, host: str, number: int, since: float) -> None:
        with self._lock_of_hosts:
            state = self._hosts[host]
            if state.users > 1 and time.monotonic() - since < _HANDED_ON_S:
                state.idle.append((number, since))
            else:  # nobody here waits for it, or workers beside us have waited long enough
                self._unlock(host, state, number)
            self._leave(host, state)
            state.freed.notify()

    def _leave(self, host: str, state: _Host) -> None:
        state.users -= 1
        while len(state.idle) > 0 and state.users <= len(state.taken) - len(state.idle):
            self._unlock(host, state, state.idle.pop()[0])
        if state.users == 0:
            del self._hosts[host]

    def _place(self, host: str, number: int) -> int:
        word = int.from_bytes(hashlib.blake2b(host.encode(), digest_size=8).digest(), "little")
        return (word >> 16) * SLOTS_PER_HOST + number

    def _lock(self, host: str, number: int) -> bool:
        try:
            fcntl.lockf(self._slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place(host, number))
        except OSError:
            return False
        return True

    def _unlock(self, host: str, state: _Host, number: int) -> None:
        fcntl.lockf(self._slots, fcntl.LOCK_UN, 1, self._place(host, number))
        state.taken.discard(number)

    def _turn(self, host: str, interval_s: float, limit: float) -> float:
        """Reserve the host's next free moment; seconds until then. Hosts whose hashes meet share their moments."""
        place = self._place(host, 0) // SLOTS_PER_HOST % _TIMES * 8
        with self._times_lock:
            fcntl.lockf(self._times, fcntl.LOCK_EX, 8, place)
            try:
                now = time.monotonic()
                (free,) = struct.unpack("<d", os.pread(self._times, 8, place))
                start = max(now, free)
                if start > limit:
                    raise FetchError("host_busy", f"no turn within {self.max_wait_s:g} s")
                os.pwrite(self._times, struct.pack("<d", start + interval_s), place)
                return float(start - now)
            finally:
                fcntl.lockf(self._times, fcntl.LOCK_UN, 8, place)
