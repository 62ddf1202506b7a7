"""Streamed cross-entropies and their gradients are those of `training.losses.terms` with the targets written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from curation.errors import UserError
from tests.training.tiny import figures, run_here, tiny
from training import kernels
from training.assembly import assemble
from training.kernels import cross_entropy, sinkhorn
from training.losses import Center, SinkhornKnopp, Targets, terms
from training.losses.streaming import Backend, dino_loss, gradient, ibot_loss, row_losses

TRITON, PLAIN = Backend(cross_entropy.row_losses, cross_entropy.gradient), Backend()
STUDENT, TEACHER = 0.1, 0.06


def exact_dino(student: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """(loss, gradient) in float64."""
    x = student.detach().double().requires_grad_()
    matrix = matrix64(targets)
    first, second = matrix.chunk(2)
    b = len(first)
    wanted = torch.cat([second, first, *[first + second] * (len(x) // b - 2)])
    loss = -(wanted * torch.log_softmax(x / STUDENT, 1)).sum() / (2 * len(x) - 2 * b)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def exact_ibot(student: Tensor, targets: Targets, weights: Tensor, crops: int) -> tuple[Tensor, Tensor]:
    x = student.detach().double().requires_grad_()
    loss = -(weights.double()[:, None] * matrix64(targets) * torch.log_softmax(x / STUDENT, 1)).sum() / crops
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def matrix64(targets: Targets) -> Tensor:
    scores = targets.logits.double() / targets.temperature
    return torch.softmax(scores if targets.columns is None else scores + targets.columns.double(), 1)


def check(loss: Tensor, student: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """A gradient in half precision is the exact one, rounded."""
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(loss * 3, student)
    assert got.dtype == student.dtype
    step = torch.finfo(student.dtype).eps
    torch.testing.assert_close(got.double(), 3 * expected[1], rtol=max(step, 1e-4), atol=2e-6)


def teacher(rows: int, prototypes: int, dtype: torch.dtype, columns: bool = True) -> Targets:
    return Targets(torch.randn(rows, prototypes).to(dtype), TEACHER, torch.randn(prototypes) if columns else None)


@pytest.mark.parametrize("backend", [TRITON, PLAIN], ids=["triton", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dino_equals_float64_forward_and_backward(backend: Backend, dtype: torch.dtype) -> None:
    for samples, crops, prototypes, columns in ((1, 2, 7, True), (2, 10, 130, True), (3, 5, 2100, False)):
        student = torch.randn(samples * crops, prototypes).to(dtype).requires_grad_()
        targets = teacher(2 * samples, prototypes, dtype, columns)
        check(dino_loss(student, targets, STUDENT, backend), student, exact_dino(student, targets))


@pytest.mark.parametrize("backend", [TRITON, PLAIN], ids=["triton", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ibot_equals_float64_forward_and_backward(backend: Backend, dtype: torch.dtype) -> None:
    for rows, prototypes, columns in ((1, 1, True), (11, 33, False), (9, 4200, True)):
        student, weights = torch.randn(rows, prototypes).to(dtype).requires_grad_(), torch.rand(rows)
        targets = teacher(rows, prototypes, dtype, columns)
        loss = ibot_loss(student, targets, weights, 4, STUDENT, backend)
        check(loss, student, exact_ibot(student, targets, weights, 4))


def test_losses_are_those_of_the_reference_whatever_the_centering() -> None:
    for centering in (SinkhornKnopp(columns=sinkhorn.sinkhorn_columns), SinkhornKnopp(), Center(50)):
        if isinstance(centering, Center):
            centering.mean.copy_(torch.randn(1, 50))
        logits, student, weights = torch.randn(6, 50), torch.randn(15, 50), torch.rand(6)
        targets, matrix = centering.potentials(logits, TEACHER), centering.targets(logits, TEACHER)
        wanted = terms.dino_loss(student[:6], student[6:], matrix, STUDENT)
        torch.testing.assert_close(dino_loss(student, targets, STUDENT, TRITON), wanted)
        wanted = terms.ibot_loss(student[:6], matrix, weights, 5, STUDENT)
        torch.testing.assert_close(ibot_loss(student[:6], targets, weights, 5, STUDENT, TRITON), wanted)


def test_no_patch_at_all_is_a_loss_of_zero() -> None:
    for backend in (TRITON, PLAIN):
        student = torch.zeros(0, 7, requires_grad=True)
        loss = ibot_loss(student, teacher(0, 7, torch.float32), torch.zeros(0), 4, STUDENT, backend)
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.shape == (0, 7)


def test_rows_any_stride_apart_are_read_in_place() -> None:
    wide = torch.randn(12, 2, 300, requires_grad=True)
    targets = teacher(24, 300, torch.float32)
    targets = targets._replace(logits=targets.logits[::4])
    student = wide[:, 1]
    check(dino_loss(student, targets, STUDENT, TRITON), student, exact_dino(student, targets))
    student, columnwise = wide[:6, 0], targets._replace(logits=targets.logits.T.contiguous().T)
    weights = torch.rand(6)
    check(
        ibot_loss(student, columnwise, weights, 2, STUDENT, TRITON),
        student,
        exact_ibot(student, columnwise, weights, 2),
    )


@pytest.mark.parametrize("crossed", [True, False])
def test_every_element_is_written_and_gradients_may_replace_their_logits(
    crossed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, teachers, prototypes = (12, 8, 2070) if crossed else (12, 12, 2070)
    student, targets, coefficients = (
        torch.randn(rows, prototypes),
        teacher(teachers, prototypes, torch.float32),
        torch.rand(rows),
    )
    wanted = row_losses(student, targets, STUDENT, crossed=crossed)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    losses, *sums = cross_entropy.row_losses(student, targets, STUDENT, crossed=crossed)
    for got, expected in zip((losses, *sums), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected, out = torch.empty_like(student), torch.full_like(student, torch.nan)
    gradient(student, targets, STUDENT, *sums, coefficients, expected, crossed=crossed)
    cross_entropy.gradient(student, targets, STUDENT, *sums, coefficients, out, crossed=crossed)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    cross_entropy.gradient(student, targets, STUDENT, *sums, coefficients, student, crossed=crossed)
    assert torch.equal(student, out)


def test_kernels_that_cannot_run_here_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"losses": {"losses": "triton"}, "augmentation": {"augmentation": "triton"}}
    monkeypatch.setattr(kernels, "INTERPRET", False)
    for name, changes in told.items():
        with pytest.raises(UserError, match=rf"kernels.{name}: triton: needs a GPU; set reference"):
            assemble(tiny(kernels=changes), torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name, changes in told.items():
        with pytest.raises(UserError, match=rf"kernels.{name}: triton: needs Triton, which is not installed here"):
            assemble(tiny(kernels=changes), torch.device("cpu"))


def test_what_is_not_finite_stays_so() -> None:
    for broken in (torch.nan, torch.inf):
        student, targets = torch.randn(4, 40), teacher(4, 40, torch.float32)
        student[1, 3] = broken
        assert not ibot_loss(student, targets, torch.ones(4), 2, STUDENT, TRITON).isfinite()
        assert not ibot_loss(
            torch.randn(4, 40), Targets(student, TEACHER), torch.ones(4), 2, STUDENT, TRITON
        ).isfinite()


@pytest.mark.parametrize("changes", [{}, {"losses": {"centering": "softmax"}, "heads": {"ibot": None}}])
def test_a_training_with_kernels_is_one_without(tmp_path: Any, changes: dict[str, Any]) -> None:
    told = {"steps": 2, "batch_size": 2, "model": {"depth": 1}, **changes}
    run_here(tmp_path / "plain", **told)
    run_here(tmp_path / "kernels", kernels={"losses": "triton"}, **told)
    for mine, theirs in zip(figures(tmp_path / "kernels"), figures(tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
