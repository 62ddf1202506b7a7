"""Who may ask what: the token, the names a request may call this server by, where a change may come from, how large.

Loopback needs no token, so any page in the same browser could speak to it: a request must name a known host (a foreign
name that resolves to this machine is refused) and a change must come from this server's own pages.
"""

import asyncio
import hashlib
import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipelines.server.metrics import Metrics

COOKIE = "curate_token"
OPEN_PATHS = frozenset({"/login", "/static/style.css", "/static/server.css"})
"""What is answered without a token."""
MOST_BODY, MOST_UPLOAD = 64 << 10, 32 << 20
UPLOADS = frozenset({"/like", "/api/similar"})
MOST_TARGET = 8 << 10
WRONG_TOKEN_S = 0.3
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around everything."""

    def __init__(self, app: Any, token: str | None, hosts: tuple[str, ...], metrics: Metrics) -> None:
        self.app = app
        self.token = _digest(token) if token else None
        self.hosts = frozenset(host.lower() for host in hosts)
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        with self.metrics.request(scope) as seen:

            async def answer(message: Any) -> None:
                if message["type"] == "http.response.start":
                    seen.status = message["status"]
                    given = {key.lower() for key, _ in message["headers"]}
                    message["headers"] += [(k, v) for k, v in HEADERS.items() if k not in given]
                await send(message)

            refusal = self._refusal(scope, headers)
            if refusal is None and not self._knows_token(headers) and scope["path"] not in OPEN_PATHS:
                if headers.get("authorization") or COOKIE in headers.get("cookie", ""):
                    await asyncio.sleep(WRONG_TOKEN_S)
                wants_page = "text/html" in headers.get("accept", "") and scope["method"] in ("GET", "HEAD")
                if wants_page and not scope["path"].startswith(("/api", "/metrics")):
                    await _plain(answer, 303, "a token is needed", [(b"location", b"/login")])
                    return
                refusal = (401, "a token is needed: send it as `Authorization: Bearer TOKEN`")
            if refusal is not None:
                await _plain(answer, *refusal)
                return
            limit = MOST_UPLOAD if scope["path"] in UPLOADS else MOST_BODY
            await self.app(scope, _bounded(receive, limit), answer)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._knows_host(host):
            return 421, f"this server does not answer to the name {host[:100]!r}: allow it with --allow-host"
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MOST_TARGET:
            return 414, "the address is too long"
        if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
            return 400, "a null byte in the address"
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self._own_page(headers, host):
            return 403, "changes come from this server's own pages, or without cookies"
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            return 400, "content-length is not a number"
        if length > (MOST_UPLOAD if scope["path"] in UPLOADS else MOST_BODY):
            return 413, "too large"
        return None

    def _knows_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        # With a token a foreign name gains nothing: the cookie is bound to the name it was set under.
        return is_loopback(name) or name in self.hosts or (self.token is not None and not self.hosts)

    def _own_page(self, headers: dict[str, str], host: str) -> bool:
        site = headers.get("sec-fetch-site")
        if site is not None and site not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        if origin is not None:
            try:
                return urlsplit(origin).netloc == host
            except ValueError:
                return False
        return "cookie" not in headers

    def _knows_token(self, headers: dict[str, str]) -> bool:
        if self.token is None:
            return True
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if kind.lower() == "bearer" else []
        cookie = cookie_token(headers.get("cookie", ""))
        if cookie is not None:
            given.append(cookie)
        return any([hmac.compare_digest(_digest(one), self.token) for one in given])

    def accepts(self, token: str) -> bool:
        """Whether this is the token, in constant time."""
        return self.token is None or hmac.compare_digest(_digest(token), self.token)


def cookie_token(header: str) -> str | None:
    """The token in a Cookie header."""
    try:
        held = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return None if held is None else held.value


def login_token(body: bytes) -> str:
    """The token in the form of the login page."""
    return (parse_qs(body.decode("latin-1")).get("token") or [""])[0]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _bounded(receive: Any, limit: int) -> Any:
    taken = 0

    async def bounded() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:  # a body without a length that goes on and on: as if the client had left
            return {"type": "http.disconnect"}
        return message

    return bounded


async def _plain(send: Any, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    start = {"type": "http.response.start", "status": status}
    kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 401:
        kind.append((b"www-authenticate", b"Bearer"))
    await send({**start, "headers": [*kind, *(headers or [])]})
    await send({"type": "http.response.body", "body": text.encode("utf-8", "replace") + b"\n"})
