"""Sketches against the law of angles, and the scan against Hamming distances of everything."""

import math

import numpy as np
import pytest

from curation import sketch


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dimension", [64, 100, 512, 1280])
def test_distance_grows_with_the_angle_and_varies_no_more_than_independent_bits(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    x = unit(random.standard_normal((1500, dimension)))
    noise = unit(random.standard_normal((1500, dimension)))
    noise = unit(noise - (noise * x).sum(axis=1, keepdims=True) * x)
    for cosine in (0.45, 0.6, 0.9):
        y = cosine * x + math.sqrt(1 - cosine**2) * noise
        apart = sketch.distances(sketch.sketches(x.astype(np.float32)), sketch.sketches(y.astype(np.float32)), 16)
        share = math.acos(cosine) / math.pi
        assert abs(apart.mean() / 1024 - share) < 0.005
        assert apart.std() < 1.1 * math.sqrt(1024 * share * (1 - share))


def test_one_hot_vectors_are_sketched_like_any_other() -> None:
    bits = sketch.sketches(np.eye(512, dtype=np.float16)[:200])
    apart = sketch.distances(bits[:-1], bits[1:], 16)
    assert apart.min() > 440 and apart.max() < 584


def test_sketch_depends_on_the_vector_alone() -> None:
    x = unit(np.random.default_rng(0).standard_normal((70, 200))).astype(np.float16)
    whole = sketch.sketches(x)
    assert (np.concatenate([sketch.sketches(row[None]) for row in x]) == whole).all()
    assert (sketch.sketches(x.astype(np.float32)) == whole).all()
    assert (sketch.sketches(x, 5) == whole[:, :5]).all()


@pytest.mark.parametrize("first_words", [1, 2, 3, 4])
def test_scan_finds_just_the_pairs_within_both_cuts(first_words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "PAIRS_HELD", 5000)
    random = np.random.default_rng(first_words)
    x = unit(random.standard_normal((1, 64)) + 0.8 * random.standard_normal((1400, 64))).astype(np.float32)
    bits = sketch.sketches(x)
    queries, columns = bits[:300], bits[200:]
    starts = random.integers(-3, 1300, 300)
    cuts = tuple(sketch.distance_at(0.6, w, deviations) for w, deviations in ((first_words, 0.5), (8, 0.2), (16, 0)))
    first = np.bitwise_count(queries[:, None, :first_words] ^ columns[None, :, :first_words]).sum(axis=2)
    whole = np.bitwise_count(queries[:, None] ^ columns[None]).sum(axis=2)
    half = np.bitwise_count(queries[:, None, :8] ^ columns[None, :, :8]).sum(axis=2)
    wanted = (first <= cuts[0]) & (half <= cuts[1]) & (whole <= cuts[2]) & (np.arange(1200)[None] >= starts[:, None])
    found = list(sketch.scan(queries, columns, starts, first_words, cuts))
    rows, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
    expected = np.nonzero(wanted)
    assert len(found) > 1 and len(rows) > 1000
    assert (rows == expected[0]).all() and (places == expected[1]).all()


def test_pair_at_a_cosine_is_rarely_farther_apart_than_its_distance() -> None:
    assert sketch.distance_at(0.6, 16, 0) == math.ceil(1024 * math.acos(0.6) / math.pi)
    assert sketch.distance_at(-1.0, 2, 5) == 128
    assert sketch.distance_at(1.0, 4, 5) == 0
