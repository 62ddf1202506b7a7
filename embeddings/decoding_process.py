"""The decoder's child process: how bytes go in and pixels come out, and how its death is told.

The child is a fresh interpreter (a fork of a Ray worker would inherit its threads' locks) that reads
requests from one pipe and answers on another; it ends when its parent closes the pipe or dies.
CPU seconds per image, address space and open files are bounded by the kernel (setrlimit), files cannot be written, and
the environment, where secrets are kept, stays with the parent.
"""

import fcntl
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any

import numpy as np

from embeddings.decoding import FORMATS, REASONS, DecodeError, DecodeLimits, ImageHeader, decode, probe

_REQUEST = struct.Struct("<QI")  # bytes of the image; the side that decoding may shrink to, 0: none; or _HEADER_ONLY
_HEADER_ONLY = 0xFFFFFFFF
_ANSWER = struct.Struct("<BII")  # 0: pixels of (h, w); 1: a refusal, (bytes of its text, 0); above: a header of (h, w)
_PIPE_BYTES = 1 << 20
_TEXT_BYTES = 1 << 16
_OPEN_FILES = 64
_HEADER_CPU_S = 4
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE")
PROGRAM = (
    # Ours comes before what is installed, and after Python's own: beside an installed `embeddings` lies a backport
    # named dataclasses, older than Python's.
    "import sys; sys.path.insert(next((i for i, p in enumerate(sys.path) if 'site-packages' in p), 99), sys.argv[6]); "
    "from embeddings.decoding_process import serve; serve()"
)


class ChildDiedError(Exception):
    """The child ended before it answered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Child:
    """The parent's end."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.limits = limits
        to_child, self._requests = os.pipe()
        self._answers, from_child = os.pipe()
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment = {
            **{name: value for name, value in os.environ.items() if name in _ENVIRONMENT},
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        options = [limits.max_pixels, limits.cpu_s, limits.memory_bytes]
        arguments = [*(str(value) for value in (to_child, from_child, *options)), root]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=(to_child, from_child),
                start_new_session=True,
            )
        finally:
            os.close(to_child)
            os.close(from_child)
        for end in (self._requests, self._answers):
            _widen(end)
            os.set_blocking(end, False)

    def decode(self, data: bytes, shrink_to: int | None = None) -> np.ndarray:
        """Pixels, (h, w, 3) uint8. Raises DecodeError, or ChildDiedError."""
        deadline = time.monotonic() + self.limits.wall_s
        kind, height, width = self._ask(data, shrink_to or 0, deadline)
        if kind != 0:
            raise self._nonsense()
        return self._receive(height * width * 3, deadline).reshape(height, width, 3)

    def probe(self, data: bytes) -> ImageHeader:
        """The header. Raises DecodeError, or ChildDiedError."""
        kind, height, width = self._ask(data, _HEADER_ONLY, time.monotonic() + self.limits.wall_s)
        if kind < 2 or kind - 2 >= len(FORMATS):
            raise self._nonsense()
        return ImageHeader(FORMATS[kind - 2], width, height)

    def _ask(self, data: bytes, wanted: int, deadline: float) -> tuple[int, int, int]:
        """The head of an answer that is no refusal. What the child says is believed no further than its bounds."""
        try:
            self._send(_REQUEST.pack(len(data), wanted), deadline)
            self._send(data, deadline)
        except BrokenPipeError:
            raise self._death() from None
        kind, first, second = _ANSWER.unpack(self._receive(_ANSWER.size, deadline))
        if kind != 1:
            if first * second > self.limits.max_pixels:
                raise self._nonsense()
            return kind, first, second
        if first > _TEXT_BYTES:
            raise self._nonsense()
        text = self._receive(first, deadline).tobytes().decode(errors="replace")
        reason, _, detail = text.partition("\n")
        if reason not in REASONS:
            raise self._nonsense()
        raise DecodeError(reason, detail)

    def _nonsense(self) -> ChildDiedError:
        """A child that answers what it cannot have meant is as good as dead."""
        return ChildDiedError("decoder_crashed")

    def close(self) -> None:
        """End the child and collect it."""
        for end in (self._requests, self._answers):
            os.close(end)
        self._process.kill()
        self._process.wait()

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                self._wait(self._requests, select.POLLOUT, deadline)

    def _receive(self, size: int, deadline: float) -> np.ndarray:
        buffer = np.empty(size, np.uint8)
        view = memoryview(buffer)
        while view:
            try:
                count = os.readv(self._answers, [view])
            except BlockingIOError:
                self._wait(self._answers, select.POLLIN, deadline)
                continue
            if count == 0:
                raise self._death()
            view = view[count:]
        return buffer

    def _wait(self, end: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(end, event)
        if not poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
            raise ChildDiedError("decoder_timeout")

    def _death(self) -> ChildDiedError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        return ChildDiedError("decoder_timeout" if code == -signal.SIGXCPU else "decoder_crashed")


def serve() -> None:
    """The child: answers requests until the parent is gone."""
    requests, answers, max_pixels, cpu_s, memory_bytes = (int(value) for value in sys.argv[1:6])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    limits = DecodeLimits(max_pixels=max_pixels, cpu_s=cpu_s, memory_bytes=memory_bytes)
    _one_thread_per_codec()
    with os.fdopen(requests, "rb", buffering=0) as source, os.fdopen(answers, "wb", buffering=0) as sink:
        try:
            while (head := _exactly(source, _REQUEST.size)) is not None:
                size, wanted = _REQUEST.unpack(head)
                data = _exactly(source, size)
                if data is None:
                    return
                for piece in _answer(data, limits, wanted):
                    view = memoryview(piece).cast("B")
                    while view:
                        view = view[sink.write(view) :]
        except BrokenPipeError:
            return


def _answer(data: bytes, limits: DecodeLimits, wanted: int) -> tuple[Any, ...]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = min(limits.cpu_s, _HEADER_CPU_S) if wanted == _HEADER_ONLY else limits.cpu_s
    bound = math.ceil(used.ru_utime + used.ru_stime) + allowed
    resource.setrlimit(resource.RLIMIT_CPU, (bound, resource.RLIM_INFINITY))
    try:
        if wanted == _HEADER_ONLY:
            header = probe(data, limits)
            return (_ANSWER.pack(2 + FORMATS.index(header.format), header.height, header.width),)
        pixels = decode(data, limits, wanted or None)
    except DecodeError as error:
        text = f"{error.reason}\n{error.detail}".encode(errors="replace")[:_TEXT_BYTES]
        return (_ANSWER.pack(1, len(text), 0), text)
    except MemoryError:
        text = b"too_much_memory\n"
        return (_ANSWER.pack(1, len(text), 0), text)
    except Exception as error:  # `probe` lets through what a codec's metadata raises
        text = f"damaged\n{type(error).__name__}".encode()
        return (_ANSWER.pack(1, len(text), 0), text)
    return (_ANSWER.pack(0, pixels.shape[0], pixels.shape[1]), np.ascontiguousarray(pixels))


def _exactly(source: Any, size: int) -> bytes | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = source.readinto(view)
        if not count:
            return None
        view = view[count:]
    return bytes(buffer)


def _widen(end: int) -> None:
    try:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (OSError, AttributeError):  # not Linux, or more than this user may have: slower, not wrong
        return


def _one_thread_per_codec() -> None:
    try:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    except ImportError:
        return
