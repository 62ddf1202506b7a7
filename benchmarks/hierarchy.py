"""Measures balanced sampling: how many concepts of a Zipf-sized pool the sample holds, and what finding them costs.

    python -m benchmarks.hierarchy --out benchmarks/results/hierarchy.json

The figure is the effective number of concepts, exp of the entropy of their shares in a sample of `--target` images.
Beside ours stand a random sample, flat k-means, and a plain transcription of hierarchical k-means with resampling and
of hierarchical sampling as arXiv 2405.15613 describes them (section 3.2 and 3.3, algorithm 1): numpy in float64,
k-means++ over all points, Lloyd to the end, resampling at every level on half the mean cluster. Ours is run with its
defaults (no resampling at the leaves) and with the transcription's steps. One thread; numba's code is loaded first.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kmeans import machine
from curation import balance
from curation.clusters import ArrayPoints
from curation.hierarchy import build, effective_number
from curation.nearest import nearest_centroid
from curation.order import first_per_group, hash_keys


def make(rows: int, dimension: int, concepts: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """((n, d) float32 unit vectors, (n,) concept): normal centres, normal noise around them, Zipf sizes."""
    random = np.random.default_rng(seed)
    share = 1 / np.arange(1, concepts + 1)
    concept = random.choice(concepts, rows, p=share / share.sum())
    found = random.standard_normal((concepts, dimension))[concept]
    found = found + noise * random.standard_normal((rows, dimension))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32), concept


# ---- the paper's algorithm, written plainly --------------------------------------------------------------------------


def squared(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n, k) float64."""
    return np.asarray((points**2).sum(axis=1)[:, None] - 2 * points @ centroids.T + (centroids**2).sum(axis=1)[None, :])


def plain_kmeans(points: np.ndarray, count: int, iterations: int, random: np.random.Generator) -> np.ndarray:
    """k-means++ and Lloyd; a cluster that falls empty keeps its centroid."""
    centroids = [points[random.integers(len(points))]]
    potential = squared(points, centroids[0][None])[:, 0]
    while len(centroids) < count:
        share = np.maximum(potential, 0)
        centroids.append(points[random.choice(len(points), p=share / share.sum())])
        potential = np.minimum(potential, squared(points, centroids[-1][None])[:, 0])
    found = np.array(centroids)
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        former, labels = labels, squared(points, found).argmin(axis=1)
        if np.array_equal(former, labels):
            break
        for cluster in range(count):
            members = points[labels == cluster]
            if len(members):
                found[cluster] = members.mean(axis=0)
    return found


def plain_hierarchy(
    points: np.ndarray, levels: list[int], iterations: int, steps: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Labels of every level: of the points, then of each level's centroids."""
    labels = []
    below = points.astype(np.float64)
    for count in levels:
        centroids = plain_kmeans(below, count, iterations, random)
        for _ in range(steps):
            distances = squared(below, centroids)
            nearest = distances.argmin(axis=1)
            size = max(1, len(below) // (2 * count))
            chosen = []
            for cluster in range(count):
                members = np.flatnonzero(nearest == cluster)
                chosen.append(members[np.argsort(distances[members, cluster])[:size]])
            kept = np.concatenate(chosen)
            if len(kept) < count:
                break
            centroids = plain_kmeans(below[kept], count, iterations, random)
        labels.append(squared(below, centroids).argmin(axis=1))
        below = centroids
    return labels


def plain_sample(labels: list[np.ndarray], target: int, random: np.random.Generator) -> np.ndarray:
    """From the top down, every child gives the same or all it has; a leaf's members are drawn at random."""

    def rows_below(level: int, cluster: int) -> np.ndarray:
        members = np.flatnonzero(labels[level] == cluster)
        return members if level == 0 else np.concatenate([rows_below(level - 1, m) for m in members] or [members])

    def split(sizes: list[int], wanted: int) -> list[int]:
        given = [0] * len(sizes)
        while wanted:
            able = [child for child in random.permutation(len(sizes)) if given[child] < sizes[child]]
            for child in able[:wanted]:
                given[child] += 1
            wanted -= min(wanted, len(able))
        return given

    def sample(level: int, clusters: np.ndarray, wanted: int) -> list[np.ndarray]:
        below = [rows_below(level, c) for c in clusters]
        taken: list[np.ndarray] = []
        for cluster, rows, share in zip(clusters, below, split([len(r) for r in below], wanted), strict=True):
            if level == 0:
                taken.append(random.permutation(rows)[:share])
            elif share:
                taken += sample(level - 1, np.flatnonzero(labels[level] == cluster), share)
        return taken

    return np.concatenate(sample(len(labels) - 1, np.arange(labels[-1].max() + 1), target))


# ---- what is compared ------------------------------------------------------------------------------------------------


def ours(vectors: np.ndarray, levels: list[int], iterations: int, steps: int | None, target: int, seed: int) -> Any:
    resample = [] if steps is None else [steps] * len(levels)
    built, _ = build(ArrayPoints((vectors,)), levels, seed=seed, iterations=iterations, resample_steps=resample)
    leaves, _ = nearest_centroid(vectors, built.centroids[0])
    wanted = balance.leaf_targets(built.sizes(np.bincount(leaves, minlength=levels[0])), built.parents, target, seed)
    ids = np.arange(len(vectors), dtype=np.uint64)
    return first_per_group(leaves, hash_keys(ids, seed, "balance"), ids, wanted)[0]


def transcription(vectors: np.ndarray, levels: list[int], iterations: int, steps: int, target: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return plain_sample(plain_hierarchy(vectors, levels, iterations, steps, random), target, random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--concepts", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--levels", type=int, nargs="+", default=[2000, 200])
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10, help="resampling steps of the transcription")
    parser.add_argument("--target", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    a = arguments
    vectors, concept = make(a.vectors, a.dimension, a.concepts, a.noise, 0)
    ours(vectors[:3000], [300, 30], 2, 1, 100, 0)
    methods: dict[str, Callable[[int], np.ndarray]] = {
        "random": lambda seed: np.random.default_rng(seed).permutation(a.vectors)[: a.target],
        "flat k-means (ours)": lambda seed: ours(vectors, a.levels[:1], a.iterations, None, a.target, seed),
        "ours": lambda seed: ours(vectors, a.levels, a.iterations, None, a.target, seed),
        "ours, resampled at every level": lambda seed: ours(vectors, a.levels, a.iterations, a.steps, a.target, seed),
        "transcription": lambda seed: transcription(vectors, a.levels, a.iterations, a.steps, a.target, seed),
    }
    results: dict[str, dict[str, Any]] = {name: {"effective_concepts": [], "cpu_seconds": []} for name in methods}
    for seed in range(a.seeds):
        for name, method in methods.items():
            begin = time.process_time()
            taken = method(seed)
            seconds = round(time.process_time() - begin, 2)
            assert len(np.unique(taken)) == a.target
            effective = round(effective_number(np.bincount(concept[taken], minlength=a.concepts)), 2)
            results[name]["effective_concepts"].append(effective)
            results[name]["cpu_seconds"].append(seconds)
            print(name, seed, effective, seconds, flush=True)
        write(arguments, concept, results, seed + 1)


def write(arguments: argparse.Namespace, concept: np.ndarray, results: dict[str, Any], seeds: int) -> None:
    """What is known after so many seeds."""
    for found in results.values():
        values = found["effective_concepts"]
        found["mean"] = round(float(np.mean(values)), 2)
        found["standard_deviation"] = round(float(np.std(values, ddof=1)), 2) if seeds > 1 else None
        found["cpu_seconds_mean"] = round(float(np.mean(found["cpu_seconds"])), 3)
    paper = results["transcription"]
    document = {
        "program": "benchmarks/hierarchy.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "seeds_done": seeds,
        "machine": machine(),
        "pool_effective_concepts": round(effective_number(np.bincount(concept)), 2),
        "results": results,
        "over_the_transcription": {
            name: {
                "effective_concepts_more": round(found["mean"] - paper["mean"], 2),
                "cpu_seconds_ratio": round(found["cpu_seconds_mean"] / paper["cpu_seconds_mean"], 4),
            }
            for name, found in results.items()
        },
    }
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
