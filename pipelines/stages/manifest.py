"""Manifest: to be written."""

from pipelines.context import Context, Outcome, StageConfig

NAME = "manifest"
REVISION = 1


class ManifestConfig(StageConfig):
    """Options of `curate manifest`."""


def execute(context: Context, config: ManifestConfig) -> Outcome:
    raise NotImplementedError
