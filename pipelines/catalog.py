"""The stages of a run, in order: the first thing to read.

Each stage is a module with `execute(context, config)`; its folder under RUN holds Parquet tables that the
later ones read. What a table's columns mean stands in `curation/schemas.py`.
"""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curation.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One step of a run. `block` is its block of the YAML; `folders` lie under RUN, a `*` stands for a model."""

    name: str
    block: str | None
    module: str
    folders: tuple[str, ...]
    reads: tuple[str, ...]
    does: str

    @property
    def execute(self) -> Callable[..., Any]:
        """The stage's function, imported when it is needed."""
        function: Callable[..., Any] = importlib.import_module(self.module).execute
        return function


STAGES = (
    Stage(
        "download",
        "download",
        "pipelines.stages.download",
        ("download",),
        (),
        "fetches URL lists: one row per URL, the bytes in tar shards",
    ),
    Stage(
        "import",
        None,
        "pipelines.stages.importing",
        ("import",),
        (),
        "registers folders, tars and Parquet of paths where they lie",
    ),
    Stage(
        "filter",
        "filter",
        "pipelines.stages.filter",
        ("score", "filter"),
        ("download", "import"),
        "one pass over the pixels: scores, hashes, faces, copy embedding; then drops by threshold",
    ),
    Stage(
        "dedup",
        "dedup",
        "pipelines.stages.dedup",
        ("dedup-search", "dedup"),
        ("filter",),
        "near-duplicate components of the pool, then against the reference sets",
    ),
    Stage(
        "embed",
        "embed",
        "pipelines.stages.embed",
        ("embed/*",),
        ("filter", "dedup"),
        "semantic embedding of the pool images kept, and of the seeds",
    ),
    Stage(
        "cluster",
        "cluster",
        "pipelines.stages.cluster",
        ("cluster",),
        ("embed",),
        "k-means, or a hierarchy of k-means, over the pool",
    ),
    Stage(
        "retrieve",
        "retrieve",
        "pipelines.stages.retrieve",
        ("retrieve",),
        ("embed", "cluster"),
        "pool images near the seed sets: N per seed, or M per cluster that holds seeds",
    ),
    Stage(
        "balance",
        "balance",
        "pipelines.stages.balance",
        ("balance",),
        ("cluster",),
        "a sample of the pool spread evenly over the hierarchy",
    ),
    Stage(
        "mix",
        "mix",
        "pipelines.stages.mix",
        ("mix",),
        ("filter", "dedup", "retrieve", "balance"),
        "seed sets as they are, retrieved and balanced images: one row per image, with its weight",
    ),
    Stage(
        "manifest",
        "manifest",
        "pipelines.stages.manifest",
        ("manifest",),
        ("filter", "dedup", "cluster", "retrieve", "mix"),
        "the dataset: location and provenance of every image, and the data card",
    ),
    Stage(
        "report",
        "report",
        "pipelines.stages.report",
        ("report",),
        ("manifest",),
        "a folder of pages to look at: RUN/report/index.html",
    ),
)

NAMES = tuple(stage.name for stage in STAGES)
INGEST = ("download", "import")
"""Both bring images in, one source after the other in the order of the YAML: as a bound they are one step."""


def position(name: str, option: str) -> int:
    """Where a stage stands in the order; the two that bring images in share a place. Raises UserError."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean `{close[0]}`?" if close else f"the stages are {', '.join(NAMES)}"
        raise UserError(f"{option} {name}: no such stage; {hint}")
    return 0 if name in INGEST else NAMES.index(name)
