"""Parquet parts read with their checksums: each page carries a CRC-32, looked at whenever the page is read, and so
does the footer (`curation.footers`).

So a byte that changed on a disk or on the way is found by whichever stage reads it, at the cost of one pass
over bytes that are in memory anyway. On an object store only the ranges that are needed are fetched.
"""

import functools
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import footers, storage
from curation.errors import UserError


class DamagedError(UserError):
    """A file that is not what was written. exit_code 1."""


def open_file(path: str, **options: Any) -> pq.ParquetFile:
    """A Parquet file whose pages are checked as they are read. options: as for `pyarrow.parquet.ParquetFile`.

    Raises DamagedError for a file without a readable footer, FileNotFoundError.
    """
    fs, inner = storage.filesystem(path)
    with named(path):
        if storage.is_local(path):
            source = pa.OSFile(inner)
        else:
            source = fs.open(inner, "rb", cache_type="none")
            options.setdefault("pre_buffer", True)  # the ranges of columns side by side, not one after the other
        footer = footers.checked(source)
        return pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, **options)


def open_bytes(data: bytes) -> pq.ParquetFile:
    """As `open_file`, of bytes that were read already; with Arrow's own errors, for `named` or a better sentence."""
    footer = footers.checked(io.BytesIO(data))
    return pq.ParquetFile(pa.BufferReader(data), metadata=footer, page_checksum_verification=True)


def look_at_footers(paths: Iterable[str]) -> None:
    """For scans by Arrow, which reads footers by itself: those of local files, once each while they do not change.

    Raises DamagedError, FileNotFoundError.
    """
    for path in paths:
        if storage.is_local(path):
            inner = storage.filesystem(path)[1]
            known = os.stat(inner)
            _look_at_footer(path, known.st_mtime_ns, known.st_size)


@functools.lru_cache(maxsize=1 << 16)
def _look_at_footer(path: str, _changed: int, _size: int) -> None:
    open_file(path)


def schema(path: str) -> pa.Schema:
    """The schema alone. Raises DamagedError, FileNotFoundError."""
    with open_file(path) as file:
        return file.schema_arrow


def bytes_of(schema: pa.Schema, tables: Iterable[pa.Table]) -> bytes:
    """The bytes of a Parquet file in which each table is one row group."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    return footers.sealed(sink.getvalue())


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or the named columns of it in that order. Raises DamagedError, FileNotFoundError."""
    with open_file(path) as file, named(path):
        names = list(columns) if columns is not None else None
        table = file.read(columns=names, use_threads=False)
        return table if names is None else table.select(names)


@contextmanager
def named(path: str) -> Iterator[None]:
    """What Arrow says of damaged bytes, as one sentence about `path`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


@contextmanager
def one_named(paths: Sequence[str]) -> Iterator[None]:
    """As `named`, for a scan of several files: Arrow does not say which it was, so they are read until it is found."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        for path in paths:
            with open_file(path) as file, named(path):
                for group in range(file.num_row_groups):
                    file.read_row_group(group, use_threads=False)
        raise damaged(paths[0], error) from error


def damaged(path: str, error: Exception) -> DamagedError:
    """The sentence for a file that is not what was written."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "CRC" in reason:
        reason = "bytes have changed since it was written"
    return DamagedError(
        f"{path}: not a readable Parquet file ({reason}); if it is of a run, `curate status RUN --verify` names all "
        "that is damaged there, and --repair lets the next `curate run` make it again",
        exit_code=1,
    )
