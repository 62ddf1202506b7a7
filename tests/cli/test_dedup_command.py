"""`curate dedup` on folders: results, and one sentence for everything a user can get wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from curation.schemas import DUPLICATES
from curation.vectors import embeddings_table


def curate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["dedup", *(str(argument) for argument in arguments)])


def refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert all(word in lines[0] for word in words), lines[0]


def folder(path: Path, x: np.ndarray, model: str | None = None, ids: list[int] | None = None) -> Path:
    path.mkdir()
    table = embeddings_table(np.array(range(len(x)) if ids is None else ids, np.uint64), x)
    if model:
        table = table.replace_schema_metadata({"curate.model": json.dumps({"name": model})})
    pq.write_table(table, path / "a.parquet")
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).standard_normal((60, 64))
    x[1] = x[0] + 0.1 * x[1]
    return folder(tmp_path / "pool", x, "sscd")


@pytest.mark.usefixtures("ray_session")
def test_folder_of_embeddings_is_deduplicated_against_a_reference_set(tmp_path: Path, pool: Path) -> None:
    known = pq.read_table(pool / "a.parquet")["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    against = folder(tmp_path / "test", known.reshape(60, 64)[[5, 6]].astype(np.float32), "sscd")
    out = tmp_path / "out"
    arguments = ("--embeddings", pool, "--out", out, "--against", f"eval={against}", "--against-threshold", "0.5")
    result = curate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])["summary"]
    assert (summary["self"], summary["reference"], summary["kept"]) == (1, 2, 57)
    table = pq.read_table(next(out.glob("part-*.parquet")))
    assert table.schema.equals(DUPLICATES, check_metadata=False) and table.num_rows == 60
    assert [p.suffix for p in out.glob("part-*")] == [".parquet"]
    again = curate(*arguments)
    assert again.exit_code == 0 and "already done" in again.output
    assert "reference set eval: 2 of 2 images hit; 2 direct copies" in again.output


def test_wrong_options_are_refused(tmp_path: Path, pool: Path) -> None:
    out = tmp_path / "out"
    both = ("--embeddings", pool, "--out", out)
    refused(curate(*both, "--threshold", "1.6"), "threshold", "1.6")
    refused(curate(*both, "--against-threshold", "0"), "against_threshold")
    refused(curate(*both, "--representative", "best"), "representative", "best")
    refused(curate(*both, "--threshold", "0.5", "--store-threshold", "0.7"), "store_threshold 0.7 is above")
    refused(curate(*both, "--against", tmp_path / "nothing"), "nothing", "does not exist")
    refused(curate("--embeddings", pool), "--out")
    refused(curate(), "give a run directory")
    refused(curate(tmp_path / "run", *both), "not both")
    refused(curate(tmp_path / "run"), "no such run directory")
    assert not list(out.glob("part-*"))


def test_folders_that_are_no_embeddings_are_refused(tmp_path: Path, pool: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(curate("--embeddings", tmp_path / "nothing", *out), "nothing", "does not exist")
    (tmp_path / "columns").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "columns" / "a.parquet")
    refused(curate("--embeddings", tmp_path / "columns", *out), "no column `image_id`")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"PAR1 no")
    refused(curate("--embeddings", tmp_path / "broken", *out), "not a readable Parquet file")
    x = np.random.default_rng(0).standard_normal((3, 64))
    other = folder(tmp_path / "other", x, "mobilenet_v2")
    refused(curate("--embeddings", pool, *out, "--against", other), "mobilenet_v2", "sscd", "one model")
    short = folder(tmp_path / "short", x[:, :32], "sscd")
    refused(curate("--embeddings", pool, *out, "--against", short), "32 dimensions")
    repeated = folder(tmp_path / "repeated", x, ids=[1, 2, 1])
    refused(curate("--embeddings", repeated, *out), "image_id 1 occurs more than once")
    refused(curate("--embeddings", pool, "--out", pool / "a.parquet" / "x"), "cannot be written", code=1)
    refused(curate("--embeddings", pool, "--out", pool), "already holds Parquet files")
    assert [p.name for p in pool.iterdir() if p.name != ".lock"] == ["a.parquet"], "nothing is left in a wrong folder"


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN or infinite"), (0.0, "a zero vector")])
def test_vectors_without_direction_are_refused_and_the_mended_folder_is_taken(
    tmp_path: Path, value: float, said: str
) -> None:
    x = np.random.default_rng(0).standard_normal((5, 16))
    x[3] = value
    bad = folder(tmp_path / "bad", x, ids=[5, 6, 7, 88, 9])
    refused(curate("--embeddings", bad, "--out", tmp_path / "out"), said, "image_id 88", "leave them out")
    table = pq.read_table(bad / "a.parquet")
    pq.write_table(table.take([0, 1, 2, 4]), bad / "a.parquet")
    result = curate("--embeddings", bad, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "4 rows" in result.output, result.output


@pytest.mark.usefixtures("ray_session")
def test_adversarial_folders_finish_or_stop_with_a_sentence(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 32))

    def summary(name: str, rows: np.ndarray, *options: str) -> dict[str, Any]:
        made = folder(tmp_path / name, rows)
        result = curate("--embeddings", made, "--out", tmp_path / f"{name}-out", "--json", *options)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])["summary"]
        return found

    equal = summary("equal", np.repeat(x[:1], 3000, axis=0), "--max-component", "10")
    assert (equal["kept"], equal["largest_component"], equal["components_too_large"]) == (1, 3000, 1)
    chain = np.array([np.cos(k / 8) * x[0] / 6 + np.sin(k / 8) * x[1] / 6 for k in range(100)])
    giant = summary("giant", chain)
    assert (giant["components"], giant["largest_component"]) == (1, 100) and giant["least_similarity"] < 0
    stars = summary("stars", chain, "--split", "star")
    assert stars["kept"] > 5 and stars["not_above_threshold_to_representative"] == 0
    cut = summary("cut", chain, "--max-component", "10")
    assert cut["largest_component"] <= 10 and cut["components_cut"] == 1
    lone = summary("lone", x[:1])
    assert (lone["kept"], lone["components"]) == (1, 1)


def test_folders_that_hold_two_kinds_of_vectors_are_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, second in (("models", {"model": "sscd"}), ("dimensions", {"dimension": 16})):
        made = folder(tmp_path / name, random.standard_normal((3, 32)), "mobilenet_v2")
        other = folder(
            tmp_path / f"{name}-2", random.standard_normal((3, second.get("dimension", 32))), "sscd", [7, 8, 9]
        )
        (other / "a.parquet").rename(made / "b.parquet")
        words = ("two models",) if name == "models" else ("16 dimensions beside 32",)
        refused(curate("--embeddings", made, "--out", tmp_path / "out"), *words)
    refused(
        curate("--embeddings", tmp_path / "models", "--out", tmp_path / "out", "--max-component", "1"), "max_component"
    )
