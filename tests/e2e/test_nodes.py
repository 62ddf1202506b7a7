"""The same bytes from one worker, from two, and from a Ray cluster of two nodes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import vectors
from curation.duplicates.join import self_join
from curation.duplicates.members import Members, whole_set
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions
from pipelines import cluster

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def make(folder: Path, count: int, dimension: int) -> None:
    """Originals and a quarter of copies at cosines .6 to .99, in parts of 5,000."""
    random = np.random.default_rng(0)
    x = random.standard_normal((count, dimension)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    copies = random.permutation(count)[: count // 4]
    cosine = random.uniform(0.6, 0.99, (len(copies), 1)).astype(np.float32)
    x[copies] = cosine * x[random.integers(0, count, len(copies))] + np.sqrt(1 - cosine**2) * x[copies]
    folder.mkdir()
    for part, begin in enumerate(range(0, count, 5000)):
        rows = np.arange(begin, min(count, begin + 5000))
        pq.write_table(vectors.embeddings_table(rows.astype(np.uint64), x[rows]), folder / f"part-{part:05d}.parquet")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("part-*.parquet"))}


@pytest.mark.usefixtures("ray_session")
def test_join_through_cells_gives_the_same_forest_in_ray_tasks_and_in_this_process(tmp_path: Path) -> None:
    make(tmp_path / "vectors", 6000, 256)
    known = vectors.open_folder(str(tmp_path / "vectors"))
    members = Members(tuple(whole_set(known, 2000)), 256, True, 6000)
    options = JoinOptions(0.6, recall=0.95, exact_multiply_adds=0)
    ids = np.arange(6000, dtype=np.uint64)
    here = self_join(members, ids, options, Scratch(str(tmp_path / "here")))
    there = self_join(members, ids, options, Scratch(str(tmp_path / "there")), cluster.spread)
    assert here.report["method"] == "cells"
    assert here.forest.tobytes() == there.forest.tobytes() and here.report == there.report


@pytest.fixture
def two_nodes() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(timeout=60)


@pytest.mark.long
def test_one_worker_two_workers_and_two_nodes_write_the_same_duplicates(tmp_path: Path, two_nodes: str) -> None:
    make(tmp_path / "vectors", 36_000, 512)
    found = []
    for number, more in enumerate((["--workers", "1"], ["--workers", "2"], ["--ray-address", two_nodes])):
        out = tmp_path / f"out-{number}"
        command = [
            sys.executable,
            "-m",
            "cli.main",
            "dedup",
            "--embeddings",
            str(tmp_path / "vectors"),
            "--out",
            str(out),
        ]
        done = subprocess.run(
            [*command, "--json", *more],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads(done.stdout.strip().splitlines()[-1])
        assert "cells" in json.dumps(summary)
        found.append(digest(out))
    assert found[0] and found[0] == found[1] == found[2]
