"""Measures the near-duplicate join: CPU seconds, recall and what a threshold sweep costs.

    python -m benchmarks.join --vectors 100000 --out benchmarks/results/join-100k.json

The vectors are made, not real: originals around topics whose sizes follow Zipf's law, and 25 % copies of an original
at cosines uniform in .6-.99 with isotropic noise, which is harder than the copies that crops and recompression make.
One process, one thread; all pairs that were planted are checked against the components found.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import vectors
from curation.duplicates.components import components, sweep
from curation.duplicates.join import JoinOptions, self_join, serial
from curation.duplicates.members import Members, bundled, max_piece_rows, whole_set
from curation.duplicates.scratch import Scratch


def make(
    count: int, dimension: int, copies: float, seed: int, topics: int = 300
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """((n, d) float16, and per copy: its row, its original's row, its similarity to it)."""
    random = np.random.default_rng(seed)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def noise(rows: int) -> np.ndarray:
        return unit(random.standard_normal((rows, dimension), dtype=np.float32))

    originals = round(count * (1 - copies))
    share = 1 / np.arange(1, topics + 1)
    topic = random.choice(topics, originals, p=share / share.sum())
    rows = np.empty((count, dimension), np.float32)
    rows[:originals] = unit(0.6 * noise(topics)[topic] + 0.8 * noise(originals))
    source = random.integers(0, originals, count - originals)
    cosine = random.uniform(0.6, 0.99, len(source)).astype(np.float32)[:, None]
    sideways = noise(len(source))
    sideways = unit(sideways - (sideways * rows[source]).sum(axis=1, keepdims=True) * rows[source])
    rows[originals:] = cosine * rows[source] + np.sqrt(1 - cosine**2) * sideways
    order = random.permutation(count)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    stored = unit(rows[order]).astype(np.float16)
    copy, original = place[originals:], place[source]
    return stored, copy, original, vectors.similarity(stored[copy], stored[original])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--copies", type=float, default=0.25)
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="compare every pair instead")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    stored, copy, original, similarity = make(arguments.vectors, arguments.dimension, arguments.copies, arguments.seed)
    stages: dict[str, float] = {}

    def timed(function, calls, *, shared=None):  # type: ignore[no-untyped-def]
        begin = time.process_time()
        results = list(serial(function, calls, shared=shared))
        stages[function.__name__] = stages.get(function.__name__, 0.0) + time.process_time() - begin
        return results

    with tempfile.TemporaryDirectory() as folder:
        for number, rows in enumerate(np.array_split(np.arange(len(stored)), max(1, len(stored) // 25_000))):
            column = pa.FixedSizeListArray.from_arrays(pa.array(stored[rows].ravel()), stored.shape[1])
            pq.write_table(
                pa.table({"image_id": rows.astype(np.uint64), "embedding": column}),
                f"{folder}/{number:05d}.parquet",
                use_dictionary=False,
                compression="none",
            )
        known = vectors.open_folder(folder)
        options = JoinOptions(
            arguments.threshold,
            recall=arguments.recall,
            exact_multiply_adds=float("inf") if arguments.exact else 0,
        )
        most = max_piece_rows(options.memory_bytes, known.dimension)
        members = Members(bundled(whole_set(known, most), most), known.dimension, True, known.rows)
        wall, cpu = time.perf_counter(), time.process_time()
        result = self_join(
            members,
            np.arange(known.rows, dtype=np.uint64),
            options,
            Scratch(f"{folder}/scratch"),
            timed,
            thresholds=[0.6, 0.7, 0.8, 0.9],
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    begin = time.process_time()
    counts = sweep(result.forest, known.rows, [t for t in (0.6, 0.7, 0.8, 0.9) if t >= arguments.threshold])
    sweep_seconds = time.process_time() - begin
    labels = components(result.forest, known.rows, arguments.threshold)
    true = similarity > np.float32(arguments.threshold)
    together = labels[copy[true]] == labels[original[true]]
    document = {
        "program": "benchmarks/join.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads_used": 1,
            "system": platform.platform(),
        },
        "versions": {name: version(name) for name in ("numpy", "numba", "faiss-cpu", "pyarrow")}
        | {"python": sys.version.split()[0]},
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "cpu_seconds_by_step": {name: round(seconds, 2) for name, seconds in stages.items()},
        "forest_edges": len(result.forest),
        "planted_pairs_above_threshold": int(true.sum()),
        "planted_pairs_in_one_component": round(float(together.mean()), 5),
        "sweep_cpu_seconds": round(sweep_seconds, 3),
        "sweep": counts,
        "report": result.report,
    }
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
