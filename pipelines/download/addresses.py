"""Which hosts may be asked at all: URLs taken apart strictly, addresses refused unless public.

A host is resolved once; what is checked is the numeric address that the connection is then made to, so
a name that changes its answer gains nothing.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from pipelines.download.errors import FetchError

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_CHARACTERS = 8192
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"
_SAFE_IN_QUERY = _SAFE_IN_PATH + "?[]{}|^`"
_LABEL = re.compile(r"^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$")
_NUMERIC_LABEL = re.compile(r"^(0x[0-9a-f]*|[0-9]+)$")
_BRACKETED = re.compile(r"^\[[0-9a-f:.]+\](:[0-9]*)?$", re.IGNORECASE)  # no zones: they name an interface of ours

# Other protocols' ports, on which an HTTP request may be taken for something else: what browsers refuse (WHATWG Fetch).
_PORTS = """0 1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115
117 119 123 135 137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601 636 989
990 993 995 1719 1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679 6697 10080"""
REFUSED_PORTS = frozenset(int(port) for port in _PORTS.split())

# Public by their range, private by their use.
_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's metadata and DNS
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata is among them
        "2001::/23",  # protocol assignments
        "192.88.99.0/24",  # relays into 6to4
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing inside one network
        "fec0::/10",  # site-local, abolished but routable inside some networks
        "::/8",  # IPv4-compatible and the unspecified address; IPv4-mapped is unwrapped before
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Target:
    """A URL that may be asked: `host` in lower-case ASCII (an IPv6 address without brackets)."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """scheme://host[:port], what robots.txt rules belong to."""
        return f"{self.scheme}://{self.netloc}"

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return self.origin + self.path


def parse(url: str) -> Target:
    """Take a URL apart. Raises FetchError: bad_url, scheme or credentials."""
    text = url.strip()
    if not text or len(text) > MAX_URL_CHARACTERS:
        raise FetchError("bad_url", "empty" if not text else f"longer than {MAX_URL_CHARACTERS} characters")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise FetchError("bad_url", "control characters")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise FetchError("bad_url", "cannot be parsed") from None
    scheme = parts.scheme.lower()
    if scheme not in DEFAULT_PORTS:
        shown = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]{0,15}", scheme) else "none"
        raise FetchError("scheme", f"{shown}, not http or https")
    if "@" in parts.netloc:
        raise FetchError("credentials", "a URL with a user name or password is not asked")
    if "\\" in parts.netloc or not parts.hostname:
        raise FetchError("bad_url", "no valid host")
    if ("[" in parts.netloc or "]" in parts.netloc) and not _BRACKETED.match(parts.netloc):
        raise FetchError("bad_url", "no valid host")
    if port in REFUSED_PORTS:
        raise FetchError("bad_url", "a port of another protocol")
    try:
        path = quote(parts.path, safe=_SAFE_IN_PATH) or "/"
        query = quote(parts.query, safe=_SAFE_IN_QUERY)
    except UnicodeEncodeError:  # half a surrogate pair
        raise FetchError("bad_url", "cannot be parsed") from None
    if not path.startswith("/"):
        raise FetchError("bad_url", "cannot be parsed")
    return Target(scheme, _host(parts.hostname), port or DEFAULT_PORTS[scheme], f"{path}?{query}" if query else path)


def _host(host: str) -> str:
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise FetchError("bad_url", "no valid host") from None
    try:
        ascii_host = host.encode("idna").decode().lower().rstrip(".")
    except (UnicodeError, ValueError):
        raise FetchError("bad_url", "no valid host") from None
    labels = ascii_host.split(".")
    if not ascii_host or len(ascii_host) > 253 or not all(_LABEL.match(label) for label in labels):
        raise FetchError("bad_url", "no valid host")
    if _NUMERIC_LABEL.match(labels[-1]):
        # 2130706433, 0x7f.1, 0177.0.0.1 and 127.1 are all 127.0.0.1 to a resolver: only plain dotted quads pass.
        try:
            return str(ipaddress.IPv4Address(ascii_host))
        except ValueError:
            raise FetchError("bad_url", "a numeric host that is not a dotted address") from None
    return ascii_host


def join(base: Target, location: str) -> str:
    """Where a redirect leads, as an absolute URL."""
    try:
        return urljoin(base.url, location.strip())
    except ValueError:
        raise FetchError("bad_redirect", "its location cannot be parsed") from None


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, whatever IPv6 notation wraps it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None and not is_public(address.sixtofour):
            return False
        if address.teredo is not None:
            return False
        word = int(address)
        if word >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(ipaddress.IPv4Address(word & 0xFFFFFFFF)):
            return False
    if any(address in network for network in _REFUSED if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def parse_allowed(entries: Sequence[str]) -> frozenset[tuple[str, int | None]]:
    """`host` or `host:port` entries, exactly these: (host, port or None for every port).

    Raises FetchError (bad_url) for an entry that is neither.
    """
    found = set()
    for entry in entries:
        text = entry.strip()
        target = parse(f"http://[{text}]/" if text.count(":") > 1 and not text.startswith("[") else f"http://{text}/")
        if target.path != "/":
            raise FetchError("bad_url", "no valid host")
        explicit = re.search(r":\d+$", text.rsplit("]", 1)[-1]) is not None and (text.count(":") == 1 or "]" in text)
        found.add((target.host, target.port if explicit else None))
    return frozenset(found)


def resolve(target: Target, allowed: frozenset[tuple[str, int | None]]) -> list[tuple[int, tuple[str, int]]]:
    """(family, (address, port)) of the host, checked: resolved once, only what may be connected to.

    A host in `allowed` may have any address; it must be written in the URL as it is there.
    Raises FetchError: private_address, dns, dns_temporary.
    """
    try:
        answers = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM, socket.EAI_MEMORY):
            raise FetchError("dns_temporary", "the name server did not answer") from None
        raise FetchError("dns", "no such host") from None
    except (UnicodeError, ValueError):
        raise FetchError("bad_url", "no valid host") from None
    except OSError:
        raise FetchError("dns_temporary", "the name server did not answer") from None
    exempt = (target.host, None) in allowed or (target.host, target.port) in allowed
    usable: list[tuple[int, tuple[str, int]]] = []
    refused = 0
    for family, _, _, _, place in answers:
        if family not in (socket.AF_INET, socket.AF_INET6):
            continue
        text = str(place[0])
        if exempt or ("%" not in text and is_public(ipaddress.ip_address(text))):
            if (family, (text, target.port)) not in usable:
                usable.append((family, (text, target.port)))
        else:
            refused += 1
    if usable:
        return usable
    if refused:
        raise FetchError("private_address", "the host's address is not public")
    raise FetchError("dns", "no such host")
