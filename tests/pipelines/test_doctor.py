"""The doctor never crashes, whatever is missing or broken."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from curation.errors import UserError
from pipelines import doctor


def test_every_topic_has_a_finding() -> None:
    topics = [finding.topic for finding in doctor.examine()]
    for word in (
        "cores",
        "memory",
        "disk",
        "gpus",
        "torch",
        "faiss",
        "ray",
        "copy",
        "nsfw",
        "faces",
        "semantic",
        "cache",
    ):
        assert any(word in topic for topic in topics), word


def test_missing_packages_are_findings_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def no_faiss() -> None:
        raise UserError("FAISS is not installed", exit_code=1)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr("curation.search.require_faiss", no_faiss)
    monkeypatch.setattr("curation.search.installed_faiss", list)
    found = {finding.topic: finding for finding in doctor.examine()}
    assert found["faiss"].state == "missing" and "pip install" in (found["faiss"].remedy or "")
    assert found["copy embedding (SSCD)"].state == "optional"
    assert found["ray"].state == "missing"


def test_package_that_breaks_on_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {finding.topic: finding for finding in doctor.examine()}
    assert found["torch"].state == "broken"
    assert found["cores"].state == "ok"


def test_folder_that_is_not_there_yet_is_judged_by_its_nearest_parent(tmp_path: Path) -> None:
    found = {finding.topic: finding for finding in doctor.examine(str(tmp_path / "a" / "b"))}
    assert str(tmp_path) in found["disk"].found
