"""The image pass: parts in order, made once, the same bytes whoever dies; errors as sentences."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from curation.errors import UserError
from pipelines import cluster
from pipelines import image_pass as passes
from pipelines.context import Context
from pipelines.events import Events
from pipelines.image_pass import image_pass, nearest
from pipelines.run_directory import Generation, PartRecord, PartWriter, RunDirectory

TASKS = [(f"part-000-{index:06d}", index + 1) for index in range(4)]


def decode(task: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """`task` rows of one value. Dies or refuses where `shared` says so."""
    if task == shared.get("die_always"):
        os._exit(9)
    flag = shared.get("die_once")
    if flag and task == 2 and not os.path.exists(flag):
        Path(flag).touch()
        os._exit(9)
    if task == shared.get("refuse"):
        raise UserError("the shard is gone; download it again", exit_code=1)
    return {"values": np.full((task, 4), shared["value"] * task, np.int64), "names": ["a"] * task}


class Sum:
    """Writes the sum of each row."""

    def __init__(
        self, writer: PartWriter, die_once: str = "", refuse: bool = False, die_of: str = "", stillborn: bool = False
    ) -> None:
        if refuse:
            raise UserError("the weights are gone; fetch them again", exit_code=1)
        if stillborn:
            os._exit(9)
        self._writer, self._die_once, self._die_of = writer, die_once, die_of

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> PartRecord:
        if name == self._die_of:
            os._exit(9)
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
    monkeypatch.setattr(passes.Workers, "wanted", lambda *_: 1)


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


def test_an_actor_takes_what_lies_on_its_machine_before_what_was_decoded_first() -> None:
    waiting = [{"a"}, {"a", "b"}, {"b"}, frozenset()]
    assert [nearest(machine, waiting) for machine in ("a", "b", "c")] == [0, 1, 0]


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


@pytest.mark.parametrize(
    ("shared", "arguments", "first"),
    [
        ({"die_always": 3}, {}, TASKS[2][0]),
        ({}, {"die_of": TASKS[1][0]}, TASKS[1][0]),
        ({}, {"stillborn": True}, "a model's worker"),
    ],
)
def test_what_always_dies_is_named_and_what_was_made_is_kept(
    tmp_path: Path, ray_session: None, one_actor: None, shared: Any, arguments: Any, first: str
) -> None:
    with pytest.raises(UserError, match=rf"^{first}: its worker died every time it was tried") as caught:
        run(tmp_path, shared, **arguments)
    assert caught.value.exit_code == 1
    _, again = opened(tmp_path)
    assert (TASKS[0][0] in again.find([TASKS[0][0]])) == first.startswith("part")


def test_a_model_that_cannot_be_made_anywhere_is_told_with_its_reason(
    tmp_path: Path, ray_session: None, one_actor: None
) -> None:
    with pytest.raises(UserError, match=r"a model's worker: .*ActorDiedError: TypeError: .*'unknown'"):
        run(tmp_path, unknown=1)


def test_where_machines_have_left_actors_end_that_would_take_what_decoding_needs(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, generation = opened(tmp_path / "run")
    monkeypatch.setattr(cluster, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(passes.Workers, "wanted", lambda *_: 2 if len(generation.parts) < 4 else 1)
    kill, ended = passes._kill, list[int]()
    monkeypatch.setattr(passes, "_kill", lambda actor: (ended.append(len(generation.parts)), kill(actor)))
    slowly(tmp_path, 8, context, generation)
    assert len(generation.parts) == 8 and len(ended) == 2 and 4 <= ended[0] <= 8 and ended[1] == 8


def test_what_is_decoded_waits_in_bounded_numbers(tmp_path: Path, ray_session: None, one_actor: None) -> None:
    """No part is decoded while two are with the only actor and as many more as decode at once wait."""
    slowly(tmp_path, 12, *opened(tmp_path / "run"))
    most = [int(line) for line in (tmp_path / "most").read_text().split()]
    assert len(most) == 12 and max(most) <= 2 + 2 * passes.QUEUED_PER_ACTOR


def slowly(tmp_path: Path, parts: int, context: Context, generation: Generation) -> None:
    """So many parts through `touch` and Slow."""
    began = tmp_path / "decoded"
    began.mkdir()
    image_pass(
        context,
        generation,
        [(f"part-000-{index:06d}", str(began / str(index))) for index in range(parts)],
        decode=touch,
        model=Slow,
        model_arguments={"writer": generation.writer, "folder": str(began), "out": str(tmp_path / "most")},
    )


def touch(task: str, _: Any) -> dict[str, Any]:
    Path(task).touch()
    return {"values": np.zeros((50_000, 4), np.int64)}


class Slow:
    """Notes how many parts are decoded that it has not made."""

    def __init__(self, writer: PartWriter, folder: str, out: str) -> None:
        self._writer, self._folder, self._out, self._made = writer, folder, out, 0

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> PartRecord:
        assert not decoded["values"].flags.writeable, "read in place"
        assert passes._where(ray.put(np.zeros(50_000))) == {ray.get_runtime_context().get_node_id()}
        time.sleep(0.15)
        with open(self._out, "a") as file:
            file.write(f"{len(os.listdir(self._folder)) - self._made}\n")
        self._made += 1
        return self._writer.write(name, pa.table({"sum": decoded["values"][0]}), files={}, counts={"rows": 1})
