"""The crops of one sample of the stream, from its number: row, bytes, pixels, crops; broken images replaced.

Everything is keyed by (seed, sample number), so a sample is the same whoever makes it, and whenever.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curation.errors import UserError
from curation.order import generator, hash_keys
from embeddings.decoding import DecodeError, Decoder
from training.data import augmentation
from training.data.config import DataConfig
from training.data.index import Index
from training.data.reading import Reader
from training.data.sampling import Order

REPLACEMENTS = 16
"""After so many broken images in the place of one sample, it is the source that is broken."""
DECODED_AHEAD = 3
"""Images: pixels of a large one are hundreds of megabytes."""


@dataclass
class Sample:
    """large: (2, 3, H, H), small: (local_crops, 3, h, h) uint8. broken: (image_id, reason) of what was skipped.

    drawn: (2 + local_crops, 11), what `training.finishing` has to do with crops that are only cut; None: nothing.
    """

    number: int
    image_id: int
    large: np.ndarray
    small: np.ndarray
    drawn: np.ndarray | None = None
    broken: list[tuple[int, str]] = field(default_factory=list)


class SampleMaker:
    """Makes samples in the process that calls it: threads read, a child process decodes, this thread augments."""

    def __init__(self, config: DataConfig, index: Index, order: Order, seed: int, reader: Reader) -> None:
        self._config, self._index, self._order, self._seed = config, index, order, seed
        self._shrink_to = augmentation.least_side(config)
        self._reader = reader
        self._decoder = Decoder()
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="image-decode")
        self._reads: dict[int, tuple[int, Future[bytes]]] = {}

    @property
    def requests(self) -> int:
        """Reads so far."""
        return self._reader.requests

    def ahead(self, numbers: Sequence[int]) -> None:
        """Start the reads of samples that will be asked for."""
        fresh = [number for number in numbers if number not in self._reads]
        if fresh:
            rows = self._order.rows(np.array(fresh, np.int64)).tolist()
            self._reads |= dict(zip(fresh, zip(rows, self._reader.submit(rows), strict=True), strict=True))

    def make(self, numbers: Sequence[int], ahead: Sequence[int] = ()) -> list[Sample]:
        """The samples of those numbers. ahead: numbers that will be asked for next. Raises UserError."""
        self.ahead(numbers)
        self.ahead(ahead)
        waiting: deque[Future[tuple[int, np.ndarray, list[tuple[int, str]]]]] = deque()
        left = deque(numbers)
        made = []
        for number in numbers:
            while left and len(waiting) < DECODED_AHEAD:
                waiting.append(self._decoding.submit(self._pixels, left.popleft()))
            image_id, pixels, broken = waiting.popleft().result()
            random = generator(self._seed, f"augment:{number}")
            if self._config.augment_on == "device":
                crops: tuple[np.ndarray, ...] = augmentation.cut_crops(pixels, self._config, random)
            else:
                crops = augmentation.augment(pixels, self._config, random)
            made.append(Sample(number, image_id, *crops, broken=broken))
        return made

    def close(self) -> None:
        """End threads and child."""
        self._reader.close()
        self._decoding.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def _pixels(self, number: int) -> tuple[int, np.ndarray, list[tuple[int, str]]]:
        row, read = self._reads.pop(number)
        broken: list[tuple[int, str]] = []
        for attempt in range(REPLACEMENTS + 1):
            image_id = int(self._index.rows[row]["image_id"])
            try:
                return image_id, self._decoder.decode(read.result(), self._shrink_to), broken
            except (OSError, DecodeError) as error:
                broken.append((image_id, error.reason if isinstance(error, DecodeError) else f"unreadable: {error}"))
            draw = hash_keys(np.array([number], np.uint64), self._seed, f"replacement:{attempt}") >> np.uint64(24)
            row = int(self._order.rows(draw.astype(np.int64))[0])
            (read,) = self._reader.submit([row])
        raise UserError(
            f"{self._config.source}: {len(broken)} images one after the other cannot be used, the last one "
            f"{broken[-1][0]} ({broken[-1][1]}); look whether its files are still there and whole",
            exit_code=1,
        )


def stack(samples: Sequence[Sample]) -> dict[str, Any]:
    """Crop-major arrays of some samples."""
    drawn = [sample.drawn for sample in samples if sample.drawn is not None]
    left = {"drawn": np.stack(drawn, axis=1).reshape(-1, drawn[0].shape[1])} if drawn else {}
    return left | {
        "large": np.stack([sample.large for sample in samples], axis=1).reshape(-1, *samples[0].large.shape[1:]),
        "small": np.stack([sample.small for sample in samples], axis=1).reshape(-1, *samples[0].small.shape[1:]),
        "image_ids": np.array([sample.image_id for sample in samples], np.int64),
        "sample_numbers": np.array([sample.number for sample in samples], np.int64),
        "broken": [entry for sample in samples for entry in sample.broken],
    }
