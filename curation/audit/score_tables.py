"""The scores that filters decide by: histograms, and the images nearest each threshold, in one scan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.audit.scans import NOTHING, stream
from curation.hidden import is_hidden
from curation.order import hash_keys

WIDTH, HEIGHT = pc.field("width"), pc.field("height")
LEAST = pc.min_element_wise(WIDTH, HEIGHT).cast(pa.float64())
MOST = pc.max_element_wise(WIDTH, HEIGHT).cast(pa.float64())


@dataclass(frozen=True)
class Score:
    """A score of the table of images. above: what lies above the threshold is dropped, else what lies below."""

    name: str
    title: str
    expression: Any
    edges: np.ndarray
    log: bool
    form: str
    above: bool | None = None


SCORES = (
    Score("nsfw", "NSFW score", pc.field("nsfw"), np.linspace(0, 1, 41), True, "{:.2f}", True),
    Score(
        "contrast",
        "Contrast (deviation of luminance)",
        pc.field("contrast"),
        np.linspace(0, 128, 33),
        False,
        "{:.0f}",
        False,
    ),
    Score(
        "min_side",
        "Shorter side, pixels",
        LEAST,
        np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192], float),
        False,
        "{:.0f}",
        False,
    ),
    Score(
        "aspect_ratio",
        "Aspect ratio, longer by shorter side",
        pc.divide(MOST, LEAST),
        np.array([1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 6, 10, 20], float),
        False,
        "{:g}",
        True,
    ),
    Score(
        "faces",
        "Faces found per image",
        pc.list_value_length(pc.field("faces")).cast(pa.float64()),
        np.arange(0, 12, dtype=float),
        True,
        "{:.0f}",
    ),
)


def score_figures(
    paths: Sequence[str], limits: Mapping[str, float | None], each: int, hidden: np.ndarray = NOTHING
) -> dict[str, dict[str, Any]]:
    """Per score its `counts` (bins of SCORES), and `around`: the images nearest its threshold on either side.

    limits: thresholds by score, None where there is none. around: rows {image_id, value, dropped_side}, at most `each`
    per side, by value; what lies outside the bins counts in the first or last.
    """
    counts = {s.name: np.zeros(len(s.edges) - 1, np.int64) for s in SCORES}
    near: dict[str, list[list[tuple[float, int, int, float]]]] = {s.name: [[], []] for s in SCORES}
    columns = {"image_id": pc.field("image_id")} | {s.name: s.expression for s in SCORES}
    for table in stream(paths, columns):
        ids = table["image_id"].to_numpy()
        shown = ~is_hidden(ids, hidden)
        keys = hash_keys(ids, 0, "report scores")
        for score in SCORES:
            values = np.asarray(table[score.name].cast(pa.float64()).to_numpy(), np.float64)
            known = np.isfinite(values)
            clipped = np.clip(values[known], score.edges[0], score.edges[-1])
            counts[score.name] += np.histogram(clipped, score.edges)[0]
            limit = limits.get(score.name)
            if limit is None or score.above is None:
                continue
            lost = values > limit if score.above else values < limit
            for side, mine in enumerate((known & shown & ~lost, known & shown & lost)):
                near[score.name][side] = _nearest(
                    near[score.name][side], ids[mine], keys[mine], values[mine], limit, each
                )
    return {
        name: {
            "counts": counts[name],
            "around": [
                {"image_id": i, "value": value, "dropped_side": bool(side)}
                for side, some in enumerate(near[name])
                for _, _, i, value in sorted(some, key=lambda entry: entry[3])
            ],
        }
        for name in counts
    }


def _nearest(
    known: list[tuple[float, int, int, float]],
    ids: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    limit: float,
    each: int,
) -> list[tuple[float, int, int, float]]:
    """The `each` nearest the limit: (distance, hash, id, value); ties by the hash."""
    distance = np.abs(values - limit)
    first = np.lexsort((keys, distance))[:each] if len(ids) <= 4 * each else _least(distance, keys, each)
    fresh = [(float(distance[i]), int(keys[i]), int(ids[i]), float(values[i])) for i in first]
    return sorted([*known, *fresh])[:each]


def _least(distance: np.ndarray, keys: np.ndarray, each: int) -> np.ndarray:
    bound = np.partition(distance, each - 1)[each - 1]
    some = np.flatnonzero(distance <= bound)
    return some[np.lexsort((keys[some], distance[some]))[:each]]
