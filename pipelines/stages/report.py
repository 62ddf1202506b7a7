"""Report: RUN/report/index.html, a page that opens from disk and shows what the run did to which images.

It reads the tables as streams and of the images only those it shows. It is made whole each time something it
shows has changed; nothing is made from it, so it never refuses for being of other options.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from curation import locations, storage
from curation.audit import figures, sections, site, tables
from curation.errors import UserError
from pipelines.context import Context, Outcome, StageConfig, backend
from pipelines.description import (
    THRESHOLDS,
    current_generations,
    current_parts,
    described_components,
    described_retrievals,
    described_sources,
    run_counts,
    side_files,
    stage_names,
)
from pipelines.run_directory import Fingerprint, RunDirectory
from pipelines.stages.manifest import CARD

NAME = "report"
REVISION = 1
PAGE = "index.html"
EXTRA = "report_extra.json"
LIBRARIES = ("jinja2", "pillow", "pyarrow")
BYTES_PER_TILE = 700
"""What a shown thumbnail adds to the page, at most about."""


class ReportConfig(StageConfig):
    """Options of `curate report`."""

    max_megabytes: int = Field(50, ge=1, description="bound on the whole folder; fewer thumbnails are shown to keep it")


def execute(context: Context, config: ReportConfig) -> Outcome:
    """Make the page of a run, finished or not: stages that are not there leave their sections out."""
    run = context.run
    images = _images(run)
    if not images:
        raise UserError(f"{run.root}: nothing to report yet; run `curate run` or `curate download` first")
    extra = _extra(run)
    key = {
        "stages": {
            name: [g.digest for g in current_generations(run, name)] for name in stage_names(run) if name != NAME
        },
        "sources": storage.sha256(json.dumps(described_sources(run), sort_keys=True).encode()),
        EXTRA: storage.sha256(json.dumps(extra, sort_keys=True).encode()),
    }
    inside = _inside(context, config, key)
    generation = inside.begin_keyed(NAME, REVISION, config.fingerprint_options(), key, LIBRARIES)
    if generation is None:
        return inside.skipped(NAME)
    page, sheets, summary = build(context, images, extra, config.max_megabytes * 10**6)
    for name, data in sheets.items():
        generation.put_file(name, data)
    generation.put_file(PAGE, page)
    return inside.finish(generation, {"page": PAGE, **summary})


def _inside(context: Context, config: ReportConfig, key: Mapping[str, Any]) -> Context:
    """The context with the page directly in RUN/report, told to make it again if anything it shows has changed."""
    inside = replace(context, out=context.run.path(NAME), _started={})
    options = {**config.fingerprint_options(), "seed": context.seed}
    wanted = Fingerprint(NAME, REVISION, options, key, backend(LIBRARIES)).digest
    known = inside.stage(NAME).all_generations()
    return replace(inside, rebuild=context.rebuild or any(g.fingerprint.digest != wanted for g in known), _started={})


def _images(run: RunDirectory) -> list[str]:
    """Parts of the newest table of images: the filter's, else the scores', else what was fetched."""
    for stages in (("filter",), ("score",), ("download", "import")):
        paths = [path for stage in stages for path in current_parts(run, stage)]
        if paths:
            return paths
    return []


def _extra(run: RunDirectory) -> list[dict[str, Any]]:
    path = run.path(EXTRA)
    if not storage.exists(path):
        return []
    try:
        document = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or remove it") from error
    return site.extra_sections(document, path)


def _run_tables(run: RunDirectory, images: Sequence[str]) -> sections.RunTables:
    forest = [
        generation.file(name)
        for generation in current_generations(run, "dedup")[-1:]
        for name in sorted({*generation.files, *(f for part in generation.parts for f in part.files)})
        if name.startswith("self_forest/") and name.endswith(".parquet")
    ]
    return sections.RunTables(
        images=images,
        duplicates=current_parts(run, "dedup"),
        self_forest=forest,
        clusters=current_parts(run, "cluster"),
        retrieval=current_parts(run, "retrieve"),
        balance=current_parts(run, "balance"),
        manifest=current_parts(run, "manifest"),
    )


def _card(run: RunDirectory) -> dict[str, Any] | None:
    for generation in current_generations(run, "manifest"):
        return dict(json.loads(storage.read_bytes(generation.file(CARD))))
    return None


def build(
    context: Context, images: Sequence[str], extra: Sequence[dict[str, Any]], max_bytes: int
) -> tuple[bytes, dict[str, bytes], dict[str, Any]]:
    """(index.html, sprite sheets by relative path, summary), together at most `max_bytes`, else UserError."""
    run = context.run
    card = _card(run)
    paths = _run_tables(run, images)
    counts = card["counts"] if card else run_counts(run, None)
    options = _options(run)
    dedup_files = side_files(run, "dedup")
    sweep = dedup_files.get("thresholds", {})
    self_threshold, reference_threshold = _threshold(options, "threshold"), _threshold(options, "against_threshold")
    shown: dict[str, sections.Section | None] = {
        "failures": sections.failures(paths),
        "filters": sections.filters(paths, _limits(options)),
        "duplicates": sections.duplicates(paths, described_components(dedup_files), sweep.get("self", [])),
        "decontamination": sections.decontamination(
            paths, THRESHOLDS, reference_threshold, dedup_files.get("references", []), sweep.get("relative", [])
        ),
        "clusters": sections.clusters(paths),
        "seed_sets": sections.seed_sets(paths, _seed_rows(run, card, counts)),
        "balance": sections.balance(paths),
    }
    wanted = sections.priority(list(shown.values()))
    rows = {int(r["image_id"]): r for r in tables.locations(images, np.array(wanted, np.uint64)).to_pylist()}
    common = {
        "facts": _facts(card, counts, shown),
        "lead": _lead(card, counts),
        "funnels": counts["funnel"],
        "sources": _sources(run, counts),
        "sections": shown,
        "extras": extra,
        "card": card,
        "thresholds": {"self": self_threshold, "reference": reference_threshold},
        "recall": _recall(dedup_files.get("recall")),
    }
    names = {s.number: s.name for s in run.sources()}
    sheets: list[bytes] = []
    tiles: dict[int, figures.Tile] = {}
    whys: dict[int, str] = {}
    reserve = len(_page(common, names, rows, wanted, [], {}, whys, max_bytes)) + BYTES_PER_TILE
    for made in _sheets(context, rows, wanted):
        cost = len(made["data"]) + BYTES_PER_TILE * len(made["boxes"])
        if reserve + sum(map(len, sheets)) + cost > max_bytes:
            break
        whys |= made["failed"]
        if not made["boxes"]:
            continue
        for image, box in made["boxes"]:
            tiles[image] = figures.Tile(len(sheets), *box, *made["size"])
        sheets.append(made["data"])
        reserve += BYTES_PER_TILE * len(made["boxes"])
    page = _page(common, names, rows, wanted, sheets, tiles, whys, max_bytes)
    while sheets and len(page) + sum(map(len, sheets)) > max_bytes:
        sheets.pop()
        tiles = {image: tile for image, tile in tiles.items() if tile.sheet < len(sheets)}
        page = _page(common, names, rows, wanted, sheets, tiles, whys, max_bytes)
    size = len(page) + sum(map(len, sheets))
    if size > max_bytes:
        raise UserError(f"the page alone takes {size / 1e6:.1f} MB: allow more with --max-megabytes")
    summary = {"thumbnails": len(tiles), "wanted": len(wanted), "bytes": size}
    return page, {_sheet_name(i): data for i, data in enumerate(sheets)}, summary


def _sheet_name(number: int) -> str:
    return f"thumbnails/{number:03d}.webp"


def _page(
    common: Mapping[str, Any],
    names: Mapping[int, str],
    rows: Mapping[int, Mapping[str, Any]],
    wanted: Sequence[int],
    sheets: Sequence[bytes],
    tiles: Mapping[int, figures.Tile],
    whys: Mapping[int, str],
    max_bytes: int,
) -> bytes:
    left_out = f"left out to stay below {max_bytes // 10**6} MB"
    pictures = {
        image: site.picture(rows[image], names, tiles.get(image), whys.get(image, left_out))
        for image in wanted
        if image in rows
    }
    sampled = {
        "wanted": len(wanted),
        "shown": len(tiles),
        "unreadable": len(whys),
        "left_out": len(wanted) - len(tiles) - len(whys) if sheets else 0,
        "megabytes": max_bytes // 10**6,
    }
    return site.render(
        sheets=[_sheet_name(i) for i in range(len(sheets))], pictures=pictures, sampled=sampled, **common
    )


def _sheets(context: Context, rows: Mapping[int, Mapping[str, Any]], wanted: Sequence[int]) -> Any:
    """Sprite sheets in the order of `wanted`, made by tasks: the bytes, each image's box, and why some have none."""
    places = [
        (image, rows[image]["shard"], rows[image]["offset"], rows[image]["length"])
        for image in wanted
        if image in rows and rows[image]["shard"] is not None
    ]
    pending = {image: "no bytes stored" for image in wanted if image not in rows or rows[image]["shard"] is None}
    yield {"data": b"", "boxes": [], "failed": pending, "size": (0, 0)}
    size = figures.TILES_PER_SHEET
    chunks = [sorted(places[i : i + size], key=lambda place: place[1:]) for i in range(0, len(places), size)]
    names = [f"{i:06d}" for i in range(len(chunks))]
    ready: dict[str, Any] = {}
    following = iter(names)
    awaited = next(following, None)
    calls = ((name, (chunk,)) for name, chunk in zip(names, chunks, strict=True))
    for name, made in context.spread(make_sheet, calls, shared=context.run.root):
        ready[name] = made
        while awaited in ready:
            yield ready.pop(awaited)
            awaited = next(following, None)


def make_sheet(places: Sequence[tuple[int, str, int, int]], root: str) -> dict[str, Any]:
    """Read, decode and shrink the images at these (id, shard, offset, length), into one sprite sheet."""
    from embeddings.decoding import DecodeError, worker_decoder

    decoder = worker_decoder()
    found: list[tuple[int, np.ndarray]] = []
    failed: dict[int, str] = {}
    data = locations.read_ranges(root, [(shard, offset, length) for _, shard, offset, length in places])
    for (image, *_), content in zip(places, data, strict=True):
        if isinstance(content, OSError):
            failed[image] = "bytes cannot be read"
            continue
        try:
            found.append((image, figures.thumbnail(decoder.decode(content))))
        except DecodeError as error:
            failed[image] = f"not decoded: {error.reason}"
    if not found:
        return {"data": b"", "boxes": [], "failed": failed, "size": (0, 0)}
    found.sort(key=lambda entry: (-entry[1].shape[0], entry[0]))
    sheet, boxes, size = figures.sheet([tile for _, tile in found])
    return {
        "data": sheet,
        "boxes": [(i, box) for (i, _), box in zip(found, boxes, strict=True)],
        "failed": failed,
        "size": size,
    }


def _options(run: RunDirectory) -> dict[str, Mapping[str, Any]]:
    """Options of the newest generation of the stages whose thresholds the page shows."""
    return {
        stage: generations[-1].fingerprint.options
        for stage in ("filter", "dedup")
        if (generations := current_generations(run, stage))
    }


def _threshold(options: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    value = options.get("dedup", {}).get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _limits(options: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Thresholds of the filter, by score."""
    given = options.get("filter", {})
    names = {
        "nsfw": "nsfw_threshold",
        "contrast": "solid_colour",
        "min_side": "min_side",
        "aspect_ratio": "aspect_ratio",
    }
    return {score: float(given[n]) if given.get(n) is not None else None for score, n in names.items()}


def _seed_rows(run: RunDirectory, card: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    from curation.manifest import seed_set_figures

    if card:
        return list(card["seed_sets"])
    return seed_set_figures(counts["retrieve"] or [], [], described_sources(run), described_retrievals(run))


def _sources(run: RunDirectory, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    usable: dict[str, int] = {}
    for row in counts["filter"] or counts["fetched"]:
        usable[row["source"]] = usable.get(row["source"], 0) + (row["images"] if row["status"] == "ok" else 0)
    inside = {row["source_number"]: row["images"] for row in counts["manifest"] or []}
    known = counts["manifest"] is not None
    return [
        {**s, "usable": usable.get(s["name"]), "manifest": inside.get(s["number"], 0) if known else None}
        for s in described_sources(run)
    ]


def _lead(card: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> str:
    listed = sum(steps[0]["images"] for steps in counts["funnel"].values())
    if card is None:
        return f"{listed:,} images are listed. The run has no manifest yet: the page shows what is there."
    rows = card["manifest"]["rows"]
    return f"{rows:,} images were chosen from {listed:,} listed, with the reason for each that was left behind."


def _facts(
    card: Mapping[str, Any] | None, counts: Mapping[str, Any], shown: Mapping[str, sections.Section | None]
) -> list[dict[str, Any]]:
    pool = counts["funnel"].get("pool", [])
    facts = [{"name": "Pool images listed", "value": f"{pool[0]['images']:,}", "note": ""}] if pool else []
    fetched = next((s for s in pool if s["step"] == "fetched"), None)
    if fetched and pool[0]["images"]:
        facts.append(
            {
                "name": "Fetched",
                "value": f"{fetched['images']:,}",
                "note": f"{fetched['images'] / pool[0]['images']:.1%} of the list",
            }
        )
    duplicates = shown["duplicates"]
    if duplicates:
        copies = sum(r["images"] for r in duplicates["reasons"] if not r["kept"] and r["reason"] != "reference")
        facts.append(
            {"name": "Copies removed", "value": f"{copies:,}", "note": f"{duplicates['components']:,} components"}
        )
    decontamination = shown["decontamination"]
    if decontamination:
        note = f"{decontamination['direct']:,} direct, {decontamination['chains']:,} by chains"
        facts.append({"name": "Removed for evaluation sets", "value": f"{decontamination['dropped']:,}", "note": note})
    if card:
        rows, size = card["manifest"]["rows"], card["manifest"]["bytes"]
        facts.append(
            {
                "name": "In the manifest",
                "value": f"{rows:,}",
                "note": f"{size / 1e9:,.2f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB",
            }
        )
        facts.append(
            {"name": "Nominal draws", "value": f"{card['manifest']['nominal']:,}", "note": "the paper's count"}
        )
    return facts


def _recall(document: Any) -> str:
    """The measured recall of the join, as a sentence; the file's own keys where they are known."""
    if not isinstance(document, dict):
        return ""
    inner: dict[str, Any] = document["self"] if isinstance(document.get("self"), dict) else document
    if inner.get("method") == "exact":
        return "The search was exact: no pair was missed."
    value = inner.get("recall")
    if not isinstance(value, (int, float)):
        return ""
    low, high = (inner.get(f"recall_{end}", inner.get(end)) for end in ("low", "high"))
    interval = f" (95 % interval {low:.4f} to {high:.4f})" if isinstance(low, float) and isinstance(high, float) else ""
    return f"Measured recall of the join: {value:.4f}{interval}."
