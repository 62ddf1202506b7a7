"""`curate train` and `curate distill` on a folder of images; one sentence for what a user can cause."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from cli.main import app
from tests.training.tiny import TINY, figures
from training.config import merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(16):
        pixels = np.kron(random.integers(0, 255, (4, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def configuration(tmp_path: Path, images: Path) -> Path:
    data = {"source": str(images), "index_folder": str(tmp_path / "index")}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(merge(TINY, {"data": data, "output": str(tmp_path / "out"), "steps": 4})))
    return path


def curate(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_trains_resumes_and_distils(configuration: Path, tmp_path: Path) -> None:
    first = curate("train", "--config", configuration, "--json")
    assert first.exit_code == 0, first.output
    document = json.loads(first.stdout)
    assert document["step"] == 4 and len(figures(tmp_path / "out")) == 4
    again = curate("train", "--config", configuration, "--json")
    assert json.loads(again.stdout)["models"] == document["models"] and len(figures(tmp_path / "out")) == 4
    students = {"one": TINY["model"] | {"width": 8}}
    distil = tmp_path / "distil.yaml"
    document = yaml.safe_load(configuration.read_text())
    distil.write_text(yaml.safe_dump(document | {"distill": {"teacher": "?", "students": students}}))
    weights = json.loads(first.stdout)["models"][0]
    done = curate("distill", "--config", distil, "--teacher", weights, "--out", tmp_path / "s", "--steps", 3, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["models"] == [str(tmp_path / "s/distill/checkpoints/step-000000003/model-one")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "none"], "--config none: no such file; shipped are .*tiny.*vit-g14"),
        (["--config", "{c}", "--set", "schedule.rate=1"], r"schedule\.rate: unknown key"),
        (["--config", "{c}", "--set", "batch_size"], "expected KEY=VALUE"),
        (["--config", "{c}", "--batch-size", "24"], "16 images, fewer than one global batch of 24"),
        (["--config", "{c}", "--manifest", "{e}"], "{e}"),
        (["--config", "{c}", "--set", "accumulate=5"], "cannot be cut into"),
        (["--config", "{c}", "--set", "initial=/nowhere"], "/nowhere: not a folder `model` of a checkpoint"),
        (["--config", "{c}", "--launcher", "slurm"], "there are local and ray"),
        (["--config", "{c}", "--set", "parallel.replicate=2"], "replicate 2 does not divide 1 processes"),
    ],
)
def test_bad_input_is_one_sentence(configuration: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    told = [a.format(c=configuration, e=empty) for a in arguments]
    result = curate("train", *told)
    assert result.exit_code == 2, result.output
    error = " ".join(result.stderr.split())
    assert error.count("error:") == 1 and "Traceback" not in error
    import re

    assert re.search(sentence.format(e=re.escape(str(empty))) if "{e}" in sentence else sentence, error), error


def test_a_key_that_is_not_known_is_told_with_its_line(configuration: Path) -> None:
    configuration.write_text(configuration.read_text() + "losses:\n  koleo: 1\n")
    result = curate("train", "--config", configuration)
    lines = configuration.read_text().splitlines()
    assert "losses.koleo: unknown key" in result.stderr.replace("\n", " ")
    assert f"line {lines.index('  koleo: 1') + 1}" in " ".join(result.stderr.split())


def test_a_configuration_without_students_is_not_a_distillation(configuration: Path) -> None:
    result = curate("distill", "--config", configuration)
    assert result.exit_code == 2 and "has no block `distill`" in " ".join(result.stderr.split())
