"""What is secret in a configuration or a URL is found again in nothing that people are handed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.audit.words import visible
from curation.errors import UserError
from curation.manifest import portable
from curation.secrets import hide, hide_all
from pipelines import description, sources
from pipelines.context import Context
from pipelines.events import Events
from pipelines.run_directory import RunDirectory
from pipelines.stages import download, importing, manifest, report
from pipelines.stages.report import ReportConfig
from tests.pipelines import web as site
from tests.pipelines.synthetic_run import build
from tests.pipelines.test_download import Alone, config
from tests.pipelines.web import Web, send

SECRET = "S3CR3T"


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with site.serve() as web:
        yield web


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:S3CR3T@h.example/a: not there", "https://***@h.example/a: not there"),
        ("https://u:S3C@R3T@h.example/a", "https://***@h.example/a"),
        ("s3://KEY:S3CR3T@bucket/a.txt", "s3://***@bucket/a.txt"),
        ("https://h/a?X-Amz-Signature=S3CR3T&b=c: gone", "https://h/a?***: gone"),
        ("`https://h/a?S3CR3T`, or so", "`https://h/a?***, or so"),
        ("AWS_SECRET_ACCESS_KEY=S3CR3T; token=S3CR3T", "AWS_SECRET_ACCESS_KEY=***; token=***"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("user_agent_token: 'a b' is refused", "user_agent_token: 'a b' is refused"),
        ("/data/a@b/c?d=e", "/data/a@b/c?d=e"),
    ],
)
def test_secrets_of_urls_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert hide(text) == shown
    assert hide(hide(text)) == shown
    assert hide_all({"a": [text]}) == {"a": [shown]}


@given(st.text(st.characters(categories=["L", "N"]), min_size=4), st.text("abc/.-", max_size=9))
def test_no_password_or_signature_survives(secret: str, path: str) -> None:
    secret = "§" + secret
    for url in (
        f"https://u:{secret}@h/{path}",
        f"https://h/{path}?sig={secret}",
        f"s3://k:{secret}@b/{path}?v={secret}",
    ):
        assert "§" not in hide(f"reading {url} failed")


def test_sentences_events_and_names_of_sources_hide_them(tmp_path: Path) -> None:
    url = f"https://u:{SECRET}@h.example/lists/web.txt?X-Amz-Signature={SECRET}"
    assert SECRET not in str(UserError(f"{url}: cannot be read"))
    heard = []
    events = Events(str(tmp_path / "events.jsonl"), heard.append)
    events.emit("message", "download", text=f"reading {url}", more={"of": [url]})
    assert SECRET not in (tmp_path / "events.jsonl").read_text() + json.dumps(heard)
    assert sources.source_name("pool", url) == "pool:web"


def searched(folder: Path, *but: str) -> list[str]:
    """Files that hold the secret."""
    files = [p for p in folder.rglob("*") if p.is_file() and not any(name in str(p) for name in but)]
    return [str(p.relative_to(folder)) for p in files if SECRET.encode() in p.read_bytes()]


def test_a_download_of_secrets_leaves_them_in_the_table_of_urls_alone(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [
        web.url(f"/image/1.jpg?X-Amz-Signature={SECRET}"),
        web.url(f"/404?token={SECRET}"),
        web.url(f"/away?sig={SECRET}"),
        f"http://u:{SECRET}@127.0.0.1:{web.port}/image/2.jpg",
        f"http://u:{SECRET}@/",
        f"{SECRET}",
    ]
    web.routes["/away"] = site.redirect(f"http://10.0.0.1/{SECRET}?sig={SECRET}")
    web.routes["/list.txt"] = lambda h: send(h, "\n".join(urls).encode(), "text/plain")
    run = tmp_path / "run"
    context = Alone(RunDirectory(str(run)), events=Events(str(run / "events.jsonl"), print))
    listed = web.url(f"/list.txt?X-Amz-Signature={SECRET}")
    download.execute(context, config(), urls=listed, role="pool")
    again = download.execute(context, config(), urls=listed, role="pool")
    assert again.skipped
    assert all("download/gen-0000" in name for name in searched(run))
    rows = [r for p in (run / "download/gen-0000").glob("part-*.parquet") for r in manifest_rows(p)]
    assert [SECRET in (row["url"] or "") for row in rows] == [True, True, True, False, False, True]
    assert not any(SECRET in (row["error"] or "") for row in rows)
    assert SECRET not in json.dumps(description.described_sources(context.run), default=str)
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "list.txt" in (run / "sources.json").read_text()
    with pytest.raises(UserError) as caught:
        download.execute(context, config(), urls=web.url(f"/none.txt?sig={SECRET}"), role="pool:other")
    assert SECRET not in str(caught.value)


def manifest_rows(path: Path) -> list[dict[str, str | None]]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["url", "error"]).to_pylist())


def test_what_a_page_or_a_card_shows_of_a_url_hides_them() -> None:
    url = f"https://u:{SECRET}@h.example/list.txt?sig={SECRET}"
    assert SECRET not in visible(url) and "h.example/list.txt" in visible(url)
    assert SECRET not in json.dumps(portable({"sources": [{"urls": url}], "opt_out": url}))


@pytest.mark.long
def test_the_card_and_the_report_hide_them(tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.pipelines.synthetic_run as made

    row_of = made._row

    def with_secret(number: int, name: str, row: int, hostile: bool) -> tuple[dict[str, object], bool]:
        entry, usable = row_of(number, name, row, hostile)
        return {**entry, "url": f"https://u.example/{row}.jpg?X-Amz-Signature={SECRET}"}, usable

    monkeypatch.setattr(made, "_row", with_secret)
    found = build(tmp_path / "run", pool=20)
    secret = f"https://u:{SECRET}@h.example/list.txt?sig={SECRET}"
    (tmp_path / "run/run.yaml").write_text(
        f"run: {tmp_path / 'run'}\nsources:\n  - {{as: pool, urls: '{secret}'}}\ndownload: {{opt_out: '{secret}'}}\n"
    )
    manifest.execute(Context(run=found.run), manifest.ManifestConfig())
    report.execute(Context(run=found.run), ReportConfig())
    assert "h.example" in (tmp_path / "run/manifest").joinpath("gen-0000/manifest.json").read_text()
    tables = [".parquet", "run.yaml"]
    assert searched(tmp_path / "run", *tables) == []


def test_an_import_keeps_no_passwords_of_the_urls_that_a_tar_names(tmp_path: Path) -> None:
    import tarfile

    from tests.pipelines.test_import import add
    from tests.pipelines.web import jpeg

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.jpg", jpeg(1))
        add(tar, "0.json", json.dumps({"url": f"http://u:{SECRET}@h.example/1"}).encode())
    context = Alone(RunDirectory(str(tmp_path / "run")))
    importing.execute(context, kind="tars", origin=str(tmp_path / "a.tar"), role="pool")
    assert searched(tmp_path / "run") == []
