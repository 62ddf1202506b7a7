"""The block list is asked before a URL is, when bytes came and when pixels are known; what it stops leaves no trace."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import blocklist, storage
from curation.schemas import IMAGES, image_id
from curation.thresholds import Thresholds
from pipelines import cluster as ray_cluster
from pipelines import pieces
from pipelines.blocking import domain_digest, url_digest
from pipelines.context import Context, Outcome
from pipelines.download import shard
from pipelines.download.shard_writer import Collected, Collector, ShardTar
from pipelines.duplicate_search import Deciding, reasons
from pipelines.forget_rewrite import erase
from pipelines.run_directory import RunDirectory
from pipelines.stages import download, importing
from pipelines.stages.download import DownloadConfig
from tests.pipelines.image_runs import picture
from tests.pipelines.selection_runs import in_place

URL = "http://example.org/opted-out.jpg"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def block(
    run: str, *, urls: tuple[str, ...] = (), domains: tuple[str, ...] = (), files: tuple[bytes, ...] = ()
) -> None:
    salt = blocklist.make_salt(run)
    digests = {
        "url": [url_digest(url) for url in urls],
        "domain": [domain_digest(name) for name in domains],
        "bytes": [bytes.fromhex(storage.sha256(data)) for data in files],
    }
    keys = [(kind, blocklist.keyed(salt, kind, values)) for kind, values in digests.items()]
    blocklist.put_keys(run, "0001-asked", keys, 0)


def table(paths: list[str]) -> list[dict[str, Any]]:
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_a_blocked_url_of_a_list_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    block(run.root, urls=(URL,), domains=("left.example",))
    listed = tmp_path / "list.csv"
    lines = ["http://example.org/1.jpg", URL.replace("http", "HTTP") + "#again", "http://cdn.left.example/2.jpg", URL]
    listed.write_text("url,caption\n" + "".join(f"{url},caption {i}\n" for i, url in enumerate(lines)))
    monkeypatch.setattr(download, "_fetch", lambda *_: Outcome("download", False, 0, {}, ""))
    download.execute(Context(run), DownloadConfig(), urls=str(listed), role="pool:web")  # type: ignore[call-arg]
    (generation,) = run.stage("download").all_generations()
    rows = pieces.PieceTask(generation.file("list/000-000000.parquet"), 0, "pool:web").read().to_pylist()
    assert [row["image_id"] for row in rows] == [0, 1, 2, 3]
    assert [row["place"] for row in rows] == [lines[0], None, None, None]
    assert [row["error"] for row in rows] == [None, *["forgotten: by its URL"] * 3]
    assert rows[1]["caption"] is None and rows[1]["duplicate_of"] is None
    keys = table(storage.list_files(generation.file("keys"), ".parquet"))
    assert [row["id"] for row in keys] == [0], "not even a hash of it"


def piece_of(*urls: str | None) -> pa.Table:
    rows = [
        dict.fromkeys(pieces.PIECE.names) | {"image_id": i, "place": url, "caption": "c"} for i, url in enumerate(urls)
    ]
    return pa.Table.from_pylist(rows, schema=pieces.PIECE)


def test_what_was_listed_before_is_not_asked_and_blocked_bytes_are_not_stored(tmp_path: Path) -> None:
    run, secret, other = str(tmp_path), picture(1), picture(2)
    block(run, urls=(URL,), files=(secret,))
    _, rules = download._prepare(Context(RunDirectory(run)), DownloadConfig())  # type: ignore[call-arg]
    assert rules.blocked is not None
    piece = piece_of(URL, None).slice(0, 1)
    collected, refused = shard.fetch(piece, rules)
    assert not collected.rows and str(refused[0]) == "forgotten: by its URL"
    piece, collected = piece_of(URL, "http://a.example/1", "http://a.example/2"), Collector()
    for row, data in ((1, secret), (2, other)):
        meta = {"row": row, "sha256": storage.sha256(data)} | dict.fromkeys(
            ("width", "height", "original_width", "original_height"), 8
        )
        collected.write(data, str(row), None, meta)
    rows, tar = shard.assemble(piece, collected, refused, "pool:web", "s.tar", shard.Blocked(rules.blocked))
    assert [(row["status"], row.get("error")) for row in rows] == [
        ("excluded", "forgotten: by its URL"),
        ("excluded", "forgotten: by its bytes"),
        ("ok", None),
    ]
    assert rows[0]["url"] is None and rows[0]["caption"] is None and "sha256" not in rows[1]
    assert tar is not None and secret[100:200] not in tar[:] and other[100:200] in tar[:]
    assert isinstance(collected.rows[1], Collected)


def test_redirects_to_a_blocked_url_are_refused(tmp_path: Path) -> None:
    block(str(tmp_path), urls=(URL,))
    _, rules = download._prepare(Context(RunDirectory(str(tmp_path))), DownloadConfig())  # type: ignore[call-arg]
    opener = shard._make_opener(rules)
    assert opener.opted_out(URL) and not opener.opted_out("http://example.org/other.jpg")


def test_imports_of_blocked_bytes_and_urls_keep_an_id_and_a_reason(tmp_path: Path) -> None:
    run, folder = RunDirectory(str(tmp_path / "run")), tmp_path / "own"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    block(run.root, urls=(URL,), files=(picture(1),))
    listed = pa.table({"path": [f"{n}.png" for n in range(3)], "url": [None, None, URL], "label": ["a", "b", "c"]})
    pq.write_table(listed, folder / "list.parquet")
    importing.execute(Context(run), kind="parquet", origin=str(folder / "list.parquet"), role="pool:own")
    rows = table(run.stage("import").part_paths())
    assert [row["status"] for row in rows] == ["ok", "excluded", "excluded"]
    assert [row["error"] for row in rows] == [None, "forgotten: by its bytes", "forgotten: by its URL"]
    assert all(rows[n][name] is None for n in (1, 2) for name in ("sha256", "shard", "url", "label"))
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and "blocked" not in str(p))
    listed_rows = table(storage.list_files(run.path("import/gen-0000/list"), ".parquet"))
    assert URL.encode() not in written and URL not in json.dumps(listed_rows, default=str)


def test_the_filter_drops_equal_pixels_and_near_hashes_of_what_came_later(tmp_path: Path) -> None:
    salt, pixels = blocklist.make_salt(str(tmp_path)), b"p" * 32
    before = image_id(1, 0)
    blocklist.put_keys(str(tmp_path), "0001-images", [("pixels", blocklist.keyed(salt, "pixels", [pixels]))], before)
    blocklist.put_hashes(str(tmp_path), "0001", np.array([0b1111], np.uint64), before)
    rows = []
    for number, (source, digest, hashed, status) in enumerate(
        [
            (0, pixels, 0b1111, "ok"),  # it was there, and stayed
            (1, pixels, 0, "ok"),
            (1, b"q" * 32, 0b0111, "ok"),
            (1, b"q" * 32, 0b0001, "ok"),
            (1, pixels, 0b1111, "failed"),
            (2, pixels, None, "ok"),  # of an exempt seed set: still forgotten
        ]
    ):
        name = "seed:exempt" if source == 2 else "pool:web"
        row = dict.fromkeys(IMAGES.names) | {"image_id": image_id(source, number), "source": name, "status": status}
        rows.append(row | {"pixel_sha256": digest, "pca_hash": hashed, "width": 9, "height": 9})
    known = blocklist.load(str(tmp_path))
    deciding = Deciding(Thresholds(None, None, None, None), frozenset({"seed:exempt"}), "", 1, known)
    found = reasons(pa.Table.from_pylist(rows, schema=IMAGES), deciding)
    assert found.tolist() == ["", "forgotten", "forgotten", "", "", "forgotten"]


def test_a_shard_stays_a_tar_when_an_image_and_its_json_go(tmp_path: Path) -> None:
    tar, places = ShardTar(), []
    for number in range(3):
        about = {"url": f"http://example.org/{number}.png", "caption": "x" * 600}
        places.append(tar.add_sample(f"000-{number:012d}", "png", picture(number), about))
    path = tmp_path / "shard.tar"
    path.write_bytes(tar.close()[:])
    size = path.stat().st_size
    erase(str(path), [(places[1], len(picture(1)))])
    assert path.stat().st_size == size
    with tarfile.open(path) as members:
        held = {m.name: members.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert len(held) == 6
    assert held["000-000000000001.png"] == bytes(len(picture(1))) and json.loads(held["000-000000000001.json"]) == {}
    for number in (0, 2):
        assert held[f"000-{number:012d}.png"] == picture(number)
        assert json.loads(held[f"000-{number:012d}.json"])["url"].endswith(f"{number}.png")
