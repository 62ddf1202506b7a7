"""Webdataset tars by their headers: where each image's bytes lie and what is said about it. Nothing is extracted.

A sample is the members that share a name up to the first dot of its last part; its text, class and JSON
members are read, an img2dataset Parquet beside the tar is read once per part.
"""

import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
TEXT_SUFFIXES = ("json", "txt", "cls")
MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """An image of a tar: its sample's key, and its bytes."""

    key: str
    offset: int
    size: int


@dataclass
class TarIndex:
    """What the headers of a tar say. texts: (offset, size) of a sample's small members, by (key, suffix)."""

    path: str
    images: list[Member] = field(default_factory=list)
    texts: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    size: int = 0
    damaged: bool = False

    def about(
        self, member: Member, table: dict[str, dict[str, Any]], label_column: str | None
    ) -> dict[str, str | None]:
        """url, caption and label of a sample: from the Parquet beside the tar, else from its own members."""
        known: dict[str, Any] = table.get(member.key) or self._json(member.key)
        caption = known.get("caption") if known.get("caption") is not None else self._text(member.key, "txt")
        label = known.get(label_column) if label_column is not None else known.get("label")
        if label is None and label_column is None:
            label = self._text(member.key, "cls")
        return {"url": _string(known.get("url")), "caption": _string(caption), "label": _string(label)}

    def _json(self, key: str) -> dict[str, Any]:
        text = self._text(key, "json")
        try:
            document = json.loads(text or "{}")
        except (ValueError, RecursionError):
            return {}
        return document if isinstance(document, dict) else {}

    def _text(self, key: str, suffix: str) -> str | None:
        place = self.texts.get((key, suffix))
        if place is None or place[1] > MAX_TEXT_BYTES:
            return None
        data = storage.read_bytes(self.path, *place)
        return data.decode(errors="replace").replace("\0", "").strip()


def read_index(path: str) -> TarIndex:
    """Read the headers. Raises UserError for a file that is no plain tar."""
    index = TarIndex(path)
    fs, inner = storage.filesystem(path)
    try:
        index.size = int(fs.size(inner) or 0)
        with fs.open(inner, "rb", block_size=1 << 20) as file:
            _scan(file, index)
    except tarfile.TarError as error:
        if not index.images and not index.texts:
            raise UserError(f"{path}: not a plain tar ({str(error) or type(error).__name__})") from None
        index.damaged = True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    return index


def _scan(file: Any, index: TarIndex) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            try:
                member = tar.next()
            except (tarfile.TarError, ValueError, EOFError, OverflowError):
                index.damaged = True
                return
            if member is None:
                # A tar ends with a zero block; a header that cannot be read, or none, looks the same to `next`.
                index.damaged = index.damaged or not _ends(file, tar.offset, index.size)
                return
            tar.members = []  # type: ignore[attr-defined]  # or every header of the tar stays in memory
            if not member.isreg() or member.issparse():
                continue
            if member.offset_data + member.size > index.size:
                index.damaged = True
                return
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            suffix = suffix.lower().rsplit(".", 1)[-1]
            if not stem or not suffix or not _sayable(member.name):
                continue
            key = folder + slash + stem
            if suffix in IMAGE_SUFFIXES:
                index.images.append(Member(key, member.offset_data, member.size))
            elif suffix in TEXT_SUFFIXES:
                index.texts[key, suffix] = (member.offset_data, member.size)


def _ends(file: Any, offset: int, size: int) -> bool:
    if offset >= size:
        return offset == size
    for place in (offset - 512, offset):
        if place >= 0:
            file.seek(place)
            if file.read(512).count(0) == 512:
                return True
    return False


def _sayable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def beside(path: str) -> dict[str, dict[str, Any]]:
    """Rows of the Parquet that img2dataset wrote beside a tar, by key; {} without one."""
    table_path = path.removesuffix(".tar") + ".parquet"
    if not storage.exists(table_path):
        return {}
    try:
        fs, inner = storage.filesystem(table_path)
        with fs.open(inner, "rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{table_path}: cannot be read as Parquet ({str(error).splitlines()[0][:200]})") from None
    if "key" not in table.column_names:
        return {}
    return {str(row["key"]): row for row in table.to_pylist()}


def _string(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value.encode(errors="replace").decode() if value is not None else None
    return str(value) if isinstance(value, (int, float, bool)) else json.dumps(value, default=str)
