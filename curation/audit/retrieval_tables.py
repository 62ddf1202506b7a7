"""What the seeds drew: samples, curves of similarity, clusters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit.scans import NOTHING, count_by, cut_groups, first_per_group, stream, with_hash

RANKS = 64
"""Ranks of a curve; higher ranks share its last point."""
BINS = 400
EDGES = np.linspace(-1, 1, BINS + 1)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class Similarities:
    """Of one seed set and mode: how many retrievals lie in which bin of similarity, by rank.

    counts: (RANKS, BINS) int64 over EDGES.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros((RANKS, BINS), np.int64))

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(ranks, (n, 3) QUANTILES of the similarity at these ranks), to half a bin (0.0025)."""
        ranks = np.flatnonzero(self.counts.sum(1))
        summed = np.cumsum(self.counts[ranks], axis=1)
        total = summed[:, -1:]
        at = [np.argmax(summed >= np.ceil(total * q), axis=1) for q in QUANTILES]
        middles = (EDGES[:-1] + EDGES[1:]) / 2
        return ranks, np.stack([middles[a] for a in at], axis=1) if len(ranks) else np.empty((0, 3))

    def quantile(self, share: float) -> float:
        """Of all ranks together."""
        summed = np.cumsum(self.counts.sum(0))
        middles = (EDGES[:-1] + EDGES[1:]) / 2
        return float(middles[int(np.argmax(summed >= np.ceil(summed[-1] * share)))])


@dataclass
class Curves:
    """Similarities of retrievals to their seeds, gathered table by table, by (seed set, mode)."""

    found: dict[tuple[str, str], Similarities] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Count the rows of a piece of RETRIEVAL, those without a similarity left out."""
        table = table.filter(pc.is_valid(table["similarity"]))
        pairs = pc.binary_join_element_wise(table["seed_set"], table["mode"], "\x00")
        encoded = pc.dictionary_encode(pairs.combine_chunks() if isinstance(pairs, pa.ChunkedArray) else pairs)
        codes = encoded.indices.to_numpy()
        rank = np.clip(table["rank"].fill_null(0).to_numpy(), 0, RANKS - 1)
        bins = np.clip(((table["similarity"].to_numpy() + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            mine = codes == code
            flat = np.bincount(rank[mine] * BINS + bins[mine], minlength=RANKS * BINS)
            one = self.found.setdefault(tuple(name.rsplit("\x00", 1)), Similarities())
            one.counts += flat.reshape(RANKS, BINS)


def similarities(paths: Sequence[str]) -> dict[tuple[str, str], Similarities]:
    """By (seed set, mode): the similarities of all retrievals to their seeds."""
    curves = Curves()
    for table in stream(paths, ["seed_set", "mode", "rank", "similarity"]):
        curves.add(table)
    return dict(sorted(curves.found.items()))


def taken_by_cluster(paths: Sequence[str]) -> dict[str, dict[int, int]]:
    """Per seed set of cluster mode: images taken from each leaf cluster."""
    keys = {"seed_set": pc.field("seed_set"), "cluster": pc.field("cluster_id")}
    found: dict[str, dict[int, int]] = {}
    for row in count_by(paths, keys, pc.is_valid(pc.field("cluster_id"))).to_pylist():
        found.setdefault(row["seed_set"], {})[row["cluster"]] = row["images"]
    return found


def seed_samples(paths: Sequence[str], seeds: int, each: int, seed: int, hidden: np.ndarray = NOTHING) -> pa.Table:
    """Seeds to show per seed set (hash order) and what they drew, best first.

    Returns rows of RETRIEVAL, at most `each` per seed, sorted by seed set, the seed's hash, similarity.
    """
    known = pc.is_valid(pc.field("seed_id"))

    def distinct() -> Iterator[pa.Table]:
        for table in stream(paths, ["seed_set", "seed_id"], known, hidden, "seed_id"):
            yield with_hash(table.group_by(["seed_set", "seed_id"]).aggregate([]), seed, "report seeds", "seed_id")

    chosen: pa.Table | None = None
    for table in distinct():
        both = table if chosen is None else pa.concat_tables([chosen, table.select(chosen.column_names)])
        both = both.group_by(["seed_set", "seed_id", "hash"]).aggregate([])
        chosen = cut_groups(both, "seed_set", seeds, [("hash", "ascending")])
    if chosen is None:
        return pa.table({n: pa.array([], pa.uint64()) for n in ("image_id", "seed_set", "seed_id")})
    wanted = {
        (s, i): h for s, i, h in zip(*(chosen[n].to_pylist() for n in ("seed_set", "seed_id", "hash")), strict=True)
    }
    columns = ["image_id", "seed_set", "seed_id", "mode", "rank", "similarity", "cluster_id"]

    def rows() -> Iterator[pa.Table]:
        for table in stream(paths, columns, pc.field("seed_id").isin(chosen["seed_id"].combine_chunks()), hidden):
            pairs = list(zip(table["seed_set"].to_pylist(), table["seed_id"].to_pylist(), strict=True))
            mine = table.filter(pa.array([pair in wanted for pair in pairs], pa.bool_()))
            hashes = pa.array([wanted[pair] for pair in pairs if pair in wanted], pa.uint64())
            key = pa.array([f"{s}\x00{i}" for s, i in pairs if (s, i) in wanted], pa.string())
            yield mine.append_column("hash", hashes).append_column("key", key)

    order = [("similarity", "descending"), ("rank", "ascending"), ("image_id", "ascending")]
    found = first_per_group(rows(), "key", each, order)
    if found is None:
        return pa.table({n: pa.array([], pa.uint64()) for n in ("image_id", "seed_set", "seed_id")})
    return found.sort_by([("seed_set", "ascending"), ("hash", "ascending"), *order]).drop_columns(["key", "hash"])
