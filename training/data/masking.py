"""Which patches the student does not see: BEiT's blocks (Bao et al. 2021, appendix), with DINOv2's ratios.

Of the 2 g global crops of a group of g samples a share is masked, and their ratios are stratified: the i-th of m masked
crops draws its ratio from the i-th of m equal parts of the range. The draws are keyed by (seed, group number).
"""

import math

import numpy as np

from curation.order import generator

LEAST_PATCHES = 4
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


def group_masks(
    seed: int, group: int, group_size: int, grid: int, probability: float, ratio: tuple[float, float]
) -> np.ndarray:
    """(2, group_size, grid * grid) bool for the two global crops of each sample of a group of the stream."""
    random = generator(seed, f"masks:{group}")
    crops = 2 * group_size
    masked = int(crops * probability)
    edges = np.linspace(*ratio, masked + 1)
    masks = np.zeros((crops, grid, grid), bool)
    for i in range(masked):
        wanted = int(grid * grid * random.uniform(edges[i], edges[i + 1]))
        block_mask(masks[i], wanted, random)
    return masks[random.permutation(crops)].reshape(2, group_size, grid * grid)


def block_mask(mask: np.ndarray, wanted: int, random: np.random.Generator) -> None:
    """Add rectangles to `mask`, (h, w) bool, until `wanted` patches are masked or no further one fits.

    At most half of the grid in one rectangle, as DINOv2 calls it.
    """
    height, width = mask.shape
    count = 0
    while count < wanted:
        most = min(wanted - count, height // 2 * width)
        added = _add_block(mask, most, random)
        if not added:
            return
        count += added


def _add_block(mask: np.ndarray, most: int, random: np.random.Generator) -> int:
    height, width = mask.shape
    draws = random.random((ATTEMPTS, 4)).tolist()
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = LEAST_PATCHES + (most - LEAST_PATCHES) * area_draw
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * aspect_draw)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w >= width or h >= height:
            continue
        top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        fresh = h * w - int(np.count_nonzero(block))
        if 0 < fresh <= most:
            block[:] = True
            return fresh
    return 0
