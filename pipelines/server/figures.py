"""What stands on the pages: rows of the index in the words of the report."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from fastapi import Request
from markupsafe import Markup

from curation.audit import charts
from curation.audit.words import visible
from pipelines.description import current_generations
from pipelines.server import shown
from pipelines.server.opened import Opened, Page
from pipelines.server.rendering import number, score
from pipelines.server.served import Served

Values = dict[str, Any]
Onward = Callable[..., str]
SCORE_NAMES = {
    "nsfw": "Not safe for work",
    "contrast": "Contrast",
    "min_side": "Shorter side",
    "aspect_ratio": "Aspect ratio",
    "similarity": "Cosine to the nearest copy",
}
THRESHOLDS = {
    "nsfw": ("filter", "nsfw_threshold"),
    "contrast": ("filter", "solid_colour"),
    "min_side": ("filter", "min_side"),
    "aspect_ratio": ("filter", "aspect_ratio"),
    "similarity": ("dedup", "threshold"),
}
CARDS, TILES, TABLE = 24, 4, 100
MAP_POINTS = 2_000


@dataclass(frozen=True)
class Card:
    """A group on a page of groups."""

    href: str
    title: str
    text: str
    images: list[Values]


def row(*cells: Any, value: float = 0.0) -> Values:
    """A row of a table; a cell is a text, or (text, where it leads)."""
    made = [{"text": str(c[0]), "href": c[1]} if isinstance(c, tuple) else {"text": str(c), "href": ""} for c in cells]
    return {"cells": made, "value": value}


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
    if index.document.get("balance"):
        found.append(("/balance", "Balance", ""))
    if index.spaces:
        found.append(("/like", "More like this", ""))
    found += [("/scan", "Scan", ""), ("/decisions", "Decisions", "")]
    if served.settings.compare:
        found.append(("/compare", "Compare", ""))
    return found


# Overview.


def overview(served: Served) -> Values:
    """The flow of the pool, the sources, the spaces of vectors."""
    index = served.index
    document = index.document
    licences = {s.name: s.licence for s in served.run.sources()}
    sources = [s | {"licence": licences.get(s["source"])} for s in document.get("steps", [])]
    steps = _flow(document)
    chosen = sum(s["chosen"] or 0 for s in sources)
    listed = sum(s["listed"] for s in sources)
    has_mix = any(s["chosen"] is not None for s in sources)
    facts = [
        ("Images listed", number(listed), ""),
        ("Usable", number(sum(s["usable"] for s in sources)), _bytes(sum(s["bytes"] or 0 for s in sources))),
    ]
    if "components" in index.lists:
        copies = sum(r["images"] for r in document["reasons"] if r["reason"] in ("self", "exact", "hash"))
        facts.append(("Near copies removed", number(copies), f"{number(len(index.lists['components']))} components"))
        facts.append(
            (
                "Removed for evaluation sets",
                number(sum(r["images"] for r in document["reasons"] if r["reason"] == "reference")),
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
    return {
        "facts": facts,
        "lead": words + " Every figure and list here is of all rows.",
        "sources": sources,
        "steps": steps,
        "funnel": charts.funnel(steps) if len(steps) > 1 else Markup(""),
        "spaces": {name: space.document for name, space in index.spaces.items()},
    }


def _flow(document: Mapping[str, Any]) -> list[Values]:
    """The steps of the pool as `charts.funnel` takes them."""
    pool = [s for s in document.get("steps", []) if s["source"].startswith("pool:")]
    if not pool:
        return []
    counts = {n: sum(s[n] or 0 for s in pool) if any(s[n] is not None for s in pool) else None for n in _STEPS}
    lost: dict[str, Counter[str]] = {n: Counter() for n in _STEPS}
    for entry in document.get("counts", []):
        if entry["source"].startswith("pool:") and entry["status"] != "ok":
            step = "usable" if entry["status"] == "dropped" else "fetched"
            lost[step][entry["error"] or entry["status"]] += entry["images"]
    for entry in document.get("reasons", []):
        if entry["source"].startswith("pool:") and entry["reason"] != "kept":
            name = {"self": "near copy", "reference": "evaluation match", "exact": "exact copy", "hash": "hash copy"}
            lost["kept"][name.get(entry["reason"], entry["reason"])] += entry["images"]
    steps: list[Values] = []
    for name, words in _STEPS.items():
        if counts[name] is None:
            continue
        missing = steps[-1]["images"] - counts[name] if steps else 0
        reasons = [{"reason": r, "images": n} for r, n in lost[name].most_common(12)] if missing else []
        if missing and not reasons:
            reasons = [{"reason": "not chosen", "images": missing}]
        steps.append({"step": words, "stage": "", "images": counts[name], "lost": reasons})
    return steps


_STEPS = {
    "listed": "listed",
    "fetched": "fetched",
    "usable": "filtered",
    "kept": "deduplicated",
    "chosen": "in the dataset",
}


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


# Images.


def choices(index: Opened) -> Values:
    """What the filters of the page of images offer."""
    counts = index.document.get("counts", [])
    brought = {b["name"] for s in [index.rows("clusters_1", 0, 100)] for r in s for b in r.get("brought") or []}
    brought |= {f"retrieve:{s['seed_set']}" for s in index.document.get("seed_sets", [])}
    if "brought" in index.groups:
        brought |= {s["source"] for s in index.document.get("steps", []) if s["source"].startswith("seed:")}
    return {
        "source_names": sorted({c["source"] for c in counts})[:200],
        "statuses": sorted({c["status"] for c in counts}),
        "errors": sorted({c["error"] for c in counts if c["error"]})[:200],
        "outcomes": sorted({r["reason"] for r in index.document.get("reasons", [])}),
        "broughts": sorted(brought)[:200] if "brought" in index.groups else [],
    }


def counted(found: Page) -> str:
    """How many there are, in words."""
    if found.total is None:
        return ""
    return f"{number(found.total)} image{'' if found.total == 1 else 's'}"


def nothing(filters: Mapping[str, Any], found: Page) -> str:
    """Why a page is empty."""
    if found.after is not None:
        return f"None among the {number(found.looked)} rows looked at so far: the next page goes on."
    return "No image fits all of this." if filters else "No image."


def image(index: Opened, found: Values) -> Values:
    """Everything on the page of an image."""
    clusters = [
        (level, found[f"cluster_{level}"])
        for level in range(1, index.levels + 1)
        if found.get(f"cluster_{level}") is not None
    ]
    plain = shown.plain(found)
    size = f"{found['width']} × {found['height']} pixels" if found.get("width") else ""
    if (
        size
        and found.get("original_width")
        and (found["original_width"], found["original_height"])
        != (
            found["width"],
            found["height"],
        )
    ):
        size += f" (downloaded as {found['original_width']} × {found['original_height']})"
    rows = [
        ("Image id", found["image_id"]),
        ("State", shown.state_of(found)[1]),
        ("Source", found.get("source")),
        ("Alt text", found.get("caption")),
        ("Label", found.get("label")),
        ("URL", found.get("url")),
        ("Size", size),
        ("Bytes", number(found["length"]) if found.get("length") else None),
        ("Status", found.get("status")),
        ("Error", found.get("error")),
        ("Repeats", found.get("duplicate_of")),
        ("Not safe for work", score(found.get("nsfw"))),
        ("Contrast", score(found.get("contrast"))),
        ("Faces", len(found["faces"]) if found.get("faces") else None),
        ("Faces blurred", "yes" if found.get("faces_blurred") else None),
        ("Cosine to nearest", score(found.get("similarity"))),
        ("Component", found.get("component_id")),
        ("Distance to centroid", score(found.get("distance"))),
        ("Brought by", ", ".join(found["sources"]) if found.get("sources") else None),
        ("Weight", score(found.get("weight"))),
        ("sha256", plain.get("sha256")),
        ("sha256 as stored", plain.get("stored_sha256") if plain.get("stored_sha256") != plain.get("sha256") else None),
        ("sha256 of pixels", plain.get("pixel_sha256")),
        ("PCA hash", plain.get("pca_hash")),
    ]
    ids = [found["nearest_id"]] if found.get("nearest_id") is not None else []
    hits = {int(hit["reference_id"]): hit for hit in found.get("references") or []}
    nearest = []
    for other in index.some([*ids, *hits]):
        hit = hits.get(int(other["image_id"]))
        nearest.append(other | {"note": score(hit["similarity"] if hit else found.get("similarity"))})
    drawn, total = index.retrieved("retrieved", int(found["image_id"]), 0, 24)
    known = {int(r["image_id"]): r for r in index.some({int(d["seed_id"]) for d in drawn if d["seed_id"] is not None})}
    seeds = [
        known[int(d["seed_id"])]
        | {"note": f"{visible(d['seed_set'], 40)} · rank {d['rank'] + 1} · {score(d['similarity'])}"}
        for d in drawn
        if d["seed_id"] is not None and int(d["seed_id"]) in known
    ]
    return {
        "image": found,
        "clusters": clusters,
        "spaces": list(index.spaces),
        "rows": [(name, visible(value, 2000)) for name, value in rows if value is not None and value != ""],
        "nearest": nearest,
        "drawn": seeds,
        "drawn_total": total,
    }


def first_of(index: Opened, kind: str, value: Any, count: int) -> list[Values]:
    """The first images of a group."""
    return index.listed({kind: value}, None, count, index.tiles).images


def with_matches(index: Opened, rows: Sequence[Values], name: str | None = None) -> list[Values]:
    """Each image before the reference image that it matches best; the note of an image is that cosine."""
    best: dict[int, Values] = {}
    for entry in rows:
        hits = [h for h in entry.get("references") or [] if name is None or h["reference_set"] == name]
        if hits:
            best[int(entry["image_id"])] = max(hits, key=lambda h: h["similarity"])
            entry["note"] = score(best[int(entry["image_id"])]["similarity"])
    known = {int(r["image_id"]): r for r in index.some({int(h["reference_id"]) for h in best.values()}, index.tiles)}
    pairs: list[Values] = []
    for entry in rows:
        pairs.append(entry)
        hit = best.get(int(entry["image_id"]))
        if hit is not None and int(hit["reference_id"]) in known:
            pairs.append(known[int(hit["reference_id"])] | {"note": visible(hit["reference_set"], 40)})
    return pairs


# Groups.


def option(served: Served, stage: str, name: str) -> float | None:
    """An option of a stage's newest generation that is a number."""
    generations = current_generations(served.run, stage)
    value = generations[-1].fingerprint.options.get(name) if generations else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def threshold(served: Served, name: str) -> str:
    """The threshold of near copies as a word of an address."""
    return f"{option(served, 'dedup', name) or 0.6:g}"


def duplicate_charts(served: Served) -> list[tuple[str, Markup]]:
    """Sizes of components, and the histogram of similarities."""
    index = served.index
    found = []
    sizes = [(s["images"], s["components"]) for s in index.document.get("component_sizes", [])]
    if sizes:
        drawn = charts.sizes(sizes, "Components by their number of images", "components")
        found.append(("Components by their number of images, logarithmic heights", drawn))
    chart = score_chart(served, index, "similarity")
    if chart:
        found.append(("Cosine to the nearest other image, logarithmic heights", chart))
    return found


def cluster_card(index: Opened, level: int, found: Mapping[str, Any]) -> Card:
    """A cluster on the page of clusters."""
    brought = found.get("brought") or []
    images = sum(b["images"] for b in brought)
    entropy = -sum(b["images"] / images * math.log2(b["images"] / images) for b in brought) if images else 0.0
    words = f"{number(found['chosen'])} chosen"
    if len(brought) > 1:
        words += f" · by {len(brought)} ways, entropy {entropy:.2f} bits"
    elif brought:
        words += f" · by {visible(brought[0]['name'], 30)}"
    if level == 1:
        shown_images = index.ranked("near", found["cluster"], 0, TILES, table=index.tiles).images
    else:
        shown_images = first_of(index, f"cluster_{level}", found["cluster"], TILES)
    return Card(
        f"/cluster/{level}/{found['cluster']}",
        f"{level}:{found['cluster']} · {number(found['images'])} images",
        f"{words} · mean distance {score(found['distance'])}",
        shown_images,
    )


def cluster_map(index: Opened, level: int) -> Markup:
    """Centroids as circles, their area the number of images; the largest clusters lead to their page."""
    rows = [r for r in index.rows(f"clusters_{level}", 0, MAP_POINTS) if r["x"] is not None]
    if not rows:
        return Markup("")
    xs, ys = (np.array([r[axis] for r in rows], np.float64) for axis in ("x", "y"))
    width, height, margin = 760.0, 420.0, 30.0
    most = max(r["images"] for r in rows)
    share = sum(r["chosen"] for r in rows) / sum(r["images"] for r in rows)
    body = []
    for entry, x, y in zip(rows, _spread(xs, width, margin), _spread(ys, height, margin), strict=True):
        radius = max(2.0, 24.0 * math.sqrt(entry["images"] / most))
        body.append(
            Markup(
                '<a href="/cluster/{}/{}"><circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="dot{}">'
                "<title>cluster {}:{}, {} images, {} chosen</title></circle></a>"
            ).format(
                level,
                entry["cluster"],
                x,
                y,
                radius,
                " drawn" if entry["chosen"] > share * entry["images"] else "",
                level,
                entry["cluster"],
                number(entry["images"]),
                number(entry["chosen"]),
            )
        )
    head = Markup('<svg class="chart map" viewBox="0 0 {:.0f} {:.0f}" role="group" aria-label="{}">').format(
        width, height, f"Centroids of the {number(len(rows))} largest clusters of level {level}"
    )
    return head + Markup("").join(body) + Markup("</svg>")


def _spread(values: np.ndarray, size: float, margin: float) -> list[float]:
    low, high = float(values.min()), float(values.max())
    span = high - low or 1.0
    return [margin + (size - 2 * margin) * (float(v) - low) / span for v in values]


def family(index: Opened, level: int, images: Sequence[Values]) -> list[tuple[str, str]]:
    """The clusters above and below a cluster, as links."""
    if not images:
        return []
    found = []
    if level < index.levels:
        above = images[0][f"cluster_{level + 1}"]
        found.append((f"Above it: {level + 1}:{above}", f"/cluster/{level + 1}/{above}"))
    if level > 1:
        below = Counter(i[f"cluster_{level - 1}"] for i in images)
        found += [(f"Below it: {level - 1}:{c}", f"/cluster/{level - 1}/{c}") for c, _ in below.most_common(20)]
    return found


def retrieval(index: Opened, request: Request, start: int, seed_set: str | None, onward: Onward) -> Values:
    """Seed sets, and the seeds of one of them with what they drew."""
    sets = index.document.get("seed_sets", [])
    links = [
        (
            f"{visible(s['seed_set'], 40)}: {number(s['nominal'])} retrievals, {number(s['images'])} images",
            "/retrieval?" + urlencode({"seed_set": s["seed_set"]}),
        )
        for s in sets
    ]
    rows = index.rows("seeds", *_seeds_of(index, seed_set, start))
    cards = []
    for entry in rows:
        if entry["seed_id"] is None:
            continue
        drawn, _ = index.retrieved("seed", int(entry["seed_id"]), 0, TILES - 1)
        ids = [int(entry["seed_id"]), *(int(d["image_id"]) for d in drawn)]
        most = score(entry["most"])
        cards.append(
            Card(
                f"/seed/{entry['seed_id']}",
                f"{visible(entry['seed_set'], 30)} · seed {int(entry['seed_id']) & ((1 << 40) - 1)}",
                f"drew {number(entry['images'])}, cosine {score(entry['least'])} to {most}",
                index.some(ids, index.tiles),
            )
        )
    more = len(rows) == CARDS
    return {
        "links": links,
        "lead": "Each seed stands before the images it drew; an image that several seeds drew counts as several retrievals.",
        "cards": cards,
        "empty": "No seed of this set drew an image.",
        "next": onward(request, start=start + CARDS) if more else None,
        "first": onward(request, start=None),
    }


def _seeds_of(index: Opened, seed_set: str | None, start: int) -> tuple[int, int]:
    """(first row in the list of seeds, how many) of a page of one seed set, whose seeds lie together."""
    before, size = 0, len(index.lists.get("seeds", []))
    if seed_set is not None:
        low = _first_seed(index, seed_set)
        stop = _first_seed(index, seed_set, after=True)
        before, size = low, stop - low
    return before + min(start, size), max(0, min(CARDS, size - start))


def _first_seed(index: Opened, seed_set: str, after: bool = False) -> int:
    held = index.lists.get("seeds")
    low, high = 0, len(held) if held else 0
    wanted = seed_set.encode("utf-8", "replace")
    while held and low < high:
        middle = (low + high) // 2
        name = held.take(np.array([middle]))[0]["seed_set"].encode()
        low, high = (middle + 1, high) if name < wanted or (after and name == wanted) else (low, middle)
    return low


# Tables.


def score_chart(served: Served, index: Opened, name: str) -> Markup:
    """The histogram of a score with its threshold; empty without one."""
    found = index.histogram(name) if name in index.orders else None
    if found is None:
        return Markup("")
    return charts.histogram(
        found[0],
        found[1],
        SCORE_NAMES.get(name, name),
        threshold=option(served, *THRESHOLDS[name]),
        log=True,
        form="{:,.0f}" if name == "min_side" else "{:.3g}",
    )


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
        "lead": "failed is for good, transient may come with another `curate download --retry`, excluded was asked for by "
        "the host, duplicate_url was listed before.",
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
        "lead": f"{number(total)} batches; {number(len(served.hidden))} images are hidden now. The last decision on an image "
        "counts: to bring back what was dropped, open it and keep it. `curate mix` and `curate manifest` apply them.",
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
        "lead": f"{number(document['stayed'])} images are in both datasets, {number(document['entered'])} entered since {other}, "
        f"{number(document['left'])} left. Images are the same when their {document['by']} is.",
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
        "lead": "Lists have a bounded page and a cursor: give `after` or `next` of a page as `after` or `start` to the next.",
        "links": [("OpenAPI document", "/api/openapi.json")],
        "tables": [{"title": "Paths", "columns": columns, "rows": rows}],
    }
