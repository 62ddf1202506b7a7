"""Drawing libraries, in this module of `curation` alone: thumbnails in sprite sheets (Pillow), and figures for
notebooks (matplotlib, which only they need). The charts of the pages are SVG: `curation/audit/charts.py`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 160
"""Longest side of a thumbnail, pixels."""
COLUMNS = 8
TILES_PER_SHEET = COLUMNS * COLUMNS
QUALITY = 76
INK, LOSS, MARK = "#2a9d8f", "#e9b49c", "#a33c0c"
"""The flow, what is lost, thresholds: as on the pages."""


@dataclass(frozen=True)
class Tile:
    """Where a thumbnail lies: sheet number, pixels of its corner in the sheet, its size, and the sheet's size."""

    sheet: int
    x: int
    y: int
    width: int
    height: int
    sheet_width: int
    sheet_height: int


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> the same picture within CELL x CELL, never enlarged, aspect kept."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = min(1.0, CELL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(pixels)
    if scale < 1:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(image, np.uint8)


def sheet(thumbnails: Sequence[np.ndarray]) -> tuple[bytes, list[tuple[int, int, int, int]], tuple[int, int]]:
    """A sprite sheet of up to TILES_PER_SHEET thumbnails.

    Returns it as WebP, the (x, y, width, height) of each thumbnail, and the (width, height) of the sheet.
    """
    from PIL import Image

    rows = [thumbnails[i : i + COLUMNS] for i in range(0, len(thumbnails), COLUMNS)]
    width = max(sum(t.shape[1] for t in row) for row in rows)
    height = sum(max(t.shape[0] for t in row) for row in rows)
    canvas = Image.new("RGB", (width, height), (128, 128, 128))
    boxes, y = [], 0
    for row in rows:
        x = 0
        for tile in row:
            canvas.paste(Image.fromarray(tile), (x, y))
            boxes.append((x, y, tile.shape[1], tile.shape[0]))
            x += tile.shape[1]
        y += max(t.shape[0] for t in row)
    sink = io.BytesIO()
    canvas.save(sink, "WEBP", quality=QUALITY, method=4)
    return sink.getvalue(), boxes, (width, height)


def flow(steps: Sequence[Mapping[str, Any]]) -> "Figure":
    """The steps of `curation.audit.funnel` as bars, what is lost at each behind them."""
    figure, axes = _figure(8, 0.6 + 0.45 * max(1, len(steps)))
    names = [str(s["step"]) for s in steps]
    before = [s["images"] for s in steps[:1]] + [s["images"] for s in steps[:-1]]
    axes.barh(names, before, color=LOSS, label="lost at the step")
    axes.barh(names, [s["images"] for s in steps], color=INK, label="images")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return figure


def histogram(
    counts: np.ndarray, edges: np.ndarray, title: str, threshold: float | None = None, log: bool = False
) -> "Figure":
    """Bars over `edges` (n + 1,), with a line at the threshold."""
    figure, axes = _figure(7, 3)
    axes.stairs(counts, edges, fill=True, color=INK)
    if threshold is not None:
        axes.axvline(threshold, color=MARK, linestyle="--", label=f"threshold {threshold:g}")
        axes.legend(frameon=False)
    if log:
        axes.set_yscale("symlog")
    axes.set_title(title)
    return figure


def bars(names: Sequence[str], values: Sequence[float], title: str, log: bool = False) -> "Figure":
    """A bar per name."""
    figure, axes = _figure(7, 0.8 + 0.28 * max(1, len(names)))
    axes.barh(range(len(names)), list(values), color=INK)
    axes.set_yticks(range(len(names)), [name[:60].replace("$", r"\$") for name in names])
    axes.invert_yaxis()
    if log:
        axes.set_xscale("symlog")
    axes.set_title(title)
    return figure


def plane(places: np.ndarray, sizes: np.ndarray, title: str, drawn: np.ndarray | None = None) -> "Figure":
    """Centroids on a plane, (n, 2); the area grows with the size, (n,); `drawn` (n,) bool in another colour."""
    figure, axes = _figure(7, 5)
    colours = [MARK if mark else INK for mark in (drawn if drawn is not None else np.zeros(len(sizes), bool))]
    axes.scatter(places[:, 0], places[:, 1], s=600 * sizes / max(1, sizes.max()), c=colours, alpha=0.6)
    axes.set_title(title)
    return figure


def curves(found: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> "Figure":
    """Per name (ranks, (n, 3) quantiles): the median as a line, the band between the others."""
    figure, axes = _figure(7, 4)
    for name, (ranks, quantiles) in found.items():
        (line,) = axes.plot(ranks, quantiles[:, 1], label=name[:60].replace("$", r"\$"))
        axes.fill_between(ranks, quantiles[:, 0], quantiles[:, 2], color=line.get_color(), alpha=0.2)
    axes.set_xlabel("rank")
    axes.set_ylabel("cosine")
    if found:
        axes.legend(frameon=False)
    axes.set_title(title)
    return figure


def shares(before: np.ndarray, after: np.ndarray, title: str) -> "Figure":
    """Shares of groups before (area, largest first) and after (line)."""
    figure, axes = _figure(7, 3)
    order = np.lexsort((np.arange(len(before)), -before))
    edges = np.arange(len(order) + 1)
    axes.stairs(before[order] / max(1, before.sum()), edges, fill=True, color="#c9d1d8", label="before")
    axes.stairs(after[order] / max(1, after.sum()), edges, color=INK, label="after")
    axes.legend(frameon=False)
    axes.set_title(title)
    return figure


def _figure(width: float, height: float) -> "tuple[Figure, Any]":
    """A figure that a notebook shows, and its axes; inches. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure as Base
    except ImportError as error:
        raise UserError(
            "figures in a notebook need matplotlib: pip install matplotlib (the tables need nothing)"
        ) from error

    class Shown(Base):
        """Shown by a notebook without pyplot, whose state would show it twice."""

        def _repr_png_(self) -> bytes:
            sink = io.BytesIO()
            self.savefig(sink, format="png", dpi=110, bbox_inches="tight")
            return sink.getvalue()

    figure = Shown(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
