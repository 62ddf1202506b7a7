"""Streamed Sinkhorn-Knopp finds the column potentials that float64 finds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.tiny import SERVER, free_port
from training import parallel
from training.kernels import sinkhorn as kernel
from training.losses.centering import Targets, sinkhorn_columns


def exact(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The assignment in float64."""
    x = logits.double() / temperature
    u, v = torch.zeros(len(x), 1, dtype=torch.float64), torch.zeros(1, x.shape[1], dtype=torch.float64)
    share = np.log(x.shape[1] / max(len(x), 1))
    for _ in range(iterations):
        v = -(torch.logsumexp(x + u, 0, keepdim=True) + share)
        u = -torch.logsumexp(x + v, 1, keepdim=True)
    return torch.exp(x + u + v)


def assignment(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    columns = kernel.sinkhorn_columns(logits, temperature, iterations)
    assert columns.shape == logits.shape[1:] and columns.dtype == torch.float32
    return Targets(logits, temperature, columns).matrix().double()


@pytest.mark.parametrize(("rows", "prototypes"), [(1, 5), (3, 1), (48, 130), (11, 1024), (19, 2049)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assignments_equal_float64(rows: int, prototypes: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, prototypes).to(dtype)
    for iterations in (1, 3):
        torch.testing.assert_close(
            assignment(logits, 0.07, iterations), exact(logits, 0.07, iterations), rtol=1e-4, atol=1e-7
        )


def test_logits_whose_exponential_overflows_are_assigned() -> None:
    logits = torch.randn(48, 32) * 3 + 100
    assert torch.exp(logits / 0.04).isinf().all()
    torch.testing.assert_close(assignment(logits, 0.04), exact(logits, 0.04, 3), rtol=0, atol=2e-3)


def test_rows_any_stride_apart_are_read_in_place() -> None:
    wide = torch.randn(24, 3, 300)
    for logits in (wide[:, 1], wide[::2, 0, :77], wide[:, 2, :9].T):
        torch.testing.assert_close(assignment(logits, 0.1), exact(logits, 0.1, 3), rtol=1e-4, atol=1e-7)


def test_every_part_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    for rows, prototypes in ((9, 2050), (40, 70)):
        logits = torch.randn(rows, prototypes)
        assert kernel.column_parts(logits, 0.1, None).isfinite().all()
        assert kernel.row_parts(logits, 0.1, torch.randn(prototypes)).isfinite().all()


def test_no_row_at_all_breaks_nothing() -> None:
    assert kernel.sinkhorn_columns(torch.zeros(0, 9), 0.1).shape == (9,)


def test_equal_runs_give_equal_bits() -> None:
    logits = torch.randn(20, 300).half()
    assert torch.equal(kernel.sinkhorn_columns(logits, 0.05), kernel.sinkhorn_columns(logits, 0.05))


def test_processes_share_their_columns_and_may_hold_other_numbers_of_rows() -> None:
    logits = torch.randn(13, 40)
    sent = SERVER.SimpleQueue()
    environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    parts = (logits[:0], logits[:4], logits[4:])
    processes = [
        SERVER.Process(target=found_there, args=(environment | {"RANK": str(i)}, part.numpy(), sent), daemon=True)
        for i, part in enumerate(parts)
    ]
    for process in processes:
        process.start()
    found = [sent.get() for _ in parts]
    expected = sinkhorn_columns(logits, 0.07)
    for columns in found:
        np.testing.assert_allclose(columns, expected.numpy(), rtol=1e-5, atol=1e-5)
    for process in processes:
        process.join(timeout=20)


def found_there(environment: dict[str, str], logits: np.ndarray, sent: object) -> None:
    """In a process of its own."""
    import os

    os.environ.update(environment)
    parallel.start()
    sent.put(kernel.sinkhorn_columns(torch.from_numpy(logits), 0.07).numpy())  # type: ignore[attr-defined]
    parallel.stop()
