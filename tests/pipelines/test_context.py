"""A stage is skipped, continued, extended or refused by its fingerprint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation import device, storage
from curation.duplicates.tiles import join_tiles
from curation.errors import UserError
from pipelines import cluster
from pipelines.context import Context, Resources
from pipelines.run_directory import PartRecord, PartWriter, RunDirectory

pytestmark = pytest.mark.usefixtures("ray_session")


def square(writer: PartWriter, name: str, task: int, shared: int) -> PartRecord:
    table = pa.table({"value": [task * task + shared]})
    return writer.write(name, table, files={f"side/{name}.txt": str(task).encode()}, counts={"tasks": 1})


def run_stage(
    root: Path, tasks: int = 4, option: int = 0, name: str = "square", inputs: tuple[str, ...] = (), **kwargs: Any
) -> Any:
    context = Context(RunDirectory(str(root)), **kwargs)
    generation = context.begin_rows(name, 1, {"option": option}, inputs, libraries=("numpy",))
    if generation is None:
        return context.skipped(name)
    work = [(f"part-{generation.number}-{i}", i) for i in range(tasks)]
    context.map_parts(generation, work, square, shared=option)
    return context.finish(generation, {"tasks": generation.total("tasks")})


def tables(root: Path) -> dict[str, bytes]:
    found = root.rglob("*")
    return {str(p.relative_to(root)): p.read_bytes() for p in found if p.is_file() and "_timings" not in p.name}


def test_a_finished_stage_is_skipped(tmp_path: Path) -> None:
    assert not run_stage(tmp_path).skipped
    again = run_stage(tmp_path)
    assert again.skipped and again.rows == 4


def test_an_interrupted_stage_gives_the_same_bytes(tmp_path: Path) -> None:
    run_stage(tmp_path / "whole")
    expected = tables(tmp_path / "whole")
    run_stage(tmp_path / "cut")
    document = json.loads((tmp_path / "cut/square/_stage.json").read_text())
    document["generations"][0] |= {"complete": False, "parts": []}
    (tmp_path / "cut/square/_stage.json").write_text(json.dumps(document))
    folder = tmp_path / "cut/square/gen-0000"
    (folder / "part-0-1.parquet").unlink()  # never written
    (folder / "part-0-2.parquet").write_bytes(b"PAR1 torn")  # another tool's half file
    (folder / "side/part-0-3.txt").unlink()  # its side file is gone: the part counts as not there
    kept = (folder / "part-0-0.parquet").stat().st_mtime_ns
    assert not run_stage(tmp_path / "cut").skipped
    assert tables(tmp_path / "cut") == expected
    assert (folder / "part-0-0.parquet").stat().st_mtime_ns == kept, "a finished part was made again"


def test_other_options_are_refused_with_the_difference(tmp_path: Path) -> None:
    run_stage(tmp_path)
    with pytest.raises(UserError, match=r"options\.option: was 0, now 7.*--rebuild"):
        run_stage(tmp_path, option=7)
    assert not run_stage(tmp_path, option=7, rebuild=True).skipped


def test_a_new_input_generation_is_processed_alone(tmp_path: Path) -> None:
    run_stage(tmp_path, tasks=2, name="first")
    run_stage(tmp_path, name="second", inputs=("first",))
    directory = RunDirectory(str(tmp_path)).stage("first")
    context = Context(RunDirectory(str(tmp_path)))
    generation = context.begin_keyed("first", 1, {}, {"source": 1})
    assert generation is not None and generation.number == 1
    context.map_parts(generation, [("part-1-0", 0)], square, shared=0)
    with pytest.raises(UserError, match="is not finished"):
        run_stage(tmp_path, name="second", inputs=("first",))
    context.finish(generation, {})
    assert len(directory.part_paths()) == 3
    run_stage(tmp_path, name="second", inputs=("first",))
    second = RunDirectory(str(tmp_path)).stage("second").generations()
    assert [g.consumed for g in second] == [{"first": [0]}, {"first": [1]}]


def test_a_rebuilt_input_is_noticed(tmp_path: Path) -> None:
    run_stage(tmp_path, name="first")
    run_stage(tmp_path, name="second", inputs=("first",))
    run_stage(tmp_path, name="first", option=2, rebuild=True)
    with pytest.raises(UserError, match=r"inputs\.first: was .*, now "):
        run_stage(tmp_path, name="second", inputs=("first",))


def test_a_flat_folder_with_foreign_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users.parquet").write_bytes(b"theirs")
    with pytest.raises(UserError, match="did not write: choose an empty folder"):
        run_stage(tmp_path, out=str(tmp_path))
    assert (tmp_path / "users.parquet").read_bytes() == b"theirs"


def test_rebuilding_a_flat_folder_removes_only_our_files(tmp_path: Path) -> None:
    run_stage(tmp_path, out=str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    run_stage(tmp_path, tasks=1, option=3, out=str(tmp_path), rebuild=True)
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == ["part-0-0.parquet"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_user_error_in_a_worker_arrives_as_itself(tmp_path: Path) -> None:
    def fail(writer: PartWriter, name: str, task: int, shared: None) -> PartRecord:
        raise UserError("the disk is full", exit_code=1)

    context = Context(RunDirectory(str(tmp_path)))
    generation = context.begin_rows("failing", 1, {}, ())
    assert generation is not None
    with pytest.raises(UserError, match="the disk is full") as caught:
        context.map_parts(generation, [("part-0", 0)], fail)
    assert caught.value.exit_code == 1


def test_a_worker_that_dies_is_tried_again(tmp_path: Path) -> None:
    marker = str(tmp_path / "died")

    def die_once(writer: PartWriter, name: str, task: int, shared: str) -> PartRecord:
        import os

        if not os.path.exists(shared):
            storage.write_whole(shared, b"")
            os._exit(9)
        return writer.write(name, pa.table({"value": [task]}))

    context = Context(RunDirectory(str(tmp_path / "run")))
    generation = context.begin_rows("dying", 1, {}, ())
    assert generation is not None
    context.map_parts(generation, [("part-0", 5)], die_once, shared=marker)
    assert [p.rows for p in generation.parts] == [1]


def told(number: int, shared: None) -> tuple[bool, str | None, bool]:
    lender = device._LENT.get()
    device.current()
    return lender is not None, os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules


@pytest.mark.parametrize(("tasks", "gpus", "share"), [(8, 2.0, 0.125), (3, 1.0, 0.3333), (0, 2.0, 0.0), (8, 0.0, 0.0)])
def test_tasks_of_products_ask_for_a_share_of_a_gpu_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: int, gpus: float, share: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(cluster, "gpus", lambda: gpus)
    monkeypatch.setattr(cluster, "spread", lambda *_, num_gpus, **__: asked.append(num_gpus) or [])
    context = Context(RunDirectory(str(tmp_path)), resources=Resources(tasks_per_gpu=tasks))
    context.spread(join_tiles, [])
    context.spread(told, [], heavy=True)
    context.spread(told, [])
    assert asked == [share, share, 0.0]


@pytest.mark.long
def test_ray_lends_gpus_to_tasks_of_products_alone(tmp_path: Path) -> None:
    code = (
        "import ray, sys\n"
        "from pipelines import context as c, run_directory as r\n"
        "from tests.pipelines.test_context import told\n"
        "import os; os.environ['RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO'] = '0'\n"
        "ray.init(address='local', num_cpus=2, num_gpus=1, include_dashboard=False, logging_level='ERROR')\n"
        "context = c.Context(r.RunDirectory(sys.argv[1]))\n"
        "calls = [(str(i), (i,)) for i in range(4)]\n"
        "for heavy, expected in ((True, (True, '0', True)), (False, (False, None, False))):\n"
        "    found = {result for _, result in context.spread(told, calls, heavy=heavy)}\n"
        "    assert found == {expected}, found\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
