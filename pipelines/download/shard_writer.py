"""A shard as one tar in memory: members in row order, time 0, so that equal images give equal bytes.

The tar is a webdataset: KEY.jpg (or what the image is) and KEY.json. Where each image's bytes lie is known
while they are written, so readers need one range and no member names.
"""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}
BLOCK = 512


@dataclass
class ShardTar:
    """A tar that grows in memory."""

    buffer: io.BytesIO = field(default_factory=io.BytesIO)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its bytes."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self.buffer.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.buffer.tell()
        self.buffer.write(data)
        self.buffer.write(b"\0" * (-len(data) % BLOCK))
        return offset

    def add_sample(self, key: str, suffix: str, data: bytes, about: dict[str, Any]) -> int:
        """Append an image and its JSON; returns the offset of the image."""
        offset = self.add(f"{key}.{suffix}", data)
        self.add(f"{key}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
        return offset

    def close(self) -> bytes:
        """The whole tar."""
        self.buffer.write(b"\0" * (2 * BLOCK))
        return self.buffer.getvalue()


@dataclass
class Collected:
    """What img2dataset's Downloader handed over for one row: bytes, or an error."""

    data: bytes | None
    meta: dict[str, Any]


class Collector:
    """Stands where img2dataset expects a sample writer class: keeps samples by row, in whatever order they come."""

    def __init__(self) -> None:
        self.rows: dict[int, Collected] = {}

    def writer_class(self) -> Callable[..., "Collector"]:
        """What Downloader calls, with the shard's number, folder, schema and format: none of them matters here."""
        return lambda *_: self

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        row = int(meta["row"])
        if row in self.rows:
            raise ValueError(f"row {row} came twice")
        self.rows[row] = Collected(img_str, meta)

    def close(self) -> None:
        """Nothing: the shard is written whole by whoever made the collector."""
