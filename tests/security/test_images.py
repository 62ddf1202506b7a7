"""Hostile images: what their headers claim, what they hide, and that only the decoder's process meets them."""

import io
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from embeddings import decoding, decoding_header, decoding_process
from embeddings.decoding import DecodeError, DecodeLimits, Decoder, ImageHeader, decode, probe, sniff
from tests.embeddings.pictures import encoded, scene

PICTURE = scene()
LIMITS = DecodeLimits(max_pixels=1 << 22, cpu_s=1, wall_s=10.0, memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(LIMITS) as made:
        yield made


def refusal(decoder: Decoder, data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decoder.decode(data)
    return caught.value.reason


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes, depth: int = 8, colours: int = 0, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def exif(entries: list[tuple[int, int, int, int]], order: str = "<", first: int = 8) -> bytes:
    """A block of EXIF with these (tag, type, count, value)."""
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", first) + struct.pack(f"{order}H", len(entries)) + packed + bytes(4)


def with_segments(*segments: bytes) -> bytes:
    data = encoded(PICTURE)
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + data[2:]


# What is read without a codec.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_plain_header_with_an_orientation_is_read_as_it_is_decoded(kind: str, orientation: int) -> None:
    block = Image.Exif()
    block[0x0112] = orientation
    data = encoded(PICTURE, kind, exif=block)
    height, width = decode(data).shape[:2]
    assert decoding_header.plain_size(data, kind) == (width, height)


def test_an_orientation_that_only_xmp_tells_is_read_as_it_is_decoded() -> None:
    said = b'<x:xmpmeta tiff:Orientation="6"/>'
    for data in (encoded(PICTURE, "JPEG", xmp=said), with_segments(b"http://ns.adobe.com/xap/1.0/\0" + said)):
        found = probe(data)
        assert decoding_header.plain_size(data, "JPEG") == (found.width, found.height)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_what_is_read_of_a_changed_header_is_what_the_codecs_library_reads(kind: str, data: st.DataObject) -> None:
    changed = bytearray(encoded(scene(size=(24, 16)), kind, exif=exif([(0x0112, 3, 1, 6)])))
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, min(200, len(changed) - 1)))] = data.draw(st.integers(0, 255))
    size = decoding_header.plain_size(bytes(changed), kind) if sniff(bytes(changed)) == kind else None
    if size is None or size[0] * size[1] > LIMITS.max_pixels:
        return
    try:
        found = probe(bytes(changed), LIMITS)
    except DecodeError:
        return
    assert (found.width, found.height) == size


def test_plain_headers_start_no_process_and_the_others_only_in_one() -> None:
    with Decoder(LIMITS) as fresh:
        for kind in ("JPEG", "PNG", "WEBP"):
            assert fresh.probe(encoded(PICTURE, kind)) == ImageHeader(kind, 96, 64)
        assert fresh._child is None
        for kind in ("GIF", "BMP", "TIFF"):
            assert fresh.probe(encoded(PICTURE, kind)) == ImageHeader(kind, 96, 64)
        assert fresh._child is not None


def test_asking_for_a_header_decodes_no_pixels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "probe", lambda *_: pytest.fail("the codec's library was asked in this process"))
    deflated = png(2000, 2000, bytes(2001 * 2000))
    with Decoder(LIMITS) as fresh:
        assert fresh.probe(deflated) == ImageHeader("PNG", 2000, 2000)
        with pytest.raises(DecodeError, match="too_many_pixels"):
            fresh.probe(png(60_000, 60_000, b""))


@pytest.mark.parametrize(
    "data",
    [
        with_segments(*[b"Exif\0\0" + bytes(20)] * 250_000),  # joined one by one: copied for minutes
        b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + b"!\xfe" + b"\x01a" * 1_500_000,
    ],
    ids=["jpeg", "gif"],
)
def test_headers_that_keep_a_reader_busy_are_cut(data: bytes) -> None:
    with Decoder(LIMITS) as fresh:
        began = time.monotonic()
        with pytest.raises(DecodeError):
            fresh.probe(data)
        assert time.monotonic() - began < 20
        assert fresh.probe(encoded(PICTURE, "GIF")).width == 96


# The process.


def test_the_decoders_process_knows_no_secrets_and_writes_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    program = (
        "import os, embeddings.decoding_process as p\n"
        "from embeddings.decoding import DecodeError\n"
        "def decode(data, limits, wanted):\n"
        "    try: written = os.write(os.open(p.__file__ + '.written', os.O_WRONLY | os.O_CREAT), b'x')\n"
        "    except OSError: written = 0\n"
        "    finally: os.unlink(p.__file__ + '.written')\n"
        "    raise DecodeError('damaged', f'{os.environ.get(\"AWS_SECRET_ACCESS_KEY\")} {written}')\n"
        "p.decode = decode\n"
        "p.serve()"
    )
    monkeypatch.setattr(decoding_process, "PROGRAM", program)
    with Decoder(LIMITS) as fresh, pytest.raises(DecodeError) as caught:
        fresh.decode(encoded(PICTURE))
    assert caught.value.detail == "None 0"


@pytest.mark.parametrize(
    "answer",
    [
        "p._ANSWER.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)",
        "p._ANSWER.pack(1, 0xFFFFFFFF, 0)",
        "p._ANSWER.pack(200, 1, 1)",
        "p._ANSWER.pack(1, 4, 0) + b'evil'",
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, os, embeddings.decoding_process as p\n"
        "def reply(data, limits, wanted):\n"
        f"    return ({answer},)\n"
        "p._answer = reply\n"
        "p.serve()"
    )
    monkeypatch.setattr(decoding_process, "PROGRAM", program)
    with Decoder(LIMITS) as fresh:
        assert refusal(fresh, encoded(PICTURE)) == "decoder_crashed"


# Bombs and lies.


def lying_tiff() -> bytes:
    """Sixty thousand tags that each claim the same two megabytes."""
    tags = [(1000 + n, 7, 2_000_000, 10) for n in range(60_000)]
    return exif(tags) + bytes(2_100_000)


def lying_webp() -> bytes:
    """A canvas of 16384 x 16384 around one pixel."""
    small = encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0\xff\x3f\0" + small
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lying_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(4) + b"\1\0\1\0\0\2\2D\1\0;"


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (png(60_000, 60_000, b""), "too_many_pixels"),
        (png(1, 1, bytes(2), 8, 0, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))), "damaged pixels"),
        (png(1, 1, bytes(2), 8, 0, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 << 20)))), "damaged pixels"),
        (png(1, 1, bytes(30 << 20)), "pixels damaged"),
        (lying_webp(), "too_many_pixels damaged"),
        (lying_gif(), "too_many_pixels"),
        (lying_tiff(), "damaged too_much_memory decoder_timeout"),
        (b"BM" + struct.pack("<IHHIIiiHH", 100, 0, 0, 54, 40, 50_000, 50_000, 1, 24) + bytes(60), "too_many_pixels"),
    ],
    ids=["png", "text", "profile", "more-data", "webp", "gif", "tiff", "bmp"],
)
def test_bombs_end_in_a_verdict_and_cost_little(decoder: Decoder, data: bytes, reasons: str) -> None:
    assert len(data) < 4 << 20
    before = time.monotonic()
    try:
        decoder.decode(data)
        verdict = "pixels"
    except DecodeError as error:
        verdict = error.reason
    assert verdict in reasons.split()
    assert time.monotonic() - before < 20
    assert decoder.decode(encoded(PICTURE)).shape == (64, 96, 3)


# Files that are two things, and formats that run programs.


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n" + encoded(PICTURE),
        b"\xc5\xd0\xd3\xc6" + bytes(40) + encoded(PICTURE, "TIFF"),
        b"%PDF-1.7\n" + encoded(PICTURE),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"\xef\xbb\xbf  \n<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>",
        b"push graphic-context\nfill 'url(https://127.0.0.1/x)'\n",
        b"P6\n1 1\n255\n\0\0\0",
        b"#!/bin/sh\nid\n" + encoded(PICTURE),
        b"PK\3\4" + encoded(PICTURE),
    ],
)
def test_no_other_format_reaches_a_codec(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_process, "Child", lambda *_: pytest.fail("a process was started for it"))
    for ask in (decode, Decoder(LIMITS).probe):
        with pytest.raises(DecodeError) as caught:
            ask(data)  # type: ignore[operator]
        assert caught.value.reason in ("unsupported_format", "not_an_image")


@pytest.mark.parametrize(
    "tail", [b"PK\3\4" + bytes(100) + b"PK\5\6" + bytes(18), b"<script>alert(1)</script>", b"%PDF-1.4"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_a_polyglot_is_the_image_that_its_first_bytes_say_and_nothing_else(kind: str, tail: bytes) -> None:
    data = encoded(PICTURE, kind)
    np.testing.assert_array_equal(decode(data + tail), decode(data))
    assert probe(data + tail).format == kind


# Oddities of honest programs.


def test_profiles_do_not_change_pixels_however_broken_or_large(decoder: Decoder) -> None:
    for profile in (b"", b"not a profile", bytes(3 << 20)):
        for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
            plain, profiled = encoded(PICTURE, kind), encoded(PICTURE, kind, icc_profile=profile)
            if kind == "PNG" and len(profile) > 1 << 20:  # unpacks to more than its library takes: as bombs do
                assert refusal(decoder, profiled) == "damaged"
                continue
            np.testing.assert_array_equal(decoder.decode(profiled), decoder.decode(plain))


@pytest.mark.parametrize(
    "block",
    [
        exif([(0x0112, 3, 1, 0)]),
        exif([(0x0112, 3, 1, 9)]),
        exif([(0x0112, 3, 1, 65535)], ">"),
        exif([(0x0112, 4, 1, 6)]),
        exif([(0x0112, 2, 3, 6)]),
        exif([(0x0112, 3, 2, 6)]),
        exif([(0x0112, 3, 1, 6), (0x0112, 3, 1, 3)]),
        exif([(0x0112, 3, 1, 6)], first=0xFFFFFF00),
        exif([(0x8769, 4, 1, 8)]),  # a directory that holds itself
        exif([(0x0112, 3, 1, 6)])[:12],
        b"II*\0",
        b"not exif at all",
    ],
)
def test_broken_exif_turns_probe_and_decoding_alike_and_fails_neither(decoder: Decoder, block: bytes) -> None:
    for data in (with_segments(b"Exif\0\0" + block), png(3, 2, bytes(8), 8, 0, chunk(b"eXIf", block))):
        height, width = decoder.decode(data).shape[:2]
        found = decoder.probe(data)
        assert (found.width, found.height) == (width, height)


def test_colours_of_print_are_those_of_the_picture() -> None:
    pixels = np.asarray(PICTURE, int)
    cmyk = PICTURE.convert("CMYK")
    assert np.abs(decode(encoded(cmyk, "TIFF")).astype(int) - pixels).mean() < 2
    adobe = encoded(cmyk, "JPEG")  # inverted, as Photoshop stores it
    assert b"Adobe" in adobe and np.abs(decode(adobe).astype(int) - pixels).mean() < 4
    ycck = adobe.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    assert decode(ycck).shape == pixels.shape
    assert np.abs(decode(encoded(PICTURE.convert("YCbCr"), "TIFF")).astype(int) - pixels).mean() < 3
    with pytest.raises(DecodeError, match="unsupported_format"):
        decode(encoded(Image.new("LAB", (4, 4)), "TIFF"))


def test_transparent_colours_of_every_kind_lie_on_white() -> None:
    palette = scene().quantize(8)
    every = decode(encoded(palette, "PNG", transparency=bytes([0] * 8)))
    assert (every == 255).all()
    for mode, key in (("L", 0), ("RGB", (0, 0, 0)), ("1", 0)):
        data = encoded(Image.new(mode, (3, 3)), "PNG", transparency=key)
        assert (decode(data) == 255).all()


def test_sixteen_bits_a_channel_keep_their_high_bytes() -> None:
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 255, 65535, 32768, 256, 1) for _ in range(2))
    np.testing.assert_array_equal(decode(png(2, 2, rows, 16, 2))[0], [[0, 0, 255], [128, 1, 0]])
    with_alpha = b"\0" + struct.pack(">4H", 0, 0, 0, 0)
    assert (decode(png(1, 1, with_alpha, 16, 6)) == 255).all()


def test_a_sequence_gives_its_first_frame_in_every_format_that_has_them() -> None:
    frames = [scene(k, (40, 24)) for k in range(3)]
    kinds: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
    for kind, options in kinds + ([("AVIF", {})] if features.check("avif") else []):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(decode(data).astype(int) - np.asarray(frames[0])).mean() < 4
        assert probe(data).width == 40


def test_a_first_frame_smaller_than_its_canvas_is_laid_on_it() -> None:
    small = Image.new("P", (2, 2), 1)
    small.putpalette([0, 0, 0, 200, 100, 50])
    data = bytearray(encoded(small, "GIF"))
    data[6:10] = struct.pack("<HH", 5, 4)
    assert decode(bytes(data)).shape == probe_shape(bytes(data)) == (4, 5, 3)


def probe_shape(data: bytes) -> tuple[int, int, int]:
    found = probe(data)
    return found.height, found.width, 3


def test_files_that_end_in_their_header_are_refused_by_all_readers(decoder: Decoder) -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = encoded(scene(size=(16, 16)), kind)
        for cut in (12, 20, 40):
            assert refusal(decoder, whole[:cut]) in ("truncated", "damaged", "not_an_image")
            decoding_header.plain_size(whole[:cut], kind)


def test_a_truncated_stream_is_never_grey_pixels() -> None:
    sink = io.BytesIO()
    scene(size=(400, 300)).save(sink, "JPEG")
    with pytest.raises(DecodeError, match="truncated"):
        decode(sink.getvalue()[:-400])
