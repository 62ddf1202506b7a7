"""What stands on the pages: rows of the index in the words of the report."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
from fastapi import Request
from markupsafe import Markup

from curation import storage
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
        ("Usable", number(sum(s["usable"] for s in sources)), storage.in_units(sum(s["bytes"] or 0 for s in sources))),
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
            lost["kept"][shown.REASONS.get(entry["reason"], entry["reason"])] += entry["images"]
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
        "lead": "Each seed stands before the images it drew; one that several seeds drew counts as several retrievals.",
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
