"""Damage is named, and what is damaged is made again, alone."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cli.main import app
from curation.errors import UserError
from pipelines import cluster, repair
from pipelines.context import Context
from pipelines.run_directory import PartRecord, PartWriter, RunDirectory

made: list[str] = []


def square(writer: PartWriter, name: str, task: int, shared: int) -> PartRecord:
    made.append(name)
    return writer.write(name, pa.table({"value": [task * task] * 100}), files={f"side/{name}.txt": b"%d" % task})


def here(function: Callable[..., Any], calls: Iterable[Any], *, shared: Any = None, **_: Any) -> Iterator[Any]:
    """`cluster.spread` in this process."""
    for name, arguments in calls:
        yield name, function(*arguments, shared)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "spread", here)
    monkeypatch.setattr(cluster, "start", lambda *_: None)
    made.clear()


def run_stages(root: Path | str, fail_at: int | None = None) -> list[bool]:
    """Two stages, the second made of the first. Returns which were skipped."""
    skipped = []
    for stage, inputs in (("square", ()), ("again", ("square",))):
        context = Context(RunDirectory(str(root)))
        generation = context.begin_rows(stage, 1, {}, inputs)
        if generation is None:
            skipped.append(True)
            continue
        if generation.files.get("whole.json") is None:
            generation.put_file("whole.json", b"{}")
        context.map_parts(generation, [(f"part-{i}", i) for i in range(5)], square)
        context.finish(generation, {})
        skipped.append(False)
    return skipped


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and "_timings" not in p.name and p.name != ".lock"
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, "bytes have changed"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "were written"),
    "gone": (lambda path: path.unlink(), "missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["part-3.parquet", "side/part-3.txt", "whole.json"])
def test_what_is_damaged_is_named_and_made_again_alone(tmp_path: Path, kind: str, file: str) -> None:
    run_stages(tmp_path)
    expected = contents(tmp_path)
    assert repair.verify(str(tmp_path)).damaged == ()
    damage, sentence = DAMAGES[kind]
    damage(tmp_path / "square" / "gen-0000" / file)
    found = repair.verify(str(tmp_path))
    (one,) = found.damaged
    assert one.path.endswith(file) and sentence in one.reason and (one.stage, one.generation) == ("square", 0)
    made.clear()
    assert repair.repair(str(tmp_path), found.damaged) == ["square"]
    assert run_stages(tmp_path) == [False, True], "the stage after it stays"
    assert made == ([] if file == "whole.json" else ["part-3"])
    assert contents(tmp_path) == expected
    assert repair.verify(str(tmp_path)).damaged == ()


def test_the_command_says_it_and_repairs_it(tmp_path: Path) -> None:
    run_stages(tmp_path)
    assert CliRunner().invoke(app, ["status", str(tmp_path), "--verify"]).exit_code == 0
    flip(tmp_path / "again" / "gen-0000" / "part-1.parquet")
    told = CliRunner().invoke(app, ["status", str(tmp_path), "--verify"])
    assert told.exit_code == 1
    assert "again/gen-0000/part-1.parquet: bytes have changed since it was written" in told.output
    assert "22 files" in told.output and "1 damaged" in told.output
    mended = CliRunner().invoke(app, ["status", str(tmp_path), "--verify", "--repair", "--json"])
    assert json.loads(mended.stdout)["repaired"] == ["again"]
    assert run_stages(tmp_path) == [True, False]
    assert CliRunner().invoke(app, ["status", str(tmp_path), "--verify"]).exit_code == 0


def test_a_run_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        repair.verify(str(tmp_path / "none"))


def test_an_interrupted_stage_neither_trusts_a_changed_part_nor_reads_those_it_wrote_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stages(tmp_path)
    expected = contents(tmp_path)
    marker = tmp_path / "square" / "_stage.json"
    document = json.loads(marker.read_text())
    parts = document["generations"][0]["parts"]
    document["generations"][0] |= {"complete": False, "parts": parts[:2]}  # as the driver left it when it was killed
    marker.write_text(json.dumps(document))
    flip(tmp_path / "square" / "gen-0000" / "part-3.parquet")
    flip(tmp_path / "square" / "gen-0000" / "side" / "part-4.txt")
    looked: list[str] = []
    find = PartWriter.find
    monkeypatch.setattr(PartWriter, "find", lambda self, name: (looked.append(name), find(self, name))[1])
    made.clear()
    run_stages(tmp_path)
    assert sorted(looked) == ["part-2", "part-3", "part-4"] and made == ["part-3", "part-4"]
    assert contents(tmp_path) == expected


def test_a_stage_says_which_parts_it_has_while_it_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.context.SAVE_S", 0.0)
    known: list[int] = []

    def watched(writer: PartWriter, name: str, task: int, shared: int) -> PartRecord:
        known.append(len(RunDirectory(str(tmp_path)).stage("one").all_generations()[0].parts))
        return square(writer, name, task, shared)

    context = Context(RunDirectory(str(tmp_path)))
    generation = context.begin_rows("one", 1, {}, [])
    assert generation is not None
    monkeypatch.setattr("time.monotonic", lambda ticks=iter(range(10**6)): float(next(ticks) * 100))
    context.map_parts(generation, [(f"part-{i}", i) for i in range(4)], watched)
    assert known[-1] > 0 and known == sorted(known)
