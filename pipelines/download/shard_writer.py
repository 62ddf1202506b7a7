"""A shard as one tar: members in row order, time 0, so that equal images give equal bytes.

The tar is a webdataset: KEY.jpg (or what the image is) and KEY.json. Where each image's bytes lie is known
while they are written, so readers need one range and no member names. Bodies and tar are buffered in unnamed
files of the worker's scratch folder: a shard of large images costs disk, not memory.
"""

import json
import mmap
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}
BLOCK = 512


@dataclass
class ShardTar:
    """A tar that grows in a file without a name."""

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its bytes."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self.file.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.file.tell()
        self.file.write(data)
        self.file.write(b"\0" * (-len(data) % BLOCK))
        return offset

    def add_sample(self, key: str, suffix: str, data: bytes, about: dict[str, Any]) -> int:
        """Append an image and its JSON; returns the offset of the image."""
        offset = self.add(f"{key}.{suffix}", data)
        self.add(f"{key}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
        return offset

    def close(self) -> mmap.mmap:
        """The whole tar, mapped: bytes that the kernel may drop from memory and read again."""
        self.file.write(b"\0" * (2 * BLOCK))
        self.file.flush()
        whole = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file.close()
        return whole


@dataclass
class Collected:
    """What img2dataset's Downloader handed over for one row: where its bytes are, or None and an error."""

    place: tuple[int, int] | None
    meta: dict[str, Any]


class Collector:
    """Stands where img2dataset expects a sample writer class: keeps samples by row, in whatever order they come."""

    def __init__(self) -> None:
        self.rows: dict[int, Collected] = {}
        self._bodies: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it ends with the collector
        self._end = 0

    def writer_class(self) -> Callable[..., "Collector"]:
        """What Downloader calls, with the shard's number, folder, schema and format: none of them matters here."""
        return lambda *_: self

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Called by Downloader for each row, from one thread."""
        row = int(meta["row"])
        if row in self.rows:
            raise ValueError(f"row {row} came twice")
        place = None
        if img_str is not None:
            place = (self._end, len(img_str))
            self._bodies.write(img_str)
            self._end += len(img_str)
        self.rows[row] = Collected(place, meta)

    def read(self, place: tuple[int, int]) -> bytes:
        """The bytes of a row."""
        self._bodies.seek(place[0])
        return self._bodies.read(place[1])

    def close(self) -> None:
        """Nothing: the shard is written whole by whoever made the collector."""
