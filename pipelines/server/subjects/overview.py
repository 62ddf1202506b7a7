"""The first page: the flow of the pool, what to look at first, sources, the data card."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from curation import storage
from curation.audit import charts, overview, site
from curation.audit.funnel import funnel
from curation.audit.overview import Finding
from curation.audit.sections.duplicates import described, recall
from pipelines.server.opened import Opened
from pipelines.server.rendering import number
from pipelines.server.served import Served
from pipelines.server.subjects import TABLE, Values
from pipelines.server.subjects.duplicates import outcomes

STEPS = {"fetched": "fetched and decoded", "in the manifest": "in the dataset"}
"""Steps of the funnel that the index counts a little otherwise than the data card."""
PAGES = ("failures", "filters", "duplicates", "decontamination", "clusters", "retrieval", "balance")


def menu(served: Served) -> list[tuple[str, str, str]]:
    """(where, name, count) of the pages that this run has."""
    index = served.opened
    live = [("/progress", "Progress", "")]
    if index is None:
        return [*live, ("/decisions", "Decisions", "")]
    lists = {name: len(held) for name, held in index.lists.items()}
    found = [("/", "Overview", ""), *live, ("/images", "Images", charts.short(len(index.ids)))]
    found.append(("/failures", "Failures", charts.short(lists.get("failures", 0)) if lists.get("failures") else ""))
    found.append(("/filters", "Filters", ""))
    if "components" in lists:
        found.append(("/duplicates", "Near copies", charts.short(lists["components"])))
        found.append(("/decontamination", "Decontamination", charts.short(lists["chains"])))
    if index.levels:
        found.append(("/clusters", "Clusters", charts.short(lists.get("clusters_1", 0))))
    if "seeds" in lists:
        found.append(("/retrieval", "Retrieval", charts.short(lists["seeds"])))
    if index.document.get("evenness"):
        found.append(("/balance", "Balance", ""))
    if index.spaces:
        found.append(("/like", "More like this", ""))
    found += [("/scan", "Scan", ""), ("/decisions", "Decisions", "")]
    if served.settings.compare:
        found.append(("/compare", "Compare", ""))
    return found


def page(served: Served) -> Values:
    """The flow of the pool, what stands out, the sources, the spaces of vectors."""
    index = served.index
    document = index.document
    licences = {s.name: s.licence for s in served.run.sources()}
    sources = [s | {"licence": licences.get(s["source"])} for s in document.get("steps", [])]
    reasons = outcomes(index)
    chosen = sum(s["chosen"] or 0 for s in sources)
    listed = sum(s["listed"] for s in sources)
    has_mix = any(s["chosen"] is not None for s in sources)
    facts = [
        ("Images listed", number(listed), ""),
        ("Usable", number(sum(s["usable"] for s in sources)), storage.in_units(sum(s["bytes"] or 0 for s in sources))),
    ]
    if "components" in index.lists:
        copies = sum(reasons.get(reason, 0) for reason in ("self", "exact", "hash"))
        facts.append(("Copies removed", number(copies), f"{number(len(index.lists['components']))} components"))
        facts.append(
            (
                "Removed for evaluation sets",
                number(reasons.get("reference", 0)),
                f"{number(len(index.lists['chains']))} components",
            )
        )
    if has_mix:
        facts.append(("In the dataset", number(chosen), ""))
    facts.append(("Hidden", number(len(served.hidden)), "by decisions, or forgotten"))
    words = (
        f"{number(chosen)} images were chosen from {number(listed)} listed."
        if has_mix
        else (f"{number(listed)} images are listed; none is chosen yet.")
    )
    counts = _counts(served, has_mix)
    steps = [s | {"step": STEPS.get(s["step"], s["step"])} for s in counts["funnel"].get("pool", [])]
    return {
        "facts": facts,
        "lead": words + " Every figure and list here is of all rows.",
        "sources": sources,
        "steps": steps,
        "funnel": charts.funnel(steps) if len(steps) > 1 else Markup(""),
        "findings": [(f, f"/{f.page}" if f.page in PAGES else "") for f in _findings(served, counts)],
        "card": site.card_texts(served.card),
        "spaces": {name: space.document for name, space in index.spaces.items()},
    }


def _counts(served: Served, has_mix: bool) -> Values:
    """Counts as the data card has them, of the index: `fetched`, `dedup`, `funnel`."""
    document = served.index.document
    numbers = {s.name: s.number for s in served.run.sources()}
    filtered = [e | {"reason": e["error"] or ""} for e in document.get("counts", [])]
    fetched = [e | {"status": "ok", "reason": ""} if e["status"] == "dropped" else e for e in filtered]
    dedup = [
        e | {"source_number": numbers.get(e["source"], -1), "kept": e["reason"] == "kept"}
        for e in document.get("reasons", [])
    ]
    inside = [
        {"source_number": numbers.get(s["source"], -1), "images": s["chosen"] or 0} for s in document.get("steps", [])
    ]
    sources = [{"number": s.number, "name": s.name, "rows": s.rows} for s in served.run.sources()]
    steps = funnel(sources, fetched, filtered, dedup or None, {}, inside if has_mix else None)
    return {"fetched": fetched, "dedup": dedup, "funnel": steps}


def _findings(served: Served, counts: Mapping[str, Any]) -> list[Finding]:
    """What the report's first page would say, of all rows."""
    index, document, stages = served.index, served.index.document, served.stages
    lost = [e for e in document.get("counts", []) if e["status"] not in ("ok", "dropped")]
    shown: dict[str, Values | None] = {
        "failures": {"reasons": lost, "hosts": _hosts(index)},
        "clusters": {"levels": document["levels"]} if document.get("levels") else None,
        "retrieval": {"rows": [row | {"href": ""} for row in served.seed_sets()]},
    }
    if "components" in index.lists:
        said = described(stages.file("dedup", "components"))
        sizes = [s["images"] for s in document["component_sizes"]]
        shown["duplicates"] = {
            "largest": max(sizes, default=0),
            "reasons": counts["dedup"],
            "recall": recall(stages.file("dedup", "recall")),
            "shown": [{"far": c.get("not_above_threshold_to_representative"), "images": c["images"]} for c in said],
        }
        dropped = sum(r["images"] for r in counts["dedup"] if r["reason"] == "reference")
        direct = document.get("dropped_directly") or 0
        shown["decontamination"] = {
            "dropped": dropped,
            "direct": direct,
            "chains": dropped - direct,
            "largest": next(iter(index.rows("chains", 0, 1)), None),
        }
    sources = [{"name": s.name, "licence": s.licence} for s in served.run.sources()]
    found = [*overview.findings(counts, shown), *overview.unlicensed(sources)]
    return sorted(found, key=lambda finding: finding.level != "warning")


def _hosts(index: Opened) -> list[Values]:
    """Hosts that lost most, by what the first page of the list of failures says: `host`, `images` lost, `rows`."""
    lost: dict[str, int] = {}
    for entry in index.rows("failures", 0, TABLE):
        if entry["host"] and entry["status"] in ("failed", "transient", "excluded"):
            lost[entry["host"]] = lost.get(entry["host"], 0) + entry["images"]
    return [
        {"host": host, "images": images, "rows": index.groups["host"].size(index.key("host", host))}
        for host, images in sorted(lost.items(), key=lambda item: -item[1])
    ]
