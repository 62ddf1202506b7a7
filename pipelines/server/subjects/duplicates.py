"""Near copies: components by size, similarities with the threshold, pairs at it, the least similar pair, decisions."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from curation.audit import charts
from curation.audit.funnel import EXPLAINED
from curation.audit.sections.duplicates import chain_of, described, recall, similarity_edges
from curation.audit.words import visible
from pipelines.server.opened import Opened
from pipelines.server.rendering import number, score
from pipelines.server.served import Served
from pipelines.server.subjects import BESIDE, CARDS, TILES, Card, Values, by_id, counted, noted, row, table
from pipelines.server.subjects.images import first_of

MOST_COMPARED = 256
"""Of components of so many images that the stage does not describe, all pairs are compared."""


def page(served: Served, index: Opened, start: int) -> Values:
    """The components, the largest first; figures and pairs at the threshold on the first page."""
    cards = [
        Card(
            f"/component/{r['component_id']}",
            counted(r["images"], "image"),
            f"{number(r['kept'])} kept · least cosine to another {score(r['least']) or '–'}",
            first_of(index, "component", r["component_id"], TILES),
        )
        for r in index.rows("components", start, CARDS)
    ]
    total = len(index.lists.get("components", []))
    threshold = served.stages.option("dedup", "threshold")
    link = ("Images around the threshold", f"/scores/similarity?value={threshold or 0.6:g}")
    first = _figures(served, index, threshold) if start == 0 and total else []
    return {
        "lead": f"{number(total)} components of several images, the largest first. One image of each stays."
        + _recall(served),
        "links": [link] if "similarity" in index.orders else [],
        "sections": [*first, {"cards": cards, "empty": "No two images are near copies."}],
        "total": total,
    }


def outcomes(index: Opened) -> dict[str, int]:
    """Images by what became of them: kept, self, reference, exact, hash."""
    found: dict[str, int] = {}
    for entry in index.document.get("reasons", []):
        found[entry["reason"]] = found.get(entry["reason"], 0) + entry["images"]
    return found


def similarity_chart(served: Served, index: Opened) -> Markup:
    """The histogram of cosines to the nearest image, with the threshold; empty without any."""
    edges = similarity_edges(served.stages)
    counts = index.histogram("similarity", edges) if "similarity" in index.orders else np.zeros(1, np.int64)
    if not counts.sum():
        return Markup("")
    words = f"Cosine of {charts.number(int(counts.sum()))} images to their nearest one, where it is stored"
    return charts.histogram(counts, edges, words, threshold=served.stages.option("dedup", "threshold"), form="{:.2f}")


def pairs_at(index: Opened, value: float, down: bool) -> list[tuple[Values, Values | None]]:
    """Images whose cosine to their nearest one lies just above a value, or just below, beside that one.

    A pair that is nearest both ways is there once.
    """
    first = float(np.nextafter(np.float32(value), np.float32(np.inf)))
    rows = index.scored("similarity", first, None, 3 * BESIDE, down, index.tiles).images
    pairs: dict[frozenset[int], Values] = {}
    for entry in rows:
        if entry.get("nearest_id") is not None:
            pairs.setdefault(frozenset((int(entry["image_id"]), int(entry["nearest_id"]))), entry)
    return beside(index, [e | {"note": f"{e['score']:.4f}"} for e in list(pairs.values())[:BESIDE]])


def beside(index: Opened, rows: Sequence[Values]) -> list[tuple[Values, Values | None]]:
    """Each image beside the one nearest to it."""
    known = by_id(index, [entry.get("nearest_id") for entry in rows])
    return [(e, known.get(int(e["nearest_id"])) if e.get("nearest_id") is not None else None) for e in rows]


def _figures(served: Served, index: Opened, threshold: float | None) -> list[Values]:
    sizes = [(s["images"], s["components"]) for s in index.document.get("component_sizes", [])]
    drawn = [
        (
            "Components by their number of images, logarithmic heights",
            charts.sizes(sizes, "Components by their number of images", "components"),
        ),
        (
            "Cosine to the nearest other image; below the stored threshold nothing is known",
            similarity_chart(served, index),
        ),
    ]
    sections: list[Values] = [{"label": "Charts", "charts": [(words, chart) for words, chart in drawn if chart]}]
    reasons = outcomes(index)
    rows = [
        row(
            "kept" if reason == "kept" else "dropped",
            (visible(EXPLAINED.get(reason, reason), 60), f"/images?outcome={reason}"),
            number(images),
            value=images,
        )
        for reason, images in sorted(reasons.items(), key=lambda item: (item[0] != "kept", -item[1]))
    ]
    most = max(reasons.values(), default=0)
    sections.append(table("What became of the images", ["Outcome", "Reason"], ["Images"], rows, of=most))
    if threshold is not None and "similarity" in index.orders:
        for down, title in ((False, "Just above the threshold: copies"), (True, "Just below it: no copies")):
            pairs = pairs_at(index, threshold, down)
            if pairs:
                sections.append({"title": title, "pairs": pairs, "text": "Each beside the image nearest to it."})
    sweep = (served.stages.file("dedup", "thresholds") or {}).get("self", [])
    if sweep:
        rows = [
            row(f"{r['threshold']:.2f}", *(number(r[n]) for n in ("duplicates", "components_of_several", "largest")))
            for r in sweep[:40]
        ]
        heads = ["Images dropped", "Components of several", "Largest component"]
        text = "No new search: the stored forest cut there."
        sections.append(table("At other thresholds", ["Cosine above"], heads, rows, text=text))
    return sections


def _recall(served: Served) -> str:
    found = recall(served.stages.file("dedup", "recall"))
    if not found:
        return ""
    return " The search was exact." if found["exact"] else f" Measured recall of the join: {found['value']:.4f}."


def component(served: Served, index: Opened, component_id: int) -> tuple[list[Values], list[Values]]:
    """Of a component its least similar pair, and the chain that joins it: sections, empty for what is not known."""
    said = {int(c["component_id"]): c for c in described(served.stages.file("dedup", "components"))}.get(component_id)
    pairs: list[Values] = []
    chains: list[Values] = []
    exact = bool(said and said.get("least_similar"))
    if said and exact:
        pair, cosine = tuple(said["least_similar"]), said["least_similarity"]
    else:
        pair, cosine = _least(index, component_id)
    known = by_id(index, pair)
    if len(known) == 2:
        words = "" if exact else ", as the stored bytes of the vectors give it"
        low, high = (known[int(i)] for i in pair)
        title = f"The least similar pair, {cosine:.3f}"
        text = f"Cosine of the two members that are least alike{words}."
        pairs.append({"title": title, "text": text, "pairs": [(low, high)]})
    chain = chain_of(said) if said else None
    if said and chain:
        links = by_id(index, [link["image_id"] for link in chain["links"]])
        far = said.get("not_above_threshold_to_representative")
        text = "Each number is the cosine to the image before it."
        if far:
            text += f" {far:.0%} of the members are not above the threshold to an image that is kept."
        if chain["cut"]:
            text += f" {chain['cut']} images in the middle are left out."
        tiles = [noted(links.get(link["image_id"]), score(link["similarity"])) for link in chain["links"]]
        title = f"How it hangs together: a chain of {len(chain['links']) + chain['cut']} images"
        chains.append({"title": title, "text": text, "groups": [("", [t for t in tiles if t])]})
    return pairs, chains


def _least(index: Opened, component_id: int) -> tuple[tuple[int, ...], float]:
    """The least similar two of a small component by the copies' vectors in the index, and their cosine."""
    groups, space = index.groups.get("component"), index.spaces.get("copies")
    start, stop = groups.find(component_id) if groups else (0, 0)
    if groups is None or space is None or not 2 <= stop - start <= MOST_COMPARED:
        return (), 0.0
    held = [(int(r), space.vector(int(r))) for r in index.shown(groups.rows.read(start, stop).astype(np.int64))]
    rows = [r for r, vector in held if vector is not None]
    if len(rows) < 2:
        return (), 0.0
    vectors = np.stack([vector for _, vector in held if vector is not None])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors @ vectors.T
    low, high = np.unravel_index(int(np.argmin(cosines)), cosines.shape)
    ids = tuple(int(index.ids.read(rows[i], rows[i] + 1)[0]) for i in (int(low), int(high)))
    return ids, float(cosines[low, high])
