"""`curate init`, `run`, `status` and `doctor` from the command line."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from pipelines import catalog, configuration, doctor
from pipelines.context import Context, Outcome
from pipelines.doctor import Finding


def curate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration over an image folder, with stages that write one part each."""

    def execute(context: Context, *_: Any, **arguments: Any) -> Outcome:
        name = context.name  # type: ignore[attr-defined]
        generation = context.begin_keyed(name, 1, {}, {"source": arguments.get("role")})
        if generation is None:
            return context.skipped(name)
        return context.finish(generation, {"images": 1234, "share": 0.5})

    def stage(self: catalog.Stage) -> Any:
        def call(context: Context, *rest: Any, **named: Any) -> Outcome:
            context.name = self.name  # type: ignore[attr-defined]
            return execute(context, *rest, **named)

        return call

    monkeypatch.setattr(catalog.Stage, "execute", property(stage))
    monkeypatch.setattr("embeddings.models.registry.check", lambda _name: None)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    path = tmp_path / "run.yaml"
    sources = f"sources: [{{as: pool, folder: {tmp_path / 'images'}, images: 5}}]"
    path.write_text(f"run: {tmp_path / 'run'}\n{sources}\nbalance: {{target: 2}}\n")
    return path


@pytest.mark.parametrize("template", ["run", "demo", "lvd142m", "lvd1689m"])
def test_init_writes_each_template_and_never_over_a_file(tmp_path: Path, template: str) -> None:
    path = tmp_path / "new" / "run.yaml"
    assert curate("init", path, "--template", template).exit_code == 0
    assert configuration.load(str(path)).run
    before = path.read_bytes()
    assert curate("init", path).exit_code == 2
    assert path.read_bytes() == before


def test_run_prints_a_table_of_its_stages_and_json_for_machines(config: Path) -> None:
    shown = curate("run", config)
    assert shown.exit_code == 0, shown.output
    assert "images 1,234" in shown.output and "steps in" in shown.output
    again = json.loads(curate("run", config, "--json").stdout)
    assert [entry["stage"] for entry in again["stages"]][:3] == ["import", "filter", "dedup"]
    assert all(entry["skipped"] for entry in again["stages"])


def test_run_goes_on_with_a_run_directory(config: Path, tmp_path: Path) -> None:
    assert curate("run", config, "--until", "filter").exit_code == 0
    document = json.loads(curate("run", tmp_path / "run", "--json").stdout)
    assert [entry["skipped"] for entry in document["stages"]] == [True, True] + [False] * 8


def test_resources_on_the_command_line_come_before_those_of_the_yaml(config: Path, tmp_path: Path) -> None:
    curate("run", config, "--workers", "1", "--memory-per-worker", "2GiB", "--until", "filter")
    stored = configuration.load(str(tmp_path / "run" / "run.yaml")).resources
    assert (stored.workers, stored.memory_bytes) == (1, 2 << 30)


def test_plan_shows_every_stage_and_does_nothing(config: Path, tmp_path: Path) -> None:
    shown = curate("run", config, "--plan", "-v", "--hardware", "h100x8", "--nodes", "2")
    assert shown.exit_code == 0, shown.output
    for word in ("import", "report", "2 nodes", "arithmetic:", "decode_rate = ", "nominal: 2"):
        assert word in shown.output
    document = json.loads(curate("run", config, "--plan", "--json", "--cores-per-node", "8").stdout)
    assert document["hardware"]["cores_per_node"] == 8
    assert {"rows_in", "bytes_written", "flop", "memory_per_worker", "hours"} <= document["stages"][0].keys()
    assert not (tmp_path / "run").exists()


def test_status_shows_stages_and_changes_nothing(config: Path, tmp_path: Path) -> None:
    curate("run", config, "--until", "dedup")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    shown = curate("status", tmp_path / "run")
    assert shown.exit_code == 0 and "complete" in shown.output and "absent" in shown.output
    document = json.loads(curate("status", tmp_path / "run", "--json").stdout)
    assert {stage["folder"]: stage["state"] for stage in document["stages"]}["dedup"] == "complete"
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_doctor_ends_with_1_when_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("cores", "ok", "2"), Finding("faiss", "missing", "not installed", "pip install it")]
    monkeypatch.setattr(doctor, "examine", lambda _folder: findings[:1])
    assert json.loads(curate("doctor", "--json").stdout)["healthy"] is True
    monkeypatch.setattr(doctor, "examine", lambda _folder: findings)
    shown = curate("doctor")
    assert shown.exit_code == 1 and "pip install it" in shown.output


def test_help_loads_no_heavy_library() -> None:
    heavy = ["torch", "faiss", "ray", "sklearn", "open_clip", "onnxruntime", "timm", "PIL", "pandas"]
    code = f"import sys, cli.main; print([name for name in {heavy} if name in sys.modules])"
    started = time.monotonic()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"{loaded} after {time.monotonic() - started:.1f} s"
