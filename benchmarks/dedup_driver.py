"""Measures the memory that the driver of `curate dedup` holds per image, beside the search.

    python -m benchmarks.dedup_driver --out benchmarks/results/dedup_driver.json

The join is replaced by a made forest (every fourth image has an edge to the next one), and the rows of the tables are
not written, which is the workers' part: what is left is the driver's own work, ids, components, representatives,
nearest neighbours, reports. Memory is sampled every 10 ms, beyond what the process held before: `anonymous` is what it
must have, `file` are pages that the kernel may drop.
"""

# ruff: noqa: E402
import argparse
import json
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PART_ROWS = 100_000
REPORT = {"method": "made", "vectors": 0, "fresh": 0, "recall": 1.0, "recall_low": 1.0, "recall_high": 1.0}


def folder_of(path: Path, count: int, dimension: int) -> None:
    """Vectors of no meaning, ids in order, a width and a height to choose by."""
    random = np.random.default_rng(0)
    for number, begin in enumerate(range(0, count, PART_ROWS)):
        rows = min(PART_ROWS, count - begin)
        values = pa.array(random.standard_normal(rows * dimension, dtype=np.float32).astype(np.float16))
        table = {
            "image_id": pa.array(np.arange(begin, begin + rows, dtype=np.uint64)),
            "embedding": pa.FixedSizeListArray.from_arrays(values, dimension),
            "width": pa.array(random.integers(64, 4096, rows, dtype=np.int32)),
            "height": pa.array(random.integers(64, 4096, rows, dtype=np.int32)),
        }
        pq.write_table(pa.table(table), path / f"part-000-{number:06d}.parquet", compression="none")


def made_forest(count: int) -> np.ndarray:
    """Edges between neighbours in runs whose lengths fall off quickly."""
    from curation.duplicates.forest import edges, ordered

    random = np.random.default_rng(1)
    low = np.flatnonzero(random.random(count - 1) < 0.25).astype(np.uint32)
    return ordered(edges(low, low + 1, random.uniform(0.6, 1, len(low)).astype(np.float32)))


class Watch(threading.Thread):
    """The most anonymous and file memory of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.peak = {"RssAnon": 0, "RssFile": 0}

    def run(self) -> None:
        while not self.ended.wait(0.01):
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                name = line.split(":")[0]
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(line.split()[1]) * 1024)


def dedup_once(folder: str, out: str, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """`dedup` of the folder in this process, its tasks on one Ray worker."""
    from curation.duplicates import join
    from pipelines import cluster
    from pipelines.context import Context, Resources
    from pipelines.run_directory import RunDirectory
    from pipelines.stages import dedup

    forest = made_forest(count)
    join.self_join = lambda *_, **__: join.JoinResult(forest, dict(REPORT))
    Context.map_parts = lambda *_, **__: None
    context = Context(run=RunDirectory(out), out=out, resources=Resources(workers=1))
    cluster.start(None, 1)
    watch = Watch()
    before = {name: machine._status(name) for name in watch.peak}
    watch.start()
    cpu = time.process_time()
    outcome = dedup.execute(context, dedup.DedupConfig(**options), embeddings=folder)
    cpu = time.process_time() - cpu
    watch.ended.set()
    cluster.stop()
    return {
        "driver_cpu_seconds": round(cpu, 2),
        "anonymous_bytes_per_image": round((watch.peak["RssAnon"] - before["RssAnon"]) / count, 1),
        "file_bytes_per_image": round((watch.peak["RssFile"] - before["RssFile"]) / count, 1),
        "forest_edges_per_image": round(len(forest) / count, 3),
        "kept_by_self": outcome.summary["kept_by_self"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12_000_000)
    parser.add_argument("--dimension", type=int, default=2)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vectors").mkdir()
        folder_of(Path(folder, "vectors"), arguments.images, arguments.dimension)
        result, cost = machine.measured(dedup_once, f"{folder}/vectors", f"{folder}/out", arguments.images, {})
    print(result, flush=True)
    document = {
        "program": "benchmarks/dedup_driver.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "machine": machine.facts(),
        "versions": machine.versions(["numpy", "numba", "pyarrow", "ray"]),
        "driver": result | {"process": asdict(cost)},
    }
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
