"""The demo's web: what is planted is what is served, and the truth about it is written down."""

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest

from demo import originals
from demo.corpus import Corpus
from demo.plant import FAULTS, plant
from demo.web import HOSTS, Web, choose_places
from tests.e2e.demo_corpus import drawn_corpus

COUNTS = {"animal": 90, "texture": 40, "photo": 40, "art4apps": 24}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return drawn_corpus(tmp_path_factory.mktemp("trees"), COUNTS)


@pytest.fixture(scope="module")
def planted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("web")
    pictures = originals.candidates(corpus)
    vectors = np.zeros((len(pictures), 512), np.float16)
    vectors[np.arange(len(pictures)), np.arange(len(pictures))] = 1
    vectors[1] = vectors[0] * np.float16(0.8) + vectors[1] * np.float16(0.6)  # a pair above 0.6
    return folder, plant(corpus, pictures, vectors, choose_places(), folder, lambda _: None)


@pytest.fixture(scope="module")
def web(planted: tuple[Path, dict[str, Any]]) -> Iterator[Web]:
    site = json.loads((planted[0] / "site.json").read_text())
    server = Web(site["places"], site["pages"])
    yield server
    server.close()


def get(url: str, timeout: float = 5) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def truth(planted: tuple[Path, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(planted[0] / "truth.parquet").to_pylist() if row["kind"] == kind]


def test_truth_tells_of_every_row_of_the_list_in_its_order(planted: tuple[Path, dict[str, Any]]) -> None:
    listed = pq.read_table(planted[0] / "urls.parquet")["url"].to_pylist()
    rows = pq.read_table(planted[0] / "truth.parquet").to_pylist()
    assert [row["url"] for row in rows] == listed
    assert [row["row"] for row in rows] == list(range(len(listed)))
    counts = Counter(row["kind"] for row in rows)
    assert {"original", "copy", "leak", *FAULTS} <= {*counts, "other"}
    assert counts["original"] == planted[1]["originals"]


def test_a_url_is_listed_before_its_repetition(planted: tuple[Path, dict[str, Any]]) -> None:
    first: dict[str, str] = {}
    for row in pq.read_table(planted[0] / "truth.parquet").to_pylist():
        if row["kind"] == "duplicate_url":
            assert first[row["url"]] in ("original", "other")
        assert first.setdefault(row["url"], row["kind"]) == row["kind"] or row["kind"] == "duplicate_url"


def test_one_original_of_each_component_and_every_copy_is_of_an_original(planted: tuple[Path, dict[str, Any]]) -> None:
    names = {row["sha256"] for row in truth(planted, "original")}
    assert {row["of"] for row in truth(planted, "copy")} <= names
    assert len({row["of"] for row in truth(planted, "copy")}) == len(truth(planted, "copy"))


def test_seeds_and_references_are_kept_out_of_the_pool(planted: tuple[Path, dict[str, Any]], corpus: Corpus) -> None:
    outside = set()
    for path in [*planted[0].glob("seed-*.parquet"), planted[0] / "reference.parquet"]:
        outside |= {p.split("/")[-1] for p in pq.read_table(path)["path"].to_pylist()}
    pool = {row["path"].split("/")[-1] for kind in ("original", "other") for row in truth(planted, kind)}
    assert len(outside) == sum(planted[1]["seeds"].values()) + planted[1]["references"]
    assert not outside & pool


def test_planting_again_gives_the_same_list_and_files(
    planted: tuple[Path, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    site = json.loads((planted[0] / "site.json").read_text())
    pictures = originals.candidates(corpus)
    plant(corpus, pictures, None, site["places"], tmp_path, lambda _: None)
    mine = {p.name: p.read_bytes() for p in sorted((tmp_path / "files").iterdir())}
    again = tmp_path / "again"
    plant(corpus, pictures, None, site["places"], again, lambda _: None)
    assert mine == {p.name: p.read_bytes() for p in sorted((again / "files").iterdir())}
    assert (tmp_path / "urls.parquet").read_bytes() == (again / "urls.parquet").read_bytes()


def test_exact_copies_are_the_originals_bytes_however_they_are_reached(
    planted: tuple[Path, dict[str, Any]], corpus: Corpus, web: Web
) -> None:
    by_sha = {p.sha256: corpus.open(p) for p in corpus.pictures}
    for row in [r for r in truth(planted, "copy") if r["copy"] == "exact"][:4]:
        status, _, body = get(row["url"])
        assert (status, body) == (200, by_sha[row["of"]])


def test_derived_copies_decode_and_differ_from_the_original(planted: tuple[Path, dict[str, Any]], web: Web) -> None:
    from embeddings.decoding import decode

    for copy, same_size in (("resized", False), ("recompressed", True), ("cropped", False), ("overlaid", True)):
        row = next(r for r in truth(planted, "copy") if r["copy"] == copy)
        _, _, body = get(row["url"])
        pixels = decode(body)
        assert (pixels.shape[:2] == (140, 180)) is same_size
        assert min(pixels.shape[:2]) >= originals.SHORTEST


def test_the_web_misbehaves_as_the_truth_says(planted: tuple[Path, dict[str, Any]], web: Web) -> None:
    def first(kind: str) -> str:
        return str(truth(planted, kind)[0]["url"])

    assert get(first("missing"))[0] == 404
    assert get(first("gone"))[0] == 410
    status, headers, body = get(first("html"))
    assert status == 200 and headers["Content-Type"] == "image/jpeg" and body.startswith(b"<!doctype html>")
    assert "noai" in get(first("noai"))[1]["X-Robots-Tag"]
    assert get(first("to_private"))[1]["Location"] == "http://10.0.0.1/router.png"
    assert "127.0.0.99" in get(first("to_loopback"))[1]["Location"]
    assert get(first("to_file"))[1]["Location"].startswith("file://")
    assert get(first("unavailable"))[0] == 503
    with pytest.raises(http.client.IncompleteRead):
        get(first("hangup"))
    members = urlsplit(first("robots"))
    assert b"Disallow: /members/" in get(f"http://{members.netloc}/robots.txt")[2]


def test_a_late_answer_drips_past_any_time_bound(planted: tuple[Path, dict[str, Any]], web: Web) -> None:
    parts = urlsplit(truth(planted, "over")[0]["url"])
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    connection.request("GET", parts.path)
    response = connection.getresponse()
    began = time.monotonic()
    pieces = 0
    while time.monotonic() - began < 1:
        pieces += bool(response.read1(1 << 16))
    assert pieces >= 2  # no single read waits long, and the end is a minute away
    assert not response.isclosed()
    connection.close()


def test_the_server_ends_when_whoever_started_it_does(planted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    site = json.loads((planted[0] / "site.json").read_text())
    places = choose_places()
    (tmp_path / "site.json").write_text(json.dumps(site | {"places": places}))
    server = subprocess.Popen(
        [sys.executable, "-m", "demo.web", str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    address, port = places["pictures"]
    assert get(f"http://{address}:{port}/robots.txt")[0] == 200
    server.stdin.close()
    assert server.wait(5) == 0


def test_a_taken_port_is_passed_over_unless_a_run_depends_on_it() -> None:
    places = choose_places()
    web = Web(places, {})
    try:
        port = places[HOSTS[0]][1]
        assert choose_places()[HOSTS[0]] != places[HOSTS[0]]
        with pytest.raises(OSError, match=f"port {port}"):
            if sys.platform == "linux":
                choose_places(port)
            else:
                raise OSError(f"port {port}")
    finally:
        web.close()
