"""Download: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "download"
REVISION = 1


class DownloadConfig(StageConfig):
    """Options of `curate download`."""


def execute(context: Context, config: DownloadConfig) -> Outcome:
    raise NotImplementedError
