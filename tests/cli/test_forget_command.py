"""`curate forget`: what a user can get wrong, and what is printed."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from pipelines import forget
from pipelines.forget import Forgotten


def curate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["forget", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{run}/nothing", "--urls", "a.txt"), "no such run directory"),
        (("{run}", "--urls", "a.txt"), "not a run directory"),
        (("{run}", "--plan"), "--plan: give --urls"),
        (("{run}/real", "--urls", "{run}/absent.txt"), "no such URL list"),
        (("{run}/real", "--sha256", "{run}/typo.txt"), "typo.txt line 2: `abc` is not a sha256"),
        (("{run}/real", "--domains", "{run}/empty.txt"), "nothing to forget"),
        (("{run}/real", "--urls", "{run}/typo.txt", "--memory-per-worker", "1kB"), "too little"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "sources.json").write_text("[]")
    (tmp_path / "typo.txt").write_text("a" * 64 + "\nabc\n")
    (tmp_path / "empty.txt").write_text("\n")
    result = curate(*(a.format(run=tmp_path) for a in arguments))
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and sentence in lines[0], result.output
    assert not (tmp_path / "real" / "forgotten" / "0001.json").exists()


def test_what_was_forgotten_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def forgot(run: str, lists: dict[str, str], **more: Any) -> Forgotten:
        asked.append((run, lists, more))
        return Forgotten(
            run,
            [] if more["plan"] else ["forgotten/0002.json"],
            images=1200,
            named=1000,
            unknown={"urls": 7, "sha256": 0},
            known={"urls": 3, "sha256": 0},
            copies_left=5,
            removed={} if more["plan"] else {"download": {"rows": 1200}},
            cannot_be_removed=["backups"],
            places=["/mine/1.jpg"],
            planned=more["plan"],
            finished=["forgotten/0001.json"],
        )

    monkeypatch.setattr(forget, "forget", forgot)
    result = curate(tmp_path, "--urls", "a.txt", "--sha256", "b.csv", "--no-copies", "--re-elect", "--workers", "3")
    assert result.exit_code == 0, result.output
    (run, lists, more) = asked.pop()
    assert (run, lists) == (str(tmp_path), {"urls": "a.txt", "sha256": "b.csv"})
    assert (more["copies"], more["re_elect"], more["plan"], more["resources"].workers) == (False, True, False, 3)
    for line in (
        "finished forgotten/0001.json, which had been stopped",
        "1,200 images forgotten, 200 of them copies",
        "--urls: 7 not in this run; blocked all the same",
        "--urls: 3 forgotten before",
        "5 stay; --copies takes them",
        "download: 1,200 rows",
        "backups",
        "/mine/1.jpg",
        "certificate: forgotten/0002.json",
    ):
        assert line in result.output, line
    assert "--sha256: 0" not in result.output
    planned = curate(tmp_path, "--urls", "a.txt", "--plan").output
    assert "1,200 images would be forgotten" in planned and "certificate" not in planned and "blocked" not in planned
    assert asked.pop()[2]["copies"] is None
    assert json.loads(curate(tmp_path, "--urls", "a.txt", "--json").output)["images"] == 1200


def test_without_a_list_it_finishes_what_was_stopped(tmp_path: Path) -> None:
    (tmp_path / "sources.json").write_text("[]")
    result = curate(tmp_path)
    assert result.exit_code == 0 and "nothing is left to finish" in result.output
