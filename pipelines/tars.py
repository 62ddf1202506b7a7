"""Webdataset tars by their headers: where each image's bytes lie and what is said about it. Nothing is extracted.

A sample is the members that share a name up to the first dot of its last part; its text, class and JSON
members are read, an img2dataset Parquet beside the tar is read once per part.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import secrets, storage
from curation.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
TEXT_SUFFIXES = ("json", "txt", "cls")
MAX_TEXT_BYTES = 1 << 20
BLOCK = 512
MAX_GAP_BYTES = 1 << 26
"""Zeros behind a tar that are looked through for another one."""
_FILES = (b"0", b"\0", b"7")
_ABOUT_THE_NEXT = (b"L", b"K", b"x", b"g")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


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
        url = _string(known.get("url"))
        return {"url": url and secrets.without_credentials(url), "caption": _string(caption), "label": _string(label)}

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
            begins_well = _scan(file, index)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    if not begins_well:
        raise UserError(f"{path}: not a plain tar ({'its first header cannot be read' if index.size else 'empty'})")
    return index


def _scan(file: Any, index: TarIndex) -> bool:
    """Go from header to header, through tars that were put one behind another; False where even the first is none.

    Not `tarfile`: it believes sizes (a long name of 10 GiB is read, a negative size goes round for ever), and its
    records of PAX are read by an expression that a stranger can make slow.
    """
    place, ended = 0, False
    said = _Said()
    while place < index.size:
        file.seek(place)
        header = _header(file.read(BLOCK))
        if header is None:
            gap = _zeros(file, place, index.size)
            if gap == 0 and place == 0:
                return False
            if gap == 0:
                index.damaged = index.damaged or not ended
                return True
            place, ended = place + gap, True
            continue
        kind, size, name = header
        if kind not in _ABOUT_THE_NEXT and said.size is not None:
            size = said.size
        data = place + BLOCK
        if kind == b"S":
            data = _behind_sparse_map(file, place)
        place = data + (-(-size // BLOCK) * BLOCK if kind not in _WITHOUT_DATA else 0)
        if kind in _ABOUT_THE_NEXT:
            if size > MAX_TEXT_BYTES or data + size > index.size:
                index.damaged = True
                return True
            if kind in (b"L", b"x"):
                file.seek(data)
                said.read(kind, file.read(size))
        else:
            if kind in _FILES and not said.is_sparse:
                if data + size > index.size:
                    index.damaged = True
                    return True
                _note(index, said.name if said.name is not None else name, data, size)
            said = _Said()
        ended = False
    index.damaged = index.damaged or place > index.size
    return index.size > 0


def _note(index: TarIndex, raw: bytes, offset: int, size: int) -> None:
    try:
        whole = raw.decode()
    except UnicodeDecodeError:
        return
    folder, slash, name = whole.rpartition("/")
    stem, _, suffix = name.partition(".")
    suffix = suffix.lower().rsplit(".", 1)[-1]
    if not stem or not suffix:
        return
    key = folder + slash + stem
    if suffix in IMAGE_SUFFIXES:
        index.images.append(Member(key, offset, size))
    elif suffix in TEXT_SUFFIXES:
        index.texts[key, suffix] = (offset, size)


@dataclass
class _Said:
    """What the headers before a member say of it: its long name, its size, that its bytes have holes."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False

    def read(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self.name = data.split(b"\0", 1)[0]
            return
        for key, value in _pax_records(data):
            if key == b"path":
                self.name = value
            elif key == b"size" and value.isdigit() and len(value) < 19:
                self.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.is_sparse = True


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records `LENGTH KEY=VALUE` newline, up to the first that is none."""
    place = 0
    while place < len(data):
        digits, space, _ = data[place : place + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[place + len(digits) + 1 : place + length].partition(b"=")
        if not equals or not value.endswith(b"\n") or place + length > len(data):
            return
        yield key, value[:-1]
        place += length


def _header(block: bytes) -> tuple[bytes, int, bytes] | None:
    """(type, size in bytes, name) of a header, None for what is none: its checksum decides."""
    if len(block) < BLOCK or block.count(0) == BLOCK:
        return None
    size, checksum = _number(block[124:136]), _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    if size is None or checksum not in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)):
        return None
    kind, name, prefix = block[156:157], block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"
    return kind, size, (prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name)


def _number(field: bytes) -> int | None:
    """Octal digits, or from GNU tar base 256 for what they cannot say; None for neither and for less than 0."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if any(digit not in b"01234567" for digit in digits):
        return None
    return int(digits or b"0", 8)


def _behind_sparse_map(file: Any, place: int) -> int:
    """Where the data of a file with holes begins: behind the blocks that list them."""
    file.seek(place)
    more = file.read(BLOCK)[482:483]
    place += BLOCK
    while more not in (b"", b"\0"):
        more = file.read(BLOCK)[504:505]
        place += BLOCK
    return place


def _zeros(file: Any, place: int, size: int) -> int:
    """The bytes of the blocks of zeros that begin at `place`, in whole blocks but for the file's end."""
    file.seek(place)
    found = 0
    while place + found < size:
        piece = file.read(1 << 16)
        left = piece.lstrip(b"\0")
        found += len(piece) - len(left)
        if left or not piece:
            break
        if found > MAX_GAP_BYTES:
            return size - place
    return found if place + found >= size else found // BLOCK * BLOCK


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
