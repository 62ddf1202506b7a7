"""How the nearest pool images of many seeds are searched: cells that a seed visits, codes that a row must pass.

Rows go to the nearest of some dozens of cells; a seed visits the cells that may hold a neighbour. In a visited cell the
four-bit codes of `curation.quantised` pass on rows that may be among the seed's N nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from curation import quantised
from curation.quantised import Codebook, Tables

FEW_SEEDS, FEW_ROWS, FEW_PAIRS = 512, 65_536, 1 << 28
"""Below any of these everything is compared: calibrating codes and cells would cost more than they save."""
EXACT_COST, CODE_COST, CODING_COST, CHECK_COST = 0.032, 0.014, 10.0, 0.12
"""Nanoseconds on one core of 2021: a product per dimension; a coded product per piece; coding a row, and checking one
against a seed, per dimension. Their ratios alone matter, and only for the choice between this search and the exact."""
SURE_DEVIATIONS = 5.0
"""Of the codes' error: what a search that stands for the exact one allows. One true neighbour in three million would be
passed over were the error normal."""


@dataclass(frozen=True)
class SearchPlan:
    """What all stretches of the pool are searched with."""

    cells: np.ndarray
    """(c, d) float32 centroids."""
    reach: np.ndarray
    """(c,) float32: how far above its centroid's product the best of a cell is expected to be."""
    codebook: Codebook
    visit_margin: float
    """A seed visits the cells whose expected best is at most so far below that of its best cell."""
    slope: float
    cut_margin: float
    """A row whose coded product is at least slope * (the seed's N-th similarity) - cut_margin is compared."""
    deviation: float
    """Of slope * similarity - coded product, among near pairs."""
    share: float
    """Expected share of the (seed, row) pairs whose codes are looked at."""
    passing: float
    """Expected share of those that are compared."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be kept."""
        numbers = [self.visit_margin, self.slope, self.cut_margin, self.deviation, self.share, self.passing]
        return {
            "cells": self.cells,
            "reach": self.reach,
            "levels": self.codebook.levels,
            "numbers": np.array([*numbers, self.codebook.dimension]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SearchPlan":
        *numbers, dimension = (float(x) for x in arrays["numbers"])
        return cls(arrays["cells"], arrays["reach"], Codebook(arrays["levels"], int(dimension)), *numbers)

    def surely(self) -> "SearchPlan":
        """Every cell, and codes that may be off by SURE_DEVIATIONS: stands for exact search, at a third of its cost."""
        return replace(self, visit_margin=float("inf"), cut_margin=SURE_DEVIATIONS * self.deviation)

    def cost(self, seeds: int) -> float:
        """Expected nanoseconds per row of the pool."""
        pieces, dimension = self.codebook.pieces, self.codebook.dimension
        per_pair = self.share * (CODE_COST * pieces + self.passing * CHECK_COST * dimension)
        return seeds * per_pair + len(self.cells) * CODE_COST * pieces + dimension * CODING_COST

    def expected_best(self, seeds: np.ndarray) -> np.ndarray:
        """(m, c) float32: the product that the best row of each cell is expected to have with each seed."""
        return np.asarray(seeds @ self.cells.T + self.reach, dtype=np.float32)

    def visits(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((m, c) bool: the cells each of (m, d) float32 seeds looks at; (m,) the one it expects most of)."""
        expected = self.expected_best(seeds)
        best = expected.argmax(axis=1)
        return np.asarray(expected >= expected.max(axis=1, keepdims=True) - np.float32(self.visit_margin)), best

    def assign(self, codes: np.ndarray) -> np.ndarray:
        """(blocks * 32,) int64 cell of each coded row: the nearest, as the codes see it, at a quarter of the cost."""
        return quantised.highest(codes, *self._cell_tables)

    @cached_property
    def _cell_tables(self) -> tuple[Tables, np.ndarray]:
        return self.codebook.tables(self.cells), -0.5 * np.einsum("cd,cd->c", self.cells, self.cells)


def is_small(seeds: int, rows: int) -> bool:
    """Whether comparing everything costs least, by arithmetic on the sizes alone."""
    return seeds < FEW_SEEDS or rows < FEW_ROWS or seeds * rows < FEW_PAIRS


def exact_cost(seeds: int, dimension: int) -> float:
    """Nanoseconds per row of the pool when everything is compared."""
    return seeds * dimension * EXACT_COST
