"""Figures over the steps of a training, with their intervals, as an SVG that needs no drawing library."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 720, 400, 56
COLOURS = ("#1f5fa8", "#c2541d", "#3a8a4d", "#7a4ba0", "#8a6d1f", "#4d4d4d")

Point = tuple[float, float, float, float]
"""step, value, low, high."""


def over_training(series: Mapping[str, Sequence[Point]], levels: Mapping[str, float], title: str) -> str:
    """series: points by name, drawn as lines; levels: other models' figures, drawn as dashed horizontals."""
    steps = [p[0] for points in series.values() for p in points] or [0.0]
    values = [v for points in series.values() for p in points for v in p[1:]] + list(levels.values())
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.05 * ((high - low) or 1.0)
    low, high, first, last = low - pad, high + pad, min(steps), max(steps)

    def at(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (step - first) / ((last - first) or 1) * (WIDTH - 4 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN), 1)

    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="15">{escape(title)}</text>',
    ]
    for i in range(6):
        value = low + (high - low) * i / 5
        (x, y), (end, _) = at(first, value), at(last, value)
        drawn.append(f'<path d="M{x} {y}H{end}" stroke="#ddd"/>')
        drawn.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:.3f}</text>')
        step = first + (last - first) * i / 5
        drawn.append(f'<text x="{at(step, low)[0]}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step:,.0f}</text>')
    names = 0
    for name, points in series.items():
        colour = COLOURS[names % len(COLOURS)]
        ordered = sorted(points)
        line = " ".join(f"{x},{y}" for x, y in (at(p[0], p[1]) for p in ordered))
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for step, value, bottom, top in ordered:
            (x, y), (_, y_low), (_, y_high) = at(step, value), at(step, bottom), at(step, top)
            drawn.append(f'<path d="M{x} {y_low}V{y_high}" stroke="{colour}"/>')
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        drawn.append(_legend(names, name, colour, ""))
        names += 1
    for name, value in levels.items():
        colour = COLOURS[names % len(COLOURS)]
        (x, y), (end, _) = at(first, value), at(last, value)
        drawn.append(f'<path d="M{x} {y}H{end}" stroke="{colour}" stroke-dasharray="5 4"/>')
        drawn.append(_legend(names, f"{name}: {value:.3f}", colour, ' stroke-dasharray="5 4"'))
        names += 1
    middle = at((first + last) / 2, low)[0]
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">step</text></svg>')
    return "\n".join(drawn) + "\n"


def _legend(row: int, text: str, colour: str, dash: str) -> str:
    x, y = WIDTH - 3 * MARGIN + 8, MARGIN + 20 * row
    return (
        f'<path d="M{x} {y}h20" stroke="{colour}" stroke-width="2"{dash}/>'
        f'<text x="{x + 26}" y="{y + 4}">{escape(text)}</text>'
    )
