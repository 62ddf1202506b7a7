"""What is asked of the block list when images come in: their URLs and domains before, their bytes after.

A URL is compared in one form: as `pipelines.download` would ask for it, user names and passwords masked. Rows that are
kept out say `forgotten` and nothing of what they were: no URL, caption, bytes or hash of them enters the run again.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from curation.blocklist import BYTES, DOMAIN, REASON, URL, BlockList
from pipelines.download import addresses
from pipelines.download.errors import FetchError
from pipelines.download.url_keys import normalise

BY_URL, BY_BYTES = f"{REASON}: by its URL", f"{REASON}: by its bytes"
_PLAIN = re.compile(r"https?://(?:[a-z0-9-]+\.)+[a-z]+/[A-Za-z0-9/_.~=&?-]*")
_CREDENTIALS = re.compile(r"(//)[^/@?#]*@")


def url_form(url: str) -> str:
    """The form in which URLs are compared."""
    if _PLAIN.fullmatch(url):
        return url
    try:
        return addresses.parse(url).url
    except FetchError:
        return normalise(_CREDENTIALS.sub(r"\1***@", url))


def url_digest(url: str) -> bytes:
    """16 bytes: of the form in which URLs are compared."""
    return hashlib.blake2b(url_form(url).encode(errors="replace"), digest_size=16).digest()


def domain_digest(domain: str) -> bytes:
    """16 bytes, of a name in lower-case ASCII."""
    return hashlib.blake2b(domain.encode(errors="replace"), digest_size=16).digest()


def host_of(url: str) -> str | None:
    """The host of a URL in lower case without its port; None for what has none."""
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(\[[^\]/]*\]|[^/?#:]*)", url_form(url))
    return found.group(1).strip("[].").lower() or None if found else None


def parents(host: str) -> Iterator[str]:
    """The host and every domain above it."""
    labels = host.split(".")
    return (".".join(labels[start:]) for start in range(len(labels)))


class Blocked:
    """The block list of a run as downloads and imports ask it; nothing is blocked by None."""

    def __init__(self, known: BlockList | None) -> None:
        self.known = known
        self._hosts: dict[str, bool] = {}

    def urls(self, urls: Sequence[str | None]) -> np.ndarray:
        """(n,) bool: URLs that are on the list or belong to a domain that is; None never does."""
        if self.known is None:
            return np.zeros(len(urls), bool)
        found = self.known.holds(URL, [None if url is None else url_digest(url) for url in urls])
        if len(self.known.keys.get(DOMAIN, ())):
            found |= np.array([url is not None and self._domain(url) for url in urls], bool)
        return found

    def bytes(self, digest: bytes) -> bool:
        """Whether these are the bytes of a forgotten image. digest: their sha256."""
        return self.known is not None and bool(self.known.holds(BYTES, [digest])[0])

    def _domain(self, url: str) -> bool:
        host = host_of(url)
        if host is None or self.known is None:
            return False
        if host not in self._hosts:
            if len(self._hosts) > 1 << 16:
                self._hosts.clear()
            names = [domain_digest(name) for name in parents(host)]
            self._hosts[host] = bool(self.known.holds(DOMAIN, names).any())
        return self._hosts[host]


def without_blocked(tables: Iterable[pa.Table], blocked: Blocked, column: str) -> Iterator[pa.Table]:
    """Rows of a list; those whose `column` is a blocked URL lose all texts and say so in `error`.

    tables: with the columns of `pipelines.pieces.PIECE` that there are.
    """
    for table in tables:
        mask = blocked.urls(table[column].to_pylist())
        yield emptied(table, mask) if mask.any() else table


def emptied(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """The table with all texts of the rows at which `mask` (n,) bool is true gone, and `error` in their place."""
    for name in ("place", "url", "caption", "label", "error"):
        if name in table.column_names:
            put = BY_URL if name == "error" else None
            values = [put if out else value for out, value in zip(mask, table[name].to_pylist(), strict=True)]
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values, pa.string()))
    return table
