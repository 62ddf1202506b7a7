"""Products on a GPU: which pairs may be above a threshold, which centroids may be the nearest, the rough top-k.

A device only nominates: full float32 products with a bound on their rounding, and whatever they leave open is decided
by the definition in float64 on the CPU. So output is that of the CPU, byte for byte. The bound is Higham's (2002,
section 3.1): in any order of the terms a dot product of d terms is off by at most d u |x||y|, u = 2^-24; devices are
given twice that, which holds for sums that are cut off instead of rounded, too.

Work runs on a device where the scheduler lent one (`lent`), nowhere else: so torch is imported by workers that use it
alone. Needs torch and numpy. Not measured on a GPU yet; `python -m benchmarks.gpu curation` does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from curation.errors import UserError

UNIT_ROUNDOFF = 2.0**-24
BLOCK_BYTES = 1 << 30
"""Products held at once, at most."""
FREE_SHARE = 16
"""And at most this part of the free memory: so several tasks can share a device."""
LEAST_ROWS = 64
"""Blocks of rows are halved down to here where memory runs out."""
EXTRA_VISITS = 4
"""Groups of centroids looked at beyond those that count."""
FAISS_MOST = 2048
"""The greatest k of FAISS's selection on GPUs."""


def margin(dimension: int) -> float:
    """How far a float32 product of unit vectors may lie from the definition, with room to spare.

    Higham's bound; the factor 4 covers lengths that are not quite 1 and accelerators that round intermediate sums
    towards zero.
    """
    return 4 * dimension * UNIT_ROUNDOFF + 1e-6


def slack(dimension: int, longest: float, longest_centroid: float) -> float:
    """How far half a squared distance to a centroid, less half the vector's own norm, may be off in float32.

    Higham's bound of the product and of the half norm, with eight roundings to spare; for a device it is doubled.
    """
    return (dimension + 8) * UNIT_ROUNDOFF * longest_centroid * (longest + longest_centroid)


def heavy[F: Callable[..., Any]](function: F) -> F:
    """Marks a function whose tasks consist of products: the scheduler lends it a share of a GPU where there is one."""
    function.heavy_products = True  # type: ignore[attr-defined]
    return function


def is_heavy(function: Callable[..., Any]) -> bool:
    """Whether it is marked so."""
    return bool(getattr(function, "heavy_products", False))


@dataclass
class Device:
    """Where products are computed. name: as torch has it; tests say `cpu`."""

    name: str
    block_bytes: int | None = None
    """Bytes of products held at once; None: from the device's free memory."""
    faiss: Any = None
    """FAISS with GPU support; None: torch selects the top-k."""
    _checked: bool = field(default=False, repr=False)
    _resources: Any = field(default=None, repr=False)

    def above(
        self, left: np.ndarray, right: np.ndarray, bound: float, starts: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (i, j), j >= starts[i], whose float32 product is above `bound`: (m,) int64 rows and columns.

        left: (a, d), right: (b, d) float32. Yields what is found row-major, in ascending rows; only where `right`
        itself is larger than a block they begin anew for each part of its rows.
        """
        torch = self._torch()
        for first, columns in self._parts(right):
            some = np.flatnonzero(starts < first + len(columns))
            last = int(some[-1]) + 1 if len(some) else 0

            def run(rows: slice, columns: Any = columns, first: int = first) -> tuple[np.ndarray, np.ndarray]:
                begins = starts[rows].astype(np.int64) - first
                low = max(0, int(begins.min()))
                found = self._there(left[rows]) @ columns[low:].T > bound
                if int(begins.max()) > low:
                    found &= torch.arange(low, len(columns), device=self.name) >= self._there(begins)[:, None]
                at, column = torch.nonzero(found, as_tuple=True)
                return at.cpu().numpy() + rows.start, column.cpu().numpy() + (low + first)

            # A product takes 4 bytes, what it is compared to 2, and a pair found 16: few are.
            for rows, found in self._blocks(last, 8 * len(columns), run):
                if len(rows):
                    yield rows, found

    def nearest(
        self, vectors: np.ndarray, centroids: np.ndarray, halves: np.ndarray, slack: float
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """The nearest of all centroids, and the rows where float32 does not tell.

        vectors: (n, d), centroids: (k, d), halves: (k,) half squared lengths, all float32; slack: bound on the rounding
        of halves - products. Yields (rows, (r,) int64 nearest, (u,) int64 the unsure among the rows, (u, k) bool which
        centroids are open for these: those within twice the slack of the least).
        """
        torch = self._torch()
        there, lengths = self._held(centroids), self._held(halves)

        def run(rows: slice) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
            scores = torch.addmm(lengths, self._there(vectors[rows]), there.T, alpha=-1)
            least, best = scores.min(dim=1)
            open_ = scores <= (least + 2 * slack)[:, None]
            unsure = torch.nonzero(open_.sum(dim=1) > 1)[:, 0]
            return rows, best.cpu().numpy(), unsure.cpu().numpy(), open_[unsure].cpu().numpy()

        yield from self._blocks(len(vectors), 8 * len(centroids), run)

    def search(
        self,
        vectors: np.ndarray,
        centroids: np.ndarray,
        halves: np.ndarray,
        starts: np.ndarray,
        means: np.ndarray,
        visits: int,
        slack: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid in the `visits` groups whose means are nearest, and the rows where float32 tells it.

        vectors: (n, d); centroids: (k, d), those of group g at starts[g] : starts[g + 1]; halves: (k,) half squared
        lengths; means: (t, d), float32 all. Returns ((n,) int64 nearest, (n,) bool: no other centroid lies within twice
        the slack of it, and its group is among the nearest by more than that).
        """
        torch = self._torch()
        there, lengths, coarse = self._held(centroids), self._held(halves), self._held(means)
        mean_lengths = (coarse * coarse).sum(dim=1) / 2
        # Groups that rounding may bring among the nearest are looked at, too: mostly another centroid wins anyway.
        looked_at = min(visits + EXTRA_VISITS, len(means))

        def run(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            part = self._there(vectors[rows])
            scores = torch.addmm(mean_lengths, part, coarse.T, alpha=-1)
            near, visited = torch.topk(scores, min(looked_at + 1, len(means)), dim=1, largest=False)
            visited = visited[:, :looked_at].reshape(-1)
            order = torch.argsort(visited, stable=True)
            ends = np.cumsum(torch.bincount(visited, minlength=len(means)).cpu().numpy())
            best = torch.empty_like(visited)
            least = part.new_full((len(visited), 2), torch.inf)
            for group, end in enumerate(ends):
                begin = ends[group - 1] if group else 0
                if begin == end:
                    continue
                places, here = order[begin:end], slice(int(starts[group]), int(starts[group + 1]))
                scores = torch.addmm(lengths[here], part[places // looked_at], there[here].T, alpha=-1)
                low, found = torch.topk(scores, min(2, scores.shape[1]), dim=1, largest=False)
                best[places] = found[:, 0] + here.start
                least[places, : low.shape[1]] = low
            least, best = least.view(len(part), -1), best.view(len(part), -1)
            lowest, winner = least[:, ::2].min(dim=1, keepdim=True)
            sure = (least <= lowest + 2 * slack).sum(dim=1) == 1
            if visits < len(means):
                sure &= near.gather(1, winner)[:, 0] + 2 * slack < near[:, visits]
            if looked_at < len(means):
                sure &= near[:, visits - 1] + 2 * slack < near[:, looked_at]
            return best.gather(1, winner)[:, 0].cpu().numpy(), sure.cpu().numpy()

        # The rows themselves, those of one group again, the scores of the means, and what is told of each visit.
        found = list(self._blocks(len(vectors), 8 * (vectors.shape[1] + len(means)) + 48 * looked_at, run))
        return np.concatenate([best for best, _ in found]), np.concatenate([sure for _, sure in found])

    def top(self, queries: np.ndarray, base: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(m, count) float32 greatest products of each query, descending, and (m, count) int64 rows of `base`.

        queries: (m, d), base: (n, d) float32, n >= count.
        """
        torch = self._torch()
        if self.faiss is not None and count <= FAISS_MOST:
            try:
                return self._by_faiss(queries, base, count)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self.faiss = self._resources = None  # torch goes on, in smaller blocks
        best = np.full((len(queries), 0), -np.inf, np.float32)
        place = np.zeros((len(queries), 0), np.int64)
        for first, columns in self._parts(base):

            def run(rows: slice, columns: Any = columns) -> tuple[np.ndarray, np.ndarray]:
                products = self._there(queries[rows]) @ columns.T
                found, at = torch.topk(products, min(count, len(columns)), dim=1)
                return found.cpu().numpy(), at.cpu().numpy()

            blocks = list(self._blocks(len(queries), 8 * len(columns), run))
            best = np.concatenate([best, np.concatenate([found for found, _ in blocks])], axis=1)
            place = np.concatenate([place, np.concatenate([at + first for _, at in blocks])], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :count]
            best, place = np.take_along_axis(best, order, axis=1), np.take_along_axis(place, order, axis=1)
        return best, place

    def give_back(self) -> None:
        """Leave the memory that is held for later to others."""
        import torch

        self._resources = None
        if self.name != "cpu":
            torch.cuda.empty_cache()

    def _by_faiss(self, queries: np.ndarray, base: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self._resources is None:
            self._resources = self.faiss.StandardGpuResources()
            self._resources.setTempMemory(self._room() // 4)
        metric = self.faiss.METRIC_INNER_PRODUCT
        found, at = self.faiss.knn_gpu(self._resources, queries, base, count, metric=metric)
        return np.asarray(found, np.float32), np.asarray(at, np.int64)

    def _torch(self) -> Any:
        import torch

        # Full float32: TensorFloat-32 keeps 10 bits of the factors and would break every bound.
        torch.backends.cuda.matmul.allow_tf32 = False
        if not self._checked and self.name != "cpu":
            self._check(torch)
            self._checked = True
        return torch

    def _check(self, torch: Any) -> None:
        """Raises UserError where factors lose bits although told not to (NVIDIA_TF32_OVERRIDE does that)."""
        fine = np.eye(1024, dtype=np.float32) * np.float32(1 + 2.0**-20)
        whole = np.eye(1024, dtype=np.float32)
        right = np.array_equal((self._held(fine) @ self._held(whole)).cpu().numpy(), fine)
        if right and self.faiss is not None:
            right = bool((self._by_faiss(fine, whole, 1)[0] == fine.max()).all())
        if not right:
            raise UserError(
                f"{torch.cuda.get_device_name(self.name)} does not multiply in full float32: unset "
                "NVIDIA_TF32_OVERRIDE, or set resources.tasks_per_gpu: 0 to compute on the CPU",
                exit_code=1,
            )

    def _there(self, array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.name)

    def _held(self, array: np.ndarray) -> Any:
        """Something that blocks are compared with; there is nothing to halve where it does not fit."""
        try:
            return self._there(array)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise self._full(len(array)) from error

    def _parts(self, array: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(first row, some rows there): all of them where they take no more than a block."""
        step = max(LEAST_ROWS, self._room() // max(1, array[:1].nbytes))
        for first in range(0, len(array), step):
            yield first, self._held(array[first : first + step])

    def _blocks[T](self, count: int, row_bytes: int, run: Callable[[slice], T]) -> Iterator[T]:
        """run(rows) for all rows, as many at a time as there is room for, half as many whenever there was not."""
        import torch

        size = max(LEAST_ROWS, self._room() // max(1, row_bytes))
        start = 0
        while start < count:
            found: T | None = None
            failure: Exception | None = None
            try:
                found = run(slice(start, min(count, start + size)))
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # the frames hold what takes the memory
            if failure is not None:
                if size <= LEAST_ROWS:
                    raise self._full(size) from failure
                size = max(LEAST_ROWS, min(size, count - start) // 2)
                torch.cuda.empty_cache()
                continue
            start += size
            yield found  # type: ignore[misc]

    def _room(self) -> int:
        """Bytes of products to hold at once."""
        if self.block_bytes is not None:
            return self.block_bytes
        if self.name == "cpu":
            return 1 << 26
        import torch

        return int(min(BLOCK_BYTES, torch.cuda.mem_get_info(self.name)[0] // FREE_SHARE))

    def _full(self, rows: int) -> UserError:
        return UserError(
            f"{self.name}: out of memory with {rows:,} rows at a time; lower resources.tasks_per_gpu, or set it to 0 "
            "to compute on the CPU",
            exit_code=1,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own error, a product library's, or FAISS's."""
    return any(words in str(error).lower() for words in ("out of memory", "alloc_failed", "allocmemory"))


_LENT: ContextVar[Callable[[], Device | None] | None] = ContextVar("lent", default=None)


def current() -> Device | None:
    """The device that was lent to this task; None: the CPU."""
    lender = _LENT.get()
    return None if lender is None else lender()


@contextmanager
def lent(device: Device | None = None) -> Iterator[None]:
    """What runs inside may use the device; None: the GPU that this process sees, if any. Its memory is given back."""
    before = _LENT.set(_visible if device is None else lambda: device)
    try:
        yield
    finally:
        _LENT.reset(before)
        if device is None and _visible.cache_info().currsize and (mine := _visible()):
            mine.give_back()


@contextmanager
def lent_nothing() -> Iterator[None]:
    """What runs inside uses the CPU."""
    before = _LENT.set(None)
    try:
        yield
    finally:
        _LENT.reset(before)


@lru_cache(maxsize=1)
def _visible() -> Device | None:
    """The first GPU that this process sees; it stays with a process that is lent another one later."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Device("cuda:0", faiss=_faiss_for_gpus())


def _faiss_for_gpus() -> Any:
    from curation.search import GPU_DISTRIBUTIONS, installed_faiss, require_faiss

    if not GPU_DISTRIBUTIONS & set(installed_faiss()):
        return None
    faiss = require_faiss()
    return faiss if hasattr(faiss, "knn_gpu") and faiss.get_num_gpus() else None
