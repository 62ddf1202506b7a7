"""The same bytes from one worker, from two, from nodes of a Ray cluster, and from nodes that die."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cli.main import app
from curation import vectors
from curation.duplicates.join import self_join
from curation.duplicates.members import Members, whole_set
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions
from pipelines import cluster
from tests.e2e.machines import Cluster, Node, results
from tests.e2e.pictures import write_config

MODEL = "sscd_distilled"
"""Also as the semantic model: it starts in a third of the time that torch takes."""
EVERY = (
    "import",
    "score",
    "filter",
    "dedup-search",
    "dedup",
    f"embed/{MODEL}",
    "cluster",
    "retrieve",
    "balance",
    "mix",
    "manifest",
    "report",
)


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


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_one_worker_two_workers_and_two_nodes_write_the_same_duplicates(tmp_path: Path) -> None:
    make(tmp_path / "vectors", 36_000, 512)
    found = []
    with Cluster() as nodes:
        nodes.add()
        for number, more in enumerate((["--workers", "1"], ["--workers", "2"], ["--ray-address", nodes.address])):
            out = tmp_path / f"out-{number}"
            done = nodes.curate("dedup", "--embeddings", tmp_path / "vectors", "--out", out, "--json", *more)
            said = done.communicate(timeout=900)[0]
            assert done.returncode == 0, said
            assert "cells" in said.strip().splitlines()[-1]
            found.append(digest(out))
    assert found[0] and found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, dict[str, bytes]]:
    """A folder with a run made by two workers of this machine, and its bytes."""
    root = tmp_path_factory.mktemp("nodes")
    done = CliRunner().invoke(app, ["run", str(write_config(root, root / "one", MODEL, detectors=False)), "--json"])
    assert done.exit_code == 0, done.output
    return root, results(root / "one")


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert not [path for path in expected if expected[path] != found[path]]


def stages_begun(run: Path) -> set[str]:
    """Stages that stand in the events."""
    if not (run / "events.jsonl").exists():
        return set()
    lines = (run / "events.jsonl").read_text().split("\n")[:-1]
    events = [json.loads(line) for line in lines]
    return {event["stage"] for event in events if event["event"] in ("stage_start", "parts")}


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_three_nodes_of_which_one_is_killed_in_every_stage_write_the_bytes_of_one_machine(
    one_machine: tuple[Path, dict[str, bytes]],
) -> None:
    root, expected = one_machine
    config = write_config(root, root / "three", MODEL, detectors=False)
    killed: list[str] = []
    at_work: list[str] = []
    with Cluster(head_cpus=0) as nodes, ThreadPoolExecutor() as pool:
        living = [nodes.add(), nodes.add()]
        joining: list[Future[Node]] = []
        with open(root / "three.log", "w+") as log:
            process = nodes.curate("run", config, "--ray-address", nodes.address, output=log)
            while process.poll() is None:
                fresh = [stage for stage in EVERY if stage in stages_begun(root / "three") and stage not in killed]
                living += [future.result() for future in joining if future.done()]
                joining = [future for future in joining if not future.done()]
                if fresh and living:
                    victim, busy = chosen(living, time.monotonic() + 2)
                    victim.kill()
                    living.remove(victim)
                    killed.append(fresh[0])
                    at_work += fresh[:1] if busy else []
                    joining.append(pool.submit(nodes.add))
                time.sleep(0.05)
            log.seek(0)
            assert process.returncode == 0, log.read()[-3000:]
        for future in joining:
            future.result()
    print(f"killed in {killed}, of these at work in {at_work}")
    assert len(killed) >= len(EVERY) - 1 and at_work
    compare(results(root / "three"), expected)


def chosen(living: list[Node], deadline: float) -> tuple[Node, bool]:
    """A node that is at work, or any when none is until the deadline."""
    while time.monotonic() < deadline:
        for node in living:
            if node.is_at_work():
                return node, True
        time.sleep(0.02)
    return living[0], False


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Machines of their own network can be made here; asked before anything is run for them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces are made by root with `ip` (iproute2)")
    probe = f"cur{os.getpid() % 10000}p"
    for make, remove in (
        (f"netns add {probe}", f"netns del {probe}"),
        (f"link add {probe} type bridge", f"link del {probe}"),
    ):
        done = subprocess.run(["ip", *make.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine lets nobody make network namespaces: `ip {make}`: {done.stderr.strip()}")
        subprocess.run(["ip", *remove.split()], check=True)


@pytest.mark.long
@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(1800)
def test_machines_that_share_a_network_and_one_folder_write_the_bytes_of_one(
    one_machine: tuple[Path, dict[str, bytes]],
) -> None:
    root, expected = one_machine
    with Cluster(head_cpus=1, isolated=True) as nodes:
        nodes.add()
        nodes.add()
        hidden = write_config(root, nodes.folder / "local" / "run", MODEL, detectors=False)
        process = nodes.curate("run", hidden, "--ray-address", nodes.address)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 2 and "is not the same folder on" in said, said
        config = write_config(root, root / "apart", MODEL, detectors=False)
        process = nodes.curate("run", config, "--ray-address", nodes.address)
        said = process.communicate(timeout=1500)[0]
        assert process.returncode == 0, said[-3000:]
    compare(results(root / "apart"), expected)
