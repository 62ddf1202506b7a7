"""Instance retrieval: how high the images of the same instance rank, as mean average precision.

`sum` is the textbook's definition (and scikit-learn's); `trapezoid` is that of the Oxford and Paris benchmarks, which
interpolates between precisions.
"""

import numpy as np

QUERIES_AT_ONCE = 256


def average_precisions(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    same: bool = False,
    definition: str = "sum",
) -> np.ndarray:
    """(q,) float64, nan for queries without an image of theirs in the gallery.

    queries: (q, d), gallery: (n, d) float32, compared by cosine, equal ones in gallery order. same: the gallery is the
    queries, and none finds itself.
    """
    queries, gallery = _normalised(queries), _normalised(gallery)
    found = np.full(len(queries), np.nan)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similarity = queries[start : start + QUERIES_AT_ONCE] @ gallery.T
        order = np.argsort(-similarity, axis=1, kind="stable")
        for i, ranked in enumerate(order, start=start):
            own = ranked[ranked != i] if same else ranked
            hits = np.flatnonzero(gallery_labels[own] == query_labels[i])
            if len(hits):
                found[i] = average_precision(hits, definition)
    return found


def average_precision(hits: np.ndarray, definition: str) -> float:
    """hits: ranks of the relevant images from 0, ascending, all of them."""
    count = np.arange(len(hits))
    after = (count + 1) / (hits + 1)
    if definition == "sum":
        return float(after.mean())
    before = np.where(hits == 0, 1.0, count / np.maximum(hits, 1))
    return float(((before + after) / 2).mean())


def _normalised(values: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.maximum(lengths, 1e-12)
