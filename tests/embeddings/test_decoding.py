"""Decoding: which bytes become pixels, which are refused and as what, and that a dead decoder harms nobody."""

import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from embeddings import decoding, decoding_process
from embeddings.decoding import REASONS, DecodeError, DecodeLimits, Decoder, decode, probe
from tests.embeddings.pictures import encoded, scene

PICTURE = scene()
PIXELS = np.asarray(PICTURE)


def refusal(data: bytes, limits: DecodeLimits = DecodeLimits()) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, limits)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    np.testing.assert_array_equal(decode(encoded(PICTURE, kind)), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_give_nearly_the_pixels_back(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        assert refusal(b"\0\0\0\x1cftypavif" + bytes(40)) == "unsupported_format"
        return
    decoded = decode(encoded(PICTURE, kind))
    assert decoded.shape == PIXELS.shape
    assert np.abs(decoded.astype(int) - PIXELS).mean() < 4


def test_animation_gives_its_first_frame() -> None:
    frames = [scene(k).quantize(64) for k in range(3)]
    for kind in ("GIF", "WEBP"):
        data = encoded(
            frames[0].convert("RGB") if kind == "WEBP" else frames[0], kind, save_all=True, append_images=frames[1:]
        )
        assert np.abs(decode(data).astype(int) - np.asarray(frames[0].convert("RGB"))).mean() < 6


def test_header_says_what_decoding_gives() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(PICTURE, kind)
        header = probe(data)
        assert (header.format, header.height, header.width) == (kind, *decode(data).shape[:2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_exif_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, kind, exif=exif)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(PIXELS, 1),
    }[orientation]
    np.testing.assert_array_equal(decode(data), turned)
    assert (probe(data).height, probe(data).width) == turned.shape[:2]


def test_transparency_lies_on_white() -> None:
    rgba = np.dstack([np.full((8, 8, 3), 40, np.uint8), np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1)])
    decoded = decode(encoded(Image.fromarray(rgba), "PNG"))
    assert (decoded[:, :4] == 255).all() and (decoded[:, 4:] == 40).all()
    grey = decode(encoded(Image.fromarray(rgba).convert("LA"), "PNG"))
    assert (grey[:, :4] == 255).all() and (grey[:, 4:] == 40).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG", transparency=0))[0], [[255, 255, 255], [200, 100, 50]])


def test_sixteen_bits_keep_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(decode(data)[0, :, 0], [0, 0, 1, 128, 255])


def test_floats_are_stretched_and_cmyk_and_grey_become_rgb() -> None:
    floats = np.array([[0.0, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(floats), "TIFF"))[0, :, 1], [0, 128, 255])
    cmyk = decode(encoded(PICTURE.convert("CMYK"), "JPEG"))
    assert np.abs(cmyk.astype(int) - PIXELS).mean() < 4
    grey = decode(encoded(PICTURE.convert("L"), "PNG"))
    assert (grey[..., 0] == np.asarray(PICTURE.convert("L"))).all() and (grey[..., 0] == grey[..., 2]).all()
    bits = decode(encoded(PICTURE.convert("1"), "PNG"))
    assert set(np.unique(bits)) <= {0, 255}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!doctype html><html><body>not found</body></html>", "not_an_image"),
        (b"<html><svg></svg></html>", "not_an_image"),
        (b"\x00" * 200, "not_an_image"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported_format"),
        (b"%PDF-1.7\n", "unsupported_format"),
        (b"8BPS\x00\x01" + bytes(40), "unsupported_format"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_class(data: bytes, reason: str) -> None:
    assert refusal(data) == reason
    with pytest.raises(DecodeError):
        probe(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(PICTURE, kind)
    for share in (0.5, 0.9):
        assert refusal(data[: int(len(data) * share)]) in ("truncated", "damaged")


def test_bombs_are_refused_from_their_header() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    side = 60_000
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    started = time.perf_counter()
    assert refusal(bomb) == "too_many_pixels"
    assert time.perf_counter() - started < 0.5
    assert refusal(encoded(PICTURE), DecodeLimits(max_pixels=96 * 64 - 1)) == "too_many_pixels"
    assert decode(encoded(PICTURE), DecodeLimits(max_pixels=96 * 64)).shape == (64, 96, 3)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_flipped_bytes_give_pixels_or_a_class_and_nothing_else(kind: str, data: st.DataObject) -> None:
    changed = bytearray(encoded(scene(size=(24, 16)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(changed), DecodeLimits(max_pixels=1 << 20))
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    except DecodeError as error:
        assert error.reason in REASONS


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as made:
        yield made


def test_child_gives_the_same_pixels_and_the_same_refusals(decoder: Decoder) -> None:
    for data in (encoded(PICTURE), encoded(PICTURE, "PNG"), encoded(scene(size=(1200, 900)), "PNG")):
        np.testing.assert_array_equal(decoder.decode(data), decode(data))
    with pytest.raises(DecodeError) as caught:
        decoder.decode(b"<html>")
    assert caught.value.reason == "not_an_image"


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(decoder: Decoder) -> None:
    large = scene(size=(1200, 900))
    whole, half = decode(encoded(large)), decode(encoded(large), shrink_to=450)
    assert half.shape == (450, 600, 3)
    averaged = np.asarray(Image.fromarray(whole).resize((600, 450), Image.Resampling.BOX), np.float64)
    assert np.abs(half - averaged).mean() < 1.5
    np.testing.assert_array_equal(decoder.decode(encoded(large), 450), half)
    for data in (encoded(large, "PNG"), encoded(PICTURE)):  # no JPEG, and one that is small already
        np.testing.assert_array_equal(decoder.decode(data, 450), decode(data))


def test_killed_child_is_replaced_and_the_image_decoded(decoder: Decoder) -> None:
    decoder.decode(encoded(PICTURE))
    os.kill(decoder._child._process.pid, signal.SIGKILL)
    np.testing.assert_array_equal(decoder.decode(encoded(PICTURE, "PNG")), PIXELS)


def test_crash_and_hang_are_refusals_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = (
        "import os, time, embeddings.decoding_process as p\n"
        "real = p.decode\n"
        "def decode(data, limits, shrink_to):\n"
        "    if data == b'crash': os.abort()\n"
        "    if data == b'sleep': time.sleep(60)\n"
        "    while data == b'spin': pass\n"
        "    if data == b'memory': bytearray(8 << 30)\n"
        "    return real(data, limits)\n"
        "p.decode = decode\n"
        "p.serve()"
    )
    monkeypatch.setattr(decoding_process, "PROGRAM", codec)
    with Decoder(DecodeLimits(cpu_s=1, wall_s=4.0)) as decoder:
        for data, reason in (
            (b"crash", "decoder_crashed"),
            (b"sleep", "decoder_timeout"),
            (b"spin", "decoder_timeout"),
            (b"memory", "too_much_memory"),
        ):
            with pytest.raises(DecodeError) as caught:
                decoder.decode(data)
            assert caught.value.reason == reason
            np.testing.assert_array_equal(decoder.decode(encoded(PICTURE, "PNG")), PIXELS)


def test_closed_decoder_leaves_no_process_behind() -> None:
    decoder = Decoder()
    decoder.decode(encoded(PICTURE))
    pid = decoder._child._process.pid
    decoder.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_worker_keeps_one_decoder() -> None:
    assert decoding.worker_decoder() is decoding.worker_decoder()


def test_a_backport_beside_the_installed_packages_does_not_replace_a_module_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataclasses.py").write_text("raise ImportError('the backport')\n")
    monkeypatch.setattr(decoding_process, "__file__", str(tmp_path / "embeddings" / "decoding_process.py"))
    with Decoder(DecodeLimits(cpu_s=4, wall_s=30.0)) as decoder:
        np.testing.assert_array_equal(decoder.decode(encoded(PICTURE, "PNG")), PIXELS)
