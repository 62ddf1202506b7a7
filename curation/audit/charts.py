"""Charts as SVG, for pages without scripts. They carry classes, no colours: the style sheet decides those, for light
and dark. Every string is escaped. Widths and heights are pixels at 1:1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from curation.audit.words import visible

MAP_SIZE = (1040.0, 600.0)
"""Pixels of a map of clusters."""


def number(value: float) -> str:
    """A count as people read it: 1,234,567."""
    return f"{int(value):,}"


def short(value: float) -> str:
    """A count in little room: 812, 4.2k, 1.3M, 1.2B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.3g}{unit}"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.3g}"


def _svg(width: float, height: float, label: str, body: Sequence[Markup], name: str = "chart") -> Markup:
    head = Markup(
        '<svg class="{}" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" role="img" aria-label="{}">'
    )
    return (
        head.format(name, width, height, width, height, visible(label, 600)) + Markup("").join(body) + Markup("</svg>")
    )


def _text(x: float, y: float, words: str, name: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, name, anchor, visible(words)
    )


def funnel(steps: Sequence[Mapping[str, Any]], reasons: int = 4) -> Markup:
    """The flow of images through the steps of `curation.audit.funnel`: what stays runs on, what is lost drops off."""
    if not steps:
        return Markup("")
    top, full, width, side = 74.0, 132.0, 1120.0, 6.0
    most = max(1, *(s["images"] for s in steps))
    spacing = (width - 2 * side) / len(steps)
    heights = [max(1.5, full * s["images"] / most) if s["images"] else 0.0 for s in steps]
    xs = [side + i * spacing for i in range(len(steps))]
    fall = top + full + 46
    body: list[Markup] = []
    lines_below = 0
    for i, step in enumerate(steps):
        end = xs[i] + spacing
        body.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="flow{}"/>').format(
                xs[i],
                top,
                spacing - (0 if i + 1 < len(steps) else 2),
                heights[i] if i + 1 == len(steps) else min(heights[i], heights[i + 1]),
                " last" if i + 1 == len(steps) else "",
            )
        )
        body.append(
            Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}" class="tick"/>').format(
                xs[i] + 0.5, top - 48, top
            )
        )
        body.append(_text(xs[i] + 8, top - 32, number(step["images"]), "count"))
        body.append(_text(xs[i] + 8, top - 13, _clip(step["step"], int(spacing / 7)), "step"))
        if i + 1 == len(steps):
            continue
        following = steps[i + 1]
        lost = sum(entry["images"] for entry in following["lost"])
        if not lost:
            continue
        upper = top + min(heights[i], heights[i + 1])
        thick = max(1.0, top + heights[i] - upper)
        left, inner = min(xs[i] + 34, end - thick - 4), 8.0
        path = (
            f"M{xs[i]:.1f} {upper:.1f} H{left - inner:.1f} "
            f"A{thick + inner:.1f} {thick + inner:.1f} 0 0 1 {left + thick:.1f} {upper + thick + inner:.1f} "
            f"V{fall:.1f} H{left:.1f} V{upper + thick + inner:.1f} "
            f"A{inner:.1f} {inner:.1f} 0 0 0 {left - inner:.1f} {upper + thick:.1f} H{xs[i]:.1f} Z"
        )
        body.append(Markup('<path d="{}" class="loss"/>').format(path))
        y = fall + 20
        share = lost / step["images"] if step["images"] else 0
        body.append(_text(xs[i] + 8, y, f"− {number(lost)} ({share:.1%})", "lost"))
        shown = following["lost"][:reasons]
        characters = int((spacing - 14) / 6.2)
        for entry in shown:
            y += 16
            body.append(
                _text(xs[i] + 8, y, _clip(f"{number(entry['images'])} {entry['reason']}", characters), "reason")
            )
        rest = following["lost"][reasons:]
        if rest:
            y += 16
            words = f"{number(sum(e['images'] for e in rest))} for {len(rest)} more reasons"
            body.append(_text(xs[i] + 8, y, _clip(words, characters), "reason"))
        lines_below = max(lines_below, len(shown) + bool(rest))
    label = ", ".join(f"{s['step']}: {number(s['images'])}" for s in steps)
    height = fall + 36 + 16 * lines_below if lines_below else top + full + 10
    return _svg(width, height, f"Images after each step. {label}", body, "chart funnel")


def _clip(words: str, characters: int) -> str:
    return words if len(words) <= characters else words[: max(1, characters - 1)] + "…"


def histogram(
    counts: np.ndarray,
    edges: np.ndarray,
    label: str,
    *,
    threshold: float | None = None,
    log: bool = False,
    form: str = "{:g}",
) -> Markup:
    """Bars of equal width over `edges`, with a line at `threshold`. log: heights by the logarithm of the count."""
    width, height, left, right, base = 520.0, 190.0, 44.0, 20.0, 160.0
    values = np.log10(counts + 1.0) if log else counts.astype(float)
    most = float(values.max()) or 1.0
    step = (width - left - right) / len(counts)
    body = [Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="axis"/>').format(left, width - right, base, base)]
    for i, value in enumerate(values):
        tall = (base - 18) * float(value) / most
        if counts[i]:
            body.append(
                Markup(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="bar">'
                    "<title>{} to {}: {}</title></rect>"
                ).format(
                    left + i * step + 0.5,
                    base - max(1, tall),
                    max(1, step - 1),
                    max(1, tall),
                    form.format(edges[i]),
                    form.format(edges[i + 1]),
                    number(counts[i]),
                )
            )
    body.append(_text(left - 6, 26, short(float(counts.max())), "label", "end"))
    body.append(_text(left - 6, base, "0", "label", "end"))
    marks = max(1, len(counts) // 5)
    for i in range(0, len(edges), marks):
        body.append(_text(left + i * step, base + 16, form.format(edges[i]), "label", "middle"))
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        at = left + step * float(np.interp(threshold, edges, np.arange(len(edges))))
        body.append(Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="10" y2="{1}" class="threshold"/>').format(at, base))
        before = at > width - 120
        body.append(
            _text(at + (-5 if before else 5), 18, f"threshold {threshold:g}", "mark", "end" if before else "start")
        )
    return _svg(width, height, label, body, "chart")


def sizes(groups: Sequence[tuple[int, int]], label: str, noun: str) -> Markup:
    """How many groups are of which size, in bins that double: (size, groups) pairs."""
    if not groups:
        return Markup("")
    bins: dict[int, int] = {}
    for size, count in groups:
        at = max(0, int(math.log2(max(1, size))))
        bins[at] = bins.get(at, 0) + count
    low, high = min(bins), max(bins)
    names = [
        f"{1 << b}" if (1 << (b + 1)) - 1 == 1 << b else f"{short(1 << b)}–{short((1 << (b + 1)) - 1)}"
        for b in range(low, high + 1)
    ]
    return bars(names, [bins.get(b, 0) for b in range(low, high + 1)], label, noun)


def bars(names: Sequence[str], counts: Sequence[int], label: str, noun: str) -> Markup:
    """Upright bars with names below and counts above; heights by logarithm, so that 1 is seen beside 10,000."""
    width, base = max(220.0, 64.0 * len(names) + 24), 150.0
    most = max(math.log10(c + 1) for c in counts) or 1.0
    body = [Markup('<line x1="8" x2="{}" y1="{}" y2="{}" class="axis"/>').format(width - 8, base, base)]
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        tall = (base - 34) * math.log10(count + 1) / most
        x = 12 + 64 * i
        if count:
            body.append(
                Markup(
                    '<rect x="{}" y="{:.1f}" width="52" height="{:.1f}" class="bar"><title>{}: {} {}</title></rect>'
                ).format(x, base - max(1, tall), max(1, tall), name, number(count), noun)
            )
        body.append(_text(x + 26, base - tall - 6, short(count), "value", "middle"))
        body.append(_text(x + 26, base + 16, name, "label", "middle"))
    return _svg(width, 176, label, body, "chart natural")


def before_after(before: np.ndarray, after: np.ndarray, label: str) -> Markup:
    """Shares of clusters in the pool (area) and in the balanced sample (line), largest clusters of the pool first."""
    width, height, left, base = 1040.0, 230.0, 52.0, 196.0
    order = np.lexsort((np.arange(len(before)), -before))
    count = min(len(order), 400)
    groups = [g for g in np.array_split(order, count) if len(g)]
    shares = [np.array([v[g].mean() for g in groups]) / max(1, v.sum()) for v in (before, after)]
    most = float(max(s.max() for s in shares)) or 1.0
    step = (width - left - 8) / len(groups)
    body = [Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="axis"/>').format(left, width - 8, base, base)]
    for name, share in zip(("before", "after"), shares, strict=True):
        ys = [base - (base - 20) * float(v) / most for v in share]
        points = [f"{left + i * step + dx:.1f} {y:.1f}" for i, y in enumerate(ys) for dx in (0, step)]
        closing = f" L{left + len(ys) * step:.1f} {base} L{left} {base} Z" if name == "before" else ""
        body.append(Markup('<path d="{}" class="{}"/>').format("M" + " L".join(points) + closing, name))
    body.append(_text(left - 6, 26, f"{most:.2%}", "label", "end"))
    body.append(_text(left - 6, base, "0", "label", "end"))
    body.append(_text(left, base + 20, "largest cluster of the pool", "label"))
    body.append(_text(width - 8, base + 20, f"smallest of {number(len(before))}", "label", "end"))
    return _svg(width, height, label, body, "chart full")


def thresholds(at: Mapping[str, int], label: str, chosen: float | None = None) -> Markup:
    """Counts that fall as a threshold rises, one bar each, the run's own threshold marked."""
    names, counts = list(at), list(at.values())
    width, base = 52.0 * len(names) + 24, 132.0
    most = max([1, *counts])
    body = [Markup('<line x1="8" x2="{}" y1="{}" y2="{}" class="axis"/>').format(width - 8, base, base)]
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        tall = (base - 32) * count / most
        own = chosen is not None and math.isclose(float(name), chosen, abs_tol=1e-6)
        body.append(
            Markup('<rect x="{}" y="{:.1f}" width="42" height="{:.1f}" class="bar{}"/>').format(
                12 + 52 * i, base - tall, tall, " own" if own else ""
            )
        )
        body.append(_text(33 + 52 * i, base - tall - 6, short(count), "value", "middle"))
        body.append(_text(33 + 52 * i, base + 16, f"> {name}", "label", "middle"))
    return _svg(width, 158, label, body, "chart natural")


def thumb(sheet: str, box: tuple[int, int, int, int], size: tuple[int, int], alt: str, side: float = 112) -> Markup:
    """A thumbnail out of a sprite sheet, at most `side` pixels wide and high.

    box: x, y, width, height in the sheet. size: of the sheet. alt: what a screen reader says.
    """
    x, y, width, height = box
    scale = min(side / width, side / height, 1.0)
    return Markup(
        '<svg class="thumb" role="img" aria-label="{}" viewBox="{} {} {} {}" width="{:.0f}" height="{:.0f}" '
        'preserveAspectRatio="xMidYMid slice">'
        '<image href="{}" width="{}" height="{}"/></svg>'
    ).format(alt, x, y, width, height, max(1, width * scale), max(1, height * scale), sheet, *size)


def meter(parts: Sequence[tuple[str, float]]) -> Markup:
    """A bar of one row of a table: (class, share of the width) one behind the other."""
    body, at = [], 0.0
    for name, share in parts:
        body.append(
            Markup('<rect x="{:.2f}" width="{:.2f}" height="1" class="{}"/>').format(at, 100 * max(0, share), name)
        )
        at += 100 * max(0, share)
    return Markup('<svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">{}</svg>').format(
        Markup("").join(body)
    )


def curves(ranks: np.ndarray, quantiles: np.ndarray, label: str) -> Markup:
    """Similarity by rank: the median as a line, the middle 80 % as a band.

    ranks: (n,) ascending. quantiles: (n, 3) of 0.1, 0.5, 0.9, cosines.
    """
    width, height, left, base = 520.0, 200.0, 44.0, 168.0
    low = math.floor(10 * float(quantiles.min())) / 10
    high = max(low + 0.1, math.ceil(10 * float(quantiles.max())) / 10)
    last = max(1, int(ranks[-1]))

    def place(rank: float, value: float) -> str:
        x = left + (width - left - 14) * rank / last
        return f"{x:.1f} {base - (base - 18) * (value - low) / (high - low):.1f}"

    # A single rank is drawn as wide as the chart.
    points = [(float(r), q) for r, q in zip(ranks, quantiles, strict=True)]
    if len(points) == 1:
        points = [(0.0, points[0][1]), (float(last), points[0][1])]
    upper = [place(r, float(q[2])) for r, q in points]
    lower = [place(r, float(q[0])) for r, q in reversed(points)]
    body = [
        Markup('<path d="M{} Z" class="band"/>').format(" L".join([*upper, *lower])),
        Markup('<path d="M{}" class="curve"/>').format(" L".join(place(r, float(q[1])) for r, q in points)),
        Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="axis"/>').format(left, width - 8, base, base),
    ]
    for value in (low, (low + high) / 2, high):
        _, y = place(0, value).split()
        body.append(_text(left - 6, float(y) + 4, f"{value:.2f}", "label", "end"))
    body.append(_text(left, base + 16, "rank 0", "label"))
    body.append(_text(width - 14, base + 16, f"rank {last}", "label", "end"))
    return _svg(width, height, label, body, "chart")


def cluster_map(marks: Sequence[Mapping[str, Any]], dots: Sequence[tuple[float, float, float]], label: str) -> Markup:
    """Clusters on a plane of MAP_SIZE: pictures that lead to a page each, and dots for the others.

    marks: {x, y, radius, href or None, words, name, drawn, picture: (sheet, box, size) or None}. dots: (x, y, radius).
    """
    body = [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="back"/>').format(*dot) for dot in dots]
    for mark in marks:
        x, y, radius = mark["x"], mark["y"], mark["radius"]
        drawn = " drawn" if mark["drawn"] else ""
        inner = Markup("<title>{}</title>").format(visible(mark["words"]))
        frame = {"x": x - radius, "y": y - radius, "side": 2 * radius}
        if mark["picture"]:
            sheet, (left, top, width, height), size = mark["picture"]
            side = min(width, height)
            inner += Markup(
                '<svg x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" viewBox="{vx} {vy} {vs} {vs}">'
                '<image href="{sheet}" width="{w}" height="{h}" preserveAspectRatio="xMidYMid slice"/></svg>'
                '<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="3" class="ring{drawn}"/>'
            ).format(
                **frame,
                vx=left + (width - side) // 2,
                vy=top + (height - side) // 2,
                vs=side,
                sheet=sheet,
                w=size[0],
                h=size[1],
                drawn=drawn,
            )
        else:
            inner += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="dot{}"/>').format(x, y, radius, drawn)
        inner += _text(x, y + radius + 11, mark["name"], "name", "middle")
        if mark["href"]:
            inner = Markup('<a href="{}" aria-label="{}">{}</a>').format(mark["href"], visible(mark["words"]), inner)
        body.append(inner)
    width, height = MAP_SIZE
    return Markup(
        '<svg class="chart map" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" role="group" '
        'aria-label="{}">{}</svg>'
    ).format(width, height, width, height, visible(label, 600), Markup("").join(body))
