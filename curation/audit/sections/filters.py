"""The filters: histograms of the scores, the images nearest each threshold, what was dropped, by reason."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from curation.audit import charts
from curation.audit.run_tables import RunTables
from curation.audit.scans import count_by, current_rows, first_rows, merge_counts, reason_class, stream, with_hash
from curation.audit.score_tables import SCORES, score_figures
from curation.audit.sections import SAMPLING, Section

LIMITS = {
    "nsfw": "nsfw_threshold",
    "contrast": "solid_colour",
    "min_side": "min_side",
    "aspect_ratio": "aspect_ratio",
}
"""Options of the filter by score."""


def section(run: RunTables) -> Section | None:
    """Histograms with the images around their thresholds, dropped images by reason, exact copies side by side."""
    if not run.images:
        return None
    dropped = pc.field("status") == "dropped"
    every = [
        count_by(group, {"reason": reason_class()}, dropped if where is None else dropped & where)
        for group, where in current_rows(run.images)
    ]
    counted = merge_counts(every, ["reason"]).sort_by([("images", "descending"), ("reason", "ascending")])
    copies, alone = pc.is_valid(pc.field("duplicate_of")), ~pc.is_valid(pc.field("duplicate_of"))
    samples = _hashed(run, {}, dropped & alone, SAMPLING.dropped_per_reason, "report dropped")
    pairs = _hashed(run, {"of": pc.field("duplicate_of")}, dropped & copies, SAMPLING.exact_pairs, "report copies")
    reasons = counted.slice(0, SAMPLING.reasons).to_pylist()
    for row in reasons:
        row["samples"] = [s["image_id"] for s in samples if s["reason"] == row["reason"]]
        row["pairs"] = [(s["of"], s["image_id"]) for s in pairs if s["reason"] == row["reason"]]
    scores = _scores(run)
    shown = [row["image_id"] for score in scores for row in score["around"]]
    shown += [i for row in reasons for i in [*row["samples"], *(x for pair in row["pairs"] for x in pair)]]
    return {
        "reasons": reasons,
        "dropped": sum(counted["images"].to_pylist()),
        "more_reasons": counted.num_rows - len(reasons),
        "scores": scores,
        "images": shown,
    }


def limits(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Thresholds by score, of the filter's options."""
    return {score: float(options[n]) if options.get(n) is not None else None for score, n in LIMITS.items()}


def _hashed(
    run: RunTables, columns: Mapping[str, Any], where: Any, count: int, purpose: str
) -> Sequence[dict[str, Any]]:
    columns = {"image_id": pc.field("image_id"), "reason": reason_class(), **columns}
    tables = (with_hash(t, 0, purpose) for t in stream(run.images, columns, where, run.hidden))
    return first_rows(tables, "reason", count, [("hash", "ascending")])


def _scores(run: RunTables) -> list[dict[str, Any]]:
    bounds = limits(run.options.get("filter", {}))
    figures = score_figures(run.images, bounds, SAMPLING.around_threshold, run.hidden)
    found = []
    for score in SCORES:
        counts, limit = figures[score.name]["counts"], bounds.get(score.name)
        if not counts.sum():
            continue
        label = f"{score.title}: {charts.number(counts.sum())} images" + (
            " (heights grow with the logarithm)" if score.log else ""
        )
        chart = charts.histogram(counts, score.edges, label, threshold=limit, log=score.log, form=score.form)
        found.append(
            {
                "name": score.name,
                "title": score.title,
                "log": score.log,
                "above": score.above,
                "threshold": limit,
                "images": int(counts.sum()),
                "figure": chart,
                "around": figures[score.name]["around"],
            }
        )
    return found
