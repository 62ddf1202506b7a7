"""`curate embed` as a user types it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cli.main import app
from pipelines.stages import embed
from tests.embeddings.pictures import encoded, scene
from tests.pipelines.image_runs import pass_in_this_process

runner = CliRunner()


def test_folder_of_tables_becomes_a_folder_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "image_pass", pass_in_this_process)
    files = []
    for k in range(3):
        path = tmp_path / f"{k}.jpg"
        path.write_bytes(encoded(scene(k)))
        files.append({"image_id": k, "shard": str(path), "offset": 0, "length": path.stat().st_size})
    (tmp_path / "tables").mkdir()
    table = pa.Table.from_pylist(files).cast(
        pa.schema([("image_id", pa.uint64()), ("shard", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
    )
    pq.write_table(table, tmp_path / "tables" / "a.parquet")
    arguments = [
        "embed",
        "--images",
        f"{tmp_path}/tables",
        "--out",
        f"{tmp_path}/out",
        "--model",
        "sscd_distilled",
        "--json",
    ]
    first = runner.invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout.strip().splitlines()[-1])["summary"] == {
        "images": 3,
        "vectors": 3,
        "unreadable": 0,
        "reasons": {},
    }
    second = runner.invoke(app, arguments)
    assert json.loads(second.stdout.strip().splitlines()[-1])["skipped"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["embed"], 2, "give a run directory, or --images and --out"),
        (["embed", "{}", "--out", "{}/x"], 2, "not both"),
        (["embed", "{}/absent"], 2, "no such run directory"),
        (["embed", "{}", "--model", "sscd"], 2, "run `curate filter` first"),
        (["embed", "{}", "--model", "nonsense"], 2, "model `nonsense` is unknown"),
        (["embed", "{}", "--model", ","], 2, "models"),
        (["embed", "{}", "--max-pixels", "0"], 2, "max_pixels: 0"),
        (["embed", "{}", "--model", "timm:vit_small_patch14_dinov2.lvd142m"], 1, "without a network these work here"),
        (["embed", "--images", "{}/empty", "--out", "{}/x", "--model", "sscd"], 2, "holds no *.parquet"),
        (["embed", "--images", "{}/other", "--out", "{}/x", "--model", "sscd"], 2, "no column `image_id`"),
        (
            ["embed", "--images", "{}/other", "--out", "{}/x", "--model", "sscd,sscd_distilled"],
            2,
            "vectors of one model",
        ),
    ],
)
def test_errors_are_sentences(
    tmp_path: Path, arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", no_network)
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "other" / "a.parquet")
    result = runner.invoke(app, [argument.format(tmp_path) for argument in arguments])
    said = " ".join(result.output.split())
    assert result.exit_code == code, said
    assert words in said and "Traceback" not in said
