"""Models: vectors depend on the image alone, adapters agree with the libraries they wrap, errors are sentences."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from curation.errors import UserError
from embeddings import weights
from embeddings.models import registry
from embeddings.preprocessing import Preparation
from tests.embeddings.pictures import scene
from training.model import VisionTransformer, VisionTransformerConfig

HERE = Path(__file__).parent
needs_mobilenet = pytest.mark.skipif(not weights.is_present("mobilenet_v2"), reason="weights not fetched: make setup")


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def pictures(model: registry.ImageModel, count: int) -> np.ndarray:
    return np.stack([model.prepare(np.asarray(scene(k, (80 + k, 60)))) for k in range(count)])


@pytest.mark.parametrize("name", ["sscd", "sscd_distilled"])
def test_copy_model_gives_equal_bits_at_any_batch_size(name: str) -> None:
    model = registry.load(name, "cpu")
    images = pictures(model, 3)
    whole = model.embed(images)
    assert whole.shape == (3, model.dimension) and whole.dtype == np.float32
    single = np.concatenate([model.embed(images[k : k + 1]) for k in range(3)])
    np.testing.assert_array_equal(whole, single)
    np.testing.assert_array_equal(registry.embed_rows(model, images), whole)


def test_copy_model_knows_copies_from_others() -> None:
    model = registry.load("sscd", "cpu")
    original = Image.open(HERE / "mona_lisa.jpg").convert("RGB")
    small = original.resize((original.width // 2, original.height // 2))
    prepared = [model.prepare(np.asarray(image)) for image in (original, small, scene(3, original.size))]
    first, copy, other = registry.embed_rows(model, np.stack(prepared))
    assert cosine(first, copy) > 0.9
    assert cosine(first, other) < 0.5


@needs_mobilenet
def test_mobilenet_agrees_with_torchvision_whatever_the_batch() -> None:
    from torchvision.models import mobilenet_v2
    from torchvision.transforms.functional import normalize, to_tensor

    model = registry.load("mobilenet_v2", "cpu")
    images = pictures(model, 3)
    rows = registry.embed_rows(model, images)
    network = mobilenet_v2()
    network.load_state_dict(torch.load(weights.weight_path("mobilenet_v2"), weights_only=True))
    floats = torch.stack([normalize(to_tensor(i), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for i in images])
    with torch.inference_mode():
        expected = network.features.eval()(floats).mean((2, 3)).numpy()
    np.testing.assert_allclose(rows, expected, atol=2e-4)
    alone = np.concatenate([registry.embed_rows(model, images[k : k + 1]) for k in range(3)])
    np.testing.assert_array_equal(rows, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        np.testing.assert_array_equal(rows, registry.embed_rows(model, images))
    finally:
        torch.set_num_threads(threads)


def test_timm_agrees_with_its_own_evaluation() -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    from embeddings.models.timm import Timm

    name = "timm:resnet18.a1_in1k"
    torch.manual_seed(0)
    model = Timm(name, "cpu", pretrained=False)
    torch.manual_seed(0)
    network = timm.create_model("resnet18.a1_in1k", pretrained=False, num_classes=0).eval()
    picture = scene(4, (300, 260))
    theirs = create_transform(**resolve_data_config({}, model=network))
    with torch.inference_mode():
        expected = network(theirs(picture)[None]).numpy()[0]
    row = registry.embed_rows(model, model.prepare(np.asarray(picture))[None])[0]
    assert row.shape == (model.dimension,) == (512,)
    assert cosine(row, expected) > 0.9999
    assert model.identity["preprocessing"]["resize"] == int(224 / 0.95)


def test_open_clip_agrees_with_its_own_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    from open_clip import pretrained

    tower = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {"made": pretrained._pcfg(url="none")})
    torch.manual_seed(0)
    theirs, _, transform = open_clip.create_model_and_transforms("tiny-clip", pretrained=None)
    file = tmp_path / "tiny.pt"
    torch.save(theirs.state_dict(), file)
    monkeypatch.setattr(pretrained, "download_pretrained", lambda *_, **__: str(file))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    model = registry.load("open_clip:tiny-clip/made", "cpu")
    picture = scene(5, (100, 70))
    with torch.inference_mode():
        expected = theirs.eval().encode_image(transform(picture)[None]).numpy()[0]
    row = registry.embed_rows(model, model.prepare(np.asarray(picture))[None])[0]
    assert row.shape == (24,)
    assert cosine(row, expected) > 0.999


def test_torchscript_release_is_run_as_it_is(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 512)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.head(images.mean((2, 3))))

    torch.manual_seed(0)
    network = Network()
    path = tmp_path / "sscd_disc_mixup.torchscript.pt"
    torch.jit.script(network).save(str(path))
    model = registry.load(f"sscd:{path}", "cpu")
    image = model.prepare(np.asarray(scene(6)))
    assert image.shape == (320, 320, 3)
    scaled = (torch.from_numpy(image.copy()).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    expected = network(scaled.permute(2, 0, 1)[None]).detach().numpy()
    np.testing.assert_allclose(registry.embed_rows(model, image[None]), expected, atol=1e-5)
    assert model.identity == registry.identity(f"sscd:{path}")
    assert str(tmp_path) not in json.dumps(model.identity)


def checkpoint(folder: Path, **settings: Any) -> VisionTransformer:
    """A tiny checkpoint on disk."""
    torch.manual_seed(0)
    config = VisionTransformerConfig(
        image_size=28, patch_size=14, width=32, depth=2, heads=2, registers=2, layer_scale=1.0
    )
    network = VisionTransformer(config).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": config.to_dict(), **settings}))
    return network


def test_checkpoint_of_our_own_gives_its_class_token(tmp_path: Path) -> None:
    network = checkpoint(tmp_path / "step-10", preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1]})
    name = f"checkpoint:{tmp_path / 'step-10'}"
    model = registry.load(name, "cpu")
    image = model.prepare(np.asarray(scene(7)))
    assert image.shape == (28, 28, 3) and model.identity == registry.identity(name)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255).numpy()
    np.testing.assert_allclose(registry.embed_rows(model, image[None]), expected, atol=1e-5)
    (tmp_path / "step-10" / "config.json").write_text(json.dumps({"model": {"width": 64, "depth": 2, "heads": 2}}))
    with pytest.raises(UserError, match="do not fit"):
        registry.check(name)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("resnet", 2, "unknown; known: sscd"),
        ("timm:no_such_model", 2, "timm has no architecture"),
        ("timm:resnet18.nonsense", 2, "no pretrained weights of that name"),
        ("timm:vit_small_patch14_dinov2.lvd142m", 1, "without a network these work here: .*sscd"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", 1, "without a network these work here: .*sscd"),
        ("open_clip:ViT-B-32/nonsense", 2, "no weights `nonsense`"),
        ("open_clip:Nonsense/openai", 2, "no architecture `Nonsense`"),
        ("open_clip:ViT-B-32", 2, "ARCH/PRETRAINED"),
        ("sscd:absent.torchscript.pt", 2, "does not exist"),
        ("checkpoint:absent", 2, "no model.safetensors"),
    ],
)
def test_model_that_is_not_to_be_had_is_one_sentence(
    name: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot reach the hub")

    import open_clip
    import timm

    monkeypatch.setattr(timm, "create_model", no_network)
    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(UserError, match=words) as caught:
        registry.check(name)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_missing_copy_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from embeddings.models import sscd

    monkeypatch.setattr(sscd, "installed", lambda: False)
    with pytest.raises(UserError, match=r"lvd-curate\[sscd\]") as caught:
        registry.check("sscd")
    assert caught.value.exit_code == 1
    assert "sscd" not in registry.offline_models()


def test_names_make_folders() -> None:
    assert registry.slug("mobilenet_v2") == "mobilenet_v2"
    assert registry.slug("open_clip:ViT-B-32/laion2b_s34b_b79k") == "open_clip-vit-b-32-laion2b_s34b_b79k"
    assert registry.slug("timm:vit_small_patch14_dinov2.lvd142m") == "timm-vit_small_patch14_dinov2.lvd142m"
    assert registry.slug("checkpoint:/data/run 3/step-100/") == "checkpoint-step-100"
    of_a_training = "checkpoint:runs/tiny/pretrain/checkpoints/step-000000500/model"
    assert registry.slug(of_a_training) == "checkpoint-tiny-pretrain-step-000000500"
    assert registry.slug(f"{of_a_training}-small") == "checkpoint-tiny-pretrain-step-000000500-small"
    assert "/" not in registry.slug("sscd:../../x")


def test_preparation_is_known_without_weights() -> None:
    dinov2 = registry.preparation("timm:vit_small_patch14_dinov2.lvd142m")
    assert dinov2 == Preparation("crop", 518, resize=518, interpolation="bicubic")
    assert registry.preparation("sscd").shape == (320, 320, 3)
    assert registry.preparation("open_clip:ViT-B-32/openai").size == 224
