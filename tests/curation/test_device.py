"""Products on a device nominate, the definition decides: results are those of the CPU, byte for byte.

torch on the CPU stands for the GPU; what differs there is the order in which products are summed.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import gpu_curation
from curation import clusters, device, products
from curation.clusters import ArrayPoints
from curation.device import Device
from curation.duplicates.members import Members, file_pieces
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, serial
from curation.duplicates.tiles import exact_join, join_tiles
from curation.errors import UserError
from curation.nearest import Grouping, nearest_centroid
from curation.neighbours import nearest_neighbours
from curation.order import generator
from curation.vectors import embeddings_table

SMALL = 1 << 15
"""Bytes of a block that cut every input of these tests many times."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit(rows: int, dimension: int, kind: str, seed: int = 0) -> np.ndarray:
    """Unit vectors as float16: at random, in groups of copies and equals, or such that many products are one number."""
    random = generator(seed, "vectors of a test")
    if kind == "ties":
        # Four coordinates of one half: products are multiples of a quarter, with no rounding at all.
        found = np.zeros((rows, dimension), np.float16)
        for row in found:
            row[random.choice(min(dimension, 12), 4, replace=False)] = random.choice([-0.5, 0.5], 4)
        return found
    found = random.standard_normal((rows, dimension))
    if kind == "copies":
        found = found[random.integers(0, rows // 6, rows)] + 0.4 * random.random((rows, 1)) * found
        found[::5] = found[random.integers(0, 9, len(found[::5])) * 5]
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def joined(left: np.ndarray, right: np.ndarray, threshold: float, starts: np.ndarray, on: Device | None) -> np.ndarray:
    """(m, 3) rows, columns and bits of the similarity, by row and column."""
    wide = left.astype(np.float32), right.astype(np.float32)
    parts = list(products.pairs_above(*wide, threshold, starts, half=True, on=on))
    rows, columns, values = ([np.empty(0, np.int64)] + [part[k] for part in parts] for k in range(3))
    bits = np.concatenate(values).astype(np.float32).view(np.int32)
    found = np.stack([np.concatenate(rows), np.concatenate(columns), bits], axis=1)
    return found if on is None or on.block_bytes is None else found[np.lexsort(found.T[1::-1])]


@pytest.mark.parametrize("kind", ["random", "copies", "ties"])
@pytest.mark.parametrize("block_bytes", [None, SMALL])
@pytest.mark.parametrize("half", ["whole", "upper", "some"])
def test_pairs_above_a_threshold_are_those_of_the_cpu(kind: str, block_bytes: int | None, half: str) -> None:
    left, right = unit(610, 48, kind), unit(430, 48, kind, 1)
    starts = np.zeros(610, np.int64)
    if half == "upper":
        right, starts = left, np.arange(1, 611)
    if half == "some":
        starts = generator(3, "starts").integers(0, 500, 610)
    # Thresholds that pairs of `ties` meet exactly, and one that a pair of the others meets.
    exact = products.defined(
        left.astype(np.float32), right.astype(np.float32), np.arange(9), np.arange(20, 29), half=True
    )
    for threshold in (0.25, 0.5, -0.25, float(exact.max())):
        expected = joined(left, right, threshold, starts, None)
        assert joined(left, right, threshold, starts, Device("cpu", block_bytes)).tobytes() == expected.tobytes()


def test_every_pair_of_float64_is_nominated_where_products_round_badly() -> None:
    random = generator(0, "rounding")
    # Long vectors of like signs: sums grow large before the last terms come. And pairs just above the threshold.
    x = np.abs(random.standard_normal((300, 1024)))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    for threshold in np.sort(exact[np.triu_indices(300, 1)])[[100, 20_000, -5]]:
        below = float(np.nextafter(threshold, 0))
        found = np.zeros((300, 300), bool)
        for rows, columns in Device("cpu").above(x, x, below - products.margin(1024), np.zeros(300, np.int64)):
            found[rows, columns] = True
        assert not (~found & (exact > below)).any()


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_compare_gives_nothing(rows: int) -> None:
    x, few = unit(8, 16, "random"), unit(8, 16, "random")[:rows]
    assert joined(few, x, 0.999999, np.full(rows, 8), Device("cpu")).shape == (0, 3)
    assert joined(x, few, 2.0, np.zeros(8, np.int64), Device("cpu")).shape == (0, 3)


@pytest.mark.parametrize("kind", ["random", "copies", "ties"])
@pytest.mark.parametrize("block_bytes", [None, SMALL])
def test_nearest_centroids_are_those_of_the_cpu(kind: str, block_bytes: int | None) -> None:
    vectors, centroids = unit(900, 40, kind), unit(130, 40, kind, 1).astype(np.float32)
    centroids[70:90] = centroids[3]  # equal centroids tie for every vector
    centroids[100] = np.nextafter(centroids[4], np.float32(2))  # nearly equal ones for float32
    vectors[:130] = centroids.astype(np.float16)  # zero distances
    labels, squares = nearest_centroid(vectors, centroids)
    with device.lent(Device("cpu", block_bytes)):
        found, distances = nearest_centroid(vectors, centroids)
    assert found.tobytes() == labels.tobytes() and distances.tobytes() == squares.tobytes()
    exact = ((vectors[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    assert np.all(exact[np.arange(len(vectors)), found] <= exact.min(axis=1) + 1e-12)


def test_rows_with_two_equally_near_centroids_go_to_the_first() -> None:
    centroids = np.concatenate([np.eye(8), -np.eye(8), np.eye(8)]).astype(np.float32)
    vectors = np.zeros((9, 8), np.float16)
    vectors[:8] = 0.5 * (np.eye(8) + np.roll(np.eye(8), 1, axis=1))  # halfway between two, each there twice
    with device.lent(Device("cpu")):
        assert nearest_centroid(vectors, centroids)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]


def test_k_means_has_the_same_bytes_on_a_device() -> None:
    points = unit(4000, 16, "copies")
    found = []
    for on in (None, Device("cpu", SMALL)):
        with device.lent(on) if on else device.lent_nothing():
            blocks = ArrayPoints((points[:1500], points[1500:]))
            found.append(clusters.kmeans(blocks, 90, seed=0, purpose="test", iterations=8))
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()
    assert (found[0].objective, found[0].iterations) == (found[1].objective, found[1].iterations)


@pytest.mark.parametrize("block_bytes", [None, SMALL])
@pytest.mark.parametrize("groups", [45, 5])
def test_search_by_groups_has_the_same_bytes_on_a_device(block_bytes: int | None, groups: int) -> None:
    vectors, centroids = unit(3000, 24, "random"), unit(500, 24, "random", 1).astype(np.float32)
    grouping = Grouping.of(generator(0, "groups").integers(0, groups, 500))
    labels, squares = nearest_centroid(vectors, centroids, grouping)
    with device.lent(Device("cpu", block_bytes)):
        found, distances = nearest_centroid(vectors, centroids, grouping)
    assert found.tobytes() == labels.tobytes() and distances.tobytes() == squares.tobytes()


def test_search_by_groups_differs_only_where_rounding_decides_on_the_cpu() -> None:
    vectors, centroids = unit(3000, 24, "random"), unit(500, 24, "copies", 1).astype(np.float32)
    grouping = Grouping.of(generator(0, "groups").integers(0, 45, 500))
    labels, squares = nearest_centroid(vectors, centroids, grouping)
    with device.lent(Device("cpu")):
        found, distances = nearest_centroid(vectors, centroids, grouping)
    other = found != labels
    assert other.mean() < 0.2 and np.allclose(distances[other], squares[other], atol=1e-6)
    assert distances[~other].tobytes() == squares[~other].tobytes()


def stand_in_for_faiss(calls: list[int], failure: str = "") -> Any:
    """FAISS on the CPU behind the interface of the one for GPUs."""
    import faiss

    def knn_gpu(resources: Any, queries: Any, base: Any, count: int, metric: int) -> Any:
        calls.append(count)
        if failure:
            raise RuntimeError(failure)
        return faiss.knn(queries, base, count, metric=metric)

    resources = SimpleNamespace(setTempMemory=lambda size: None)
    return SimpleNamespace(
        StandardGpuResources=lambda: resources, knn_gpu=knn_gpu, METRIC_INNER_PRODUCT=faiss.METRIC_INNER_PRODUCT
    )


@pytest.mark.parametrize("kind", ["random", "copies", "ties"])
@pytest.mark.parametrize("way", ["torch", "small blocks", "faiss", "faiss without memory"])
def test_neighbours_are_those_of_the_cpu(kind: str, way: str) -> None:
    seeds, pool = unit(70, 32, kind), unit(800, 32, kind, 1)
    ids = generator(0, "ids").permutation(10**6)[:800].astype(np.uint64)
    calls: list[int] = []
    on = Device("cpu", SMALL if way == "small blocks" else None)
    if way.startswith("faiss"):
        on.faiss = stand_in_for_faiss(calls, "out of memory" if way.endswith("memory") else "")
    for count in (1, 7, 900):
        expected = nearest_neighbours(seeds, ids, pool, count)
        with device.lent(on):
            found = nearest_neighbours(seeds, ids, pool, count)
        assert found.ids.tobytes() == expected.ids.tobytes()
        assert found.similarity.tobytes() == expected.similarity.tobytes()
    assert len(calls) == {"faiss": 3, "faiss without memory": 1}.get(way, 0)


class Cramped(Device):
    """A device that holds blocks of so many rows, no more."""

    most = 100
    seen: int = 0

    def _there(self, array: np.ndarray) -> Any:
        if array.ndim == 2 and array.dtype == np.float32 and len(array) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.seen = max(self.seen, len(array))
        return super()._there(array)


def test_blocks_are_halved_where_memory_runs_out_and_nothing_changes() -> None:
    left, right = unit(1000, 16, "copies"), unit(90, 16, "copies", 1)
    expected = joined(left, right, 0.5, np.zeros(1000, np.int64), None)
    on = Cramped("cpu")
    assert joined(left, right, 0.5, np.zeros(1000, np.int64), on).tobytes() == expected.tobytes()
    assert 50 < on.seen <= 100


def test_a_device_too_small_for_the_least_block_is_one_sentence() -> None:
    on = Cramped("cpu")
    on.most = 10
    x = unit(200, 16, "random").astype(np.float32)
    for run in (lambda: list(on.above(x, x[:5], 0.5, np.zeros(200, np.int64))), lambda: on.top(x[:5], x, 3)):
        with pytest.raises(
            UserError, match=r"cpu: out of memory with [\d,]+ rows at a time; lower resources\.tasks_per_gpu"
        ):
            run()


def test_other_errors_of_a_device_are_not_taken_for_a_lack_of_memory() -> None:
    x = unit(200, 16, "random").astype(np.float32)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|size"):
        list(Device("cpu").above(x, x[:, :8], 0.5, np.zeros(200, np.int64)))


def test_a_task_that_was_lent_nothing_uses_the_cpu() -> None:
    assert device.current() is None and products.device() is None
    on = Device("cpu")
    with device.lent(on):
        assert device.current() is on
        with device.lent():  # a scheduler lent a GPU, but this process sees none
            assert torch.cuda.is_available() or device.current() is None
    assert device.current() is None


def test_who_computes_on_the_cpu_does_not_import_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "import curation.duplicates.tiles, curation.clusters\n"
        "from curation.neighbours import nearest_neighbours\n"
        "x = np.eye(8, dtype=np.float16)\n"
        "nearest_neighbours(x, np.arange(8, dtype=np.uint64), x, 2)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_make_gpu_imports_needs_neither_numba_nor_faiss_nor_ray() -> None:
    code = (
        "import sys\n"
        "for name in ('numba', 'faiss', 'ray', 'pyarrow', 'torch'): sys.modules[name] = None\n"
        "import benchmarks.gpu_curation, curation.device\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_exact_join_on_a_device_is_that_of_the_cpu(tmp_path: Path) -> None:
    x = unit(900, 32, "copies")
    pq.write_table(embeddings_table(np.arange(900, dtype=np.uint64), x), tmp_path / "part.parquet")
    nodes = np.arange(900, dtype=np.uint32)
    members = Members(tuple(file_pieces(str(tmp_path / "part.parquet"), nodes, None, True, 400)), 32, True, 900)
    forests = []
    for on in (None, Device("cpu", SMALL)):
        with device.lent(on) if on else device.lent_nothing():
            forests.append(exact_join(members, JoinOptions(0.5), Scratch(str(tmp_path / str(len(forests)))), serial))
    assert len(forests[0]) > 100 and forests[0].tobytes() == forests[1].tobytes()
    assert device.is_heavy(join_tiles)


def test_the_measurement_checks_what_it_times() -> None:
    sizes = {"above": (700, 900, 64), "nearest": (700, 300, 64), "search": (700, 600, 64), "top": (600, 900, 64)}
    failures: list[str] = []
    found: dict[str, Any] = {}
    gpu_curation.measured(torch, Device("cpu", SMALL), sizes, failures, 1e9, found)
    assert failures == [] and list(found) == list(sizes)
    assert found["above"]["sampled"] > 50 and found["search"]["share_left_open"] < 0.2

    class TensorFloat(Device):
        def _there(self, array: np.ndarray) -> Any:
            if array.dtype != np.float32:
                return super()._there(array)
            return super()._there((array.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))

    gpu_curation.top(torch, TensorFloat("cpu", SMALL), sizes["top"], failures)
    assert any("are off by" in failure for failure in failures), "products of fewer bits are noticed"
