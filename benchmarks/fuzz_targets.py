"""What is fuzzed: a target takes bytes and returns the class of what came of them; whatever else it raises is a crash.

`mutate` is the mutator of benchmarks/fuzz.py and of the short version in tests/security.
"""

import functools
import gzip
import io
import os
import random
import socket
import ssl
import struct
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import UserError
from embeddings import decoding_header
from embeddings.decoding import FORMATS, DecodeError, DecodeLimits, Decoder, probe, sniff
from pipelines.download import addresses, connection, robots
from pipelines.download.errors import FetchError

LIMITS = DecodeLimits(max_pixels=4_000_000, cpu_s=4, wall_s=20.0, memory_bytes=2 << 30)
CRASH_IS_HANDLED = ("decoder_crashed", "decoder_timeout", "too_much_memory")


@dataclass(frozen=True)
class Target:
    """run(data): the class of the outcome. seeds(): honest inputs to start from."""

    run: Callable[[bytes], str]
    seeds: Callable[[], list[bytes]]


def mutate(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """One to eight changes: bits, bytes, numbers at the edges, pieces cut out, doubled, moved or taken from others."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
        size = len(changed)
        place = chance.randrange(size) if size else 0
        end = min(size, place + chance.choice((1, 2, 4, 8, 64, 512)))
        kind = chance.randrange(8)
        if kind == 0 and size:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and size:
            changed[place] = chance.randrange(256)
        elif kind == 2:
            number = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
            piece = struct.pack(chance.choice((">I", "<I")), number)
            cut = chance.choice((1, 2, 4))
            changed[place : place + cut] = piece[:cut] if number > 0xFFFF else piece[-cut:]
        elif kind == 3:
            del changed[place:end]
        elif kind == 4:
            changed[place:place] = changed[place:end] * chance.choice((1, 1, 2, 16))
        elif kind == 5 and size:
            other = chance.choice(others)
            start = chance.randrange(len(other)) if other else 0
            changed[place:end] = other[start : start + end - place]
        elif kind == 6:
            changed[place:place] = chance.randbytes(chance.choice((1, 4, 16)))
        elif chance.random() < 0.2:
            del changed[place:]
    return bytes(changed)


@functools.cache
def _decoder() -> Decoder:
    return Decoder(LIMITS)


def _decode(data: bytes) -> str:
    try:
        pixels = _decoder().decode(data)
    except DecodeError as error:
        return error.reason
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size <= 3 * LIMITS.max_pixels
    return "pixels"


def _header(data: bytes) -> str:
    """What is read without a codec is what the codec's library reads, or left to it."""
    kind = sniff(data)
    size = decoding_header.plain_size(data, kind) if kind is not None else None
    if size is None or size[0] * size[1] > LIMITS.max_pixels:
        return "left to the decoder"
    try:
        found = probe(data, LIMITS)
    except DecodeError:
        return "plain, refused later"
    assert (found.width, found.height) == size, f"{kind}: {size}, and Pillow says {found}"
    return "plain"


def _url(data: bytes) -> str:
    try:
        target = addresses.parse(data.decode(errors="replace"))
    except FetchError as error:
        return error.name
    assert addresses.parse(target.url) == target, "its own form is another URL"
    assert target.url.isascii() and not any(c.isspace() for c in target.url), "a space or worse is sent"
    assert target.port not in addresses.REFUSED_PORTS
    assert target.host == socket.gethostbyname(target.host) if _is_dotted(target.host) else True
    try:
        addresses.parse(addresses.join(target, data[::-1].decode(errors="replace")))
    except FetchError as error:
        return f"asked, redirect {error.name}"
    return "asked"


def _is_dotted(host: str) -> bool:
    return host.replace(".", "").isdigit()


def _robots(data: bytes) -> str:
    text = data.decode(errors="replace")
    rules = robots.parse_rules(text)
    if rules is None:
        return "no rules"
    allowed = rules.can_fetch("https://images.example/a/b.jpg?size=large", "lvd-curate")
    delay = float(rules.crawl_delay("lvd-curate") or 0.0)
    assert 0 <= delay < float("inf")
    robots.forbidden_directive(text.splitlines()[:20], "lvd-curate", frozenset({"noai"}))
    return "allowed" if allowed else "disallowed"


def _answer(data: bytes) -> str:
    """The bytes as what a server answers, headers and all."""
    ours, theirs = socket.socketpair()
    target = addresses.parse("http://images.example/a.jpg")
    connect = connection._connect
    connection._connect = lambda *_: ours
    try:
        theirs.settimeout(1.0)
        theirs.sendall(data[:100_000])
        theirs.shutdown(socket.SHUT_WR)
        reply = connection.exchange(
            target, [], {}, seconds=1.0, max_bytes=50_000, tls=_tls(), accept=lambda status, _: status == 200
        )
    except FetchError as error:
        return error.name
    finally:
        connection._connect = connect
        theirs.close()
        ours.close()
    assert len(reply.body) <= 50_000
    return f"http_{reply.status // 100}xx"


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _in_file(suffix: str, read: Callable[[str], str]) -> Callable[[bytes], str]:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None

    def run(data: bytes) -> str:
        with tempfile.NamedTemporaryFile(suffix=suffix, prefix="curate-fuzz-", dir=folder) as file:
            file.write(data)
            file.flush()
            try:
                return read(file.name)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 20_000, "not one sentence"
                return "refused"

    return run


def _configuration(path: str) -> str:
    from pipelines import configuration

    configuration.load(path)
    return "read"


def _list(path: str) -> str:
    from pipelines.download.url_list import open_list

    listed = open_list(path)
    rows, _ = listed.measure()
    urls = [url for table in listed.batches() for url in table["url"].to_pylist()]
    return "read" if len(urls) == rows else "read, rows differ"


def _tar(path: str) -> str:
    from pipelines.tars import read_index

    index = read_index(path)
    size = os.path.getsize(path)
    assert all(m.offset >= 0 and m.size >= 0 and m.offset + m.size <= size for m in index.images), "a range outside"
    for member in index.images[:3]:
        index.about(member, {}, None)
    return "damaged" if index.damaged else "read"


def _parquet(path: str) -> str:
    from curation.parquet import read_table

    return "read" if read_table(path).num_rows else "empty"


def _paths(path: str) -> str:
    """Up to the list of files: what they hold is the decoder's part."""
    from pipelines.stages import importing

    with mock.patch.object(importing, "_import_listing", _listed):
        return importing.execute(None, kind="parquet", origin=path, role="pool")  # type: ignore[arg-type, return-value]


def _listed(_: Any, kind: Any, origin: str, *__: Any) -> Any:
    from pipelines.stages.importing import Listing, _tables

    rows = [row for table in _tables(kind, origin, None, Listing(origin)) for row in table.to_pylist()]
    return "read" if rows else "empty"


def picture_seeds(kind: str) -> list[bytes]:
    """Small honest files of a format, in the modes and with the extras that it has."""
    from PIL import Image

    base = Image.linear_gradient("L").resize((40, 24))
    rgb = Image.merge("RGB", (base, base.rotate(180), base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [rgb, rgb.rotate(90)]
    variants: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [
            (rgb, {"exif": exif, "icc_profile": b"\0" * 200}),
            (base, {"progressive": True}),
            (rgb.convert("CMYK"), {}),
            (rgb, {"comment": b"x", "xmp": b'<x tiff:Orientation="6"/>'}),
        ],
        "PNG": [
            (rgb, {"exif": exif}),
            (rgb.convert("P"), {"transparency": 1}),
            (rgb.convert("RGBA"), {"save_all": True, "append_images": frames}),
            (base.convert("I;16"), {}),
            (base.convert("1"), {}),
        ],
        "WEBP": [
            (rgb, {}),
            (rgb, {"lossless": True}),
            (rgb.convert("RGBA"), {"exif": exif}),
            (rgb, {"save_all": True, "append_images": frames}),
        ],
        "GIF": [(rgb.convert("P"), {"comment": b"x" * 300}), (rgb, {"save_all": True, "append_images": frames})],
        "BMP": [(rgb, {}), (base, {}), (base.convert("1"), {}), (rgb.convert("RGBA"), {})],
        "TIFF": [
            (rgb, {"compression": "tiff_lzw", "exif": exif}),
            (rgb, {"compression": "jpeg"}),
            (base.convert("1"), {"compression": "group4"}),
            (base.convert("F"), {}),
            (rgb.convert("YCbCr"), {}),
            (rgb, {"save_all": True, "append_images": frames, "big_tiff": True}),
        ],
        "AVIF": [(rgb, {"exif": exif}), (rgb.convert("RGBA"), {"quality": 100})],
    }
    found = []
    for image, options in variants[kind]:
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        found.append(sink.getvalue())
    return found


def _all_pictures() -> list[bytes]:
    return [data for kind in ("JPEG", "PNG", "WEBP") for data in picture_seeds(kind)]


def tar_seeds() -> list[bytes]:
    """Honest tars of each dialect, with long names and the types that are no files."""
    found = []
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=dialect) as tar:
            long = "d/" * 40 + "ü" * 40 if dialect != tarfile.USTAR_FORMAT else "d/" * 40 + "x"
            for name, data in (("0.jpg", b"\xff\xd8\xff" * 9), (long + ".png", b"\x89PNG"), ("0.json", b'{"url":"u"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
                member = tarfile.TarInfo("link.jpg")
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
        found.append(sink.getvalue()[:8192])
    return found


def _parquet_seeds() -> list[bytes]:
    table = pa.table({"url": ["http://a.example/1", None], "path": ["a.jpg", "s3://b/c"], "label": ["x", "y"]})
    found = []
    for options in ({}, {"compression": "zstd", "use_dictionary": False}, {"write_page_checksum": True}):
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        found.append(sink.getvalue())
    return found


def _yaml_seeds() -> list[bytes]:
    import pipelines.configuration  # noqa: F401 - so that it does not count as the first input's time

    texts = [path.read_bytes() for path in sorted(Path("configs").rglob("*.yaml"))[:4]]
    return [*texts, b"run: r\nsources:\n  - {as: pool, urls: a.txt}\ndedup: &a {threshold: 0.5}\n", b"a: [1, *b]\n"]


_ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Robots-Tag: noai\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 302 Found\r\nLocation: //a\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"hello", mtime=0),
]
_WRITTEN = """http://example.com/a?b=c#d https://[2606:4700::1111]:8080/x http://user:pw@127.0.0.1/ http://0x7f.1/
http://bücher.example/ä http://[::ffff:10.0.0.1%25eth0]/ http://2130706433/ //a/b http://１２７。０。０。１:22/"""
_ROBOTS = [
    b"User-agent: *\nDisallow: /a*b$\nAllow: /a/b\nCrawl-delay: 2\nSitemap: http://x/\n",
    b"User-agent: lvd-curate\nDisallow: /\nRequest-rate: 1/5s 0900-1700\nVisit-time: 0100-0200\n",
    b"noai, noindex, otherbot: noindex, unavailable_after: 25 Jun 2010 15:00:00 PST\n",
]

TARGETS: dict[str, Target] = {
    **{f"decode {kind}": Target(_decode, functools.partial(picture_seeds, kind)) for kind in FORMATS},
    "header": Target(_header, _all_pictures),
    "url": Target(_url, lambda: [url.encode() for url in _WRITTEN.split()]),
    "robots": Target(_robots, lambda: list(_ROBOTS)),
    "answer": Target(_answer, lambda: list(_ANSWERS)),
    "configuration": Target(_in_file(".yaml", _configuration), _yaml_seeds),
    "list": Target(_in_file(".csv", _list), lambda: [b'url,alt\nhttp://a/1,x\n"http://b","y\nz"\n', b"URL\n\n"]),
    "list parquet": Target(_in_file(".parquet", _list), _parquet_seeds),
    "list gzip": Target(_in_file(".txt.gz", _list), lambda: [gzip.compress(b"http://a/1\nhttp://b/2\n", mtime=0)]),
    "parquet": Target(_in_file(".parquet", _parquet), _parquet_seeds),
    "paths": Target(_in_file(".parquet", _paths), _parquet_seeds),
    "tar": Target(_in_file(".tar", _tar), tar_seeds),
}
