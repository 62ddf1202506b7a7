"""Report: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "report"
REVISION = 1


class ReportConfig(StageConfig):
    """Options of `curate report`."""


def execute(context: Context, config: ReportConfig) -> Outcome:
    raise NotImplementedError
