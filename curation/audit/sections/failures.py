"""Not fetched or not decoded: by reason, by host, with examples."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.audit import tables
from curation.audit.run_tables import RunTables
from curation.audit.scans import cut_text, first_rows, reason_class, stream, with_hash
from curation.audit.sections import SAMPLING, Section


def section(run: RunTables) -> Section | None:
    """Reasons with the step at which they showed, hosts with the share of their rows that was lost, pairs of both."""
    if not run.images:
        return None
    counted = _lost(tables.status_counts(run.images))
    before = _lost(tables.status_counts(run.fetched)) if run.fetched else counted
    rows: list[dict[str, Any]] = []
    for (status, reason), images in counted.items():
        fetching = min(images, before.get((status, reason), 0))
        for when, count in (("fetching", fetching), ("decoding", images - fetching)):
            if count:
                rows.append({"status": status, "reason": reason, "when": when, "images": count})
    rows.sort(key=lambda r: (-r["images"], r["status"], r["reason"], r["when"]))
    pairs, uncertain = tables.host_failures(run.images, SAMPLING.hosts)
    hosts = [row for row in tables.failing_hosts(run.images, SAMPLING.hosts).to_pylist() if row["host"]]
    return {
        "reasons": rows[: SAMPLING.table_rows],
        "hosts": hosts,
        "pairs": [row for row in pairs.to_pylist() if row["host"]],
        "uncertain": uncertain,
        "examples": _examples(run, rows),
        "total": sum(row["images"] for row in rows),
        "images": [],
    }


def _lost(counted: pa.Table) -> dict[tuple[str, str], int]:
    """(status, reason): rows that are neither usable nor dropped by a filter."""
    found: dict[tuple[str, str], int] = {}
    for row in counted.to_pylist():
        if row["status"] not in ("ok", "dropped"):
            key = row["status"], row["reason"]
            found[key] = found.get(key, 0) + row["images"]
    return found


def _examples(run: RunTables, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Per reason some URLs, in hash order."""
    columns = {"image_id": pc.field("image_id"), "reason": reason_class(), "url": cut_text("url")}
    lost = tables.lost() & pc.is_valid(pc.field("url"))
    found = first_rows(
        (with_hash(t, 0, "report failures") for t in stream(run.images, columns, lost, run.hidden)),
        "reason",
        SAMPLING.examples,
        [("hash", "ascending")],
    )
    shown = {row["reason"] for row in rows[: SAMPLING.reasons]}
    return {
        reason: [row["url"] for row in found if row["reason"] == reason]
        for reason in dict.fromkeys(row["reason"] for row in rows)
        if reason in shown and any(row["reason"] == reason for row in found)
    }
