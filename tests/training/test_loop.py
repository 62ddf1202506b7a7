"""Trainings of a tiny model: what does not change with processes, interruptions, micro-batches, compile."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curation.errors import UserError
from tests.training.tiny import (
    figures,
    finish,
    hanging_at,
    make_batch,
    run_here,
    start_processes,
    synthetic,
    tiny,
    wait_for,
)
from training import parallel
from training.assembly import assemble
from training.checkpoints import Checkpoints
from training.evaluation import BackboneEncoder, knn_accuracy
from training.loop import train
from training.model import VisionTransformer
from training.schedules import values_at
from training.step import local, train_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption on one process."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(folder)
    return folder


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes, with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("two")
    assert finish(start_processes(2, folder, checkpoints={"every": 3})) == [0, 0]
    return folder


def close(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)


def test_two_processes_compute_what_one_does(on_two: Path, whole: Path) -> None:
    assert len(figures(whole)) == 6
    close(figures(on_two), figures(whole), 1e-5)


def test_a_checkpoint_of_two_processes_goes_on_on_one_and_on_three(on_two: Path, whole: Path, tmp_path: Path) -> None:
    for count in (1, 3):
        folder = tmp_path / str(count)
        shutil.copytree(on_two, folder)
        shutil.rmtree(folder / "pretrain/checkpoints/step-000000006")
        if count == 1:
            run_here(folder)
        else:
            assert finish(start_processes(3, folder, parallel={"replicate": 3})) == [0, 0, 0]
        close(figures(folder), figures(whole), 1e-5)


def test_killed_or_stopped_and_resumed_gives_the_same_losses_to_the_bit(whole: Path, tmp_path: Path) -> None:
    for how, hang_at in ((signal.SIGKILL, 4), (signal.SIGTERM, 2)):
        folder = tmp_path / how.name
        (process,) = start_processes(1, folder, hang_at, checkpoints={"every": 3})
        log, checkpoints = folder / "pretrain/log.jsonl", folder / "pretrain/checkpoints"
        if how == signal.SIGKILL:
            wait_for(lambda checkpoints=checkpoints: (checkpoints / "step-000000003").exists())
        else:
            wait_for(lambda log=log: log.exists() and log.read_text().count("\n") >= 1)
        os.kill(process.pid, how)
        (folder / "release").touch()
        assert finish([process]) == [-how if how == signal.SIGKILL else 128 + how]
        assert 3 <= len(figures(folder)) < 6
        run_here(folder)
        assert figures(folder) == figures(whole)


def test_the_teacher_moves_as_the_momentum_says() -> None:
    config = tiny(checkpoints={"every": 100})
    models = assemble(config, parallel.start())
    learner = models.learners[0]
    before = [local(p).clone() for p in learner.average.parameters()]
    values = values_at(1, config.schedule, config.steps, config.batch_size)
    train_step(models, [make_batch(config, 0, 12)], values, config)
    moved = 0
    for old, average, student in zip(before, learner.average.parameters(), learner.student.parameters(), strict=True):
        expected = values.teacher_momentum * old + (1 - values.teacher_momentum) * local(student)
        torch.testing.assert_close(local(average), expected)
        moved += int(not torch.equal(old, local(average)))
    assert moved > 0.9 * len(before) and models.teacher is learner.average


def test_micro_batches_add_up_where_the_targets_do_not_see_each_other(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 3, "losses": {"centering": "softmax"}}
    run_here(tmp_path / "at once", **changes)
    run_here(tmp_path / "in three", accumulate=3, **changes)
    close(figures(tmp_path / "at once"), figures(tmp_path / "in three"), 1e-4)


def test_recomputing_blocks_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run_here(tmp_path, parallel={"activation_checkpointing": True})
    assert figures(tmp_path) == figures(whole)


def test_bfloat16_is_about_float32(whole: Path, tmp_path: Path) -> None:
    run_here(tmp_path, parallel={"precision": "bfloat16"})
    for mine, theirs in zip(figures(tmp_path), figures(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_batch(tmp_path: Path) -> None:
    def source(config: Any, first: int) -> Any:
        for step, batch in enumerate(synthetic(config, first), first):
            if step == 3:
                batch.global_crops[:] = torch.nan
            yield batch

    with pytest.raises(UserError, match=r"step 4: dino, ibot, koleo is not finite.*last checkpoint is step-000000002"):
        train(tiny(tmp_path, checkpoints={"every": 2}), source=source)
    report = json.loads((tmp_path / "pretrain/failure-step-000000004/process-0.json").read_text())
    assert report["image_ids"] == list(range(1036, 1048)) and "dino" in report["not_finite"]


def test_a_full_disk_while_saving_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    import training.checkpoints as module

    write = module._write

    def full(path: Path, data: bytes) -> None:
        if "step-000000004" in str(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(
        UserError, match=r"step 4 could not be written .*No space left.*complete one is .*step-000000002"
    ):
        run_here(tmp_path, checkpoints={"every": 2})
    assert [p.name for p in (tmp_path / "pretrain/checkpoints").iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    run_here(tmp_path, checkpoints={"every": 2})
    assert figures(tmp_path) == figures(whole)


def test_only_the_newest_complete_checkpoints_stay(tmp_path: Path) -> None:
    run_here(tmp_path, steps=4, checkpoints={"every": 1, "keep": 2, "asynchronous": False})
    folder = tmp_path / "pretrain/checkpoints"
    names = ["step-000000003", "step-000000004"]
    assert sorted(p.name for p in folder.iterdir()) == names
    shutil.copytree(folder / names[1], folder / ".step-000000009")  # a write that was cut off
    assert [p.name for p in Checkpoints(folder, tiny(tmp_path)).all()] == names
    assert not (folder / ".step-000000009").exists()


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    run_here(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"another training \(model.width differs\)"):
        run_here(tmp_path, steps=2, model={"width": 32})
    weights = tmp_path / "pretrain/checkpoints/step-000000002/model"
    with pytest.raises(UserError, match=r"holds another model \(width 16 there, 32 here\)"):
        run_here(tmp_path / "other", initial=str(weights), model={"width": 32})


def test_stages_follow_each_other_with_compressed_schedules_and_resampled_positions(tmp_path: Path) -> None:
    high = {"name": "high-resolution", "steps": 3, "data": {"global_size": 24}, "model": {"image_size": 24}}
    result = run_here(tmp_path, steps=2, stages=[{"name": "pretrain"}, high])
    assert result.stage == "high-resolution" and len(figures(tmp_path, "high-resolution")) == 3
    assert "step-000000003" in result.models[0]
    again = run_here(tmp_path, steps=2, stages=[{"name": "pretrain"}, high])  # finished: nothing is done again
    assert again.models == result.models and len(figures(tmp_path, "high-resolution")) == 3


def test_several_students_learn_from_one_pass_of_a_frozen_teacher(tmp_path: Path) -> None:
    run_here(tmp_path / "teacher", steps=2)
    weights = tmp_path / "teacher/pretrain/checkpoints/step-000000002/model"
    shape = tiny().model.model_dump()
    students = {"narrow": shape | {"width": 8}, "shallow": shape | {"depth": 1}}
    config = tiny(tmp_path / "students", steps=2, distill={"teacher": str(weights), "students": students})
    models = assemble(config, parallel.start())
    before = [local(p).clone() for p in models.teacher.parameters()]
    calls: list[int] = []
    models.teacher.register_forward_hook(lambda *_: calls.append(1))
    train_step(models, [make_batch(config, 0, 12)], values_at(1, config.schedule, 2, 12), config)
    assert len(calls) == 1 and all(
        torch.equal(b, local(p)) for b, p in zip(before, models.teacher.parameters(), strict=True)
    )
    result = train(config, source=synthetic)
    assert [Path(m).name for m in result.models] == ["model-narrow", "model-shallow"]
    assert json.loads((Path(result.models[0]) / "config.json").read_text())["model"]["width"] == 8


def test_the_weights_of_a_checkpoint_embed(tmp_path: Path) -> None:
    import numpy as np

    from embeddings.models import checkpoint

    result = run_here(tmp_path, steps=2)
    model = checkpoint.load(f"checkpoint:{result.models[0]}", "cpu")
    pixels = (np.random.default_rng(0).random((40, 30, 3)) * 255).astype(np.uint8)
    assert model.embed(np.stack([model.prepare(pixels)])).shape == (1, 16)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_blocks_are_about_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend=backend, fullgraph=True))
    run_here(tmp_path / "eager", steps=2, model={"depth": 1})
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        told = {"compile": True, "activation_checkpointing": recompute}
        run_here(folder, steps=2, model={"depth": 1}, parallel=told)
        close(figures(folder), figures(tmp_path / "eager"), 1e-4)


def test_a_source_that_hangs_is_left_alone_by_a_finished_training(whole: Path) -> None:
    result = train(tiny(whole), source=hanging_at(0))
    assert result.step == 6 and not result.stopped


def test_knn_is_measured_on_the_way(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, colour in (("dark", 40), ("light", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = (colour + random.integers(-30, 30, (20, 20, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{number}.png")
    knn = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "every": 1, "neighbours": 3}
    result = run_here(tmp_path / "out", steps=2, knn=knn)
    lines = [json.loads(text) for text in (tmp_path / "out/pretrain/log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["knn_accuracy"] for line in lines if "knn_accuracy" in line}
    assert list(found) == [1, 2] and (tmp_path / "out/pretrain/config.yaml").exists()
    weights = load_file(Path(result.models[0]) / "model.safetensors")
    backbone = VisionTransformer(tiny().model.backbone())
    backbone.load_state_dict(weights)
    again = knn_accuracy(BackboneEncoder(backbone, size=16), knn["train"], knn["test"], 3)
    assert again["value"] == found[2]
