"""`curate add`: what a user can get wrong, and what is printed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from pipelines import add
from pipelines.add import Added


def curate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["add", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{run}",), "give URL lists, --folder, --tars or --parquet"),
        (("{run}", "a.txt"), "no run.yaml in it"),
        (("{run}", "a.txt", "b.txt", "--as", "pool:new"), "a name is for one source"),
        (("{run}", "a.txt", "--as", "pools"), "as"),
        (("{run}", "a.txt", "--memory-per-worker", "1kB"), "too little"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = curate(*(a.format(run=tmp_path) for a in arguments))
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and sentence in lines[0], result.output


def test_what_was_added_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def added(run: str, sources: list[object], **more: object) -> Added:
        asked.append((run, sources, more))
        level = {"level": 1, "clusters": 10, "mean_distance_older": 0.5, "mean_distance_new": 0.6, "moved": 0.25}
        bridged = [{"component_id": 7, "representatives": [7, 9]}]
        manifest = {"before": 5, "now": 8, "gained": 4, "lost": 1}
        return Added(run, ["pool:more"], [], {"dedup_kept": 1234}, manifest, False, bridged, [level])

    monkeypatch.setattr(add, "add", added)
    result = curate(tmp_path, "one.txt", "two.csv", "--tars", "t", "--workers", "2", "--re-elect")
    assert result.exit_code == 0, result.output
    assert [s.origin for s in asked[0][1]] == [("urls", "one.txt"), ("urls", "two.csv"), ("tars", "t")]
    assert asked[0][2]["resources"] == {"workers": 2} and asked[0][2]["re_elect"] is True
    for words in ("dedup kept: 1,234", "5 before, 8 now (4 new, 1 gone)", "component 7: 7, 9", "of new ones 0.6000"):
        assert words in result.output
