"""Retrieval: what each seed set brought, how similar it is by rank, clusters chosen and why, seeds and images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.audit.sections import SAMPLING
from curation.audit.sections.retrieval import chosen, figures, rule
from curation.audit.words import visible
from pipelines.server import shown
from pipelines.server.opened import Opened
from pipelines.server.rendering import number, score
from pipelines.server.served import Served
from pipelines.server.subjects import CARDS, TABLE, TILES, Card, Values, counted, row, table

FIGURES = ("planned", "nominal", "unique", "colliding", "shared")
NOTES = {
    "planned": "if no seed is lost",
    "nominal": "retrievals",
    "unique": "images",
    "colliding": "drawn by several seeds",
    "shared": "drawn by other sets too",
}


def page(served: Served, index: Opened, start: int, seed_set: str | None) -> Values:
    """The seed sets, or one of them in full; and seeds with what they drew. total: seeds in the list."""
    first, last = index.named("seeds", "seed_set", seed_set) if seed_set else (0, len(index.lists.get("seeds", [])))
    at = min(first + start, last)
    cards = [card for entry in index.rows("seeds", at, min(CARDS, last - at)) if (card := _card(index, entry))]
    sections: list[Values] = []
    if start == 0 and last > first:
        sections = _sets(served, index) if not seed_set else _set(served, index, seed_set)
    text = "Each seed stands before the images it drew; one that several seeds drew counts as several retrievals."
    seeds = {"title": "Seeds and the images they drew", "text": text, "cards": cards}
    found = {
        "lead": _rule(rule(served.stages, seed_set)) if seed_set else "What the seed sets drew out of the pool.",
        "sections": [*sections, seeds | {"empty": "No seed of this set drew an image."}],
        "total": last - first,
    }
    if seed_set and start == 0:
        row_of = _brought(served, index).get(seed_set, {})
        known = [(name, row_of[name]) for name in FIGURES if row_of.get(name) is not None]
        found["facts"] = [(name.capitalize(), number(value), NOTES[name]) for name, value in known]
    return found


def curves(index: Opened, seed_set: str) -> list[tuple[str, Any]]:
    """(words, chart) of a seed set: the curve of similarity by rank of sample mode, and the histograms."""
    drawn = [chart for mode, one in index.curves(seed_set).items() for chart in figures(seed_set, mode, one)]
    return [(chart["title"], chart["figure"]) for chart in drawn]


def _card(index: Opened, entry: Mapping[str, Any]) -> Card | None:
    if entry["seed_id"] is None:
        return None
    seed = int(entry["seed_id"])
    drawn, _ = index.retrieved("seed", seed, 0, TILES - 1)
    return Card(
        f"/seed/{seed}",
        f"{visible(entry['seed_set'], 30)} · seed {seed & ((1 << 40) - 1)}",
        f"drew {number(entry['images'])}, cosine {score(entry['least'])} to {score(entry['most'])}",
        index.some([seed, *(int(d["image_id"]) for d in drawn)], index.tiles),
    )


def _brought(served: Served, index: Opened) -> dict[str, Values]:
    """What each seed set brought, by its name; what no stage has said is counted in the table of retrieval."""
    found: dict[str, Values] = {}
    for entry in index.document.get("seed_sets", []):
        one = found.setdefault(entry["seed_set"], {"nominal": 0, "unique": entry["images"]})
        one["unique"] = None if one["nominal"] else one["unique"]  # two modes may have drawn the same images
        one["nominal"] += entry["nominal"]
    for said in served.seed_sets():
        one = found.setdefault(said["seed_set"], {})
        one |= {name: value for name, value in said.items() if value is not None}
    return found


def _sets(served: Served, index: Opened) -> list[Values]:
    known = _brought(served, index)
    by_set: dict[str, list[Values]] = {}
    for entry in index.document.get("seed_sets", []):
        by_set.setdefault(entry["seed_set"], []).append(entry)
    rows = []
    for name, entries in list(by_set.items())[:TABLE]:
        drawn = index.curves(name)
        median = next(iter(drawn.values())).quantile(0.5) if len(drawn) == 1 else None
        brought = known.get(name, {})
        rows.append(
            row(
                (visible(name, 80), "/retrieval?" + shown.query(seed_set=name)),
                " and ".join(visible(e["mode"], 20) for e in entries),
                *(number(brought[n]) if brought.get(n) is not None else "–" for n in FIGURES),
                f"{median:.3f}" if median is not None else "–",
            )
        )
    text = (
        "Nominal: retrievals, one that several seeds drew counts for each. Unique: images. Colliding: drawn by several "
        "seeds of the set. Shared: drawn by other sets too. Where the run has a manifest, of the images in it."
    )
    if len(by_set) > TABLE:
        text += f" These are the first {TABLE} of {number(len(by_set))} sets; /api/seed-sets has them all."
    heads = [*(name.capitalize() for name in FIGURES), "Median cosine"]
    return [table("Seed sets", ["Seed set", "Mode"], heads, rows, text=text)]


def _set(served: Served, index: Opened, seed_set: str) -> list[Values]:
    sections: list[Values] = []
    drawn = curves(index, seed_set)
    if drawn:
        sections.append({"title": "How similar", "charts": drawn})
    start, stop = index.named("taken", "seed_set", seed_set)
    taken = {t["cluster"]: t["images"] for t in index.lists["taken"].take(np.arange(start, stop))} if stop else {}
    found = chosen(served.stages, seed_set, taken, {})
    if found:
        asked = rule(served.stages, seed_set)
        text = f"Leaf clusters by the seeds in them; {found['more']} more were chosen." if found["more"] else ""
        if asked["seeds_in_clusters"] is not None:
            text = (
                f"{number(asked['seeds_in_clusters'])} of {number(asked['seeds'] or 0)} seeds lie in the clusters that "
                f"were chosen; a cluster needs {asked['min_seeds']}. {text}"
            )
        rows = [
            row(
                (f"1:{c['cluster']}", f"/cluster/1/{c['cluster']}"),
                *(number(c[n]) if c[n] is not None else "–" for n in ("seeds", "images", "taken")),
                value=c["seeds"] or 0,
            )
            for c in found["rows"][: SAMPLING.chosen_clusters]
        ]
        heads = ["Seeds in it", "Images in it", "Taken"]
        most = max([1, *(entry["value"] for entry in rows)])
        sections.append(table("Clusters chosen, and why", ["Cluster"], heads, rows, text=text, of=most))
    return sections


def _rule(asked: Mapping[str, Any]) -> str:
    """What was asked for a seed set, in words."""
    words = ""
    if asked["mode"] == "cluster":
        most = number(asked["per_cluster"]) if asked["per_cluster"] is not None else "all"
        words = (
            f"Cluster mode: every seed lies nearest to one leaf cluster; a leaf with at least {asked['min_seeds']} of "
            f"the seeds is chosen, and up to {most} of its images are taken in hash order"
        )
        words += f", {number(asked['cap'])} for the set. " if asked["cap"] is not None else ". "
    elif asked["mode"] == "sample":
        words = f"Sample mode: each seed draws its {asked['neighbours'] or ''} nearest images of the pool. "
    return words + (f"{counted(asked['seeds'], 'seed')} took part." if asked["seeds"] is not None else "")
