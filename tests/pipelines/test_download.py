"""`download`: one row for every URL whatever the web answers, the same bytes however the work is spread."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.errors import UserError
from curation.schemas import IMAGES
from pipelines.context import Context
from pipelines.download import shard
from pipelines.download.shard_writer import Collector, ShardTar
from pipelines.run_directory import RunDirectory
from pipelines.stages import download
from pipelines.stages.download import DownloadConfig
from tests.pipelines import web as site
from tests.pipelines.web import Web, jpeg, send

PATHS = {
    "/404": "http_404",
    "/html": "not_an_image",
    "/drip": "timeout",
    "/big": "too_large",
    "/to-private": "private_address",
    "/loop": "redirect_loop",
    "/truncated": "truncated",
    "/noai": "x_robots_tag",
    "/down": "http_500",
    "/private/1.jpg": "robots_disallowed",
}


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with site.serve() as web:
        web.routes |= {
            "/html": lambda h: send(h, b"<html>not a picture</html>"),
            "/drip": site.drip(jpeg(1), 0.02),
            "/big": lambda h: send(h, jpeg(2) + bytes(60_000)),
            "/to-private": site.redirect("http://192.168.0.1/a.jpg?signature=s3cret"),
            "/loop": site.redirect("/loop"),
            "/truncated": site.truncated(jpeg(3)),
            "/noai": lambda h: send(h, jpeg(4), X_Robots_Tag="noai"),
            "/down": lambda h: send(h, b"", status=500),
            "/wide": lambda h: send(h, jpeg(5, 400, 100)),
            "/signed": site.redirect("/image/8.jpg"),
        }
        yield web


def config(**options: Any) -> DownloadConfig:
    usual = {
        "allow_hosts": ["127.0.0.1"],
        "timeout_s": 2.0,
        "backoff_s": 0.01,
        "max_bytes": 50_000,
        "shard_rows": 8,
        "attempts": 2,
    }
    return DownloadConfig(**(usual | options))


class Alone(Context):
    """A context whose parts are made one after the other in this process: one worker, and no Ray."""

    def spread(self, function: Any, calls: Any, *, shared: Any = None, **_: Any) -> Any:
        for name, arguments in calls:
            yield name, function(*arguments, shared)


def alone(root: Path) -> Context:
    return Alone(RunDirectory(str(root)))


def write_list(path: Path, urls: list[str]) -> str:
    path.write_text("\n".join(urls) + "\n")
    return str(path)


def rows_of(run: Path, generation: int = 0) -> list[dict[str, Any]]:
    parts = sorted((run / "download" / f"gen-{generation:04d}").glob("part-*.parquet"))
    tables = [pq.read_table(part) for part in parts]
    assert all(table.schema.names == IMAGES.names for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def files_of(run: Path) -> dict[str, bytes]:
    found = [p for p in (run / "download").rglob("*") if p.suffix in (".parquet", ".tar")]
    return {str(p.relative_to(run)): p.read_bytes() for p in found}


def hostile_list(web: Web, folder: Path) -> str:
    urls = [web.url(f"/image/{n}.jpg") for n in range(12)] + [web.url(path) for path in PATHS]
    urls += [web.url("/image/3.jpg#again"), f"http://user:pw@127.0.0.1:{web.port}/image/1.jpg", "nonsense"]
    return write_list(folder / "hostile.txt", urls)


def test_every_url_is_a_row_in_order_and_two_workers_give_the_bytes_of_one(
    web: Web, tmp_path: Path, ray_session: None
) -> None:
    urls = hostile_list(web, tmp_path)
    download.execute(alone(tmp_path / "one"), config(), urls=urls, role="pool:web")
    outcome = download.execute(Context(RunDirectory(str(tmp_path / "two"))), config(), urls=urls, role="pool:web")
    rows = rows_of(tmp_path / "two")
    assert [row["image_id"] for row in rows] == list(range(25))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert outcome.summary["ok"] == 12 and outcome.summary["rows"] == 25
    assert [row["error"].split(":")[0] for row in rows[12:22]] == list(PATHS.values())
    assert rows[22]["status"] == "duplicate_url" and rows[22]["duplicate_of"] == 3
    assert rows[23]["error"].startswith("credentials") and "pw" not in rows[23]["url"]
    assert not any("s3cret" in (row["error"] or "") for row in rows)
    for n, row in enumerate(rows[:12]):
        with open(tmp_path / "two" / row["shard"], "rb") as file:
            file.seek(row["offset"])
            data = file.read(row["length"])
        assert data == jpeg(n)
        assert row["sha256"] == row["stored_sha256"] == hashlib.sha256(data).digest()
        assert (row["width"], row["height"], row["original_width"]) == (48, 36, 48)


def test_a_shard_is_a_webdataset_in_row_order_with_time_zero(web: Web, tmp_path: Path) -> None:
    urls = write_list(tmp_path / "l.txt", [*[web.url(f"/image/{n}.jpg") for n in range(12)], web.url("/404")])
    download.execute(alone(tmp_path / "run"), config(shard_rows=50), urls=urls, role="pool")
    with tarfile.open(tmp_path / "run/download/gen-0000/shards/part-000-000000.tar") as tar:
        members = tar.getmembers()
        about = json.load(tar.extractfile("000-000000000004.json"))  # type: ignore[arg-type]
    assert [m.name for m in members] == [f"000-{n:012d}.{s}" for n in range(12) for s in ("jpg", "json")]
    assert {(m.mtime, m.uid, m.mode) for m in members} == {(0, 0, 0o644)}
    assert about["url"] == web.url("/image/4.jpg") and about["image_id"] == 4


def test_a_finished_list_is_skipped_and_another_of_its_name_refused(web: Web, tmp_path: Path) -> None:
    urls = write_list(tmp_path / "a.txt", [web.url("/image/1.jpg")])
    assert not download.execute(alone(tmp_path / "run"), config(), urls=urls, role="pool").skipped
    web.hits.clear()
    assert download.execute(alone(tmp_path / "run"), config(), urls=urls, role="pool").skipped
    assert not web.hits
    other = write_list(tmp_path / "b.txt", [web.url("/image/2.jpg")])
    with pytest.raises(UserError, match=r"pool:a is registered .* with other content"):
        download.execute(alone(tmp_path / "run"), config(), urls=other, role="pool:a")
    with pytest.raises(UserError, match=r"was made otherwise .*max_bytes"):
        download.execute(alone(tmp_path / "run"), config(max_bytes=40_000), urls=urls, role="pool")


def test_repeats_are_found_over_pool_lists_but_seeds_keep_their_images(web: Web, tmp_path: Path) -> None:
    same = [web.url("/image/1.jpg"), web.url("/image/2.jpg")]
    first = write_list(tmp_path / "first.txt", same)
    second = write_list(tmp_path / "second.txt", [web.url("/image/3.jpg"), *same])
    seeds = write_list(tmp_path / "seeds.txt", same)
    for urls, role in ((first, "pool"), (second, "pool"), (seeds, "seed:s")):
        download.execute(alone(tmp_path / "run"), config(), urls=urls, role=role)
    pool = rows_of(tmp_path / "run", 1)
    assert [(r["image_id"], r["status"], r["duplicate_of"]) for r in pool] == [
        (1 << 40, "ok", None),
        (1 << 40 | 1, "duplicate_url", 0),
        (1 << 40 | 2, "duplicate_url", 1),
    ]
    assert [(r["source"], r["status"]) for r in rows_of(tmp_path / "run", 2)] == [("seed:s", "ok")] * 2


def test_retry_brings_the_transient_rows_alone_as_a_new_generation(web: Web, tmp_path: Path) -> None:
    web.routes["/flaky"] = site.failing(3, jpeg(50))
    urls = write_list(
        tmp_path / "l.txt", [web.url("/image/1.jpg"), web.url("/down"), web.url("/flaky"), web.url("/404")]
    )
    run = tmp_path / "run"
    download.execute(alone(run), config(), urls=urls, role="pool")
    assert [r["status"] for r in rows_of(run)] == ["ok", "transient", "transient", "failed"]
    outcome = download.retry(alone(run), config(timeout_s=2.0))
    assert (outcome.rows, outcome.summary["ok"]) == (2, 1)
    assert [(r["image_id"], r["status"], r["url"]) for r in rows_of(run, 1)] == [
        (1, "transient", web.url("/down")),
        (2, "ok", web.url("/flaky")),
    ]
    assert (run / "download/gen-0001/part-000-000000-r1.parquet").exists()
    assert [r["image_id"] for r in rows_of(run, 0)] == [0, 1, 2, 3]
    web.routes["/down"] = lambda h: send(h, jpeg(51))
    assert download.retry(alone(run), config()).rows == 1
    web.routes["/down"] = lambda h: send(h, b"", status=500)
    nothing = download.retry(alone(run), config())
    assert nothing.skipped and nothing.rows == 0 and len(list((run / "download").glob("gen-*"))) == 3


def test_a_killed_worker_changes_nothing(web: Web, tmp_path: Path, ray_session: None) -> None:
    killed: list[int] = []

    def kill_the_client(handler: Any) -> None:
        if not killed:
            port = handler.client_address[1]
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp")):
                        killed.append(process.pid)
                        process.kill()
                        break
        send(handler, jpeg(77))

    web.routes["/killer"] = kill_the_client
    paths = [f"/image/{n}.jpg" for n in range(7)]
    urls = write_list(tmp_path / "l.txt", [web.url(path) for path in [*paths, "/killer", *paths[:3]]])
    patient = config(timeout_s=60.0)
    download.execute(Context(RunDirectory(str(tmp_path / "killed"))), patient, urls=urls, role="pool")
    assert len(killed) == 1
    download.execute(alone(tmp_path / "whole"), patient, urls=urls, role="pool")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_an_interrupted_list_goes_on_where_it_was(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = write_list(tmp_path / "l.txt", [web.url(f"/image/{n}.jpg") for n in range(20)])
    made: list[str] = []

    def stop_after_one(writer: Any, name: str, *rest: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(name)
        return shard.download_part(writer, name, *rest)

    monkeypatch.setattr(download, "download_part", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        download.execute(alone(tmp_path / "run"), config(), urls=urls, role="pool")
    other = write_list(tmp_path / "m.txt", [web.url("/image/1.jpg")])
    with pytest.raises(UserError, match=r"pool:l .* is not finished"):
        download.execute(alone(tmp_path / "run"), config(), urls=other, role="pool")
    with pytest.raises(UserError, match="pool:l is not finished"):
        download.retry(alone(tmp_path / "run"), config())
    monkeypatch.undo()
    web.hits.clear()
    download.execute(alone(tmp_path / "run"), config(), urls=urls, role="pool")
    assert not any(web.hits[f"/image/{n}.jpg"] for n in range(8))
    download.execute(alone(tmp_path / "whole"), config(), urls=urls, role="pool")
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_rows_that_img2dataset_loses_are_asked_again(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {2: 1, 5: 99}
    write = Collector.write

    def losing(self: Collector, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        if lost.get(meta["row"], 0) > 0:
            lost[meta["row"]] -= 1
            raise RuntimeError("a bug in there")
        write(self, img_str, key, caption, meta)

    monkeypatch.setattr(Collector, "write", losing)
    urls = write_list(tmp_path / "l.txt", [web.url(f"/image/{n}.jpg") for n in range(8)])
    download.execute(alone(tmp_path / "run"), config(), urls=urls, role="pool")
    rows = rows_of(tmp_path / "run")
    assert [r["status"] for r in rows] == ["ok"] * 5 + ["transient"] + ["ok"] * 2
    assert rows[5]["error"].startswith("internal")


def test_larger_images_are_shrunk_once_where_asked(web: Web, tmp_path: Path) -> None:
    urls = write_list(tmp_path / "l.txt", [web.url("/wide"), web.url("/image/1.jpg")])
    download.execute(alone(tmp_path / "run"), config(max_side=64), urls=urls, role="pool")
    wide, small = rows_of(tmp_path / "run")
    assert (wide["width"], wide["height"], wide["original_width"], wide["original_height"]) == (64, 16, 400, 100)
    assert wide["sha256"] == hashlib.sha256(jpeg(5, 400, 100)).digest() != wide["stored_sha256"]
    stored = (tmp_path / "run" / wide["shard"]).read_bytes()[wide["offset"] : wide["offset"] + wide["length"]]
    assert hashlib.sha256(stored).digest() == wide["stored_sha256"]
    assert Image.open(io.BytesIO(stored)).size == (64, 16)
    assert small["sha256"] == small["stored_sha256"]


def test_lists_of_the_unwilling_are_kept_and_part_of_the_fingerprint(web: Web, tmp_path: Path) -> None:
    opt_out = write_list(tmp_path / "out.txt", [web.url("/image/2.jpg").replace("http", "HTTP") + "#x"])
    domains = write_list(tmp_path / "domains.txt", ["bad.example"])
    urls = write_list(
        tmp_path / "l.txt", [web.url("/image/1.jpg"), web.url("/image/2.jpg"), "http://www.bad.example/x"]
    )
    settings = config(opt_out=opt_out, blocked_domains=domains)
    download.execute(alone(tmp_path / "run"), settings, urls=urls, role="pool")
    errors = [(r["status"], (r["error"] or "").split(":")[0]) for r in rows_of(tmp_path / "run")]
    assert errors == [("ok", ""), ("excluded", "opted_out"), ("excluded", "blocked_domain")]
    write_list(tmp_path / "out.txt", ["http://else.example/"])
    with pytest.raises(UserError, match="opt_out"):
        download.execute(alone(tmp_path / "run"), settings, urls=urls, role="pool")


def test_captions_and_labels_are_kept(web: Web, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"url,alt,label\n{web.url('/image/1.jpg')},a cat,cats\n{web.url('/404')},gone,\n")
    download.execute(alone(tmp_path / "run"), config(), urls=str(tmp_path / "l.csv"), role="seed:cats", exempt=True)
    found = [(r["caption"], r["label"], r["source"]) for r in rows_of(tmp_path / "run")]
    assert found == [("a cat", "cats", "seed:cats"), ("gone", "", "seed:cats")]
    assert RunDirectory(str(tmp_path / "run")).sources()[0].exempt


@pytest.mark.parametrize("role", ["", "pools", "seed", "seed:", "pool:a b", "reference:../x"])
def test_roles_that_are_none_are_refused_before_anything_starts(web: Web, tmp_path: Path, role: str) -> None:
    urls = write_list(tmp_path / "l.txt", [web.url("/image/1.jpg")])
    with pytest.raises(UserError, match="--as"):
        download.execute(alone(tmp_path / "run"), config(), urls=urls, role=role)
    assert not (tmp_path / "run").exists()


def test_tar_offsets_are_those_of_tarfile() -> None:
    tar = ShardTar()
    offsets = [tar.add(f"{n:03d}.bin", bytes(range(n))) for n in (0, 1, 200)]
    with tarfile.open(fileobj=io.BytesIO(tar.close())) as found:
        assert [(m.offset_data, m.size) for m in found] == list(zip(offsets, (0, 1, 200), strict=True))


def test_hosts_take_turns() -> None:
    from pipelines.download.addresses import parse

    targets = {n: parse(f"http://{host}.example/{n}") for n, host in enumerate("aaaabbc")}
    assert [row for row, _ in shard.take_turns(targets)] == [0, 4, 6, 1, 5, 2, 3]
