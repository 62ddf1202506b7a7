"""The size of a plain JPEG, PNG or WebP, read from its header in a bounded number of steps and without a codec.

A library's header reader is written for honest files: on hostile ones it copies for hours, unpacks pixels or
allocates the canvas that the file claims. What is not plain here is left to the decoder's process, which may die.
"""

import re
import struct
import zlib

_MAX_STEPS = 4096
_MAX_EXIF_TAGS = 512
_ORIENTATION = 0x0112
_SHORT = 3
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0), *_JPEG_FRAMES})
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_PNG_KINDS = frozenset(
    {(d, 0) for d in (1, 2, 4, 8, 16)} | {(d, 3) for d in (1, 2, 4, 8)} | {(d, k) for d in (8, 16) for k in (2, 4, 6)}
)
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_TEXTS = (_PNG_XMP, b"Raw profile type")
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
    place, size, exif, xmp = 2, None, None, None
    for _ in range(_MAX_STEPS):
        mark, marker, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF or length < 2:
            raise _NotPlainError
        if marker == 0xDA:
            if size is None:
                raise _NotPlainError
            return (*size, _either(exif, xmp))
        if marker not in _JPEG_SEGMENTS or place + 2 + length > len(data):
            raise _NotPlainError
        if marker in _JPEG_FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", data, place + 4)
            if size is not None or bits != 8 or colours not in (1, 3, 4):
                raise _NotPlainError
            size = (width, height)
        elif marker == 0xE1:
            segment = data[place + 4 : place + 2 + length]
            if segment.startswith(b"Exif\0\0") and exif is None:
                exif = segment[6:]
            elif segment.startswith(_XMP) and xmp is None:
                xmp = segment
            elif segment.startswith((b"Exif", _XMP)):
                raise _NotPlainError
        place += 2 + length
    raise _NotPlainError


def _png(data: bytes) -> tuple[int, int, int]:
    length, name, width, height, depth, colours = struct.unpack_from(">I4sIIBB", data, 8)
    (checksum,) = struct.unpack_from(">I", data, 29)
    if (length, name) != (13, b"IHDR") or zlib.crc32(data[12:29]) != checksum or (depth, colours) not in _PNG_KINDS:
        raise _NotPlainError
    place, exif, xmp = 33, None, None
    for _ in range(_MAX_STEPS):
        if place + 12 > len(data):  # cut off: the header is whole all the same
            return width, height, _either(exif, xmp)
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IEND":
            return width, height, _either(exif, xmp)
        if name == b"eXIf" and exif is None and place + 12 + length <= len(data):
            exif = data[place + 8 : place + 8 + length]
        elif name == b"iTXt" and xmp is None and data.startswith(_PNG_XMP + b"\0", place + 8):  # not compressed
            xmp = data[place + 8 : place + 8 + length]
        elif name in (b"IHDR", b"eXIf") or (
            name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_PNG_TEXTS, place + 8)
        ):
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


def _either(exif: bytes | None, xmp: bytes | None) -> int:
    """The orientation that EXIF says, else what XMP says, else 1."""
    said = _orientation(exif) if exif is not None else None
    if said is None and xmp is not None and (found := _XMP_ORIENTATION.search(xmp)) is not None:
        said = int(found[1])
    return 1 if said is None else said


def _orientation(block: bytes) -> int | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        raise _NotPlainError
    (first,) = struct.unpack_from(f"{order}I", block, 4)
    (count,) = struct.unpack_from(f"{order}H", block, first)
    if count > _MAX_EXIF_TAGS or first + 2 + 12 * count > len(block):
        raise _NotPlainError
    found = None
    for place in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, place)
        if tag == _ORIENTATION:
            if found is not None or kind != _SHORT or values != 1:
                raise _NotPlainError
            found = int(value)
    return found
