"""A web on loopback that answers faster than anybody can ask: fixed bytes, no files, no threads, mixed faults.

    python -m benchmarks.download_web PORT HOSTS   # 127.0.0.1 to 127.0.0.HOSTS, until standard input ends

What a path asks for stands in it: /ok/NUMBER.jpg, /missing/, /error/, /slow/, /cut/, /html/, /moved/, /reset/, /never/.
"""

import asyncio
import io
import socket
import struct
import sys
from functools import partial

import numpy as np

PICTURES = 64
SLOW_S = 0.7
SHARES = {
    "ok": 0.80,
    "moved": 0.05,
    "missing": 0.05,
    "html": 0.03,
    "error": 0.02,
    "cut": 0.02,
    "reset": 0.02,
    "slow": 0.0095,
    "never": 0.0005,
}
"""Of the URLs of a list; `never` sends its head and then nothing, until the client's time is over."""


def pictures() -> list[bytes]:
    """Images as they are on the web in size and kind: 448 pixels wide, about 30 kB, three in four JPEG."""
    from PIL import Image

    found = []
    for number in range(PICTURES):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((448, 336), Image.Resampling.BICUBIC), np.int16)
        noise = random.normal(0, 7, pixels.shape[:2])[..., None]
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        sink = io.BytesIO()
        image.save(sink, "WEBP" if number % 4 == 3 else "JPEG", quality=80)
        found.append(sink.getvalue())
    return found


def answers() -> dict[str, list[bytes]]:
    """What is sent for each kind of path, by the number of the path modulo the list's length."""

    def answer(
        status: str, body: bytes, kind: str = "image/jpeg", more: str = "", announced: int | None = None
    ) -> bytes:
        length = len(body) if announced is None else announced
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n"
        )
        return head.encode() + body

    images = pictures()
    page = b"<!doctype html><title>Log in</title>" * 30
    whole = [answer("200 OK", image) for image in images]
    return {
        "ok": whole,
        "slow": whole,
        "missing": [answer("404 Not Found", page, "text/html")],
        "html": [answer("200 OK", page)],
        "error": [answer("500 Internal Server Error", b"", "text/plain")],
        "cut": [answer("200 OK", image[: len(image) // 2], announced=len(image)) for image in images],
        "never": [answer("200 OK", b"", announced=1000)],
        "robots.txt": [answer("200 OK", b"User-agent: *\nDisallow: /private/\n", "text/plain")],
    }


class _Connection(asyncio.Protocol):
    def __init__(self, fixed: dict[str, list[bytes]]) -> None:
        self.fixed = fixed
        self.asked = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.asked += data
        if b"\r\n\r\n" not in self.asked:
            return
        path = self.asked.split(b" ", 2)[1].decode("latin-1")
        _, kind, *rest = path.split("/")
        number = int(rest[0].partition(".")[0]) if rest else 0
        if kind == "reset":
            peer = self.transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif kind == "moved":
            head = f"HTTP/1.1 302 Found\r\nLocation: /ok/{number}.jpg\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()
        elif kind == "slow":
            asyncio.get_running_loop().call_later(SLOW_S, self._send, kind, number)
        else:
            self._send(kind, number)

    def _send(self, kind: str, number: int) -> None:
        bodies = self.fixed.get(kind) or self.fixed["missing"]
        if self.transport.is_closing():
            return
        self.transport.write(bodies[number % len(bodies)])
        if kind != "never":
            self.transport.close()


async def serve(port: int, hosts: int) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    make = partial(_Connection, answers())
    for host in range(1, hosts + 1):
        await loop.create_server(make, f"127.0.0.{host}", port, backlog=4096)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
