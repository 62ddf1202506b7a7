"""Failures: what is not usable, by reason and by host."""

from collections import Counter
from urllib.parse import urlencode

from curation.audit.words import visible
from pipelines.server.opened import Opened
from pipelines.server.rendering import number
from pipelines.server.subjects import TABLE, Values, row, table


def page(index: Opened, start: int) -> Values:
    """Reasons on the first page; hosts, and pairs of both, a page at a time."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in index.document.get("counts", []):
        if entry["status"] not in ("ok", "dropped"):
            counts[(entry["status"], entry["error"] or "")] += entry["images"]
    most = max(counts.values(), default=0)
    reasons = [
        row(
            visible(status, 40),
            (
                visible(error or "–", 80),
                "/images?" + urlencode({"status": status, **({"error": error} if error else {})}),
            ),
            number(n),
            value=n,
        )
        for (status, error), n in counts.most_common(TABLE)
    ]
    kinds = ("images", "ok", "dropped", "failed", "other")
    hosts = [
        row((visible(h["host"], 80), "/images?" + urlencode({"host": h["host"]})), *(number(h[name]) for name in kinds))
        for h in index.rows("hosts", start, TABLE)
    ]
    pairs = [
        row(
            visible(f["host"] or "–", 80), visible(f["status"], 40), visible(f["error"] or "–", 80), number(f["images"])
        )
        for f in index.rows("failures", start, TABLE)
    ]
    heads = ["Images", "Usable", "Dropped", "Failed", "Other"]
    tables = [
        table("By reason", ["Status", "Reason"], ["Rows"], reasons, of=most, kind="loss"),
        table("Hosts, the largest first", ["Host"], heads, hosts),
        table("By host and reason", ["Host", "Status", "Reason"], ["Rows"], pairs),
    ]
    return {
        "lead": "failed is for good, transient may come with another `curate download --retry`, excluded was "
        "asked for by the host, duplicate_url was listed before.",
        "sections": tables if start == 0 else tables[1:],
        "total": max(len(index.lists.get("hosts", [])), len(index.lists.get("failures", []))),
    }
