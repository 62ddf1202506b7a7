"""Balance: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "balance"
REVISION = 1


class BalanceConfig(StageConfig):
    """Options of `curate balance`."""


def execute(context: Context, config: BalanceConfig) -> Outcome:
    raise NotImplementedError
