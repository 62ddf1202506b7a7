"""The self join: every pair of vectors above a threshold, reduced to its maximum spanning forest.

Few vectors are compared exactly (`tiles`). More go through cells and sketches (`cell_join`): coarse cells say who meets
whom, sign sketches which of those may be copies, and the definition of similarity decides. There is no k: a k cuts
groups of more than k copies apart. Pairs found are true by definition, only recall can fall; it is measured, and the
cells that a vector visits are chosen for the recall asked for (`recall`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curation.duplicates import recall as recalls
from curation.duplicates.cell_join import assigned_names, join_by_cells
from curation.duplicates.cells import Cells
from curation.duplicates.components import components
from curation.duplicates.kept import Kept, records
from curation.duplicates.members import Members
from curation.duplicates.planning import Plan, find_plan
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, Spread, serial
from curation.duplicates.tiles import exact_join


@dataclass(frozen=True)
class JoinResult:
    """The forest over the pairs with a fresh end, and how they were searched."""

    forest: np.ndarray
    report: dict[str, Any]
    cells: Cells | None = None
    """None where every pair was compared. Later generations are joined through the same cells."""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of the files written, by their names in the folder of `Kept`."""


def self_join(
    members: Members,
    ids: np.ndarray,
    options: JoinOptions,
    scratch: Scratch,
    spread: Spread = serial,
    thresholds: Sequence[float] = (),
    cells: Cells | None = None,
    keep: Kept | None = None,
) -> JoinResult:
    """Join `members` with themselves; pairs without a fresh end are left out.

    ids: (members.count,) uint64, the id of each node: samples are drawn by it. thresholds: where to report recall,
    beside the target. cells: of an earlier generation, used as they are. keep: where assignments are left for later
    generations and found; None: nowhere. Equal vectors and options give an equal forest, however the work is cut and
    whoever is first.
    """
    fresh, rows = members.fresh_rows, members.rows
    pairs = fresh * rows - fresh * (fresh + 1) // 2
    if cells is None and pairs * members.dimension <= options.exact_multiply_adds:
        return JoinResult(exact_join(members, options, scratch, spread), _exact_report(members, options))
    plan = find_plan(members, ids, options, scratch, spread, cells)
    if plan is None:
        return JoinResult(exact_join(members, options, scratch, spread), _exact_report(members, options))
    keep = keep if options.max_edges is None else None
    forest = join_by_cells(members, plan.cells, options, scratch, spread, keep)
    files = records(members, scratch, assigned_names(members))
    return JoinResult(forest, _cells_report(members, plan, forest, options, thresholds), plan.cells, files)


def _exact_report(members: Members, options: JoinOptions) -> dict[str, Any]:
    return {
        "method": "exact",
        "vectors": members.rows,
        "fresh": members.fresh_rows,
        "threshold": options.threshold,
        "recall": 1.0,
        "recall_low": 1.0,
        "recall_high": 1.0,
        "recall_asked": options.recall,
        "recall_threshold": options.target,
    }


def _cells_report(
    members: Members, plan: Plan, forest: np.ndarray, options: JoinOptions, thresholds: Sequence[float]
) -> dict[str, Any]:
    pairs, queries, rule = plan.pairs, plan.queries, plan.cells.rule
    assert rule is not None
    found = recalls.nominated(pairs, rule)
    target = recalls.measured(pairs, found, options.target, queries)
    labels = components(forest, members.count, options.target)
    together = labels[pairs["query"]] == labels[pairs["node"]]
    same = recalls.measured(pairs, together, options.target, queries)
    return {
        "method": "cells",
        "vectors": members.rows,
        "fresh": members.fresh_rows,
        "threshold": options.threshold,
        "cells": len(plan.cells),
        "visits": round(plan.visits, 2),
        "share_compared": round(plan.share, 6),
        "sketch_words": rule.first_words,
        "sketch_cuts": list(rule.cuts),
        "recall": target["recall"],
        "recall_low": target["low"],
        "recall_high": target["high"],
        "recall_asked": options.recall,
        "recall_threshold": options.target,
        "pairs_measured": target["pairs"],
        "queries": queries,
        "queries_with_copies": target["queries_with_pairs"],
        "attempts": plan.attempts,
        "same_component": same["recall"],
        "removed": int((labels != np.arange(len(labels), dtype=labels.dtype)).sum()),
        "by_threshold": [recalls.measured(pairs, found, t, queries) for t in thresholds if t >= options.threshold],
        "by_similarity": recalls.by_similarity(pairs, found, together, options.threshold, queries),
    }
