"""The fused block in Triton's interpreter against the reference in float64, and its passes one by one."""

import copy
from typing import Any

import pytest
import torch

from tests.training.kernels.test_attention import ROUNDING, error
from training.kernels import branch
from training.kernels.branch import compute_triton
from training.model import Kept, Layout, VisionTransformer, VisionTransformerConfig
from training.stochastic_depth import choose_kept

LAYOUT = Layout((4, 6), (6, 3))


def blocks(kind: torch.dtype, width: int, **changes: Any) -> tuple[Any, Any]:
    """A block with kernels, and the same with the reference in float64; no weight is what it begins as."""
    shape: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": width, "depth": 1, "heads": 2}
    network = VisionTransformer(VisionTransformerConfig(**(shape | {"layer_scale": 0.5} | changes)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    network = network.to(kind)
    exact = copy.deepcopy(network).double()
    network.use_blocks(compute_triton)
    return network.blocks[0], exact.blocks[0]


def kept_of(rate: float, layout: Layout = LAYOUT) -> tuple[Kept | None, Kept | None]:
    kept = choose_kept(layout, [0], group_size=2, rate=rate, depth=1, seed=0)
    return (None, None) if kept is None else kept[0]


def compare(block: Any, exact: Any, kind: torch.dtype, kept: Any, layout: Layout = LAYOUT, slack: float = 1) -> None:
    stored = torch.randn(sum(layout.tokens), block.norm1.weight.shape[0]).to(kind)
    x, wide = stored.clone().requires_grad_(), stored.double().requires_grad_()
    got, expected = block(x, layout, *kept), exact(wide, layout, *kept)
    gradient = torch.randn(got.shape).to(kind)
    got.backward(gradient)
    expected.backward(gradient.double())
    assert got.dtype == kind and error(got, expected) < slack * ROUNDING[kind]
    assert error(x.grad, wide.grad) < 2 * slack * ROUNDING[kind]
    for (name, mine), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert error(mine.grad, theirs.grad) < 4 * slack * ROUNDING[kind], name


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_a_block_is_that_of_float64_with_all_gradients(feed_forward: str, rate: float) -> None:
    compare(*blocks(torch.float32, 24, feed_forward=feed_forward), torch.float32, kept_of(rate))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_block_in_half_precision_is_about_that_of_float64(kind: torch.dtype) -> None:
    compare(*blocks(kind, 32), kind, kept_of(0.4), slack=4)


def test_a_block_without_layer_scale_and_one_that_keeps_a_single_sequence() -> None:
    compare(*blocks(torch.float32, 16, layer_scale=None), torch.float32, kept_of(0.4))
    layout = Layout((2,), (5,))
    kept = kept_of(0.4, layout)
    assert kept[0] is not None and kept[0].layout == Layout((1,), (5,))
    compare(*blocks(torch.float32, 16), torch.float32, kept, layout)


def test_a_layout_without_sequences_of_a_length() -> None:
    layout = Layout((2, 0), (5, 3))
    compare(*blocks(torch.float32, 16), torch.float32, (None, None), layout)


def test_many_rows_per_program_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than tiles: each goes through several, and LayerNorm's sums hold them all."""
    monkeypatch.setattr(branch, "PROGRAMS", 2)
    monkeypatch.setattr(branch, "rows_and_block", lambda width: (2, 16))
    compare(*blocks(torch.float32, 16), torch.float32, kept_of(0.4))


def test_dropped_rows_pass_by_untouched_and_everything_is_written_with_equal_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.empty(x.shape, dtype=x.dtype))
    (first, second), counts = kept_of(0.4), tuple(map(list, LAYOUT))
    assert first is not None and second is not None
    tokens, kept_tokens = sum(LAYOUT.tokens), len(first.rows)
    x, gradient = torch.randn(2, tokens, 24)
    part, normed = torch.randn(2, kept_tokens, 24)
    weight, bias, scales = torch.randn(24), torch.randn(24), list(first.scales)
    runs = []
    for _ in range(2):
        moved, y = branch.join(
            x, part, first.places, scales, weight, bias, 1e-6, second.places, kept_tokens, *counts
        )  # fmt: skip
        back = branch.join_backward(
            gradient, normed, moved, first.places, scales, kept_tokens, weight, 1e-6, second.places, *counts
        )
        runs.append((moved, y, *back, branch.gather(gradient, first.places, scales, kept_tokens, *counts)))
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*runs, strict=True))
    dropped = torch.ones(tokens, dtype=torch.bool)
    dropped[first.rows] = False
    assert dropped.any() and torch.equal(runs[0][0][dropped], x[dropped])


def test_kept_sequences_without_their_places_are_refused() -> None:
    block, _ = blocks(torch.float32, 16)
    first, second = kept_of(0.4)
    assert first is not None
    with pytest.raises(ValueError, match="without their places"):
        block(torch.randn(sum(LAYOUT.tokens), 16), LAYOUT, first._replace(places=None), second)


def test_places_are_where_the_kept_rows_of_every_sequence_begin() -> None:
    for kept in kept_of(0.4):
        assert kept is not None and kept.places is not None
        begins, first, sequence = kept.places.tolist(), 0, 0
        for count, length in zip(*LAYOUT, strict=True):
            for _ in range(count):
                if begins[sequence] >= 0:
                    found = kept.rows[begins[sequence] : begins[sequence] + length]
                    assert found.tolist() == list(range(first, first + length))
                first, sequence = first + length, sequence + 1
        assert sum(place >= 0 for place in begins) == sum(kept.layout.counts)


def test_a_compiled_block_is_one_graph_and_the_same_block() -> None:
    block, _ = blocks(torch.float32, 16)
    x, kept = torch.randn(sum(LAYOUT.tokens), 16, requires_grad=True), kept_of(0.4)
    results = []
    for compiled in (False, True):
        if compiled:
            block.compile(backend="aot_eager", fullgraph=True)
        block.zero_grad()
        y = block(x * 1, LAYOUT, *kept)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_recomputing_a_block_gives_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    block, _ = blocks(torch.float32, 16)
    x, kept = torch.randn(sum(LAYOUT.tokens), 16, requires_grad=True), kept_of(0.4)
    direct = torch.autograd.grad(block(x, LAYOUT, *kept).square().sum(), [x, *block.parameters()])
    again = checkpoint(block, x, LAYOUT, *kept, use_reentrant=False)
    recomputed = torch.autograd.grad(again.square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))
