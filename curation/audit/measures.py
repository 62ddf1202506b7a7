"""How even a division is, how pure its groups are, and where its centroids lie on a plane."""

import numpy as np


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of the shares of `counts` (n,) >= 0, in bits; 0 for an empty or single one."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0 if len(shares) else 0.0


def effective(counts: np.ndarray) -> float:
    """2 to the entropy: as many equal groups would be as even. 0 where nothing is counted."""
    return float(2 ** entropy(counts)) if (counts > 0).any() else 0.0


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of `counts` (n,) >= 0: 0 where all are equal, near 1 where one has all; empty groups count."""
    total = float(counts.sum())
    if not total:
        return 0.0
    ordered = np.sort(counts.astype(np.float64))
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * total))


def plane(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The first two principal components of weighted points, each sign fixed by its largest loading.

    points: (n, d) float. weights: (n,) > 0. Returns (n, 2) float64, of zeros where a component has no spread.
    """
    values = points.astype(np.float64)
    share = weights.astype(np.float64) / weights.sum()
    centred = values - share @ values
    scaled = centred * np.sqrt(share)[:, None]
    small = len(values) <= values.shape[1]
    spread, vectors = np.linalg.eigh(scaled @ scaled.T if small else scaled.T @ scaled)
    found = np.zeros((len(values), 2))
    for axis in range(min(2, len(spread))):
        power = spread[-1 - axis]
        if power <= 1e-12 * max(1e-300, spread[-1]):
            continue
        vector = vectors[:, -1 - axis]
        loading = scaled.T @ vector / np.sqrt(power) if small else vector
        found[:, axis] = centred @ (loading * np.sign(loading[np.argmax(np.abs(loading))]))
    return found


def spread_out(places: np.ndarray, radii: np.ndarray, width: float, height: float, turns: int = 300) -> np.ndarray:
    """Discs moved apart until they hardly overlap, as near to their places as that allows, inside a rectangle.

    places: (n, 2). radii: (n,). Both, and the rectangle, in one unit. The same for equal inputs: nothing is drawn.
    """
    found = places.astype(np.float64).copy()
    if len(found) < 2:
        return _inside(found, radii, width, height)
    reach = radii[:, None] + radii[None, :]
    nudge = np.stack([np.cos(np.arange(len(found)) * 2.4), np.sin(np.arange(len(found)) * 2.4)], axis=1)
    for _ in range(turns):
        apart = found[:, None, :] - found[None, :, :]
        apart = np.where(np.abs(apart).sum(2, keepdims=True) < 1e-9, nudge[:, None] - nudge[None, :], apart)
        distance = np.sqrt((apart**2).sum(2))
        np.fill_diagonal(distance, np.inf)
        overlap = np.maximum(0, reach - distance)
        if overlap.max() < 0.5:
            break
        push = (apart / np.maximum(distance, 1e-9)[:, :, None] * overlap[:, :, None]).sum(1)
        found = _inside(found + 0.35 * push, radii, width, height)
    return found


def _inside(places: np.ndarray, radii: np.ndarray, width: float, height: float) -> np.ndarray:
    low = np.minimum(radii[:, None], (width / 2, height / 2))
    return np.asarray(np.clip(places, low, np.array([width, height]) - low))
