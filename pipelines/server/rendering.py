"""Templates of the pages. Every string from outside is cut, made visible and escaped here."""

import math
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from curation.audit import charts
from curation.audit.overview import UNSAFE
from curation.audit.words import visible
from pipelines.server import shown

LONGEST = 2_500
STATIC = {
    "style.css": ("curation.audit", "text/css"),
    "server.css": ("pipelines.server", "text/css"),
    "server.js": ("pipelines.server", "text/javascript"),
    "icon.svg": ("pipelines.server", "image/svg+xml"),
}


@cache
def static(name: str) -> tuple[bytes, str] | None:
    """(content, type) of a file that pages load, None if there is none of this name."""
    if name not in STATIC:
        return None
    package, kind = STATIC[name]
    return files(package).joinpath("templates", name).read_bytes(), kind


def render(name: str, **values: Any) -> str:
    """A page."""
    return _environment().get_template(name).render(**values)


def number(value: float) -> str:
    """1,234,567."""
    return f"{int(value):,}"


def _counted(value: float, noun: str) -> str:
    return f"{int(value):,} {noun}{'' if value == 1 else 's'}"


def _finalize(value: Any) -> Any:
    return visible(value, LONGEST) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: files("pipelines.server").joinpath("templates", name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.ChainableUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "text": visible,
        "number": number,
        "counted": _counted,
        "name_of": shown.name_of,
        "state_of": shown.state_of,
        "duration": shown.duration,
    }
    environment.globals |= {"meter": charts.meter, "unsafe": UNSAFE}
    return environment


def score(value: float | None) -> str:
    """A score in few characters."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.3g}"
