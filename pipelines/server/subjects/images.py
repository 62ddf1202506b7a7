"""Images, one and many: what is known of each, what a list of them can be narrowed by."""

from collections.abc import Mapping, Sequence
from typing import Any

from curation.audit.words import visible
from pipelines.server import shown
from pipelines.server.opened import Opened, Page
from pipelines.server.rendering import number, score
from pipelines.server.subjects import Values, by_id, counted


def choices(index: Opened) -> Values:
    """What the filters of the page of images offer."""
    counts = index.document.get("counts", [])
    return {
        "source_names": sorted({c["source"] for c in counts})[:200],
        "statuses": sorted({c["status"] for c in counts}),
        "errors": sorted({c["error"] for c in counts if c["error"]})[:200],
        "outcomes": sorted({r["reason"] for r in index.document.get("reasons", [])}),
        "broughts": ways(index)[:200],
    }


def ways(index: Opened) -> list[str]:
    """What may have brought an image into the dataset: `balance`, `retrieve:NAME`, `seed:NAME`."""
    if "brought" not in index.groups:
        return []
    seeds = {s["source"] for s in index.document.get("steps", []) if s["source"].startswith("seed:")}
    return sorted({"balance", *seeds, *(f"retrieve:{s['seed_set']}" for s in index.document.get("seed_sets", []))})


def total(found: Page) -> str:
    """How many there are, in words."""
    return "" if found.total is None else counted(found.total, "image")


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
        "spaces": [n for n, s in index.spaces.items() if s.place(index.rows_of_one(int(found["image_id"]))) >= 0],
        "rows": [(name, visible(value, 2000)) for name, value in rows if value is not None and value != ""],
        "nearest": nearest,
        "drawn": seeds,
        "drawn_total": total,
    }


def first_of(index: Opened, kind: str, value: Any, count: int) -> list[Values]:
    """The first images of a group."""
    return index.listed({kind: value}, None, count, index.tiles).images


def matches(index: Opened, rows: Sequence[Values], name: str | None = None) -> list[tuple[Values, Values | None]]:
    """Each image beside the reference image that it matches best, of one set or of any; its note is the cosine."""
    best = []
    for entry in rows:
        hits = [h for h in entry.get("references") or [] if name is None or h["reference_set"] == name]
        best.append(max(hits, key=lambda h: h["similarity"]) if hits else None)
    known = by_id(index, [hit["reference_id"] for hit in best if hit])
    return [
        (
            entry | {"note": score(hit["similarity"]) if hit else ""},
            known.get(int(hit["reference_id"])) if hit else None,
        )
        for entry, hit in zip(rows, best, strict=True)
    ]
