"""Cluster: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "cluster"
REVISION = 1


class ClusterConfig(StageConfig):
    """Options of `curate cluster`."""


def execute(context: Context, config: ClusterConfig) -> Outcome:
    raise NotImplementedError
