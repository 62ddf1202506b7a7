"""Measures the union-find of dedup against scipy's connected components and a version in numpy alone.

    python -m benchmarks.components --out benchmarks/results/components.json

Random edges over random nodes, the worst case for caches: real edges join near neighbours of a sorted forest. Every
method runs in a process of its own, on one thread, after the edges have been made; its memory is what it held at most
beyond them. All three give every node the smallest node of its component, and must agree.
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median

from benchmarks import machine

machine.one_thread()

import numpy as np

CHUNK = 1 << 22
"""Edges of one piece of the stream."""


def edges(nodes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of (count,) uint32."""
    random = np.random.default_rng(seed)
    return (
        random.integers(0, nodes, count, dtype=np.uint32),
        random.integers(0, nodes, count, dtype=np.uint32),
    )


def union_find(nodes: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Ours: edges stream in pieces through one array of 4 bytes per node."""
    from curation.duplicates.components import UnionFind

    sets = UnionFind(nodes)
    for begin in range(0, len(one), CHUNK):
        sets.join(one[begin : begin + CHUNK], other[begin : begin + CHUNK])
    return sets.labels()


def scipy_graph(nodes: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """scipy.sparse.csgraph.connected_components on a matrix of bytes."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(one), np.int8), (one.view(np.int32), other.view(np.int32))), shape=(nodes, nodes))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max() + 1, nodes, np.uint32)
    # Written from the largest node to the smallest: the last write wins.
    smallest[label[::-1]] = np.arange(nodes, dtype=np.uint32)[::-1]
    return smallest[label]


def in_numpy(nodes: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Hook every root to the smallest root it meets, halve all paths, drop edges inside a component; repeat."""
    parent = np.arange(nodes, dtype=np.uint32)
    while len(one):
        low, high = parent[one], parent[other]
        apart = low != high
        one, other = np.minimum(low, high)[apart], np.maximum(low, high)[apart]
        np.minimum.at(parent, other, one)
        while True:
            above = parent[parent]
            if (above == parent).all():
                break
            parent = above
    return parent


METHODS: dict[str, Callable[..., np.ndarray]] = {
    "union_find": union_find,
    "scipy": scipy_graph,
    "numpy": in_numpy,
}


def run(method: str, nodes: int, count: int, seed: int) -> dict[str, object]:
    """One method on its own edges: CPU seconds and memory beyond the edges. Compiled code is loaded before."""
    METHODS[method](10, *edges(10, 20, 0))
    one, other = edges(nodes, count, seed)
    machine.forget_peak()
    held, begin, wall = machine.resident_bytes(), time.process_time(), time.perf_counter()
    labels = METHODS[method](nodes, one, other)
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    return {
        "cpu_seconds": round(cpu, 3),
        "wall_seconds": round(wall, 3),
        "edges_per_cpu_second": round(count / cpu),
        "state_bytes_per_node": round((machine.peak_bytes() - held) / nodes, 2),
        "components": int((labels == np.arange(nodes, dtype=np.uint32)).sum()),
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(labels, dtype="<u4").tobytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=20_000_000)
    parser.add_argument("--edges", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    for method in METHODS:
        runs = []
        for _ in range(arguments.repeats):
            result, cost = machine.measured(run, method, arguments.nodes, arguments.edges, arguments.seed)
            runs.append(result | {"process": asdict(cost)})
        speed = median(r["edges_per_cpu_second"] for r in runs)
        found[method] = {"median_edges_per_cpu_second": speed, "runs": runs}
    digests = {r["labels_sha256"] for one in found.values() for r in one["runs"]}  # type: ignore[attr-defined]
    ours = found["union_find"]["median_edges_per_cpu_second"]
    document = {
        "program": "benchmarks/components.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "machine": machine.facts(),
        "versions": machine.versions(["numpy", "numba", "scipy"]),
        "methods": found,
        "ours_over": {
            name: round(ours / one["median_edges_per_cpu_second"], 2)  # type: ignore[operator]
            for name, one in found.items()
        },
        "labels_agree": len(digests) == 1,
    }
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
    print(json.dumps({k: document[k] for k in ("ours_over", "labels_agree")}, indent=1))
    if len(digests) != 1:
        raise SystemExit("the methods disagree")


if __name__ == "__main__":
    main()
