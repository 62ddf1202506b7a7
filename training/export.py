"""Backbones as folders that other libraries load, and theirs as ours: safetensors and a config.json.

Layouts: `checkpoint` (ours: what `curate embed --model checkpoint:FOLDER` and `curate evaluate` read), `timm`
(`timm.create_model("local-dir:FOLDER", pretrained=True)`) and `hf` (`Dinov2Model.from_pretrained(FOLDER)`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from curation import storage
from curation.errors import UserError
from training.layouts import State, from_any, to_hugging_face, to_timm
from training.model import VisionTransformer, VisionTransformerConfig

WEIGHTS, STUDENT, CONFIG = "model.safetensors", "student.safetensors", "config.json"
LAYOUTS = ("checkpoint", "timm", "hf")
PREPROCESSING = {"size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""DINOv2's evaluation: what released weights are used with."""


def read(path: str, *, student: bool = False) -> tuple[VisionTransformer, dict[str, Any]]:
    """A backbone and its preprocessing, from a folder or file of any layout; Meta's .pth as well.

    student: of a checkpoint of ours the student, in place of the average. Raises UserError for another model's weights.
    """
    document: dict[str, Any] = {}
    weights = path
    if not path.endswith((".safetensors", ".pth", ".pt", ".bin")):
        weights = storage.join(path, STUDENT if student else WEIGHTS)
        document = _document(storage.join(path, CONFIG))
    if not storage.exists(weights):
        raise UserError(
            f"{path}: no {weights.rsplit('/', 1)[-1]} there; give the folder `model` of a checkpoint, or released "
            "weights in the layout of timm, Hugging Face or Meta"
        )
    state = _tensors(weights)
    try:
        if isinstance(document.get("model"), dict):
            config = VisionTransformerConfig(**document["model"])
        else:
            state, config = from_any(state, _heads(document))
            told = {key: document[key] for key in ("position_interpolation", "position_offset") if key in document}
            config = replace(config, **told)
        backbone = VisionTransformer(config)
        backbone.load_state_dict(state)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{weights}: not a backbone that this version knows ({reason})") from error
    except UserError as error:
        raise UserError(f"{weights}: {error}") from error
    settings = dict(document.get("preprocessing", {}))
    if "size" in settings:
        settings.setdefault("resize", int(settings["size"]) * 8 // 7)
    return backbone.eval(), PREPROCESSING | settings


def write(backbone: VisionTransformer, preprocessing: dict[str, Any], layout: str, out: str) -> dict[str, Any]:
    """Write the folder `out`, its config.json last. Returns what was written and what it is exact for."""
    if layout not in LAYOUTS:
        raise UserError(f"layout `{layout}` is unknown; known: {', '.join(LAYOUTS)}")
    config = backbone.config
    settings = PREPROCESSING | {"resize": int(preprocessing.get("size", 224)) * 8 // 7} | preprocessing
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    files: dict[str, dict[str, Any]] = {}
    if layout == "checkpoint":
        document = {"model": config.to_dict(), "preprocessing": settings}
    elif layout == "timm":
        state, document = to_timm(state, config), timm_document(config, settings)
    else:
        state, document = to_hugging_face(state, config), hugging_face_document(config)
        files["preprocessor_config.json"] = _processor(settings)
    if layout != "checkpoint":
        document["position_interpolation"] = config.position_interpolation
        document["position_offset"] = config.position_offset
    data = save({name: value.contiguous().clone() for name, value in state.items()}, {"format": "pt"})
    storage.write_whole(storage.join(out, WEIGHTS), data)
    for name, content in (files | {CONFIG: document}).items():
        storage.write_whole(storage.join(out, name), (json.dumps(content, indent=1) + "\n").encode())
    own = {"timm": "timm", "hf": "timm" if config.registers else "hf"}.get(layout, config.position_interpolation)
    return {
        "out": out,
        "layout": layout,
        "parameters": sum(value.numel() for value in state.values()),
        "image_size": config.image_size,
        "position_interpolation": config.position_interpolation,
        "exact_at_other_sizes": own == config.position_interpolation,
    }


def timm_document(config: VisionTransformerConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json: an architecture of the family, and arguments that give it our shape."""
    swiglu = config.feed_forward == "swiglu"
    architecture = (
        ("vit_giant" if swiglu else "vit_small") + "_patch14_" + ("reg4_" if config.registers else "") + "dinov2"
    )
    hidden = _hidden(config)
    size = int(settings["size"])
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.width,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.channels,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": ((2 if swiglu else 1) * hidden + 0.5) / config.width,  # timm rounds the product down
            "init_values": config.layer_scale,
            "reg_tokens": config.registers,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [config.channels, config.image_size, config.image_size],
            "interpolation": "bicubic",
            "crop_pct": round(size / settings["resize"], 4),
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hugging_face_document(config: VisionTransformerConfig) -> dict[str, Any]:
    """Hugging Face's config.json. Raises UserError for a shape that theirs cannot have."""
    kind = "Dinov2WithRegisters" if config.registers else "Dinov2"
    if config.mlp_ratio != int(config.mlp_ratio):
        raise UserError(
            f"Hugging Face's {kind} takes a whole mlp_ratio, not {config.mlp_ratio}; export in timm's layout"
        )
    return {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if config.registers else "dinov2",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": int(config.mlp_ratio),
        "hidden_act": "gelu",
        "use_swiglu_ffn": config.feed_forward == "swiglu",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "layerscale_value": 1.0 if config.layer_scale is None else config.layer_scale,
        "layer_norm_eps": 1e-6,
        **({"num_register_tokens": config.registers} if config.registers else {}),
        "dtype": "float32",
    }


def _processor(settings: dict[str, Any]) -> dict[str, Any]:
    size = int(settings["size"])
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(settings["resize"])},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }


def _hidden(config: VisionTransformerConfig) -> int:
    hidden = int(config.width * config.mlp_ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if config.feed_forward == "swiglu" else hidden


def _heads(document: dict[str, Any]) -> int | None:
    found = document.get("num_attention_heads") or document.get("model_args", {}).get("num_heads")
    return int(found) if found else None


def _document(path: str) -> dict[str, Any]:
    if not storage.exists(path):
        return {}
    try:
        found = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _tensors(path: str) -> State:
    try:
        if path.endswith(".safetensors"):
            return dict(load(storage.read_bytes(path)))
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as weights ({str(error).splitlines()[0][:200]})") from error
    except Exception as error:  # pickle's own, for anything but tensors
        raise UserError(f"{path}: holds more than tensors, or is no file of weights; nothing of it was run") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    return found
