"""The sections of the report: which figures, which samples, and which images they want to show.

Each function takes paths of tables and returns a plain dictionary for the template with `images`: the ids it wants to
show, the most telling first. How much is shown is `SAMPLING`, whatever the run's size, and stands on the page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit import figures, tables
from curation.audit.scans import REASON, count_by, first_per_group, histogram, stream, with_hash

Section = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How much of each thing the page shows."""

    hosts: int = 25
    dropped_per_reason: int = 12
    reasons: int = 12
    largest_components: int = 8
    random_components: int = 16
    members: int = 12
    chain: int = 10
    exact_pairs: int = 12
    best_matches: int = 8
    random_matches: int = 8
    reference_sets: int = 40
    component_of_references: int = 24
    largest_clusters: int = 6
    drawn_clusters: int = 12
    random_clusters: int = 12
    nearest: int = 8
    random_members: int = 8
    seed_sets: int = 40
    seeds: int = 6
    retrieved: int = 7
    table_rows: int = 200
    seed_table_rows: int = 100


SAMPLING = Sampling()


@dataclass(frozen=True)
class RunTables:
    """Paths of the parts that count, empty where the run has no such stage."""

    images: Sequence[str] = ()
    duplicates: Sequence[str] = ()
    self_forest: Sequence[str] = ()
    clusters: Sequence[str] = ()
    retrieval: Sequence[str] = ()
    balance: Sequence[str] = ()
    manifest: Sequence[str] = ()
    side_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def failures(run: RunTables) -> Section | None:
    """What was not fetched or not usable: by reason, by host."""
    if not run.images:
        return None
    counted = tables.status_counts(run.images)
    lost = counted.filter(~pc.field("status").isin(["ok", "dropped"]))
    by_reason = (
        lost.group_by(["status", "reason"])
        .aggregate([("images", "sum")])
        .rename_columns(["status", "reason", "images"])
    )
    order = [("images", "descending"), ("status", "ascending"), ("reason", "ascending")]
    hosts = tables.host_failures(run.images, SAMPLING.hosts)
    return {
        "reasons": by_reason.sort_by(order).slice(0, SAMPLING.table_rows).to_pylist(),
        "hosts": [row for row in hosts.to_pylist() if row["host"]],
        "total": int(pc.sum(lost["images"]).as_py() or 0),
        "images": [],
    }


def filters(run: RunTables, limits: Mapping[str, float | None]) -> Section | None:
    """Histograms of the scores, what was dropped by reason with samples, and exact copies side by side.

    limits: thresholds of the configuration by score, where it has them.
    """
    if not run.images:
        return None
    dropped = pc.field("status") == "dropped"
    counted = count_by(run.images, {"reason": REASON}, dropped).sort_by(
        [("images", "descending"), ("reason", "ascending")]
    )
    copies = dropped & pc.is_valid(pc.field("duplicate_of"))
    alone = dropped & ~pc.is_valid(pc.field("duplicate_of"))
    samples = _hashed(run.images, {"reason": REASON}, alone, "reason", SAMPLING.dropped_per_reason, "report dropped")
    pairs = _hashed(
        run.images,
        {"reason": REASON, "of": pc.field("duplicate_of")},
        copies,
        "reason",
        SAMPLING.exact_pairs,
        "report copies",
    )
    reasons = counted.slice(0, SAMPLING.reasons).to_pylist()
    for row in reasons:
        row["samples"] = [s["image_id"] for s in samples if s["reason"] == row["reason"]]
        row["pairs"] = [(s["of"], s["image_id"]) for s in pairs if s["reason"] == row["reason"]]
    shown = [i for row in reasons for i in [*row["samples"], *(x for pair in row["pairs"] for x in pair)]]
    return {"reasons": reasons, "histograms": _histograms(run.images, limits), "images": shown}


def _hashed(
    paths: Sequence[str], columns: Mapping[str, Any], where: Any, group: str, count: int, purpose: str
) -> list[Any]:
    found = first_per_group(
        (with_hash(t, 0, purpose) for t in stream(paths, {"image_id": pc.field("image_id"), **columns}, where)),
        group,
        count,
        [("hash", "ascending")],
    )
    return [] if found is None else list(found.to_pylist())


def _histograms(paths: Sequence[str], limits: Mapping[str, float | None]) -> list[dict[str, Any]]:
    width, height = pc.field("width"), pc.field("height")
    least, most = pc.min_element_wise(width, height), pc.max_element_wise(width, height)
    sides = np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192], float)
    ratios = np.array([1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 6, 10, 20], float)
    ratio = pc.divide(most.cast(pa.float64()), least.cast(pa.float64()))
    faces = pc.list_value_length(pc.field("faces")).cast(pa.float64())
    probabilities, luminances, small = np.linspace(0, 1, 41), np.linspace(0, 128, 33), np.arange(0, 12, dtype=float)
    plans = [
        ("nsfw", "NSFW score", pc.field("nsfw"), probabilities, True, "{:.2f}"),
        ("contrast", "Contrast (deviation of luminance)", pc.field("contrast"), luminances, False, "{:.0f}"),
        ("min_side", "Shorter side, pixels", least.cast(pa.float64()), sides, False, "{:.0f}"),
        ("aspect_ratio", "Aspect ratio, longer by shorter side", ratio, ratios, False, "{:g}"),
        ("faces", "Faces found per image", faces, small, True, "{:.0f}"),
    ]
    found = []
    for name, title, expression, edges, log, form in plans:
        counts = histogram(paths, expression, edges)
        if counts.sum():
            label = f"{title}: {figures.number(counts.sum())} images" + (
                " (heights grow with the logarithm)" if log else ""
            )
            figure = figures.histogram(counts, edges, label, threshold=limits.get(name), log=log, form=form)
            found.append({"name": name, "title": title, "log": log, "images": int(counts.sum()), "figure": figure})
    return found


def duplicates(
    run: RunTables, described: Sequence[Mapping[str, Any]] = (), sweep: Sequence[Mapping[str, Any]] = ()
) -> Section | None:
    """Components of near-duplicates: sizes, the largest and random ones side by side, the weakest link of each.

    described: what the dedup stage says of the largest components (`components.json`): their least similar pair and the
    chain that joins it. sweep: its counts at other thresholds (`thresholds.json`).
    """
    if not run.duplicates:
        return None
    choose = SAMPLING.largest_components, SAMPLING.random_components
    chosen, sizes = tables.components(run.duplicates, "component_id", *choose, seed=0)
    every = tables.component_members(run.duplicates, "component_id", chosen["group"].combine_chunks())
    weakest = (
        {row["group"]: row for row in tables.weakest_edges(run.self_forest, every).to_pylist()}
        if run.self_forest
        else {}
    )
    by_group: dict[int, list[dict[str, Any]]] = {}
    for row in every.to_pylist():
        by_group.setdefault(row["group"], []).append(row)
    chains = {int(c["component_id"]): chain for c in described if (chain := _chain(c))}
    shown = []
    for row in chosen.to_pylist():
        members = by_group.get(row["group"], [])
        kept = sum(m["kept"] for m in members)
        edge = weakest.get(row["group"])
        chain = chains.get(row["group"])
        shown.append({**row, "kept": kept, "members": members[: SAMPLING.members], "weakest": edge, "chain": chain})
    pairs = [(row["images"], row["components"]) for row in sizes.to_pylist()]
    images = [m["image_id"] for component in shown for m in component["members"]]
    images += [c["weakest"][end] for c in shown if c["weakest"] for end in ("low", "high")]
    images += [link["image_id"] for c in shown if c["chain"] for link in c["chain"]["links"]]
    counts = tables.duplicate_counts(run.duplicates)
    reasons = (
        counts.group_by(["kept", "reason"]).aggregate([("images", "sum")]).rename_columns(["kept", "reason", "images"])
    )
    return {
        "reasons": reasons.sort_by(
            [("kept", "descending"), ("images", "descending"), ("reason", "ascending")]
        ).to_pylist(),
        "components": sum(count for _, count in pairs),
        "in_components": sum(size * count for size, count in pairs),
        "largest": max((size for size, _ in pairs), default=0),
        "sweep": list(sweep)[: SAMPLING.table_rows],
        "shown": shown,
        "figure": figures.sizes(
            pairs, "Components of near-duplicates by size (heights grow with the logarithm)", "components"
        ),
        "images": images,
    }


def _chain(described: Mapping[str, Any]) -> dict[str, Any] | None:
    """The chain of a component, its middle left out where it is long; None for what is no chain."""
    links = list(described.get("chain") or [])
    if len(links) < 3:
        return None
    half = SAMPLING.chain // 2
    cut = max(0, len(links) - SAMPLING.chain)
    return {
        "links": links if not cut else [*links[:half], *links[-half:]],
        "cut": cut,
        "least": described.get("least_similarity"),
        "far": described.get("not_above_threshold_to_representative"),
    }


def decontamination(
    run: RunTables,
    thresholds: Sequence[float],
    chosen_threshold: float | None,
    described: Sequence[Mapping[str, Any]] = (),
    sweep: Sequence[Mapping[str, Any]] = (),
) -> Section | None:
    """Per reference set: hits, best and random matches, counts at other thresholds; and the largest component.

    described: what the dedup stage says of each set (`references.json`). sweep: both rules at other thresholds
    (`thresholds.json`).
    """
    if not run.duplicates:
        return None
    summary = tables.reference_summary(run.duplicates, thresholds).to_pylist()
    lost = pc.field("reason") == "reference"
    direct = lost & (pc.list_value_length(pc.field("references")) > 0)
    total = sum(r["images"] for r in tables.count_by_reason(run.duplicates, lost))
    hit = sum(r["images"] for r in tables.count_by_reason(run.duplicates, direct))
    if not summary and not total and not described:
        return None
    samples = tables.reference_samples(run.duplicates, SAMPLING.best_matches, SAMPLING.random_matches, 0).to_pylist()
    sets = []
    for row in summary[: SAMPLING.reference_sets]:
        at = {f"{t:.2f}": n for t, n in zip(thresholds, row["at"], strict=True)}
        mine = [s for s in samples if s["reference_set"] == row["reference_set"]]
        label = f"Images with a match in {row['reference_set']} above each threshold"
        sets.append({**row, "at": at, "samples": mine, "figure": figures.thresholds(at, label, chosen_threshold)})
    chosen, _ = tables.components(run.duplicates, "reference_component_id", 1, 0, 0, lost)
    members = tables.component_members(run.duplicates, "reference_component_id", chosen["group"].combine_chunks(), lost)
    largest = None
    if chosen.num_rows:
        rows = members.slice(0, SAMPLING.component_of_references).to_pylist()
        largest = {"images": chosen["images"][0].as_py(), "group": chosen["group"][0].as_py(), "members": rows}
    images = [i for s in sets for row in s["samples"] for i in (row["image_id"], row["reference_id"])]
    images += [m["image_id"] for m in (largest or {}).get("members", [])]
    return {
        "sets": sets,
        "dropped": total,
        "direct": hit,
        "chains": total - hit,
        "largest": largest,
        "described": list(described)[: SAMPLING.table_rows],
        "sweep": list(sweep)[: SAMPLING.table_rows],
        "images": images,
    }


def clusters(run: RunTables) -> Section | None:
    """Sizes of the leaf clusters; some of them with thumbnails and the seed sets that drew them."""
    if not run.clusters:
        return None
    levels = tables.cluster_levels(run.clusters)
    sizes = count_by(run.clusters, {"cluster": pc.field("cluster_1")})
    ids, counts = sizes["cluster"].to_numpy(), sizes["images"].to_numpy()
    size_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    drawn: dict[int, dict[str, int]] = {}
    for row in tables.selected_by_cluster(run.manifest).to_pylist():
        drawn.setdefault(row["cluster"], {})[row["seed_set"]] = row["images"]
    chosen = {int(c): "largest" for c in ids[np.lexsort((ids, -counts))][: SAMPLING.largest_clusters]}
    by_draw = sorted(drawn, key=lambda c: (-sum(drawn[c].values()), c))
    for cluster in [c for c in by_draw if c not in chosen][: SAMPLING.drawn_clusters]:
        chosen[cluster] = "drawn most"
    rest = pa.table({"cluster": pa.array([c for c in ids.tolist() if c not in chosen], pa.uint64())})
    hashed = with_hash(rest, 0, "report clusters", "cluster").sort_by("hash")
    for cluster in hashed["cluster"].to_pylist()[: SAMPLING.random_clusters]:
        chosen[cluster] = "random"
    members: dict[int, list[dict[str, Any]]] = {}
    for row in tables.cluster_members(
        run.clusters, list(chosen), SAMPLING.nearest, SAMPLING.random_members, 0
    ).to_pylist():
        members.setdefault(row["cluster"], []).append(row)
    shown: list[dict[str, Any]] = [
        {
            "cluster": cluster,
            "choice": choice,
            "images": size_of.get(cluster, 0),
            "drawn": sorted(drawn.get(cluster, {}).items(), key=lambda item: (-item[1], item[0])),
            "members": members.get(cluster, []),
        }
        for cluster, choice in chosen.items()
    ]
    pairs = np.unique(counts, return_counts=True)
    return {
        "levels": [{"name": n, "clusters": count_by(run.clusters, {"c": pc.field(n)}).num_rows} for n in levels],
        "clusters": len(ids),
        "median": float(np.median(counts)) if len(counts) else 0.0,
        "largest": int(counts.max()) if len(counts) else 0,
        "touched": len(drawn),
        "shown": shown,
        "figure": figures.sizes(
            list(zip(*(p.tolist() for p in pairs), strict=True)),
            "Leaf clusters by size (heights grow with the logarithm)",
            "clusters",
        ),
        "images": [m["image_id"] for c in shown for m in c["members"]],
    }


def seed_sets(run: RunTables, card_rows: Sequence[Mapping[str, Any]]) -> Section | None:
    """What each seed set brought, and some of its seeds with the images they drew. card_rows: of the data card."""
    if not run.retrieval:
        return None
    shown: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in tables.seed_samples(run.retrieval, SAMPLING.seeds, SAMPLING.retrieved, 0).to_pylist():
        shown.setdefault(row["seed_set"], {}).setdefault(row["seed_id"], []).append(row)
    most = max([1, *(row["nominal"] for row in card_rows)])
    rows = [{**row, "width": row["nominal"] / most} for row in card_rows[: SAMPLING.seed_table_rows]]
    samples: list[dict[str, Any]] = [
        {"seed_set": name, "seeds": list(shown[name].items())} for name in sorted(shown)[: SAMPLING.seed_sets]
    ]
    images = [i for s in samples for seed, drawn in s["seeds"] for i in (seed, *(d["image_id"] for d in drawn))]
    return {"rows": rows, "more_rows": max(0, len(card_rows) - len(rows)), "samples": samples, "images": images}


def balance(run: RunTables) -> Section | None:
    """Shares of the clusters in the pool and in the balanced sample, per level."""
    if not run.balance or not run.clusters:
        return None
    taken = count_by(run.balance, {"leaf": pc.field("cluster_id")})
    taken_of = dict(zip(taken["leaf"].to_pylist(), taken["images"].to_pylist(), strict=True))
    levels = []
    for level in tables.cluster_levels(run.clusters):
        keys = {"leaf": pc.field("cluster_1"), "group": pc.field(level)}
        rows = count_by(run.clusters, keys).to_pylist()
        groups = {g: n for n, g in enumerate(sorted({row["group"] for row in rows}))}
        before, after = np.zeros(len(groups)), np.zeros(len(groups))
        for row in rows:
            before[groups[row["group"]]] += row["images"]
            after[groups[row["group"]]] += taken_of.get(row["leaf"], 0)
        label = (
            f"Shares of the {len(groups):,} clusters of {level} in the pool (area) and in the balanced sample (line)"
        )
        levels.append(
            {
                "name": level,
                "clusters": len(groups),
                "before": figures.effective(before),
                "after": figures.effective(after),
                "figure": figures.before_after(before, after, label),
            }
        )
    return {"levels": levels, "taken": int(pc.sum(taken["images"]).as_py() or 0), "images": []}


def priority(sections: Sequence[Section | None]) -> list[int]:
    """Every image wanted once, the first quarter of each section's wishes before the second quarter of any."""
    keyed: dict[int, tuple[int, int, int]] = {}
    for number, section in enumerate(sections):
        wishes = list(dict.fromkeys((section or {}).get("images", [])))
        for place, image in enumerate(wishes):
            if image is not None:
                key = (4 * place // len(wishes), number, place)
                keyed[image] = min(keyed.get(image, key), key)
    return sorted(keyed, key=lambda image: keyed[image])
