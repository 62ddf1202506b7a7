"""Pages that are tables: filters, failures, balance, decisions, the comparison of two runs, the API."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from fastapi import Request

from curation.audit import charts
from curation.audit.words import visible
from pipelines.server.figures import SCORE_NAMES, TABLE, THRESHOLDS, Onward, Values, option, row, score_chart
from pipelines.server.opened import Opened
from pipelines.server.rendering import number, score
from pipelines.server.served import Served


def filters(served: Served, index: Opened) -> Values:
    """Histograms of the scores, what was dropped and why."""
    links, drawn = [], []
    for name in index.orders:
        if name == "similarity":
            continue
        chart = score_chart(served, index, name)
        if chart:
            at = option(served, *THRESHOLDS[name])
            drawn.append((f"{SCORE_NAMES[name]}, logarithmic heights", chart))
            links.append((f"{SCORE_NAMES[name]}: around {score(at or 0)}", f"/scores/{name}?value={at or 0:g}"))
    counts: Counter[str] = Counter()
    for entry in index.document.get("counts", []):
        if entry["status"] == "dropped":
            counts[entry["error"] or "dropped"] += entry["images"]
    most = max(counts.values(), default=0)
    rows = [
        row((visible(reason, 80), "/images?" + urlencode({"error": reason, "status": "dropped"})), number(n), value=n)
        for reason, n in counts.most_common(TABLE)
    ]
    table = {
        "title": "Dropped",
        "columns": [("Reason", False), ("Images", True)],
        "rows": rows,
        "of": most,
        "kind": "loss",
    }
    return {
        "lead": "Scores of every image that was read. The images around a threshold tell whether it is the right one.",
        "links": links,
        "charts": drawn,
        "tables": [table | {"empty": "Nothing was dropped."}],
    }


def failures(index: Opened, start: int, request: Request, onward: Onward) -> Values:
    """What is not usable: by reason, by host."""
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
    hosts = [
        row(
            (visible(h["host"], 80), "/images?" + urlencode({"host": h["host"]})),
            *(number(h[name]) for name in ("images", "ok", "dropped", "failed", "other")),
        )
        for h in index.rows("hosts", start, TABLE)
    ]
    pairs = [
        row(
            visible(f["host"] or "–", 80),
            visible(f["status"], 40),
            visible(f["error"] or "–", 80),
            number(f["images"]),
        )
        for f in index.rows("failures", start, TABLE)
    ]
    columns = [("Status", False), ("Reason", False), ("Rows", True)]
    head = [("Host", False), *((n, True) for n in ("Images", "Usable", "Dropped", "Failed", "Other"))]
    tables = [
        {"title": "By reason", "columns": columns, "rows": reasons, "of": most, "kind": "loss"},
        {"title": "Hosts, the largest first", "columns": head, "rows": hosts},
        {"title": "By host and reason", "columns": [("Host", False), *columns], "rows": pairs},
    ]
    total = max(len(index.lists.get("hosts", [])), len(index.lists.get("failures", [])))
    return {
        "lead": "failed is for good, transient may come with another `curate download --retry`, excluded was "
        "asked for by the host, duplicate_url was listed before.",
        "tables": tables if start == 0 else tables[1:],
        "next": onward(request, start=start + TABLE) if start + TABLE < total else None,
    }


def balance(index: Opened) -> Values:
    """How evenly clusters and sources are filled, before and after."""
    levels = [
        row(
            level,
            number(b["clusters"]),
            number(b["chosen_from"] or 0),
            *(f"{b[side]:,.1f}" if b[side] is not None else "–" for side in ("before", "after")),
        )
        for level, b in index.document.get("balance", {}).items()
    ]
    heads = ["Clusters", "Chosen from", "As even as so many, before", "after"]
    table = {"title": "Levels", "columns": [("Level", False), *((n, True) for n in heads)], "rows": levels}
    table["text"] = "exp of the entropy of the shares: so many equal clusters would be as even."
    before, after, gini = _shares(index)
    drawn = []
    if len(before):
        words = "Share of the clusters, the largest of the pool first"
        drawn.append((words, charts.before_after(before, after, "Shares of clusters")))
    steps = [s for s in index.document.get("steps", []) if s["kept"] is not None or s["usable"]]
    totals = {n: sum(s[n] or 0 for s in steps) or 1 for n in ("usable", "chosen")}
    sources = [
        row(
            visible(s["source"], 80),
            f"{s['usable'] / totals['usable']:.1%}",
            f"{(s['chosen'] or 0) / totals['chosen']:.1%}",
        )
        for s in steps
    ]
    columns = [("Source", False), ("Share of the usable", True), ("Share of the dataset", True)]
    return {
        "lead": f"Gini coefficient over the leaf clusters: {gini[0]:.3f} in the pool, {gini[1]:.3f} in the dataset "
        "(0 is even, 1 is all in one).",
        "charts": drawn,
        "tables": [table, {"title": "Sources", "columns": columns, "rows": sources}],
    }


@lru_cache(4)
def _shares(index: Opened) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    found: list[tuple[int, int]] = []
    total = len(index.lists.get("clusters_1", []))
    for start in range(0, total, 4096):
        found += [(r["images"], r["chosen"]) for r in index.rows("clusters_1", start, 4096)]
    before, after = (np.array([f[i] for f in found], np.float64) for i in range(2))
    return before, after, (_gini(before), _gini(after))


def _gini(counts: np.ndarray) -> float:
    ordered = np.sort(counts)
    total = ordered.sum()
    if not total:
        return 0.0
    count = len(ordered)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * total))


def stage_failures(live: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(stage, reason, rows) so far, the most frequent first."""
    found = []
    for stage in live["stages"]:
        found += [(stage["stage"], reason, count) for reason, count in stage["failures"].items()]
    return sorted(found, key=lambda f: -f[2])[:TABLE]


def decided(served: Served, rows: Sequence[Values], total: int, start: int, onward: Onward, request: Request) -> Values:
    """The batches of decisions."""
    where = {"image": "/image/{}", "component": "/component/{}", "host": "/images?host={}"}
    lines = []
    for entry in rows:
        if "error" in entry:
            lines.append(row(entry["batch"], "", "", visible(entry["error"], 100), "", "", ""))
            continue
        target = str(entry["target"])
        href = where.get(entry["scope"], "").format(quote(target, safe="")) if target else ""
        if entry["scope"] == "cluster":
            href = "/cluster/" + "/".join(quote(p, safe="") for p in target.split(":", 1))
        made = entry["made_at"].strftime("%Y-%m-%d %H:%M:%S")
        about = (visible(f"{entry['scope']} {target}", 80), href) if href else visible(f"{entry['scope']} {target}", 80)
        lines.append(
            row(
                made,
                visible(entry["author"], 60),
                entry["action"],
                about,
                number(entry["images"]),
                visible(entry["note"] or "", 300),
            )
        )
    columns = [
        ("When (UTC)", False),
        ("By", False),
        ("Action", False),
        ("On", False),
        ("Images", True),
        ("Note", False),
    ]
    return {
        "lead": f"{number(total)} batches; {number(len(served.hidden))} images are hidden now. The last decision on an "
        "image counts: to bring back what was dropped, open it and keep it. `curate mix` and `curate manifest` apply "
        "them.",
        "tables": [{"title": "Newest first", "columns": columns, "rows": lines, "empty": "No decision yet."}],
        "next": onward(request, start=start + len(rows)) if start + len(rows) < total else None,
    }


def compared(served: Served) -> Values:
    """What entered and left, by what brought it and by cluster."""
    document = served.compared().document
    other = visible(str(served.settings.compare).rstrip("/").rsplit("/", 1)[-1], 60)
    names = {
        side: {e["name"]: e["images"] for e in document[f"{side}_by_source"]}
        for side in ("new", "old", "entered", "left")
    }
    every = sorted(
        set(names["new"]) | set(names["old"]), key=lambda n: -max(names["new"].get(n, 0), names["old"].get(n, 0))
    )
    rows = [
        row(visible(n, 80), *(number(names[s].get(n, 0)) for s in ("old", "left", "entered", "new")))
        for n in every[:TABLE]
    ]
    heads = [("Brought by", False), (f"In {other}", True), ("Left", True), ("Entered", True), ("In this run", True)]
    tables: list[Values] = [{"title": "By what brought them", "columns": heads, "rows": rows}]
    for side, words in (
        ("entered", "Entered, by this run's leaf clusters"),
        ("left", "Left, by the other run's leaf clusters"),
    ):
        entries = document[f"{side}_by_cluster"][:TABLE]
        lines = [
            row(
                (f"1:{e['name']}", f"/cluster/1/{e['name']}") if side == "entered" else f"1:{e['name']}",
                number(e["images"]),
                value=e["images"],
            )
            for e in entries
        ]
        columns = [("Cluster", False), ("Images", True)]
        tables.append(
            {"title": words, "columns": columns, "rows": lines, "of": max([e["images"] for e in entries], default=0)}
        )
    return {
        "lead": f"{number(document['stayed'])} images are in both datasets, {number(document['entered'])} entered "
        f"since {other}, {number(document['left'])} left. Images are the same when their {document['by']} is.",
        "links": [(f"{number(document[s])} that {s}", f"/compare/{s}") for s in ("entered", "left")],
        "tables": tables,
    }


def compared_rows(served: Served, side: str, rows: Sequence[Values]) -> list[Values]:
    """Tiles of what entered or left; what left is shown by the other run's bytes, with what became of it here."""
    by_id = served.compared().document["by"] == "image_id"
    known = {int(r["image_id"]): r for r in served.index.some([int(r["image_id"]) for r in rows])} if by_id else {}
    found = []
    for entry in rows:
        number_of = int(entry["image_id"])
        note = ", ".join(visible(s, 40) for s in entry["sources"] or [])
        if side == "entered":
            found.append(entry | {"status": "ok", "weight": 1.0, "note": note})
            continue
        here = known.get(number_of)
        small = f"/compare/left/{number_of}/thumbnail"
        state = {k: here.get(k) for k in ("status", "kept", "reason", "weight")} if here else {"status": "not here"}
        href = f"/image/{number_of}" if here else "/compare/left"
        found.append(entry | state | {"note": note, "small": small, "href": href})
    return found


def described(openapi: Mapping[str, Any]) -> Values:
    """The API as a table."""
    rows = [
        row(method.upper(), path, visible(operation.get("description") or operation.get("summary") or "", 300))
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    columns = [("Method", False), ("Path", False), ("What it does", False)]
    return {
        "lead": "Lists have bounded pages and a cursor: `after` or `next` of a page is `after` or `start` of the next.",
        "links": [("OpenAPI document", "/api/openapi.json")],
        "tables": [{"title": "Paths", "columns": columns, "rows": rows}],
    }
