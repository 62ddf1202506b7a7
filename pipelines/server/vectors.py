"""More like this: vectors as bytes, sorted by cell, of which a search reads the nearest cells alone.

Cells are k-means of two levels (groups of centroids, searched as `nearest.Grouping` does), so that a vector is
compared with a few hundred centroids at any number of rows. A vector is rotated to at most CODED principal components
where it has more, and each is stored as one byte. The build finds the nearest of some queries by exact
search over all vectors, reads so many cells that they hold WANTED of these, and measures the recall of its searches.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from curation import vectors
from curation.clusters import ArrayPoints, kmeans
from curation.nearest import Grouping, nearest_centroid
from curation.order import generator
from pipelines.server.columns import Column, ColumnWriter, Sorted

CODED = 512
"""Bytes of a stored vector at most."""
NEAREST = 10
WANTED = 0.95
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_CELLS = 1 << 16
ROWS_PER_CELL = 1500
SAMPLED_PER_CELL = 32
QUERIES = 150
ITERATIONS = 8
NOMINATED = 4
ABSENT = np.uint32(0xFFFFFFFF)
Tell = Callable[[str], None]


def build(paths: Sequence[str], ids_path: str, folder: str, tell: Tell = lambda text: None) -> dict[str, Any] | None:
    """Write the index of these vectors into `folder`; None if there are none of images of the run.

    ids_path: the sorted column of all image ids, whose positions are rows. Returns what it is and its recall.
    """
    opened = vectors.open_files(paths)
    if not opened.rows:
        return None
    started = time.monotonic()
    os.makedirs(folder)
    sample = _sample(opened)
    rotation = _rotation(sample)
    sample = sample @ rotation if rotation is not None else sample
    scale = np.maximum(np.abs(sample).max(axis=0) / 127, 1e-9).astype(np.float32)
    centroids, group = _train(sample, cells_of(opened.rows))
    tell(f"{len(centroids):,} cells for {opened.rows:,} vectors")
    queries = _Queries(opened)
    counts = _shuffle(opened, ids_path, folder, (rotation, scale, centroids, group), queries, tell)
    np.savez(
        os.path.join(folder, "cells.npz"),
        centroids=centroids,
        scale=scale,
        rotation=np.empty((0, 0), np.float32) if rotation is None else rotation,
        starts=np.r_[0, np.cumsum(counts)].astype(np.int64),
    )
    document = {
        "model": opened.model,
        "vectors": int(counts.sum()),
        "dimension": opened.dimension,
        "bytes_per_vector": len(scale),
        "cells": len(centroids),
        "seconds": round(time.monotonic() - started, 2),
    }
    document |= _measured(folder, queries, len(centroids))
    with open(os.path.join(folder, "space.json"), "w", encoding="utf-8") as file:
        json.dump(document, file)
    return document


def cells_of(rows: int) -> int:
    """How many cells so many vectors are put in: a power of four, so that groups and their members are as many."""
    cells = 4
    while cells < MOST_CELLS and cells * ROWS_PER_CELL * 2 < rows:
        cells *= 4
    return cells if rows >= 4 * SAMPLED_PER_CELL else 1


def _sample(opened: vectors.VectorSet) -> np.ndarray:
    """(m, d) float32: rows of a few files over the whole, so many as training takes."""
    wanted = min(opened.rows, max(4096, cells_of(opened.rows) * SAMPLED_PER_CELL))
    share, found = wanted / opened.rows, []
    chosen = opened.partitions if share > 0.2 else opened.partitions[:: max(1, len(opened.partitions) // 64)]
    share = min(1.0, wanted / sum(p.rows for p in chosen))
    for partition in chosen:
        _, some = opened.read(partition)
        drawn = generator(partition.first_row, "serve sample").random(len(some)) < share
        found.append(some[drawn].astype(np.float32))
    sample = np.concatenate(found)
    return sample if len(sample) else opened.read(opened.partitions[0])[1].astype(np.float32)


def _rotation(sample: np.ndarray) -> np.ndarray | None:
    """(d, CODED) float32, the principal axes; None where vectors are short enough."""
    if sample.shape[1] <= CODED:
        return None
    some = sample[:: max(1, len(sample) // 20_000)].astype(np.float64)
    axes = np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :CODED]
    return np.ascontiguousarray(axes, np.float32)


def _train(sample: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """((cells, d) centroids, (cells,) group of each): k-means, then k-means in each of its clusters."""
    side = round(cells**0.5)
    if side < 2 or len(sample) < cells:
        return sample.mean(axis=0, keepdims=True).astype(np.float32), np.zeros(1, np.int64)
    coarse = kmeans(ArrayPoints((sample,)), side, seed=0, purpose="serve groups", iterations=ITERATIONS)
    labels, _ = nearest_centroid(sample, coarse.centroids)
    found, groups = [], []
    for number in range(side):
        mine = sample[labels == number]
        count = min(len(mine), max(1, round(cells * len(mine) / len(sample))))
        if not count:
            continue
        fine = kmeans(ArrayPoints((mine,)), count, seed=number, purpose="serve cells", iterations=ITERATIONS)
        found.append(fine.centroids)
        groups.append(np.full(count, number))
    return np.concatenate(found).astype(np.float32), np.concatenate(groups)


class _Queries:
    """Vectors drawn from all, and their exact neighbours, found while the vectors stream by."""

    def __init__(self, opened: vectors.VectorSet) -> None:
        drawn = np.sort(generator(1, "serve queries").choice(opened.rows, min(QUERIES, opened.rows), replace=False))
        ids, rows = [], []
        for partition in opened.partitions:
            mine = drawn[(drawn >= partition.first_row) & (drawn < partition.first_row + partition.rows)]
            if len(mine):
                some, held = opened.read(partition)
                ids.append(some[mine - partition.first_row])
                rows.append(held[mine - partition.first_row].astype(np.float32))
        self.ids, self.vectors = np.concatenate(ids), np.concatenate(rows)
        self.best = np.full((len(drawn), NEAREST), -np.inf, np.float32)
        self.nearest = np.zeros((len(drawn), NEAREST), np.uint64)

    def look(self, ids: np.ndarray, block: np.ndarray) -> None:
        """block: (n, d) float32."""
        scores = self.vectors @ block.T
        scores[self.ids[:, None] == ids[None, :]] = -np.inf
        take = min(NEAREST, len(ids))
        top = np.argpartition(scores, -take, axis=1)[:, -take:]
        values = np.concatenate([self.best, np.take_along_axis(scores, top, 1)], axis=1)
        found = np.concatenate([self.nearest, ids[top]], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :NEAREST]
        self.best, self.nearest = np.take_along_axis(values, order, 1), np.take_along_axis(found, order, 1)


def _shuffle(
    opened: vectors.VectorSet,
    ids_path: str,
    folder: str,
    trained: tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray],
    queries: _Queries,
    tell: Tell,
) -> np.ndarray:
    """Write codes and rows by cell, and each row's place. Returns (cells,) int64 vectors per cell."""
    rotation, scale, centroids, group = trained
    every = Sorted(ids_path, np.uint64)
    grouping = Grouping.of(group)
    among = grouping.searched(centroids)
    scratch = os.path.join(folder, ".scratch")
    os.makedirs(scratch)
    record = np.dtype([("cell", np.uint32), ("row", np.uint32), ("code", np.int8, len(scale))])
    said, done = time.monotonic(), 0
    names = np.unique(group)
    for partition, ids, block in opened.blocks():
        rows = _rows_of(every, ids)
        for start in range(0, len(ids), 16384):
            some = slice(start, start + 16384)
            wide = block[some].astype(np.float32)
            queries.look(ids[some], wide)
            turned = wide @ rotation if rotation is not None else wide
            cells, _ = grouping.search(turned, centroids, among)
            made = np.empty(len(wide), record)
            made["cell"], made["row"] = cells, rows[some]
            made["code"] = np.clip(np.rint(turned / scale), -127, 127)
            made = made[rows[some] != ABSENT]
            made = made[np.argsort(group[made["cell"]], kind="stable")]
            cuts = np.searchsorted(group[made["cell"]], np.append(names, names[-1] + 1)).tolist()
            for name, first, last in zip(names, cuts[:-1], cuts[1:], strict=True):
                if last > first:
                    with open(os.path.join(scratch, str(name)), "ab") as file:
                        file.write(made[first:last].tobytes())
        done += partition.rows
        if time.monotonic() - said > 5:
            said = time.monotonic()
            tell(f"{done:,} of {opened.rows:,} vectors put in cells")
    counts = np.zeros(len(centroids), np.int64)
    codes = ColumnWriter(os.path.join(folder, "codes"), np.int8)
    order = ColumnWriter(os.path.join(folder, "rows"), np.uint32)
    places = np.memmap(os.path.join(folder, "places"), np.uint32, "w+", shape=(len(every),))
    places[:] = ABSENT
    # Groups in order, cells in order within: `_train` numbers the cells in the same way.
    for name in names:
        path = os.path.join(scratch, str(name))
        made = np.fromfile(path, record) if os.path.exists(path) else np.empty(0, record)
        made = made[np.lexsort((made["row"], made["cell"]))]
        places[made["row"]] = order.count + np.arange(len(made), dtype=np.uint32)
        counts += np.bincount(made["cell"], minlength=len(counts))
        codes.append(made["code"].reshape(-1))
        order.append(made["row"])
    places.flush()
    del places
    codes.close()
    order.close()
    every.close()
    shutil.rmtree(scratch)
    return counts


def _rows_of(every: Sorted, ids: np.ndarray) -> np.ndarray:
    """(n,) uint32 rows of ids, ABSENT for ids that are not among the images; a part's ids lie close together."""
    if not len(ids):
        return np.empty(0, np.uint32)
    first = every.search(ids.min())
    stop = every.search(ids.max(), "right")
    if stop - first > 64 * len(ids) + 4096:
        return np.where((found := every.find(ids)) < 0, np.int64(ABSENT), found).astype(np.uint32)
    held = every.read(first, stop)
    if not len(held):
        return np.full(len(ids), ABSENT)
    at = np.minimum(np.searchsorted(held, ids), len(held) - 1)
    return np.where(held[at] == ids, at + first, np.int64(ABSENT)).astype(np.uint32)


def _measured(folder: str, queries: _Queries, cells: int) -> dict[str, Any]:
    """The number of cells to read, and the recall that searches have that read so many.

    Which cells hold the true neighbours says what any number of them could find; the number chosen is then searched.
    """
    ids = Sorted(os.path.join(os.path.dirname(os.path.dirname(folder)), "ids"), np.uint64)
    space = Space(folder, probes=1)
    ranks = np.concatenate([[0], *(_cell_ranks(space, ids, queries, number) for number in range(len(queries.vectors)))])
    reachable = {probes: float(np.mean(ranks[1:] < probes)) if len(ranks) > 1 else 1.0 for probes in PROBES}
    chosen = min(cells, next((p for p, share in reachable.items() if share >= WANTED), max(PROBES)))
    found = total = 0
    for number, query in enumerate(queries.vectors):
        wanted = queries.nearest[number][np.isfinite(queries.best[number])]
        rows, _ = space.search(query, NEAREST + 1, probes=chosen)
        got = np.array([ids.read(int(r), int(r) + 1)[0] for r in rows], np.uint64)
        got = got[got != queries.ids[number]][:NEAREST]
        found += int(np.isin(wanted, got).sum())
        total += len(wanted)
    space.close()
    ids.close()
    return {
        "probes": chosen,
        "recall": round(found / total, 4) if total else 1.0,
        "in_cells": {str(p): round(share, 4) for p, share in reachable.items() if p <= cells},
        "queries": len(queries.vectors),
    }


def _cell_ranks(space: "Space", ids: Sorted, queries: _Queries, number: int) -> np.ndarray:
    """For each true neighbour of a query, how many cells are nearer to the query than the one that holds it."""
    nearest = ids.find(queries.nearest[number][np.isfinite(queries.best[number])])
    places = np.array([space.place(int(row)) for row in nearest if row >= 0])
    places = places[places >= 0]
    rank = np.argsort(np.argsort(space.distances(queries.vectors[number]), kind="stable"), kind="stable")
    return np.asarray(rank[np.searchsorted(space.cells.starts, places, side="right") - 1])


@dataclass(frozen=True)
class _Cells:
    centroids: np.ndarray
    halves: np.ndarray
    scale: np.ndarray
    rotation: np.ndarray | None
    starts: np.ndarray
    order: np.ndarray


class Space:
    """An index of vectors, opened. Centroids are in memory (at most 64 MB), of the codes only what a search reads."""

    def __init__(self, folder: str, probes: int | None = None) -> None:
        with np.load(os.path.join(folder, "cells.npz"), allow_pickle=False) as held:
            centroids, rotation = held["centroids"], held["rotation"]
            self.cells = _Cells(
                centroids,
                0.5 * np.einsum("kd,kd->k", centroids, centroids),
                held["scale"],
                rotation if rotation.size else None,
                held["starts"],
                np.arange(len(centroids)),
            )
        self.document: dict[str, Any] = {}
        if os.path.exists(os.path.join(folder, "space.json")):
            with open(os.path.join(folder, "space.json"), encoding="utf-8") as file:
                self.document = json.load(file)
        self.probes = probes or int(self.document["probes"])
        self._codes = Column(os.path.join(folder, "codes"), np.int8)
        _products(
            np.zeros((1, 1), np.int8), np.zeros(1, np.int8), np.zeros(1, np.int32)
        )  # compiled before it is needed
        self._rows = Column(os.path.join(folder, "rows"), np.uint32)
        self._places = Column(os.path.join(folder, "places"), np.uint32)

    @property
    def dimension(self) -> int:
        """Of the vectors that `search` takes."""
        return len(self.cells.scale) if self.cells.rotation is None else len(self.cells.rotation)

    def vector(self, row: int) -> np.ndarray | None:
        """The stored vector of an image, (bytes,) float32 in the rotated space, None where it has none."""
        place, width = self.place(row), len(self.cells.scale)
        if place < 0:
            return None
        code = self._codes.read(place * width, (place + 1) * width)
        return np.asarray(code.astype(np.float32) * self.cells.scale)

    def place(self, row: int) -> int:
        """Where the vector of an image lies, -1 where it has none."""
        held = self._places.read(row, row + 1)
        return int(held[0]) if len(held) and held[0] != ABSENT else -1

    def distances(self, query: np.ndarray, rotated: bool = False) -> np.ndarray:
        """(cells,) float32: half the squared distances to the centroids, less a constant."""
        turned = query if rotated or self.cells.rotation is None else query @ self.cells.rotation
        return np.asarray(self.cells.halves - self.cells.centroids @ turned)

    def search(
        self, query: np.ndarray, count: int, *, probes: int | None = None, rotated: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, cosines) of the `count` nearest in the nearest cells, best first; cosines as the codes give them."""
        cells = self.cells
        turned = query if rotated or cells.rotation is None else query @ cells.rotation
        near = min(probes or self.probes, len(cells.centroids))
        scores = self.distances(turned, rotated=True)
        chosen = np.argpartition(scores, near - 1)[:near] if near < len(scores) else cells.order
        width, weights = len(cells.scale), (turned * cells.scale).astype(np.float32)
        # Products of bytes nominate several times as many as are asked for, float32 products order these.
        coarse = np.rint(weights * (127 / max(float(np.abs(weights).max()), 1e-12))).astype(np.int8)
        rows, cosines = [], []
        for start, stop in _runs(cells.starts, chosen):
            for first in range(start, stop, 1 << 16):
                last = min(stop, first + (1 << 16))
                codes = self._codes.read(first * width, last * width).reshape(-1, width)
                best = _nominated(codes, coarse, NOMINATED * count)
                rows.append(self._rows.read(first, last)[best])
                cosines.append(codes[best].astype(np.float32) @ weights)
        if not rows:
            return np.empty(0, np.uint32), np.empty(0, np.float32)
        every, values = np.concatenate(rows), np.concatenate(cosines)
        order = np.lexsort((every, -values))[:count]
        return every[order], values[order]

    def close(self) -> None:
        for column in (self._codes, self._rows, self._places):
            column.close()


def _nominated(codes: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """(count,) places of the largest products, in any order. codes: (n, d) int8, query: (d,) int8."""
    if len(codes) <= count:
        return np.arange(len(codes))
    products = np.empty(len(codes), np.int32)
    _products(codes, query, products)
    return np.argpartition(products, -count)[-count:]


@numba.njit(cache=True, nogil=True)
def _products(codes: np.ndarray, query: np.ndarray, products: np.ndarray) -> None:
    for row in range(len(codes)):
        total = np.int32(0)
        for k in range(len(query)):
            total += np.int32(codes[row, k]) * np.int32(query[k])
        products[row] = total


def _runs(starts: np.ndarray, cells: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of the cells, neighbours joined."""
    last: tuple[int, int] | None = None
    for cell in np.sort(cells):
        start, stop = int(starts[cell]), int(starts[cell + 1])
        if last is not None and last[1] == start:
            last = (last[0], stop)
            continue
        if last is not None and last[1] > last[0]:
            yield last
        last = (start, stop)
    if last is not None and last[1] > last[0]:
        yield last
