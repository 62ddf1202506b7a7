"""The kernels of blocks and attention compile for an H100, at widths and lengths of the recipes, without spilling."""

import re

import pytest
import torch

from tests.training.kernels.hopper import compile_launches


@pytest.mark.parametrize("which", ["one shape", pytest.param("the recipes' others", marks=pytest.mark.long)])
def test_blocks_and_attention_compile_for_a_hopper_gpu(which: str) -> None:
    found = compile_launches(one_shape if which == "one shape" else other_shapes)
    assert set(found) == {"forward", "backward", "gather", "backward_whole", "backward_queries", "backward_keys"}
    assert not any(re.search(r"[1-9]\d* bytes spill", told) for told in found.values()), found


def one_shape() -> None:
    blocks((50, 257), (1024,), (False,))


def other_shapes() -> None:
    blocks((37, 197, 1370), (384, 1536), (True,))


def blocks(lengths: tuple[int, ...], widths: tuple[int, ...], gates: tuple[bool, ...]) -> None:
    from training.kernels import attention, branch, swiglu

    kind = torch.bfloat16
    for length in lengths:
        qkv = torch.zeros(2 * length, 3, 16, 64, dtype=kind)
        out, lse = attention.forward(qkv, [2], [length])
        attention.backward(out, qkv, out, lse, [2], [length])
    for width in widths:
        x, weight, places = torch.zeros(100, width, dtype=kind), torch.zeros(width, dtype=kind), torch.tensor([-1, 0])
        told = (places.int(), 50, [2], [50])
        branch.begin(x, weight, weight, 1e-6, *told)
        moved, normed = branch.join(x, x[:50], places.int(), [2.0], weight, weight, 1e-6, *told)
        branch.join_backward(x, normed, moved, places.int(), [2.0], 50, weight, 1e-6, places.int(), [2], [50])
        branch.end(x, x[:50], places.int(), [2.0], [2], [50])
        branch.gather(x, places.int(), [2.0], 50, [2], [50])
    for gated in gates:
        hidden, gradient = torch.zeros(9, (1 + gated) * 4096, dtype=kind), torch.zeros(9, 4096, dtype=kind)
        swiglu.activate(hidden, gated)
        swiglu.activate_backward(gradient, hidden, gated)
