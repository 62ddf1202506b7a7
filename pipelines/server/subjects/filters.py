"""Filters: histograms of the scores, the images around each threshold, what was dropped and why."""

from collections import Counter
from urllib.parse import urlencode

import numpy as np
from markupsafe import Markup

from curation.audit import charts
from curation.audit.funnel import EXPLAINED
from curation.audit.score_tables import SCORES, Score
from curation.audit.sections.filters import limits
from curation.audit.words import visible
from pipelines.server.columns import stored_from
from pipelines.server.opened import Opened
from pipelines.server.rendering import number, score
from pipelines.server.served import Served
from pipelines.server.subjects import BESIDE, TABLE, Values, row, table
from pipelines.server.subjects.duplicates import similarity_chart

SIMILARITY = "Cosine to the nearest copy"


def page(served: Served, index: Opened) -> Values:
    """The scores with the images on either side of their thresholds, and what was dropped by reason."""
    counts: Counter[str] = Counter()
    for entry in index.document.get("counts", []):
        if entry["status"] == "dropped":
            counts[entry["error"] or "dropped"] += entry["images"]
    rows = [
        row(
            (
                visible(EXPLAINED.get(reason, reason), 80),
                "/images?" + urlencode({"error": reason, "status": "dropped"}),
            ),
            number(n),
            value=n,
        )
        for reason, n in counts.most_common(TABLE)
    ]
    dropped = table(
        "Dropped",
        ["Reason"],
        ["Images"],
        rows,
        of=max(counts.values(), default=0),
        kind="loss",
        empty="Nothing was dropped.",
    )
    scores = [s for s in SCORES if s.name in index.orders]
    thresholds = limits(served.stages.options.get("filter", {}))
    return {
        "lead": f"{number(sum(counts.values()))} images were dropped. Scores of every image that was read; the images "
        "around a threshold tell whether it is the right one. Pictures that are flagged are veiled until asked for.",
        "sections": [dropped, *(_score(served, index, s, thresholds.get(s.name)) for s in scores)],
    }


def title(name: str) -> str:
    """What a score is called."""
    return next((s.title for s in SCORES if s.name == name), SIMILARITY)


def chart(served: Served, index: Opened, name: str) -> Markup:
    """The histogram of a score with its threshold, as the report has it; empty without any."""
    found = next((s for s in SCORES if s.name == name), None)
    if found is None or name not in index.orders:
        return similarity_chart(served, index) if name == "similarity" else Markup("")
    counts = index.histogram(name, found.edges)
    if not counts.sum():
        return Markup("")
    threshold = limits(served.stages.options.get("filter", {})).get(name)
    words = f"{found.title}: {number(int(counts.sum()))} images" + (
        " (heights grow with the logarithm)" if found.log else ""
    )
    return charts.histogram(counts, found.edges, words, threshold=threshold, log=found.log, form=found.form)


def _score(served: Served, index: Opened, found: Score, threshold: float | None) -> Values:
    words = f"{number(len(index.orders[found.name][0]))} images" + (", logarithmic heights" if found.log else "")
    section: Values = {"title": found.title, "charts": [(words, chart(served, index, found.name))]}
    if threshold is None or found.above is None:
        return section | {"text": "The run drops nothing by this score."}
    first = float(stored_from(np.array([threshold]), more=found.above)[0])
    sides = []
    for down in (False, True):
        heading = f"{'dropped' if found.above != down else 'pass'}, nearest the threshold"
        images = index.scored(found.name, first, None, BESIDE, down, index.tiles).images
        if images:
            sides.append((heading, [image | {"note": score(image["score"])} for image in images]))
    return section | {
        "text": f"Dropped where the score is {'above' if found.above else 'below'} {threshold:g}.",
        "groups": sides,
        "more": ("More around the threshold", f"/scores/{found.name}?value={threshold:g}"),
    }
