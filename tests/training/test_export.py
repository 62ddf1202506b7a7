"""Exports load in timm and in Hugging Face and give the same tokens; theirs load here, and come back to the bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from curation.errors import UserError
from embeddings.models import registry
from training import export
from training.model import VisionTransformer, VisionTransformerConfig

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 3},
    "swiglu": {"feed_forward": "swiglu"},
    "swiglu and registers": {"feed_forward": "swiglu", "registers": 4},
    "patch 16": {"patch_size": 16, "image_size": 48},
}


def backbone(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": 42, "patch_size": 14, "width": 96, "depth": 2, "heads": 4} | options
    made = VisionTransformer(VisionTransformerConfig(**shape)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def sizes(model: VisionTransformer) -> tuple[tuple[int, int], tuple[int, int]]:
    patch, native = model.config.patch_size, model.config.image_size
    return (native, native), (native + 2 * patch, native - patch)


def tokens(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    found = model.tokens(images)
    return torch.cat([found.class_token[:, None], found.registers, found.patches], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_timm_loads_an_export_and_its_weights_come_back(shape: str, tmp_path: Path) -> None:
    ours = backbone(**SHAPES[shape])
    about = export.write(ours, {"size": 42}, "timm", str(tmp_path / "timm"))
    assert about["exact_at_other_sizes"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    back, _ = export.read(str(tmp_path / "timm"))
    for size in sizes(ours):
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = tokens(ours, images)
            torch.testing.assert_close(theirs.forward_features(images), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens(back, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_loads_an_export_and_it_comes_back_to_the_bit(shape: str, tmp_path: Path) -> None:
    import transformers

    mode = "timm" if "registers" in shape else "hf"
    ours = backbone(**SHAPES[shape], position_interpolation=mode)
    assert export.write(ours, {"size": 42}, "hf", str(tmp_path / "hf"))["exact_at_other_sizes"]
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if "registers" in shape else "Dinov2Model")
    for size in sizes(ours):
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = tokens(ours, images)
            torch.testing.assert_close(theirs(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    back, _ = export.read(str(tmp_path / "again"))
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.config == ours.config or (back.config.layer_scale, ours.config.layer_scale) == (1e-5, None)


def test_a_model_without_layer_scale_is_the_same_in_both_layouts(tmp_path: Path) -> None:
    ours = backbone(layer_scale=None)
    images = torch.randn(1, 3, 42, 42)
    for layout in ("timm", "hf"):
        export.write(ours, {}, layout, str(tmp_path / layout))
        back, _ = export.read(str(tmp_path / layout))
        torch.testing.assert_close(tokens(back, images), tokens(ours, images), atol=1e-5, rtol=1e-5)


def test_the_mode_of_positions_is_stored_and_said_where_a_library_has_another(tmp_path: Path) -> None:
    ours = backbone(position_interpolation="dinov2")
    for layout in ("timm", "hf"):
        assert not export.write(ours, {}, layout, str(tmp_path / layout))["exact_at_other_sizes"]
        assert json.loads((tmp_path / layout / "config.json").read_text())["position_interpolation"] == "dinov2"
    export.write(ours, {}, "checkpoint", str(tmp_path / "ours"))
    assert export.read(str(tmp_path / "ours"))[0].config == ours.config


def test_released_weights_of_each_layout_are_recognised(tmp_path: Path) -> None:
    ours = backbone(width=128, heads=2)
    plain = ours.state_dict()
    torch.save(plain, tmp_path / "dinov2.pth")  # Meta's release has our names
    back, preprocessing = export.read(str(tmp_path / "dinov2.pth"))
    assert back.config.position_interpolation == "dinov2" and back.config.heads == 2
    assert (preprocessing["size"], preprocessing["resize"]) == (224, 256)
    theirs = timm.create_model(
        "vit_small_patch14_dinov2", embed_dim=128, num_heads=2, depth=1, img_size=42, num_classes=7
    )
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    back, _ = export.read(str(tmp_path / "timm.safetensors"))
    images = torch.randn(1, 3, 42, 42)
    torch.testing.assert_close(tokens(back, images), theirs.eval().forward_features(images), atol=1e-5, rtol=1e-5)


def test_an_export_embeds(tmp_path: Path) -> None:
    ours = backbone()
    export.write(ours, {"size": 28, "resize": 32}, "checkpoint", str(tmp_path / "model"))
    model = registry.load(f"checkpoint:{tmp_path / 'model'}", "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    prepared = model.prepare(pixels)
    assert prepared.shape == (28, 28, 3)
    vector = registry.embed_rows(model, prepared[None])[0]
    mean, std = (torch.tensor(export.PREPROCESSING[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    images = (torch.from_numpy(prepared.copy()).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.inference_mode():
        np.testing.assert_allclose(vector, ours(images)[0].numpy(), atol=1e-4)


def test_the_student_of_a_checkpoint_can_be_had(tmp_path: Path) -> None:
    ours = backbone()
    export.write(ours, {}, "checkpoint", str(tmp_path))
    other = {name: value + 1 for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(other, tmp_path / "student.safetensors")
    student, _ = export.read(str(tmp_path), student=True)
    torch.testing.assert_close(student.cls_token, ours.cls_token + 1)


def test_what_is_no_backbone_is_one_sentence(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"no")
    (tmp_path / "code.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    (tmp_path / "empty").mkdir()
    export.write(backbone(), {}, "checkpoint", str(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours/config.json").read_text())
    config["model"]["width"] = 64
    (tmp_path / "ours/config.json").write_text(json.dumps(config))
    for name, sentence in (
        ("resnet.safetensors", "not the weights of a DINOv2 backbone"),
        ("noise.safetensors", "cannot be read as weights"),
        ("code.pth", "nothing of it was run"),
        ("empty", "no model.safetensors there"),
        ("ours", "not a backbone that this version knows"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            export.read(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="layout `onnx` is unknown"):
        export.write(backbone(), {}, "onnx", str(tmp_path / "x"))
