"""Duplicates without an embedding: equal bytes, equal pixels, and PCA hashes that differ in a few bits.

In every group one image stays: one that an earlier generation kept, else the one of smallest id. Groups of hashes are
not components: an image is a duplicate when it lies within the distance of an image that *stays*, asked in
the order of ids. So nothing is dropped through a chain of images that resemble only their neighbours.
"""

import itertools
from collections.abc import Sequence

import numpy as np

RECORD = np.dtype(
    [
        ("digest", "<u8", (4,)),  # of the pixels
        ("bytes", "<u8", (4,)),  # of the file
        ("id", "<u8"),
        ("hash", "<u8"),
        ("hashed", "?"),  # whether there is a PCA hash
        ("settled", "?"),  # kept by an earlier generation: never dropped
    ]
)
"""What the search for duplicates knows of an image; 82 bytes."""

REASONS = ("duplicate_bytes", "duplicate_pixels", "duplicate_pca_hash")
BYTES, PIXELS, HASH = range(3)

DROP = np.dtype([("id", "<u8"), ("duplicate_of", "<u8"), ("reason", "u1")])
"""An image that goes, the one of its group that stays, and the index into REASONS of the strongest way in which
it repeats an image before it."""

HASHED = np.dtype([("id", "<u8"), ("hash", "<u8"), ("settled", "?")])
PAIR = np.dtype([("first", "<u8"), ("second", "<u8"), ("settled", "?"), ("equal", "?")])
"""Two images with near hashes. settled: the first is. equal: their hashes are."""


def bucket_of(words: np.ndarray, buckets: int) -> np.ndarray:
    """Which of `buckets` (a power of two) takes each word, by its high bits. (n,) uint64 -> (n,) int64."""
    bits = buckets.bit_length() - 1
    return (words >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(words), np.int64)


def equal_pixels(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of equal pixels (equal bytes have them, too). records: (n,) RECORD, all of each group's.

    Returns (drops (m,) DROP sorted by id, the records that stay). Settled records stay whatever they repeat.
    """
    words = [records["digest"][:, k] for k in range(4)]
    order = np.lexsort((records["id"], ~records["settled"], *reversed(words)))
    ordered = records[order]
    same = np.zeros(len(ordered), bool)
    same[1:] = (ordered["digest"][1:] == ordered["digest"][:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(ordered))))
    dropped = same & ~ordered["settled"]
    drops = np.empty(int(dropped.sum()), DROP)
    drops["id"] = ordered["id"][dropped]
    drops["duplicate_of"] = ordered["id"][first[dropped]]
    drops["reason"] = np.where(_repeats_bytes(ordered, first)[dropped], BYTES, PIXELS)
    return np.sort(drops, order="id"), ordered[~dropped]


def hashed(records: np.ndarray) -> np.ndarray:
    """The part of (n,) RECORD that the search for near hashes needs, (m,) HASHED."""
    chosen = records[records["hashed"]]
    compact = np.empty(len(chosen), HASHED)
    for name in HASHED.names or ():
        compact[name] = chosen[name]
    return compact


def _repeats_bytes(ordered: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Whether a record before it in its group has the same bytes. ordered by group; group: (n,) its first row."""
    words = [ordered["bytes"][:, k] for k in range(4)]
    order = np.lexsort((np.arange(len(ordered)), *words, group))
    again = (group[order][1:] == group[order][:-1]) & (ordered["bytes"][order][1:] == ordered["bytes"][order][:-1]).all(
        axis=1
    )
    repeats = np.zeros(len(ordered), bool)
    repeats[order[1:]] = again
    return repeats


def bands(distance: int) -> list[tuple[int, int]]:
    """(first bit, bits) of distance + 1 bands: two hashes within the distance agree in at least one (pigeonhole)."""
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    return [(int(a), int(b - a)) for a, b in itertools.pairwise(edges)]


def band_word(hashes: np.ndarray, band: tuple[int, int]) -> np.ndarray:
    """The bits of one band, spread over 64 bits so that `bucket_of` cuts them evenly. (n,) uint64."""
    first, count = band
    bits = (hashes >> np.uint64(first)) & np.uint64((1 << count) - 1)
    with np.errstate(over="ignore"):
        mixed = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return np.asarray((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9))


def band_pairs(records: np.ndarray, distance: int, band_number: int) -> np.ndarray:
    """Pairs of images whose hashes lie within the distance and agree in this band, in no earlier one.

    records: (n,) HASHED, all that share a value of this band. Of images with equal hashes only the first is
    compared; each of the others makes one pair with it, in band 0, marked `equal`: what lies near one lies near all.
    Returns (m,) PAIR, `first` before `second` in the order (settled, then smaller id).
    """
    order = np.lexsort((records["id"], ~records["settled"], records["hash"]))
    ordered = records[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = ordered["hash"][1:] != ordered["hash"][:-1]
    pairs = [_pairs(ordered, _near(ordered["hash"], np.flatnonzero(fresh), distance, band_number), equal=False)]
    if band_number == 0:
        group = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
        pairs.append(_pairs(ordered, np.stack([group[~fresh], np.flatnonzero(~fresh)], axis=1), equal=True))
    return np.concatenate(pairs)


def _pairs(records: np.ndarray, positions: np.ndarray, *, equal: bool) -> np.ndarray:
    """(m, 2) positions as PAIR, each the right way round. Pairs of two settled images are left out."""
    left, right = records[positions[:, 0]], records[positions[:, 1]]
    swap = right["settled"] & ~left["settled"]
    swap |= (right["settled"] == left["settled"]) & (right["id"] < left["id"])
    pairs = np.empty(len(positions), PAIR)
    pairs["first"] = np.where(swap, right["id"], left["id"])
    pairs["second"] = np.where(swap, left["id"], right["id"])
    pairs["settled"] = left["settled"] | right["settled"]
    pairs["equal"] = equal
    return np.asarray(pairs[~(left["settled"] & right["settled"])])


def _near(hashes: np.ndarray, positions: np.ndarray, distance: int, band_number: int) -> np.ndarray:
    """(m, 2) of `positions`, whose hashes are distinct: pairs within each value of the band."""
    found = [np.empty((0, 2), np.int64)]
    if distance == 0 or len(positions) < 2:
        return found[0]
    all_bands = bands(distance)
    words = band_word(hashes[positions], all_bands[band_number])
    order = np.argsort(words, kind="stable")
    positions, words = positions[order], words[order]
    # Every row against the k-th row below it, as long as both are in one group: the work is one step per candidate
    # pair, and memory stays that of the rows.
    rows = np.arange(len(words))
    for step in range(1, len(words)):
        rows = rows[rows + step < len(words)]
        rows = rows[words[rows] == words[rows + step]]
        if len(rows) == 0:
            break
        different = hashes[positions[rows]] ^ hashes[positions[rows + step]]
        near = np.bitwise_count(different) <= distance
        for earlier in all_bands[:band_number]:
            near &= (different & _mask(earlier)) != 0
        found.append(np.stack([positions[rows[near]], positions[rows[near] + step]], axis=1))
    return np.concatenate(found)


def _mask(band: tuple[int, int]) -> np.uint64:
    return np.uint64(((1 << band[1]) - 1) << band[0])


def follow_originals(pairs: np.ndarray) -> np.ndarray:
    """Who goes, given all near pairs. pairs: (m,) PAIR in any order. Returns (k,) DROP, sorted by id.

    In the order of ids an image goes if it is near one that stays, and is a duplicate of the first such.
    """
    pairs = pairs[np.lexsort((pairs["first"], ~pairs["settled"], pairs["second"]))]
    nodes, starts = np.unique(pairs["second"], return_index=True)
    ends = np.append(starts, len(pairs))[1:]
    first, equal = pairs["first"].tolist(), pairs["equal"].tolist()
    original: dict[int, int] = {}
    for node, start, end in zip(nodes.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for at in range(start, end):
            candidate = first[at]
            if candidate not in original:
                original[node] = candidate
                break
            if equal[at]:
                original[node] = original[candidate]
                break
    drops = np.empty(len(original), DROP)
    drops["id"] = np.fromiter(original.keys(), np.uint64, len(original))
    drops["duplicate_of"] = np.fromiter(original.values(), np.uint64, len(original))
    drops["reason"] = HASH
    return drops


def follow_drops(drops: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Where an original was itself dropped later, its duplicates point to the one that stayed. Sorted by id."""
    at = np.searchsorted(later["id"], drops["duplicate_of"])
    found = _contains(later["id"], drops["duplicate_of"])
    moved = drops.copy()
    moved["duplicate_of"][found] = later["duplicate_of"][at[found]]
    return np.sort(np.concatenate([moved, later]), order="id")


def hash_duplicates(ids: np.ndarray, hashes: np.ndarray, distance: int) -> np.ndarray:
    """The search for near hashes in one process. ids, hashes: (n,) uint64. Returns (m,) DROP, sorted by id."""
    records = np.zeros(len(ids), HASHED)
    records["id"], records["hash"] = ids, hashes
    return follow_originals(np.concatenate([band_pairs(records, distance, band) for band in range(distance + 1)]))


def records_of(
    ids: np.ndarray,
    file_digests: Sequence[bytes | None],
    pixel_digests: Sequence[bytes],
    hashes: Sequence[int | None],
    settled: bool,
) -> np.ndarray:
    """(n,) RECORD of a part's images. An image without a digest of its file repeats nobody's bytes."""
    records = np.zeros(len(ids), RECORD)
    records["id"] = ids
    records["digest"] = np.frombuffer(b"".join(pixel_digests), "<u8").reshape(-1, 4)
    own = (int(i).to_bytes(8, "little") + bytes(24) for i in ids)
    files = b"".join(digest if digest is not None else mine for digest, mine in zip(file_digests, own, strict=True))
    records["bytes"] = np.frombuffer(files, "<u8").reshape(-1, 4)
    records["hash"] = [value or 0 for value in hashes]
    records["hashed"] = [value is not None for value in hashes]
    records["settled"] = settled
    return records


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is in a sorted array."""
    if len(ordered) == 0:
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[at] == values)
