"""The image pass: parts in order, made once, the same bytes whoever dies; errors as sentences."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import UserError
from pipelines import image_pass as passes
from pipelines.context import Context
from pipelines.events import Events
from pipelines.image_pass import actors, image_pass, pack, unpack
from pipelines.run_directory import Generation, PartRecord, PartWriter, RunDirectory

TASKS = [(f"part-000-{index:06d}", index + 1) for index in range(4)]


def decode(task: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """`task` rows of one value. Dies or refuses where `shared` says so."""
    flag = shared.get("die_once")
    if flag and task == 2 and not os.path.exists(flag):
        Path(flag).touch()
        os._exit(9)
    if task == shared.get("refuse"):
        raise UserError("the shard is gone; download it again", exit_code=1)
    return {"values": np.full((task, 4), shared["value"] * task, np.int64), "names": ["a"] * task}


class Sum:
    """Writes the sum of each row."""

    def __init__(self, writer: PartWriter, die_once: str = "", refuse: bool = False) -> None:
        if refuse:
            raise UserError("the weights are gone; fetch them again", exit_code=1)
        self._writer, self._die_once = writer, die_once

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> PartRecord:
        if self._die_once and name == TASKS[1][0] and not os.path.exists(self._die_once):
            Path(self._die_once).touch()
            os._exit(9)
        table = pa.table({"sum": decoded["values"].sum(1), "name": decoded["names"]})
        return self._writer.write(name, table, files={f"side/{name}.txt": b"x"}, counts={"rows": len(table)})


class Both:
    """Writes each part to two generations."""

    def __init__(self, writers: list[PartWriter]) -> None:
        self._each = [Sum(writer) for writer in writers]

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> list[PartRecord]:
        return [one(name, decoded) for one in self._each]


def opened(
    folder: Path, events: list[dict[str, Any]] | None = None, stage: str = "filter"
) -> tuple[Context, Generation]:
    """A context on `folder` and a generation of a stage in it."""
    context = Context(RunDirectory(str(folder)), events=Events(None, None if events is None else events.append))
    generation = context.begin_rows(stage, 1, {}, inputs=[])
    assert generation is not None
    return context, generation


@pytest.fixture
def one_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every actor is a process to start: two seconds."""
    monkeypatch.setattr(passes, "actors", lambda *_: 1)


def run(folder: Path, shared: Mapping[str, Any] | None = None, **arguments: Any) -> Generation:
    """All of TASKS through Sum."""
    context, generation = opened(folder)
    given = {"writer": generation.writer, **arguments}
    image_pass(
        context,
        generation,
        TASKS,
        decode=decode,
        model=Sum,
        model_arguments=given,
        shared={"value": 3, **(shared or {})},
    )
    return generation


def test_packed_arrays_are_read_in_place() -> None:
    decoded = {"a": np.arange(12, dtype=np.uint8).reshape(3, 4), "b": np.ones((0, 5), np.float32), "c": [("x", 1)]}
    name, back = unpack(pack("part-1", decoded))
    assert name == "part-1" and back["c"] == [("x", 1)]
    np.testing.assert_array_equal(back["a"], decoded["a"])
    assert back["b"].shape == (0, 5) and not back["a"].flags.writeable and not back["a"].flags.owndata


@pytest.mark.parametrize(
    ("parts", "num_gpus", "cpus", "gpus", "count"),
    [(1, 0, 16, 0, 1), (100, 0, 2, 0, 2), (100, 1, 64, 8, 8), (3, 1, 64, 8, 3), (9, 0.5, 4, 1, 2), (5, 1, 4, 0, 1)],
)
def test_actors_follow_the_machine(parts: int, num_gpus: float, cpus: int, gpus: float, count: int) -> None:
    assert actors(parts, num_gpus, cpus, gpus) == count


def test_parts_are_made_once_and_listed_in_task_order(tmp_path: Path, ray_session: None) -> None:
    events: list[dict[str, Any]] = []
    context, first = opened(tmp_path, events, "filter")
    second = context.begin_rows("other", 1, {}, inputs=[])
    assert second is not None
    writers = [first.writer, second.writer]
    made = [Sum(writer)(TASKS[2][0], decode(3, {"value": 5})) for writer in writers]
    image_pass(
        context,
        [first, second],
        TASKS,
        decode=decode,
        model=Both,
        model_arguments={"writers": writers},
        shared={"value": 3},
    )
    for generation, record in zip((first, second), made, strict=True):
        assert [part.name for part in generation.parts] == [name for name, _ in TASKS]
        assert [part.rows for part in generation.parts] == [1, 2, 3, 4]
        assert generation.parts[2] == record, "a part that was there is taken as it is"
        assert generation.parts[3] == generation.writer.find(TASKS[3][0])
    done = [event["done"] for event in events if event["event"] == "part" and event["stage"] == "filter"]
    assert done == [2, 3, 4]


def test_deaths_of_a_decoder_and_of_an_actor_leave_the_same_bytes(
    tmp_path: Path, ray_session: None, one_actor: None
) -> None:
    flags = [str(tmp_path / "decoder-died"), str(tmp_path / "actor-died")]
    got = run(tmp_path / "a", {"die_once": flags[0]}, die_once=flags[1])
    assert all(os.path.exists(flag) for flag in flags)
    _, expected = opened(tmp_path / "b")
    for name, task in TASKS:
        expected.parts.append(Sum(expected.writer)(name, decode(task, {"value": 3})))
    assert got.parts == expected.parts


def test_a_user_error_of_a_worker_arrives_as_its_sentence(tmp_path: Path, ray_session: None, one_actor: None) -> None:
    with pytest.raises(UserError, match=r"^the shard is gone; download it again$") as caught:
        run(tmp_path / "a", {"refuse": 3})
    assert caught.value.exit_code == 1
    with pytest.raises(UserError, match=r"^the weights are gone; fetch them again$"):
        run(tmp_path / "b", refuse=True)
