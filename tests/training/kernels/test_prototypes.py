"""Logits that are made in chunks and given up train as logits that are kept do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.tiny import figures, finish, make_batch, run_here, start_processes, tiny
from training import parallel
from training.assembly import assemble
from training.kernels import cross_entropy, prototypes
from training.kernels.prototypes import ChunkedCrossEntropy, even_slices, float32_product
from training.losses import Targets, streaming
from training.losses.streaming import Backend
from training.model import Factored
from training.schedules import values_at
from training.step import train_step

TRITON, PLAIN = Backend(cross_entropy.row_losses, cross_entropy.gradient), Backend()


def inputs(rows: int, teachers: int, dtype: torch.dtype) -> tuple[Factored, Targets, Tensor]:
    features = F.normalize(torch.randn(rows, 6), dim=1).to(dtype).requires_grad_()
    matrix = torch.randn(50, 6).requires_grad_()
    return Factored(features, matrix), Targets(torch.randn(teachers, 50), 0.06, torch.randn(50)), torch.rand(rows)


def exact(logits: Factored, targets: Targets, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the features, of the prototypes) with float64 throughout."""
    x, w = (part.detach().double().requires_grad_() for part in logits)
    wide = Targets(targets.logits.double(), targets.temperature, targets.columns)
    if weights is None:
        loss = streaming.dino_loss(x @ w.T, wide, 0.1, Backend())
    else:
        loss = streaming.ibot_loss(x @ w.T, wide, weights, 3, 0.1, Backend())
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("backend", [TRITON, PLAIN], ids=["triton", "plain"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_equal_float64(
    backend: Backend, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "CHUNK", 400)  # 8 rows: two samples of four crops, or eight patches
    for rows, teachers, crossed in ((20, 10, True), (4, 2, True), (21, 21, False), (1, 1, False)):
        logits, targets, weights = inputs(rows, teachers, dtype)
        if crossed:
            loss, expected = prototypes.dino_loss(logits, targets, 0.1, backend), exact(logits, targets, None)
        else:
            loss = prototypes.ibot_loss(logits, targets, weights, 3, 0.1, backend)
            expected = exact(logits, targets, weights)
        got = loss.detach(), *torch.autograd.grad(loss * 3, logits)
        assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32]
        for mine, theirs in zip(got, (expected[0], 3 * expected[1], 3 * expected[2]), strict=True):
            assert float((mine.double() - theirs).norm()) <= close * float(theirs.norm())


def test_no_more_logits_are_there_than_a_chunk_holds() -> None:
    seen = []

    def spy(logits: Tensor, *told: Any, **options: Any) -> Any:
        seen.append(logits.numel())
        return streaming.row_losses(logits, *told, **options)

    logits, targets, weights = inputs(23, 23, torch.float32)
    ChunkedCrossEntropy.apply(*logits, targets, 0.1, weights, 1.0, False, Backend(spy, streaming.gradient), 300)
    assert seen == [5 * 50, 6 * 50, 6 * 50, 6 * 50]


def test_slices_are_even_and_cover_everything() -> None:
    for count, most in ((0, 4), (1, 4), (4, 4), (9, 4), (100, 7)):
        slices = even_slices(count, most)
        assert [i for part in slices for i in range(count)[part]] == list(range(count))
        lengths = [part.stop - part.start for part in slices]
        assert len(slices) == -(-count // most) and all(most >= n >= max(lengths) - 1 for n in lengths)


def test_products_of_half_precision_add_up_in_float32() -> None:
    left, right = torch.rand(3, 4096).bfloat16(), torch.rand(4096, 5).bfloat16()
    torch.testing.assert_close(float32_product(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=0)


def test_no_patch_at_all_is_a_loss_of_zero() -> None:
    logits, targets, weights = inputs(0, 0, torch.float32)
    loss = prototypes.ibot_loss(logits, targets, weights, 4, 0.1, PLAIN)
    loss.backward()
    assert loss.item() == 0 and not logits.prototypes.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses": {"centering": "softmax"}, "heads": {"ibot": None}, "accumulate": 2},
        {"kernels": {"losses": "triton"}},
    ],
    ids=["plain", "shared head", "triton"],
)
def test_a_training_in_chunks_is_one_with_all_logits(
    tmp_path: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "CHUNK", 300)
    told = {"steps": 2, "batch_size": 2 * changes.get("accumulate", 1), "model": {"depth": 1}, **changes}
    run_here(tmp_path / "kept", **told | {"kernels": {}})
    run_here(tmp_path / "chunks", **told | {"kernels": changes.get("kernels", {}) | {"student_logits": "chunked"}})
    for mine, theirs in zip(figures(tmp_path / "chunks"), figures(tmp_path / "kept"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_two_processes_train_in_chunks_as_one_does(tmp_path: Any) -> None:
    told = {"steps": 2, "batch_size": 4, "kernels": {"student_logits": "chunked"}}
    assert finish(start_processes(2, tmp_path / "two", **told)) == [0, 0]
    run_here(tmp_path / "one", **told)
    for mine, theirs in zip(figures(tmp_path / "two"), figures(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_bfloat16_reaches_the_losses_in_chunks() -> None:
    told = {"parallel": {"precision": "bfloat16"}, "batch_size": 4}
    found = []
    for kept in ("stored", "chunked"):
        config = tiny(kernels={"student_logits": kept}, **told)
        models = assemble(config, parallel.start())
        values = values_at(1, config.schedule, config.steps, config.batch_size)
        found.append(train_step(models, [make_batch(config, 0, 4)], values, config)["model"])
    for name, theirs in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(theirs), rel=0.03), name


def test_several_students_learn_from_one_teacher_in_chunks(tmp_path: Any) -> None:
    run_here(tmp_path / "teacher", steps=2, batch_size=2)
    shape = tiny().model.model_dump()
    weights = str(tmp_path / "teacher/pretrain/checkpoints/step-000000002/model")
    distill = {"teacher": weights, "students": {"narrow": shape | {"width": 8}, "shallow": shape | {"depth": 1}}}
    found = []
    for kept in ("stored", "chunked"):
        config = tiny(kernels={"student_logits": kept}, batch_size=4, distill=distill)
        models = assemble(config, parallel.start())
        figures_of = train_step(models, [make_batch(config, 0, 4)], values_at(1, config.schedule, 2, 4), config)
        found.append({f"{s}/{n}": float(v) for s, of in figures_of.items() for n, v in of.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 14
