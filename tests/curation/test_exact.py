"""Duplicates without an embedding, against ten-line versions that compare everything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import exact


def naive_hash_duplicates(ids: np.ndarray, codes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    stays: list[int] = []
    drops = []
    for i in np.argsort(ids):
        near = [j for j in stays if (int(codes[i]) ^ int(codes[j])).bit_count() <= distance]
        if near:
            drops.append((int(ids[i]), int(ids[near[0]])))
        else:
            stays.append(i)
    return drops


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 2, 5, 9]), st.integers(0, 60))
def test_hash_duplicates_are_those_of_comparing_all_pairs(seed: int, distance: int, count: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**64, 5, dtype=np.uint64)[random.integers(0, 5, count)]
    for _ in range(5):
        flip = np.uint64(1) << random.integers(0, 64, count).astype(np.uint64)
        codes = np.where(random.random(count) < 0.5, codes ^ flip, codes)
    ids = random.permutation(1000)[:count].astype(np.uint64)
    found = exact.hash_duplicates(ids, codes, distance)
    assert list(zip(found["id"].tolist(), found["duplicate_of"].tolist(), strict=True)) == naive_hash_duplicates(
        ids, codes, distance
    )


def test_nothing_is_dropped_through_a_chain() -> None:
    codes = np.array([0b000000, 0b000011, 0b001111, 0b111111], np.uint64)
    found = exact.hash_duplicates(np.arange(4, dtype=np.uint64), codes, 2)
    # 1 is near 0 and goes; 2 is near 1 alone, which is no more there to be near to
    assert found.tolist() == [(1, 0, exact.HASH), (3, 2, exact.HASH)]


@pytest.mark.parametrize("distance", range(16))
def test_the_bands_cover_every_bit_once(distance: int) -> None:
    bits = [bit for first, count in exact.bands(distance) for bit in range(first, first + count)]
    assert bits == list(range(64)) and len(exact.bands(distance)) == distance + 1


def records(rows: list[tuple[int, int, int, int, bool]]) -> np.ndarray:
    """(id, pixels, bytes, hash, settled)"""
    made = np.zeros(len(rows), exact.RECORD)
    for at, (image, pixels, data, code, settled) in enumerate(rows):
        made[at] = ([pixels] * 4, [data] * 4, image, code, True, settled)
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=30), st.randoms())
def test_of_equal_pixels_the_settled_or_the_oldest_stays(groups: list[tuple[int, int, bool]], random: object) -> None:
    rows = [(at, pixels, pixels * 10 + data, 0, settled) for at, (pixels, data, settled) in enumerate(groups)]
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    drops, stays = exact.equal_pixels(records(shuffled))
    expected = []
    for image, pixels, data, _, settled in rows:
        before = [r for r in rows if r[1] == pixels and (not r[4], r[0]) < (not settled, image)]
        if before and not settled:
            first = min(before, key=lambda r: (not r[4], r[0]))
            reason = exact.BYTES if any(r[2] == data for r in before) else exact.PIXELS
            expected.append((image, first[0], reason))
    assert drops.tolist() == expected
    assert sorted(stays["id"].tolist() + drops["id"].tolist()) == list(range(len(rows)))


def test_a_settled_image_stays_though_a_smaller_id_is_near() -> None:
    made = exact.hashed(records([(5, 1, 1, 0b1, False), (9, 2, 2, 0b0, True), (10, 3, 3, 0b11, True)]))
    pairs = np.concatenate([exact.band_pairs(made, 1, band) for band in range(2)])
    assert exact.follow_originals(pairs).tolist() == [(5, 9, exact.HASH)]


def test_duplicates_of_a_dropped_image_point_to_the_one_that_stays() -> None:
    earlier = np.array([(7, 4, exact.BYTES), (8, 2, exact.PIXELS)], exact.DROP)
    later = np.array([(4, 1, exact.HASH)], exact.DROP)
    assert exact.follow_drops(earlier, later).tolist() == [(4, 1, 2), (7, 1, 0), (8, 2, 1)]


def test_an_image_without_a_digest_repeats_nobodys_bytes() -> None:
    made = exact.records_of(np.array([1, 2], np.uint64), [None, None], [b"p" * 32] * 2, [None, None], False)
    drops, _ = exact.equal_pixels(made)
    assert drops.tolist() == [(2, 1, exact.PIXELS)] and len(exact.hashed(made)) == 0


def test_buckets_take_words_by_their_high_bits() -> None:
    words = np.array([0, 1 << 62, 1 << 63, 2**64 - 1], np.uint64)
    assert exact.bucket_of(words, 4).tolist() == [0, 1, 2, 3] and exact.bucket_of(words, 1).tolist() == [0] * 4
