"""`extract`: the images that pages show, from WARC and WAT, and nothing that only counts visitors."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from pipelines import extract
from pipelines.context import Resources
from pipelines.events import Events

PAGE = """<!doctype html><html><head><base href="/deep/"><meta charset="utf-8"></head><body>
<img src="a.jpg" alt="  a   cat&amp;dog ">
<img src='//cdn.example/b.png?x=1&amp;y=2#frag'>
<img src="data:image/gif;base64,R0lGOD" data-src="lazy.jpg" alt="lazy">
<img srcset="s.jpg 320w, l.jpg 1024w, m.jpg 640w" alt="">
<img src="data:image/gif;base64,R0lGOD">
<img src="one.gif" width="1" height="1"><img src="two.gif" width="2px"><img src="wide.jpg" width="100%">
<img src="https://www.facebook.com/tr?id=1"><img src="/img/spacer.gif"><img src="https://stats.wp.com/g.gif">
<img src="a.jpg"><img src="ftp://x/y.jpg"><img src="javascript:x()"><img src="http://[bad/"><img>
<img src="/pixels/art.jpg"><img src="http://u:p@h.example/x.jpg"><p>text</p></body></html>"""

EXPECTED = [
    ("http://page.example/deep/a.jpg", "a cat&dog"),
    ("http://cdn.example/b.png?x=1&y=2", None),
    ("http://page.example/deep/lazy.jpg", "lazy"),
    ("http://page.example/deep/l.jpg", None),
    ("http://page.example/deep/wide.jpg", None),
    ("http://page.example/pixels/art.jpg", None),
]


def record(kind: str, uri: str, body: bytes, content_type: str) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(uri: str, html: bytes, kind: str = "text/html; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(html)}\r\n\r\n".encode()
    return record("response", uri, head + html, "application/http; msgtype=response")


def wat(uri: str, links: list[dict[str, str]], base: str | None = None) -> bytes:
    html = {"Links": links, "Head": {"Base": base} if base else {}}
    document = {
        "Envelope": {
            "WARC-Header-Metadata": {"WARC-Target-URI": uri},
            "Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}},
        }
    }
    return record("metadata", uri, json.dumps(document).encode(), "application/json")


def packed(*records: bytes) -> bytes:
    return b"".join(gzip.compress(r) for r in records)


def images(path: Path) -> tuple[list[tuple[str, str | None]], Counter[str]]:
    counts: Counter[str] = Counter()
    rows = list(extract.images_of(str(path), counts))
    assert all(row[2].startswith("http") for row in rows)
    return [row[:2] for row in rows], counts


@pytest.mark.parametrize("compressed", [False, True])
def test_the_images_of_a_page_are_found(tmp_path: Path, compressed: bool) -> None:
    records = [
        record("warcinfo", "", b"software: x\r\n", "application/warc-fields"),
        record("request", "http://page.example/", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        response("http://page.example/x/y.html", PAGE.encode()),
        response("http://page.example/z.jpg", b"\xff\xd8\xff", "image/jpeg"),
        response("http://other.example/", "<img src=é.jpg alt='ünï'>".encode("latin-1"), "text/html; charset=latin-1"),
    ]
    path = tmp_path / "x.warc"
    path.write_bytes(packed(*records) if compressed else b"".join(records))
    found, counts = images(path)
    assert found == [*EXPECTED, ("http://other.example/é.jpg", "ünï")]
    assert counts["pages"] == 2 and counts["records"] == 5
    assert counts["dropped_tracking_pixel"] == 5 and counts["dropped_data_url"] == 1
    assert counts["dropped_repeated_on_page"] == 1


def test_the_images_among_the_links_of_wat_records_are_found(tmp_path: Path) -> None:
    links = [
        {"path": "IMG@/src", "url": "a.jpg", "alt": "a cat"},
        {"path": "A@/href", "url": "b.html"},
        {"path": "IMG@/src", "url": "data:image/png;base64,AA"},
        {"path": "IMG@/src", "url": "t.gif", "width": "1", "height": "1"},
        {"path": "IMG@/srcset", "url": "s.jpg 1x, l.jpg 2x"},
    ]
    path = tmp_path / "x.warc.wat.gz"
    path.write_bytes(packed(wat("http://page.example/x/", links), wat("http://page.example/", links[:1], "/deep/")))
    found, _ = images(path)
    assert found == [
        ("http://page.example/x/a.jpg", "a cat"),
        ("http://page.example/x/l.jpg", None),
        ("http://page.example/deep/a.jpg", "a cat"),
    ]


def test_bad_records_are_counted_and_the_rest_kept(tmp_path: Path) -> None:
    good = wat("http://page.example/", [{"path": "IMG@/src", "url": "a.jpg"}])
    bad = [
        record("metadata", "http://x/", b"{not json", "application/json"),
        record("metadata", "http://x/", b"[1]", "application/json"),
        record("metadata", "http://x/", b'{"Envelope": {"Payload-Metadata": {}}}', "application/json"),
        response("http://x/", b"\xff\xfe\x00<img \x00src=", "text/html; charset=nonsense"),
    ]
    path = tmp_path / "x.wat.gz"
    path.write_bytes(packed(*bad, good))
    found, counts = images(path)
    assert found == [("http://page.example/a.jpg", None)]
    assert counts["bad_records"] == 2
    path.write_bytes(packed(good, good)[:-20])
    assert images(path)[0][:1] == [("http://page.example/a.jpg", None)]


def test_files_are_joined_in_their_order(tmp_path: Path, ray_session: None) -> None:
    paths = []
    for n in range(3):
        path = tmp_path / f"{n}.warc.gz"
        path.write_bytes(packed(*[response(f"http://p{n}.example/", b"<img src=1.jpg><img src=2.jpg>")] * (3 - n)))
        paths.append(str(path))
    out = tmp_path / "sub/urls.parquet"
    found = extract.execute(paths, str(out), Resources(), Events(None))
    table = pq.read_table(out)
    assert table.schema.names == ["url", "alt", "page_url"]
    expected = [f"http://p{n}.example/{k}.jpg" for n in range(3) for _ in range(3 - n) for k in (1, 2)]
    assert table["url"].to_pylist() == expected
    assert found.rows == 12 and found.counts["pages"] == 6
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["urls.parquet"]


@pytest.mark.parametrize(
    ("srcset", "largest"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg 1x, b.jpg 2x", "b.jpg"),
        ("a.jpg 300w,https://x/b,c.jpg 900w", "https://x/b,c.jpg"),
        ("", ""),
        (" , ", ""),
    ],
)
def test_the_largest_candidate_of_a_srcset_is_taken(srcset: str, largest: str) -> None:
    assert extract.largest_of_srcset(srcset) == largest


def test_what_is_no_crawl_file_is_refused(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "empty.warc").write_bytes(b"")
    (tmp_path / "text.warc").write_bytes(b"hello\n" * 100)
    (tmp_path / "zip.warc.gz").write_bytes(gzip.compress(b"hello\n" * 100))
    for name, sentence in (
        ("absent.warc", "no such"),
        ("empty.warc", "empty"),
        ("text.warc", "not a WARC"),
        ("zip.warc.gz", "not a WARC"),
    ):
        with pytest.raises(UserError, match=sentence):
            extract.execute([str(tmp_path / name)], str(tmp_path / "o.parquet"), Resources(), Events(None))
    with pytest.raises(UserError, match=r"ends in \.parquet"):
        extract.execute([str(tmp_path / "text.warc")], str(tmp_path / "o.csv"), Resources(), Events(None))
    assert not (tmp_path / "o.parquet").exists()
