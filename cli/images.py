"""Commands on images: `curate filter`, `curate embed`."""

import typer

from cli.embedding import register_embed
from cli.filtering import register_filter


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    register_filter(app)
    register_embed(app)
