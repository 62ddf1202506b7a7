"""The report as a page: what it shows in, HTML out. Every string from outside is cut, made visible and escaped here."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from curation.audit.figures import CELL, Tile, funnel, number
from curation.audit.funnel import EXPLAINED
from curation.audit.sections import SAMPLING, Section
from curation.audit.words import visible
from curation.errors import UserError

UNSAFE = 0.5
"""NSFW score above which a thumbnail is blurred until clicked."""
DROPPED = {"self": "near copy", "reference": "evaluation match", "exact": "exact copy", "hash": "hash copy"}
"""Reasons of DUPLICATES in the little room under a thumbnail."""
SHOWN_CHARACTERS = 2_500
CARD_CHARACTERS = 60_000
EXTRA_SECTIONS, EXTRA_ROWS, EXTRA_COLUMNS = 40, 300, 30
NUMERIC = re.compile(r"[-+−–]?[\d,.  ]*\s?(%|s|min|[kMGT]?B)?")


@dataclass(frozen=True)
class Picture:
    """One image of the page. tile: its thumbnail, or None and `why` there is none."""

    name: str
    alt: str
    title: str
    size: str
    unsafe: bool
    tile: Tile | None
    why: str = ""


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
    return Picture(name, alt, " · ".join(visible(n) for n in notes if n), size, unsafe, tile, why)


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


def render(
    *,
    sheets: Sequence[str],
    pictures: Mapping[int, Picture],
    facts: Sequence[Mapping[str, Any]],
    lead: str,
    funnels: Mapping[str, Sequence[Mapping[str, Any]]],
    sources: Sequence[Mapping[str, Any]],
    sections: Mapping[str, Section | None],
    extras: Sequence[Mapping[str, Any]],
    card: Mapping[str, Any] | None,
    thresholds: Mapping[str, float | None],
    recall: str,
    sampled: Mapping[str, Any],
) -> bytes:
    """index.html. sheets: relative paths of the sprite sheets. pictures: by id, all the ids that sections name."""
    template = _environment().get_template("index.html.j2")
    shown = {name: section for name, section in sections.items() if section}
    page = template.render(
        title="Curation report",
        lead=lead,
        style=Markup(_template("style.css")),
        sheets=list(sheets),
        images=pictures,
        facts=facts,
        funnel=funnel(next((steps for steps in funnels.values() if steps), [])),
        funnels=funnels,
        sources=sources[: SAMPLING.table_rows],
        more_sources=max(0, len(sources) - SAMPLING.table_rows),
        failures=shown.get("failures"),
        filters=shown.get("filters"),
        duplicates=shown.get("duplicates"),
        decontamination=shown.get("decontamination"),
        clusters=shown.get("clusters"),
        seed_sets=shown.get("seed_sets"),
        balance=shown.get("balance"),
        extras=extras,
        card=card_texts(card),
        thresholds=thresholds,
        recall=recall,
        limits=asdict(SAMPLING),
        sampled={"cell": CELL, "unsafe": UNSAFE, **sampled},
        contents=_contents(shown, extras),
    )
    return page.encode("utf-8", "replace")


def _contents(sections: Mapping[str, Section], extras: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    failures = sections.get("failures")
    listed = [("flow", "Flow", ""), ("sources", "Sources", "")]
    if failures and failures["total"]:
        listed.append(("failures", "Not usable", number(failures["total"])))
    if "filters" in sections:
        listed.append(("filters", "Filters", number(sum(r["images"] for r in sections["filters"]["reasons"]))))
    if "duplicates" in sections:
        listed.append(("duplicates", "Near-duplicates", number(sections["duplicates"]["components"])))
    if "decontamination" in sections:
        listed.append(("decontamination", "Decontamination", number(sections["decontamination"]["dropped"])))
    if "clusters" in sections:
        listed.append(("clusters", "Clusters", number(sections["clusters"]["clusters"])))
    if "seed_sets" in sections:
        listed.append(("seeds", "Seed sets", number(len(sections["seed_sets"]["rows"]))))
    if "balance" in sections:
        listed.append(("balance", "Balance", ""))
    listed += [(f"extra-{i}", visible(extra["title"], 40), "") for i, extra in enumerate(extras, 1)]
    return [*listed, ("card", "Data card", ""), ("sampling", "Sampling", "")]


def _template(name: str) -> str:
    return files("curation.audit").joinpath("templates", name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """What every expression of the template passes through before it is escaped."""
    return visible(value, SHOWN_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    environment.filters["text"] = visible
    environment.filters["counted"] = lambda value, noun: f"{number(value)} {noun}{'' if value == 1 else 's'}"
    environment.filters["cosine"] = lambda value: "" if value is None else f"{value:.3f}"
    environment.filters["dropped"] = lambda reason: DROPPED.get(reason, visible(reason))
    environment.filters["explained"] = lambda reason: (
        "kept" if reason == "kept" else EXPLAINED.get(reason, visible(reason))
    )
    return environment
