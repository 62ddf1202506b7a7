"""Dedup: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "dedup"
REVISION = 1


class DedupConfig(StageConfig):
    """Options of `curate dedup`."""


def execute(context: Context, config: DedupConfig) -> Outcome:
    raise NotImplementedError
