"""The Vision Transformer gives what timm's DINOv2 gives from the same weights."""

from typing import Any

import pytest
import timm
import torch

from training.model import VisionTransformer, VisionTransformerConfig


def pair(name: str, theirs_only: dict[str, Any], **options: Any) -> tuple[Any, VisionTransformer]:
    """timm's network with random weights, and ours with the same."""
    torch.manual_seed(0)
    shape = {"img_size": 70, "dynamic_img_size": True, "depth": 2}
    theirs = timm.create_model(name, pretrained=False, num_classes=0, **shape, **theirs_only).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = VisionTransformer(VisionTransformerConfig(image_size=70, depth=2, **options)).eval()
    state = {key.replace("reg_token", "register_tokens"): value for key, value in theirs.state_dict().items()}
    if ours.config.feed_forward == "swiglu":
        state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()}
    if state["pos_embed"].shape[1] == 25:  # with registers timm has already added the class token's position
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, ours.config.width), state["pos_embed"]], 1)
    ours.load_state_dict({**state, "mask_token": torch.zeros(1, ours.config.width)})
    return theirs, ours


SMALL = {"embed_dim": 96, "num_heads": 4, "mlp_ratio": 4 * 2 / 3 * 2}


@pytest.mark.parametrize(
    ("name", "theirs_only", "options"),
    [
        ("vit_small_patch14_dinov2", {}, {}),
        ("vit_small_patch14_reg4_dinov2", {}, {"registers": 4}),
        ("vit_giant_patch14_dinov2", SMALL, {"feed_forward": "swiglu", "width": 96, "heads": 4}),
    ],
)
@pytest.mark.parametrize("size", [(70, 70), (98, 56)])
def test_tokens_agree_with_timm(
    name: str, theirs_only: dict[str, Any], options: dict[str, Any], size: tuple[int, int]
) -> None:
    theirs, ours = pair(name, theirs_only, **options)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = theirs.forward_features(images)
        got = ours.tokens(images)
    found = torch.cat([got.class_token[:, None], got.registers, got.patches], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(images), got.class_token)


def test_masked_patches_do_not_see_their_pixels() -> None:
    model = VisionTransformer(
        VisionTransformerConfig(image_size=28, width=32, depth=1, heads=2, layer_scale=1.0)
    ).eval()
    images = torch.randn(1, 3, 28, 28)
    other = images.clone()
    other[..., :14, :14] = 0
    masks = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(model.tokens(images, masks).patches, model.tokens(other, masks).patches)
    assert not torch.allclose(model.tokens(images).patches, model.tokens(other).patches)
