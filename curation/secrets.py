"""What people write into URLs and must not find again in a log: passwords, keys, signed queries.

Tables keep the URLs that were asked for (a retry needs them); events, sentences for people, data cards and reports
go through here.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_CREDENTIALS = re.compile(r"(//)[^/?#\s\"'<>]*@")
_QUERY = re.compile(
    r"(https?://[^\s?#\"'<>]*\?)[^\s#\"'<>]*[^\s#\"'<>:.,;)]"
    r"|([a-z][a-z0-9+.-]*://[^\s?#\"'<>]*\?)[^\s#\"'<>]*=[^\s#\"'<>]*[^\s#\"'<>:.,;)]",  # elsewhere `?` is a pattern's
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"\b([\w-]*(?:secret|password|passwd|signature|token|access[_-]?key|api[_-]?key)[\w-]*=)[^\s,;&\"']+", re.IGNORECASE
)


def without_credentials(url: str) -> str:
    """A URL as tables keep it: without the user name and password before its host."""
    return _CREDENTIALS.sub(rf"\1{HIDDEN}@", url)


def hide(text: str) -> str:
    """The text with `***` for credentials and queries of URLs, and for the values of `token=…` and its like."""
    if "://" in text:
        text = _QUERY.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", without_credentials(text))
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def hide_all(value: Any) -> Any:
    """`hide` for every text inside mappings and lists."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {key: hide_all(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_all(inner) for inner in value]
    return value
