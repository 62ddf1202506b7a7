"""`curate dedup`: near duplicates in the pool, and copies of reference images."""

from typing import Annotated, Any

import typer

from cli import session
from cli.options import config_options
from curation.errors import UserError
from pipelines.context import Outcome
from pipelines.stages import dedup
from pipelines.stages.dedup import DedupConfig

HELP = """Find near-duplicates by copy embedding, keep one image of each component, discard copies of reference images.

A threshold means strictly greater. Two images that are copies of a third are in one component, also when they are not
above the threshold to each other. The recall of the search is measured against exact search and printed. A higher
threshold (with --rebuild) re-reads the stored forest and searches nothing.

Example: curate dedup runs/a --threshold 0.6

Example: curate dedup --embeddings pool/ --out duplicates/ --against imagenet=evaluation/ --against-threshold 0.45
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""

    @app.command("dedup", help=HELP)
    @config_options(DedupConfig, leave_out=("against",))
    def dedup_command(
        overrides: dict[str, Any],
        run: session.RunArgument = None,
        embeddings: Annotated[
            str | None,
            typer.Option(help="folder of Parquet with image_id and embedding, instead of a run", show_default=False),
        ] = None,
        out: Annotated[
            str | None, typer.Option(help="folder for part-*.parquet, with --embeddings", show_default=False)
        ] = None,
        against: Annotated[
            list[str] | None,
            typer.Option(help="[NAME=]DIR of a reference set, with --embeddings; repeatable", show_default=False),
        ] = None,
        ray_address: session.RayOption = None,
        workers: session.WorkersOption = None,
        memory_per_worker: session.MemoryOption = None,
        seed: session.SeedOption = None,
        rebuild: session.RebuildOption = False,
        as_json: session.JsonOption = False,
    ) -> None:
        if (run is None) == (embeddings is None):
            raise UserError("give a run directory, or --embeddings DIR with --out DIR (and not both)")
        if (embeddings is None) != (out is None):
            raise UserError("--embeddings and --out go together: curate dedup --embeddings DIR --out DIR")
        config = session.resolve(DedupConfig, run, "dedup", overrides)
        if against:
            config = config.model_copy(update={"against": list(against)})
        outcome = session.carry_out(
            lambda context: dedup.execute(context, config, embeddings=embeddings),
            as_json,
            stage="dedup",
            run=run,
            out=out,
            seed=seed,
            rebuild=rebuild,
            ray_address=ray_address,
            workers=workers,
            memory_per_worker=memory_per_worker,
        )
        if not as_json:
            for line in reference_lines(outcome):
                typer.echo(line)


def reference_lines(outcome: Outcome) -> list[str]:
    """One line per reference set: what was hit, and what either rule discards."""
    return [
        f"  reference set {s['reference_set']}: {s['images_hit']:,} of {s['images']:,} images hit; "
        f"{s['direct']:,} direct copies, {s['component']:,} in their components (largest {s['largest_component']:,})"
        for s in outcome.summary.get("reference_sets", [])
    ]
