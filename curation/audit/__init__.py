"""Audit: what a run did to which images.

In a notebook: `from curation import audit; run = audit.open_run("runs/first"); audit.components(run)`. Tables are
pyarrow's, figures matplotlib's (`audit.plot_...`); docs/report.md lists them. The pages of `curate report` are made of
the same.
"""

from curation.audit.notebook import (
    around_threshold,
    balance,
    cluster_labels,
    cluster_members,
    clusters,
    component_members,
    components,
    failures,
    flow,
    plot_balance,
    plot_clusters,
    plot_failures,
    plot_flow,
    plot_retrieval,
    plot_scores,
    plot_similarities,
    purity,
    reference_hits,
    reference_matches,
    retrieved,
    scores,
    seed_sets,
    similarities,
    similarity_by_rank,
)
from curation.audit.run_tables import RunTables, open_run

__all__ = [
    "RunTables",
    "around_threshold",
    "balance",
    "cluster_labels",
    "cluster_members",
    "clusters",
    "component_members",
    "components",
    "failures",
    "flow",
    "open_run",
    "plot_balance",
    "plot_clusters",
    "plot_failures",
    "plot_flow",
    "plot_retrieval",
    "plot_scores",
    "plot_similarities",
    "purity",
    "reference_hits",
    "reference_matches",
    "retrieved",
    "scores",
    "seed_sets",
    "similarities",
    "similarity_by_rank",
]
