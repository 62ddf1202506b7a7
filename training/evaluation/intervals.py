"""How sure a figure is: 95 % intervals, for shares in closed form and for means by the bootstrap."""

import math
from typing import Any

import numpy as np

from curation.order import generator

Z = 1.959963984540054
RESAMPLES = 2000


def share(successes: int, trials: int) -> dict[str, Any]:
    """A share with Wilson's interval."""
    if not trials:
        return {"value": float("nan"), "low": 0.0, "high": 1.0, "n": 0}
    p = successes / trials
    centre = (p + Z * Z / (2 * trials)) / (1 + Z * Z / trials)
    half = Z * math.sqrt(p * (1 - p) / trials + Z * Z / (4 * trials * trials)) / (1 + Z * Z / trials)
    return {"value": p, "low": min(p, max(0.0, centre - half)), "high": max(p, min(1.0, centre + half)), "n": trials}


def mean(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """A mean of (n,) values with the percentile bootstrap's interval."""
    random = generator(seed, "bootstrap")
    means = np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
