"""A small hostile web on loopback for tests: good images and everything that can go wrong."""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 48, height: int = 36) -> bytes:
    """A JPEG that depends on (seed, size) alone."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


class Web:
    """The server: `hits` counts requests by path, `routes` answers them."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.clients: list[tuple[str, int]] = []
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()
        self.routes: dict[str, Callable[[Any], None]] = {}
        self.robots = "User-agent: *\nDisallow: /private/\n"
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None:  # clients that hang up are what we test
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _answer(self, handler: Any) -> None:
        path = handler.path.split("?", 1)[0]
        with self.lock:
            self.hits[handler.path] += 1
            self.agents.add(handler.headers.get("User-Agent", ""))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if path in self.routes:
                self.routes[path](handler)
            elif path == "/robots.txt":
                send(handler, self.robots.encode(), "text/plain")
            elif path.startswith(("/image/", "/private/")):
                send(handler, jpeg(int(path.rsplit("/", 1)[1].split(".")[0])))
            else:
                send(handler, b"gone", "text/plain", 404)
        finally:
            with self.lock:
                self.at_once -= 1


def send(handler: Any, body: bytes, kind: str = "image/jpeg", status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def redirect(location: str) -> Callable[[Any], None]:
    return lambda handler: send(handler, b"", status=302, Location=location)


def drip(body: bytes, pause_s: float) -> Callable[[Any], None]:
    """A body of one byte per pause: never silent long enough for a timeout per call."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        try:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(pause_s)
        except OSError:
            handler.close_connection = True

    return answer


def failing(times: int, body: bytes, status: int = 500) -> Callable[[Any], None]:
    """Fails so often, then serves the body."""
    left = [times]

    def answer(handler: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            send(handler, b"later", "text/plain", status)
        else:
            send(handler, body)

    return answer


def truncated(body: bytes) -> Callable[[Any], None]:
    """Announces the whole body, sends half, hangs up."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.close_connection = True

    return answer


@contextmanager
def serve() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.server.shutdown()
        web.server.server_close()
        thread.join()
