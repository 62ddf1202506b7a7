"""The demo's web: a real HTTP server on loopback with the habits of a real web, good and bad.

Run as `python -m demo.web FOLDER` it serves FOLDER/site.json on every host named there and ends when its
standard input does, so that it never outlives the demo, however that ends.
"""

import errno
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FIRST_PORT, PORTS = 8642, 40
HOSTS = ("pictures", "mirror", "slow", "private", "broken")
"""127.0.0.1 to 127.0.0.5. Loopback has no names, but robots.txt and the limits per host belong to addresses as well."""
UNDER_S, OVER_S = 1.0, 60.0
"""Seconds that the slow host takes for an answer that is clearly in time, and for one that clearly is not."""
ROBOTS = {
    "pictures": "User-agent: *\nDisallow: /admin/\n",
    "private": "User-agent: *\nDisallow: /members/\nAllow: /\n",
}


def choose_places(wanted: int | None = None) -> dict[str, tuple[str, int]]:
    """(address, port) of each host. wanted: the port of an earlier run, which its URLs name.

    Where only 127.0.0.1 is up (not Linux), each host gets a port of its own. Raises OSError when nothing is free.
    """
    ports = [wanted] if wanted is not None else range(FIRST_PORT, FIRST_PORT + PORTS)
    for port in ports:
        addresses = {name: (f"127.0.0.{k}", port) for k, name in enumerate(HOSTS, 1)}
        ports_apart = {name: ("127.0.0.1", port + 100 * k) for k, name in enumerate(HOSTS)}
        for places in (addresses, ports_apart):
            if all(_free(place) for place in places.values()):
                return places
    raise OSError(errno.EADDRINUSE, f"port {ports[0]} of 127.0.0.1 is taken by another program")


def _free(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError:
            return False
    return True


class Web:
    """The servers of all hosts, in threads of this process."""

    def __init__(
        self, places: Mapping[str, Sequence[Any]], pages: Mapping[str, Mapping[str, Mapping[str, Any]]]
    ) -> None:
        self.requests: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._servers = []
        try:
            for name, (address, port) in places.items():
                handler = type(
                    f"{name.title()}Handler", (_Handler,), {"web": self, "name": name, "pages": pages.get(name, {})}
                )
                self._servers.append(_Server((address, int(port)), handler))
        except BaseException:
            for server in self._servers:
                server.server_close()
            raise
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def count(self, host: str, path: str) -> int:
        """How often a path was asked for, this time included."""
        with self._lock:
            self.requests[host, path] = self.requests.get((host, path), 0) + 1
            return self.requests[host, path]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()  # a loop left on a closed socket would spin
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on slow answers; that is what they are for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "demo-web"
    timeout = 120
    web: Web
    name: str
    pages: Mapping[str, Mapping[str, Any]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        if path == "/robots.txt":
            text = ROBOTS.get(self.name)
            self._send(200 if text else 404, "text/plain", (text or "none").encode())
            return
        page = self.pages.get(path)
        times = self.web.count(self.name, path)
        if page is None or page["do"] == "missing":
            self._send(404, "text/html", b"<!doctype html><title>Not found</title><h1>404</h1>")
            return
        getattr(self, f"_{page['do']}")(page, times)

    def _send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, page: Mapping[str, Any], times: int, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, page["type"], Path(page["file"]).read_bytes(), headers)

    def _noai(self, page: Mapping[str, Any], times: int) -> None:
        self._file(page, times, {"X-Robots-Tag": "noai, noimageai"})

    def _gone(self, page: Mapping[str, Any], times: int) -> None:
        self._send(410, "text/plain", b"gone")

    def _html(self, page: Mapping[str, Any], times: int) -> None:
        """What a login wall answers to a request for a picture."""
        self._send(200, "image/jpeg", b"<!doctype html><html><title>Log in</title><img src=logo.png></html>\n" * 40)

    def _cut(self, page: Mapping[str, Any], times: int) -> None:
        """A file that was stored incompletely: the length is right, the image is not whole."""
        body = Path(page["file"]).read_bytes()
        self._send(200, page["type"], body[: len(body) * 2 // 5])

    def _hangup(self, page: Mapping[str, Any], times: int) -> None:
        """The connection ends before the length that was announced."""
        body = Path(page["file"]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", page["type"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def _under(self, page: Mapping[str, Any], times: int) -> None:
        self._drip(page, UNDER_S)

    def _over(self, page: Mapping[str, Any], times: int) -> None:
        self._drip(page, OVER_S)

    def _drip(self, page: Mapping[str, Any], seconds: float) -> None:
        """A few bytes at a time: no single read ever waits long."""
        body = Path(page["file"]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", page["type"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        steps = max(10, int(seconds * 5))
        size = len(body) // steps + 1
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            self.wfile.flush()
            time.sleep(seconds / steps)

    def _redirect(self, page: Mapping[str, Any], times: int) -> None:
        self._send(302, "text/plain", b"elsewhere", {"Location": page["to"]})

    def _unavailable(self, page: Mapping[str, Any], times: int) -> None:
        self._send(503, "text/plain", b"later")

    def _flaky(self, page: Mapping[str, Any], times: int) -> None:
        """Fails once, then works."""
        if times == 1:
            self._unavailable(page, times)
        else:
            self._file(page, times)

    def _huge(self, page: Mapping[str, Any], times: int) -> None:
        """Announces more than any bound; a client that goes on reading is given zeros for a while."""
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(1 << 32))
        self.end_headers()
        for _ in range(512):
            self.wfile.write(bytes(1 << 16))
        self.close_connection = True


def main(folder: str) -> int:
    """Serve until standard input ends."""
    site = json.loads((Path(folder) / "site.json").read_text())
    try:
        web = Web(site["places"], site["pages"])
    except OSError as error:
        print(f"the demo's web cannot listen: {error}", flush=True)  # noqa: T201 - read by demo.run
        return 1
    print("ready", flush=True)  # noqa: T201 - read by demo.run
    sys.stdin.buffer.read()
    web.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
