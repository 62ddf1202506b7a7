"""Retrieve: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "retrieve"
REVISION = 1


class RetrieveConfig(StageConfig):
    """Options of `curate retrieve`."""


def execute(context: Context, config: RetrieveConfig) -> Outcome:
    raise NotImplementedError
