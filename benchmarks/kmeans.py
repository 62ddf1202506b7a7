"""Measures k-means: the objective reached and the CPU seconds it takes, beside FAISS and scikit-learn.

    python -m benchmarks.kmeans --out benchmarks/results/kmeans.json

The vectors are made: originals around topics whose sizes follow Zipf's law, a quarter of them copies at cosines
uniform in .6-.99 (as in benchmarks/join.py); once with fewer topics than clusters, once with more. Every method has a
process and one thread of its own and gets the same vectors; the objective is the mean squared distance to the nearest
centroid, computed once more in the same way for all. Ours makes `--iterations` Lloyd steps after its seeds (ours-fewer:
seven tenths of them) and one more assignment. What numba compiles is cached on disk and loaded before the clock starts.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np

from curation.clusters import ArrayPoints, kmeans
from curation.nearest import nearest_centroid

BLOCK_ROWS = 65_536
METHODS = ("ours", "ours-fewer", "faiss-random", "faiss-afk-mc2", "faiss-k-means++", "scikit-learn-minibatch")


def make(count: int, dimension: int, topics: int, seed: int, copies: float = 0.25) -> np.ndarray:
    """(n, d) float16 unit vectors."""
    random = np.random.default_rng(seed)

    def unit(rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def noise(rows: int) -> np.ndarray:
        return unit(random.standard_normal((rows, dimension), dtype=np.float32))

    originals = round(count * (1 - copies))
    share = 1 / np.arange(1, topics + 1)
    topic = random.choice(topics, originals, p=share / share.sum())
    rows = unit(0.6 * noise(topics)[topic] + 0.8 * noise(originals))
    source = rows[random.integers(0, originals, count - originals)]
    cosine = random.uniform(0.6, 0.99, len(source)).astype(np.float32)[:, None]
    sideways = noise(len(source))
    sideways = unit(sideways - (sideways * source).sum(axis=1, keepdims=True) * source)
    rows = np.concatenate([rows, cosine * source + np.sqrt(1 - cosine**2) * sideways])
    return unit(rows[random.permutation(count)]).astype(np.float16)


def ours(vectors: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    blocks = tuple(vectors[start : start + BLOCK_ROWS] for start in range(0, len(vectors), BLOCK_ROWS))
    found = kmeans(ArrayPoints(blocks), clusters, seed=seed, purpose="benchmark", iterations=iterations)
    return found.centroids


def by_faiss(vectors: np.ndarray, clusters: int, iterations: int, seed: int, init: str) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    found = faiss.Kmeans(vectors.shape[1], clusters, niter=iterations, seed=seed + 1, max_points_per_centroid=10**6)
    found.cp.init_method = getattr(faiss, f"ClusteringInitMethod_{init}")
    found.train(vectors)
    return np.asarray(found.centroids)


def by_scikit_learn(vectors: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(clusters, max_iter=iterations, n_init=1, batch_size=4096, random_state=seed).fit(vectors)
    return np.asarray(found.cluster_centers_, np.float32)


def measured(method: str, arguments: argparse.Namespace, topics: int, seed: int) -> dict[str, Any]:
    """One method on one set of vectors, in a process of its own."""
    vectors = make(arguments.vectors, arguments.dimension, topics, 0)
    few = vectors[:3000]
    given: np.ndarray = vectors if method.startswith("ours") else vectors.astype(np.float32)
    if method.startswith("ours"):
        ours(few, 100, 2, 0)
    before_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    options = (given, arguments.clusters, arguments.iterations, seed)
    if method == "ours":
        centroids = ours(*options)
    elif method == "ours-fewer":
        centroids = ours(given, arguments.clusters, 7 * arguments.iterations // 10, seed)
    elif method == "scikit-learn-minibatch":
        centroids = by_scikit_learn(*options)
    else:
        init = {"faiss-random": "RANDOM", "faiss-afk-mc2": "AFK_MC2", "faiss-k-means++": "KMEANS_PLUS_PLUS"}[method]
        centroids = by_faiss(*options, init)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels, squares = nearest_centroid(vectors, centroids)
    return {
        "method": method,
        "topics": topics,
        "seed": seed,
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "objective": round(float(squares.mean()), 6),
        "empty_clusters": int((np.bincount(labels, minlength=arguments.clusters) == 0).sum()),
        "peak_memory_mib": round(peak / 1024),
        "memory_before_mib": round(before_memory / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--topics", type=int, nargs="+", default=[300, 3000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    results = []
    for topics in arguments.topics:
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    results.append(pool.submit(measured, method, arguments, topics, seed).result())
                print(json.dumps(results[-1]), flush=True)
                write(arguments, results)


def write(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """What is known so far."""
    document = {
        "program": "benchmarks/kmeans.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "machine": machine(),
        "results": results,
        "ratios": [ratio for topics in arguments.topics for ratio in _ratios(results, topics)],
    }
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")


def _ratios(results: list[dict[str, Any]], topics: int) -> list[dict[str, Any]]:
    """Ours over each other method: means over the seeds."""

    def mean(method: str, key: str) -> float:
        return float(np.mean([r[key] for r in results if r["method"] == method and r["topics"] == topics]))

    there = list(dict.fromkeys(r["method"] for r in results if r["topics"] == topics))
    return [
        {"topics": topics, "of": own, "over": other}
        | {key: round(mean(own, key) / mean(other, key), 4) for key in ("cpu_seconds", "objective")}
        for own in there
        if own.startswith("ours")
        for other in there
        if not other.startswith("ours")
    ]


def machine() -> dict[str, Any]:
    """Where figures come from. BLAS kernels: numpy's and FAISS's differ."""
    import faiss  # noqa: F401
    from threadpoolctl import threadpool_info

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads_used": 1,
        "system": platform.platform(),
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
        "blas": sorted(
            {
                f"{i['internal_api']} {i['version']} {i['architecture']}"
                for i in threadpool_info()
                if i["user_api"] == "blas"
            }
        ),
        "versions": {name: version(name) for name in ("numpy", "numba", "faiss-cpu", "scikit-learn")}
        | {"python": sys.version.split()[0]},
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
