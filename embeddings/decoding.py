"""Hostile bytes to RGB pixels: which formats, how many pixels, and in a process that may die.

Formats are recognised by their first bytes and only those of `FORMATS` reach a codec: never SVG, EPS or PDF.
The pixel bound is checked on the header, before decoding. Colours are read as sRGB: ICC profiles are
ignored, as image loaders of trainings do. EXIF orientation is applied, alpha is laid on white, the
first frame stands for an animation, a truncated file is refused.
"""

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from embeddings import decoding_header

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
REASONS = (
    "empty",
    "not_an_image",
    "unsupported_format",
    "truncated",
    "damaged",
    "too_many_pixels",
    "too_much_memory",
    "decoder_crashed",
    "decoder_timeout",
    "unreadable",
)
"""Classes of DecodeError; `unreadable` is for bytes that could not be fetched from their location."""


class DecodeError(Exception):
    """An image that cannot be used. reason: one of REASONS, what a table stores."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return (DecodeError, (self.reason, self.detail))


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost. Pillow refuses above 179 million pixels whatever is said here."""

    max_pixels: int = 100_000_000
    cpu_s: int = 20
    """CPU seconds in the decoder's process, so that a busy machine gives the same answer as an idle one."""
    wall_s: float = 120.0
    """Seconds until a decoder that waits for something is given up."""
    memory_bytes: int = 4 << 30
    """Address space of the decoder's process."""


@dataclass(frozen=True)
class ImageHeader:
    """What a header says; width and height in pixels as `decode` would return them (orientation applied)."""

    format: str
    width: int
    height: int


def probe(data: bytes, limits: DecodeLimits = DecodeLimits()) -> ImageHeader:
    """Read the header with the codec's library, in this process: bytes from outside go through `Decoder.probe`.

    Raises DecodeError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, kind = _open(data, limits)
        width, height = image.size
        if kind != "TIFF" and _orientation(image) in (5, 6, 7, 8):  # Pillow has turned a TIFF's size already
            width, height = height, width
        return ImageHeader(kind, width, height)


def decode(data: bytes, limits: DecodeLimits = DecodeLimits(), shrink_to: int | None = None) -> np.ndarray:
    """Pixels of the first frame, (h, w, 3) uint8 RGB. Raises DecodeError.

    shrink_to: a JPEG is decoded at a half, a quarter or an eighth of its size as long as neither side falls below it
    (the codec's scaled inverse transform, which averages: several times as fast).
    Runs the codec in this process: bytes from outside go through a `Decoder` instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, kind = _open(data, limits)
            if shrink_to is not None and kind == "JPEG":
                image.draft(None, (shrink_to, shrink_to))
            image.load()
            pixels = _rgb(_upright(image))
    except DecodeError:
        raise
    except MemoryError as error:
        raise DecodeError("too_much_memory") from error
    except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, …
        raise _classified(error) from error
    if pixels.size == 0:
        raise DecodeError("empty")
    return pixels


def sniff(data: bytes) -> str | None:
    """The format of FORMATS that the first bytes announce, None for anything else."""
    head = data[:32]
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if (
        head[:2] == b"BM"
        and len(data) >= 26
        and int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124)
    ):
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[4:8] == b"ftyp" and any(brand in data[8 : min(len(data), 64)] for brand in (b"avif", b"avis")):
        return "AVIF"
    return None


_OTHER_IMAGES = (
    *(b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF"),  # PostScript, EPS with a preview, PDF
    *(b"8BPS", b"gimp xcf", b"icns", b"\0\0\x01\0", b"\0\0\x02\0"),  # Photoshop, GIMP, icons, cursors
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL "),  # JPEG 2000, JPEG XL
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"qoif", b"DDS ", b"#?RADIANCE", b"\xd7\xcd\xc6\x9a", b"SIMPLE  ="),
)


def _unknown(data: bytes) -> DecodeError:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    is_svg = b"<svg" in data[:4096] and b"<html" not in head.lower()
    if is_svg or data.startswith(_OTHER_IMAGES) or data[4:8] == b"ftyp":
        return DecodeError("unsupported_format")
    return DecodeError("not_an_image")


def _open(data: bytes, limits: DecodeLimits) -> tuple[Any, str]:
    from PIL import Image

    if not data:
        raise DecodeError("empty")
    kind = sniff(data)
    if kind is None:
        raise _unknown(data)
    if kind == "AVIF" and not _has_avif():
        raise DecodeError("unsupported_format", "this Pillow has no AVIF")
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        raise DecodeError("too_many_pixels") from error
    except MemoryError as error:
        raise DecodeError("too_much_memory") from error
    except Image.UnidentifiedImageError as error:
        raise DecodeError("damaged", "its header cannot be read") from error
    except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, …
        raise _classified(error) from error
    width, height = image.size
    if width * height == 0:
        raise DecodeError("empty")
    if width * height > limits.max_pixels:
        raise DecodeError("too_many_pixels", f"{width}x{height}")
    return image, kind


def _has_avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))


def _classified(error: Exception) -> DecodeError:
    text = str(error).lower()
    if any(
        word in text for word in ("truncated", "unexpected end", "not enough image data", "premature", "unexpected eof")
    ):
        return DecodeError("truncated")
    return DecodeError("damaged", type(error).__name__)


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # EXIF is a TIFF of its own and breaks in as many ways
        return 1


def _upright(image: Any) -> Any:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info
    return turned


def _rgb(image: Any) -> np.ndarray:
    from PIL import Image

    mode = image.mode
    if mode.startswith("I;16"):
        return _grey((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if mode in ("I", "F"):
        return _grey(_stretched(np.asarray(image, dtype=np.float64)))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        ground.alpha_composite(layer)
        image = ground.convert("RGB")
    elif mode == "LAB":
        raise DecodeError("unsupported_format", "LAB colours")
    elif mode != "RGB":
        image = image.convert("RGB")
    return np.array(image, dtype=np.uint8)


def _stretched(values: np.ndarray) -> np.ndarray:
    """32-bit integers and floats have no agreed white: stretched from their least to their greatest value."""
    finite = np.where(np.isfinite(values), values, 0.0)
    low, high = float(finite.min()), float(finite.max())
    if high <= low:
        return np.full(values.shape, np.clip(low, 0, 255), np.uint8)
    return np.rint((finite - low) * (255.0 / (high - low))).astype(np.uint8)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.repeat(values[:, :, None], 3, axis=2))


class Decoder:
    """`decode` in a child process that may crash, hang or run out of memory without taking this one along.

    One persistent child per Decoder, started at the first image and again after a death; an image that kills two
    children in a row is refused as `decoder_crashed` or `decoder_timeout`. Not for use from two threads.
    """

    def __init__(self, limits: DecodeLimits = DecodeLimits()) -> None:
        self.limits = limits
        self._child: Any = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, data: bytes, shrink_to: int | None = None) -> np.ndarray:
        """As `decode`."""
        return self._asked(data, lambda child: child.decode(data, shrink_to))

    def probe(self, data: bytes) -> ImageHeader:
        """As `probe`. Plain files are read here in a few bounded steps, all others by the child's codec."""
        kind = sniff(data)
        if kind is None and data:
            raise _unknown(data)
        size = decoding_header.plain_size(data, kind) if kind is not None else None
        if size is None:
            return self._asked(data, lambda child: child.probe(data))
        if size[0] * size[1] > self.limits.max_pixels:
            raise DecodeError("too_many_pixels", f"{size[0]}x{size[1]}")
        return ImageHeader(str(kind), *size)

    def _asked[T](self, data: bytes, ask: Callable[[Any], T]) -> T:
        """Ask the child; a death is tried once more: the machine's memory killer is not the image's fault."""
        from embeddings import decoding_process

        if not data:
            raise DecodeError("empty")
        for attempt in (0, 1):
            if self._child is None:
                self._child = decoding_process.Child(self.limits)
            try:
                return ask(self._child)
            except decoding_process.ChildDiedError as death:
                self.close()
                if attempt == 1 or death.reason == "decoder_timeout":
                    raise DecodeError(death.reason) from None
        raise AssertionError

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
            self._child = None


_worker_decoders: dict[tuple[int, DecodeLimits], Decoder] = {}


def worker_decoder(limits: DecodeLimits = DecodeLimits()) -> Decoder:
    """The Decoder of this process (a Ray worker makes one and keeps it)."""
    key = (os.getpid(), limits)
    if key not in _worker_decoders:
        _worker_decoders[key] = Decoder(limits)
    return _worker_decoders[key]
