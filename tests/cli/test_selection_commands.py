"""`curate cluster`, `retrieve`, `balance`, `mix`: results of plain folders, one sentence for mistakes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cli.main import app
from curation.schemas import BALANCE, RETRIEVAL, clusters_schema
from pipelines import cluster as ray_cluster
from tests.pipelines.selection_runs import BIRDS, METADATA, WEB, add_dedup, add_filter, in_place, make_run, plain_folder


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    return plain_folder(tmp_path / "pool", WEB)


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    return plain_folder(tmp_path / "birds", BIRDS, parts=2)


def curate(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def refused(sentence: str, *arguments: object, code: int = 2) -> None:
    found, _, said = curate(*arguments)
    assert (found, said.count("error: ")) == (code, 1), said
    assert sentence in said, said


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def test_plain_folders_go_from_embeddings_to_a_balanced_sample(tmp_path: Path, pool: str, seeds: str) -> None:
    clusters, sample = tmp_path / "clusters", tmp_path / "sample"
    code, said, _ = curate("cluster", "--embeddings", pool, "--out", clusters, "--levels", "20,5")
    assert code == 0 and "cluster: 500 rows in" in said
    assert rows(clusters).schema.equals(clusters_schema(2))
    assert curate("retrieve", "--embeddings", pool, "--seeds", seeds, "--mode", "sample", "--out", sample)[0] == 0
    assert rows(sample).schema.equals(RETRIEVAL)
    assert rows(sample).num_rows == 4 * 24
    assert rows(sample)["seed_set"].unique().to_pylist() == ["birds"]
    code, text, _ = curate("retrieve", "--embeddings", pool, "--seeds", f"a={seeds}", "--seeds", f"b={seeds}",
                           "--mode", "cluster", "--clusters", clusters, "--per-cluster", 5, "--min-seeds", 4,
                           "--cap", 9, "--out", tmp_path / "by-cluster", "--json")  # fmt: skip
    summary = json.loads(text)["summary"]["seed_sets"]
    assert code == 0 and {name: one["rows"] for name, one in summary.items()} == {"a": 9, "b": 9}
    assert curate("balance", "--clusters", clusters, "--target", 50, "--out", tmp_path / "balanced")[0] == 0
    assert rows(tmp_path / "balanced").schema.equals(BALANCE)
    assert rows(tmp_path / "balanced").num_rows == 50
    code, said, _ = curate("cluster", "--embeddings", pool, "--out", clusters, "--levels", "20,5")
    assert code == 0 and "already done" in said
    refused("was made otherwise", "cluster", "--embeddings", pool, "--out", clusters, "--levels", "20,4")
    assert curate("cluster", "--embeddings", pool, "--out", clusters, "--levels", "20,4", "--rebuild")[0] == 0


def test_a_run_goes_from_embeddings_to_the_mix(tmp_path: Path) -> None:
    context = make_run(tmp_path / "run")
    add_filter(context)
    add_dedup(context)
    run = context.run.root
    assert curate("cluster", run, "--levels", "20,5")[0] == 0
    code, said, _ = curate("retrieve", run, "--mode", "sample", "--neighbours", 2)
    assert code == 0 and "birds: mode sample, seeds 24, neighbours 2, nominal 48" in said
    assert curate("balance", run, "--target", 60, "--leaves", "nearest")[0] == 0
    shares = (
        "--share",
        "seed=0.3",
        "--share",
        "retrieve:birds=0.2",
        "--share",
        "retrieve=0.3",
        "--share",
        "balance=0.2",
    )
    code, text, _ = curate("mix", run, *shares, "--json")
    summary = json.loads(text)["summary"]
    assert code == 0 and summary["mean_weight"] == pytest.approx(1)
    assert summary["sources"]["balance"] == {"images": 60, "nominal": 60}
    refused("no seed set `bird`; did you mean `birds`?", "mix", run, "--as-is", "bird")
    refused(
        "add up to 0.5, not to 1",
        "mix",
        run,
        "--share",
        "seed=0.1",
        "--share",
        "retrieve=0.2",
        "--share",
        "balance=0.2",
    )
    refused("--share seed: expected NAME=PART", "mix", run, "--share", "seed")
    refused("--share seed=much: expected NAME=PART", "mix", run, "--share", "seed=much")


def test_help_has_examples() -> None:
    for command in ("cluster", "retrieve", "balance", "mix"):
        code, text, _ = curate(command, "--help")
        assert code == 0 and f"Example: curate {command}" in text


@pytest.mark.parametrize("command", ["cluster", "retrieve", "balance", "mix"])
def test_no_run_or_a_missing_one_is_refused(tmp_path: Path, command: str) -> None:
    refused("give ", command)
    more = ["--target", 5] if command == "balance" else []
    refused("no such run directory", command, tmp_path / "absent", *more)
    assert not (tmp_path / "absent").exists()


def test_options_that_do_not_fit_together_are_refused(tmp_path: Path, pool: str, seeds: str) -> None:
    out = tmp_path / "out"
    refused("--out is missing", "cluster", "--embeddings", pool)
    refused("not both", "cluster", tmp_path, "--embeddings", pool)
    refused("--seeds is missing", "retrieve", "--embeddings", pool, "--out", out)
    refused("goes by cluster: give --clusters", "retrieve", "--embeddings", pool, "--seeds", seeds, "--out", out)
    refused("a second seed set named birds", "retrieve", "--embeddings", pool, "--seeds", seeds, "--seeds", seeds,
            "--mode", "sample", "--out", out)  # fmt: skip
    refused("target: missing", "balance", "--clusters", pool, "--out", out)
    refused("target: 0 is refused", "balance", "--clusters", pool, "--out", out, "--target", 0)
    refused("every level needs fewer clusters", "cluster", "--embeddings", pool, "--out", out, "--levels", "5,50")
    refused("levels.0: 'x' is refused", "cluster", "--embeddings", pool, "--out", out, "--levels", "x")
    code, _, said = curate("cluster", "--embeddings", pool, "--out", out, "--level", "5")
    assert code == 2 and "No such option" in said
    code, _, said = curate("retrieve", "--embeddings", pool, "--seeds", seeds, "--mode", "nearest", "--out", out)
    assert code == 2 and "'nearest' is not one of" in said
    assert {path.name for path in out.glob("*")} <= {".lock"}


def test_folders_that_are_not_what_they_should_be_are_refused(tmp_path: Path, pool: str, seeds: str) -> None:
    out = ("--out", tmp_path / "out")
    empty, columns, garbage, model = (tmp_path / name for name in ("empty", "columns", "garbage", "model"))
    for folder in (empty, columns, garbage):
        folder.mkdir()
    pq.write_table(pa.table({"id": [1]}), columns / "a.parquet")
    (garbage / "a.parquet").write_bytes(b"not parquet")
    plain_folder(model, BIRDS)
    for path in model.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"curate.model": '{"name": "other"}'}), path)
    for path in Path(pool).glob("*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(METADATA), path)
    refused("absent: does not exist", "cluster", "--embeddings", tmp_path / "absent", *out)
    refused("is empty of *.parquet files", "cluster", "--embeddings", empty, *out)
    refused("no column `image_id`", "cluster", "--embeddings", columns, *out)
    refused("not a readable Parquet file", "cluster", "--embeddings", garbage, *out)
    refused("501 clusters of 500 images", "cluster", "--embeddings", pool, "--levels", 501, *out)
    sample = ("retrieve", "--embeddings", pool, "--mode", "sample", *out, "--seeds")
    refused("was embedded by other, ", *sample, model)
    refused("absent: does not exist", *sample, tmp_path / "absent")
    refused("no column `cluster_1`", "balance", "--clusters", pool, "--target", 5, *out)
    refused("absent: does not exist", "balance", "--clusters", tmp_path / "absent", "--target", 5, *out)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


def test_bad_vectors_and_repeated_ids_are_refused(tmp_path: Path, pool: str) -> None:
    table = pq.read_table(f"{pool}/0.parquet")
    pq.write_table(table, f"{pool}/again.parquet")
    out = tmp_path / "out"
    refused("image_id 0 occurs more than once", "cluster", "--embeddings", pool, "--out", out)
    Path(f"{pool}/again.parquet").unlink()
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[3] = np.nan
    sound = pq.read_table(f"{pool}/0.parquet")
    broken = pa.FixedSizeListArray.from_arrays(pa.array(values), 16).cast(table.schema.field("embedding").type)
    pq.write_table(table.set_column(1, table.schema.field("embedding"), broken), f"{pool}/0.parquet")
    refused("image_id 0 has NaN or infinite values", "cluster", "--embeddings", pool, "--out", out)
    pq.write_table(sound, f"{pool}/0.parquet")
    assert curate("cluster", "--embeddings", pool, "--out", out)[0] == 0


def test_a_folder_that_cannot_be_written_is_exit_code_one(tmp_path: Path, pool: str) -> None:
    (tmp_path / "file").write_text("in the way")
    refused("cannot be written", "cluster", "--embeddings", pool, "--levels", 5, "--out", tmp_path / "file/out", code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.parquet").write_bytes(b"")
    refused("choose an empty folder", "cluster", "--embeddings", pool, "--levels", 5, "--out", tmp_path / "full")
    assert (tmp_path / "full/mine.parquet").exists()
