"""Halves widened by bits against numpy's own conversion."""

import numpy as np

from curation.halves import squared_lengths, widen


def test_halves_widen_exactly() -> None:
    random = np.random.default_rng(0)
    halves = np.concatenate([random.standard_normal((40, 16)), np.full((1, 16), 6e-8), np.zeros((1, 16))])
    halves = halves.astype(np.float16)
    assert np.array_equal(widen(halves), halves.astype(np.float32))
    chosen = np.array([3, 1])
    assert np.array_equal(widen(halves, chosen), halves[chosen].astype(np.float32))


def test_squared_lengths_are_numpys_and_not_finite_where_a_value_is_not() -> None:
    rows = np.random.default_rng(0).standard_normal((1500, 24)).astype(np.float16)
    for kind in (np.float16, np.float32):
        part = rows.astype(kind)
        wide = part.astype(np.float32)
        assert np.allclose(squared_lengths(part), np.einsum("nd,nd->n", wide, wide), rtol=1e-6)
        part[3, 5], part[1400, 0], part[7, 2] = np.nan, np.inf, -np.inf
        assert np.flatnonzero(~np.isfinite(squared_lengths(part))).tolist() == [3, 7, 1400]
