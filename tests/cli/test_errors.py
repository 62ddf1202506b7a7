"""What a user can do wrong gives one sentence and exit code 2 (asked wrongly) or 1 (it failed), never a traceback."""

import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from curation import storage
from curation.vectors import MODEL_KEY


def curate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str, code: int = 2) -> str:
    """The sentence of a refusal; asserts that it is one, with these words and this exit code."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"not looked at before the run starts")
    return folder


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run_yaml(tmp_path: Path, images: Path, more: str = "") -> Path:
    text = f"run: {tmp_path / 'run'}\nsources:\n  - {{as: pool, folder: {images}}}\n{more}"
    return written(tmp_path / "run.yaml", text)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("dedup: {threshold: 1.6}\n", ("dedup.threshold", "1.6", "line 4")),
        ("dedupe: {threshold: 0.6}\n", ("dedupe: unknown key", "did you mean `dedup`", "line 4")),
        ("dedup:\n  treshold: 0.6\n", ("dedup.treshold: unknown key", "did you mean `threshold`", "line 5")),
        ("seed: 1\nseed: 2\n", ("line 5", "'seed' is written twice")),
        ("seed: [1\n", ("not valid YAML", "line")),
        ("seed: !!python/object/apply:os.system ['true']\n", ("not valid YAML", "line 4")),
        ("seed: !Anything 1\n", ("not valid YAML", "line 4")),
        ("seed: many\n", ("seed", "many", "line 4")),
        ("seed: -1\n", ("seed", "-1")),
        ("resources: {workers: 0}\n", ("resources.workers", "line 4")),
        ("resources: {memory_per_worker: lots}\n", ("resources.memory_per_worker", "lots", "line 4")),
        ("embed: {models: [resnet-fifty]}\nbalance: {target: 1}\n", ("resnet-fifty", "mobilenet_v2")),
        ("retrieve: {seed_sets: {birds: {}}}\n", ("retrieve.seed_sets.birds", "no source is `as: seed:birds`")),
    ],
)
def test_configuration_error_names_the_key_the_line_and_the_remedy(
    tmp_path: Path, images: Path, more: str, words: tuple[str, ...]
) -> None:
    refused(curate("run", run_yaml(tmp_path, images, more)), *words)
    assert not (tmp_path / "run" / "sources.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("a configuration is a mapping",)),
        ("- a\n- b\n", ("a configuration is a mapping",)),
        ("sources: []\n", ("run: missing",)),
        ("run: [a]\n", ("run", "string", "line 1")),
        ("run: x\nsources: [{as: pool}]\n", ("give exactly one of urls, folder, tars, parquet", "line 2")),
        ("run: x\nsources: [{as: pool, urls: a, tars: b}]\n", ("given: urls, tars",)),
        ("run: x\nsources: [{as: seeds, urls: a}]\n", ("sources.0.as", "seeds")),
        ("run: x\nsources: [{as: seed, urls: a}]\n", ("needs a name",)),
        ("run: x\nsources: [{as: pool, url: a}]\n", ("did you mean `urls`",)),
        ("run: x\nsources: []\n", ("none given",)),
    ],
)
def test_document_that_is_no_run_is_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(curate("run", written(tmp_path / "run.yaml", text)), *words)


def test_missing_or_unreadable_configuration(tmp_path: Path) -> None:
    refused(curate("run", tmp_path / "none.yaml"), "no such configuration", "curate init")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    refused(curate("run", tmp_path / "picture.yaml"), "cannot be read as text")
    refused(curate("run", tmp_path), str(tmp_path))


def test_missing_and_empty_sources(tmp_path: Path, images: Path) -> None:
    refused(curate("run", run_yaml(tmp_path, tmp_path / "nowhere")), "sources.0.folder", "no such folder")
    (images / "a.jpg").unlink()
    refused(curate("run", run_yaml(tmp_path, images)), "sources.0.folder", "an empty folder")


def test_run_directory_that_is_a_file(tmp_path: Path, images: Path) -> None:
    written(tmp_path / "run", "x")
    refused(curate("run", run_yaml(tmp_path, images)), "is a file, where the folder of the run is expected")
    refused(curate("status", tmp_path / "run"), "a file, where a run directory is expected")


def test_run_directory_below_a_file_cannot_be_written(tmp_path: Path, images: Path) -> None:
    written(tmp_path / "file", "x")
    config = run_yaml(tmp_path, images)
    config.write_text(config.read_text().replace(str(tmp_path / "run"), str(tmp_path / "file" / "run")))
    refused(curate("run", config), "cannot be written", code=1)


def test_full_disk(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        return Full() if mode == "wb" else builtins.open(path, mode, *arguments, **named)

    monkeypatch.setattr(storage, "open", opened, raising=False)
    refused(curate("run", run_yaml(tmp_path, images)), "no space left on the disk", code=1)


def test_rays_own_end_is_a_sentence_and_a_fault_of_ours_is_not_hidden(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def failing(error: Exception) -> Result:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("pipelines.cluster.start", fail)
        return curate("import", images, "--as", "pool", "--out", tmp_path / "run")

    refused(failing(ray.exceptions.LocalRayletDiedError()), "Ray's own processes", "same command again", code=1)
    ours = failing(ray.exceptions.RayTaskError("import_part", "Traceback", ValueError("a fault")))
    assert isinstance(ours.exception, ray.exceptions.RayTaskError)


def test_second_driver(tmp_path: Path, images: Path) -> None:
    config = run_yaml(tmp_path, images)
    code = "import sys; from pipelines import lock; lock.acquire(sys.argv[1]); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused(curate("run", config), f"worked on by process {holder.pid}", code=1)
        holder.kill()


def test_unknown_stage_hardware_template_and_command(tmp_path: Path, images: Path) -> None:
    config = run_yaml(tmp_path, images)
    refused(curate("run", config, "--from", "deduplicate"), "no such stage", "dedup")
    refused(curate("run", config, "--plan", "--hardware", "h100"), "--hardware h100")
    refused(curate("init", tmp_path / "new.yaml", "--template", "lvd"), "no such template", "lvd142m")
    refused(curate("init", config), "is there already")
    for arguments in (
        ["crawl"],
        ["run"],
        ["run", str(config), "--form", "dedup"],
        ["run", str(config), "--nodes", "0"],
    ):
        result = curate(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output


def test_pool_alone_makes_no_dataset(tmp_path: Path, images: Path) -> None:
    refused(curate("run", run_yaml(tmp_path, images)), "nothing would enter the dataset", "balance")


def test_plan_of_what_is_not_there(tmp_path: Path) -> None:
    refused(curate("run", run_yaml(tmp_path, tmp_path / "nowhere"), "--plan"), "no `images:` says how many")


def vectors(
    folder: Path, model: str | None = None, dimension: int = 8, rows: int = 20, name: str = "embedding"
) -> Path:
    """A folder of Parquet with `image_id` and an embedding column."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(dimension).normal(size=(rows, dimension)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimension)
    table = pa.table({"image_id": pa.array(range(rows), pa.uint64()), name: column})
    if model:
        table = table.replace_schema_metadata({MODEL_KEY: model.encode()})
    pq.write_table(table, folder / "part-0.parquet")
    return folder


@pytest.mark.parametrize("command", ["dedup", "cluster", "retrieve"])
def test_embeddings_that_are_not_there_or_lack_the_column(tmp_path: Path, command: str) -> None:
    out = ["--out", tmp_path / "out"]
    more = ["--seeds", vectors(tmp_path / "seeds"), "--mode", "sample"] if command == "retrieve" else []
    refused(curate(command, "--embeddings", tmp_path / "nowhere", *out, *more), "nowhere")
    (tmp_path / "empty").mkdir()
    refused(curate(command, "--embeddings", tmp_path / "empty", *out, *more), "empty")
    other = vectors(tmp_path / "other", name="vector")
    refused(curate(command, "--embeddings", other, *out, *more), "embedding")
    assert not list(tmp_path.glob("out/part-*"))


def test_folder_of_another_models_embeddings(tmp_path: Path) -> None:
    one, two = vectors(tmp_path / "one", "model-a"), vectors(tmp_path / "two", "model-b")
    common = ["--out", tmp_path / "out"]
    refused(curate("dedup", "--embeddings", one, "--against", two, *common), "model")
    refused(curate("retrieve", "--embeddings", one, "--seeds", two, "--mode", "sample", *common), "model")
    wide = vectors(tmp_path / "wide", dimension=16)
    refused(curate("retrieve", "--embeddings", one, "--seeds", wide, "--mode", "sample", *common), "16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dedup", "--embeddings", "{v}", "--out", "{o}", "--threshold", "1.6"], ("threshold", "1.6")),
        (["dedup", "--embeddings", "{v}"], ("--out",)),
        (["cluster", "--embeddings", "{v}", "--out", "{o}", "--levels", "1000"], ("1,000", "20")),
        (["cluster", "--embeddings", "{v}", "--out", "{o}", "--levels", "3,9"], ("levels",)),
        (["cluster", "--embeddings", "{v}", "--out", "{o}", "--levels", "many"], ("levels", "many")),
        (["retrieve", "--embeddings", "{v}", "--out", "{o}"], ("--seeds",)),
        (["retrieve", "--embeddings", "{v}", "--seeds", "{v}", "--mode", "cluster", "--out", "{o}"], ("--clusters",)),
        (["download", "{o}/urls.txt", "--out", "{o}"], ("urls.txt",)),
        (["download", "{e}", "--out", "{o}"], ("empty.txt",)),
        (["import", "{o}/images", "--as", "pool", "--out", "{o}"], ("images",)),
        (["import", "{v}", "--as", "seeds", "--out", "{o}"], ("seeds",)),
        (["import", "{v}", "--as", "seed", "--out", "{o}"], ("needs a name",)),
        (["filter", "{o}"], ("{o}",)),
        (["embed", "{o}"], ("{o}",)),
        (["cluster", "{o}"], ("{o}",)),
        (["mix", "{o}"], ("{o}",)),
        (["manifest", "{o}"], ("{o}",)),
        (["report", "{o}"], ("{o}",)),
        (["status", "{o}"], ("{o}",)),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_command_that_cannot_be_carried_out(tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    places = {"v": vectors(tmp_path / "vectors"), "o": tmp_path / "out", "e": written(tmp_path / "empty.txt", "")}
    filled = [argument.format(**places) for argument in arguments]
    refused(curate(*filled), *(word.format(**places) for word in words))
