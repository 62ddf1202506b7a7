"""URLs that are listed twice, found without holding the list: 16-byte keys, spilled by range, sorted range by range.

Two URLs are one when they are equal after: white space around them stripped, scheme and host in lower case,
the scheme's own port and the fragment left out, an empty path read as `/`. Nothing else: queries, letter
case of paths and percent-encodings may mean different images.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from curation import parquet, storage

KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("id", "<u8")])
ROWS_PER_BUCKET = 1 << 22
ROWS_PER_RANGE = 1 << 22
NOT_A_DUPLICATE = np.uint64(0xFFFFFFFFFFFFFFFF)

_PLAIN = re.compile(r"https?://[a-z0-9.-]+/[^#\s]*")
_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)", re.DOTALL)
_OWN_PORT = {"http": ":80", "https": ":443"}


def normalise(url: str) -> str:
    """The form in which two URLs are compared."""
    if _PLAIN.fullmatch(url):
        return url
    text = url.strip()
    found = _PARTS.match(text)
    if found is None:
        return text
    scheme, host, rest = found.group(1).lower(), found.group(2), found.group(3)
    user, at, place = host.rpartition("@")
    place = place.lower().removesuffix(_OWN_PORT.get(scheme, "\0"))
    return f"{scheme}://{user}{at}{place}{rest if rest.startswith('/') else '/' + rest}"


def url_keys(urls: Iterable[str]) -> np.ndarray:
    """(n, 2) uint64: the two halves of each URL's 128-bit hash (blake2b of its normal form)."""
    digests = [hashlib.blake2b(normalise(u).encode(errors="replace"), digest_size=16).digest() for u in urls]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


class DuplicateUrls:
    """Finds, for each row of a list, the first row or earlier source that has its URL.

    add() every URL in order, then resolve(), then duplicates() of any range of rows. `scratch` is a local
    folder for 24 bytes per row.
    """

    def __init__(self, scratch: str, rows: int, first_id: int) -> None:
        self.scratch = scratch
        self.first_id = first_id
        self.buckets = 1 << max(0, (-(-rows // ROWS_PER_BUCKET) - 1).bit_length())
        self.rows = 0
        self._files = [open(os.path.join(scratch, f"keys-{b}"), "wb") for b in range(self.buckets)]  # noqa: SIM115

    def add(self, urls: Sequence[str | None]) -> None:
        """The next URLs of the list; a row without one is nobody's duplicate."""
        rows = np.array([i for i, url in enumerate(urls) if url], dtype=np.uint64)
        found = np.empty(len(rows), KEY)
        keys = url_keys(url for url in urls if url)
        found["high"], found["low"] = keys[:, 0], keys[:, 1]
        found["id"] = rows + np.uint64(self.first_id + self.rows)
        self.rows += len(urls)
        bucket = self._bucket(found["high"])
        for b in np.unique(bucket):
            found[bucket == b].tofile(self._files[int(b)])

    def resolve(self, earlier: Sequence[str], out: str | None) -> int:
        """Compare, also with the keys in the folders `earlier`; returns how many rows repeat.

        First occurrences are stored in the folder `out`, for the sources after this one.
        """
        for file in self._files:
            file.close()
        repeats = 0
        for b in range(self.buckets):
            mine = np.fromfile(os.path.join(self.scratch, f"keys-{b}"), KEY)
            theirs = [read_keys(folder, b, self.buckets) for folder in earlier]
            both = np.concatenate([*theirs, mine])
            both = both[np.lexsort((both["id"], both["low"], both["high"]))]
            new = np.ones(len(both), bool)
            new[1:] = (both["high"][1:] != both["high"][:-1]) | (both["low"][1:] != both["low"][:-1])
            first = both["id"][np.maximum.accumulate(np.where(new, np.arange(len(both)), 0))]
            own = both["id"] >= np.uint64(self.first_id)
            own &= both["id"] < np.uint64(self.first_id + self.rows)
            self._spill(both["id"][own & ~new], first[own & ~new])
            repeats += int((own & ~new).sum())
            if out is not None:
                kept = both[own & new]
                table = pa.table({name: pa.array(kept[name]) for name in ("high", "low", "id")})
                storage.write_whole(
                    storage.join(out, f"{b:05d}-of-{self.buckets:05d}.parquet"), storage.table_bytes(table)
                )
        return repeats

    def duplicates(self, first_row: int, count: int) -> np.ndarray:
        """(count,) uint64: the id that each row repeats, NOT_A_DUPLICATE for the others."""
        result = np.full(count, NOT_A_DUPLICATE)
        for part in range(first_row // ROWS_PER_RANGE, (first_row + count - 1) // ROWS_PER_RANGE + 1):
            path = os.path.join(self.scratch, f"repeats-{part}")
            if not os.path.exists(path):
                continue
            pairs = np.fromfile(path, "<u8").reshape(-1, 2)
            row = pairs[:, 0].astype(np.int64) - self.first_id - first_row
            inside = (row >= 0) & (row < count)
            result[row[inside]] = pairs[inside, 1]
        return result

    def _bucket(self, high: np.ndarray) -> np.ndarray:
        bits = self.buckets.bit_length() - 1
        return (high >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(high), np.int64)

    def _spill(self, ids: np.ndarray, first: np.ndarray) -> None:
        parts = (ids - np.uint64(self.first_id)).astype(np.int64) // ROWS_PER_RANGE
        for part in np.unique(parts):
            chosen = parts == part
            with open(os.path.join(self.scratch, f"repeats-{part}"), "ab") as file:
                np.stack([ids[chosen], first[chosen]], axis=1).astype("<u8").tofile(file)


def read_keys(folder: str, bucket: int, buckets: int) -> np.ndarray:
    """The stored keys whose hash falls into `bucket` of `buckets` (a power of two). Returns (n,) KEY."""
    found = []
    for path in storage.list_files(folder, ".parquet"):
        number, total = (int(word) for word in path.rsplit("/", 1)[-1].removesuffix(".parquet").split("-of-"))
        # Both counts are powers of two: the ranges nest.
        if number * buckets >= (bucket + 1) * total or (number + 1) * buckets <= bucket * total:
            continue
        table = parquet.read_table(path)
        keys = np.empty(table.num_rows, KEY)
        for name in ("high", "low", "id"):
            keys[name] = table[name].to_numpy()
        bits = buckets.bit_length() - 1
        if bits and total < buckets:
            keys = keys[(keys["high"] >> np.uint64(64 - bits)).astype(np.int64) == bucket]
        found.append(keys)
    return np.concatenate(found) if found else np.empty(0, KEY)
