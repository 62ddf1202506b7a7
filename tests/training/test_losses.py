"""The losses are those of the recipe: against lightly, float64 and naive loops over terms, crops and samples."""

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

from training.losses import (
    Center,
    SinkhornKnopp,
    chosen_patches,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn,
)

torch.manual_seed(0)


def naive_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """The public code's loop, in float64 and with the largest logit taken out so that nothing overflows."""
    q = np.exp(logits.astype(np.float64) / temperature - (logits.astype(np.float64) / temperature).max()).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_equals_float64() -> None:
    logits = torch.randn(48, 32)
    for iterations in (1, 3):
        expected = naive_sinkhorn(logits.numpy(), 0.07, iterations)
        np.testing.assert_allclose(sinkhorn(logits, 0.07, iterations).numpy(), expected, rtol=2e-5, atol=1e-7)


def test_sinkhorn_stays_right_where_exp_overflows() -> None:
    logits = torch.randn(48, 32) * 3 + 100.0  # / .04 = 2500: exp is infinite, and of the differences zero
    assert torch.exp(logits / 0.04).isinf().all()
    targets = sinkhorn(logits, 0.04)
    assert targets.isfinite().all()
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-4)
    x = logits.double() / 0.04
    u, v = torch.zeros(48, 1, dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64)
    for _ in range(3):
        v = -torch.logsumexp(x + u, 0, keepdim=True)
        u = -torch.logsumexp(x + v, 1, keepdim=True)
    np.testing.assert_allclose(targets.numpy(), torch.exp(x + u + v).numpy(), atol=2e-3)


def test_sinkhorn_shares_the_prototypes_equally() -> None:
    biased = torch.randn(64, 16) + torch.arange(16) * 0.3
    shares = sinkhorn(biased, 0.5, iterations=50).mean(0)
    np.testing.assert_allclose(shares.numpy(), 1 / 16, rtol=1e-3)


@pytest.mark.parametrize("local_crops", [8, 3, 0])
def test_dino_loss_equals_lightly(local_crops: int) -> None:
    b, k = 6, 20
    student = torch.randn(2 + local_crops, b, k)
    teacher = torch.randn(2, b, k)
    center = Center(k)
    targets = center.targets(teacher.flatten(0, 1), 0.05)
    ours = dino_loss(student[:2].flatten(0, 1), student[2:].flatten(0, 1), targets, 0.1)
    theirs = DINOLoss(k)(list(teacher), list(student), teacher_temp=0.05)
    torch.testing.assert_close(ours, theirs)


def test_dino_loss_is_the_mean_of_eighteen_terms() -> None:
    b, k = 4, 12
    student, targets = torch.randn(10, b, k, dtype=torch.float64), torch.randn(2, b, k).softmax(-1)
    terms = [
        -(targets[t, i] * torch.log_softmax(student[s, i] / 0.1, -1)).sum()
        for t in range(2)
        for s in range(10)
        if s != t
        for i in range(b)
    ]
    assert len(terms) == 18 * b
    ours = dino_loss(student[:2].flatten(0, 1), student[2:].flatten(0, 1), targets.flatten(0, 1), 0.1)
    torch.testing.assert_close(ours.double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_ibot_loss_equals_lightly_and_its_weights_the_recipe() -> None:
    masks = torch.rand(6, 16) < 0.4
    masks[3] = False
    where, weights = chosen_patches(masks)
    student, teacher = torch.randn(len(where), 20), torch.randn(len(where), 20)
    ours = ibot_loss(student, Center(20).targets(teacher, 0.05), weights, len(masks), 0.1)
    theirs = IBOTPatchLoss(20)(teacher, student, masks.reshape(6, 4, 4), teacher_temp=0.05)
    torch.testing.assert_close(ours, theirs)
    assert where.tolist() == [crop * 16 + i for crop in range(6) for i in range(16) if masks[crop, i]]
    np.testing.assert_allclose(weights.sum().item(), 5, rtol=1e-6)  # 1 per crop that is masked


def test_koleo_loss_equals_lightly_per_crop_and_group() -> None:
    tokens = torch.randn(2 * 12, 8)
    expected = sum(KoLeoLoss()(group) for crop in tokens.chunk(2) for group in crop.chunk(3)) / 3
    torch.testing.assert_close(koleo_loss(tokens, group_size=4), torch.as_tensor(expected))


def test_koleo_gradient_equals_lightly() -> None:
    ours, theirs = (torch.randn(16, 8).requires_grad_() for _ in range(2))
    theirs.data = ours.data.clone()
    koleo_loss(ours, 8).backward()
    sum(KoLeoLoss()(crop) for crop in theirs.chunk(2)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_koleo_of_duplicates_in_half_precision_is_finite_with_its_gradient() -> None:
    tokens = torch.randn(1, 32).expand(8, 32).half().clone().requires_grad_()
    loss = koleo_loss(tokens, 4)
    loss.backward()
    assert loss.isfinite() and tokens.grad is not None and tokens.grad.isfinite().all()


def test_a_step_in_which_no_patch_is_masked_leaves_the_centre_where_it_is() -> None:
    center = Center(3)
    center.mean.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    center.targets(torch.zeros(0, 3), 0.1)
    center.update()
    assert center.mean.tolist() == [[1.0, -2.0, 3.0]]


def test_center_uses_the_mean_of_former_steps_and_sees_micro_batches_together() -> None:
    logits = torch.randn(3, 8, 5)
    one, many = Center(5), Center(5)
    one.targets(logits[:2].flatten(0, 1), 0.1)
    one.update()
    for micro in logits[:2]:
        torch.testing.assert_close(many.targets(micro, 0.1), torch.softmax(micro / 0.1, -1))
    many.update()
    torch.testing.assert_close(one.mean, many.mean)
    torch.testing.assert_close(one.mean[0], 0.1 * logits[:2].mean((0, 1)))
    expected = torch.softmax((logits[2] - one.mean) / 0.1, -1)
    torch.testing.assert_close(many.targets(logits[2], 0.1), expected)


def test_no_masked_patch_at_all_is_a_loss_of_zero() -> None:
    where, weights = chosen_patches(torch.zeros(4, 9, dtype=torch.bool))
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = ibot_loss(logits, SinkhornKnopp().targets(logits.detach(), 0.04), weights, 4, 0.1)
    loss.backward()
    assert loss.item() == 0 and len(where) == 0
