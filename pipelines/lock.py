"""One driver per run directory: a second one is refused, a dead one does not block.

On a disk the lock is the kernel's (`flock` on RUN/.lock): it goes with the process, however that ends. An
object store has no such thing: there RUN/.lock is an object that its holder renews, put only under the condition that
it still is the object seen before (If-None-Match, If-Match), so that of two who reach for it one gets it.
Whoever has not renewed for `STALE_S` is dead. The store's clock alone says how old a lock is: those of machines do not
enter. A holder that was asleep and lost its lock is told so before it marks
anything finished (`confirm`). Limit: a store that knows no conditional put may let two drivers in that start within
the same second; what parts they write is equal, only work is lost.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation import storage
from curation.errors import UserError

RENEW_S = 30.0
STALE_S = 180.0


@dataclass
class _Held:
    release: Callable[[], None]
    lost: threading.Event = field(default_factory=threading.Event)
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
    _held[path] = _Held(_lock_file(path)) if storage.is_local(path) else _lock_object(path)


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


def confirm(root: str) -> None:
    """Raises UserError (exit code 1) if this process held the lock and another driver has taken it over since."""
    held = _held.get(storage.join(root, ".lock"))
    if held is not None and held.lost.is_set():
        raise UserError(
            f"{root} was taken over by {_who(holder(root))}: this process had not been heard of for "
            f"{STALE_S:.0f} s and stops here; its finished parts are kept",
            exit_code=1,
        )


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
    if storage.is_local(path):
        return _is_locked(storage.filesystem(path)[1])
    return not _is_dead(path, found)


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
        os.write(file, _document(uuid.uuid4().hex, _now()))
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


def _is_locked(inner: str) -> bool:
    import fcntl

    try:
        file = os.open(inner, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _lock_object(path: str) -> _Held:
    fs, inner = storage.filesystem(path)
    token, since = uuid.uuid4().hex, _now()
    seen, found = _look(path)
    if found and not _is_dead(path, found):
        raise _refusal(path)

    def put(etag: str | None) -> str | None:
        """The etag of the lock as put now; None: another driver has it."""
        answered = fs.put_if(inner, _document(token, since), etag)
        # Looked at again, whatever was answered: a put may have been done although its answer was lost.
        now, what = _look(path)
        return (answered or now) if what.get("token") == token else None

    mine = put(seen)
    if mine is None:
        raise _refusal(path)
    stop, held = threading.Event(), _Held(lambda: None)

    def renew(etag: str | None) -> None:
        while not stop.wait(RENEW_S):
            try:
                etag = put(etag)
            except (UserError, OSError):
                continue  # the store is away; if that lasts, another driver may take over, and the etag says so
            if etag is None:
                held.lost.set()
                return

    threading.Thread(target=renew, args=(mine,), daemon=True, name="run-lock").start()

    def let_go() -> None:
        stop.set()
        if _look(path)[1].get("token") == token:
            storage.remove(path)

    held.release = let_go
    return held


def _look(path: str) -> tuple[str | None, dict[str, Any]]:
    """The lock object's etag (None: there is none; "" where the store has none) and what it says."""
    fs, inner = storage.filesystem(path)
    try:
        before = str(fs.info(inner).get("ETag", ""))
        found = json.loads(fs.cat_file(inner))
    except FileNotFoundError:
        return None, {}
    except ValueError:
        return before, {}
    return before, found if isinstance(found, dict) else {}


def _is_dead(path: str, found: dict[str, Any]) -> bool:
    if _ended_here(found):
        return True
    fs, inner = storage.filesystem(path)
    try:
        age_s: float | None = fs.age_s(inner)
    except FileNotFoundError:
        return True
    return bool(age_s is not None and age_s >= STALE_S)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _document(token: str, since: str) -> bytes:
    entry = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "token": token, "life": _life()}
    entry["renewal"] = uuid.uuid4().hex  # equal bytes would have equal etags
    return (json.dumps(entry) + "\n").encode()


def _life(pid: int | None = None) -> str | None:
    """What no other process of any machine has: its start, where its number counts, since which boot. None: unknown."""
    try:
        state, *_ = fields = Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()
        started = "ended" if state in "ZX" else fields[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')} {boot}"
    except (OSError, IndexError):
        return None


def _ended_here(found: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine, and is no more."""
    here, theirs = _life(), found.get("life")
    if here is None or theirs is None or here.split(" ")[1:] != str(theirs).split(" ")[1:]:
        return False
    return bool(_life(int(found["pid"])) != theirs)


def _refusal(path: str) -> UserError:
    root = path.removesuffix("/.lock")
    return UserError(
        f"{root} is being worked on by {_who(holder(root))}: wait for it to end, or stop it first"
        + ("" if storage.is_local(path) else f" (a driver that died elsewhere is let go of after {STALE_S:.0f} s)"),
        exit_code=1,
    )


def _who(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']} since {found['since']}" if found else "another process"
