"""Columns over all images that the driver fills and reads: arrays in unlinked files, which the kernel may page out.

The memory they take is that of the page cache: it is given back where something else needs it. Nothing is left behind
when the array is gone, or the process.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np

from curation import storage

SMALL_BYTES = 1 << 20
"""Below so many bytes a file is not worth it."""

Empty = Callable[[int, str], np.ndarray]
"""empty(count, dtype) -> (count,) array of what there was."""


def empty_in(folder: str) -> Empty:
    """What makes columns beside a generation's parts, or in the temporary folder where those are on an object store."""
    inner = storage.filesystem(folder)[1] if storage.is_local(folder) else tempfile.gettempdir()
    return partial(_empty, inner)


def _empty(folder: str, count: int, dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    if count * kind.itemsize <= SMALL_BYTES:
        return np.empty(count, kind)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserved, not sparse: a disk that fills up under a mapping would kill the process.
            os.posix_fallocate(file.fileno(), 0, count * kind.itemsize)
            return np.asarray(np.memmap(file, kind, mode="r+", shape=(count,)))
    except OSError as error:
        raise storage.cannot_write(folder, error) from error
