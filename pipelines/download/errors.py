"""Why a URL brought no image: the classes, and whether another try may help.

A row's `error` is `class: detail`. Details are composed here and by whoever raises, never taken from a
library's message: those repeat URLs, and a URL may carry credentials or a signed query string.
"""

EXCLUDED = frozenset({"robots_disallowed", "x_robots_tag", "opted_out", "blocked_domain", "forgotten"})
"""Somebody asked us not to: status `excluded`."""

TRANSIENT = frozenset(
    {"timeout", "connection", "dns_temporary", "truncated", "robots_unreachable", "host_busy", "internal"}
    | {f"http_{code}" for code in (408, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531))}
)
"""Another try may bring it: status `transient`. Every other class is `failed`."""

NOT_SOON = frozenset({"host_busy", "robots_unreachable"})
"""Transient, but not worth another try within the run: they already waited or tried."""

PERMANENT = frozenset(
    {
        "bad_url",
        "scheme",
        "credentials",
        "private_address",
        "dns",
        "tls",
        "protocol",
        "too_large",
        "too_many_redirects",
        "redirect_loop",
        "bad_redirect",
        "content_encoding",
        "not_an_image",
        "unsupported_format",
        "too_many_pixels",
        "damaged",
    }
)


def known(name: str) -> bool:
    """Whether a word is one of our classes; guards against a library's message in its place."""
    return (
        name in EXCLUDED or name in TRANSIENT or name in PERMANENT or (name.startswith("http_") and name[5:].isdigit())
    )


def status_of(name: str) -> str:
    """The `status` of a row whose error is of this class."""
    if name in EXCLUDED:
        return "excluded"
    return "transient" if name in TRANSIENT else "failed"


class FetchError(Exception):
    """One failed request. str() is what the table's `error` column holds."""

    def __init__(self, name: str, detail: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{name}: {detail}" if detail else name)
        self.name = name
        self.detail = detail
        self.retry_after_s = retry_after_s

    @property
    def transient(self) -> bool:
        return self.name in TRANSIENT

    @property
    def soon(self) -> bool:
        """Whether another try in some seconds may help."""
        return self.transient and self.name not in NOT_SOON
