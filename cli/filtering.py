"""`curate filter`: one pass over the pixels for scores, hashes, faces and the copy embedding; then who stays."""

from typing import Any

import typer

from cli import session
from cli.options import config_options
from curation.errors import UserError
from pipelines.stages import filter as filter_stage
from pipelines.stages.filter import FilterConfig

HELP = """Score every image in one pass over the pixels, then drop what should not stay.

Scores: SHA-256 of the pixels, PCA hash, contrast, NSFW probability, faces (blurred in copies of the stage's own), and
the copy embedding that `curate dedup` reads. Drops: duplicates, too small, too long, solid colour, NSFW. A dropped
image keeps its row, with the reason; another threshold (with --rebuild) repeats the decision, not the pass.

Example: curate filter runs/a --min-side 128 --nsfw-threshold 0.7
"""


def register_filter(app: typer.Typer) -> None:
    """Add `curate filter`."""

    @app.command("filter", help=HELP)
    @config_options(FilterConfig)
    def filter_command(
        overrides: dict[str, Any],
        run: session.RunArgument = None,
        ray_address: session.RayOption = None,
        workers: session.WorkersOption = None,
        memory_per_worker: session.MemoryOption = None,
        seed: session.SeedOption = None,
        rebuild: session.RebuildOption = False,
        as_json: session.JsonOption = False,
    ) -> None:
        if run is None:
            raise UserError("give the run directory: curate filter RUN")
        config = session.resolve(FilterConfig, run, "filter", overrides)
        session.carry_out(
            lambda context: filter_stage.execute(context, config),
            as_json,
            stage="filter",
            run=run,
            seed=seed,
            rebuild=rebuild,
            ray_address=ray_address,
            workers=workers,
            memory_per_worker=memory_per_worker,
        )
