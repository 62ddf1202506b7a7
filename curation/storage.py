"""Files that appear whole or not at all, on a local disk or any fsspec URL."""

import hashlib
import io
import mmap
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation import footers, object_store
from curation.errors import GO_ON, UserError, mendable

REMOVED_AT_ONCE = 16
SENT_IN_PIECES = 100 << 20
"""Bytes from which s3fs sends an object in pieces."""


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path inside it.

    That of an object store is a `curation.object_store.Store`: its failures are UserErrors, but for what is missing.
    """
    if not is_local(path):
        return object_store.connect(path)
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def is_local(path: str) -> bool:
    """Whether a path or URL is on the local disk."""
    return "://" not in path or path.startswith("file://")


def join(base: str, *names: str) -> str:
    """Join path segments under a path or URL."""
    return "/".join([base.rstrip("/"), *[n.strip("/") for n in names]])


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    fs, inner = filesystem(path)
    try:
        return int(fs.size(inner))
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_files(folder: str, suffix: str) -> list[str]:
    """Whole paths of the files directly in `folder` that end in `suffix`, in name order; [] without the folder."""
    fs, inner = filesystem(folder)
    try:
        names = fs.ls(inner, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = sorted(n.rsplit("/", 1)[-1] for n in names if n.endswith(suffix))
    return [join(folder, name) for name in found if not name.startswith(".")]


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in `folder`, in order, without hidden ones; [] without the folder."""
    fs, inner = filesystem(folder)
    try:
        entries = fs.ls(inner, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = (str(e["name"]).rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")
    return sorted(name for name in names if not name.startswith("."))


def remove(path: str) -> None:
    """Remove a file, if it is there. Its name is not a pattern, as `fs.rm` would take it."""
    fs, inner = filesystem(path)
    try:
        fs.rm_file(inner)
    except FileNotFoundError:
        return


def remove_folder(folder: str) -> None:
    """Remove a folder and all in it, if it is there."""
    fs, inner = filesystem(folder)
    if is_local(folder):
        shutil.rmtree(inner, ignore_errors=True)
        return
    with ThreadPoolExecutor(REMOVED_AT_ONCE) as pool:
        for _ in pool.map(fs.rm_file, fs.find(inner)):
            pass


def read_bytes(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """One range of a file."""
    fs, inner = filesystem(path)
    end = None if length is None else offset + length
    return bytes(fs.cat_file(inner, start=offset, end=end))


def write_whole(path: str, data: bytes | mmap.mmap) -> None:
    """Write a file that readers see whole or not at all: aside, then renamed; put whole on object stores.

    Raises UserError (exit code 1) for a full disk or a folder that cannot be written.
    """
    fs, inner = filesystem(path)
    try:
        if not is_local(path):
            # Clients send bytes, not maps of files; what is larger goes in several pieces, which are bytes.
            whole = isinstance(data, bytes) or (fs.name in ("s3", "s3a") and len(data) >= SENT_IN_PIECES)
            fs.pipe_file(inner, data if whole else bytes(data))
            return
        os.makedirs(os.path.dirname(inner) or ".", exist_ok=True)
        aside = f"{os.path.dirname(inner)}/.{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp"
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, inner)
        except BaseException:
            if os.path.exists(aside):
                os.unlink(aside)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str, error: OSError) -> UserError:
    """The sentence for a failed write."""
    full = mendable(error, path)
    if full is not None:
        return UserError(f"{path}: no space left on the disk; free some and {GO_ON}", exit_code=1)
    reason = error.strerror or str(error)
    return UserError(f"{path}: cannot be written ({reason}); choose another folder or its rights", exit_code=1)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def digest(path: str, piece_bytes: int = 8 << 20) -> tuple[int, str]:
    """(bytes, hex sha256) of a file, read in pieces of `piece_bytes`."""
    fs, inner = filesystem(path)
    total, running = 0, hashlib.sha256()
    with fs.open(inner, "rb", **({} if is_local(path) else {"block_size": piece_bytes})) as file:
        while piece := file.read(piece_bytes):
            total += len(piece)
            running.update(piece)
    return total, running.hexdigest()


def table_bytes(table: pa.Table, metadata: dict[str, str] | None = None) -> bytes:
    """A table as the bytes of a Parquet file; equal tables give equal bytes.

    Columns of vectors (fixed-size lists of floats) are written plain and uncompressed: they do not
    compress, and the default settings write them forty times slower.
    """
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    vectors = {f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)}
    others = [f.name for f in table.schema if f.name not in vectors]
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression={f"{f.name}.list.element" if f.name in vectors else f.name: "NONE" for f in table.schema}
        if vectors
        else "zstd",
        use_dictionary=[] if vectors else others,  # type: ignore[arg-type]
        write_statistics=[n for n in others if not pa.types.is_nested(table.schema.field(n).type)],  # type: ignore[arg-type]
        row_group_size=1 << 16,
        write_page_checksum=True,
    )
    return footers.sealed(sink.getvalue())


def in_units(count: float) -> str:
    """Bytes for people: `1.5 GB`, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
