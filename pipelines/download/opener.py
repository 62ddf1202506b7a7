"""The opener that img2dataset's `urllib.request.urlopen` goes through in a worker.

It resolves a host once and connects to the address it checked, again at every redirect; asks robots.txt;
ends an answer at its size and total time; tries transient failures again. It builds on sockets, not on urllib's
handlers, so no proxy variable, file:// or ftp:// handler can come into play.
"""

import concurrent.futures
import contextlib
import io
import os
import random
import ssl
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from pipelines.download import addresses, connection
from pipelines.download.errors import FetchError
from pipelines.download.politeness import HostGate
from pipelines.download.robots import MAX_ROBOTS_BYTES, RobotsCache, forbidden_directive

REDIRECTS = (301, 302, 303, 307, 308)
ROBOTS_TIMEOUT_S = 15.0
MAX_RETRY_AFTER_S = 60.0
RESOLVED_FOR_S = 60.0
"""How long a host's checked addresses are used again. What is connected to is always what was checked."""
_RESOLVED_HOSTS = 10_000
_RESOLVER_THREADS = 64


@dataclass(frozen=True)
class FetchRules:
    """The bounds of a fetch; what each means stands in DownloadConfig."""

    timeout_s: float = 30.0
    max_bytes: int = 20 << 20
    max_redirects: int = 5
    attempts: int = 3
    backoff_s: float = 1.0
    user_agent_token: str = "lvd-curate"
    contact: str | None = None
    robots_expiry_s: float = 86400.0
    disallowed_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allow_hosts: tuple[str, ...] = ()
    blocked_domains: frozenset[str] = field(default_factory=frozenset)

    @property
    def user_agent(self) -> str:
        """Says who asks and where to complain; not a browser's."""
        return f"{self.user_agent_token}/1.0" + (f" (+{self.contact})" if self.contact else "")


class Opener:
    """Has the `open` that urllib.request.install_opener needs; safe to use from many threads."""

    def __init__(
        self,
        rules: FetchRules,
        gate: HostGate,
        opted_out: Callable[[str], bool] = lambda url: False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = rules
        self.gate = gate
        self.opted_out = opted_out
        self.tls = tls or ssl.create_default_context()
        self.allowed = addresses.parse_allowed(rules.allow_hosts)
        self.forbidden = frozenset(d.strip().lower() for d in rules.disallowed_directives)
        self.robots = RobotsCache(self._fetch_robots, rules.user_agent_token, rules.robots_expiry_s)
        self._resolvers = concurrent.futures.ThreadPoolExecutor(_RESOLVER_THREADS, "curate-resolve")
        self._resolved: dict[tuple[str, int], tuple[float, list[tuple[int, tuple[str, int]]]]] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let every urlopen of this process go through here for a while."""
        before = urllib.request._opener  # type: ignore[attr-defined]
        urllib.request.install_opener(self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            urllib.request.install_opener(before)

    def open(self, request: Any, data: object = None, timeout: Any = None) -> "Response":
        """What urlopen calls. `timeout` is the total time of one attempt. Raises FetchError."""
        url = request if isinstance(request, str) else request.full_url
        seconds = float(timeout) if isinstance(timeout, (int, float)) else self.rules.timeout_s
        return self._persist(lambda: self._follow(url, seconds))

    def _persist[T](self, fetch: Callable[[], T]) -> T:
        """Try again, later each time, what may pass soon."""
        for attempt in range(1, self.rules.attempts + 1):
            try:
                return fetch()
            except FetchError as error:
                if not error.soon or attempt == self.rules.attempts:
                    raise
                wait = self.rules.backoff_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                time.sleep(max(wait, min(error.retry_after_s or 0.0, MAX_RETRY_AFTER_S)))
        raise AssertionError("attempts is at least 1")

    def _follow(self, url: str, seconds: float) -> "Response":
        """One attempt: the request and its redirects, together within `seconds`."""
        seen: set[str] = set()
        left = seconds
        for _ in range(self.rules.max_redirects + 1):
            target = addresses.parse(url)
            if target.url in seen:
                raise FetchError("redirect_loop", "leads back to itself")
            seen.add(target.url)
            self._check_lists(target)
            delay_s = self.robots.check(target)
            reply = self._exchange(target, left, self.rules.max_bytes, self._accept, delay_s, "image/*,*/*;q=0.5")
            if reply.status in REDIRECTS:
                left -= reply.seconds
                if left <= 0:
                    raise FetchError("timeout", "not whole within the time bound")
                url = _location(target, reply.headers)
                continue
            if reply.status != 200:
                raise FetchError(f"http_{reply.status}", retry_after_s=_retry_after(reply.headers))
            return Response(target.url, reply.headers, reply.body)
        raise FetchError("too_many_redirects", f"more than {self.rules.max_redirects}")

    def _accept(self, status: int, headers: Message) -> bool:
        if status != 200:
            return False
        values = headers.get_all("X-Robots-Tag", [])
        directive = forbidden_directive(values, self.rules.user_agent_token, self.forbidden)
        if directive is not None:
            raise FetchError("x_robots_tag", directive)
        return True

    def _check_lists(self, target: addresses.Target) -> None:
        if self.rules.blocked_domains and is_blocked(target.host, self.rules.blocked_domains):
            raise FetchError("blocked_domain", target.host)
        if self.opted_out(target.url):
            raise FetchError("opted_out", "on the opt-out list")

    def _exchange(
        self,
        target: addresses.Target,
        seconds: float,
        max_bytes: int,
        accept: Callable[[int, Message], bool],
        delay_s: float,
        wanted: str,
    ) -> connection.Reply:
        headers = {"User-Agent": self.rules.user_agent, "Accept": wanted, "Accept-Encoding": "identity"}
        with self.gate.slot(target.host, delay_s):
            began = time.monotonic()
            places = self._resolve(target, seconds)
            reply = connection.exchange(
                target,
                places,
                headers,
                seconds=max(0.001, seconds - (time.monotonic() - began)),
                max_bytes=max_bytes,
                tls=self.tls,
                accept=accept,
            )
            reply.seconds = time.monotonic() - began
            return reply

    def _resolve(self, target: addresses.Target, seconds: float) -> list[tuple[int, tuple[str, int]]]:
        """The host's checked addresses. The system's resolver knows no time bound, so it is waited for, not called."""
        key = (target.host, target.port)
        expires, places = self._resolved.get(key, (0.0, []))
        if expires > time.monotonic():
            return places
        try:
            places = self._resolvers.submit(addresses.resolve, target, self.allowed).result(seconds)
        except TimeoutError:
            raise FetchError("timeout", "the name server did not answer in time") from None
        if len(self._resolved) >= _RESOLVED_HOSTS:
            self._resolved = {}
        self._resolved[key] = (time.monotonic() + RESOLVED_FOR_S, places)
        return places

    def _fetch_robots(self, target: addresses.Target) -> tuple[int, str]:
        return self._persist(lambda: self._ask_robots(target))

    def _ask_robots(self, target: addresses.Target) -> tuple[int, str]:
        seconds = min(ROBOTS_TIMEOUT_S, self.rules.timeout_s)
        for _ in range(6):
            if self.rules.blocked_domains and is_blocked(target.host, self.rules.blocked_domains):
                return 404, ""
            try:
                reply = self._exchange(
                    target, seconds, MAX_ROBOTS_BYTES, lambda status, _: status == 200, 0.0, "text/plain,*/*;q=0.5"
                )
            except FetchError as error:
                if error.name == "too_large":  # a robots.txt of that size is no robots.txt
                    return 404, ""
                raise
            if reply.status >= 500:
                raise FetchError(f"http_{reply.status}", retry_after_s=_retry_after(reply.headers))
            if reply.status not in REDIRECTS:
                return reply.status, reply.body.decode("utf-8-sig", errors="replace")
            target = addresses.parse(_location(target, reply.headers))
        raise FetchError("too_many_redirects")


class Response(io.BytesIO):
    """What download_image reads: `headers` and the whole body, already bounded."""

    def __init__(self, url: str, headers: Message, body: bytes) -> None:
        super().__init__(body)
        self.url = url
        self.status = 200
        self.headers = headers


def is_blocked(host: str, domains: Collection[str]) -> bool:
    """Whether a host is one of the domains or below one."""
    labels = host.split(".")
    return any(".".join(labels[start:]) in domains for start in range(len(labels)))


def _location(target: addresses.Target, headers: Message) -> str:
    location = headers.get("Location")
    if not location:
        raise FetchError("bad_redirect", "without a location")
    # Servers send raw UTF-8 in this header; http.client reads it as Latin-1.
    with contextlib.suppress(UnicodeEncodeError, UnicodeDecodeError):
        location = location.encode("latin-1").decode("utf-8")
    return addresses.join(target, location)


def _retry_after(headers: Message) -> float | None:
    value = (headers.get("Retry-After") or "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) < 8 else None


_current: tuple[str, int, Opener] | None = None


def worker_opener(key: str, make: Callable[[], Opener]) -> Opener:
    """This process's opener for `key`, made once: its robots.txt cache outlives the shard."""
    global _current
    if _current is None or _current[0] != key or _current[1] != os.getpid():
        _current = (key, os.getpid(), make())
    return _current[2]
