"""The names of a backbone's tensors in Meta's release (ours), in timm and in Hugging Face's Dinov2, and ways between.

timm adds the class token's position to the class token where there are registers, and has no mask token; Hugging Face
splits the joint projection of attention in three. Both keep the arithmetic, but for positions at other sizes
(`VisionTransformerConfig.position_interpolation`).
"""

import re
from typing import Any

import torch
from torch import Tensor

from curation.errors import UserError
from training.model import VisionTransformerConfig

State = dict[str, Tensor]

HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
"""Ours to theirs, of what is outside and inside blocks; the files of transformers 4 and 5 have these names."""
TIMM_SWIGLU = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}


def to_timm(state: State, config: VisionTransformerConfig) -> State:
    """Our tensors under timm's names."""
    found: State = {}
    for name, value in state.items():
        if name == "mask_token":
            continue
        key = name.replace("register_tokens", "reg_token")
        if config.feed_forward == "swiglu":
            key = _renamed(key, TIMM_SWIGLU)
        found[key] = value
    if config.registers:
        found["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        found["pos_embed"] = state["pos_embed"][:, 1:]
    return found


def to_hugging_face(state: State, config: VisionTransformerConfig) -> State:
    """Our tensors under Hugging Face's names; LayerScale, which they always have, as ones where we have none."""
    found: State = {}
    for name, value in state.items():
        joint = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if joint:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"encoder.layer.{joint[1]}.attention.attention.{part}.{joint[2]}"] = piece
        elif name.startswith("blocks."):
            found["encoder.layer." + _renamed(name, HUGGING_FACE).removeprefix("blocks.")] = value
        elif name.startswith("norm."):
            found["layer" + name] = value
        else:
            found[_renamed(name, HUGGING_FACE)] = value
    if config.layer_scale is None:
        for block in range(config.depth):
            for scale in ("layer_scale1", "layer_scale2"):
                found[f"encoder.layer.{block}.{scale}.lambda1"] = torch.ones(config.width)
    return found


def layout_of(state: State) -> str:
    """`timm`, `hf` or `dinov2` (ours as well), by the names. Raises UserError for another model's."""
    if any(name.endswith("embeddings.position_embeddings") for name in state):
        return "hf"
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise UserError("these are not the weights of a DINOv2 backbone in the layout of timm, Hugging Face or Meta")
    return "dinov2" if "mask_token" in state else "timm"


def from_any(state: State, heads: int | None = None) -> tuple[State, VisionTransformerConfig]:
    """Tensors in any of the layouts as ours, and the shape they have. heads: width / 64 where nothing says it.

    Raises UserError for another model's tensors.
    """
    layout = layout_of(state)
    ours = {"hf": _from_hugging_face, "timm": _from_timm, "dinov2": dict}[layout](state)
    config = _shape(ours, layout, heads)
    if layout == "timm":
        ours.setdefault("mask_token", torch.zeros(1, config.width))
    return {name: value.float() for name, value in ours.items()}, config


def _from_timm(state: State) -> State:
    found: State = {}
    swiglu = state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    back = {theirs: ours for ours, theirs in TIMM_SWIGLU.items()}
    for name, value in state.items():
        if name.startswith(("head.", "fc_norm.")):
            continue
        key = name.replace("reg_token", "register_tokens")
        found[_renamed(key, back) if swiglu else key] = value
    if round((found["pos_embed"].shape[1]) ** 0.5) ** 2 == found["pos_embed"].shape[1]:  # added to the class token
        found["pos_embed"] = torch.cat([torch.zeros_like(found["cls_token"]), found["pos_embed"]], 1)
    return found


def _from_hugging_face(state: State) -> State:
    found: State = {}
    back = {theirs: ours for ours, theirs in HUGGING_FACE.items()}
    joint: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        key = re.sub(r"^(dinov2|dinov2_with_registers|backbone)\.", "", name)
        part = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", key)
        if part:
            joint.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = value
        elif key.startswith("encoder.layer."):
            found["blocks." + _renamed(key.removeprefix("encoder.layer."), back)] = value
        elif key.startswith("layernorm."):
            found[key.removeprefix("layer")] = value
        elif key.startswith("embeddings."):
            found[_renamed(key, back)] = value
    return found | {name: torch.cat([parts[p] for p in ("query", "key", "value")]) for name, parts in joint.items()}


def _shape(state: State, layout: str, heads: int | None) -> VisionTransformerConfig:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    ratio = (
        4.0 if swiglu and (int(width * 4 * 2 / 3) + 7) // 8 * 8 == hidden else hidden / width * (1.5 if swiglu else 1)
    )
    options: dict[str, Any] = {"position_interpolation": "timm"}
    if not registers and layout != "timm":
        options = {"position_interpolation": layout}
    return VisionTransformerConfig(
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        channels=channels,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        heads=heads or max(1, width // 64),
        mlp_ratio=ratio,
        feed_forward="swiglu" if swiglu else "mlp",
        registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        **options,
    )


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}($|\.)", rf"\g<1>{theirs}\g<2>", name)
    return name
