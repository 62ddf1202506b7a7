"""One driver per run directory: a second one is refused, a dead one does not block.

On a disk the lock is the kernel's (`flock` on RUN/.lock): it goes with the process, however that ends. An
object store has no such thing: there RUN/.lock is an object that its holder renews, and that counts as
left behind when it has not been renewed for `STALE_S`. Limit: two drivers that start on an object store
within the same second may both believe they hold it; what parts they write is equal, only work is lost.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.errors import UserError

RENEW_S = 30.0
STALE_S = 180.0


@dataclass
class _Held:
    release: Callable[[], None]
    count: int = 1


_held: dict[str, _Held] = {}
"""Locks of this process by path: one driver may open its run more than once."""


@contextmanager
def hold(root: str) -> Iterator[None]:
    """Hold the lock of a run directory. Raises UserError (exit code 1) that names who has it."""
    acquire(root)
    try:
        yield
    finally:
        release(root)


def acquire(root: str) -> None:
    """Take the lock; it is kept until `release` or the end of the process."""
    path = storage.join(root, ".lock")
    if path in _held:
        _held[path].count += 1
        return
    _held[path] = _Held(_lock_file(path) if storage.is_local(path) else _lock_object(path))


def release(root: str) -> None:
    """Let go, once per `acquire`; nothing if it is not held."""
    path = storage.join(root, ".lock")
    held = _held.get(path)
    if held is None:
        return
    held.count -= 1
    if held.count == 0:
        del _held[path]
        held.release()


def holder(root: str) -> dict[str, Any]:
    """What the lock says: pid, host, since. {} where nobody has said anything, or let go in order."""
    try:
        found = json.loads(storage.read_bytes(storage.join(root, ".lock")))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_held(root: str) -> bool:
    """Whether a living driver works on the run, as far as can be told from here."""
    path = storage.join(root, ".lock")
    found = holder(root)
    if not found:
        return False
    if not storage.is_local(path):
        return time.time() - float(found.get("renewed", 0)) < STALE_S
    if found.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock_file(path: str) -> Callable[[], None]:
    import fcntl

    inner = storage.filesystem(path)[1]
    try:
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        file = os.open(inner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage.cannot_write(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, _document(uuid.uuid4().hex))
    except BlockingIOError:
        os.close(file)
        raise _refusal(path) from None
    except OSError as error:
        os.close(file)
        raise storage.cannot_write(path, error) from error

    def let_go() -> None:
        os.ftruncate(file, 0)
        os.close(file)

    return let_go


def _lock_object(path: str) -> Callable[[], None]:
    root = path.removesuffix("/.lock")
    found = holder(root)
    if found and time.time() - float(found.get("renewed", 0)) < STALE_S:
        raise _refusal(path)
    token = uuid.uuid4().hex
    storage.write_whole(path, _document(token))
    if holder(root).get("token") != token:
        raise _refusal(path)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_S):
            storage.write_whole(path, _document(token))

    threading.Thread(target=renew, daemon=True, name="run-lock").start()

    def let_go() -> None:
        stop.set()
        fs, inner = storage.filesystem(path)
        if holder(root).get("token") == token:
            fs.rm(inner)

    return let_go


def _document(token: str) -> bytes:
    now = time.time()
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    entry = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "renewed": now, "token": token}
    return (json.dumps(entry) + "\n").encode()


def _refusal(path: str) -> UserError:
    root = path.removesuffix("/.lock")
    found = holder(root)
    who = f"process {found['pid']} on {found['host']} since {found['since']}" if found else "another process"
    return UserError(f"{root} is being worked on by {who}: wait for it to end, or stop it first", exit_code=1)
