"""A checksum of a Parquet file's footer: the format has one for pages alone.

Eight bytes between the last page and the footer, where no reader looks since offsets are absolute: the CRC-32 of the
footer and of its length, and a mark. Files without them are read as they are.
"""

import io
import struct
import zlib
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

MARK = b"cCRC"
MAGIC = b"PAR1"
TAIL = 1 << 16
"""Bytes read at first, as Arrow does."""


def sealed(data: bytes) -> bytes:
    """A Parquet file, as it is written, with the checksum of its footer."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return b"".join([data[:begin], struct.pack("<I", zlib.crc32(data[begin:])), MARK, data[begin:]])


def checked(file: BinaryIO | pa.NativeFile) -> pq.FileMetaData:
    """The footer of an open file.

    Raises pyarrow.ArrowInvalid or OSError for one that is none, or that is not what was written.
    """
    size = file.seek(0, io.SEEK_END)
    tail = _last(file, size, min(size, TAIL))
    length = 8 + int.from_bytes(tail[-8:-4], "little")
    whole = min(length + 8, size)  # of a file without rows there is no more than the footer and four bytes
    if tail[-4:] == MAGIC and len(tail) < whole and length <= size:
        tail = _last(file, size, whole)
    footer = tail[-length:]
    if tail[-length - 4 : -length] == MARK and struct.pack("<I", zlib.crc32(footer)) != tail[-length - 8 : -length - 4]:
        raise pa.ArrowInvalid("its footer fails its CRC")
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))


def _last(file: BinaryIO | pa.NativeFile, size: int, count: int) -> bytes:
    file.seek(size - count)
    return bytes(file.read(count))
