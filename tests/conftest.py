"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray with two CPUs for the whole test session."""
    from pipelines import cluster

    cluster.start(None, 2)
    yield
    cluster.stop()
