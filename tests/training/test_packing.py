"""Packed crops, one pass per length and one image at a time are the same model; kept sequences, the same branch."""

import pytest
import torch

from training.model import HeadConfig, Kept, Layout, Network, VisionTransformer, VisionTransformerConfig
from training.model.packing import add_branch

TINY = VisionTransformerConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, registers=2, layer_scale=1.0)


def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(TINY)


@pytest.mark.parametrize("kind", ["per length", "per sequence"])
def test_packed_crops_give_what_they_give_alone(kind: str) -> None:
    network, crops = model(), [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    masks = torch.rand(4, 16) < 0.3
    packed = network.packed(crops, masks)
    for tokens, images, mask in zip(packed, crops, (masks, None), strict=True):
        if kind == "per length":
            alone = [network.tokens(images, mask)]
        else:
            singles = [None if mask is None else mask[i : i + 1] for i in range(len(images))]
            alone = [network.tokens(images[i : i + 1], single) for i, single in enumerate(singles)]
        for name in ("class_token", "registers", "patches"):
            expected = torch.cat([getattr(one, name) for one in alone])
            torch.testing.assert_close(getattr(tokens, name), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_crops_are_the_sum_of_those_alone() -> None:
    packed, alone = model(), model()
    crops = [torch.randn(3, 3, 32, 32), torch.randn(5, 3, 16, 16)]
    sum(tokens.class_token.square().sum() for tokens in packed.packed(crops)).backward()  # type: ignore[union-attr]
    for images in crops:
        alone(images).square().sum().backward()
    for (name, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_branch_computes_the_kept_sequences_alone_and_scales_them_up() -> None:
    layout = Layout((4, 3), (5, 2))
    x = torch.randn(sum(layout.tokens), 6)
    keep = ([0, 3], [1])
    rows = [s * 5 + t for s in keep[0] for t in range(5)] + [20 + s * 2 + t for s in keep[1] for t in range(2)]
    seen: list[int] = []

    def branch(y: torch.Tensor, part: Layout) -> torch.Tensor:
        seen.append(len(y))
        assert part == Layout((2, 1), (5, 2))
        return y.sin()

    got = add_branch(x, branch, layout, Kept(torch.tensor(rows), Layout((2, 1), (5, 2)), (2.0, 3.0)))
    expected = x.clone()
    expected[rows[:10]] += 2 * x[rows[:10]].sin()
    expected[rows[10:]] += 3 * x[rows[10:]].sin()
    torch.testing.assert_close(got, expected)
    assert seen == [12], "dropped sequences cost nothing"


def test_another_attention_may_take_the_place_of_the_reference() -> None:
    network, images = model(), torch.randn(2, 3, 32, 32)

    def by_hand(qkv: torch.Tensor, layout: Layout) -> torch.Tensor:
        outputs, start = [], 0
        for count, length in zip(*layout, strict=True):
            for _ in range(count):
                q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)
                outputs.append(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1))
                start += length
        return torch.cat(outputs)

    expected = network.tokens(images).patches
    network.use_attention(by_hand)
    torch.testing.assert_close(network.tokens(images).patches, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_network_returns_logits_of_class_tokens_and_chosen_patches(tied: bool) -> None:
    torch.manual_seed(0)
    head = HeadConfig(hidden=16, bottleneck=8, prototypes=24)
    network = Network(TINY, head, None if tied else HeadConfig(hidden=16, bottleneck=4, prototypes=12))
    crops, where = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)], torch.tensor([0, 17, 63])
    out = network(crops, where)
    patches = network.backbone.tokens(crops[0]).patches.flatten(0, 1)[where]
    torch.testing.assert_close(out.ibot, (network.dino_head if tied else network.ibot_head)(patches))
    torch.testing.assert_close(out.dino[1], network.dino_head(network.backbone(crops[1])))
    assert [tuple(x.shape) for x in (*out.dino, out.class_tokens)] == [(4, 24), (6, 24), (4, 32)]
    unit = torch.nn.functional.normalize(network.dino_head.mlp(out.class_tokens), dim=-1)
    cosine = torch.nn.functional.cosine_similarity(unit[:, None], network.dino_head.last_layer.direction[None], dim=-1)
    torch.testing.assert_close(out.dino[0], cosine)  # lengths are 1 at first
