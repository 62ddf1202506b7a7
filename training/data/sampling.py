"""Which row each draw of the endless stream is. O(1) from the number of the draw, and no list of rows or draws.

By weight: an epoch has as many draws as the weights sum to, laid out systematically (row i gets floor or ceil of its
weight, its weight on average) and permuted. By group (seed set, cluster): rounds in which every group has its quota,
permuted; within a group each image once before any comes again.
"""

import os
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.order import hash_keys
from training.data.chunks import ChunkOrder, Lanes, chunks_of
from training.data.config import DataConfig
from training.data.index import Index
from training.data.permutation import Permutation, permute_each

WEIGHTS_PER_BLOCK = 1024
ROUND_OF_UNEQUAL_SHARES = 1 << 20
PAIRS_AT_ONCE = 1 << 22


class Order(Protocol):
    """A stream of draws."""

    epoch: int
    """Draws after which the images have come as often as was asked."""

    def rows(self, draws: np.ndarray) -> np.ndarray:
        """(k,) int64 numbers of draws, from 0 without end -> (k,) int64 rows of the index."""
        ...


def order_of(config: DataConfig, index: Index, seed: int, lanes: Lanes | None = None) -> Order:
    """The order that `config.sampling` asks for. Raises UserError where the source does not know what it needs.

    lanes: of the training; packed shards are then gone through chunk by chunk.
    """
    if config.sampling in ("seed_set", "cluster"):
        members = members_of(index, config.sampling, config.cluster_level)
        return GroupOrder(members, _shares(config, members), seed)
    if config.sampling == "weight" and index.weights is not None:
        return WeightOrder(index.weights, seed)
    if index.listing.packed and lanes is not None:
        return ChunkOrder(chunks_of(config, len(index), lanes), lanes, config.shuffle_chunks, seed)
    return UniformOrder(len(index), seed)


class UniformOrder:
    """Every row once per epoch, each epoch in an order of its own."""

    def __init__(self, n: int, seed: int) -> None:
        self.epoch = n
        self._shuffled = _EpochPermutations(n, seed)

    def rows(self, draws: np.ndarray) -> np.ndarray:
        return self._shuffled(draws)


class WeightOrder:
    """Row i is drawn floor or ceil of weights[i] times per epoch, weights[i] times on average."""

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        """weights: (n,) float32, not negative, perhaps memory-mapped; one float64 per 1,024 of them is kept."""
        self._weights = weights
        blocks = [
            np.add.reduceat(part, np.arange(0, len(part), WEIGHTS_PER_BLOCK))
            for start in range(0, len(weights), PAIRS_AT_ONCE)
            for part in [np.asarray(weights[start : start + PAIRS_AT_ONCE], np.float64)]
        ]
        self._ends = np.cumsum(np.concatenate(blocks))
        self.epoch = max(1, round(float(self._ends[-1])))
        self._seed = seed
        self._shuffled = _EpochPermutations(self.epoch, seed)

    def rows(self, draws: np.ndarray) -> np.ndarray:
        epochs = (draws // self.epoch).astype(np.uint64)
        offsets = hash_keys(epochs, self._seed, "weights").astype(np.float64) / 2.0**64
        targets = (self._shuffled(draws) + offsets) * (self._ends[-1] / self.epoch)
        blocks = np.minimum(np.searchsorted(self._ends, targets, side="right"), len(self._ends) - 1)
        found = np.empty(len(draws), np.int64)
        for position, (block, target) in enumerate(zip(blocks.tolist(), targets.tolist(), strict=True)):
            start = block * WEIGHTS_PER_BLOCK
            inside = np.cumsum(np.asarray(self._weights[start : start + WEIGHTS_PER_BLOCK], np.float64))
            rest = target - (self._ends[block - 1] if block else 0.0)
            # Rounding may carry a target past the block's end: its last row with a weight is meant.
            last = int(np.searchsorted(inside, inside[-1], side="left"))
            found[position] = start + min(int(np.searchsorted(inside, rest, side="right")), last)
        return found


class GroupOrder:
    """Groups in rounds of fixed quotas, the members of each in epochs of their own."""

    def __init__(self, members: "Members", shares: np.ndarray, seed: int) -> None:
        """shares: (groups,) float64 > 0."""
        self._members = members
        self._quotas = quotas(shares)
        self._ends = np.cumsum(self._quotas)
        self._seed = seed
        self._rounds = _EpochPermutations(int(self._ends[-1]), seed, "groups")
        self.epoch = len(members.rows)

    def rows(self, draws: np.ndarray) -> np.ndarray:
        length = int(self._ends[-1])
        places = self._rounds(draws)
        groups = np.searchsorted(self._ends, places, side="right")
        quota = self._quotas[groups]
        visits = (draws // length) * quota + places - (self._ends[groups] - quota)
        starts = self._members.starts[groups]
        sizes = self._members.starts[groups + 1] - starts
        tweaks = groups.astype(np.uint64) << np.uint64(32) ^ (visits // sizes).astype(np.uint64)
        inside = permute_each(visits % sizes, sizes, tweaks, self._seed, "members")
        return np.asarray(self._members.rows[starts + inside], np.int64)


def quotas(shares: np.ndarray) -> np.ndarray:
    """Draws of each group in a round: one each for equal shares, else by largest remainders, at least one.

    shares: (groups,) float64 > 0. Returns (groups,) int64.
    """
    if (shares == shares[0]).all():
        return np.ones(len(shares), np.int64)
    length = max(ROUND_OF_UNEQUAL_SHARES, 16 * len(shares))
    exact = shares / shares.sum() * length
    found = np.floor(exact).astype(np.int64)
    short = length - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:short]] += 1
    return np.maximum(found, 1)


class _EpochPermutations:
    """Positions of an endless stream to elements of [0, n), every n of them in a new order."""

    def __init__(self, n: int, seed: int, purpose: str = "rows") -> None:
        self._n = n
        self._of = lru_cache(maxsize=8)(lambda epoch: Permutation(n, seed, f"{purpose} epoch {epoch}"))
        self._key = (n, seed, purpose)

    def __reduce__(self) -> tuple[type["_EpochPermutations"], tuple[int, int, str]]:
        return (_EpochPermutations, self._key)

    def __call__(self, draws: np.ndarray) -> np.ndarray:
        epochs = draws // self._n
        found = np.empty(len(draws), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            found[mine] = self._of(epoch)(draws[mine] - epoch * self._n)
        return found


@dataclass(frozen=True)
class Members:
    """Rows by group. rows: (m,) uint32, memory-mapped, group g's are rows[starts[g] : starts[g + 1]]."""

    names: tuple[str, ...]
    """Of seed sets; () for clusters."""
    starts: np.ndarray
    rows: np.ndarray


def members_of(index: Index, kind: str, level: int) -> Members:
    """The rows of each seed set or cluster that has any; made once beside the index. Raises UserError without any."""
    column = "sources" if kind == "seed_set" else "clusters"
    if index.listing.is_tree:
        raise UserError(
            f"{index.listing.path}: a folder of images has no {column}; sampling by {kind} needs a manifest"
        )
    if len(index) >= 1 << 32:
        raise UserError(f"{index.listing.path}: sampling by {kind} takes up to {1 << 32:,} rows")
    stem = kind if kind == "seed_set" else f"{kind}-{level}"
    target = index.folder / f"{stem}.rows.u32"
    if not target.exists():
        _write_members(index, kind, level, target)
    names, starts = (index.folder / f"{stem}.{suffix}" for suffix in ("names", "starts.npy"))
    return Members(
        tuple(names.read_text().splitlines()) if kind == "seed_set" else (),
        np.load(starts),
        np.memmap(target, np.uint32, "r"),
    )


def _shares(config: DataConfig, members: Members) -> np.ndarray:
    groups = len(members.starts) - 1
    if not config.shares:
        return np.ones(groups)
    if config.sampling != "seed_set":
        raise UserError("data.shares: only with sampling: seed_set")
    unknown = sorted(set(config.shares) - set(members.names))
    missing = sorted(set(members.names) - set(config.shares))
    if unknown or missing:
        raise UserError(
            f"data.shares: give one for each seed set of {config.source} ({', '.join(members.names)}); "
            + (f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}")
        )
    return np.array([config.shares[name] for name in members.names])


def _write_members(index: Index, kind: str, level: int, target: Path) -> None:
    """Two passes, a counting sort: bounded memory whatever the rows. Renamed into place, the rows last."""
    aside = target.parent / f".{target.name}.{os.getpid()}.{uuid.uuid4().hex}"
    names: dict[str, int] = {}
    counts = np.zeros(0, np.int64)
    pairs_file = aside.with_suffix(".pairs")
    pair = np.dtype([("group", "<u4"), ("row", "<u4")])
    try:
        first = 0
        column = "sources" if kind == "seed_set" else "clusters"
        with open(pairs_file, "wb") as file:
            for table in index.part_tables(["image_id", "shard", "length", column]):
                located = pc.and_(pc.is_valid(table["shard"]), pc.is_valid(table["length"]))
                kept = table.filter(located).combine_chunks()
                if not kept.num_rows:
                    continue
                values = kept[column].combine_chunks()
                groups, rows = _by_seed_set(values, names) if kind == "seed_set" else _by_cluster(values, level)
                found = np.empty(len(groups), pair)
                found["group"], found["row"] = groups, rows + first
                file.write(found.tobytes())
                more = np.bincount(groups, minlength=len(counts))
                more[: len(counts)] += counts
                counts = more
                first += kept.num_rows
        if not counts.sum():
            wanted = "a seed set" if kind == "seed_set" else f"a cluster of level {level}"
            raise UserError(f"{index.listing.path}: no row has {wanted}; choose another `sampling`")
        _sort_pairs(np.memmap(pairs_file, pair, "r"), counts, aside)
        stem = target.name.removesuffix(".rows.u32")
        order = sorted(names, key=lambda name: names[name])
        (target.parent / f"{stem}.names").write_text("\n".join(order))
        np.save(target.parent / f"{stem}.starts.npy", np.r_[0, np.cumsum(counts[counts > 0])])
        os.replace(aside, target)
    finally:
        for path in (aside, pairs_file):
            path.unlink(missing_ok=True)


def _sort_pairs(pairs: np.ndarray, counts: np.ndarray, path: Path) -> None:
    sorted_rows = np.memmap(path, np.uint32, "w+", shape=(int(counts.sum()),))
    at = np.r_[0, np.cumsum(counts)[:-1]]
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = np.asarray(pairs[start : start + PAIRS_AT_ONCE])
        order = np.argsort(part["group"], kind="stable")
        groups = part["group"][order]
        firsts = np.searchsorted(groups, groups, side="left")
        sorted_rows[at[groups] + np.arange(len(groups)) - firsts] = part["row"][order]
        at += np.bincount(groups, minlength=len(counts))
    sorted_rows.flush()


def _by_cluster(paths: pa.ListArray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """(groups, rows) of one row group: element `level - 1` of the path, where there is one."""
    deep = pc.fill_null(pc.greater_equal(pc.list_value_length(paths), level), False).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(deep)
    if not len(rows):
        return np.zeros(0, np.int64), rows
    return pc.list_element(paths.take(pa.array(rows)), level - 1).to_numpy().astype(np.int64), rows


def _by_seed_set(sources: pa.ListArray, names: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(groups, rows): `seed:X` and `retrieve:X` belong to X, `balance` to itself; once per row and group."""
    rows = pc.list_parent_indices(sources).to_numpy()
    encoded = pc.list_flatten(sources).dictionary_encode()
    brought = [str(word).split(":", 1)[-1] for word in encoded.dictionary.to_pylist()]
    numbers = np.array([names.setdefault(name, len(names)) for name in brought], np.int64)
    both = np.stack([rows.astype(np.int64), numbers[encoded.indices.to_numpy()]], axis=1)
    both = np.unique(both, axis=0) if len(both) else both
    return both[:, 1], both[:, 0]
