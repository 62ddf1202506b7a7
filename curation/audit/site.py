"""The report as pages: what they show in, HTML out. Every string from outside is cut, made visible and escaped here."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from curation.audit.charts import cluster_map, meter, number, thumb
from curation.audit.figures import CELL, Tile
from curation.audit.funnel import EXPLAINED
from curation.audit.overview import UNSAFE
from curation.audit.sections import SAMPLING, Section
from curation.audit.sections.clusters import name_of
from curation.audit.words import visible
from curation.errors import UserError

TITLES = {
    "failures": "Failures",
    "filters": "Filters",
    "duplicates": "Duplicates",
    "decontamination": "Decontamination",
    "clusters": "Clusters",
    "retrieval": "Retrieval",
    "balance": "Balance",
}
"""The pages of the menu after the first, in the order of the pipeline."""
DROPPED = {"self": "near copy", "reference": "evaluation match", "exact": "exact copy", "hash": "hash copy"}
"""Reasons of DUPLICATES in the little room under a thumbnail."""
SHOWN_CHARACTERS = 2_500
CARD_CHARACTERS = 60_000
EXTRA_SECTIONS, EXTRA_ROWS, EXTRA_COLUMNS = 40, 300, 30
NUMERIC = re.compile(r"[-+−–]?[\d,.  ]*\s?(%|s|min|[kMGT]?B)?")


@dataclass(frozen=True)
class Page:
    """A page to be made: its file's name without the ending, its name in menus, its heading, template and data.

    images: the ids it shows, the most telling first. crumbs: (title, link) of the pages above it. parent: the page of
    the menu it belongs to.
    """

    name: str
    title: str
    heading: str
    template: str
    data: Section
    images: Sequence[int]
    crumbs: Sequence[tuple[str, str]] = ()
    parent: str = ""
    count: str = ""
    menu: bool = False


@dataclass(frozen=True)
class Picture:
    """One image of a page. tile: its thumbnail in the file `sheet`, or None and `why` there is none."""

    name: str
    alt: str
    title: str
    size: str
    unsafe: bool
    tile: Tile | None
    sheet: str = ""
    why: str = ""

    @property
    def thumb(self) -> Markup | None:
        """The thumbnail as SVG."""
        return thumb(self.sheet, *_boxes(self.tile), self.alt) if self.tile else None


HIDDEN = Picture("", "hidden image", "", "", True, None, why="hidden")
"""In the place of an image that the run no longer shows."""


def picture(row: Mapping[str, Any], source_names: Mapping[int, str], tile: Tile | None, why: str) -> Picture:
    """How an image of a table is named on the page. row: of `tables.locations`."""
    image_id = int(row["image_id"])
    source = source_names.get(image_id >> 40, row.get("source") or str(image_id >> 40))
    name = visible(f"{source.split(':', 1)[-1]} #{image_id & ((1 << 40) - 1)}", 60)
    label = row.get("label") or row.get("caption")
    alt = f"image {name}" + (f", labelled {visible(label, 80)}" if label else "")
    notes = [str(image_id), row.get("url"), row.get("label"), row.get("caption"), row.get("error")]
    size = f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else ""
    unsafe = (row.get("nsfw") or 0.0) > UNSAFE
    sheet = sheet_name(tile.sheet) if tile else ""
    return Picture(name, alt, " · ".join(visible(n) for n in notes if n), size, unsafe, tile, sheet, why)


def extra_sections(document: Any, where: str) -> list[dict[str, Any]]:
    """The sections of RUN/report_extra.json: a list of {title, text, columns, rows}. Raises UserError.

    text: a string or a list of paragraphs; rows: lists, or mappings by column; `notes` are further paragraphs.
    """
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise UserError(f"{where}: expected a list of sections, each with title, text, columns and rows")
    found = []
    for entry in document[:EXTRA_SECTIONS]:
        columns, rows = entry.get("columns") or [], entry.get("rows") or []
        if not isinstance(columns, list) or not isinstance(rows, list):
            raise UserError(f"{where}: columns and rows of `{visible(entry.get('title'), 60)}` must be lists")
        cells = [
            [row.get(c) for c in columns] if isinstance(row, dict) else row if isinstance(row, list) else [row]
            for row in rows[:EXTRA_ROWS]
        ]
        width = min(EXTRA_COLUMNS, max([len(columns), *(len(row) for row in cells)], default=0))
        padded = [[*row, *[None] * (width - len(row))][:width] for row in cells]
        found.append(
            {
                "title": visible(entry.get("title") or "More", 120),
                "text": [visible(p, 2000) for p in [*_paragraphs(entry.get("text")), *_paragraphs(entry.get("notes"))]],
                "columns": [visible(c, 80) for c in columns[:width]],
                "rows": [[_cell(value) for value in row] for row in padded],
                "numeric": [bool(padded) and all(_is_number(row[i]) for row in padded) for i in range(width)],
                "more": max(0, len(rows) - len(cells)),
            }
        )
    return found


def _paragraphs(value: Any) -> list[Any]:
    if not value:
        return []
    return list(value)[:20] if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return NUMERIC.fullmatch(value) is not None
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return visible(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str), 300)


def card_texts(card: Mapping[str, Any] | None) -> list[tuple[str, Markup]]:
    """The data card in pieces to unfold, each as indented JSON, long ones cut."""
    if not card:
        return []
    pieces = (
        ("Manifest", {k: v for k, v in card["manifest"].items() if k != "parts"}),
        ("Models", card.get("models")),
        ("Licences and exempt seed sets", {"licences": card.get("licences"), "exempt": card.get("exempt_seed_sets")}),
        ("Planned and actual", card.get("planned")),
        ("Decontamination", card.get("decontamination")),
        ("Configuration", card.get("configuration")),
        ("Stages: versions and fingerprints", card.get("stages")),
    )
    return [(name, _json(value)) for name, value in pieces if value]


def _json(value: Any) -> Markup:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
    lines = (
        text if len(text) <= CARD_CHARACTERS else text[:CARD_CHARACTERS] + "\n… cut; the whole stands in manifest.json"
    )
    return escape("\n".join(visible(line, 600) for line in lines.split("\n")))


def plan(overview: Section, sections: Mapping[str, Section | None], extras: Sequence[Mapping[str, Any]]) -> list[Page]:
    """The pages in reading order. overview: of the first page. sections: by the name of their page."""
    pages = [Page("index", "Overview", "Curation report", "index", overview, overview["images"], menu=True)]
    counts = {
        "failures": "total",
        "filters": "dropped",
        "duplicates": "components",
        "decontamination": "dropped",
        "clusters": "clusters",
    }
    for name, title in TITLES.items():
        section = sections.get(name)
        if section is None:
            continue
        count = number(section[counts[name]]) if name in counts else ""
        pages.append(Page(name, title, title, name, section, section["images"], menu=True, count=count))
        pages += {"clusters": _cluster_pages, "retrieval": _seed_set_pages}.get(name, lambda _: [])(section)
    if extras:
        title = "Added tables"
        pages.append(Page("more", title, title, "more", {"extras": list(extras)}, [], menu=True))
    return pages


def _cluster_pages(section: Section) -> list[Page]:
    found = []
    for page in section["pages"]:
        crumbs = [(f"Cluster {c}", f"{name_of(level, c)}.html") for level, c in page["crumbs"][:-1]]
        title = f"Cluster {page['cluster']}"
        heading = f"Cluster {page['cluster']} of level {page['level']}"
        name = name_of(page["level"], page["cluster"])
        crumbs = [("Clusters", "clusters.html"), *crumbs]
        found.append(Page(name, title, heading, "clusters", page, page["images"], crumbs, "clusters"))
    return found


def _seed_set_pages(section: Section) -> list[Page]:
    crumbs = [("Retrieval", "retrieval.html")]
    return [
        Page(
            p["name"], str(p["seed_set"]), f"Seed set {p['seed_set']}", "seed-set", p, p["images"], crumbs, "retrieval"
        )
        for p in section["pages"]
    ]


def chunks(pages: Sequence[Page], size: int) -> list[list[int]]:
    """The images of the pages in sheets of at most `size`, every page's first sheet before any page's second one.

    An image lies in a sheet of the first page that shows it, so that a page loads few sheets that are not its own.
    """
    claimed: set[int] = set()
    cut: list[tuple[int, int, list[int]]] = []
    for number_of_page, page in enumerate(pages):
        mine = [i for i in dict.fromkeys(page.images) if i is not None and i not in claimed]
        claimed.update(mine)
        for turn, start in enumerate(range(0, len(mine), size)):
            cut.append((turn, number_of_page, mine[start : start + size]))
    return [images for _, _, images in sorted(cut, key=lambda entry: entry[:2])]


def render(page: Page, pages: Sequence[Page], pictures: Mapping[int, Picture], sampled: Mapping[str, Any]) -> bytes:
    """The page as HTML. pages: all of them. pictures: by id, all the ids that the page names."""
    place = next(i for i, one in enumerate(pages) if one.name == page.name)
    text = (
        environment()
        .get_template(f"{page.template}.html.j2")
        .render(
            page=page,
            d=page.data,
            menu=[one for one in pages if one.menu],
            before=pages[place - 1] if place else None,
            after=pages[place + 1] if place + 1 < len(pages) else None,
            images=pictures,
            limits=asdict(SAMPLING),
            sampled={"cell": CELL, "unsafe": UNSAFE, **sampled},
            draw_map=lambda found: _map(found, pictures),
        )
    )
    return text.encode("utf-8", "replace")


def _map(found: Mapping[str, Any], pictures: Mapping[int, Picture]) -> Markup:
    def shown(mark: Mapping[str, Any]) -> dict[str, Any]:
        picture = pictures.get(mark["image"])
        if picture is None or picture.tile is None or picture.unsafe:
            return {**mark, "picture": None}
        return {**mark, "picture": (picture.sheet, *_boxes(picture.tile))}

    words = f"Map of {found['clusters']:,} clusters. The list below has the same in words."
    return cluster_map([shown(mark) for mark in found["marks"]], found["dots"], words)


def _boxes(tile: Tile) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    return (tile.x, tile.y, tile.width, tile.height), (tile.sheet_width, tile.sheet_height)


def style() -> bytes:
    """style.css, the same for every report and for the server."""
    return _template("style.css").encode()


def sheet_name(number_of_sheet: int) -> str:
    """Where a sprite sheet lies, relative to the pages."""
    return f"thumbnails/{number_of_sheet:03d}.webp"


def _template(name: str) -> str:
    return files("curation.audit").joinpath("templates", name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """What every expression of the template passes through before it is escaped."""
    return visible(value, SHOWN_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, with every expression escaped, cut and made visible. The audit server uses the same one."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters["number"] = number
    made.filters["text"] = visible
    made.filters["counted"] = lambda value, noun: f"{number(value)} {noun}{'' if value == 1 else 's'}"
    made.filters["cosine"] = lambda value: "" if value is None else f"{value:.3f}"
    made.filters["dropped"] = lambda reason: DROPPED.get(reason, visible(reason))
    made.filters["explained"] = lambda reason: "kept" if reason == "kept" else EXPLAINED.get(reason, visible(reason))
    made.globals["bar"] = lambda value, of: meter([("", value / of if of else 0)])
    return made
