"""`curate manifest` and `curate report` as a user types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.pipelines.synthetic_run import build

runner = CliRunner()


def test_manifest_and_report_of_a_run(tmp_path: Path, ray_session: None) -> None:
    made = build(tmp_path, pool=20)
    first = runner.invoke(app, ["manifest", str(tmp_path), "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout.strip().splitlines()[-1])["rows"] == len(made.in_mix)
    second = runner.invoke(app, ["report", str(tmp_path), "--max-megabytes", "5"])
    assert second.exit_code == 0, second.output
    page = Path(second.stdout.splitlines()[-1])
    assert page == tmp_path / "report" / "index.html" and page.is_file()
    again = runner.invoke(app, ["report", str(tmp_path), "--max-megabytes", "5", "--json"])
    assert json.loads(again.stdout.strip().splitlines()[-1])["skipped"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["manifest"], "give a run directory"),
        (["report"], "give a run directory"),
        (["manifest", "{}/absent"], "no such run directory"),
        (["report", "{}/absent"], "no such run directory"),
        (["manifest", "{}"], "no finished mix"),
        (["report", "{}"], "nothing to report yet"),
        (["report", "{}", "--max-megabytes", "0"], "max_megabytes: 0"),
    ],
)
def test_errors_are_sentences(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = runner.invoke(app, [a.format(tmp_path) for a in arguments])
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ") and "Traceback" not in result.output


def test_extra_tables_that_are_no_json_are_refused(tmp_path: Path) -> None:
    build(tmp_path, pool=10, optional=False)
    (tmp_path / "report_extra.json").write_text("{")
    result = runner.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "not valid JSON" in result.stderr
