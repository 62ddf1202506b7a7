"""Trainings with kernels are trainings without, up to rounding; what was chosen once stays."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.training_display import describe_kernels
from curation.errors import UserError
from tests.training.test_loop import close
from tests.training.tiny import SERVER, figures, free_port, run_here, tiny
from training import parallel
from training.checkpoints import WITHOUT_KERNELS
from training.collectives import rank
from training.kernels import choice
from training.model import Layout

SMALL = {"batch_size": 2, "steps": 2, "model": {"depth": 1}, "data": {"local_crops": 2}}
KERNELS = {"attention": "triton", "branches": "triton"}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with the references."""
    folder = tmp_path_factory.mktemp("plain")
    run_here(folder, **SMALL)
    return folder


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in figures(folder) if "loss" in line]


def told(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "pretrain/log.jsonl").read_text().splitlines()
    return [line["kernels"] for line in map(json.loads, lines) if "kernels" in line]


def test_a_training_with_kernels_is_one_without_up_to_rounding(plain: Path, tmp_path: Path) -> None:
    run_here(tmp_path, kernels=KERNELS, **SMALL)
    close(steps(tmp_path), steps(plain), 1e-4)
    assert told(tmp_path) == [KERNELS] and told(plain) == []


def test_a_continuation_keeps_the_choice_and_gives_the_same_bits(tmp_path: Path, monkeypatch: Any) -> None:
    """`auto` here is timed by a clock that calls the kernels fast, then by one that calls them slow."""
    monkeypatch.setattr(choice, "on_gpu", lambda device: True)
    times = {"sdpa": 2.0, "varlen": 3.0, "triton": 1.0, "reference": 2.0}

    def told_times(candidates: dict[str, Any], device: Any) -> Any:
        found = {name: times[name] for name in candidates}
        return min(found, key=lambda name: found[name]), found

    monkeypatch.setattr(choice, "fastest", told_times)
    # Which is chosen is the matter here, not what it computes: the interpreter is slow.
    monkeypatch.setattr(choice, "attention", lambda name: choice.sdpa)
    monkeypatch.setattr(choice, "blocks", lambda name: choice.reference)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    auto = {"kernels": {"attention": "auto", "branches": "auto"}, **SMALL}
    run_here(whole, checkpoints={"every": 1}, **auto)
    assert told(whole) == [KERNELS]
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "pretrain/checkpoints/step-000000002")
    times["triton"] = 9.0
    run_here(parts, checkpoints={"every": 1}, **auto)
    assert told(parts) == [KERNELS, KERNELS]
    assert steps(parts) == steps(whole)
    state = json.loads((parts / "pretrain/checkpoints/step-000000002/state.json").read_text())
    assert state["kernels"] == KERNELS

    file = parts / "pretrain/checkpoints/step-000000001/state.json"
    document = json.loads(file.read_text())
    del document["kernels"]
    file.write_text(json.dumps(document))  # as it was before there were kernels
    shutil.rmtree(parts / "pretrain/checkpoints/step-000000002")
    run_here(parts, **auto)
    state = json.loads((parts / "pretrain/checkpoints/step-000000002/state.json").read_text())
    assert state["kernels"] == WITHOUT_KERNELS


def test_on_a_cpu_nothing_is_timed_and_the_references_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "fastest", lambda *_: pytest.fail("timed"))
    auto = tiny(kernels={"attention": "auto", "branches": "auto"})
    assert choice.choose(auto, CPU, KERNELS) == choice.Chosen()
    assert choice.choose(tiny(), CPU, KERNELS) == choice.Chosen(), "what is asked for by name is taken"


def test_the_fastest_is_taken_the_first_of_equals_and_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(taken: float) -> float:
        if taken < 0:
            raise RuntimeError("no such kernel\nhere")
        return taken

    monkeypatch.setattr(choice, "seconds", lambda candidate, device: run(candidate()))
    name, found = choice.fastest({"a": lambda: -1.0, "b": lambda: 2.0, "c": lambda: 1.0, "d": lambda: 1.0}, GPU)
    assert name == "c" and found["a"] == "RuntimeError: no such kernel" and found["d"] == 1.0
    with pytest.raises(UserError, match="none of a runs here"):
        choice.fastest({"a": lambda: -1.0}, GPU)


def test_candidates_run_forward_and_backward_on_the_shapes_at_hand() -> None:
    config = tiny(**SMALL)
    (shape,) = choice.shapes_of(config, CPU)
    assert shape.layout == Layout((4, 4), (17, 5)) and shape.kept is not None
    assert shape.kept[0].layout == Layout((2, 2), (17, 5))
    attention = choice.attention_candidates([shape], torch.bfloat16, CPU)
    assert list(attention) == ["sdpa", "varlen", "triton"]
    blocks = choice.block_candidates([shape], choice.attention("sdpa"), torch.float32, CPU, compiled=False)
    for run in (attention["sdpa"], attention["triton"], *blocks.values()):
        run()


def test_the_choice_is_said_with_its_times() -> None:
    timings = {"attention": {"sdpa": 0.002, "varlen": "ImportError: no", "triton": 0.001}}
    said = describe_kernels({"kernels": {"attention": "triton", "branches": "reference"}, "timings_s": timings})
    assert said == "attention triton (sdpa 2.00 ms, varlen cannot run, triton 1.00 ms), branches reference"


def test_what_cannot_run_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels, sentence in (
        ({"attention": "varlen"}, "attention: varlen needs a GPU"),
        ({"attention": "triton"}, "attention: triton needs a GPU"),
        ({"branches": "triton"}, "branches: triton needs a GPU"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
            patch.setattr(choice, "INTERPRET", False)
            choice.choose(tiny(kernels=kernels), CPU, {})
    with pytest.raises(UserError, match="computes in half precision"):
        choice.choose(tiny(kernels={"attention": "varlen"}), GPU, {})


def test_two_processes_take_what_the_first_decides() -> None:
    port, processes = str(free_port()), []
    for number in range(2):
        environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(number)}
        mine, theirs = SERVER.Pipe()
        processes.append((SERVER.Process(target=choose_there, args=(environment, theirs), daemon=True), mine))
        processes[-1][0].start()
    assert [receive.recv() if receive.poll(40) else None for _, receive in processes] == [KERNELS, KERNELS]
    # Where nothing runs on the first, all of them hear of it: nobody waits for a choice that does not come.
    assert [receive.recv() if receive.poll(40) else None for _, receive in processes] == ["none runs", "none runs"]


def choose_there(environment: dict[str, str], sent: Any) -> None:
    """In a process of its own, the first of which finds the kernels fast and the other one slow."""
    os.environ.update(environment)
    device = parallel.start()
    setattr(choice, "on_gpu", lambda _: True)  # noqa: B010 - mypy holds functions for constants
    setattr(choice, "fastest", lambda candidates, _: (list(candidates)[-1 if rank() == 0 else 0], {}))  # noqa: B010
    auto = tiny(kernels={"attention": "auto", "branches": "auto"})
    sent.send(choice.choose(auto, device, {}).names())

    def nothing(*_: Any) -> Any:
        raise UserError("none runs")

    setattr(choice, "fastest", nothing)  # noqa: B010
    try:
        choice.choose(auto, device, {})
    except UserError as error:
        sent.send(str(error))
