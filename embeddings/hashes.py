"""Hashes of pixels: equal pixels, and nearly equal ones by the signs of principal components.

The PCA hash: luminance at 32x32, 64 components fitted on a sample of the pool (scikit-learn's IncrementalPCA),
one bit per component. Everything after the fit is integer arithmetic, so equal pixels give equal bits on any
machine and in batches of any size.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np

LUMINANCE_SIDE = 32
COMPONENTS = 64
LEAST_IMAGES = 2 * COMPONENTS
"""Components of fewer images than this are noise: their bits would call different images copies."""
_SCALE = float(1 << 20)
"""Components are rounded to multiples of 1 / _SCALE: their products with uint8 luminance sum exactly in float64."""


def pixel_sha256(pixels: np.ndarray) -> bytes:
    """SHA-256 of width and height (little-endian uint32), then the RGB bytes. pixels: (h, w, 3) uint8."""
    digest = hashlib.sha256(np.array([pixels.shape[1], pixels.shape[0]], "<u4").tobytes())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def luminance(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 RGB -> (32, 32) uint8: ITU-R 601 luma, averaged over boxes; the aspect ratio is lost."""
    from PIL import Image

    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return np.asarray(grey.resize((LUMINANCE_SIDE, LUMINANCE_SIDE), Image.Resampling.BOX))


def contrast(luminances: np.ndarray) -> np.ndarray:
    """Standard deviation of each luminance. (n, 32, 32) uint8 -> (n,) float32 in 0-127.5."""
    flat = _flat(luminances).astype(np.int64)
    count = flat.shape[1]
    spread = count * np.einsum("ij,ij->i", flat, flat) - flat.sum(axis=1) ** 2
    return (np.sqrt(spread.astype(np.float64)) / count).astype(np.float32)


def _flat(luminances: np.ndarray) -> np.ndarray:
    return luminances.reshape(len(luminances), LUMINANCE_SIDE**2)


@dataclass(frozen=True)
class PcaHash:
    """Fitted components. directions: (64, 1024) float64, whole multiples of 2^-20. thresholds: (64,) float64."""

    directions: np.ndarray
    thresholds: np.ndarray

    def __call__(self, luminances: np.ndarray) -> np.ndarray:
        """(n, 32, 32) uint8 -> (n,) uint64; bit k is the sign of component k."""
        flat = _flat(luminances).astype(np.float64)
        bits = (flat @ self.directions.T > self.thresholds).astype(np.uint64)
        weights = np.uint64(1) << np.arange(COMPONENTS, dtype=np.uint64)
        return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))

    def to_bytes(self) -> bytes:
        """An .npz file; equal components give equal bytes."""
        sink = io.BytesIO()
        np.savez(sink, directions=self.directions, thresholds=self.thresholds)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "PcaHash":
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return cls(stored["directions"], stored["thresholds"])


def fit(luminances: np.ndarray) -> PcaHash | None:
    """Fit on a sample, (n, 32, 32) uint8 in a fixed order. None below LEAST_IMAGES images.

    Runs on one thread: the order of LAPACK's sums, so its bits, depend on the number of threads.
    """
    from sklearn.decomposition import IncrementalPCA
    from threadpoolctl import threadpool_limits

    if len(luminances) < LEAST_IMAGES:
        return None
    flat = _flat(luminances).astype(np.float64)
    with threadpool_limits(limits=1):
        model = IncrementalPCA(n_components=COMPONENTS, batch_size=1024).fit(flat)
    directions = np.rint(model.components_ * _SCALE) / _SCALE
    return PcaHash(directions, directions @ model.mean_)


def hamming(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits in which two hashes differ, elementwise. uint64 -> uint8."""
    return np.bitwise_count(left ^ right)
