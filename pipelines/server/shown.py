"""Rows as JSON and as words: bytes as hexadecimal digits, nothing a browser could take for anything but text."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from curation.audit.site import DROPPED
from curation.audit.words import visible

HASHES = ("sha256", "stored_sha256", "pixel_sha256")


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the index for JSON. The PCA hash is hexadecimal: JSON's readers lose integers beyond 2^53."""
    found = {k: v for k, v in row.items() if k not in ("shard", "offset")}
    for name in HASHES:
        if isinstance(found.get(name), bytes):
            found[name] = found[name].hex()
    if found.get("pca_hash") is not None:
        found["pca_hash"] = f"{found['pca_hash']:016x}"
    return {k: _text(v) if isinstance(v, str) else _finite(v) for k, v in found.items()}


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value


def query(**values: str) -> str:
    """The query of an address."""
    return urlencode(values)


def name_of(row: Mapping[str, Any]) -> str:
    """What an image is called: its source and its number there."""
    source = str(row.get("source") or "").split(":", 1)[-1]
    return visible(f"{source} #{int(row['image_id']) & ((1 << 40) - 1)}", 60)


def state_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """(class, words): what became of an image."""
    if row.get("status") not in (None, "ok"):
        return "lost", visible(row["status"], 40)
    if row.get("weight") is not None:
        return "chosen", "in the dataset"
    if row.get("kept") is False:
        return "dropped", DROPPED.get(str(row.get("reason")), visible(row.get("reason"), 40))
    return "kept", "kept in the pool" if row.get("kept") else "usable"


def duration(seconds: float | None) -> str:
    """`1 h 20 min`, `3 min 5 s`, `12 s`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
