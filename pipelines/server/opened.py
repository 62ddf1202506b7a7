"""An index, opened: images by id, hash, URL, host, words and every group, a page at a time."""

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from curation.audit.retrieval_tables import Similarities
from curation.hidden import is_hidden
from pipelines.server.building import DONE
from pipelines.server.collecting import TOKENS, WORD
from pipelines.server.columns import Column, Groups, Rows, Sorted, stored_from
from pipelines.server.vectors import Space

CHUNK = 1 << 16
BUDGET_S = 0.4
"""A page is given as far as it has come after so long; its cursor goes on from there."""
MOST_WORDS = 12
TILE = frozenset(
    (
        *("image_id", "source", "status", "error", "shard", "offset", "length", "nsfw", "label", "caption"),
        *("kept", "reason", "weight", "similarity", "distance", "references", "nearest_id"),
        *(f"cluster_{level}" for level in range(1, 21)),
    )
)
"""Columns of an image among others on a page; the rest is unpacked for JSON and for an image's own page."""
HEX = re.compile(r"[0-9a-fA-F]+")


@dataclass(frozen=True)
class Page:
    """Some images and where the next ones begin. after: the cursor to go on, None at the end.

    total: how many there are in all, where that is known; `looked`: rows looked at, of `among`.
    """

    images: list[dict[str, Any]]
    after: int | None
    total: int | None = None
    looked: int = 0
    among: int = 0


class Opened:
    """One index and what of it is hidden. Safe for use from several threads."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with open(os.path.join(folder, DONE), encoding="utf-8") as file:
            self.document: dict[str, Any] = json.load(file)
        self.ids = Sorted(os.path.join(folder, "ids"), np.uint64)
        self.table = Rows(os.path.join(folder, "images.arrow"))
        self.tiles = Rows(os.path.join(folder, "images.arrow"), TILE)
        self.groups = {name: Groups(os.path.join(folder, "groups", name)) for name in self.document.get("groups", {})}
        self.orders: dict[str, tuple[Sorted, Column]] = {}
        orders = os.path.join(folder, "orders")
        for name in sorted(os.listdir(orders)) if os.path.isdir(orders) else []:
            values = Sorted(os.path.join(orders, name, "values"), np.float32)
            self.orders[name] = (values, Column(os.path.join(orders, name, "rows"), np.uint32))
        self.lists = {
            name.removesuffix(".arrow"): Rows(os.path.join(folder, name))
            for name in sorted(os.listdir(folder))
            if name.endswith(".arrow") and name != "images.arrow"
        }
        self.spaces = {name: Space(os.path.join(folder, "vectors", name)) for name in self.document["spaces"]}
        self.levels = sum(name.startswith("cluster_") for name in self.groups)
        self.hidden = np.empty(0, np.uint64)
        self._hidden_rows = np.empty(0, np.uint32)
        self.shown_since = 0
        self._lock = threading.Lock()
        self._db: Any = None
        self.hash_of = lru_cache(4096)(self._hash)

    @property
    def digest(self) -> str:
        return str(self.document["digest"])

    @property
    def columns(self) -> list[str]:
        return list(self.table.names)

    def hide(self, hidden: np.ndarray) -> None:
        """Show these images no longer. hidden: sorted uint64 ids."""
        rows = self.rows_of(hidden)
        self.hidden, self._hidden_rows = hidden, np.sort(rows[rows >= 0]).astype(np.uint32)
        self.shown_since += 1

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 row of each id, -1 for ids that are not there."""
        if len(ids) < 2000:
            return self.ids.find(np.asarray(ids, np.uint64))
        found = np.full(len(ids), -1, np.int64)
        order = np.argsort(ids)
        wanted = np.asarray(ids, np.uint64)[order]
        for first in range(0, len(self.ids), 1 << 20):
            held = self.ids.read(first, first + (1 << 20))
            low, high = np.searchsorted(wanted, held[0]), np.searchsorted(wanted, held[-1], side="right")
            at = np.minimum(np.searchsorted(held, wanted[low:high]), len(held) - 1)
            found[order[low:high]] = np.where(held[at] == wanted[low:high], at + first, -1)
        return found

    def rows_of_one(self, image_id: int) -> int:
        """The row of an image, -1 if there is none."""
        return int(self.ids.find(np.array([image_id], np.uint64))[0])

    # One image.

    def image(self, image_id: int) -> dict[str, Any] | None:
        """The row of an image, None if there is none or it is hidden."""
        return next(iter(self.some([image_id])), None)

    def some(self, ids: Iterable[int], table: Rows | None = None) -> list[dict[str, Any]]:
        """Rows of these images in this order, without those that are not there or hidden."""
        wanted = np.array([i for i in ids if 0 <= i < 1 << 64], np.uint64)
        rows = self.rows_of(wanted)
        return (table or self.table).take(self.shown(rows[rows >= 0]))

    def is_dropped(self, image_id: int) -> bool:
        """Whether an image of the run is hidden."""
        return bool(is_hidden(np.array([image_id], np.uint64), self.hidden)[0]) if 0 <= image_id < 1 << 64 else False

    def shown(self, rows: np.ndarray) -> np.ndarray:
        """The rows that are not hidden, in their order. rows: int64."""
        if not len(self._hidden_rows):
            return rows
        hidden = self._hidden_rows
        at = np.minimum(np.searchsorted(hidden, rows.astype(np.uint32)), len(hidden) - 1)
        return np.asarray(rows[hidden[at] != rows])

    # Pages of images.

    def listed(self, filters: Mapping[str, Any], after: int | None, limit: int, table: Rows | None = None) -> Page:
        """Images that belong to all of `filters`, by ascending id. after: the id of the last one seen.

        filters: group -> what it is called (`host`, `cluster_2`, ...), and `words`: a text whose words all occur.
        table: `self.tiles`, where that is enough.
        """
        ranges = self._ranges(filters)
        start = 0 if after is None else self.ids.search(min(max(after, 0), (1 << 64) - 1), "right")
        if ranges is None:
            return Page([], None, 0)
        total = ranges[0][2] - ranges[0][1] if len(ranges) == 1 else None if ranges else len(self.ids)
        rows, cursor, looked = self._merged(ranges, start, limit)
        among = ranges[0][2] - ranges[0][1] if ranges else len(self.ids)
        images = (table or self.table).take(rows)
        last = None
        if cursor is not None:
            last = int(images[-1]["image_id"]) if len(images) == limit else int(self.ids.read(cursor, cursor + 1)[0])
        return Page(images, last, total, looked, among)

    def _ranges(self, filters: Mapping[str, Any]) -> list[tuple[Column, int, int]] | None:
        """Ranges of rows, the smallest first; None where one of them is empty."""
        found: list[tuple[Column, int, int]] = []
        for kind, value in filters.items():
            keys = self.word_keys(str(value)) if kind == "words" else [self.key(kind, value)]
            if kind not in self.groups or not keys:
                return None
            for key in keys:
                start, stop = self.groups[kind].find(key)
                if stop <= start:
                    return None
                found.append((self.groups[kind].rows, start, stop))
        return sorted(found, key=lambda entry: entry[2] - entry[1])

    def _merged(
        self, ranges: Sequence[tuple[Column, int, int]], first_row: int, limit: int
    ) -> tuple[np.ndarray, int | None, int]:
        """(rows, last row looked at or None at the end, how many were looked at)."""
        if not ranges:
            size = limit + min(len(self._hidden_rows), 4096) + 1
            rows = self.shown(np.arange(first_row, min(first_row + size, len(self.ids)), dtype=np.int64))
            end = first_row + size >= len(self.ids) and len(rows) <= limit
            return rows[:limit], None if end else int(rows[:limit][-1] if len(rows) else first_row + size - 1), size
        column, start, stop = ranges[0]
        at = _at_least(column, start, stop, first_row)
        begun, chunk, deadline = at, max(256, 2 * limit), time.monotonic() + BUDGET_S
        found: list[np.ndarray] = []
        count = 0
        while at < stop and count <= limit and time.monotonic() < deadline:
            rows = column.read(at, min(stop, at + chunk))
            at += len(rows)
            kept = rows
            for other, low, high in ranges[1:]:
                if len(kept):
                    kept = kept[_among(kept, other, low, high)]
            kept = self.shown(kept)
            found.append(kept)
            count += len(kept)
            chunk = min(CHUNK, 4 * chunk)
        every = np.concatenate(found) if found else np.empty(0, np.uint32)
        if len(every) > limit:
            return every[:limit], int(every[limit - 1]), at - begun
        return every, int(column.read(at - 1, at)[0]) if at < stop else None, at - begun

    def ranked(
        self,
        kind: str,
        value: Any,
        position: int,
        limit: int,
        backwards: bool = False,
        table: Rows | None = None,
    ) -> Page:
        """Images of a group in the order of its rank: a cluster's by distance, a reference set's by similarity.

        position: of the first, as the cursor of the page before says; backwards: from the far end.
        """
        start, stop = self.groups[kind].find(self.key(kind, value)) if kind in self.groups else (0, 0)
        if not stop:
            return Page([], None, 0)
        column, position = self.groups[kind].rows, max(0, position)
        if backwards:
            rows = column.read(max(start, stop - position - limit), stop - position)[::-1]
        else:
            rows = column.read(start + position, min(stop, start + position + limit))
        more = start + position + limit < stop
        shown = self.shown(rows.astype(np.int64))
        return Page((table or self.table).take(shown), position + limit if more else None, stop - start)

    def scored(
        self,
        name: str,
        value: float,
        after: int | None,
        limit: int,
        backwards: bool = False,
        table: Rows | None = None,
    ) -> Page:
        """Images in the order of a score, from `value` upwards, or downwards. after: cursor of the page before."""
        values, rows = self.orders[name]
        at = values.search(value) if after is None else min(max(after, 0), len(values))
        low, high = (max(0, at - limit), at) if backwards else (at, min(len(values), at + limit))
        found = rows.read(low, high)
        scores = values.read(low, high)
        if backwards:
            found, scores = found[::-1], scores[::-1]
        shown = self.shown(found.astype(np.int64))
        by_row = dict(zip(found.tolist(), scores.tolist(), strict=True))
        images = (table or self.table).take(shown)
        for image, row in zip(images, shown.tolist(), strict=True):
            image["score"] = by_row[row]
        cursor = (low if low > 0 else None) if backwards else (high if high < len(values) else None)
        return Page(images, cursor, len(values))

    def histogram(self, name: str, edges: np.ndarray) -> np.ndarray:
        """Images by a score, (bins,) int64 over ascending `edges`; what lies outside counts in the first or last."""
        values, _ = self.orders[name]
        return np.diff([0, *(values.search(edge) for edge in stored_from(edges[1:-1])), len(values)])

    # Keys.

    def key(self, kind: str, value: Any) -> int:
        """The key of what a group is called."""
        if kind in ("near", *(f"cluster_{level}" for level in range(1, 20)), "component", "chain", "pca", "seed"):
            return int(value)
        return int(self.hash_of(value))

    def word_keys(self, text: str) -> list[int]:
        """Keys of the words of a text, at most MOST_WORDS."""
        words = TOKENS.format(text="?")
        query = f"SELECT hash(left(w, {WORD})) FROM (SELECT unnest(list_distinct({words})) w) WHERE w <> ''"
        with self._lock:
            found = self._connection().execute(query, [text]).fetchall()
        return [int(row[0]) for row in found][:MOST_WORDS]

    def _hash(self, value: str | bytes) -> int:
        with self._lock:
            return int(self._connection().execute("SELECT hash(?)", [value]).fetchone()[0])

    def _connection(self) -> Any:
        if self._db is None:
            import duckdb

            self._db = duckdb.connect(config={"threads": 1, "memory_limit": "256MB"})
        return self._db

    def by_hash(self, text: str, limit: int) -> list[dict[str, Any]]:
        """Images whose bytes, pixels or PCA hash are this: 64 or 16 hexadecimal digits, or a decimal PCA hash."""
        found: dict[int, dict[str, Any]] = {}
        if len(text) == 64 and HEX.fullmatch(text):
            data = bytes.fromhex(text)
            for kind, names in (("sha256", ("sha256", "stored_sha256")), ("pixel", ("pixel_sha256",))):
                if kind in self.groups:
                    images = self.listed({kind: data}, None, limit).images
                    found |= {int(i["image_id"]): i for i in images if any(i.get(name) == data for name in names)}
        value = -1
        if len(text) == 16 and HEX.fullmatch(text):
            value = int(text, 16)
        elif len(text) <= 20 and text.isascii() and text.isdecimal():
            value = int(text)
        if 0 <= value < 1 << 64 and "pca" in self.groups:
            found |= {int(i["image_id"]): i for i in self.listed({"pca": value}, None, limit).images}
        return [found[key] for key in sorted(found)][:limit]

    # Lists.

    def rows(self, name: str, start: int, limit: int) -> list[dict[str, Any]]:
        """Rows [start, start + limit) of a list: hosts, failures, components, clusters_1, seeds, ..."""
        if name not in self.lists:
            return []
        held = self.lists[name]
        return held.take(np.arange(min(max(start, 0), len(held)), min(max(start, 0) + limit, len(held))))

    def named(self, name: str, column: str, value: str) -> tuple[int, int]:
        """[start, stop) of the rows of a list that is sorted by a column of texts."""
        held = self.lists.get(name)
        return (_first(held, column, value, False), _first(held, column, value, True)) if held else (0, 0)

    def cluster(self, level: int, cluster: int) -> dict[str, Any] | None:
        """The row of a cluster in the list of its level."""
        kind = f"listed_{level}"
        start, stop = self.groups[kind].find(cluster) if kind in self.groups else (0, 0)
        if stop == start:
            return None
        return self.lists[f"clusters_{level}"].take(self.groups[kind].rows.read(start, stop))[0]

    def inside(self, level: int, cluster: int, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """(rows of the clusters one level below inside a cluster, the largest first, how many there are)."""
        kind = f"below_{level}"
        low, high = self.groups[kind].find(cluster) if kind in self.groups else (0, 0)
        if low + start >= high:
            return [], high - low
        rows = self.groups[kind].rows.read(low + start, min(high, low + start + limit))
        return self.lists[f"clusters_{level - 1}"].take(rows), high - low

    def shares(self, level: int) -> dict[str, np.ndarray]:
        """By what is counted (the pool, the dataset, ...), the images of each cluster of a level that holds any."""
        names = self.document.get("evenness", {}).get(str(level), {})
        return {name: np.fromfile(os.path.join(self.folder, "shares", str(level), name)) for name in names}

    def curves(self, seed_set: str) -> dict[str, Similarities]:
        """By mode, the similarities of what a seed set drew."""
        keys = [(place, mode) for place, (name, mode) in enumerate(self.document.get("curves", [])) if name == seed_set]
        if not keys:
            return {}
        with np.load(os.path.join(self.folder, "curves.npz"), allow_pickle=False) as held:
            return {mode: Similarities(held[f"arr_{place}"]) for place, mode in keys}

    def retrieved(self, kind: str, key: int, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows of RETRIEVAL by `seed` or `retrieved` (an id), hidden images left out, and how many there are."""
        if kind not in self.groups:
            return [], 0
        low, high = self.groups[kind].find(key)
        rows = self.groups[kind].rows.read(low + start, min(high, low + start + limit))
        found = self.lists["retrieval"].take(rows)
        ids = np.array([int(entry["image_id"]) for entry in found], np.uint64)
        hidden = is_hidden(ids, self.hidden)
        return [entry for entry, gone in zip(found, hidden, strict=True) if not gone], high - low

    def close(self) -> None:
        """Let go of the files."""
        held: list[Any] = [self.ids, self.table, self.tiles]
        for one in [*held, *self.groups.values(), *self.lists.values(), *self.spaces.values()]:
            one.close()
        for values, rows in self.orders.values():
            values.close()
            rows.close()


def _first(held: Rows, column: str, value: str, after: bool) -> int:
    """The first row whose text is `value` or later; after: later than it."""
    low, high, wanted = 0, len(held), value.encode("utf-8", "replace")
    while low < high:
        middle = (low + high) // 2
        name = held.take(np.array([middle]))[0][column].encode()
        low, high = (middle + 1, high) if name < wanted or (after and name == wanted) else (low, middle)
    return low


def _at_least(column: Column, start: int, stop: int, value: int) -> int:
    """First place in the ascending column[start:stop] whose value is at least `value`, by halving."""
    while stop - start > 1024:
        middle = (start + stop) // 2
        if int(column.read(middle, middle + 1)[0]) < value:
            start = middle + 1
        else:
            stop = middle
    return start + int(np.searchsorted(column.read(start, stop), value))


def _among(rows: np.ndarray, column: Column, start: int, stop: int) -> np.ndarray:
    """Which of the ascending `rows` are in the ascending column[start:stop]."""
    low = _at_least(column, start, stop, int(rows[0]))
    high = _at_least(column, low, stop, int(rows[-1]) + 1)
    found = np.zeros(len(rows), bool)
    for first in range(low, high, 1 << 20):
        held = column.read(first, min(high, first + (1 << 20)))
        found |= held[np.minimum(np.searchsorted(held, rows), len(held) - 1)] == rows
    return found
