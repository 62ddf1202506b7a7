"""`curate`: the commands, in the order of the work."""

import importlib

import typer

app = typer.Typer(
    name="curate",
    help="Build datasets like LVD-142M: from URLs and seed sets to a Parquet manifest with full provenance.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)

GROUPS = (
    "start",
    "ingest",
    "images",
    "duplicates",
    "selection",
    "dataset",
    "adding",
    "serving",
    "forgetting",
    "submission",
    "training",
    "evaluation",
)
"""Modules of cli/ that add their commands to `app` through `register(app)`."""

for _group in GROUPS:
    importlib.import_module(f"cli.{_group}").register(app)


def main() -> None:
    """Entry point of the `curate` script."""
    app()


if __name__ == "__main__":
    main()
