"""`curate manifest` and `curate report`: the dataset as one table, and the page to look at it."""

from typing import Any

import typer

from cli import session
from cli.options import config_options
from curation import storage
from curation.errors import UserError
from pipelines.stages import manifest as manifest_stage
from pipelines.stages import report as report_stage


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""

    @app.command("manifest", epilog="Example: curate manifest runs/demo")
    @config_options(manifest_stage.ManifestConfig)
    def manifest(
        run: session.RunArgument = None,
        rebuild: session.RebuildOption = False,
        ray_address: session.RayOption = None,
        workers: session.WorkersOption = None,
        json: session.JsonOption = False,
        *,
        overrides: dict[str, Any],
    ) -> None:
        """Write the manifest: one row per image of the mix with its provenance, and the data card beside it."""
        root = _given(run, "manifest")
        config = session.resolve(manifest_stage.ManifestConfig, root, "manifest", overrides)
        session.carry_out(
            lambda context: manifest_stage.execute(context, config),
            json,
            stage="manifest",
            run=root,
            rebuild=rebuild,
            ray_address=ray_address,
            workers=workers,
        )

    @app.command("report", epilog="Example: curate report runs/demo --max-megabytes 20")
    @config_options(report_stage.ReportConfig)
    def report(
        run: session.RunArgument = None,
        rebuild: session.RebuildOption = False,
        ray_address: session.RayOption = None,
        workers: session.WorkersOption = None,
        json: session.JsonOption = False,
        *,
        overrides: dict[str, Any],
    ) -> None:
        """Write RUN/report: pages with counts and pictures of every stage, which open from disk."""
        root = _given(run, "report")
        config = session.resolve(report_stage.ReportConfig, root, "report", overrides)
        outcome = session.carry_out(
            lambda context: report_stage.execute(context, config),
            json,
            stage="report",
            run=root,
            rebuild=rebuild,
            ray_address=ray_address,
            workers=workers,
        )
        if not json:
            typer.echo(storage.join(outcome.out, report_stage.PAGE))


def _given(run: str | None, command: str) -> str:
    if run is None:
        raise UserError(f"give a run directory: curate {command} RUN")
    return run
