"""Embed: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "embed"
REVISION = 1


class EmbedConfig(StageConfig):
    """Options of `curate embed`."""


def execute(context: Context, config: EmbedConfig) -> Outcome:
    raise NotImplementedError
