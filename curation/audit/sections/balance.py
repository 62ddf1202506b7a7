"""Balance: shares of clusters and sources before and after, and how even they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit import charts, measures, tables
from curation.audit.cluster_tables import cluster_levels, hierarchy
from curation.audit.run_tables import RunTables
from curation.audit.scans import count_by, merge_counts, stream
from curation.audit.sections import SAMPLING, Section

BEFORE, AFTER, CHOSEN = "pool", "balanced sample", "manifest"


def section(run: RunTables) -> Section | None:
    """Per level and for the sources: shares in the pool, in the balanced sample and in the manifest."""
    if not run.clusters or not (run.balance or run.manifest):
        return None
    levels = []
    for name, counts in cluster_counts(run).items():
        after = next((counts[n] for n in (AFTER, CHOSEN) if n in counts), counts[BEFORE])
        what = AFTER if AFTER in counts else CHOSEN
        size = len(counts[BEFORE])
        label = f"Shares of the {size:,} clusters of {name} in the pool (area) and in the {what} (line)"
        levels.append(
            {
                "name": name,
                "clusters": size,
                "even": {n: evenness(c) for n, c in counts.items()},
                "figure": charts.before_after(counts[BEFORE], after, label),
            }
        )
    sources = source_counts(run)
    names = [n for n in (BEFORE, AFTER, CHOSEN) if sources and n in sources[0]]
    return {
        "levels": levels,
        "what": AFTER if run.balance else CHOSEN,
        "taken": sum(r["images"] for r in tables.source_counts(run.balance).to_pylist()),
        "sources": sources[: SAMPLING.table_rows],
        "source_names": names,
        "source_even": {n: evenness(np.array([s[n] for s in sources if s[n] or s[BEFORE]], float)) for n in names},
        "source_totals": {n: sum(s[n] for s in sources) for n in names},
        "brought": brought_by(run)[: SAMPLING.table_rows],
        "images": [],
    }


def evenness(counts: np.ndarray) -> dict[str, float]:
    """gini, entropy in bits, and the effective number of groups."""
    return {
        "gini": measures.gini(counts),
        "entropy": measures.entropy(counts),
        "effective": measures.effective(counts),
    }


def cluster_counts(run: RunTables) -> dict[str, dict[str, np.ndarray]]:
    """Per level, images of each cluster that holds any, in the order of the clusters: of the pool, and of what was
    drawn by the balance and of the manifest where the run has them."""
    rows = hierarchy(run.clusters)
    leaf = rows["cluster_1"].to_numpy()
    weights = {BEFORE: rows["images"].to_numpy().astype(np.float64)}
    if run.balance:
        weights[AFTER] = _at(leaf, count_by(run.balance, {"leaf": pc.field("cluster_id")}))
    if run.manifest:
        inside = pc.list_value_length(pc.field("clusters")) > 0
        weights[CHOSEN] = _at(leaf, count_by(run.manifest, {"leaf": pc.list_element(pc.field("clusters"), 0)}, inside))
    found = {}
    for level in cluster_levels(run.clusters):
        _, group = np.unique(rows[level].to_numpy(), return_inverse=True)
        found[level] = {n: np.bincount(group, weights=w) for n, w in weights.items()}
    return found


def _at(leaves: np.ndarray, counted: pa.Table) -> np.ndarray:
    """Counts by leaf, in the order of `leaves`; leaves not among them count nothing."""
    found = np.zeros(len(leaves))
    names = counted["leaf"].to_numpy()
    at = np.minimum(np.searchsorted(leaves, names), max(0, len(leaves) - 1))
    known = leaves[at] == names if len(leaves) else np.zeros(len(names), bool)
    np.add.at(found, at[known], counted["images"].to_numpy()[known])
    return found


def source_counts(run: RunTables) -> list[dict[str, Any]]:
    """Per source `source` and its images in the clustered pool, the balanced sample and the manifest."""
    names = {int(s["number"]): str(s["name"]) for s in run.sources}
    paths: Mapping[str, Any] = {BEFORE: run.clusters, AFTER: run.balance, CHOSEN: run.manifest}
    counts = {
        n: {r["source_number"]: r["images"] for r in tables.source_counts(p).to_pylist()} for n, p in paths.items() if p
    }
    numbers = sorted({number for found in counts.values() for number in found})
    return [
        {"source": names.get(number, str(number)), **{n: found.get(number, 0) for n, found in counts.items()}}
        for number in numbers
    ]


def brought_by(run: RunTables) -> list[dict[str, Any]]:
    """What brought the images of the manifest: `what` (seed:NAME, retrieve:NAME, balance), `images`, most first."""
    partial: list[pa.Table] = []
    for table in stream(run.manifest, ["sources"]):
        flat = pa.table({"what": table["sources"].combine_chunks().flatten()})
        counted = flat.group_by("what").aggregate([([], "count_all")]).rename_columns(["what", "images"])
        partial = [merge_counts([*partial, counted], ["what"])]
    rows: list[dict[str, Any]] = partial[0].to_pylist() if partial else []
    return sorted(rows, key=lambda row: (-row["images"], row["what"]))
