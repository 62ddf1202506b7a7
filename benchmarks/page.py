"""Writes the tables and plots of docs/performance.md, the tables of docs/{training,reliability,server}.md.

    python -m benchmarks.page

Text outside the markers `<!-- NAME -->` … `<!-- /NAME -->` stays. A section without results says so; run this again
after new results. Plots need matplotlib (`pip install 'lvd-curate[dev]'`) and go to docs/performance/.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import page_tables, page_targets, plots, reliability_tables, server_tables, training_tables
from benchmarks.page_data import Results

ROOT = Path(__file__).parents[1]
MISSING = "*Not measured yet.*"

SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": page_tables.machine,
    "targets": page_targets.targets,
    "join": page_tables.join,
    "join-steps": page_tables.join_steps,
    "rivals": page_tables.rivals,
    "add": page_tables.add,
    "add-stages": page_tables.add_stages,
    "components": page_tables.components,
    "driver": page_tables.driver,
    "kmeans": page_tables.kmeans,
    "hierarchy": page_tables.hierarchy,
    "retrieve": page_tables.retrieve,
    "images": page_tables.images,
    "plan": page_tables.plan_checks,
    "rates": page_tables.rates,
    "billion": page_tables.billion,
}
TRAINING: dict[str, Callable[[Results], str]] = {"learns": training_tables.learns, "step": training_tables.step}
RELIABILITY: dict[str, Callable[[Results], str]] = {
    "chaos": reliability_tables.chaos,
    "checksums": reliability_tables.checksums,
}
SERVER: dict[str, Callable[[Results], str]] = {
    "serve-answers": server_tables.answers,
    "serve-index": server_tables.index,
    "serve-words": server_tables.words,
}
PLOTS: dict[str, Callable[[Results, Path], str]] = {
    "plot-join": plots.join,
    "plot-recall": plots.recall,
    "plot-rivals": plots.rivals,
    "plot-kmeans": plots.kmeans,
    "plot-hierarchy": plots.hierarchy,
}


def filled(text: str, parts: dict[str, str]) -> str:
    """The page with what lies between the markers of each name replaced. Raises KeyError for a marker not known."""

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{parts[name] or MISSING}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", part, text, flags=re.DOTALL)


def picture(draw: Callable[[Results, Path], str], results: Results, path: Path) -> str:
    """The Markdown of a plot, drawn if there is anything to draw. draw: returns what is to be seen, or nothing."""
    seen = draw(results, path)
    if not seen:
        path.unlink(missing_ok=True)
        return ""
    return f"![{seen}](performance/{path.name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--training", type=Path, default=ROOT / "docs" / "training.md")
    parser.add_argument("--reliability", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--format", default="svg", choices=["svg", "png"], help="png: to look at, beside the page")
    parser.add_argument("--server", type=Path, default=ROOT / "docs" / "server.md")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    folder = arguments.page.parent / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: make(results) for name, make in SECTIONS.items()}
    of_training = {name: make(results) for name, make in TRAINING.items()}
    of_reliability = {name: make(results) for name, make in RELIABILITY.items()}
    of_server = {name: make(results) for name, make in SERVER.items()}
    for name, draw in PLOTS.items():
        path = folder / f"{name.removeprefix('plot-')}.{arguments.format}"
        parts[name] = picture(draw, results, path)
    if arguments.format == "svg":
        pages = (
            (arguments.page, parts),
            (arguments.training, of_training),
            (arguments.reliability, of_reliability),
            (arguments.server, of_server),
        )
        for page, found in pages:
            page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    told = parts | of_training | of_reliability | of_server
    print("\n".join(f"{name}: {'written' if text else 'no results'}" for name, text in told.items()))


if __name__ == "__main__":
    main()
