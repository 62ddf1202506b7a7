"""Pages that are tables of something else than a stage: decisions, the comparison of two runs, the API, progress."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request

from curation.audit.words import visible
from pipelines.server.rendering import number
from pipelines.server.served import Served
from pipelines.server.subjects import TABLE, Onward, Values, row


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
        "sections": [{"title": "Newest first", "columns": columns, "rows": lines, "empty": "No decision yet."}],
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
    sections: list[Values] = [{"title": "By what brought them", "columns": heads, "rows": rows}]
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
        sections.append(
            {"title": words, "columns": columns, "rows": lines, "of": max([e["images"] for e in entries], default=0)}
        )
    return {
        "lead": f"{number(document['stayed'])} images are in both datasets, {number(document['entered'])} entered "
        f"since {other}, {number(document['left'])} left. Images are the same when their {document['by']} is.",
        "links": [(f"{number(document[s])} that {s}", f"/compare/{s}") for s in ("entered", "left")],
        "sections": sections,
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
        "sections": [{"title": "Paths", "columns": columns, "rows": rows}],
    }
