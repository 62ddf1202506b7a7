"""Balance: shares of clusters and sources before and after, and how even they are."""

import numpy as np

from curation.audit import charts
from curation.audit.sections.balance import evenness
from curation.audit.words import visible
from pipelines.server.clustering import SHARES
from pipelines.server.opened import Opened
from pipelines.server.rendering import number
from pipelines.server.shown import query
from pipelines.server.subjects import TABLE, Values, row, table
from pipelines.server.subjects.images import ways

EVEN = ["Effective", "Entropy, bits", "Gini"]
POOL, _, DATASET = SHARES


def page(index: Opened) -> Values:
    """Per level the shares of its clusters and how even they are; the same for the sources; what brought the images."""
    sections: list[Values] = []
    for level in range(1, index.levels + 1):
        even = index.document.get("evenness", {}).get(str(level), {})
        rows = [_even(name, e, number(e["clusters"])) for name, e in even.items()]
        shares = index.shares(level)
        drawn = []
        if POOL in shares:
            after = next((name for name in (DATASET, *shares) if name in shares and name != POOL), POOL)
            words = (
                f"Shares of the clusters of level {level}, the largest of the pool first: in the pool (area) and in "
            )
            words += f"the {after} (line)"
            drawn = [(words, charts.before_after(shares[POOL], shares[after], words))]
        title = f"Level {level}{': leaves' if level == 1 else ''}"
        sections.append(table(title, ["Images of the"], ["Clusters", *EVEN], rows) | {"charts": drawn})
    steps = [s for s in index.document.get("steps", []) if s["kept"] is not None or s["usable"]]
    counts = {name: np.array([s[name] or 0 for s in steps], float) for name in ("usable", "chosen")}
    totals = {name: values.sum() or 1 for name, values in counts.items()}
    rows = [
        row(visible(s["source"], 80), *(f"{(s[name] or 0) / totals[name]:.1%}" for name in counts))
        for s in steps[:TABLE]
    ]
    heads = ["Share of the usable", "Share of the dataset"]
    evens = {name: evenness(values) for name, values in counts.items()}
    words = "; ".join(
        f"{name}: Gini {e['gini']:.3f}, entropy {e['entropy']:.3f} bits"
        for name, e in zip(("Usable", "Dataset"), evens.values(), strict=True)
    )
    sections.append(table("Sources", ["Source"], heads, rows, text=words + "."))
    brought = [(name, index.groups["brought"].size(index.key("brought", name))) for name in ways(index)]
    lines = [
        row((visible(name, 80), "/images?" + query(brought=name)), number(n), value=n)
        for name, n in sorted(brought, key=lambda item: -item[1])[:TABLE]
        if n
    ]
    if lines:
        text = "An image that several brought counts for each."
        of = lines[0]["value"]
        sections.append(table("What brought the images", ["Brought by"], ["Images"], lines, text=text, of=of))
    return {
        "lead": "Effective: as many equal ones would be as even (2 to the entropy). Gini: 0 where all are equal, "
        "near 1 where one has all.",
        "sections": sections,
    }


def _even(name: str, even: dict[str, float], *first: str) -> Values:
    return row(name, *first, f"{even['effective']:.1f}", f"{even['entropy']:.3f}", f"{even['gini']:.3f}")
