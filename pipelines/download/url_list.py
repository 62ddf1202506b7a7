"""URL lists as people have them: text, CSV or Parquet; a file, a pattern or a folder; read in batches, never whole."""

import csv
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import storage
from curation.errors import UserError

ROWS = pa.schema([("url", pa.string()), ("caption", pa.string()), ("label", pa.string())])
URL_COLUMNS = ("url", "image_url")
CAPTION_COLUMNS = ("caption", "alt", "text", "alt_text", "title")
LABEL_COLUMNS = ("label",)
BATCH_ROWS = 1 << 16
MAX_LINE_CHARACTERS = 1 << 22
DAMAGED = (OSError, EOFError, ValueError, pa.ArrowException, csv.Error, zlib.error, lzma.LZMAError)
"""What damaged files raise: Arrow, also ValueError for names that are no UTF-8, and the decompressors."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_KINDS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv"}


@dataclass(frozen=True)
class UrlList:
    """A list that was found readable. columns: the file's names of url, caption and label, None where it has none."""

    origin: str
    files: tuple[str, ...]
    kind: str
    columns: tuple[str | None, str | None, str | None]

    def batches(self) -> Iterator[pa.Table]:
        """Tables of `ROWS`, at most BATCH_ROWS rows each, in the order of the list."""
        for path in self.files:
            yield from _READERS[self.kind](path, self.columns)

    def measure(self) -> tuple[int, str]:
        """(rows, sha256 of the files' bytes). Raises UserError for an empty or unreadable list."""
        digest = hashlib.sha256()
        rows = 0
        try:
            for path in self.files:
                fs, inner = storage.filesystem(path)
                with fs.open(inner, "rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
                if self.kind == "parquet":
                    with fs.open(inner, "rb") as file:
                        rows += pq.ParquetFile(file).metadata.num_rows
                else:
                    rows += sum(table.num_rows for table in _READERS[self.kind](path, self.columns))
        except DAMAGED as error:
            raise _unreadable(self.origin, error) from error
        if rows == 0:
            raise UserError(f"{self.origin}: an empty list, there is nothing to download")
        return rows, digest.hexdigest()


def open_list(
    origin: str, url_column: str | None = None, caption_column: str | None = None, label_column: str | None = None
) -> UrlList:
    """Find out what a list is and which columns it has. Raises UserError where that cannot be right."""
    try:
        files = _files(origin)
        kind = _kind(files[0])
        strangers = [path for path in files if _kind(path) != kind]
        if strangers:
            raise UserError(f"{origin}: {files[0]} and {strangers[0]} are lists of different kinds; give one kind")
        if kind == "text":
            for name in (url_column, caption_column, label_column):
                if name is not None:
                    raise UserError(f"{origin}: a text list has no columns, so no `{name}`; use CSV or Parquet")
            return UrlList(origin, tuple(files), kind, ("url", None, None))
        columns = tuple(
            _find_column(origin, _column_names(files[0], kind), given, usual, needed)
            for given, usual, needed in (
                (url_column, URL_COLUMNS, True),
                (caption_column, CAPTION_COLUMNS, False),
                (label_column, LABEL_COLUMNS, False),
            )
        )
        for path in files[1:]:
            absent = [name for name in columns if name is not None and name not in _column_names(path, kind)]
            if absent:
                raise UserError(f"{path}: no column `{absent[0]}`, which {files[0]} has")
    except DAMAGED as error:
        raise _unreadable(origin, error) from error
    return UrlList(origin, tuple(files), kind, (columns[0], columns[1], columns[2]))


def _files(origin: str) -> list[str]:
    fs, inner = storage.filesystem(origin)
    if fs.isfile(inner):
        return [origin]
    if fs.isdir(inner):
        for suffix in (".parquet", ".pq", ".csv", ".tsv", ".txt"):
            found = storage.list_files(origin, suffix)
            if found:
                return found
        raise UserError(f"{origin}: a folder without lists (.parquet, .csv or .txt files)")
    if any(sign in origin for sign in "*?["):
        matches = sorted(str(name) for name in fs.glob(inner) if fs.isfile(name))
        if matches:
            return [name if storage.is_local(origin) else str(fs.unstrip_protocol(name)) for name in matches]
        raise UserError(f"{origin}: no file matches")
    raise UserError(f"{origin}: no such URL list")


def _kind(path: str) -> str:
    name = path.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    for suffix, kind in _KINDS.items():
        if name.endswith(suffix):
            return kind
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as file:
        return "parquet" if file.read(4) == b"PAR1" else "text"


def _column_names(path: str, kind: str) -> list[str]:
    if kind == "parquet":
        fs, inner = storage.filesystem(path)
        with fs.open(inner, "rb") as file:
            return list(pq.ParquetFile(file).schema_arrow.names)
    with open_text(path) as text:
        return next(read_csv(text, kind), [])


def _find_column(
    origin: str, names: Sequence[str], given: str | None, usual: Sequence[str], needed: bool
) -> str | None:
    there = ", ".join(name[:80] for name in names[:20]) or "none"
    if given is not None:
        if given not in names:
            raise UserError(f"{origin}: no column `{given}`; there are: {there}")
        return given
    for wanted in usual:
        for name in names:
            if name.strip().lower() == wanted:
                return name
    if needed:
        raise UserError(f"{origin}: no column `{usual[0]}`; there are: {there}; name the right one with url_column")
    return None


def _parquet_batches(path: str, columns: tuple[str | None, ...]) -> Iterator[pa.Table]:
    fs, inner = storage.filesystem(path)
    wanted = [name for name in columns if name is not None]
    try:
        with fs.open(inner, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(wanted))):
                arrays = [
                    pa.nulls(batch.num_rows, pa.string()) if name is None else _as_text(batch.column(name), name, path)
                    for name in columns
                ]
                yield pa.Table.from_arrays(arrays, schema=ROWS)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def _as_text(array: pa.Array, name: str, path: str) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        texts = pc.cast(array, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{path}: column `{name}` holds {array.type}, where text is expected") from None
    return valid_text(texts)


def valid_text(texts: pa.Array) -> pa.Array:
    """The strings with marks in the place of bytes that are no UTF-8: a Parquet file may hold any bytes as text."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        found = texts.cast(pa.binary()).to_pylist()
        return pa.array([None if v is None else v.decode(errors="replace") for v in found], pa.string())
    return texts


def _csv_batches(path: str, columns: tuple[str | None, ...], kind: str = "csv") -> Iterator[pa.Table]:
    try:
        with open_text(path) as text:
            rows = read_csv(text, kind)
            header: list[str] = next(rows, [])
            places = [None if name is None else header.index(name) for name in columns]
            pending: list[list[str | None]] = []
            for row in rows:
                if not row:
                    continue
                pending.append([row[p] if p is not None and p < len(row) else None for p in places])
                if len(pending) == BATCH_ROWS:
                    yield _table(pending)
                    pending = []
            if pending:
                yield _table(pending)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


def _tsv_batches(path: str, columns: tuple[str | None, ...]) -> Iterator[pa.Table]:
    yield from _csv_batches(path, columns, "tsv")


def _text_batches(path: str, columns: tuple[str | None, ...]) -> Iterator[pa.Table]:
    try:
        with open_text(path) as text:
            pending: list[list[str | None]] = []
            while line := text.readline(MAX_LINE_CHARACTERS):
                if not (url := line.strip()):
                    continue
                pending.append([url, None, None])
                if len(pending) == BATCH_ROWS:
                    yield _table(pending)
                    pending = []
            if pending:
                yield _table(pending)
    except DAMAGED as error:
        raise _unreadable(path, error) from error


_READERS: dict[str, Any] = {
    "parquet": _parquet_batches,
    "csv": _csv_batches,
    "tsv": _tsv_batches,
    "text": _text_batches,
}


def open_text(path: str) -> Any:
    """A text file, compressed or not, for reading; bytes that are no UTF-8 are replaced."""
    fs, inner = storage.filesystem(path)
    file: Any = fs.open(inner, "rb", compression="infer")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")


def read_csv(text: Any, kind: str) -> Any:
    """The `csv.reader` of a `csv` or `tsv`."""
    csv.field_size_limit(MAX_LINE_CHARACTERS)
    return csv.reader(text, delimiter="\t" if kind == "tsv" else ",")


def _table(rows: list[list[str | None]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(c, pa.string()) for c in zip(*rows, strict=True)], schema=ROWS)


def _unreadable(path: str, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path}: cannot be read ({error.strerror})")
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(f"{path}: cannot be read as a URL list ({reason})")


def read_domains(path: str) -> frozenset[str]:
    """Blocked domains, one a line; `#` begins a comment. A domain stands for everything below it."""
    from pipelines.download.addresses import parse
    from pipelines.download.errors import FetchError

    try:
        with open_text(path) as text:
            lines = text.read().splitlines()
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    found = set()
    for number, line in enumerate(lines, 1):
        name = line.split("#", 1)[0].strip().removeprefix("*").strip(".")
        if not name:
            continue
        try:
            if any(sign in name for sign in "/:@"):
                raise FetchError("bad_url")
            found.add(parse(f"http://{name}/").host)
        except FetchError:
            raise UserError(f"{path} line {number}: {name[:80]} is not a domain") from None
    return frozenset(found)
