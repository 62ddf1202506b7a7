"""Mix: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "mix"
REVISION = 1


class MixConfig(StageConfig):
    """Options of `curate mix`."""


def execute(context: Context, config: MixConfig) -> Outcome:
    raise NotImplementedError
