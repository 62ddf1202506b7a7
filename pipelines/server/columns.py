"""Sorted side tables on disk: columns of numbers, groups of rows by key, and rows by number.

All of it is read by ranges (`pread`), so that memory does not grow with what has been looked at; of a sorted column one
value in EVERY is in memory. A row is the dense number of an image: images in order of their ids, from 0.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

EVERY = 1024
"""Values of a sorted column between two that are kept in memory."""
BATCH_ROWS = 256
"""Rows that are read and unpacked together for one of them."""
CACHED_BATCHES = 128


class Column:
    """A file of numbers of one type."""

    def __init__(self, path: str, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._rows = os.fstat(self._file).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return int(self._rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values [start, stop), cut to what there is."""
        start, stop = max(0, start), min(stop, self._rows)
        if stop <= start:
            return np.empty(0, self.dtype)
        size = self.dtype.itemsize
        pieces, at, end = [], start * size, stop * size
        while at < end:
            piece = os.pread(self._file, end - at, at)
            if not piece:
                raise OSError("a file of the index has become shorter: build the index again")
            pieces.append(piece)
            at += len(piece)
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), self.dtype)

    def close(self) -> None:
        os.close(self._file)


class Sorted(Column):
    """A column in ascending order."""

    def __init__(self, path: str, dtype: Any) -> None:
        super().__init__(path, dtype)
        self._sample = np.fromfile(path + ".every", self.dtype)

    def search(self, value: Any, side: str = "left", start: int = 0, stop: int | None = None) -> int:
        """As `np.searchsorted`, by one read of at most EVERY values."""
        block = int(np.searchsorted(self._sample, self.dtype.type(value), side=side)) - 1  # type: ignore[call-overload]
        if block < 0:
            return start
        first = block * EVERY
        found = first + int(np.searchsorted(self.read(first, first + EVERY), self.dtype.type(value), side=side))  # type: ignore[call-overload]
        return min(max(found, start), len(self) if stop is None else stop)

    def find(self, values: np.ndarray) -> np.ndarray:
        """Position of each value, -1 where it is not there: (n,) int64."""
        found = np.full(len(values), -1, np.int64)
        for i, value in enumerate(values):
            at = self.search(value)
            held = self.read(at, at + 1)
            if len(held) and held[0] == value:
                found[i] = at
        return found


def stored_from(values: np.ndarray, more: bool = False) -> np.ndarray:
    """The smallest float32 that is at least each value (n,) float64, or more than it: 0.9 as float32 is below 0.9."""
    near = values.astype(np.float32)
    below = near <= values if more else near < values
    return np.where(below, np.nextafter(near, np.float32(np.inf)), near)


class Groups:
    """Rows by key: `keys` sorted, each once; the rows of key i are rows[starts[i] : starts[i + 1]]."""

    def __init__(self, folder: str) -> None:
        self.keys = Sorted(f"{folder}/keys", np.uint64)
        self.starts = Column(f"{folder}/starts", np.uint64)
        self.rows = Column(f"{folder}/rows", np.uint32)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: int) -> tuple[int, int]:
        """[start, stop) in `rows`; (0, 0) for a key that is not there."""
        at = self.keys.search(key)
        held = self.keys.read(at, at + 1)
        if not len(held) or int(held[0]) != key:
            return 0, 0
        start, stop = self.starts.read(at, at + 2)
        return int(start), int(stop)

    def size(self, key: int) -> int:
        start, stop = self.find(key)
        return stop - start

    def close(self) -> None:
        for column in (self.keys, self.starts, self.rows):
            column.close()


class Rows:
    """Rows of a table by their number, in compressed batches of an Arrow file. columns: only these are unpacked."""

    def __init__(self, path: str, columns: Collection[str] | None = None) -> None:
        self._file = pa.OSFile(path)
        reader = pa.ipc.open_file(self._file)
        self.names = list(reader.schema.names)
        chosen = [i for i, name in enumerate(self.names) if columns is None or name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=chosen, use_threads=False)
        self._reader = pa.ipc.open_file(self._file, options=options)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self.rows = self._count()

    def _count(self) -> int:
        batches = self._reader.num_record_batches
        if not batches:
            return 0
        return int(batches - 1) * BATCH_ROWS + int(self._reader.get_batch(batches - 1).num_rows)

    def __len__(self) -> int:
        return int(self.rows)

    def take(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The rows with these numbers, in this order, as mappings."""
        wanted = np.asarray(rows, np.int64)
        numbers = wanted // BATCH_ROWS
        found: list[dict[str, Any]] = [{}] * len(wanted)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            held = self._batch(int(number)).take(pa.array(wanted[mine] % BATCH_ROWS)).to_pylist()
            for at, row in zip(mine.tolist(), held, strict=True):
                found[at] = row
        return found

    def _batch(self, number: int) -> pa.RecordBatch:
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
            else:
                self._cache[number] = self._reader.get_batch(number)
                while len(self._cache) > CACHED_BATCHES:
                    self._cache.popitem(last=False)
            return self._cache[number]

    def close(self) -> None:
        self._file.close()


class ColumnWriter:
    """Appends to a column; with `sorted` also what `Sorted` keeps in memory."""

    def __init__(self, path: str, dtype: Any, *, ordered: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._files = ExitStack()
        self._file = self._files.enter_context(open(path, "wb"))  # noqa: SIM115
        self._sample = self._files.enter_context(open(path + ".every", "wb")) if ordered else None  # noqa: SIM115
        self.count = 0

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        if self._sample is not None:
            self._sample.write(values[-self.count % EVERY :: EVERY].tobytes())
        self._file.write(memoryview(values).cast("B") if len(values) else b"")
        self.count += len(values)

    def close(self) -> None:
        self._files.close()


def write_groups(folder: str, sorted_pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Write Groups from (keys, rows) in ascending order of key, cut anywhere. Returns (keys, rows) counts."""
    keys = ColumnWriter(f"{folder}/keys", np.uint64, ordered=True)
    starts = ColumnWriter(f"{folder}/starts", np.uint64)
    rows = ColumnWriter(f"{folder}/rows", np.uint32)
    last: int | None = None
    for some_keys, some_rows in sorted_pairs:
        if not len(some_keys):
            continue
        new = np.flatnonzero(np.r_[last is None or int(some_keys[0]) != last, some_keys[1:] != some_keys[:-1]])
        keys.append(some_keys[new])
        starts.append(new.astype(np.uint64) + np.uint64(rows.count))
        rows.append(some_rows)
        last = int(some_keys[-1])
    starts.append(np.array([rows.count], np.uint64))
    for column in (keys, starts, rows):
        column.close()
    return keys.count, rows.count


class RowsWriter:
    """Writes what `Rows` reads; every batch but the last has BATCH_ROWS rows."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._sink = pa.OSFile(path, "wb")
        self._writer = pa.ipc.new_file(self._sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        self._waiting: pa.Table | None = None
        self.count = 0

    def append(self, table: pa.Table) -> None:
        self.count += table.num_rows
        whole = table if self._waiting is None else pa.concat_tables([self._waiting, table])
        ready = whole.num_rows // BATCH_ROWS * BATCH_ROWS
        for batch in _batches(whole.slice(0, ready)):
            self._writer.write_batch(batch)
        self._waiting = whole.slice(ready).combine_chunks()

    def close(self) -> None:
        if self._waiting is not None and self._waiting.num_rows:
            for batch in _batches(self._waiting):
                self._writer.write_batch(batch)
        self._writer.close()
        self._sink.close()


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    whole = table.combine_chunks()
    for start in range(0, whole.num_rows, BATCH_ROWS):
        yield from whole.slice(start, BATCH_ROWS).to_batches()
