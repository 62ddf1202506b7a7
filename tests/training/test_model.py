"""The Vision Transformer gives what timm's and Hugging Face's DINOv2 give from the same weights."""

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


def from_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their names (transformers 5) to ours; query, key and value become one layer, gate and value too."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        "model.layers.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "down_proj": "w3",
        "layernorm": "norm",
    }
    joined = {"attention.q_proj": "attn.qkv", "attention.k_proj": "attn.qkv", "attention.v_proj": "attn.qkv"}
    joined |= {"gate_proj": "w12", "up_proj": "w12"}
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        ours = key
        for theirs, name in (names | joined).items():
            ours = ours.replace(theirs, name)
        found[ours] = torch.cat([found[ours], value]) if ours in found else value
    return found


@pytest.mark.parametrize(("registers", "feed_forward"), [(0, "mlp"), (4, "swiglu")])
@pytest.mark.parametrize("size", [(70, 70), (98, 56)])
def test_tokens_agree_with_hugging_face(registers: int, feed_forward: str, size: tuple[int, int]) -> None:
    import transformers

    torch.manual_seed(0)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    if registers:
        options["num_register_tokens"] = registers
    config = getattr(transformers, f"{kind}Config")(**options, use_swiglu_ffn=feed_forward == "swiglu")
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shape = {"image_size": 70, "width": 96, "depth": 2, "heads": 4, "registers": registers}
    mode = "timm" if registers else "hf"
    ours = VisionTransformer(
        VisionTransformerConfig(**shape, feed_forward=feed_forward, position_interpolation=mode)  # type: ignore[arg-type]
    ).eval()
    ours.load_state_dict(from_hugging_face(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected, got = theirs(images).last_hidden_state, ours.tokens(images)
    found = torch.cat([got.class_token[:, None], got.registers, got.patches], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_with_an_offset_are_those_of_the_dinov2_release() -> None:
    model = VisionTransformer(VisionTransformerConfig(image_size=70, width=32, heads=2, depth=1))
    modes = {
        mode: VisionTransformer(
            VisionTransformerConfig(image_size=70, width=32, heads=2, depth=1, position_interpolation=mode)  # type: ignore[arg-type]
        )
        for mode in ("timm", "hf", "dinov2")
    }
    for other in modes.values():
        other.load_state_dict(model.state_dict())
    patches = model.pos_embed[:, 1:].reshape(1, 5, 5, 32).permute(0, 3, 1, 2)
    # interpolate_pos_encoding of the release: scale_factor = (side + .1) / grid, bicubic, not antialiased
    expected = torch.nn.functional.interpolate(patches, scale_factor=(7.1 / 5, 4.1 / 5), mode="bicubic")
    assert expected.shape[-2:] == (7, 4)
    torch.testing.assert_close(modes["dinov2"].positions(7, 4)[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 28, 32))
    for one, another in (("timm", "hf"), ("hf", "dinov2")):
        assert (modes[one].positions(7, 4) - modes[another].positions(7, 4)).abs().max() > 1e-4
