"""Retrieval: per seed set what was drawn, how similar it is by rank, seeds beside their images, clusters and why."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curation.audit import charts
from curation.audit.retrieval_tables import BINS, EDGES, Similarities, seed_samples, similarities, taken_by_cluster
from curation.audit.run_tables import RunTables
from curation.audit.sections import SAMPLING, Section


def section(
    run: RunTables, card_rows: Sequence[Mapping[str, Any]], leaf_pages: Mapping[int, str] | None = None
) -> Section | None:
    """The table of all seed sets, and under `pages` a page for each of the first. card_rows: of the data card.

    leaf_pages: the page that shows a leaf cluster, for those that one shows.
    """
    if not run.retrieval:
        return None
    most = max([1, *(row["nominal"] for row in card_rows)])
    rows = [_row(row, most) for row in card_rows[: SAMPLING.seed_table_rows]]
    known = {row["seed_set"]: row for row in rows}
    found = similarities(run.retrieval)
    shown: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in seed_samples(run.retrieval, SAMPLING.seeds, SAMPLING.retrieved, 0, run.hidden).to_pylist():
        shown.setdefault(row["seed_set"], {}).setdefault(row["seed_id"], []).append(row)
    taken = taken_by_cluster(run.retrieval)
    names = [row["seed_set"] for row in rows]
    names += sorted({*shown, *(name for name, _ in found)} - set(names))
    pages = [
        _page(run, number, name, known.get(name), found, shown.get(name, {}), taken.get(name, {}), leaf_pages or {})
        for number, name in enumerate(names[: SAMPLING.seed_sets], 1)
    ]
    for page in pages:
        if page["seed_set"] in known:
            known[page["seed_set"]]["href"] = page["name"] + ".html"
            known[page["seed_set"]]["median"] = page["median"]
    return {
        "rows": rows,
        "more_rows": max(0, len(card_rows) - len(rows)),
        "more_pages": max(0, len(names) - len(pages)),
        "pages": pages,
        "images": [],
    }


def _row(row: Mapping[str, Any], most: int) -> dict[str, Any]:
    width = row["nominal"] / most
    parts = [("", row["alone"]), ("shared", row["shared"]), ("again", row["nominal"] - row["unique"])]
    bar = charts.meter([(name, width * n / row["nominal"]) for name, n in parts]) if row["nominal"] else ""
    return {**row, "bar": bar, "href": None, "median": None}


def _page(
    run: RunTables,
    number: int,
    name: str,
    row: Mapping[str, Any] | None,
    found: Mapping[tuple[str, str], Similarities],
    seeds: Mapping[int, list[dict[str, Any]]],
    taken: Mapping[int, int],
    leaf_pages: Mapping[int, str],
) -> dict[str, Any]:
    mine = {mode: one for (seed_set, mode), one in found.items() if seed_set == name}
    middles = [one.quantile(0.5) for one in mine.values()]
    images = [i for seed, drawn in seeds.items() for i in (seed, *(d["image_id"] for d in drawn))]
    return {
        "name": f"retrieval-{number:02d}",
        "seed_set": name,
        "row": row,
        "median": middles[0] if len(middles) == 1 else None,
        "charts": [chart for mode, one in mine.items() for chart in figures(name, mode, one)],
        "seeds": list(seeds.items()),
        "rule": rule(run, name),
        "chosen": chosen(run, name, taken, leaf_pages),
        "images": images,
    }


def figures(name: str, mode: str, found: Similarities) -> list[dict[str, Any]]:
    """The curve by rank of sample mode (in cluster mode the rank is no order of similarity), and the histogram."""
    charted = []
    if mode == "sample":
        ranks, quantiles = found.curve()
        words = f"Similarity of what {name} drew by rank: median {quantiles[0, 1]:.2f} at rank {ranks[0]}"
        words += f", {quantiles[-1, 1]:.2f} at rank {ranks[-1]}"
        title = "Similarity by rank: median, and the middle 80 % of the seeds"
        charted.append({"title": title, "figure": charts.curves(ranks, quantiles, words)})
    step = BINS // 100
    counts = found.counts.sum(0).reshape(-1, step).sum(1)
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1]) + 1
    edges = EDGES[::step][low : high + 1]
    words = f"Similarities of all images that {name} drew in {mode} mode"
    title = f"All similarities of {mode} mode to the seed" + (" nearest to the image" if mode == "cluster" else "")
    chart = charts.histogram(counts[low:high], np.round(edges, 2), words, form="{:.2f}")
    charted.append({"title": title, "figure": chart})
    return charted


def rule(run: RunTables, name: str) -> dict[str, Any]:
    """What the configuration asked for this set: mode, neighbours, per_cluster, min_seeds, cap; and what came of it."""
    options = run.options.get("retrieve", {})
    own = (options.get("seed_sets") or {}).get(name) or {}
    said = (run.file("retrieve", "seed_sets") or {}).get(name) or {}
    asked = {
        k: own.get(k) if own.get(k) is not None else options.get(k)
        for k in ("mode", "neighbours", "per_cluster", "min_seeds", "cap")
    }
    if said.get("mode"):
        asked["mode"] = said["mode"]
    return {**asked, **{k: said.get(k) for k in ("seeds", "seeds_in_clusters", "before_cap", "clusters")}}


def chosen(run: RunTables, name: str, taken: Mapping[int, int], leaf_pages: Mapping[int, str]) -> dict[str, Any] | None:
    """Clusters of cluster mode, those with most seeds first: seeds, images inside, images taken, where to look."""
    said = (run.file("retrieve", "seed_sets") or {}).get(name) or {}
    listed = [c for c in said.get("chosen") or [] if isinstance(c, dict) and "cluster" in c]
    if not listed:
        return None
    rows = sorted(listed, key=lambda c: (-int(c.get("seeds", 0)), int(c["cluster"])))
    shown = [
        {
            "cluster": int(c["cluster"]),
            "seeds": c.get("seeds"),
            "images": c.get("images"),
            "taken": taken.get(int(c["cluster"]), 0),
            "page": leaf_pages.get(int(c["cluster"])),
        }
        for c in rows
    ]
    return {"rows": shown[: SAMPLING.chosen_clusters], "more": max(0, len(shown) - SAMPLING.chosen_clusters)}
