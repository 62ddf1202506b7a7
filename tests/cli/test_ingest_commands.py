"""`curate extract`, `download` and `import` as a user types them: exit codes, one sentence, JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.pipelines import web as site
from tests.pipelines.test_extract import packed, response
from tests.pipelines.web import Web, jpeg

runner = CliRunner()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with site.serve() as web:
        web.routes["/down"] = site.failing(1, jpeg(9))
        yield web


def test_from_a_crawl_file_to_images_in_three_commands(web: Web, tmp_path: Path, ray_session: None) -> None:
    page = f'<img src="{web.url("/image/1.jpg")}" alt="one"><img src="{web.url("/down")}"><img src="{web.url("/404")}">'
    (tmp_path / "x.warc.gz").write_bytes(packed(response("http://page.example/", page.encode())))
    urls, run = str(tmp_path / "urls.parquet"), str(tmp_path / "run")
    result = runner.invoke(app, ["extract", str(tmp_path / "x.warc.gz"), "--out", urls, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 3
    options = ["--allow-hosts", "127.0.0.1", "--attempts", "1", "--json"]
    result = runner.invoke(app, ["download", urls, "--out", run, "--as", "pool:crawl", *options])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["summary"]
    assert (summary["ok"], summary["transient"], summary["failed"]) == (1, 1, 1)
    assert summary["errors"] == {"http_404": 1, "http_500": 1}
    result = runner.invoke(app, ["download", run, "--retry", *options])
    assert json.loads(result.stdout)["summary"]["ok"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jpg").write_bytes(jpeg(1))
    result = runner.invoke(app, ["import", str(tmp_path / "mine"), "--as", "seed:mine", "--out", run, "--exempt"])
    assert result.exit_code == 0 and "1 rows" in result.stdout
    result = runner.invoke(app, ["import", str(tmp_path / "mine"), "--as", "seed:mine", "--out", run, "--exempt"])
    assert "already done" in result.stdout


def refused(arguments: list[str], sentence: str, exit_code: int = 2) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == exit_code, result.output
    assert sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_what_users_get_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    run, urls = str(tmp_path / "run"), str(tmp_path / "urls.txt")
    Path(urls).write_text("http://a.example/1.jpg\n")
    Path(tmp_path / "empty.txt").write_text("")
    Path(tmp_path / "file").write_text("")
    pq.write_table(pa.table({"link": ["x"]}), tmp_path / "links.parquet")
    refused(["download", urls], "give the run directory with --out RUN")
    refused(["download", str(tmp_path / "absent.txt"), "--out", run], "no such URL list")
    refused(["download", str(tmp_path / "empty.txt"), "--out", run], "empty list")
    refused(["download", str(tmp_path / "links.parquet"), "--out", run], "no column `url`; there are: link")
    refused(["download", urls, "--out", run, "--as", "seeds:x"], "give pool, pool:NAME")
    refused(["download", urls, "--out", run, "--timeout-s", "-1"], "timeout_s")
    refused(["download", urls, "--out", run, "--allow-hosts", "http://x/"], "is not a host or host:port")
    refused(["download", urls, "--out", run, "--opt-out", str(tmp_path / "none")], "no such URL list")
    refused(["download", urls, "--out", run, "--blocked-domains", str(tmp_path / "none")], "cannot be read")
    refused(["download", run, "--retry"], "not a run directory")
    refused(["download", run, "--retry", "--out", run], "--retry takes the run directory alone")
    refused(["download", urls, "--out", str(tmp_path / "file"), "--as", "pool:x"], "", 1)
    refused(["import", str(tmp_path / "absent"), "--as", "pool:x", "--out", run], "no such folder or file")
    refused(["import", urls, "--as", "pool:x", "--out", run], "give a folder of images")
    refused(["import", str(tmp_path), "--as", "seed", "--out", run], "needs a name: seed:NAME")
    refused(["import", str(tmp_path), "--as", "pool:x"], "give the run directory with --out RUN")
    refused(["extract", str(tmp_path / "absent.warc"), "--out", "x.parquet"], "no such WARC or WAT file")
    refused(["extract", urls, "--out", str(tmp_path / "x.csv")], "ends in .parquet")
