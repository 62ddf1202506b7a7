"""A run under way: its events as progress, on the page, as metrics, in the terminal."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import watching
from cli.main import app
from pipelines import lock
from pipelines.events import Events, failed
from pipelines.progress import Progress
from pipelines.server.application import application
from tests.server.conftest import BASE, client_of


def event(time: float, kind: str, stage: str | None = "download", **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": kind, "stage": stage, **fields}


def half(progress: Progress) -> Progress:
    """Of 10 parts of 100 rows, one every 10 seconds, 5 are done at 1050."""
    progress.take(event(1000, "stage_start"))
    progress.take(event(1000, "parts", total=10, done=0))
    for number in range(5):
        lost = failed({"error.http_404": 3, "ok": 97})
        progress.take(event(1010 + 10 * number, "part", rows=100, done=number + 1, total=10, **lost))
    return progress


def test_rate_and_remaining_time_are_those_of_the_last_minutes() -> None:
    stage = half(Progress("nowhere")).document(1050)["stages"][0]
    assert (stage["done"], stage["total"], stage["rows"], stage["state"]) == (5, 10, 500, "running")
    assert stage["rows_per_second"] == 10 and stage["remaining_seconds"] == 50 and stage["seconds"] == 50
    assert stage["failures"] == {"http_404": 15}
    later = half(Progress("nowhere")).document(1100)["stages"][0]  # nothing came for 50 seconds: slower, not dead
    assert later["rows_per_second"] == 5 and later["remaining_seconds"] == 100


def test_file_is_read_on_from_where_it_was_and_a_half_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps(event(1000 + i, "part", rows=1, done=i, total=9)) + "\n" for i in range(9)]
    progress = Progress(str(tmp_path))
    assert progress.read().document(1000)["stages"] == []
    path.write_text("".join(lines[:3]) + lines[3][:20])
    assert progress.read().stages["download"].rows == 3
    path.write_text("".join(lines[:6]) + "not json\n[1]\n{}\n" + lines[6])
    assert progress.read().stages["download"].rows == 7 and progress.damaged == 3
    path.write_text(lines[0])  # a new run in the same place
    assert progress.read().stages["download"].rows == 1


def test_events_are_read_back_as_they_were_emitted(tmp_path: Path) -> None:
    events = Events(str(tmp_path / "events.jsonl"))
    events.emit("stage_start", "filter", generation=0, resumed=False)
    events.emit("parts", "filter", total=2, done=0)
    events.emit("part", "filter", part="p", rows=5, done=1, total=2, failures={"dropped: nsfw": 2})
    events.emit("warning", "filter", text="slow")
    events.emit("stage_end", "filter", seconds=1.0, rows=10, summary={"errors": {"truncated": 4}})
    events.emit("stage_skip", "dedup", generation=0)
    document = Progress(str(tmp_path)).read().document()
    first, second = document["stages"]
    assert (first["state"], first["rows"], first["failures"]) == ("complete", 10, {"truncated": 4})
    assert second["state"] == "skipped" and document["warnings"][0]["text"] == "slow"


def test_an_endless_number_of_reasons_is_bounded() -> None:
    progress = Progress("nowhere")
    for number in range(1000):
        progress.take(event(1000 + number, "part", rows=1, done=1, total=2, failures={f"reason {number}": 1}))
    assert len(progress.stages["download"].failures) == 200


@pytest.fixture
def live(tmp_path: Path) -> Any:
    """A server of a run that has only begun."""
    (tmp_path / "run.yaml").write_text("{}")
    half(Progress("x"))
    lines = [
        event(1000, "stage_start"),
        event(1000, "parts", total=4, done=0),
        event(1010, "part", rows=7, done=1, total=4, failures={"<script>": 2}),
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return client_of(tmp_path)


def test_a_run_without_images_shows_its_progress(live: Any) -> None:
    page = live.get("/")
    assert page.status_code == 200 and "1 of 4" in page.text and "stopped" in page.text and "<script>" not in page.text
    assert live.get("/images").status_code == 409 and live.get("/api/images").status_code == 409
    live.served.close()


def test_progress_says_who_works_and_the_page_looks_again(live: Any) -> None:
    lock.acquire(live.served.run.root)
    try:
        document = live.get("/api/progress").json()
        assert document["driver"] is not None and document["stages"][0]["done"] == 1
        text = live.get("/progress").text
        assert "running" in text and 'http-equiv="refresh"' in text
        assert "curate_driver_running 1.0" in live.get("/metrics").text
    finally:
        lock.release(live.served.run.root)
    assert live.get("/api/progress").json()["driver"] is None
    live.served.close()


def test_metrics_are_prometheus_text_and_count_requests(copied: Any) -> None:
    client = copied()
    for _ in range(3):
        client.get("/api/images/0")
    client.get("/api/images/999999")
    text = client.get("/metrics").text
    assert 'curate_requests_total{method="GET",route="/api/images/{image_id}",status="200"} 3.0' in text
    assert 'status="404"} 1.0' in text and "curate_images " in text and "process_resident_memory_bytes" in text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")
    client.served.close()


def test_tables_that_come_while_it_runs_are_served(tmp_path: Path, made: Any) -> None:
    import shutil

    root = tmp_path / "run"
    root.mkdir()
    (root / "run.yaml").write_text("{}")
    client = client_of(root)
    assert client.get("/api/images").status_code == 409
    for name in ("filter", "download"):
        shutil.copytree(Path(made.run.root) / name, root / name)
    shutil.copy(Path(made.run.root) / "sources.json", root)
    client.served._looked = 0.0
    client.get("/api/run")
    client.served.wait()
    assert client.get("/api/images").json()["total"] == 74
    client.served.close()


def test_watch_says_a_line_per_stage_and_ends_when_no_one_works(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    lines = [
        event(1000, "stage_start"),
        event(1000, "parts", total=4, done=0),
        event(1010, "part", rows=7, done=1, total=4, failures={"http_404": 2}),
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = CliRunner().invoke(app, ["status", str(tmp_path), "--watch"])
    assert result.exit_code == 0 and "download: stopped, 1 of 4 parts, 7 rows, 2 failures" in result.output
    document = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--watch", "--json"]).output)
    assert document["driver"] is None and document["stages"][0]["done"] == 1


def test_table_of_watch_holds_rates_time_left_and_failures() -> None:
    from rich.console import Console

    document = half(Progress("x")).document(1050) | {
        "run": "runs/first",
        "driver": {"pid": 1, "host": "h", "since": "now"},
    }
    document["warnings"] = [{"text": "a\x1b[31m host [bold]"}]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(watching.drawn(document))
    text = console.export_text()
    assert all(word in text for word in ("5/10", "10.0", "0:50", "15 http_404", "running", "process 1 on h", "[bold]"))
    assert "\x1b" not in text


def test_server_refuses_a_run_on_an_object_store_without_a_folder_for_its_index() -> None:
    from curation.errors import UserError

    with pytest.raises(UserError, match="--index-folder"):
        application("memory://nowhere/run")
    assert BASE.startswith("http://127")
