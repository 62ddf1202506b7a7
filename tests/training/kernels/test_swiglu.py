"""The feed-forward's activations with their projections, in Triton's interpreter against float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.kernels.test_attention import ROUNDING, error
from training.kernels import swiglu


def exact(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return F.linear(F.gelu(hidden), weight, bias)
    gate, value = hidden.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, weight, bias)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_that_of_float64_with_its_gradients(kind: torch.dtype, gated: bool) -> None:
    for n, width, spread in ((1, 24, 1.0), (37, 40, 1.0), (5, 2056, 1.0), (3, 16, 30.0)):
        shapes = ((n, (1 + gated) * width), (8, width), (8,))
        stored = [torch.randn(shape).mul(scale).to(kind) for shape, scale in zip(shapes, (spread, 1, 1), strict=True)]
        mine = [x.clone().requires_grad_() for x in stored]
        theirs = [x.double().requires_grad_() for x in stored]
        got = (swiglu.swiglu_project if gated else swiglu.gelu_project)(*mine)
        expected = exact(*theirs, gated)
        gradient = torch.randn(got.shape).to(kind)
        got.backward(gradient)
        expected.backward(gradient.double())
        assert error(got, expected) < 2 * ROUNDING[kind]
        for name, one, other in zip(("hidden", "weight", "bias"), mine, theirs, strict=True):
            assert error(one.grad, other.grad) < 2 * ROUNDING[kind], name


def test_rows_may_lie_apart_and_none_at_all() -> None:
    wide = torch.randn(9, 100)
    for hidden in (wide[:, :48], wide[::2, 20:68], torch.randn(48, 9).T):
        assert torch.equal(swiglu.activate(hidden, True), swiglu.activate(hidden.contiguous(), True))
        gradient = torch.randn(24, len(hidden)).T
        for one, other in zip(
            swiglu.activate_backward(gradient, hidden, True),
            swiglu.activate_backward(gradient.contiguous(), hidden.contiguous(), True),
            strict=True,
        ):
            assert torch.equal(one, other)
    assert swiglu.activate(torch.empty(0, 48), True).shape == (0, 24)


def test_shapes_without_data_have_the_strides_of_those_with() -> None:
    """What torch.compile plans with."""
    for gradient in (torch.randn(3, 8), torch.randn(8, 3).T):
        told = (torch.randn(3, 16), True)
        torch.library.opcheck(swiglu.activate_backward, (gradient, *told), test_utils="test_faketensor")


def test_everything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for gated in (True, False):
        outputs = swiglu.activate_backward(torch.randn(3, 24), torch.randn(3, 24 * (1 + gated)), gated)
        assert all(torch.isfinite(x).all() for x in (*outputs, swiglu.activate(torch.randn(3, 48), gated)))
