"""Filter: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "filter"
REVISION = 1


class FilterConfig(StageConfig):
    """Options of `curate filter`."""


def execute(context: Context, config: FilterConfig) -> Outcome:
    raise NotImplementedError
