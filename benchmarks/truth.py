"""Exact pairs of made vectors, and the share of them that a join nominated.

An oracle of its own: blocked float32 products nominate with a wide margin, the definition of similarity decides;
nothing is shared with the join but that definition. Small sets: every pair. Larger ones: every pair of a
sample of queries, as many drawn at random as among the rows that have a copy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data import Data
from curation import vectors
from curation.order import generator

MOST_ROWS = 200_000
MOST_PAIRS = 100_000_000
TILE_ROWS = 4096
SLACK = 1e-3
QUERIES = 2000
RESAMPLES = 1000


@dataclass(frozen=True)
class Pairs:
    """Every pair above a threshold. low < high: (m,) int64 rows; similarity: (m,) float32, the definition."""

    low: np.ndarray
    high: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class Sample:
    """Every pair of some queries. queries: (q,) int64 rows, ascending; at_random, with_copy: (q,) bool, which sample
    each belongs to. query: (p,) index into `queries`; other: (p,) rows; similarity: (p,) float32."""

    count: int
    threshold: float
    queries: np.ndarray
    at_random: np.ndarray
    with_copy: np.ndarray
    query: np.ndarray
    other: np.ndarray
    similarity: np.ndarray

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) rows of each pair. A pair of two queries is there twice."""
        one = self.queries[self.query]
        return np.minimum(one, self.other), np.maximum(one, self.other)

    def nominated(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """(p,) bool: which of the sample's pairs are among the pairs (low, high), given in any order and direction."""
        given = np.minimum(low, high).astype(np.uint64) * np.uint64(self.count) + np.maximum(low, high).astype(
            np.uint64
        )
        given.sort()
        one, other = self.ends()
        asked = one.astype(np.uint64) * np.uint64(self.count) + other.astype(np.uint64)
        if not len(given):
            return np.zeros(len(asked), bool)
        return np.asarray(given[np.minimum(np.searchsorted(given, asked), len(given) - 1)] == asked)


def truth_pairs(data: Data, threshold: float) -> Pairs:
    """Every pair above the threshold, kept beside the data. For at most 200,000 rows."""
    if data.count > MOST_ROWS:
        raise ValueError(f"{data.count} rows are too many for every pair: take sample_of")
    store = data.folder / f"pairs-{threshold:g}.npz"
    if store.exists():
        with np.load(store) as kept:
            return Pairs(kept["low"], kept["high"], kept["similarity"])
    rows = data.load()
    wide = rows.astype(np.float32)
    found: list[tuple[np.ndarray, ...]] = []
    total = 0
    for first in range(0, len(wide), TILE_ROWS):
        for second in range(first, len(wide), TILE_ROWS):
            i, j = np.nonzero(wide[first : first + TILE_ROWS] @ wide[second : second + TILE_ROWS].T > threshold - SLACK)
            i, j = i + first, j + second
            i, j = i[i < j], j[i < j]
            total += len(i)
            if total > MOST_PAIRS:
                raise ValueError(f"more than {MOST_PAIRS:,} pairs above {threshold}")
            found.append(_decided(rows, i, j, threshold))
    low, high, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    np.savez(store, low=low, high=high, similarity=similarity)
    return Pairs(low, high, similarity)


def sample_of(data: Data, threshold: float, queries: int = QUERIES, seed: int = 1) -> Sample:
    """Every pair of `queries` rows drawn at random and of as many drawn among the planted pairs above the threshold.

    Memory: one part and its products. Kept beside the data.
    """
    store = data.folder / f"sample-{threshold:g}-{queries}-{seed}.npz"
    if store.exists():
        return _load(store)
    planted = data.planted()
    near = planted["similarity"] > np.float32(threshold)
    members = np.union1d(planted["copy"][near], planted["original"][near])
    random = generator(seed, "truth:sample")
    at_random = random.choice(data.count, min(queries, data.count), replace=False)
    with_copy = random.choice(members, min(queries, len(members)), replace=False) if len(members) else members
    chosen = np.union1d(at_random, with_copy).astype(np.int64)
    known = vectors.open_folder(data.vectors)
    mine = np.empty((len(chosen), known.dimension), np.float16)
    for partition, _, block in known.blocks():
        inside = (chosen >= partition.first_row) & (chosen < partition.first_row + partition.rows)
        mine[inside] = block[chosen[inside] - partition.first_row]
    wide = mine.astype(np.float32)
    found: list[tuple[np.ndarray, ...]] = []
    total = 0
    for partition, _, block in known.blocks():
        for first in range(0, len(block), TILE_ROWS):
            piece = block[first : first + TILE_ROWS]
            query, row = np.nonzero(wide @ piece.astype(np.float32).T > threshold - SLACK)
            start = partition.first_row + first
            other = chosen[query] != row + start
            query, row = query[other], row[other]
            total += len(query)
            if total > MOST_PAIRS:
                raise ValueError(f"more than {MOST_PAIRS:,} pairs above {threshold} in the sample")
            similarity = vectors.similarity(mine[query], piece[row]) if len(query) else np.empty(0, np.float32)
            above = similarity > np.float32(threshold)
            found.append((query[above], row[above] + start, similarity[above]))
    query, other, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((other, query))
    sample = Sample(
        data.count,
        threshold,
        chosen,
        np.isin(chosen, at_random),
        np.isin(chosen, with_copy),
        query[order],
        other[order],
        similarity[order],
    )
    np.savez(store, **vars(sample))
    return sample


def recall(sample: Sample, found: np.ndarray, threshold: float | None = None, seed: int = 2) -> dict[str, object]:
    """Share of the sample's pairs above a threshold that were nominated, for either sample and both together.

    found: (p,) bool. The interval is a 95 % bootstrap over queries: the pairs of one query stand or fall together.
    """
    at = sample.threshold if threshold is None else threshold
    above = sample.similarity > np.float32(at)
    count = len(sample.queries)
    total = np.bincount(sample.query[above], minlength=count).astype(np.float64)
    hits = np.bincount(sample.query[above], found[above], minlength=count)
    groups = {"at_random": sample.at_random, "with_copy": sample.with_copy, "both": np.ones(count, bool)}
    document: dict[str, object] = {"threshold": at}
    for name, members in groups.items():
        document[name] = _share(total[members], hits[members], generator(seed, f"bootstrap:{name}"))
    document["by_similarity"] = by_similarity(sample, found)
    return document


def by_similarity(sample: Sample, found: np.ndarray, step: float = 0.05) -> list[dict[str, float]]:
    """Pairs and recall in each interval of similarity."""
    rows = []
    for number in range(round(-(-(1.0 - sample.threshold) // step)) + 1):
        low = sample.threshold + number * step
        inside = (sample.similarity > np.float32(low)) & (sample.similarity <= np.float32(low + step))
        if inside.any():
            rows.append({"above": round(low, 6), "pairs": int(inside.sum()), "recall": float(found[inside].mean())})
    return rows


def _share(total: np.ndarray, hits: np.ndarray, random: np.random.Generator) -> dict[str, float]:
    pairs = total.sum()
    if not pairs:
        return {"queries": len(total), "queries_with_pairs": 0, "pairs": 0}
    there = total > 0
    drawn = random.multinomial(len(total), np.full(len(total), 1 / len(total)), size=RESAMPLES).astype(np.float64)
    shares = (drawn @ hits) / np.maximum(drawn @ total, 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {
        "queries": len(total),
        "queries_with_pairs": int(there.sum()),
        "pairs": int(pairs),
        "recall": float(hits.sum() / pairs),
        "low": float(low),
        "high": float(high),
    }


def _decided(rows: np.ndarray, i: np.ndarray, j: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """Of nominated pairs, in pieces, those the definition holds to be above."""
    kept: list[tuple[np.ndarray, ...]] = [(i[:0], j[:0], np.empty(0, np.float32))]
    for first in range(0, len(i), 1 << 16):
        a, b = i[first : first + (1 << 16)], j[first : first + (1 << 16)]
        similarity = vectors.similarity(rows[a], rows[b])
        above = similarity > np.float32(threshold)
        kept.append((a[above], b[above], similarity[above]))
    return tuple(np.concatenate(column) for column in zip(*kept, strict=True))


def _load(store: Path) -> Sample:
    with np.load(store) as kept:
        fields = {name: kept[name] for name in kept.files}
    return Sample(**(fields | {"count": int(fields["count"]), "threshold": float(fields["threshold"])}))
