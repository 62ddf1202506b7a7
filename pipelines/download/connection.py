"""One HTTP exchange with an address that was checked, under a total time and a total size.

Python's socket timeouts are per call: a server that sends a byte a second never meets one. Here every read
is given what is left of the whole exchange's time.
"""

import errno
import http.client
import io
import socket
import ssl
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message

from pipelines.download.addresses import Target
from pipelines.download.errors import FetchError

HEADER_BYTES = 1 << 20
"""What headers, chunk lengths and trailers may take on top of the body."""
CONNECT_TIMEOUT_S = 10.0


@dataclass
class Reply:
    """What a server answered; `body` is empty for a status that is not read."""

    status: int
    headers: Message
    body: bytes
    seconds: float


class _DeadlineReader(io.RawIOBase):
    """A socket as a raw stream whose reads together end at a deadline and at a size."""

    def __init__(self, sock: socket.socket, deadline: float, limit: int) -> None:
        self.sock = sock
        self.deadline = deadline
        self.left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        if self.left <= 0:
            raise FetchError("too_large", "the answer goes on past the size bound")
        self.sock.settimeout(remaining)
        count = self.sock.recv_into(buffer)
        self.left -= count
        return count


class _Socket:
    """What http.client needs of a socket."""

    def __init__(self, sock: socket.socket, deadline: float, limit: int) -> None:
        self.sock = sock
        self.reader = _DeadlineReader(sock, deadline, limit)

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(max(0.001, self.reader.deadline - time.monotonic()))
        self.sock.sendall(data)

    def makefile(self, mode: str, *_: object) -> io.BufferedReader:
        return io.BufferedReader(self.reader, 1 << 16)

    def close(self) -> None:
        """Nothing: http.client closes before the body is read where the server will; `exchange` closes at the end."""


def exchange(
    target: Target,
    addresses: list[tuple[int, tuple[str, int]]],
    headers: dict[str, str],
    *,
    seconds: float,
    max_bytes: int,
    tls: ssl.SSLContext,
    accept: Callable[[int, Message], bool],
) -> Reply:
    """GET `target` from the first of `addresses` that connects.

    The body is read only where accept(status, headers) is true; it may raise FetchError. Everything from the
    connection to the last byte takes at most `seconds`.
    """
    began = time.monotonic()
    deadline = began + seconds
    sock: socket.socket | None = None
    try:
        sock = _connect(target, addresses, deadline, tls)
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _Socket(sock, deadline, max_bytes + HEADER_BYTES)  # type: ignore[assignment]
        connection.auto_open = 0
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": target.netloc, **headers, "Connection": "close"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        body = _body(response, max_bytes) if accept(response.status, response.headers) else b""
        return Reply(response.status, response.headers, body, time.monotonic() - began)
    except FetchError:
        raise
    except TimeoutError:
        raise FetchError("timeout", "not whole within the time bound") from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise FetchError("connection", "closed by the server") from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError("tls", f"certificate refused ({error.verify_message or 'not valid'})") from None
    except ssl.SSLError:
        raise FetchError("tls", "no secure connection") from None
    except OSError as error:  # RemoteDisconnected is one of these
        reason = errno.errorcode.get(error.errno or 0, "closed by the server")
        raise FetchError("connection", reason) from None
    except http.client.IncompleteRead:
        raise FetchError("truncated", "the body ends early") from None
    except (http.client.HTTPException, ValueError):
        raise FetchError("protocol", "the answer is not HTTP") from None
    finally:
        if sock is not None:
            sock.close()


def _connect(
    target: Target, addresses: list[tuple[int, tuple[str, int]]], deadline: float, tls: ssl.SSLContext
) -> socket.socket:
    failure: OSError = TimeoutError()
    for position, (family, place) in enumerate(addresses):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            last = position + 1 == len(addresses)
            sock.settimeout(remaining if last else min(remaining, CONNECT_TIMEOUT_S))
            sock.connect(place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            failure = error
            continue
        if target.scheme == "http":
            return sock
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            return tls.wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise
    raise failure


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.length is not None and response.length > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes announced")
    encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise FetchError("content_encoding", "compressed though it was asked not to be")
    pieces: list[bytes] = []
    size = 0
    while piece := response.read(1 << 16):
        size += len(piece)
        if size > max_bytes:
            raise FetchError("too_large", f"more than {max_bytes} bytes")
        pieces.append(piece)
    if response.length:
        raise FetchError("truncated", "the body ends early")
    body = b"".join(pieces)
    return body if encoding in ("identity", "") else _inflate(body, encoding, max_bytes)


def _inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a transfer's compression, never past the size bound."""
    for window in (31,) if "gzip" in encoding else (15, -15):
        inflater = zlib.decompressobj(window)
        try:
            plain = inflater.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if len(plain) > max_bytes:
            raise FetchError("too_large", f"more than {max_bytes} bytes")
        if not inflater.eof:
            raise FetchError("truncated", "the body ends early")
        return plain
    raise FetchError("content_encoding", "damaged compression")
