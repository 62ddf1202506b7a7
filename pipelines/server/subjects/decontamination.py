"""Decontamination: per reference set its hits side by side and at other thresholds; what was dropped together."""

from urllib.parse import quote

from curation.audit import charts
from curation.audit.sections.decontamination import THRESHOLDS
from curation.audit.words import visible
from pipelines.server.opened import Opened
from pipelines.server.rendering import number
from pipelines.server.served import Served
from pipelines.server.subjects import BESIDE, CARDS, TILES, Card, Values, counted, row, table
from pipelines.server.subjects.images import first_of, matches

SETS, LINKS = 12, 100
"""Reference sets with pictures on the first page, and with links; `/api/run` names them all."""


def page(served: Served, index: Opened, start: int) -> Values:
    """The components that went because of a reference image, the largest first; the sets on the first page."""
    cards = [
        Card(
            f"/chain/{r['reference_component_id']}",
            f"{counted(r['images'], 'image')} dropped",
            f"{number(r['direct'])} match a reference image directly",
            first_of(index, "chain", r["reference_component_id"], TILES),
        )
        for r in index.rows("chains", start, CARDS)
    ]
    sets = index.document.get("references", [])
    first = [*_tables(served, sets), *(_set(served, index, s) for s in sets[:SETS])] if start == 0 else []
    last = {"title": "Dropped together", "cards": cards, "empty": "Nothing matches a reference set."}
    return {
        "lead": "Components that hold an image of an evaluation set are dropped whole; the largest first.",
        "links": [
            (f"{visible(s['name'], 60)}: {number(s['images'])} direct matches", where(s["name"])) for s in sets[:LINKS]
        ],
        "sections": [*first, last],
        "total": len(index.lists.get("chains", [])),
    }


def where(name: str) -> str:
    """The page of a reference set."""
    return f"/reference/{quote(name, safe='')}"


def chart(served: Served, found: Values) -> tuple[str, object]:
    """How many images would match a set at other thresholds, the run's own marked."""
    at = {f"{t:.2f}": n for t, n in zip(THRESHOLDS, found.get("above") or [], strict=False)}
    words = (
        f"Images with a match in {visible(found['name'], 80)} above each threshold; none are stored below the run's own"
    )
    own = served.stages.option("dedup", "against_threshold")
    return words, charts.thresholds(at, words, own) if at else ""


def _tables(served: Served, sets: list[Values]) -> list[Values]:
    found = []
    said = {s["reference_set"]: s for s in served.stages.file("dedup", "references") or []}
    rows = [
        row(
            (visible(s["name"], 80), where(s["name"])),
            *(number(said.get(s["name"], {}).get(n) or 0) for n in ("images", "images_hit")),
            number(s["images"]),
            number(s["dropped"]),
            *(number(said.get(s["name"], {}).get(n) or 0) for n in ("component", "largest_component")),
        )
        for s in sets[:LINKS]
    ]
    if rows:
        heads = [
            "Its images",
            "With a match",
            "Images that match",
            "Dropped of these",
            "By component",
            "Largest component",
        ]
        found.append(table("Reference sets", ["Reference set"], heads, rows))
    sweep = (served.stages.file("dedup", "thresholds") or {}).get("relative", [])
    if sweep:
        rows = [
            row(f"{r['threshold']:.2f}", *(number(r[n]) for n in ("component", "direct", "largest")))
            for r in sweep[:40]
        ]
        heads = ["By component", "Direct matches alone", "Largest component"]
        text = "Images that would go, all reference sets together, seeds included. No new search."
        found.append(table("At other thresholds", ["Cosine above"], heads, rows, text=text))
    return found


def _set(served: Served, index: Opened, found: Values) -> Values:
    """A set with its best and its weakest matches side by side."""
    best = index.ranked("matches", found["name"], 0, BESIDE, table=index.tiles).images
    seen = {int(entry["image_id"]) for entry in best}
    weak = index.ranked("matches", found["name"], 0, BESIDE, True, index.tiles).images
    rows = [*best, *(entry for entry in weak[::-1] if int(entry["image_id"]) not in seen)]
    return {
        "title": visible(found["name"], 80),
        "text": f"{counted(found['images'], 'image')} with a direct match. The best and the weakest that count, each "
        "beside the reference image it is most similar to.",
        "charts": [chart(served, found)],
        "pairs": matches(index, rows, found["name"]),
        "more": ("All matches", where(found["name"])),
    }
