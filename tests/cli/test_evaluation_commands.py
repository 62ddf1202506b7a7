"""`curate evaluate`, `curate export` and `curate pack` as a user types them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from cli import evaluation
from tests.training.data.manifests import picture, write_manifest
from training import export
from training.model import VisionTransformer, VisionTransformerConfig

runner = CliRunner()
app = typer.Typer()
evaluation.register(app)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def labelled(folder: Path, count: int) -> str:
    for i in range(count):
        name = ("dark", "light")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 90, (30, 30, 3)) + 150 * (i % 2)
        sink = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(sink, "PNG")
        (folder / name / f"{i}.png").write_bytes(sink.getvalue())
    return str(folder)


def checkpoint(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    shape = VisionTransformerConfig(image_size=28, patch_size=14, width=32, depth=1, heads=2, layer_scale=1.0)
    export.write(VisionTransformer(shape), {"size": 28}, "checkpoint", str(folder))
    return str(folder)


def test_models_and_checkpoints_are_evaluated_side_by_side(tmp_path: Path) -> None:
    train, test = labelled(tmp_path / "train", 24), labelled(tmp_path / "test", 10)
    for step in (10, 20):
        checkpoint(tmp_path / f"checkpoints/step-{step:09d}/model", step)
    models = [str(tmp_path / "checkpoints"), f"random:{tmp_path}/checkpoints/step-000000010/model", "pixels"]
    out, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    sets = ["--train", train, "--test", test, "--probes", "knn,retrieval"]
    ran = runner.invoke(app, ["evaluate", *models, *sets, "--out", str(out), "--plot", str(plot)])
    assert ran.exit_code == 0, ran.output
    results = json.loads(out.read_text())["results"]
    assert [result["step"] for result in results] == [10, 20, None, None]
    for result in results:
        figure = result["knn"]["accuracy_k10"]
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] == 10
    assert plot.read_text().startswith("<svg") and "pixels" in plot.read_text()
    assert len(ran.output.strip().splitlines()) == 4


def test_an_export_is_read_again_and_says_where_it_is_exact(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    for layout in ("hf", "timm"):
        ran = runner.invoke(app, ["export", model, "--layout", layout, "--out", str(tmp_path / layout), "--json"])
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)["exact_at_other_sizes"] is (layout == "timm")
    back = runner.invoke(app, ["export", str(tmp_path / "hf"), "--out", str(tmp_path / "back")])
    assert back.exit_code == 0, back.output
    first, second = export.read(model)[0], export.read(str(tmp_path / "back"))[0]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_a_manifest_is_packed_and_packed_again_does_nothing(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m", [picture(i) for i in range(20)])
    command = ["pack", manifest, "--out", str(tmp_path / "packed"), "--shard-gigabytes", "0.0001"]
    first = runner.invoke(app, [*command, "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["images"] == 20
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").glob("*.tar")}
    assert runner.invoke(app, command).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").glob("*.tar")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "pixels", "--train", "{}/none", "--test", "{}/none"], "not there"),
        (["evaluate", "pixels", "--train", "{}", "--test", "{}"], "no image files"),
        (["evaluate", "resnet9", "--train", "{}", "--test", "{}"], "model `resnet9` is unknown"),
        (["export", "{}", "--out", "{}/out"], "no model.safetensors there"),
        (["export", "{}", "--out", "{}/out", "--layout", "onnx"], "no model.safetensors there"),
        (["pack", "{}/none", "--out", "{}/out"], "not there"),
        (["pack", "{}", "--out", "{}/out", "--sampling", "clusters"], "uniform or weight"),
    ],
)
def test_errors_are_sentences(tmp_path: Path, arguments: list[str], words: str) -> None:
    ran = runner.invoke(app, [argument.replace("{}", str(tmp_path)) for argument in arguments])
    assert ran.exit_code in (1, 2)
    assert words in " ".join(ran.output.split()), ran.output
    assert "Traceback" not in ran.output
