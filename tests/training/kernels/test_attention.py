"""Packed attention in Triton's interpreter against float64; the adapter and torch's path beside it."""

import pytest
import torch

from training.kernels import attention
from training.kernels.attention import attend_triton
from training.model import Layout, VisionTransformer, VisionTransformerConfig, attend_per_length

ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """By norms; NaN is passed on."""
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def compare(layout: Layout, heads: int, channels: int, kind: torch.dtype, spread: float = 1.0) -> None:
    rounding = ROUNDING[kind] * max(spread**2, 1)  # large scores: an exponent's rounding is a factor's
    stored = (spread * torch.randn(sum(layout.tokens), 3, heads, channels)).to(kind)
    qkv, exact = stored.clone().requires_grad_(), stored.double().requires_grad_()
    got, expected = attend_triton(qkv, layout), attend_per_length(exact, layout)
    gradient = torch.randn(got.shape).to(kind)
    got.backward(gradient)
    expected.backward(gradient.double())
    assert got.dtype == kind and error(got, expected) < rounding
    for part in range(3):  # of q, of k, of v: each by itself; with one key the first two are zero
        mine, theirs = qkv.grad[:, part], exact.grad[:, part]
        if theirs.norm() > 1e-9:
            assert error(mine, theirs) < 2 * rounding, "qkv"[part]
        else:
            assert mine.norm() < 1e-5


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_short_sequences_are_those_of_float64_with_their_gradients(kind: torch.dtype) -> None:
    for length in (1, 37, 41, 50, 54, 64):
        compare(Layout((1 + (length == 50),), (length,)), 1, 64, kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_long_sequences_are_those_of_float64_with_their_gradients(kind: torch.dtype) -> None:
    for length in (65, 128, 197, 201, 257, 261):
        compare(Layout((1,), (length,)), 1, 64, kind)


def test_sequences_of_two_lengths_lie_one_behind_another() -> None:
    compare(Layout((1, 2), (70, 50)), 2, 32, torch.float32)
    compare(Layout((2, 0, 1), (37, 50, 70)), 1, 64, torch.bfloat16)


@pytest.mark.parametrize("kind", [pytest.param(torch.float32, marks=pytest.mark.long), torch.float16])
def test_sequences_at_high_resolution_in_their_larger_tiles_are_those_of_float64(kind: torch.dtype) -> None:
    compare(Layout((1,), (1370,)), 1, 16, kind)


@pytest.mark.parametrize("channels", [8, 80, 128])
def test_heads_of_other_widths(channels: int) -> None:
    compare(Layout((1, 1), (20, 70)), 1, channels, torch.float32)


def test_large_scores_stay_finite_and_right() -> None:
    compare(Layout((1, 1), (20, 70)), 1, 64, torch.float32, spread=6.0)


def test_strided_inputs_and_gradients_are_read_where_they_are() -> None:
    layout = Layout((2, 1), (20, 67))
    wide = torch.randn(107, 3, 2, 72)
    views = {
        "between columns": wide[..., :64],
        "heads before parts": torch.randn(107, 2, 3, 64).transpose(1, 2),
        "channels apart": torch.randn(107, 3, 64, 2).transpose(2, 3),
    }
    for view in views.values():
        qkv, exact = view.requires_grad_(), view.detach().double().requires_grad_()
        gradient = torch.randn(107, 64, 2).transpose(1, 2)
        got, expected = attend_triton(qkv, layout), attend_per_length(exact, layout)
        (mine,) = torch.autograd.grad(got, qkv, gradient)
        (theirs,) = torch.autograd.grad(expected, exact, gradient.double())
        assert error(got, expected) < 2e-6 and error(mine, theirs) < 4e-6


def test_everything_is_written_and_equal_runs_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN: what a kernel leaves out shows."""
    empty, layout = torch.empty, Layout((2, 1), (20, 70))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.empty(x.shape, dtype=x.dtype))
    qkv, gradient = torch.randn(110, 3, 1, 64), torch.randn(110, 1, 64)
    runs = []
    for _ in range(2):
        out, lse = attention.forward(qkv, *map(list, layout))
        runs.append((out, lse, attention.backward(gradient, qkv, out, lse, *map(list, layout))))
    assert all(torch.isfinite(x).all() and torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_the_operators_keep_what_torch_asks_of_them() -> None:
    """Schema, shapes without data, gradients under AOT tracing: what torch.compile needs."""
    qkv = torch.randn(7, 3, 1, 16, requires_grad=True)
    torch.library.opcheck(attention.forward, (qkv, [1], [7]))


def test_a_vision_transformer_takes_it_in_place_of_the_reference_compiled_too() -> None:
    config = VisionTransformerConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, registers=1)
    network, crops = VisionTransformer(config), [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    expected = network.packed(crops)
    network.use_attention(attend_triton)
    for compiled in (False, True):
        if compiled:
            network.blocks[0].compile(backend="aot_eager", fullgraph=True)
        for got, wanted in zip(network.packed(crops), expected, strict=True):
            torch.testing.assert_close(got.patches, wanted.patches, atol=1e-5, rtol=1e-5)


def test_boundaries_are_the_cumulative_lengths() -> None:
    found = attention.boundaries(Layout((2, 3), (5, 2)), torch.device("cpu"))
    assert found.tolist() == [0, 5, 10, 12, 14, 16] and found.dtype == torch.int32


def test_boundaries_that_an_evaluation_asked_for_first_serve_a_training() -> None:
    with torch.inference_mode():
        attention.boundaries(Layout((3,), (4,)), torch.device("cpu"))
    assert not attention.boundaries(Layout((3,), (4,)), torch.device("cpu")).is_inference()
