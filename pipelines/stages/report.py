"""Report: RUN/report, a small site that opens from disk or a bucket and shows what the run did to which images.

It reads the tables as streams and of the images only those it shows. It is made whole each time something it
shows has changed; nothing is made from it, so it never refuses for being of other options.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import Field

from curation import locations, storage
from curation.audit import charts, figures, overview, site, tables
from curation.audit.run_tables import RunTables, open_run
from curation.audit.sections import (
    SAMPLING,
    Section,
    balance,
    clusters,
    decontamination,
    duplicates,
    failures,
    filters,
    retrieval,
)
from curation.errors import UserError
from curation.hidden import digest, is_hidden
from pipelines.context import Context, Outcome, StageConfig, backend
from pipelines.description import (
    current_generations,
    described_retrievals,
    described_sources,
    run_counts,
    stage_names,
)
from pipelines.run_directory import Fingerprint, RunDirectory
from pipelines.stages.manifest import CARD

NAME = "report"
REVISION = 2
PAGE = "index.html"
EXTRA = "report_extra.json"
LIBRARIES = ("jinja2", "pillow", "pyarrow")
BYTES_PER_TILE = 900
"""What a shown thumbnail adds to the pages, about."""


class ReportConfig(StageConfig):
    """Options of `curate report`."""

    max_megabytes: int = Field(50, ge=1, description="bound on the whole folder; fewer thumbnails are shown to keep it")


def execute(context: Context, config: ReportConfig) -> Outcome:
    """Make the pages of a run, finished or not: stages that are not there leave theirs out."""
    run = context.run
    read = open_run(run.root)
    if not read.images:
        raise UserError(f"{run.root}: nothing to report yet; run `curate run` or `curate download` first")
    extra = _extra(run)
    key = {
        "stages": {
            name: [g.digest for g in current_generations(run, name)] for name in stage_names(run) if name != NAME
        },
        "sources": storage.sha256(json.dumps(described_sources(run), sort_keys=True).encode()),
        "hidden": [digest(read.hidden), read.forgotten],
        EXTRA: storage.sha256(json.dumps(extra, sort_keys=True).encode()),
    }
    inside = _inside(context, config, key)
    generation = inside.begin_keyed(NAME, REVISION, config.fingerprint_options(), key, LIBRARIES)
    if generation is None:
        return inside.skipped(NAME)
    files, summary = build(context, read, extra, config.max_megabytes * 10**6)
    for name in sorted(files, key=lambda name: name == PAGE):
        generation.put_file(name, files[name])
    return inside.finish(generation, {"page": PAGE, **summary})


def _inside(context: Context, config: ReportConfig, key: Mapping[str, Any]) -> Context:
    """The context with the pages directly in RUN/report, told to make it again if anything it shows has changed."""
    inside = replace(context, out=context.run.path(NAME), _started={})
    options = {**config.fingerprint_options(), "seed": context.seed}
    wanted = Fingerprint(NAME, REVISION, options, key, backend(LIBRARIES)).digest
    known = inside.stage(NAME).all_generations()
    return replace(inside, rebuild=context.rebuild or any(g.fingerprint.digest != wanted for g in known), _started={})


def _extra(run: RunDirectory) -> list[dict[str, Any]]:
    path = run.path(EXTRA)
    if not storage.exists(path):
        return []
    try:
        document = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or remove it") from error
    return site.extra_sections(document, path)


def _card(run: RunDirectory) -> dict[str, Any] | None:
    for generation in current_generations(run, "manifest"):
        return dict(json.loads(storage.read_bytes(generation.file(CARD))))
    return None


def build(
    context: Context, run: RunTables, extra: Sequence[dict[str, Any]], max_bytes: int
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files by relative path, summary), together at most `max_bytes`, else UserError."""
    pages = _pages(context.run, run, extra)
    sheets = [
        np.array(images, np.uint64)[~is_hidden(np.array(images, np.uint64), run.hidden)].tolist()
        for images in site.chunks(pages, figures.TILES_PER_SHEET)
    ]
    wanted = [image for images in sheets for image in images]
    rows = {int(r["image_id"]): r for r in tables.locations(run.images, np.array(wanted, np.uint64)).to_pylist()}
    drawn = Drawn(pages, rows, {s.number: s.name for s in context.run.sources()}, run.hidden, wanted, max_bytes)
    reserve = sum(map(len, drawn.files().values())) + BYTES_PER_TILE
    for made in _sheets(context, rows, sheets):
        cost = len(made["data"]) + BYTES_PER_TILE * len(made["boxes"])
        if reserve + cost > max_bytes:
            drawn.full = True
            break
        drawn.whys |= made["failed"]
        if not made["boxes"]:
            continue
        for image, box in made["boxes"]:
            drawn.tiles[image] = figures.Tile(len(drawn.sheets), *box, *made["size"])
        drawn.sheets.append(made["data"])
        reserve += cost
    files = drawn.files()
    while drawn.sheets and sum(map(len, files.values())) > max_bytes:
        drawn.drop_last()
        files = drawn.files()
    size = sum(map(len, files.values()))
    if size > max_bytes:
        raise UserError(f"the pages alone take {size / 1e6:.1f} MB: allow more with --max-megabytes")
    summary = {"pages": len(pages), "thumbnails": len(drawn.tiles), "wanted": len(wanted), "bytes": size}
    return files, summary


def _pages(directory: RunDirectory, run: RunTables, extra: Sequence[dict[str, Any]]) -> list[site.Page]:
    """What the pages show, without the pictures."""
    card = _card(directory)
    counts = card["counts"] if card else run_counts(directory, None)
    clustered = clusters.section(run)
    shown: dict[str, Section | None] = {
        "failures": failures.section(run),
        "filters": filters.section(run),
        "duplicates": duplicates.section(run),
        "decontamination": decontamination.section(run),
        "clusters": clustered,
        "retrieval": retrieval.section(
            run, _seed_rows(directory, card, counts), clustered["leaf_pages"] if clustered else None
        ),
        "balance": balance.section(run),
    }
    sources = overview.sources(described_sources(directory), counts)
    first = {
        "lead": overview.lead(card, counts),
        "facts": overview.facts(card, counts, shown),
        "funnel": charts.funnel(next((steps for steps in counts["funnel"].values() if steps), [])),
        "funnels": counts["funnel"],
        "images": overview.chosen(run, SAMPLING.chosen),
        "warnings": overview.warnings(run, counts, card, shown),
        "sources": sources[: SAMPLING.table_rows],
        "more_sources": max(0, len(sources) - SAMPLING.table_rows),
        "card": site.card_texts(card),
        "hidden": {
            "all": len(run.hidden),
            "forgotten": run.forgotten,
            "dropped": len(run.hidden) - run.forgotten,
        },
    }
    return site.plan(first, shown, extra)


@dataclass
class Drawn:
    """The pages and the thumbnails that they have so far."""

    pages: Sequence[site.Page]
    rows: Mapping[int, Mapping[str, Any]]
    names: Mapping[int, str]
    hidden: np.ndarray
    wanted: Sequence[int]
    max_bytes: int
    full: bool = False
    sheets: list[bytes] = field(default_factory=list)
    tiles: dict[int, figures.Tile] = field(default_factory=dict)
    whys: dict[int, str] = field(default_factory=dict)

    def drop_last(self) -> None:
        """Leave the last sheet out."""
        self.sheets.pop()
        self.full = True
        self.tiles = {image: tile for image, tile in self.tiles.items() if tile.sheet < len(self.sheets)}

    def files(self) -> dict[str, bytes]:
        """Everything of the folder, by relative path."""
        left_out = f"left out to stay below {self.max_bytes // 10**6} MB"
        named = {i for page in self.pages for i in page.images if i is not None}
        pictures = {
            image: site.picture(self.rows[image], self.names, self.tiles.get(image), self.whys.get(image, left_out))
            for image in named
            if image in self.rows
        }
        lost = np.array(sorted(named), np.uint64)
        pictures |= {int(i): site.HIDDEN for i in lost[is_hidden(lost, self.hidden)]}
        sampled = {
            "wanted": len(self.wanted),
            "shown": len(self.tiles),
            "unreadable": len(self.whys),
            "left_out": len(self.wanted) - len(self.tiles) - len(self.whys) if self.full else 0,
            "megabytes": self.max_bytes // 10**6,
        }
        found = {f"{page.name}.html": site.render(page, self.pages, pictures, sampled) for page in self.pages}
        return {**found, "style.css": site.style()} | {site.sheet_name(i): data for i, data in enumerate(self.sheets)}


def _sheets(context: Context, rows: Mapping[int, Mapping[str, Any]], sheets: Sequence[Sequence[int]]) -> Any:
    """Sprite sheets in their order, made by tasks: the bytes, each image's box, and why some have none."""
    lost = [i for images in sheets for i in images if i not in rows or rows[i]["shard"] is None]
    yield {"data": b"", "boxes": [], "failed": dict.fromkeys(lost, "no bytes stored"), "size": (0, 0)}
    places = [
        sorted(
            ((i, *(rows[i][name] for name in ("shard", "offset", "length"))) for i in images if _has_bytes(rows, i)),
            key=lambda place: place[1:],
        )
        for images in sheets
    ]
    calls = [(f"{number:06d}", (some,)) for number, some in enumerate(some for some in places if some)]
    ready: dict[str, Any] = {}
    following = iter([name for name, _ in calls])
    awaited = next(following, None)
    for name, made in context.spread(make_sheet, iter(calls), shared=context.run.root):
        ready[name] = made
        while awaited in ready:
            yield ready.pop(awaited)
            awaited = next(following, None)


def _has_bytes(rows: Mapping[int, Mapping[str, Any]], image: int) -> bool:
    return image in rows and rows[image]["shard"] is not None


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


def _seed_rows(run: RunDirectory, card: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    from curation.manifest import seed_set_figures

    if card:
        return list(card["seed_sets"])
    return seed_set_figures(counts["retrieve"] or [], [], described_sources(run), described_retrievals(run))
