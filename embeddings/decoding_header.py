"""The size of a plain JPEG, PNG or WebP, read from its header in a bounded number of steps and without a codec.

A library's header reader is written for honest files: on hostile ones it copies for hours, unpacks pixels or
allocates the canvas that the file claims. What is not plain here is left to the decoder's process, which may die.
"""

import struct
import zlib

_MAX_STEPS = 4096
_MAX_EXIF_TAGS = 512
_ORIENTATION = 0x0112
_SHORT = 3
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0), *_JPEG_FRAMES})
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_KINDS = frozenset(
    {(d, 0) for d in (1, 2, 4, 8, 16)} | {(d, 3) for d in (1, 2, 4, 8)} | {(d, k) for d in (8, 16) for k in (2, 4, 6)}
)
_PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type")
"""Keywords under which programs hide an orientation that a library would find."""


class _NotPlainError(Exception):
    """Left to the decoder's process."""


def plain_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) in pixels with the orientation of EXIF applied; None for what is not plain or not whole.

    kind: the format that `sniff` found.
    """
    reader = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}.get(kind)
    if reader is None:
        return None
    try:
        width, height, orientation = reader(data)
    except (_NotPlainError, struct.error, IndexError):
        return None
    if width * height == 0:
        return None
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _jpeg(data: bytes) -> tuple[int, int, int]:
    place, size, orientation = 2, None, None
    for _ in range(_MAX_STEPS):
        mark, marker, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF or length < 2:
            raise _NotPlainError
        if marker == 0xDA:
            if size is None:
                raise _NotPlainError
            return (*size, orientation or 1)
        if marker not in _JPEG_SEGMENTS or place + 2 + length > len(data):
            raise _NotPlainError
        if marker in _JPEG_FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", data, place + 4)
            if size is not None or bits != 8 or colours not in (1, 3, 4):
                raise _NotPlainError
            size = (width, height)
        elif marker == 0xE1:
            segment = data[place + 4 : place + 2 + length]
            if segment.startswith(b"Exif\0\0"):
                if orientation is not None:
                    raise _NotPlainError
                orientation = _orientation(segment[6:])
            elif segment.startswith(b"Exif") or (segment.startswith(_XMP) and b"rientation" in segment):
                raise _NotPlainError
        place += 2 + length
    raise _NotPlainError


def _png(data: bytes) -> tuple[int, int, int]:
    length, name, width, height, depth, colours = struct.unpack_from(">I4sIIBB", data, 8)
    (checksum,) = struct.unpack_from(">I", data, 29)
    if (length, name) != (13, b"IHDR") or zlib.crc32(data[12:29]) != checksum or (depth, colours) not in _PNG_KINDS:
        raise _NotPlainError
    place, orientation = 33, None
    for _ in range(_MAX_STEPS):
        if place + 12 > len(data):  # cut off: the header is whole all the same
            return width, height, orientation or 1
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IEND":
            return width, height, orientation or 1
        if name == b"eXIf":
            if orientation is not None or place + 12 + length > len(data):
                raise _NotPlainError
            orientation = _orientation(data[place + 8 : place + 8 + length])
        elif name == b"IHDR" or (name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_PNG_TEXTS, place + 8)):
            raise _NotPlainError
        place += 12 + length
    raise _NotPlainError


def _webp(data: bytes) -> tuple[int, int, int]:
    (riff,) = struct.unpack_from("<I", data, 4)
    name, length = struct.unpack_from("<4sI", data, 12)
    if riff + 8 > len(data) or 20 + length > len(data):
        raise _NotPlainError
    if name == b"VP8 " and not data[20] & 1 and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    if name == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        if bits >> 29 == 0:
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    raise _NotPlainError  # extended files: alpha, animation, EXIF, XMP


def _orientation(block: bytes) -> int:
    """The orientation that a block of EXIF says, 1 where it says none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        raise _NotPlainError
    (first,) = struct.unpack_from(f"{order}I", block, 4)
    (count,) = struct.unpack_from(f"{order}H", block, first)
    if count > _MAX_EXIF_TAGS or first + 2 + 12 * count > len(block):
        raise _NotPlainError
    found = 0
    for place in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, place)
        if tag == _ORIENTATION:
            if found or kind != _SHORT or values != 1:
                raise _NotPlainError
            found = value or 1
    return found or 1
