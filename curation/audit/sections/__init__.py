"""The subjects of the report: which figures, which samples, and which images they want to show.

Each module's `section` takes the tables of a run and returns a plain dictionary for its template with `images`: the
ids it wants to show, the most telling first. How much is shown is `SAMPLING`, whatever the run's size, and stands on
the pages. What the run hides is not among them; counts are of all rows, as the stages made them.
"""

from dataclasses import dataclass
from typing import Any

Section = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How much of each thing the pages show."""

    chosen: int = 32
    hosts: int = 25
    examples: int = 3
    dropped_per_reason: int = 12
    around_threshold: int = 8
    reasons: int = 12
    largest_components: int = 8
    random_components: int = 16
    members: int = 12
    chain: int = 10
    exact_pairs: int = 12
    pairs_at_threshold: int = 8
    matches: int = 8
    reference_sets: int = 40
    component_of_references: int = 24
    leaves: int = 64
    largest_leaves: int = 14
    drawn_leaves: int = 18
    random_leaves: int = 16
    cluster_members: int = 7
    map_marks: int = 90
    map_dots: int = 2000
    seed_sets: int = 40
    seeds: int = 8
    retrieved: int = 8
    chosen_clusters: int = 60
    table_rows: int = 200
    seed_table_rows: int = 100


SAMPLING = Sampling()
