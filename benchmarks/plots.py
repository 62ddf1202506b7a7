"""The plots of docs/performance.md. Each draws a file and returns what is to be seen on it, "" without results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page_data import KINDS, Results

OURS, OTHER, EXACT = "#0b6e4f", "#9aa5b1", "#c8553d"
COLOURS = {"hard": "#0b6e4f", "easy": "#3a7ca5"}
MINE = ("#0b6e4f", "#6cc0a1", "#3a7ca5")
OTHERS = ("#c8553d", "#e0a458", "#6b5b95", "#52606d", "#9aa5b1")


def _figure(
    columns: int = 1, width: float = 7.2, height: float = 4.2, rows: int = 1, ratios: Sequence[float] = (1,)
) -> tuple[Any, list[Any], Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e7eb",
            "font.size": 10,
            "svg.hashsalt": "performance",
            "figure.facecolor": "white",
        }
    )
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), squeeze=False, height_ratios=ratios, layout="constrained"
    )
    return figure, list(axes.flat), pyplot


def _save(figure: Any, pyplot: Any, path: Path) -> None:
    # Without a date equal results give equal files.
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _points(axes: Any, names: list[str], name: str, x: list[float], y: list[float], label: str) -> None:
    """Ours are green or blue dots, others squares of other colours; a name has one colour in all panels."""
    ours = name.startswith("ours")
    shades = MINE if ours else OTHERS
    place = [other for other in names if other.startswith("ours") == ours].index(name)
    axes.plot(x, y, "o" if ours else "s", ms=7, color=shades[place % len(shades)], label=label)


def join(results: Results, path: Path) -> str:
    """CPU seconds against vectors, ours and exact's, with the fitted exponents."""
    kinds = [kind for kind in KINDS if results.joins(kind)]
    if not kinds:
        return ""
    figure, (axes,), pyplot = _figure()
    exact: dict[int, list[float]] = {}
    for kind in kinds:
        runs = results.joins(kind)
        n, seconds = [run["vectors"] for run in runs], [run["cpu_seconds"] for run in runs]
        slope = results.exponent(kind)
        label = f"ours, {kind}" + (f": n^{slope:.2f} from 125,000 to 1,000,000" if slope else "")
        axes.plot(n, seconds, "o", color=COLOURS[kind], label=label)
        if slope is not None:
            inner = [(x, y) for x, y in zip(n, seconds, strict=True) if 125_000 <= x <= 1_000_000]
            middle = np.exp(np.mean(np.log(inner), axis=0))
            line = np.array([min(n), max(n)])
            axes.plot(line, middle[1] * (line / middle[0]) ** slope, "-", lw=1.2, color=COLOURS[kind])
        for run in runs:
            exact.setdefault(run["vectors"], []).append(run["exact_cpu_seconds"])
    places = sorted(exact)
    values = [float(np.mean(exact[place])) for place in places]
    axes.plot(places, values, "s--", color=EXACT, lw=1.2, ms=4, label="exact products (extrapolated): n^2")
    axes.set(xscale="log", yscale="log", xlabel="vectors (512 dimensions)", ylabel="CPU seconds, one thread")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    _save(figure, pyplot, path)
    return "CPU seconds of the join against the number of vectors, beside exact products"


def recall(results: Results, path: Path) -> str:
    """Recall and share in one component per 0.05 of similarity, of the largest run of each kind up to a million."""
    runs = [
        max((r for r in results.joins(kind) if r["vectors"] <= 1_000_000), key=lambda r: r["vectors"])
        for kind in KINDS
        if any(r["vectors"] <= 1_000_000 for r in results.joins(kind))
    ]
    if not runs:
        return ""
    figure, panels, pyplot = _figure(len(runs), width=4.3 * len(runs) + 0.4, height=3.7)
    for axes, run in zip(panels, runs, strict=True):
        rows = run["report"]["by_similarity"]
        middle = np.array([(row["above"] + row["up_to"]) / 2 for row in rows])
        found = np.array([row["recall"] for row in rows])
        low, high = (np.array([row[key] for row in rows]) for key in ("low", "high"))
        errors = np.maximum([found - low, high - found], 0)
        colour = COLOURS[run["kind"]]
        axes.errorbar(middle, found, errors, fmt="o", ms=5, capsize=3, color=colour, label="pairs nominated (95 %)")
        together = [row["same_component"] for row in rows]
        axes.plot(middle, together, "D", ms=4, mfc="none", color="#3e4c59", label="pairs in one component")
        axes.axhline(0.99, color=EXACT, lw=1, ls="--", label="asked above 0.6: 0.99")
        axes.set_title(f"{run['kind']}, {run['vectors']:,} vectors", fontsize=10)
        axes.set(xlabel="cosine of the pair", ylim=(min(0.95, float(low.min()) - 0.005), 1.003))
        axes.set_xticks(np.arange(0.6, 1.01, 0.1))
    panels[0].set_ylabel("share of the true pairs")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    _save(figure, pyplot, path)
    return "Recall of the join by similarity, and the share of pairs in one component"


def rivals(results: Results, path: Path) -> str:
    """CPU seconds of ours and the rivals, a panel for each set of vectors."""
    sizes = sorted({(r.kind, r.vectors) for r in results.rivals()}, key=lambda size: (size[1], size[0] != "hard"))
    panels_of = []
    for kind, vectors in sizes:
        run = results.join(kind, vectors)
        bars = [("this join", run["cpu_seconds"], run["report"]["recall"], True, True)] if run else []
        title = f"{kind}, {vectors:,} vectors"
        for rival in results.best_rivals(kind, vectors):
            if rival.method == "exact":
                title += f"\n(exact products: {rival.cpu_seconds:,.0f} s)"
            else:
                bars.append((rival.name, rival.cpu_seconds, rival.recall, False, rival.reached))
        if len(bars) > 1:
            panels_of.append((title, sorted(bars, key=lambda bar: -bar[1])))
    if not panels_of:
        return ""
    count = len(panels_of)
    rows, columns = -(-count // 2), min(2, count)
    in_row = [max(len(bars) for _, bars in panels_of[row * 2 : row * 2 + 2]) for row in range(rows)]
    figure, grid, pyplot = _figure(columns, 5.2 * columns, 0.9 * rows + 0.33 * sum(in_row), rows, in_row)
    for axes in grid[count:]:
        axes.set_visible(False)
    for number, (axes, (title, bars)) in enumerate(zip(grid, panels_of, strict=False)):
        most = in_row[number // 2]
        for place, (_, seconds, found, mine, reached) in enumerate(bars, most - len(bars)):
            drawn = axes.barh(place, seconds, 0.7, color=OURS if mine else OTHER, alpha=1 if reached else 0.45)
            said = f"{seconds:,.0f} s" + ("" if found is None or reached else f", recall {found:.2f}")
            axes.bar_label(drawn, [said], padding=3, fontsize=9)
        axes.set_yticks(range(most - len(bars), most), [bar[0] for bar in bars], fontsize=9)
        axes.set_ylim(-0.6, most - 0.4)
        axes.set(xlabel="CPU seconds, one thread")
        axes.set_xlim(0, 1.35 * max(bar[1] for bar in bars))
        axes.grid(visible=False, axis="y")
        axes.set_title(title, fontsize=10)
    _save(figure, pyplot, path)
    return "CPU seconds of this join and of its rivals tuned to recall 0.99; paler bars did not reach it"


def kmeans(results: Results, path: Path) -> str:
    """Objective against CPU seconds, a panel per kind of vectors."""
    document = results.read("kmeans")
    if document is None or not document["results"]:
        return ""
    every = document["results"]
    topics = sorted({row["topics"] for row in every})
    methods = list(dict.fromkeys(row["method"] for row in every))
    figure, panels, pyplot = _figure(len(topics), width=4.4 * len(topics) + 0.6, height=3.7)
    for axes, number in zip(panels, topics, strict=True):
        for method in methods:
            mine = [row for row in every if (row["method"], row["topics"]) == (method, number)]
            x, y = ([row[key] for row in mine] for key in ("cpu_seconds", "objective"))
            _points(axes, methods, method, x, y, method.replace("ours-fewer", "ours, fewer iterations"))
        axes.set_title(f"{number:,} topics", fontsize=10)
        axes.set(xlabel="CPU seconds, one thread")
        axes.margins(0.15)
    panels[0].set_ylabel("mean squared distance")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(3, len(methods)), fontsize=9)
    _save(figure, pyplot, path)
    return "k-means: mean squared distance to the centroid against CPU seconds; lower left is better"


def hierarchy(results: Results, path: Path) -> str:
    """Effective concepts against CPU seconds."""
    document = results.read("hierarchy")
    if document is None:
        return ""
    figure, (axes,), pyplot = _figure(height=4.0)
    names = list(document["results"])
    for name, found in document["results"].items():
        seconds = [max(0.01, value) for value in found["cpu_seconds"]]
        label = {"transcription": "transcription of the paper, float64", "random": "random (no time to speak of)"}
        _points(axes, names, name, seconds, found["effective_concepts"], label.get(name, name))
    axes.axhline(
        document["arguments"]["concepts"],
        color=EXACT,
        lw=1,
        ls="--",
        label=f"all {document['arguments']['concepts']} concepts alike",
    )
    axes.set(xscale="log", xlabel="CPU seconds, one thread", ylabel="effective concepts of the sample")
    axes.set_ylim(0, document["arguments"]["concepts"] * 1.06)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    _save(figure, pyplot, path)
    return "Balanced sampling: effective number of concepts against CPU seconds; upper left is better"
