"""The rivals of the near-duplicate join on the same vectors: exact products, FAISS's indexes, SemDeDup's one cell.

    python -m benchmarks.rivals --data /tmp/hard-125k --methods exact,ivf_flat --lists 2048 \
        --out benchmarks/results/rivals-hard-125k.json

Each method runs in a process of its own on one thread: reading, training, assignment, search, exact decision about
the pairs, components. What a skilled user of FAISS would do is done: spherical training on a sample, the assignment
computed once for adding and searching, queries in the order of their lists, range search instead of a k where an
index has one (a k cuts the pairs of large groups), exact re-ranking of what compressed indexes nominate. Visits
(`nprobe`) and radii are chosen so that `--recall` of the sample's true pairs are nominated, from either side; choosing
them is not counted. Results of several calls gather in one file, by method and setting.
"""

# The number of threads is set before numpy is imported.
import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine

if __name__ == "__main__":
    machine.one_thread()

import numpy as np

from benchmarks import data, truth

BATCH = 8192
TILE = 4096
SLACK = 1e-3
"""Below the threshold to which an index's own float32 or float16 products are trusted to nominate."""


@dataclass(frozen=True)
class Setting:
    """One method and what it was tuned to; None where a method has no such thing."""

    method: str
    lists: int | None = None
    visits: int | None = None
    neighbours: int | None = None
    radius: float | None = None
    coarse: str = "flat"
    points_per_list: int = 40
    rounds: int = 8
    code_bytes: int = 64
    links: int = 32
    depth: int = 64
    share: float = 1.0

    def tuned(self, **found: Any) -> "Setting":
        return Setting(**(asdict(self) | found))


Found = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""(rows, rows, scores) of nominated pairs, in any order, repeats allowed."""


# ---- exact --------------------------------------------------------------------------------------------------------


def exact(rows: np.ndarray, setting: Setting, threshold: float, phases: machine.Phases) -> Found:
    """Blocked float32 products of the upper half; of a share of the tiles, where share < 1."""
    tiles = [(a, b) for a in range(0, len(rows), TILE) for b in range(a, len(rows), TILE)]
    if setting.share < 1:
        chosen = np.random.default_rng(0).choice(len(tiles), round(setting.share * len(tiles)), replace=False)
        tiles = [tiles[i] for i in sorted(chosen.tolist())]
    out = np.empty((TILE, TILE), np.float32)
    for first, second in tiles:
        left, right = rows[first : first + TILE], rows[second : second + TILE]
        with phases("search"):
            scores = np.matmul(left, right.T, out=out[: len(left), : len(right)])
            at = np.flatnonzero(scores > threshold)
            i, j = np.divmod(at, len(right))
            i, j, s = i + first, j + second, scores.reshape(-1)[at] if scores.flags.c_contiguous else scores[i, j]
        yield i, j, s


# ---- inverted lists -----------------------------------------------------------------------------------------------


def ivf(rows: np.ndarray, setting: Setting, threshold: float, phases: machine.Phases) -> Found:
    """IVF-Flat, SQfp16, PQ, PQ FastScan, RaBitQ: per-query scans by range or k; IVF-Flat also by big batches."""
    index, lists, scores = filled(rows, setting, phases)
    with phases("search"):
        order = np.argsort(lists[:, 0], kind="stable")
    if setting.method == "ivf_flat_big_batch":
        yield from _big_batch(index, rows, lists, setting, phases)
        return
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        with phases("search"):
            chosen, coarse = lists[batch].astype(np.int64), scores[batch]
            if setting.method == "ivf_pq_fastscan":
                limits, near, other = index.range_search(rows[batch], setting.radius)
                i, j = batch[np.repeat(np.arange(len(batch)), np.diff(limits.astype(np.int64)))], other
            elif setting.neighbours is None:
                limits, near, other = index.range_search_preassigned(rows[batch], setting.radius, chosen, coarse)
                i, j = batch[np.repeat(np.arange(len(batch)), np.diff(limits.astype(np.int64)))], other
            else:
                near, other = index.search_preassigned(rows[batch], setting.neighbours, chosen, coarse)
                keep = (other >= 0) & (near > setting.radius)
                i, j, near = batch[np.nonzero(keep)[0]], other[keep], near[keep]
        yield i, j, near


def _big_batch(index: Any, rows: np.ndarray, lists: np.ndarray, setting: Setting, phases: machine.Phases) -> Found:
    """faiss.contrib.big_batch_search: one product per list and the queries that visit it, heaps of k."""
    from faiss.contrib.big_batch_search import big_batch_search

    with phases("search"):
        near, other = big_batch_search(
            index, rows, setting.neighbours, method="knn_function", q_assign=lists, threaded=0
        )
        keep = (other >= 0) & (near > setting.radius)
    yield np.nonzero(keep)[0], other[keep], near[keep]


def filled(rows: np.ndarray, setting: Setting, phases: machine.Phases) -> tuple[Any, np.ndarray, np.ndarray]:
    """(index with all rows in it, (n, visits) int32 lists of each row, nearest first, (n, visits) float32 scores)."""
    import faiss

    faiss.omp_set_num_threads(1)
    with phases("training"):
        index = trained(rows, setting)
    index.nprobe = setting.visits
    if setting.method == "ivf_pq_fastscan":
        # Its packed lists are filled by `add` alone, and its range search looks for the lists itself.
        with phases("adding"):
            for first in range(0, len(rows), BATCH):
                index.add(rows[first : first + BATCH])
        return index, np.zeros((len(rows), 1), np.int32), np.zeros((len(rows), 1), np.float32)
    lists = np.empty((len(rows), setting.visits), np.int32)
    scores = np.empty((len(rows), setting.visits), np.float32)
    with phases("assignment"):
        for first in range(0, len(rows), BATCH):
            block = rows[first : first + BATCH]
            scores[first : first + BATCH], lists[first : first + BATCH] = index.quantizer.search(block, setting.visits)
    with phases("adding"):
        for first in range(0, len(rows), BATCH):
            block = np.ascontiguousarray(rows[first : first + BATCH])
            home = np.ascontiguousarray(lists[first : first + BATCH, 0], np.int64)
            index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(home))
    return index, lists, scores


def trained(rows: np.ndarray, setting: Setting) -> Any:
    """The index, empty."""
    import faiss

    faiss.omp_set_num_threads(1)
    dimension = rows.shape[1]
    names = {
        "ivf_flat": "Flat",
        "ivf_flat_big_batch": "Flat",
        "ivf_sqfp16": "SQfp16",
        "ivf_pq": f"PQ{setting.code_bytes}",
        "ivf_pq_fastscan": f"PQ{2 * setting.code_bytes}x4fs",
        "ivf_rabitq": "RaBitQ",
    }
    coarse = f"IVF{setting.lists}_HNSW32" if setting.coarse == "hnsw" else f"IVF{setting.lists}"
    index = faiss.index_factory(dimension, f"{coarse},{names[setting.method]}", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.spherical = setting.rounds, True
    index.cp.max_points_per_centroid = setting.points_per_list
    if setting.coarse == "hnsw":
        index.quantizer.hnsw.efConstruction = 100
        index.quantizer.hnsw.efSearch = max(2 * (setting.visits or 64), 64)
    if setting.method == "ivf_pq":  # else its 64 k-means take longer than everything beside
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = setting.rounds, 64
    sample = min(len(rows), setting.points_per_list * setting.lists)
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), sample, replace=False))
    index.train(rows[chosen])
    return index


# ---- graph --------------------------------------------------------------------------------------------------------


def hnsw(rows: np.ndarray, setting: Setting, threshold: float, phases: machine.Phases) -> Found:
    """Built and searched with the rows in their own order; depth: efConstruction and efSearch at least k."""
    import faiss

    faiss.omp_set_num_threads(1)
    assert setting.neighbours is not None
    index = faiss.IndexHNSWFlat(rows.shape[1], setting.links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = setting.depth
    with phases("adding"):
        index.add(rows)
    index.hnsw.efSearch = max(setting.depth, setting.neighbours)
    for first in range(0, len(rows), BATCH):
        with phases("search"):
            near, other = index.search(rows[first : first + BATCH], setting.neighbours)
            keep = (other >= 0) & (near > threshold - SLACK)
        yield np.nonzero(keep)[0] + first, other[keep], near[keep]


# ---- one cell -----------------------------------------------------------------------------------------------------


def one_cell(rows: np.ndarray, setting: Setting, threshold: float, phases: machine.Phases) -> Found:
    """SemDeDup (arXiv 2303.09540): k-means, then all pairs inside each cluster and none between two."""
    index, lists, _ = filled(rows, setting.tuned(method="ivf_flat", visits=1), phases)
    del index
    with phases("search"):
        order = np.argsort(lists[:, 0], kind="stable")
        bounds = np.searchsorted(lists[order, 0], np.arange(setting.lists + 1))
    for number in range(setting.lists or 0):
        mine = order[bounds[number] : bounds[number + 1]]
        for first in range(0, len(mine), TILE):
            with phases("search"):
                left = mine[first : first + TILE]
                scores = rows[left] @ rows[mine[first:]].T
                i, j = np.nonzero(scores > threshold)
                near = scores[i, j]
                i, j = left[i], mine[first:][j]
            yield i, j, near


METHODS: dict[str, Callable[..., Found]] = {
    "exact": exact,
    "ivf_flat": ivf,
    "ivf_flat_big_batch": ivf,
    "ivf_sqfp16": ivf,
    "ivf_pq": ivf,
    "ivf_pq_fastscan": ivf,
    "ivf_rabitq": ivf,
    "hnsw": hnsw,
    "one_cell": one_cell,
}
COMPRESSED = ("ivf_sqfp16", "ivf_pq", "ivf_pq_fastscan", "ivf_rabitq")


# ---- a run --------------------------------------------------------------------------------------------------------


def run(folder: str, threshold: float, setting: Setting) -> dict[str, Any]:
    """Read, search, decide, components; what was found of the sample is looked up afterwards, uncounted."""
    made = opened(folder)
    phases = machine.Phases()
    with phases("reading"):
        rows = made.load().astype(np.float32)
    low, high, nominated = decided(
        METHODS[setting.method](rows, setting, threshold, phases), rows, setting, threshold, phases
    )
    with phases("components"):
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        graph = coo_matrix((np.ones(len(low), np.bool_), (low, high)), shape=(len(rows), len(rows)))
        components, labels = connected_components(graph, directed=False)
    peak = machine.peak_bytes()
    sample = truth.sample_of(made, threshold)
    document: dict[str, Any] = {
        "setting": {key: value for key, value in asdict(setting).items() if value is not None},
        **phases.document(),
        "peak_memory_bytes": peak,
        "nominated_with_repeats": nominated,
        "pairs": len(low),
        "removed": len(rows) - int(components),
        "largest_component": int(np.bincount(labels).max()),
        "recall": truth.recall(sample, sample.nominated(low, high)),
        "share_of_sample_pairs_in_one_component": _together(sample, labels),
    }
    if setting.share < 1:  # what part of the tiles finds says nothing of the whole
        for name in ("pairs", "removed", "largest_component", "recall", "share_of_sample_pairs_in_one_component"):
            document[name] = None
        document["extrapolated_cpu_seconds"] = round(
            phases.cpu_seconds["search"] / setting.share + document["cpu_seconds"] - phases.cpu_seconds["search"], 1
        )
    return document


def decided(
    found: Found, rows: np.ndarray, setting: Setting, threshold: float, phases: machine.Phases
) -> tuple[np.ndarray, np.ndarray, int]:
    """((m,), (m,) rows low < high of distinct pairs above the threshold, how many were nominated, repeats included)."""
    keys: list[np.ndarray] = []
    nominated = 0
    for one, other, near in found:
        with phases("decision"):
            nominated += len(one)
            i, j = np.minimum(one, other), np.maximum(one, other)
            keep = (i != j) & (near > threshold) if setting.method not in COMPRESSED else i != j
            keys.append(i[keep].astype(np.int64) * len(rows) + j[keep])
    with phases("decision"):
        distinct = np.unique(np.concatenate(keys)) if keys else np.empty(0, np.int64)
        low, high = np.divmod(distinct, len(rows))
        if setting.method in COMPRESSED:
            above = np.empty(len(low), bool)
            for first in range(0, len(low), BATCH):
                a, b = low[first : first + BATCH], high[first : first + BATCH]
                above[first : first + BATCH] = np.einsum("nd,nd->n", rows[a], rows[b]) > threshold
            low, high = low[above], high[above]
    return low, high, nominated


def tune(folder: str, threshold: float, setting: Setting, recall: float) -> Setting:
    """The fewest visits, and the highest radius, at which the index nominates `recall` of the sample's pairs.

    A pair is nominated when either end's list is among the other's visits; and a compressed index must also score it
    above the radius, from the side from which it is seen. The losses of both are shared half and half.
    """
    made = opened(folder)
    sample = truth.sample_of(made, threshold)
    rows = made.load().astype(np.float32)
    index = trained(rows, setting.tuned(visits=setting.lists))
    one, other = sample.queries[sample.query], sample.other
    visits = np.empty(len(one), np.int64)
    for first in range(0, len(one), 2048):
        a, b = one[first : first + 2048], other[first : first + 2048]
        visits[first : first + 2048] = _visits_needed(index, rows[a], rows[b])
    if setting.method not in COMPRESSED or setting.neighbours is not None:
        needed = int(np.quantile(visits, recall, method="higher"))
        radius = threshold - SLACK if setting.method not in COMPRESSED else (setting.radius or -1.0)
        return setting.tuned(visits=needed, radius=radius)
    half = (1 - recall) / 2
    needed = int(np.quantile(visits, 1 - half, method="higher"))
    ends = np.unique(np.concatenate([one, other]))
    index.nprobe = 1
    coded = np.concatenate(
        [index.sa_decode(index.sa_encode(rows[ends[k : k + BATCH]])) for k in range(0, len(ends), BATCH)]
    )
    at_one, at_other = np.searchsorted(ends, one), np.searchsorted(ends, other)
    score = np.maximum(
        np.einsum("nd,nd->n", rows[one], coded[at_other]), np.einsum("nd,nd->n", rows[other], coded[at_one])
    )
    radius = float(np.quantile(score, half, method="lower"))
    return setting.tuned(visits=needed, radius=min(radius, threshold - SLACK))


def _visits_needed(index: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    centroids = (
        index.quantizer.reconstruct_n(0, index.nlist)
        if not hasattr(index.quantizer, "storage")
        else (index.quantizer.storage.reconstruct_n(0, index.nlist))
    )
    one, other = left @ centroids.T, right @ centroids.T
    at = np.arange(len(left))
    of_one = (one > one[at, other.argmax(axis=1)][:, None]).sum(axis=1)
    of_other = (other > other[at, one.argmax(axis=1)][:, None]).sum(axis=1)
    return np.asarray(np.minimum(of_one, of_other) + 1)


def _together(sample: truth.Sample, labels: np.ndarray) -> float:
    low, high = sample.ends()
    return float((labels[low] == labels[high]).mean()) if len(low) else 1.0


def opened(folder: str) -> data.Data:
    """A folder that `benchmarks.data` made."""
    return data.Data(Path(folder), json.loads((Path(folder) / "data.json").read_text())["parameters"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by benchmarks.data")
    parser.add_argument("--methods", required=True, help=", ".join(METHODS))
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--lists", type=int, default=2048)
    parser.add_argument("--visits", type=int, help="instead of tuned ones")
    parser.add_argument("--radius", type=float)
    parser.add_argument("--neighbours", type=int, help="a k where an index would else search by range")
    parser.add_argument("--coarse", choices=["flat", "hnsw"], default="flat")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--points-per-list", type=int, default=40)
    parser.add_argument("--code-bytes", type=int, default=64)
    parser.add_argument("--depth", type=int, default=64, help="efConstruction and efSearch of HNSW")
    parser.add_argument("--share", type=float, default=1.0, help="of the exact join's tiles, the rest extrapolated")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    made = opened(arguments.data)
    truth.sample_of(made, arguments.threshold)
    for method in arguments.methods.split(","):
        setting = Setting(
            method,
            rounds=arguments.rounds,
            points_per_list=arguments.points_per_list,
            coarse=arguments.coarse,
            code_bytes=arguments.code_bytes,
            depth=arguments.depth,
            share=arguments.share if method == "exact" else 1.0,
            lists=None if method in ("exact", "hnsw") else arguments.lists,
            neighbours=arguments.neighbours,
            visits=arguments.visits,
            radius=arguments.radius,
        )
        if METHODS[method] is ivf and (arguments.visits is None or (arguments.radius is None)):
            tuned, _ = machine.measured(tune, arguments.data, arguments.threshold, setting, arguments.recall)
            setting = tuned.tuned(**({"visits": arguments.visits} if arguments.visits else {}))
        print(setting, flush=True)
        document, _ = machine.measured(run, arguments.data, arguments.threshold, setting)
        keep(arguments, made, document)
        shown = ("cpu_seconds", "cpu_seconds_by_phase", "pairs", "removed", "extrapolated_cpu_seconds")
        summary = {key: document.get(key) for key in shown}
        print(
            json.dumps(summary),
            (document["recall"] or {}).get("both"),
            f"{document['peak_memory_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )


def keep(arguments: argparse.Namespace, made: data.Data, document: dict[str, Any]) -> None:
    """Put one result into the file, in place of a former one of the same setting."""
    import faiss

    known: dict[str, Any] = {"results": []}
    if arguments.out.exists():
        known = json.loads(arguments.out.read_text())
    results = [r for r in known["results"] if r["setting"] != document["setting"]] + [document]
    whole = {
        "program": "benchmarks/rivals.py",
        "machine": machine.facts() | {"faiss": faiss.get_compile_options()},
        "versions": machine.versions(["faiss-cpu", "numpy", "scipy", "pyarrow"]),
        "data": json.loads((made.folder / "data.json").read_text()),
        "threshold": arguments.threshold,
        "recall_asked": arguments.recall,
        "results": sorted(results, key=lambda r: (r["setting"]["method"], r["cpu_seconds"])),
    }
    arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
