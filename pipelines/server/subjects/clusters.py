"""Clusters: a map, levels with sizes and purity, where the seed sets draw, a cluster with what is inside it."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from markupsafe import Markup

from curation.audit import charts, measures
from curation.audit.overview import UNSAFE
from curation.audit.sections.clusters import arranged
from curation.audit.words import visible
from pipelines.server import shown
from pipelines.server.clustering import DRAWN
from pipelines.server.opened import Opened
from pipelines.server.parts import CUT
from pipelines.server.rendering import number, score
from pipelines.server.subjects import BESIDE, CARDS, TABLE, TILES, Card, Values, counted, row, table
from pipelines.server.subjects.images import first_of

MAP_POINTS, MAP_PICTURES = 2_000, 40


def page(index: Opened, level: int, start: int, inside: int | None) -> Values:
    """The clusters of a level, the largest first; the map and the figures of all levels on the first page.

    inside: only those inside this cluster of the level above.
    """
    if inside is not None:
        rows, total = index.inside(level + 1, inside, start, CARDS)
        cards = [card(index, level, r) for r in rows]
        lead = f"{counted(total, 'cluster')} of level {level} inside {level + 1}:{inside}, the largest first."
        return {"lead": lead, "sections": [{"cards": cards, "empty": "None."}], "total": total}
    name = f"clusters_{level}"
    total = len(index.lists.get(name, []))
    rows = index.rows(name, start, CARDS)
    first = _figures(index, level) if start == 0 and total else []
    by_size = {"title": "By size", "cards": [card(index, level, r) for r in rows]}
    return {
        "lead": f"{number(total)} clusters of level {level}, the largest first.",
        "links": [(f"Level {k}", f"/clusters?level={k}") for k in range(1, index.levels + 1)],
        "sections": [*first, by_size | {"empty": "The run has no clusters of this level."}],
        "total": total,
    }


def card(index: Opened, level: int, found: Mapping[str, Any]) -> Card:
    """A cluster on a page of clusters."""
    return Card(
        f"/cluster/{level}/{found['cluster']}",
        f"{level}:{found['cluster']} · {counted(found['images'], 'image')}",
        " · ".join([f"{number(found['chosen'])} chosen", *described(found)]),
        _pictures(index, level, found["cluster"], TILES),
    )


def described(found: Mapping[str, Any]) -> list[str]:
    """A row of the list of clusters in words: who drew from it, how evenly, how pure it is, how wide."""
    words = []
    drawn = drawn_from(found)
    if len(drawn) > 1:
        entropy = measures.entropy(np.array([images for _, images in drawn]))
        words.append(f"drawn by {len(drawn)} seed sets, entropy {entropy:.2f} bits")
    elif drawn:
        words.append(f"drawn by {visible(drawn[0][0], 30)}")
    labels = found.get("labels") or []
    if labels:
        commonest = labels[0]
        share = commonest["images"] / found["labelled"]
        words.append(f"purity {share:.2f} ({visible(commonest['name'], 30)})")
    if found.get("distance") is not None:
        words.append(f"mean distance {score(found['distance'])}")
    return words


def drawn_from(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Seed sets and the images that each drew from a cluster, the most first."""
    brought = found.get("brought") or []
    return [(b["name"].removeprefix(DRAWN), b["images"]) for b in brought if b["name"].startswith(DRAWN)]


def _pictures(index: Opened, level: int, cluster: int, count: int) -> list[Values]:
    if level == 1:
        return index.ranked("near", cluster, 0, count, table=index.tiles).images
    return first_of(index, f"cluster_{level}", cluster, count)


def _figures(index: Opened, level: int) -> list[Values]:
    document = index.document
    sections: list[Values] = []
    drawn = drawn_map(index, level, index.shown_since)
    if drawn:
        text = (
            "Centroids on their first two principal components, moved apart where they overlap. The larger, the more "
            "images; a ring in another colour where seed sets drew. Each picture leads to its cluster; dots are "
            "smaller clusters."
        )
        title = f"Map of the clusters of level {level}"
        sections.append({"title": title, "text": text, "charts": [("", drawn)]})
    levels = [
        row(
            (f"{f['level']}{' (leaf)' if f['level'] == 1 else ''}", f"/clusters?level={f['level']}"),
            number(f["clusters"]),
            f"{f['effective']:.1f}",
            f"{f['gini']:.3f}",
            number(f["median"]),
            f"{number(f['largest'])} ({f['share']:.1%})",
            *("no labels" if f["purity"][n] is None else f"{f['purity'][n]:.3f}" for n in ("purity", "chance")),
        )
        for f in document.get("levels", [])
    ]
    if levels:
        heads = ["Clusters", "Effective", "Gini", "Median size", "Largest", "Purity", "By chance"]
        text = (
            "Effective: so many equal clusters would be as even (2 to the entropy). Purity: the share of labelled "
            "images that have the commonest label of their cluster; by chance: of the commonest label of all."
        )
        labelled = document["levels"][0]["purity"]
        if labelled["images"]:
            text += f" {number(labelled['images'])} clustered images have one of {number(labelled['labels'])} labels."
        if document.get("label_share", 1) < 1:
            text += f" A sample of {document['label_share']:.1%} of the labelled images was looked at."
        sections.append(table("Levels", ["Level"], heads, levels, text=text))
    sets = [
        row(
            (visible(r["seed_set"], 80), "/retrieval?" + shown.query(seed_set=r["seed_set"])),
            number(r["images"]),
            number(r["clusters"]),
            f"{r['entropy']:.2f}",
            f"{r['effective']:.1f}",
            f"{r['most']:.1%}",
            value=r["entropy"],
        )
        for r in document.get("seed_entropy", [])[:TABLE]
    ]
    if sets:
        heads = ["Images", "Leaves", "Entropy, bits", "Effective leaves", "In its largest leaf"]
        text = (
            "A seed set that draws from few clusters is narrow; one that draws evenly from all of them has the "
            f"entropy of the whole tree, {document['entropy']:.1f} bits. Of {number(len(index.lists['clusters_1']))} "
            f"leaves {number(document['drawn_from'])} were drawn from."
        )
        sections.append(table("Where the seed sets draw", ["Seed set"], heads, sets, text=text, of=document["entropy"]))
    return sections


@lru_cache(16)
def drawn_map(index: Opened, level: int, shown_since: int) -> Markup:
    """The largest clusters of a level on a plane, the first of them as pictures; empty without centroids.

    shown_since: another number when other images are hidden; the map is drawn once for each.
    """
    rows = [r for r in index.rows(f"clusters_{level}", 0, MAP_POINTS) if r["x"] is not None]
    if len(rows) < 3:
        return Markup("")
    marked = []
    for entry in rows[:MAP_PICTURES]:
        images = _pictures(index, level, entry["cluster"], 1)
        fit = bool(images) and bool(images[0]["shard"]) and (images[0]["nsfw"] or 0) <= UNSAFE
        href = f"/cluster/{level}/{entry['cluster']}"
        image = int(images[0]["image_id"]) if fit else None
        marked.append(entry | {"href": href, "drawn": drawn_from(entry), "image": image})
    points = np.array([[r["x"], r["y"]] for r in rows], np.float64)
    sizes = np.array([r["images"] for r in rows], np.float64)
    found = arranged([r["cluster"] for r in rows], points, sizes, marked)
    marks = [
        mark
        | {
            "picture": None
            if mark["image"] is None
            else (f"/api/images/{mark['image']}/thumbnail", (0, 0, 100, 100), (100, 100))
        }
        for mark in found["marks"]
    ]
    words = f"Map of the {number(len(rows))} largest clusters of level {level}. The list below has the same in words."
    return charts.cluster_map(marks, found["dots"], words)


def cluster(index: Opened, level: int, found: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], list[Values]]:
    """(lead, links to the clusters above, sections) of a cluster's page: what is inside, who drew from it, outliers.

    found: its row in the list of its level.
    """
    number_of = found["cluster"]
    lead = " · ".join(
        [f"{counted(found['images'], 'image')}, {number(found['chosen'])} of them chosen", *described(found)]
    )
    links = []
    if found.get("parent") is not None:
        links.append((f"Above it: {level + 1}:{found['parent']}", f"/cluster/{level + 1}/{found['parent']}"))
    sections: list[Values] = []
    drawn = [
        row((visible(name, 80), "/retrieval?" + shown.query(seed_set=name)), number(images), value=images)
        for name, images in drawn_from(found)
    ]
    if drawn:
        most = max(entry["value"] for entry in drawn)
        sections.append(table("Drawn by seed sets", ["Seed set"], ["Images"], drawn, of=most))
    labels = [
        row(
            (
                visible(entry["name"], 80),
                "/images?" + shown.query(label=entry["name"][: CUT["label"]], cluster=f"{level}:{number_of}"),
            ),
            number(entry["images"]),
            value=entry["images"],
        )
        for entry in found.get("labels") or []
    ]
    if labels:
        text = f"The commonest of {counted(found['labelled'], 'labelled image')}."
        sections.append(table("Labels", ["Label"], ["Images"], labels, of=found["labelled"], text=text))
    if level > 1:
        rows, total = index.inside(level, number_of, 0, CARDS)
        text = f"{counted(total, 'cluster')} of level {level - 1}, the largest first."
        within: Values = {"title": "Clusters inside", "text": text, "cards": [card(index, level - 1, r) for r in rows]}
        if total > CARDS:
            within["more"] = ("All of them", f"/clusters?level={level - 1}&inside={number_of}")
        sections.append(within)
    else:
        far = index.ranked("near", number_of, 0, BESIDE, True, index.tiles).images
        if found["images"] > 2 * BESIDE:
            images = [image | {"note": score(image["distance"])} for image in far]
            sections.append({"title": "Farthest from the centroid", "groups": [("", images)]})
    return lead, links, sections
