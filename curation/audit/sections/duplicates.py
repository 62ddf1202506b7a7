"""Near-duplicates: components by size, members side by side, the least similar pair, pairs at the threshold."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.audit import charts, tables
from curation.audit.run_tables import RunTables
from curation.audit.scans import cut_groups, histogram
from curation.audit.sections import SAMPLING, Section

REACH = 0.05
"""Pairs are at the threshold when they are this near it."""


def section(run: RunTables) -> Section | None:
    """Components, outcomes, similarities; None where the run has no such stage."""
    if not run.duplicates:
        return None
    threshold = run.option("dedup", "threshold")
    shown, sizes = _components(run)
    pairs = (
        tables.nearest_pairs(run.duplicates, threshold, REACH, SAMPLING.pairs_at_threshold, run.hidden)
        if threshold is not None
        else []
    )
    counts = tables.duplicate_counts(run.duplicates)
    reasons = counts.group_by(["kept", "reason"]).aggregate([("images", "sum")])
    reasons = reasons.rename_columns(["kept", "reason", "images"])
    reasons = reasons.sort_by([("kept", "descending"), ("images", "descending"), ("reason", "ascending")])
    similarities, edges = similarity_counts(run)
    images = [m["image_id"] for component in shown for m in component["members"]]
    images += [i for pair in pairs for i in (pair["image_id"], pair["nearest_id"])]
    images += [c["weakest"][end] for c in shown if c["weakest"] for end in ("low", "high")]
    images += [i for c in shown for i in c["least_pair"] or ()]
    images += [link["image_id"] for c in shown if c["chain"] for link in c["chain"]["links"]]
    label = "Components of near-duplicates by size (heights grow with the logarithm)"
    words = f"Cosine of {charts.number(similarities.sum())} images to their nearest one, where it is stored"
    return {
        "threshold": threshold,
        "reasons": reasons.to_pylist(),
        "components": sum(count for _, count in sizes),
        "in_components": sum(size * count for size, count in sizes),
        "largest": max((size for size, _ in sizes), default=0),
        "copies": sum(r["images"] for r in reasons.to_pylist() if not r["kept"] and r["reason"] != "reference"),
        "sweep": list((run.file("dedup", "thresholds") or {}).get("self", []))[: SAMPLING.table_rows],
        "shown": shown,
        "pairs": pairs,
        "reach": REACH,
        "recall": recall(run.file("dedup", "recall")),
        "figure": charts.sizes(sizes, label, "components"),
        "similarities": charts.histogram(similarities, edges, words, threshold=threshold, form="{:.2f}")
        if similarities.sum()
        else None,
        "with_nearest": int(similarities.sum()),
        "images": images,
    }


def similarity_counts(run: RunTables) -> tuple[np.ndarray, np.ndarray]:
    """Images by the cosine to their nearest one: (n,) int64 counts and (n + 1,) edges, from the lowest stored up."""
    edges = similarity_edges(run)
    return histogram(run.duplicates, pc.field("similarity"), edges), edges


def similarity_edges(run: RunTables) -> np.ndarray:
    """(n + 1,) from the lowest cosine that is stored up."""
    lowest = [t for n in ("threshold", "against_threshold", "store_threshold") if (t := run.option("dedup", n))]
    return np.arange(int(np.floor(50 * min([*lowest, 0.6]))), 51) / 50


def recall(document: Any) -> dict[str, Any] | None:
    """What the search says of its recall (`recall.json`): {exact, value, low, high, asked} where it is known."""
    if not isinstance(document, dict):
        return None
    inner: dict[str, Any] = document["self"] if isinstance(document.get("self"), dict) else document
    value = inner.get("recall")
    found = {end: inner.get(f"recall_{end}", inner.get(end)) for end in ("low", "high", "asked")}
    numbers = {k: float(v) if isinstance(v, (int, float)) else None for k, v in found.items()}
    if inner.get("method") == "exact":
        return {"exact": True, "value": 1.0, **numbers}
    return {"exact": False, "value": float(value), **numbers} if isinstance(value, (int, float)) else None


def _components(run: RunTables) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The components to show with their members, and (size, how many are of it)."""
    choose = SAMPLING.largest_components, SAMPLING.random_components
    chosen, sizes = tables.components(run.duplicates, "component_id", *choose, seed=0)
    groups = chosen["group"].combine_chunks()
    every = tables.component_members(run.duplicates, "component_id", groups, hidden=run.hidden)
    weakest = {}
    if run.self_forest:
        weakest = {row["group"]: row for row in tables.weakest_edges(run.self_forest, every).to_pylist()}
    kept = {
        row["group"]: row for row in every.group_by("group").aggregate([("kept", "sum"), ([], "count_all")]).to_pylist()
    }
    first = cut_groups(every, "group", SAMPLING.members, [("kept", "descending"), ("image_id", "ascending")])
    by_group: dict[int, list[dict[str, Any]]] = {}
    for row in first.to_pylist():
        by_group.setdefault(row["group"], []).append(row)
    known = {int(c["component_id"]): c for c in described(run.file("dedup", "components"))}
    shown = []
    for row in chosen.to_pylist():
        counted = kept.get(row["group"], {"kept_sum": 0, "count_all": 0})
        said = known.get(row["group"], {})
        shown.append(
            {
                **row,
                "kept": counted["kept_sum"],
                "hidden": row["images"] - counted["count_all"],
                "members": by_group.get(row["group"], []),
                "weakest": weakest.get(row["group"]),
                "least": said.get("least_similarity"),
                "least_pair": said.get("least_similar"),
                "far": said.get("not_above_threshold_to_representative"),
                "chain": chain_of(said),
            }
        )
    return shown, [(row["images"], row["components"]) for row in sizes.to_pylist()]


def described(document: Any) -> list[dict[str, Any]]:
    """What the stage says of its largest components (`components.json`: a list, or one under some key)."""
    for found in list(document.values()) if isinstance(document, dict) else [document]:
        if isinstance(found, list) and found and all(isinstance(c, dict) and "component_id" in c for c in found):
            return found
    return []


def chain_of(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """The chain of a component, its middle left out where it is long; None for what is no chain."""
    links = list(said.get("chain") or [])
    if len(links) < 3:
        return None
    half = SAMPLING.chain // 2
    cut = max(0, len(links) - SAMPLING.chain)
    return {"links": links if not cut else [*links[:half], *links[-half:]], "cut": cut}
