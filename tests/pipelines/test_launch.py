"""A training on Ray Train's workers is the training of one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from curation.errors import UserError
from pipelines import launch
from tests.training.tiny import tiny
from training.config import TrainConfig
from training.loop import train


def configuration(folder: Path, output: str) -> TrainConfig:
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        random = np.random.default_rng(0)
        for number in range(12):
            Image.fromarray(random.integers(0, 255, (24, 24, 3)).astype(np.uint8)).save(images / f"{number}.png")
    data = {"source": str(images), "index_folder": str(folder / "index")}
    return tiny(folder / output, steps=3, data=data)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "pretrain/log.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_two_workers_of_ray_train_compute_what_one_process_does(tmp_path: Path) -> None:
    result = launch.train(configuration(tmp_path, "ray"), 2, None)
    assert (result.step, result.stopped) == (3, False)
    train(configuration(tmp_path, "here"))
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "here"), rel=1e-5)


def test_a_worker_leaves_its_result_or_the_sentence_of_its_error(tmp_path: Path) -> None:
    document = configuration(tmp_path, "here").model_dump(mode="json")
    launch.work(document)
    found = json.loads((tmp_path / "here" / launch.RESULT).read_text())
    assert found["step"] == 3 and len(losses(tmp_path / "here")) == 3
    launch.work(document | {"batch_size": 8})
    found = json.loads((tmp_path / "here" / launch.RESULT).read_text())
    assert "another training (batch_size differs)" in found["error"] and found["exit_code"] == 2


def test_a_job_that_cannot_be_submitted_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9: the job server did not answer"):
        launch.submit(configuration(tmp_path, "ray"), "train", 2, "http://127.0.0.1:9")


def test_a_cluster_that_wants_a_token_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import job_submission
    from ray.exceptions import AuthenticationError

    def refuse(address: str) -> None:
        raise AuthenticationError("Missing authentication token")

    monkeypatch.setattr(job_submission, "JobSubmissionClient", refuse)
    with pytest.raises(UserError, match=r"wants its token: set RAY_AUTH_MODE=token"):
        launch.submit(configuration(tmp_path, "ray"), "train", 2, "http://127.0.0.1:9")


def test_a_submitted_training_finds_its_images_from_the_folder_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(launch.submission, "submit", lambda *asked, run: sent.append(asked) or "job")
    config = configuration(tmp_path, "ray")
    relative = config.model_copy(
        update={"output": "made/here", "data": config.data.model_copy(update={"source": "images"})}
    )
    monkeypatch.chdir(tmp_path)
    assert launch.submit(relative, "train", 2, "http://head:8265") == "job"
    document = yaml.safe_load(sent[0][2]["train.yaml"])
    assert document["output"] == f"{tmp_path}/made/here" and document["data"]["source"] == f"{tmp_path}/images"
    assert document["data"]["index_folder"] == str(tmp_path / "index")
    assert " ".join(sent[0][1]) == "train --config train.yaml --launcher ray --processes 2 --ray-address auto"
