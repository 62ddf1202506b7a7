"""From a stream of samples to the batches of one process: which samples, in which form, made by whom.

The global batch of step s is samples [s B, (s + 1) B) of an endless stream. Process r of w holds a contiguous part of
it, in `accumulate` micro-batches; groups of `group_size` samples never straddle two of them. What is drawn depends on
(seed, sample number) alone.
"""

import atexit
import itertools
import logging
import multiprocessing
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from curation import storage
from curation.errors import UserError
from training.data.chunks import ChunkOrder, ChunkReader, Lanes, chunks_of
from training.data.config import DataConfig
from training.data.index import Index, open_index
from training.data.masking import group_masks
from training.data.reading import Reader, check_locations
from training.data.samples import SampleMaker, stack
from training.data.sampling import Order, order_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one process gets for one micro-step; crop-major: all samples' first crop, then all samples' second."""

    global_crops: Tensor
    """(2 b, 3, H, W) float32, normalised; where `drawn` says what is left to do, uint8."""
    local_crops: Tensor
    """(local_crops b, 3, h, w), as well."""
    masks: Tensor
    """(2 b, patches) bool, all False for crops that are not masked."""
    image_ids: Tensor
    """(b,) int64."""
    sample_numbers: Tensor
    """(b,) int64: position in the stream, step * global batch + index in the global batch."""
    replaced: int
    """Broken images that were skipped and replaced in this micro-batch."""
    drawn: Tensor | None = None
    """((2 + local_crops) b, 11) float32, on the CPU: `training.finishing`'s numbers of all crops."""


def micro_batch_size(global_batch: int, world_size: int, accumulate: int, group_size: int) -> int:
    """Samples of one micro-batch. Raises UserError where the numbers do not divide."""
    if global_batch % (world_size * accumulate):
        raise UserError(
            f"a global batch of {global_batch} cannot be cut into {world_size} processes x {accumulate} accumulated "
            "micro-batches; choose a multiple"
        )
    size = global_batch // (world_size * accumulate)
    if size % group_size:
        raise UserError(
            f"a micro-batch of {size} ({global_batch} over {world_size} processes x {accumulate} micro-batches) is "
            f"not a multiple of group_size {group_size}; choose another batch, group_size or number of processes"
        )
    return size


@dataclass(frozen=True)
class Share:
    """Which part of the stream a process makes."""

    global_batch: int
    group_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    @property
    def size(self) -> int:
        return micro_batch_size(self.global_batch, self.world_size, self.accumulate, self.group_size)

    @property
    def lanes(self) -> Lanes:
        """Of the global batch, whatever the processes."""
        return Lanes(self.global_batch // self.group_size, self.group_size)

    def numbers(self, micro_batch: int) -> range:
        """Sample numbers of this process's micro-batch, counted from its first of step 0."""
        step, part = divmod(micro_batch, self.accumulate)
        first = step * self.global_batch + (self.rank * self.accumulate + part) * self.size
        return range(first, first + self.size)


def batches(
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    group_size: int,
    patch_size: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    device: Any = "cpu",
) -> Iterator[Batch]:
    """Endless: step after step from `first_step`, `accumulate` micro-batches each. Tensors on `device`.

    Raises UserError, before the first batch, for a source without images, with images that are not where it says, or
    with fewer than a batch.
    """
    share = Share(global_batch, group_size, rank, world_size, accumulate)
    _ = share.size
    for name in ("global_size", "local_size"):
        if getattr(config, name) % patch_size:
            raise UserError(f"data.{name}: {getattr(config, name)} is not a multiple of the patch size {patch_size}")
    index = open_index(config.source, config.index_folder)
    _tell_hidden(index, config, first_step if rank == 0 else None)
    if len(index) < global_batch:
        raise UserError(
            f"{config.source}: {len(index):,} images, fewer than one global batch of {global_batch:,}; "
            "choose a smaller batch or more images"
        )
    check_locations(index)
    order_of(config, index, seed)  # what it needs of the source is looked for, and written beside the index, here
    return _stream(config, index, share, seed, patch_size, first_step * accumulate, torch.device(device))


def _tell_hidden(index: Index, config: DataConfig, first_step: int | None) -> None:
    """Say what is left out; a resumed training draws from then on in the order that is that of the rest."""
    out = len(index.hidden)
    if not out or first_step is None:
        return
    log.info(
        "%s: %s hidden in the run (forgotten, or dropped by an auditor): they are not trained on",
        config.source,
        f"{out:,} images are" if out > 1 else "1 image is",
    )
    if first_step:
        log.info(
            "if images were hidden since this training began, it goes on from step %d in the order of the %s that are "
            "left, not in the one it began with",
            first_step,
            f"{len(index):,}",
        )


class MicroBatches(torch.utils.data.Dataset[Any]):
    """Micro-batch by its number, as uint8 arrays; made whole by one worker."""

    def __init__(
        self, config: DataConfig, index: Index, share: Share, seed: int, patch_size: int, spool: str | None
    ) -> None:
        """spool: a folder for chunks of packed shards that are far away."""
        self._spool = spool
        self._config, self._index, self._share, self._seed = config, index, share, seed
        self._grid = config.global_size // patch_size
        self._maker: SampleMaker | None = None

    def __getitem__(self, micro_batch: int) -> dict[str, Any]:
        if self._maker is None:  # in the worker: threads, files and mapped weights do not travel
            order = order_of(self._config, self._index, self._seed, self._share.lanes)
            self._maker = SampleMaker(self._config, self._index, order, self._seed, self._reader(order))
        worker = get_worker_info()
        following = self._share.numbers(micro_batch + (worker.num_workers if worker else 1))
        numbers = self._share.numbers(micro_batch)
        try:
            made = stack(self._maker.make(numbers, following))
        except UserError as error:  # the loader would wrap it in a traceback
            return {"error": error}
        found = {name: value if name == "broken" else torch.from_numpy(value) for name, value in made.items()}
        return {**found, "masks": torch.from_numpy(self._masks(numbers))}

    def close(self) -> None:
        """End the maker of this process."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None

    def _reader(self, order: Order) -> Reader:
        config, lanes = self._config, self._share.lanes
        if self._spool is None or not isinstance(order, ChunkOrder):
            return Reader(self._index, config.reads_in_flight)
        kept = 4 + 2 * config.shuffle_chunks * -(-lanes.count // self._share.world_size)
        chunks = chunks_of(config, len(self._index), lanes)
        return ChunkReader(self._index, config.reads_in_flight, chunks, self._spool, kept)

    def _masks(self, numbers: range) -> np.ndarray:
        size = self._share.group_size
        config = self._config
        groups = [
            group_masks(self._seed, number // size, size, self._grid, config.mask_probability, config.mask_ratio)
            for number in numbers[::size]
        ]
        return np.concatenate(groups, axis=1).reshape(2 * len(numbers), -1)


def _stream(
    config: DataConfig, index: Index, share: Share, seed: int, patch_size: int, first: int, device: torch.device
) -> Iterator[Batch]:
    far = index.listing.packed and not storage.is_local(index.listing.root)
    spool = tempfile.mkdtemp(prefix="lvd-curate-") if far else None
    try:
        maker = MicroBatches(config, index, share, seed, patch_size, spool)
        yield from _finished(_raw(maker, config, first, device), config, device)
    finally:
        if spool is not None:
            shutil.rmtree(spool, ignore_errors=True)


def _finished(micro_batches: Iterator[dict[str, Any]], config: DataConfig, device: torch.device) -> Iterator[Batch]:
    scale = torch.tensor(config.std, device=device).mul(255).reciprocal().view(1, 3, 1, 1)
    shift = torch.tensor(config.mean, device=device).div(torch.tensor(config.std, device=device)).view(1, 3, 1, 1)

    def normalised(crops: Tensor) -> Tensor:
        return crops.to(device, non_blocking=True).float().mul_(scale).sub_(shift)

    for made in micro_batches:
        if "error" in made:
            raise made["error"]
        for image_id, reason in made["broken"]:
            log.info("image %d of %s is skipped: %s", image_id, config.source, reason)
        large, small, drawn = made["large"], made["small"], made.get("drawn")
        yield Batch(
            normalised(large) if drawn is None else large.to(device, non_blocking=True),
            normalised(small) if drawn is None else small.to(device, non_blocking=True),
            made["masks"].to(device, non_blocking=True),
            made["image_ids"],
            made["sample_numbers"],
            len(made["broken"]),
            drawn,
        )


def _raw(maker: MicroBatches, config: DataConfig, first: int, device: torch.device) -> Iterator[dict[str, Any]]:
    if not config.workers:
        try:
            for micro_batch in itertools.count(first):
                with _OneThread():
                    made = maker[micro_batch]
                yield made
        finally:
            maker.close()
        return
    # A fork of the training's process would inherit the locks of its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.data.batches"])
    _start_fork_server()
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=_From(first),
        num_workers=config.workers,
        prefetch_factor=config.prefetch,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        multiprocessing_context=context,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise UserError(
            "a worker of the data loader was killed, most likely for want of memory; use fewer data.workers or a "
            "smaller data.prefetch, and run the same command again to go on",
            exit_code=1,
        ) from error


class _From(torch.utils.data.Sampler[int]):
    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._first)


class _OneThread:
    """torch's threads cost more than they bring on images of this size, and the training wants them back."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def _start_fork_server() -> None:
    """With SIGTERM ignored, which it inherits: where a scheduler ends the whole process group, its death would count as
    the workers'."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    if threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGTERM, former)


def _start_worker(_: int) -> None:
    import cv2

    # A signal to the whole process group is the training's to answer: it saves first, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _end_workers() -> None:
    """Of streams that nobody closed: they ignore SIGTERM, and at exit multiprocessing would wait for them forever."""
    for child in multiprocessing.active_children():
        if isinstance(child, ForkServerProcess):
            child.kill()
