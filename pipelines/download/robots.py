"""What a site asks of robots: robots.txt (RFC 9309) per origin, and the X-Robots-Tag of an answer."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.download.addresses import Target, parse
from pipelines.download.errors import FetchError

MAX_ROBOTS_BYTES = 512_000
"""RFC 9309 asks for at least 500 KiB; what follows is not read."""
MAX_WILDCARDS = 20_000
"""More than anybody writes: the rules of such a file would be looked at for a tenth of a second per URL."""
UNREACHABLE_EXPIRY_S = 300.0
_CACHED_ORIGINS = 50_000
_DIRECTIVES_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass
class _Rules:
    """rules None: everything is allowed. `failure`: robots.txt could not be had, nothing is allowed."""

    rules: Any
    failure: FetchError | None
    expires: float


class RobotsCache:
    """Asks each origin's robots.txt once per expiry. fetch(target) -> (status, text); it follows redirects."""

    def __init__(self, fetch: Callable[[Target], tuple[int, str]], token: str, expiry_s: float) -> None:
        self.fetch = fetch
        self.token = token
        self.expiry_s = expiry_s
        self._rules: OrderedDict[str, _Rules] = OrderedDict()
        self._asking: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def check(self, target: Target) -> float:
        """Raise FetchError where the rules forbid `target`; else the Crawl-delay in seconds, 0 without one.

        No robots.txt (a 4xx) allows everything; an unreachable one (5xx, no connection) nothing, for now.
        """
        found = self._get(target)
        if found.failure is not None:
            if found.failure.transient or found.failure.name.startswith("http_"):
                raise FetchError("robots_unreachable", str(found.failure))
            raise FetchError(found.failure.name, found.failure.detail)
        if found.rules is None:
            return 0.0
        if not found.rules.can_fetch(target.url, self.token):
            raise FetchError("robots_disallowed", "robots.txt of the host")
        return float(found.rules.crawl_delay(self.token) or 0.0)

    def _get(self, target: Target) -> _Rules:
        origin = target.origin
        while True:
            with self._lock:
                found = self._rules.get(origin)
                if found is not None and found.expires > time.monotonic():
                    self._rules.move_to_end(origin)
                    return found
                waiting = self._asking.get(origin)
                if waiting is None:
                    mine = self._asking[origin] = threading.Event()
                    break
            waiting.wait()
        try:
            found = self._ask(origin)
            with self._lock:
                self._rules[origin] = found
                while len(self._rules) > _CACHED_ORIGINS:
                    self._rules.popitem(last=False)
            return found
        finally:
            with self._lock:
                del self._asking[origin]
            mine.set()

    def _ask(self, origin: str) -> _Rules:
        now = time.monotonic()
        try:
            status, text = self.fetch(parse(f"{origin}/robots.txt"))
        except FetchError as error:
            if error.name.startswith("http_"):
                return _Rules(None, FetchError(error.name), now + min(self.expiry_s, UNREACHABLE_EXPIRY_S))
            if error.name in ("too_many_redirects", "redirect_loop", "bad_redirect"):
                return _Rules(None, None, now + self.expiry_s)
            return _Rules(None, error, now + min(self.expiry_s, UNREACHABLE_EXPIRY_S))
        if 400 <= status < 500 and status != 429:
            return _Rules(None, None, now + self.expiry_s)
        if status != 200:
            return _Rules(None, FetchError(f"http_{status}"), now + min(self.expiry_s, UNREACHABLE_EXPIRY_S))
        return _Rules(parse_rules(text), None, now + self.expiry_s)


def parse_rules(text: str) -> Any:
    """A robots.txt as protego's rules; None (everything is allowed) for what it cannot make sense of.

    One with more than MAX_WILDCARDS wildcards is obeyed without being understood: it allows nothing.
    """
    from protego import Protego

    if text.count("*") > MAX_WILDCARDS:
        text = "User-agent: *\nDisallow: /"
    try:
        return Protego.parse(text)
    except Exception:  # hostile input in a third party's parser: as good as no file
        return None


def forbidden_directive(values: Iterable[str], token: str, forbidden: frozenset[str]) -> str | None:
    """The first forbidden directive that X-Robots-Tag values address to everyone or to `token`.

    A value is `noai, noindex` or `token: noai, noindex`; an agent's name holds until the next one.
    """
    for value in values:
        agent: str | None = None
        for piece in value.split(","):
            head, colon, rest = piece.partition(":")
            directive = piece.strip().lower()
            if colon and head.strip().lower() not in _DIRECTIVES_WITH_VALUES:
                agent, directive = head.strip().lower(), rest.strip().lower()
            if directive in forbidden and agent in (None, "*", token.lower()):
                return directive
    return None
