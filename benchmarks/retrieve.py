"""Measures retrieval by sample: CPU seconds, memory and recall@N of `curate retrieve` beside exact search and FAISS.

    python -m benchmarks.retrieve --vectors 1000000 --seeds 10000 --out benchmarks/results/retrieve.json

The pool is made in parts of Parquet (float16): topics whose sizes follow Zipf's law, isotropic noise around them. Half
of the seeds are drawn as the pool is; the others lie at cosines uniform in .3-.8 of a pool vector, which leaves their
second to fourth neighbours to chance and is harder than seeds are in practice. Every method runs on one thread in a
process of its own and reads the pool from its files; exact search is measured on some seeds and extrapolated. FAISS's
visits and re-ranking are tuned on other seeds until they reach the recall; the tuning does not count.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np

from curation import neighbours, seed_search, storage, vectors
from curation.halves import widen
from curation.neighbours import Neighbours

PART_ROWS = 65_536
TUNING, EVALUATION = 100, 200
TARGET_SHARE = 1 / 10


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def make(folder: str, rows: int, seeds: int, dimension: int, topics: int, seed: int) -> None:
    """`folder`/pool and `folder`/seeds: Parquet parts of image_id and embedding."""
    random = np.random.default_rng(seed)

    def noise(count: int) -> np.ndarray:
        return unit(random.standard_normal((count, dimension), dtype=np.float32))

    centres, share = noise(topics), 1 / np.arange(1, topics + 1)

    def members(count: int) -> np.ndarray:
        topic = random.choice(topics, count, p=share / share.sum())
        return unit(0.6 * centres[topic] + 0.8 * noise(count))

    kin = np.sort(random.integers(0, rows, seeds // 2))
    related = np.empty((len(kin), dimension), np.float32)
    for index, start in enumerate(range(0, rows, PART_ROWS)):
        part = members(min(PART_ROWS, rows - start))
        mine = (kin >= start) & (kin < start + len(part))
        related[mine] = part[kin[mine] - start]
        ids = np.arange(start, start + len(part), dtype=np.uint64)
        _write(f"{folder}/pool/part-000-{index:06d}.parquet", ids, part)
    cosine = random.uniform(0.3, 0.8, (len(kin), 1)).astype(np.float32)
    away = noise(len(kin))
    away = unit(away - (away * related).sum(axis=1, keepdims=True) * related)
    drawn = np.concatenate([cosine * related + np.sqrt(1 - cosine**2) * away, members(seeds - len(kin))])
    drawn = drawn[random.permutation(seeds)]
    _write(f"{folder}/seeds/part-001-000000.parquet", np.arange(seeds, dtype=np.uint64) + np.uint64(1 << 40), drawn)


def _write(path: str, ids: np.ndarray, rows: np.ndarray) -> None:
    storage.write_whole(path, storage.table_bytes(vectors.embeddings_table(ids, rows)))


def pool_parts(folder: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, vectors as stored) of the pool, part by part."""
    for _, ids, rows in vectors.open_folder(f"{folder}/pool").blocks():
        yield ids, rows


def seeds_of(folder: str) -> np.ndarray:
    return np.concatenate([rows for _, _, rows in vectors.open_folder(f"{folder}/seeds").blocks()])


def exact(folder: str, count: int, chosen: np.ndarray) -> tuple[Neighbours, dict[str, float]]:
    """The truth for some seeds by the definition, and the CPU seconds of blocked float32 products and their best."""
    import faiss

    faiss.omp_set_num_threads(1)
    seeds = seeds_of(folder)[chosen]
    wide = seeds.astype(np.float32)
    found, seconds, reading = Neighbours.none(len(seeds), count), 0.0, 0.0
    parts = pool_parts(folder)
    while True:
        begin = time.process_time()
        ids, rows = next(parts, (None, None))
        part = None if rows is None else widen(rows)
        reading += time.process_time() - begin
        if part is None:
            break
        begin = time.process_time()
        faiss.knn(wide, part, count, metric=faiss.METRIC_INNER_PRODUCT)
        seconds += time.process_time() - begin
        found = found.merge(neighbours.nearest_neighbours(seeds, ids, rows, count))
    return found, {"cpu_seconds": seconds, "reading": reading}


def ours(folder: str, count: int, recall: float) -> tuple[Neighbours, dict[str, Any]]:
    """`curate retrieve` in this process; its search, calibration and measure of the recall included."""
    from pipelines import cluster, embedded, retrieve_sample
    from pipelines.context import Context, Resources
    from pipelines.run_directory import RunDirectory
    from pipelines.stages import retrieve

    def in_place(function: Any, calls: Any, *, shared: Any = None, **_: Any) -> Iterator[tuple[str, Any]]:
        for name, arguments in calls:
            begin = time.process_time()
            result = function(*arguments, shared)
            which = arguments[1].__name__ if function.__name__ == "_keep" else function.__name__
            phases[which] = phases.get(which, 0.0) + time.process_time() - begin
            yield name, result

    phases: dict[str, float] = {}
    parts: dict[str, float] = {}
    _timed(parts, "read and check vectors", retrieve_sample, "read_stretch")
    _timed(parts, "code the rows, give them cells", seed_search.Stretch, "of")
    _timed(parts, "scan: ", seed_search.SeedBlock, "add", lambda block, *_: f"{len(block.seeds):,} seeds")
    cluster.spread, cluster.start = in_place, lambda *_: None  # type: ignore[assignment]
    embedded.files_digest = lambda paths: "made"
    config = retrieve.RetrieveConfig(mode="sample", neighbours=count, recall=recall)  # type: ignore[call-arg]
    with tempfile.TemporaryDirectory() as out:
        context = Context(RunDirectory(out), out=out, resources=Resources(memory_per_worker="3GiB"))  # type: ignore[call-arg]
        outcome = retrieve.execute(context, config, embeddings=f"{folder}/pool", seeds={"seeds": f"{folder}/seeds"})
        begin = time.process_time()
        found = _neighbours_of(out, len(seeds_of(folder)), count)
        phases["not counted: read for the recall"] = time.process_time() - begin
    rounded = {name: {k: round(v, 2) for k, v in d.items()} for name, d in (("phases", phases), ("parts", parts))}
    return found, {**rounded, "search": outcome.summary["search"]}


def _timed(parts: dict[str, float], name: str, owner: Any, which: str, also: Any = lambda *_: "") -> None:
    """Let a function add its CPU seconds to `parts`."""
    bound = isinstance(vars(owner)[which], classmethod)
    function = getattr(owner, which)

    def timed(*arguments: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*arguments)
        finally:
            key = name + also(*arguments)
            parts[key] = parts.get(key, 0.0) + time.process_time() - begin

    setattr(owner, which, staticmethod(timed) if bound else timed)


def _neighbours_of(out: str, seeds: int, count: int) -> Neighbours:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(path) for path in storage.list_files(out, ".parquet")])
    found = Neighbours.none(seeds, count)
    place = (table["seed_id"].to_numpy() - np.uint64(1 << 40)).astype(np.int64), table["rank"].to_numpy()
    found.ids[place], found.similarity[place] = table["image_id"].to_numpy(), table["similarity"].to_numpy()
    return found


def by_faiss(folder: str, count: int, recall: float, kind: str, lists: int, truth: Neighbours) -> Any:
    """IVF-Flat, or IVF-PQFastScan with exact re-ranking by float16: built, tuned on `truth` and searched."""
    import faiss

    faiss.omp_set_num_threads(1)
    phases = machine.Phases()
    seeds = seeds_of(folder)
    wide, dimension = seeds.astype(np.float32), seeds.shape[1]
    quantiser = faiss.IndexFlatIP(dimension)
    if kind == "IVF-Flat":
        index = faiss.IndexIVFFlat(quantiser, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexIVFPQFastScan(quantiser, dimension, lists, dimension // 4, 4, faiss.METRIC_INNER_PRODUCT)
    whole = index
    if kind != "IVF-Flat":
        refined = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        whole = faiss.IndexRefine(index, refined)
    index.cp.max_points_per_centroid = 64
    with phases("read"):
        parts = [rows for _, rows in pool_parts(folder)]
    with phases("train"):
        step = max(1, sum(map(len, parts)) // (64 * lists))
        whole.train(np.concatenate([part[::step] for part in parts]).astype(np.float32))
    with phases("add"):
        for part in parts:
            whole.add(part.astype(np.float32))
    del parts

    def search(rows: np.ndarray, nprobe: int, factor: int) -> Neighbours:
        index.nprobe = nprobe
        if whole is not index:
            whole.k_factor = factor
        similar, nearest = whole.search(rows, count)
        return Neighbours(nearest.astype(np.uint64), similar)

    # Float16 or float32 sums of an index are off by less than this.
    slack = Neighbours(truth.ids, truth.similarity - np.float32(2e-4))
    with phases("tuning"):
        best = None
        for factor in (1,) if whole is index else (32, 128):
            nprobe = max(1, lists // 64)
            while True:
                begin = time.process_time()
                hits, there = seed_search.recall_of(search(wide[:TUNING], nprobe, factor), slack)
                seconds = time.process_time() - begin
                if hits >= recall * there or nprobe >= lists:
                    break
                nprobe = min(lists, nprobe + max(1, nprobe // 2))
            if hits >= recall * there and (best is None or seconds < best[0]):
                best = (seconds, nprobe, factor)
    if best is None:
        return None, {"failed": "no setting reached the recall"}
    with phases("search"):
        found = search(wide, best[1], best[2])
    return found, {"lists": lists, "nprobe": best[1], "k_factor": best[2], **phases.document(without=["tuning"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--topics", type=int, default=300)
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lists", type=int, nargs="*", default=[256, 1024], help="of FAISS; none: no rivals")
    parser.add_argument("--folder", help="where the made vectors lie or go; default: a temporary folder")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        if not Path(folder, "seeds").exists():
            make(folder, arguments.vectors, arguments.seeds, arguments.dimension, arguments.topics, arguments.seed)
        document = run(folder, arguments)
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def run(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    count, seeds = arguments.neighbours, arguments.seeds
    # The first seeds tune FAISS, the last ones judge everyone.
    chosen = np.r_[np.arange(TUNING), np.arange(seeds - EVALUATION, seeds)]
    (truth, cost), _ = machine.measured(exact, folder, count, chosen)
    tuning = Neighbours(truth.ids[:TUNING], truth.similarity[:TUNING])
    judge = Neighbours(truth.ids[TUNING:], truth.similarity[TUNING:] - np.float32(2e-4))
    exact_seconds = cost["cpu_seconds"] * seeds / len(chosen)
    methods: dict[str, Any] = {
        "exact": {
            "cpu_seconds": round(exact_seconds, 1),
            "counted": "products and their best alone, not the reading of the pool",
            "extrapolated_from_seeds": len(chosen),
            "measured_cpu_seconds": round(cost["cpu_seconds"], 2),
            "reading_cpu_seconds": round(cost["reading"], 2),
            "nanoseconds_per_pair": round(cost["cpu_seconds"] / len(chosen) / arguments.vectors * 1e9, 2),
        }
    }

    def judged(found: Neighbours, seconds: float, peak: int) -> dict[str, Any]:
        hits, there = seed_search.recall_of(Neighbours(found.ids[-EVALUATION:], found.similarity[-EVALUATION:]), judge)
        return {
            "cpu_seconds": round(seconds, 2),
            "share_of_exact": round(seconds / exact_seconds, 4),
            "share_of_exact_that_reads": round(seconds / (exact_seconds + cost["reading"]), 4),
            "recall": round(hits / there, 4),
            "peak_bytes": peak,
        }

    (found, said), child = machine.measured(ours, folder, count, arguments.recall)
    # Once more: other programs on the machine slow down both, and not evenly over time.
    (_, again), _ = machine.measured(exact, folder, count, chosen)
    exact_seconds = (exact_seconds + again["cpu_seconds"] * seeds / len(chosen)) / 2
    methods["exact"] |= {
        "cpu_seconds": round(exact_seconds, 1),
        "measured_cpu_seconds": [round(one["cpu_seconds"], 2) for one in (cost, again)],
        "nanoseconds_per_pair": round(exact_seconds / seeds / arguments.vectors * 1e9, 2),
    }
    uncounted = said["phases"]["not counted: read for the recall"]
    methods["curate retrieve"] = judged(found, child.cpu_seconds - uncounted, child.peak_bytes) | said
    print(json.dumps(methods), flush=True)
    for kind in ("IVF-Flat", "IVF-PQFastScan, re-ranked"):
        for lists in arguments.lists:
            (found, said), child = machine.measured(by_faiss, folder, count, arguments.recall, kind, lists, tuning)
            name = f"FAISS {kind}, {lists} lists"
            methods[name] = said if found is None else judged(found, said["cpu_seconds"], child.peak_bytes) | said
    mine = methods["curate retrieve"]["cpu_seconds"]
    return {
        "program": "benchmarks/retrieve.py",
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("out", "folder")},
        "machine": machine.facts(),
        "versions": machine.versions(["numpy", "numba", "faiss-cpu", "pyarrow"]),
        "targets": {"recall": arguments.recall, "share_of_exact": TARGET_SHARE},
        "methods": methods,
        "cpu_seconds_relative_to_curate": {
            name: round(method["cpu_seconds"] / mine, 2) for name, method in methods.items() if "cpu_seconds" in method
        },
    }


if __name__ == "__main__":
    main()
