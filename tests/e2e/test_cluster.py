"""Clusters with a token: jobs sent to one and followed, a node of one lost while it computes."""

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import vectors
from tests.e2e.machines import Cluster, results
from tests.e2e.pictures import write_config

SECRET = "f1c9e6-not-for-logs"
ROWS, DIMENSION, PART = 3000, 64, 100


@pytest.fixture(scope="module")
def job_server() -> Iterator[Cluster]:
    with Cluster(head_cpus=1, dashboard=True) as made:
        yield made


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_submitted_run_is_followed_to_its_end_and_its_secrets_stay_out_of_all_logs(
    job_server: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tmp_path / "run", "sscd_distilled", detectors=False)
    sent = job_server.curate(
        "submit",
        config,
        "--address",
        job_server.jobs_address,
        "--until",
        "import",
        "--env",
        f"OBJECT_STORE_KEY={SECRET}",
    )
    code, said = finish(sent)
    assert code == 0, said
    assert "submitted raysubmit_" in said and "import: 30 rows" in said and "succeeded" in said
    generations = {path.split("/")[1] for path in results(tmp_path / "run") if path.startswith("import/")}
    assert len(generations) == 4
    assert SECRET not in said and SECRET not in job_server.logs()
    code, said = finish(job_server.curate("submit", "--list", "--address", job_server.jobs_address, "--json"))
    (job,) = json.loads(said.strip().splitlines()[-1])["jobs"]
    assert (code, job["state"], job["exit_code"], job["run"]) == (0, "SUCCEEDED", 0, str(tmp_path / "run"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_is_refused_on_the_cluster_has_its_sentence_and_its_exit_code_here(
    job_server: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tmp_path / "run", "sscd_distilled", detectors=False)
    config.write_text(config.read_text().replace(f"{tmp_path}/seeds-even", f"{tmp_path}/nowhere"))
    code, said = finish(job_server.curate("submit", config, "--address", job_server.jobs_address))
    assert code == 2 and f"{tmp_path}/nowhere: no such folder" in said and "exit code 2" in said, said
    assert "Traceback" not in said


def make(folder: Path) -> None:
    """Vectors in parts of PART rows: as many tasks as parts."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, DIMENSION)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    folder.mkdir()
    for part, begin in enumerate(range(0, ROWS, PART)):
        ids = np.arange(begin, begin + PART, dtype=np.uint64)
        pq.write_table(vectors.embeddings_table(ids, x[begin : begin + PART]), folder / f"part-{part:05d}.parquet")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.parquet"))}


@pytest.mark.timeout(900)
def test_a_node_killed_while_it_computes_changes_nothing(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.context import Context
    from pipelines.run_directory import RunDirectory
    from pipelines.stages import cluster as stage

    make(tmp_path / "vectors")
    here = Context(RunDirectory(str(tmp_path / "here")), out=str(tmp_path / "here"))
    stage.execute(here, stage.ClusterConfig(levels=[40]), embeddings=str(tmp_path / "vectors"))  # type: ignore[call-arg]
    monkeypatch.chdir(tmp_path)  # relative paths mean the same on every node
    with Cluster() as cluster:
        node = cluster.add()
        options = ["--embeddings", "vectors", "--out", "there", "--levels", "40"]
        process = cluster.curate("cluster", *options, "--ray-address", cluster.address)
        deadline = time.monotonic() + 120
        while not (busy := node.is_at_work()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        node.kill()
        assert busy, "the node got no work"
        code, said = finish(process)
        assert code == 0, said
    assert digests(tmp_path / "there") == digests(tmp_path / "here") and len(digests(tmp_path / "here")) > ROWS // PART
