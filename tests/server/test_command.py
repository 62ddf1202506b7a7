"""`curate serve`: what it refuses, what it prints, and a server of its own process on a socket."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.pipelines.synthetic_run import SyntheticRun


def curate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such run"),
        (["{file}"], "a file"),
        (["{run}", "--token", "short"], "16 characters"),
        (["{run}", "--compare", "nowhere"], "no such run"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    made: SyntheticRun, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "file").write_text("x")
    names = {"run": made.run.root, "file": str(tmp_path / "file")}
    result = curate(*[a.format(**names) for a in arguments])
    assert result.exit_code == 2 and "error:" in result.output and words in result.output
    assert "Traceback" not in result.output


def test_index_is_made_once(made: SyntheticRun, tmp_path: Path) -> None:
    first = json.loads(curate(made.run.root, "--index", "--index-folder", str(tmp_path / "i"), "--json").stdout)
    again = json.loads(curate(made.run.root, "--index", "--index-folder", str(tmp_path / "i"), "--json").stdout)
    assert first["fresh"] and not again["fresh"] and first["folder"] == again["folder"]
    assert first["rows"] == 74 and 0 < first["spaces"]["mobilenet_v2"]["recall"] <= 1


def test_an_address_of_the_network_gets_a_token(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.server import application

    given: dict[str, Any] = {}
    monkeypatch.setattr(application, "run", lambda guard, host, port: given.update(guard=guard, host=host))
    result = curate(made.run.root, "--host", "0.0.0.0")
    token = re.search(r"token: (\S+)", result.output)
    assert result.exit_code == 0 and token and len(token[1]) >= 24
    assert given["guard"].token is not None and given["guard"].accepts(token[1])
    assert curate(made.run.root).exit_code == 0 and given["guard"].token is None
    assert (
        curate(made.run.root, "--token", "a-token-of-my-own-choice").exit_code == 0 and given["guard"].token is not None
    )


def test_a_real_server_answers_on_a_socket(made: SyntheticRun, client: Any) -> None:
    command = [sys.executable, "-m", "cli.main", "serve", made.run.root, "--port", "18733"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            try:
                found = httpx.get("http://127.0.0.1:18733/api/images/0", timeout=5)
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.1)
        assert found.json()["image_id"] == 0 and "server" not in found.headers
        assert httpx.get("http://127.0.0.1:18733/", headers={"host": "evil.example"}).status_code == 421
    finally:
        server.terminate()
        server.wait(20)
    assert server.stderr is not None and "http://127.0.0.1:18733/" in server.stderr.read()
