"""Masks have the statistics of the recipe: DINOv2's collation over BEiT's blocks, transcribed here."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from training.data.masking import group_masks

GRID, GROUP = 16, 32


def recipe_mask(wanted: int, source: random.Random) -> np.ndarray:
    """BEiT's generator as DINOv2 calls it: at least 4 patches, at most half of them, aspect 0.3 to 3.3."""
    mask = np.zeros((GRID, GRID), int)
    count = 0
    while count < wanted:
        most, delta = min(wanted - count, GRID * GRID // 2), 0
        for _ in range(10):
            area = source.uniform(4, most)
            aspect = math.exp(source.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < GRID and h < GRID:
                top, left = source.randint(0, GRID - h), source.randint(0, GRID - w)
                covered = mask[top : top + h, left : left + w].sum()
                if 0 < h * w - covered <= most:
                    for y in range(top, top + h):
                        for x in range(left, left + w):
                            if not mask[y, x]:
                                mask[y, x] = 1
                                delta += 1
                if delta > 0:
                    break
        if not delta:
            break
        count += delta
    return mask.astype(bool)


def recipe_group(source: random.Random) -> np.ndarray:
    crops = 2 * GROUP
    masked = int(crops * 0.5)
    edges = np.linspace(0.1, 0.5, masked + 1)
    found = [recipe_mask(int(GRID**2 * source.uniform(edges[i], edges[i + 1])), source) for i in range(masked)]
    found += [np.zeros((GRID, GRID), bool)] * (crops - masked)
    source.shuffle(found)
    return np.stack(found)


@pytest.fixture(scope="module")
def both() -> tuple[np.ndarray, np.ndarray]:
    source = random.Random(0)
    ours = [group_masks(0, g, GROUP, GRID, 0.5, (0.1, 0.5)).reshape(-1, GRID, GRID) for g in range(40)]
    return np.stack(ours), np.stack([recipe_group(source) for _ in range(40)])


def test_masked_crops_and_their_ratios_are_the_recipe_s(both: tuple[np.ndarray, np.ndarray]) -> None:
    ours, _ = both
    assert (ours.any((2, 3)).sum(1) == GROUP).all()
    counts = [np.sort(masks.sum((2, 3)), axis=1)[:, GROUP:] for masks in both]
    np.testing.assert_allclose(counts[0].mean(0), counts[1].mean(0), atol=2.5)  # stratum by stratum
    assert stats.ks_2samp(counts[0].ravel(), counts[1].ravel()).pvalue > 1e-3
    assert (counts[0] <= np.floor(GRID**2 * np.linspace(0.1, 0.5, GROUP + 1)[1:])).all()


def test_blocks_lie_where_the_recipe_s_lie(both: tuple[np.ndarray, np.ndarray]) -> None:
    maps = [masks[masks.any((2, 3))].mean(0) for masks in both]
    np.testing.assert_allclose(maps[0], maps[1], atol=0.06)
    inside = [m[m.any((2, 3))] for m in both]
    edges = [(m[:, 1:] != m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum((1, 2)) for m in inside]
    assert stats.ks_2samp(*edges).pvalue > 1e-3  # as fragmented


def test_masks_are_keyed_by_seed_and_group_alone() -> None:
    first = group_masks(1, 5, 4, 7, 0.5, (0.1, 0.5))
    np.testing.assert_array_equal(first, group_masks(1, 5, 4, 7, 0.5, (0.1, 0.5)))
    assert first.shape == (2, 4, 49)
    assert not np.array_equal(first, group_masks(1, 6, 4, 7, 0.5, (0.1, 0.5)))
    assert not group_masks(1, 5, 4, 7, 0.0, (0.1, 0.5)).any()
