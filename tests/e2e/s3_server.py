"""A real S3-protocol server on loopback (moto's) in its own process, behind a proxy that makes faults.

`python -m tests.e2e.s3_server` prints the proxy's port. POST /_faults sets `Faults`; GET /_faults counts what was done.
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY, SECRET = "AKIALOOPBACKEXAMPLE", "wJalrXUtnFEMI-loopback-secret"
HOP = ("connection", "transfer-encoding", "content-length", "date", "server")


@dataclass
class Faults:
    """Shares of requests in [0, 1]. lag_s: for so long a new key is in no listing."""

    error: float = 0
    """500 InternalError or 503 SlowDown, nothing done"""
    lost: float = 0
    """done, but the connection is closed before the answer"""
    drop: float = 0
    """the connection is closed in the middle of the body"""
    slow: float = 0
    """the body comes in pieces"""
    lag_s: float = 0
    seed: int = 0


class Proxy:
    """Hands requests on to moto, or does not."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.done: Counter[str] = Counter()
        self.put_at: dict[str, float] = {}
        self.lock = threading.Lock()
        self.set(Faults())
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def answer(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.connections = threading.local()

    def set(self, faults: Faults) -> None:
        self.faults, self.random = faults, random.Random(faults.seed)

    def chance(self, share: float) -> bool:
        with self.lock:
            return share > 0 and self.random.random() < share

    def answer(self, handler: Any) -> None:
        body = _body(handler)
        if handler.path == "/_faults":
            if handler.command == "POST":
                self.set(Faults(**json.loads(body)))
            send(handler, 200, {"Content-Type": "application/json"}, json.dumps(self.done).encode())
            return
        faults = self.faults
        handler.count = lambda amount: self.count("sent", amount)
        with self.lock:
            self.done["requests"] += 1
        if self.chance(faults.error):
            code, reason = self.random.choice([(500, "InternalError"), (503, "SlowDown")])
            self.count(reason)
            send(handler, code, {}, f"<Error><Code>{reason}</Code><Message>try again</Message></Error>".encode())
            return
        status, headers, answer = self.forward(handler, body)
        path = urllib.parse.unquote(handler.path.split("?", 1)[0])
        if handler.command in ("PUT", "POST") and status == 200:
            self.put_at[path] = time.monotonic()
        if self.chance(faults.lost):
            self.count("answer lost")
            handler.close_connection = True
            return
        if handler.command == "GET" and "prefix=" in handler.path and faults.lag_s:
            answer = self.without_new(path.rstrip("/"), answer.decode()).encode()
        if handler.command == "GET" and len(answer) > 1 and self.chance(faults.drop):
            self.count("dropped")
            send(handler, status, headers, answer, until=len(answer) // 2)
            handler.close_connection = True
            return
        if self.chance(faults.slow):
            self.count("slow")
            send(handler, status, headers, answer, pause_s=0.02)
            return
        send(handler, status, headers, answer)

    def count(self, what: str, amount: int = 1) -> None:
        with self.lock:
            self.done[what] += amount

    def forward(self, handler: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = getattr(self.connections, "one", None)
        if connection is None:
            connection = self.connections.one = HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        try:
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, ValueError):  # moto closes connections
            connection.close()
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            answer = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in HOP}
        if handler.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length", "0")
        return response.status, kept, answer

    def without_new(self, bucket: str, listing: str) -> str:
        """A listing without the keys put in the last `lag_s` seconds, and without folders that hold no others."""
        limit = time.monotonic() - self.faults.lag_s

        def old(key: str) -> bool:
            return self.put_at.get(f"{bucket}/{key}", 0) < limit

        def contents(match: re.Match[str]) -> str:
            key = re.search(r"<Key>(.*?)</Key>", match[0])
            return match[0] if key is None or old(urllib.parse.unquote_plus(key[1])) else self.hidden()

        def folder(match: re.Match[str]) -> str:
            prefix = f"{bucket}/{urllib.parse.unquote_plus(match[1])}"
            known = [key for key in list(self.put_at) if key.startswith(prefix)]
            return match[0] if not known or any(self.put_at[key] < limit for key in known) else self.hidden()

        listing = re.sub(r"<Contents>.*?</Contents>", contents, listing, flags=re.S)
        listing = re.sub(r"<CommonPrefixes>\s*<Prefix>(.*?)</Prefix>\s*</CommonPrefixes>", folder, listing, flags=re.S)
        # s3fs believes the count.
        found = listing.count("<Contents>") + listing.count("<CommonPrefixes>")
        return re.sub(r"<KeyCount>\d+</KeyCount>", f"<KeyCount>{found}</KeyCount>", listing)

    def hidden(self) -> str:
        self.count("hidden from a listing")
        return ""


def _body(handler: Any) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return bytes(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)))
    body = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return body


def send(
    handler: Any, status: int, headers: dict[str, str], body: bytes, until: int | None = None, pause_s: float = 0
) -> None:
    """Answer; with only `until` bytes of the body, or with pauses in it."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if "Content-Length" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "HEAD":
        return
    if hasattr(handler, "count"):
        handler.count(len(body))
    step = max(1, -(-len(body) // 8)) if pause_s else max(1, len(body))
    for start in range(0, len(body) if until is None else until, step):
        handler.wfile.write(body[start : min(start + step, len(body) if until is None else until)])
        handler.wfile.flush()
        time.sleep(pause_s)


class S3:
    """The running server, seen from a test."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def faults(self, **faults: float) -> dict[str, int]:
        """Set the faults (none by default); returns what has been done so far, by kind."""
        return self._control(json.dumps(asdict(Faults(**faults))).encode())  # type: ignore[arg-type]

    def done(self) -> dict[str, int]:
        """What has been done so far, by kind."""
        return self._control(None)

    def _control(self, body: bytes | None) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/_faults", data=body, timeout=30) as answer:
            found: dict[str, int] = json.loads(answer.read())
        return found


@contextmanager
def serving(bucket: str = "bucket") -> Iterator[S3]:
    """A server with one bucket; the environment of this process points at it meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.s3_server"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    before = dict(os.environ)
    try:
        s3 = S3(int(process.stdout.readline()))
        os.environ |= s3.environment
        import fsspec

        fsspec.filesystem("s3").mkdir(bucket)
        yield s3
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def main() -> None:
    """Serve until killed."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    sys.stdout.write(f"{proxy.port}\n")
    sys.stdout.flush()
    proxy.server.serve_forever()


if __name__ == "__main__":
    main()
