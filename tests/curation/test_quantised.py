"""Four-bit codes: the scan with registers against sums taken one by one, and both against the nearest levels."""

import numpy as np
import pytest

from curation import quantised, shuffles


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


@pytest.mark.parametrize("dimension", [24, 130, 384])
def test_codes_name_the_nearest_level_of_every_dimension(dimension: int) -> None:
    rows = unit(70, dimension, 0)
    book = quantised.train(unit(400, dimension, 1), 0)
    codes = book.encode(rows)
    found = np.concatenate([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    assert not found[:, dimension:].any()
    away = np.abs(rows[:, :, None] - book.levels.reshape(-1, 4)[None, :dimension])
    chosen = np.take_along_axis(away, found[:, :dimension, None].astype(np.int64), axis=2)[:, :, 0]
    assert np.allclose(chosen, away.min(axis=2), atol=1e-6)


def test_levels_are_those_of_k_means() -> None:
    rows = np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float32)
    rows[:, 1] += np.where(np.arange(4000) % 2, 50, 0)
    levels = quantised.train(rows, 0).levels.reshape(-1, 4)[:3]
    assert np.allclose(levels[0], [-1.51, -0.453, 0.453, 1.51], atol=0.06), "Max's levels of a normal variable"
    own = np.abs(rows[:, 1:2] - levels[1]).argmin(axis=1)
    assert np.allclose([rows[own == j, 1].mean() for j in range(4)], levels[1], atol=0.05)


def test_equal_rows_have_one_code() -> None:
    rows = np.repeat(unit(1, 64, 0), 40, axis=0)
    assert len(np.unique(quantised.train(rows, 0).encode(rows), axis=0)) == 1


@pytest.mark.skipif(not shuffles.has_shuffle(), reason="needs AVX2")
@pytest.mark.parametrize("pieces", [32, 128, 256])
def test_registers_give_the_rows_that_sums_one_by_one_give(pieces: int) -> None:
    random = np.random.default_rng(pieces)
    codes = random.integers(0, 256, (2, pieces // 2, 32), dtype=np.uint8)
    entries = random.integers(0, 16, (6, pieces, 16), dtype=np.uint8)
    # Larger entries stop a byte's sum at 255; smaller ones leave it below.
    entries[1] //= 2
    entries[2] //= 4
    sums = quantised.sums(codes, entries)
    cuts = np.median(sums, axis=1).astype(np.uint8)
    found, plain = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    shape = shuffles.shape_of(pieces)
    for queries in ([0, 1, 2, 3], [5, 4, 4, 1]):
        for block in range(2):
            shuffles.masks_of(shape, codes[block], entries, np.array(queries), cuts, found)
            shuffles.masks_of(None, codes[block], entries, np.array(queries), cuts, plain)
            assert found.tolist() == plain.tolist()
            for i, query in enumerate(queries):
                passing = sums[query, block * 32 : block * 32 + 32] >= cuts[query]
                assert [(int(found[i]) >> lane) & 1 for lane in range(32)] == passing.tolist()


def test_coded_products_follow_the_true_ones() -> None:
    rows, queries = unit(600, 128, 2), unit(8, 128, 3)
    book = quantised.train(rows, 0)
    tables, codes = book.tables(queries), shuffles.blocked(book.encode(rows))
    coded = tables.base[:, None] + tables.step[:, None] * quantised.sums(codes, tables.entries)[:, :600]
    assert np.corrcoef(coded.ravel(), (queries @ rows.T).ravel())[0, 1] > 0.75
    again = shuffles.pair_sums(codes[:1], tables.entries, np.arange(8))
    assert again.tolist() == [int(quantised.sums(codes[:1], tables.entries)[i, i]) for i in range(8)]


@pytest.mark.parametrize("shape", [None, shuffles.shape_of(64)])
def test_the_highest_query_is_that_of_the_sums(shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = unit(100, 128, 2), unit(9, 128, 3)
    book = quantised.train(unit(400, 128, 1), 0)
    codes, tables = shuffles.blocked(book.encode(rows)), book.tables(queries)
    offsets = np.linspace(0, 0.1, 9).astype(np.float32)
    monkeypatch.setattr(shuffles, "shape_of", lambda _: shape)
    coded = tables.base[:, None] + tables.step[:, None] * quantised.sums(codes, tables.entries) + offsets[:, None]
    assert quantised.highest(codes, tables, offsets).tolist() == coded.argmax(axis=0).tolist()


@pytest.mark.parametrize("dimension", [24, 64, 130, 512])
def test_products_of_integers_are_exact_with_registers_and_without(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    more = ((0, 0), (0, shuffles.padded(dimension) - dimension))
    left = np.pad(random.integers(-2000, 2000, (3, dimension), dtype=np.int16), more)
    right = np.pad(random.integers(-127, 128, (4, dimension), dtype=np.int8), more)
    expected = left.astype(int) @ right.astype(int).T
    for shape in {None, shuffles.shape_of(64)}:
        found = [[shuffles.sum_of_products(shape, left, i, right, j) for j in range(4)] for i in range(3)]
        assert np.array_equal(found, expected)


def test_codes_are_gathered_in_any_order() -> None:
    rows = unit(70, 64, 0)
    book = quantised.train(unit(200, 64, 1), 0)
    order = np.random.default_rng(0).permutation(70)
    codes = shuffles.gathered(book.encode(rows), order)
    assert codes.shape == (3, 16, 32)
    assert np.array_equal(codes, shuffles.blocked(book.encode(rows[order])))
