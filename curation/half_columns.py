"""Vectors of float16 straight from the pages of a Parquet file, several times as fast as through Arrow's lists.

Arrow decodes a list of halves value by value and builds its offsets from levels. Where a column chunk is what our own
writer makes (plain, uncompressed, no nulls), the values of a page are its last bytes, and they are copied at once.
Anything else is left to Arrow: `read` says so by None. The format: parquet-format's Thrift, compact protocol.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

DATA_PAGE, PLAIN, RLE = 0, 0, 3
MOST_HEADER = 512
"""Bytes that a page's header has at most: with statistics of two values of two bytes it has a tenth of it."""


def read(file: Any, column: Any, level: int, rows: int, dimension: int) -> np.ndarray | None:
    """(rows, dimension) float16 of one column chunk; None where it is not simple.

    file: open for `seek` and `read`. column: its ColumnChunkMetaData. level: the highest definition level, of an
    element that is there.
    """
    plain = (
        column.physical_type == "FIXED_LEN_BYTE_ARRAY"
        and column.compression == "UNCOMPRESSED"
        and set(column.encodings) <= {"PLAIN", "RLE"}
        and not column.has_dictionary_page
        and column.num_values == rows * dimension
    )
    if not plain:
        return None
    file.seek(column.data_page_offset)
    data = file.read(column.total_compressed_size)
    found = np.empty(rows * dimension, np.float16)
    at = taken = 0
    known: set[tuple[bytes, bytes, int, int]] = set()
    try:
        while taken < len(found):
            page = _Page.at(data, at)
            body = at + page.header_bytes
            if (
                page.kind != DATA_PAGE
                or page.encoding != PLAIN
                or not _simple(data, body, page, dimension, taken, level, known)
            ):
                return None
            end = body + page.bytes
            values = np.frombuffer(data, np.float16, page.values, end - 2 * page.values)
            found[taken : taken + page.values] = values
            taken, at = taken + page.values, end
    except (IndexError, ValueError, OverflowError):
        return None
    return found.reshape(rows, dimension)


@dataclass(frozen=True)
class _Page:
    """What the header of a data page (version 1) says."""

    header_bytes: int
    kind: int
    bytes: int
    values: int
    encoding: int

    @classmethod
    def at(cls, data: Any, at: int) -> "_Page":
        reader = _Thrift(data[at : at + MOST_HEADER])
        fields = reader.struct()
        page = fields.get(5)
        if not isinstance(page, dict) or fields.get(2) != fields.get(3):
            raise ValueError
        said = [fields.get(1), fields.get(3), page.get(1), page.get(2)]
        kind, size, values, encoding = (int(n) if isinstance(n, int) else -1 for n in said)
        if {page.get(3), page.get(4)} != {RLE} or min(kind, size, values - 1, encoding) < 0:
            raise ValueError
        return cls(reader.place, kind, size, values, encoding)


class _Thrift:
    """Structs of integers in the compact protocol, strings passed over; anything else raises ValueError."""

    def __init__(self, data: Any) -> None:
        self._data, self.place = bytes(data), 0

    def struct(self) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while True:
            head = self.byte()
            if head == 0:
                return found
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            if kind in (1, 2):
                found[number] = kind == 1
            elif kind in (4, 5, 6):
                found[number] = self._integer()
            elif kind == 8:
                length = self.unsigned()
                self.place += length
            elif kind == 12:
                found[number] = self.struct()
            else:
                raise ValueError

    def byte(self) -> int:
        value = self._data[self.place]
        self.place += 1
        return value

    def _integer(self) -> int:
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7


def _simple(
    data: Any,
    at: int,
    page: _Page,
    dimension: int,
    taken: int,
    level: int,
    known: set[tuple[bytes, bytes, int, int]],
) -> bool:
    """Whether every value of the page is there and lists are `dimension` long: its two runs of levels.

    known: what was looked at before: the pages of a column are much alike.
    """
    repetition = int.from_bytes(data[at : at + 4], "little")
    middle = at + 4 + repetition
    definition = int.from_bytes(data[middle : middle + 4], "little")
    if 8 + repetition + definition + 2 * page.values != page.bytes:
        return False
    mine = data[at + 4 : middle], data[middle + 4 : middle + 4 + definition], page.values, taken % dimension
    if mine not in known:
        inside = np.arange(taken, taken + page.values) % dimension != 0
        there = _levels(mine[1], page.values, level.bit_length())
        if not np.array_equal(_levels(mine[0], page.values, 1), inside) or not (there == level).all():
            return False
        known.add(mine)
    return True


def _levels(data: bytes, count: int, width: int) -> np.ndarray:
    """(count,) levels of `width` bits, at most 8, in runs and packed groups."""
    reader, found, held = _Thrift(data), [], 0
    while held < count:
        head = reader.unsigned()
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(data, np.uint8, size, reader.place), bitorder="little")
            levels = bits.reshape(-1, width) @ (1 << np.arange(width))
            reader.place += size
        else:
            levels = np.full(min(head >> 1, count), reader.byte())
        if not len(levels):
            raise ValueError
        found.append(levels)
        held += len(levels)
    return np.concatenate(found)[:count]
