"""The bytes of rows by range reads, many in flight: local files by pread, anything else by fsspec."""

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

from curation import storage
from curation.errors import UserError
from curation.locations import resolve
from training.data.index import Index

OPEN_FILES = 256
PROBED = 16
PAUSES_S = (0.5, 2.0, 8.0)


class Reader:
    """Reads of one process. Made in the process that uses it: it holds threads and open files."""

    def __init__(self, index: Index, reads_in_flight: int) -> None:
        self._index = index
        self._pool = ThreadPoolExecutor(reads_in_flight, thread_name_prefix="image-read")
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = Lock()
        self.requests = 0

    def submit(self, rows: Sequence[int]) -> list["Future[bytes]"]:
        """A future of the bytes of each row; it raises OSError for what cannot be read."""
        return [self._pool.submit(self.read, int(row)) for row in rows]

    def read(self, row: int) -> bytes:
        """The bytes of a row. Raises OSError."""
        record = self._index.rows[row]
        return self.read_range(int(record["shard"]), int(record["offset"]), int(record["length"]))

    def read_range(self, shard: int, offset: int, length: int) -> bytes:
        """A range of a shard. Raises OSError, for a short read as well."""
        path = resolve(self._index.listing.root, self._index.shard(shard))
        self.requests += 1
        data = self._open(path).read(offset, length) if storage.is_local(path) else _fetched(path, offset, length)
        if len(data) != length:
            raise OSError(f"{path} ends before byte {offset + length}")
        return data

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open(self, path: str) -> "OpenFile":
        with self._lock:
            found = self._files.get(path)
            if found is None:
                found = self._files[path] = OpenFile(storage.filesystem(path)[1])
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return found


class OpenFile:
    """A descriptor that closes when the last thread that reads from it lets go."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        """May be shorter at the end of the file."""
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _fetched(path: str, offset: int, length: int) -> bytes:
    """A range of a file far away, tried again: a network's hiccup is not a broken image."""
    fs, inner = storage.filesystem(path)
    for pause_s in (*PAUSES_S, None):
        try:
            return bytes(fs.cat_file(inner, start=offset, end=offset + length))
        except FileNotFoundError:
            raise
        except Exception as error:  # clients of object stores raise exceptions of their own
            if pause_s is None:
                raise OSError(f"{path}: {error}") from error
        time.sleep(pause_s)
    raise AssertionError


def check_locations(index: Index) -> None:
    """Look for the files of some rows spread over the source. Raises UserError if one is not where it should be."""
    rows = np.unique(np.linspace(0, len(index) - 1, PROBED).astype(np.int64))
    known: dict[str, Any] = {}
    for row in rows.tolist():
        record = index.rows[row]
        path = resolve(index.listing.root, index.shard(int(record["shard"])))
        if path not in known:
            known[path] = _size(path)
        if known[path] is None:
            raise UserError(
                f"{path}: not there, but {index.listing.path} says that image {record['image_id']} is in it; were the "
                "images moved or deleted? Locations are relative to the folder of the run: move both together",
                exit_code=1,
            )
        if known[path] < int(record["offset"]) + int(record["length"]):
            raise UserError(
                f"{path}: {known[path]:,} bytes, too short for image {record['image_id']} of {index.listing.path} "
                f"(bytes {record['offset']:,} to {int(record['offset']) + int(record['length']):,}); copy it again",
                exit_code=1,
            )


def _size(path: str) -> int | None:
    try:
        fs, inner = storage.filesystem(path)
        return int(fs.size(inner) or 0)
    except OSError:
        return None
