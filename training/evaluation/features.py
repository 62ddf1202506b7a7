"""The features of a labelled set: images decoded and prepared by worker processes, encoded in this one."""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from curation.errors import UserError
from embeddings.decoding import DecodeError, Decoder
from training.data.reading import Reader
from training.evaluation.encoders import Encoder
from training.evaluation.labelled import LabelledSet

READS_IN_FLIGHT = 16


@dataclass(frozen=True)
class FeatureSet:
    """values: (n, d) float32, labels and image_ids: (n,) int64, of the images that could be decoded."""

    values: np.ndarray
    labels: np.ndarray
    image_ids: np.ndarray
    classes: tuple[str, ...]
    broken: int

    def __len__(self) -> int:
        return len(self.values)


def extract(
    encoder: Encoder,
    images: LabelledSet,
    *,
    workers: int = 0,
    embed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> FeatureSet:
    """Features in the order of `images`. embed: another method of the encoder. Raises UserError if none can be used."""
    values, kept = [], []
    for positions, prepared in _prepared(encoder, images, workers):
        if len(positions):
            values.append((embed or encoder.embed)(prepared))
            kept.append(positions)
    if not kept:
        raise UserError(f"{images.index.listing.path}: none of its {len(images):,} labelled images can be decoded", 1)
    chosen = np.concatenate(kept)
    return FeatureSet(
        np.concatenate(values),
        images.labels[chosen],
        images.image_ids[chosen],
        images.classes,
        len(images) - len(chosen),
    )


def _prepared(encoder: Encoder, images: LabelledSet, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    chunks = _Chunks(encoder.prepare, images, encoder.batch_size)
    if not workers:
        try:
            yield from (chunks[i] for i in range(len(chunks)))
        finally:
            chunks.close()
        return
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context("forkserver"),
        collate_fn=as_it_is,
    )
    yield from loader


def as_it_is(item: Any) -> Any:
    """Chunks as they are: arrays, not tensors."""
    return item


class _Chunks(torch.utils.data.Dataset[Any]):
    """(positions, prepared) of the i-th `size` images; what cannot be decoded is missing."""

    def __init__(self, prepare: Callable[[np.ndarray], np.ndarray], images: LabelledSet, size: int) -> None:
        self._prepare, self._images, self._size = prepare, images, size
        self._tools: tuple[Reader, Decoder] | None = None

    def __len__(self) -> int:
        return (len(self._images) + self._size - 1) // self._size

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._tools is None:
            self._tools = (Reader(self._images.index, READS_IN_FLIGHT), Decoder())
        reader, decoder = self._tools
        positions = np.arange(number * self._size, min(len(self._images), (number + 1) * self._size))
        reads = reader.submit(self._images.rows[positions].tolist())
        found, kept = [], []
        for position, read in zip(positions.tolist(), reads, strict=True):
            try:
                found.append(self._prepare(decoder.decode(read.result())))
            except (OSError, DecodeError):
                continue
            kept.append(position)
        return np.array(kept, np.int64), np.stack(found) if found else np.empty(0, np.uint8)

    def close(self) -> None:
        """End threads and child of this process."""
        if self._tools is not None:
            self._tools[0].close()
            self._tools[1].close()
            self._tools = None
