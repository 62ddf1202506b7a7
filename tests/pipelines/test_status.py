"""What `curate status` says about a run: read from disk, nothing changed."""

from pathlib import Path

import pyarrow as pa
import pytest

from curation.errors import UserError
from pipelines import status
from pipelines.context import Context
from pipelines.run_directory import RunDirectory


def filtered(root: Path, *, finish: bool) -> None:
    context = Context(run=RunDirectory(str(root)))
    generation = context.begin_keyed("filter", 1, {}, {"source": "pool"})
    assert generation is not None
    statuses, errors = ["ok", "dropped", "dropped", "failed"], [None, "nsfw: 0.99", "nsfw: 0.95", "decode: truncated"]
    table = pa.table({"image_id": pa.array(range(4), pa.uint64()), "status": statuses, "error": pa.array(errors)})
    generation.parts = [generation.writer.write(f"part-000-{index:06d}", table) for index in range(2)]
    if finish:
        context.finish(generation, {"kept": 2})


def test_complete_stage_has_rows_bytes_times_and_failures_by_reason(tmp_path: Path) -> None:
    filtered(tmp_path, finish=True)
    found = {stage.folder: stage for stage in status.status(str(tmp_path)).stages}
    stage = found["filter"]
    assert (stage.state, stage.rows, stage.parts) == ("complete", 8, 2)
    assert stage.failures == {"dropped: nsfw": 4, "failed: decode": 2}
    assert stage.bytes == sum(f.stat().st_size for f in (tmp_path / "filter").rglob("*") if f.is_file())
    assert stage.generations[0].finished is not None and stage.generations[0].summary == {"kept": 2}
    assert found["dedup"].state == "absent" and found["embed/*"].state == "absent"


def test_unfinished_stage_shows_the_parts_and_rows_done(tmp_path: Path) -> None:
    filtered(tmp_path, finish=False)
    (tmp_path / "filter" / "gen-0000" / "part-of-another.parquet").write_bytes(b"torn")
    stage = next(s for s in status.status(str(tmp_path)).stages if s.folder == "filter")
    assert (stage.state, stage.rows, stage.parts) == ("unfinished", 8, 2)


def test_models_are_shown_each(tmp_path: Path) -> None:
    context = Context(run=RunDirectory(str(tmp_path)))
    for model in ("mobilenet_v2", "sscd"):
        generation = context.begin_keyed(f"embed/{model}", 1, {}, {"source": "pool"})
        assert generation is not None
        context.finish(generation, {})
    folders = [stage.folder for stage in status.status(str(tmp_path)).stages if stage.state == "complete"]
    assert folders == ["embed/mobilenet_v2", "embed/sscd"]


@pytest.mark.parametrize("name", ["nothing", "file", "folder"])
def test_what_is_no_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"no such run directory|a file, where|not a run directory"):
        status.status(str(tmp_path / name))
