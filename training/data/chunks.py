"""Packed shards read from end to end: which row a sample is, and chunks of neighbouring rows fetched by one request.

The rows are cut into chunks. Each group of the global batch is a lane that goes through chunks of its own, some at a
time, shuffled together; so a process reads a chunk once and whole, wherever the stream is entered and however many
processes there are.
"""

import fcntl
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.config import DataConfig
from training.data.index import Index
from training.data.permutation import permute_each
from training.data.reading import OpenFile, Reader


@dataclass(frozen=True)
class Lanes:
    """How the stream falls apart: `count` groups of `width` samples in a global batch."""

    count: int
    width: int


@dataclass(frozen=True)
class Chunks:
    """[0, n) in `count` chunks, as equal as can be."""

    n: int
    count: int

    @property
    def longest(self) -> int:
        return -(-self.n // self.count)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First row of each; of `count`, n."""
        return numbers * self.n // self.count

    def of(self, row: int) -> int:
        """The chunk that holds a row."""
        return int(((row + 1) * self.count - 1) // self.n)


def chunks_of(config: DataConfig, n: int, lanes: Lanes) -> Chunks:
    """Of `chunk_images`, or fewer where the lanes would otherwise have less than a window each."""
    size = max(1, min(config.chunk_images, n // (lanes.count * config.shuffle_chunks)))
    return Chunks(n, -(-n // size))


class ChunkOrder:
    """Draws to rows: lane by lane through permuted chunks, `window` of them shuffled together."""

    def __init__(self, chunks: Chunks, lanes: Lanes, window: int, seed: int) -> None:
        self._chunks, self._lanes, self._window, self._seed = chunks, lanes, window, seed
        self.epoch = chunks.n

    def rows(self, draws: np.ndarray) -> np.ndarray:
        lanes, longest = self._lanes, self._chunks.longest
        step, place = np.divmod(draws, lanes.count * lanes.width)
        lane, inside = np.divmod(place, lanes.width)
        length = self._window * longest
        window, at = np.divmod(step * lanes.width + inside, length)
        tweaks = (lane.astype(np.uint64) << np.uint64(40)) ^ window.astype(np.uint64)
        at = permute_each(at, np.full(len(at), length), tweaks, self._seed, "window")
        slot = (window * self._window + at // longest) * lanes.count + lane
        epoch, turn = np.divmod(slot, self._chunks.count)
        counts = np.full(len(turn), self._chunks.count)
        number = permute_each(turn, counts, epoch.astype(np.uint64), self._seed, "chunks")
        starts = self._chunks.starts(number)
        # A chunk a row shorter than the longest gives one of its rows twice, another one each time.
        return starts + (at % longest + epoch) % (self._chunks.starts(number + 1) - starts)


class ChunkReader(Reader):
    """Rows out of whole chunks, each fetched once into a local folder that the workers of a process share."""

    def __init__(self, index: Index, reads_in_flight: int, chunks: Chunks, spool: str, kept: int) -> None:
        super().__init__(index, reads_in_flight)
        self._chunks, self._spool, self._kept = chunks, Path(spool), kept
        self._open_chunks: OrderedDict[int, tuple[OpenFile, list[tuple[int, int, int]]]] = OrderedDict()

    def submit(self, rows: Sequence[int]) -> "list[Future[bytes]]":
        return [self._pool.submit(self._row, int(row)) for row in rows]

    def _row(self, row: int) -> bytes:
        file, segments = self._chunk(self._chunks.of(row))
        record = self._index.rows[row]
        shard, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        base = 0
        for of, start, end in segments:
            if of == shard and start <= offset < end:
                data = file.read(base + offset - start, length)
                if len(data) != length:
                    raise OSError(f"the chunk of row {row} is short")
                return data
            base += end - start
        raise AssertionError

    def _chunk(self, number: int) -> tuple[OpenFile, list[tuple[int, int, int]]]:
        """A chunk's file, which stays open here when it is pruned, and what is in it."""
        with self._lock:
            found = self._open_chunks.get(number)
            if found is not None:
                self._open_chunks.move_to_end(number)
                return found
        first, last = (int(v) for v in self._chunks.starts(np.array([number, number + 1])))
        segments = _segments(self._index.rows[first:last])
        while True:
            try:
                opened = OpenFile(str(self._fetched(number, segments)))
                break
            except FileNotFoundError:  # pruned by another worker since
                continue
        with self._lock:
            found = self._open_chunks.setdefault(number, (opened, segments))
            if len(self._open_chunks) > self._kept:
                self._open_chunks.popitem(last=False)
        return found

    def _fetched(self, number: int, segments: list[tuple[int, int, int]]) -> Path:
        path = self._spool / f"{number}.chunk"
        with open(self._spool / f"{number % 64}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                os.utime(path)
                return path
            except FileNotFoundError:
                aside = path.with_suffix(".tmp")
                with open(aside, "wb") as file:
                    for shard, start, end in segments:
                        file.write(self._range(shard, start, end - start))
                aside.rename(path)
        self._prune()
        return path

    def _range(self, shard: int, offset: int, length: int) -> bytes:
        try:
            return self.read_range(shard, offset, length)
        except FileNotFoundError as error:  # the shard's, which is another matter than a pruned chunk's
            raise OSError(f"{self._index.shard(shard)}: not there") from error

    def _prune(self) -> None:
        """The chunks used longest ago go; one that is asked for again is fetched again."""
        found = []
        for path in self._spool.glob("*.chunk"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        for _, path in sorted(found)[: -self._kept]:
            path.unlink(missing_ok=True)


def _segments(records: np.ndarray) -> list[tuple[int, int, int]]:
    """(shard, first byte, last byte + 1) of neighbouring rows, one for each shard they are in."""
    cuts = np.flatnonzero(np.diff(records["shard"].astype(np.int64))) + 1
    found = []
    for part in np.split(records, cuts):
        ends = part["offset"].astype(np.int64) + part["length"]
        found.append((int(part["shard"][0]), int(part["offset"].min()), int(ends.max())))
    return found
