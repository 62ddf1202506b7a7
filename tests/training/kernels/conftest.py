"""Kernels run in Triton's interpreter here: tests/conftest.py asks for it before anything imports triton."""

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs whichever tests run, and one thread: small tensors gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
