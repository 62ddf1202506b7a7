"""Decontamination: what went because of the reference sets, per set with its matches side by side."""

import pyarrow.compute as pc

from curation.audit import charts, tables
from curation.audit.run_tables import RunTables
from curation.audit.sections import SAMPLING, Section

THRESHOLDS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Cosines at which direct hits are counted beside the run's own threshold."""


def section(run: RunTables) -> Section | None:
    """Per reference set hits, matches and counts at other thresholds; the largest component that went whole."""
    if not run.duplicates:
        return None
    described = list(run.file("dedup", "references") or [])
    summary = tables.reference_summary(run.duplicates, THRESHOLDS).to_pylist()
    lost = pc.field("reason") == "reference"
    direct = lost & (pc.list_value_length(pc.field("references")) > 0)
    total = sum(r["images"] for r in tables.count_by_reason(run.duplicates, lost))
    hit = sum(r["images"] for r in tables.count_by_reason(run.duplicates, direct))
    if not summary and not total and not described:
        return None
    threshold = run.option("dedup", "against_threshold")
    samples = tables.reference_samples(run.duplicates, SAMPLING.matches, 0, run.hidden)
    sets = []
    for row in summary[: SAMPLING.reference_sets]:
        at = {f"{t:.2f}": n for t, n in zip(THRESHOLDS, row["at"], strict=True)}
        mine = [s for s in samples if s["reference_set"] == row["reference_set"]]
        label = f"Images with a match in {row['reference_set']} above each threshold"
        sets.append({**row, "at": at, "samples": mine, "figure": charts.thresholds(at, label, threshold)})
    chosen, _ = tables.components(run.duplicates, "reference_component_id", 1, 0, 0, lost)
    groups = chosen["group"].combine_chunks()
    members = tables.component_members(run.duplicates, "reference_component_id", groups, lost, run.hidden)
    largest = None
    if chosen.num_rows:
        rows = members.slice(0, SAMPLING.component_of_references).to_pylist()
        largest = {"images": chosen["images"][0].as_py(), "group": chosen["group"][0].as_py(), "members": rows}
    images = [i for s in sets for row in s["samples"] for i in (row["image_id"], row["reference_id"])]
    images += [m["image_id"] for m in (largest or {}).get("members", [])]
    return {
        "threshold": threshold,
        "sets": sets,
        "more_sets": len(summary) - len(sets),
        "dropped": total,
        "direct": hit,
        "chains": total - hit,
        "largest": largest,
        "described": described[: SAMPLING.table_rows],
        "sweep": list((run.file("dedup", "thresholds") or {}).get("relative", []))[: SAMPLING.table_rows],
        "images": images,
    }
