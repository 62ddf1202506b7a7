"""Which images a filter drops for what they are, from the scores in their rows."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

TOO_SMALL, ASPECT_RATIO, SOLID_COLOUR, NSFW = "too_small", "aspect_ratio", "solid_colour", "nsfw"
REASONS = (TOO_SMALL, ASPECT_RATIO, SOLID_COLOUR, NSFW)
COLUMNS = ("source", "status", "width", "height", "contrast", "nsfw")


@dataclass(frozen=True)
class Thresholds:
    """None leaves a filter out. An image whose score is null passes that filter."""

    min_side: int | None
    aspect_ratio: float | None
    solid_colour: float | None
    nsfw: float | None


def reasons(table: pa.Table, thresholds: Thresholds, exempt: Collection[str]) -> np.ndarray:
    """Why each row is dropped: (n,) of str, empty where it passes; the first of REASONS that applies.

    table: COLUMNS. Rows that are not `ok`, reference images and the sources named in `exempt` pass.
    """
    found = np.full(table.num_rows, "", dtype=object)
    short = np.minimum(_floats(table, "width"), _floats(table, "height"))
    long = np.maximum(_floats(table, "width"), _floats(table, "height"))
    tests = (
        (TOO_SMALL, thresholds.min_side, lambda t: short < t),
        (ASPECT_RATIO, thresholds.aspect_ratio, lambda t: long > t * short),
        (SOLID_COLOUR, thresholds.solid_colour, lambda t: _floats(table, "contrast") < t),
        (NSFW, thresholds.nsfw, lambda t: _floats(table, "nsfw") > t),
    )
    for reason, threshold, test in reversed(tests):
        if threshold is not None:
            found[test(threshold)] = reason  # comparisons with null (NaN here) are false
    spared = [
        status != "ok" or source.startswith("reference:") or source in exempt
        for status, source in zip(table["status"].to_pylist(), table["source"].to_pylist(), strict=True)
    ]
    found[np.array(spared, dtype=bool)] = ""
    return found


def _floats(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
