"""A whole configuration: what is refused before it starts, in which order stages run, what is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from curation.errors import UserError
from pipelines import catalog, configuration, lock, preflight, run
from pipelines.configuration import RunConfig
from pipelines.context import Context, Outcome
from pipelines.events import Events

Calls = list[tuple[str, bool, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every stage replaced by one that writes a real generation of one part, and notes how it was called."""
    noted: Calls = []

    def stage(name: str) -> Callable[..., Outcome]:
        folder = {"embed": "embed/mobilenet_v2"}.get(name, name)

        def execute(context: Context, config: Any = None, **arguments: Any) -> Outcome:
            noted.append((name, context.rebuild, arguments))
            key = {"source": arguments.get("role", "all")}
            generation = context.begin_keyed(folder, 1, config.fingerprint_options() if config else {}, key)
            if generation is None:
                return context.skipped(folder)
            table = pa.table({"image_id": pa.array([1, 2], pa.uint64())})
            generation.parts = [generation.writer.write(f"part-{generation.number:03d}-000000", table)]
            return context.finish(generation, {"images": 2})

        return execute

    stages = {entry.module: stage(entry.name) for entry in catalog.STAGES}
    monkeypatch.setattr("embeddings.models.registry.check", lambda _name: None)
    monkeypatch.setattr(catalog.Stage, "execute", property(lambda self: stages[self.module]))
    return noted


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "urls.txt").write_text("http://example.test/a.jpg\n")
    for folder in ("seeds", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(b"x")
    return {
        "run": str(tmp_path / "run"),
        "sources": [
            {"as": "seed:birds", "folder": str(tmp_path / "seeds")},
            {"as": "pool", "urls": str(tmp_path / "urls.txt"), "licence": "CC0"},
            {"as": "reference:tests", "folder": str(tmp_path / "tests")},
        ],
    }


def config_of(document: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(document)


def test_stages_run_in_the_order_of_the_catalog_and_sources_in_that_of_the_yaml(
    calls: Calls, document: dict[str, Any]
) -> None:
    outcomes = run.run(config_of(document))
    expected = ["import", "download", "import", "filter", "dedup", "embed", "cluster", "retrieve"]
    assert [name for name, _, _ in calls] == [*expected, "mix", "manifest", "report"]
    assert calls[1][2]["role"] == "pool" and calls[1][2]["licence"] == "CC0"
    assert calls[0][2]["kind"] == "folder" and calls[0][2]["role"] == "seed:birds"
    assert len(outcomes) == len(calls) and not any(outcome.skipped for outcome in outcomes)


def test_second_run_skips_every_stage(calls: Calls, document: dict[str, Any]) -> None:
    run.run(config_of(document))
    assert all(outcome.skipped for outcome in run.run(config_of(document)))


def test_from_and_until_bound_the_stages(calls: Calls, document: dict[str, Any]) -> None:
    run.run(config_of(document), last="filter")
    assert [name for name, _, _ in calls] == ["import", "download", "import", "filter"]
    calls.clear()
    run.run(config_of(document), first="dedup", last="embed")
    assert [name for name, _, _ in calls] == ["dedup", "embed"]


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ({"first": "dedpu"}, "did you mean `dedup`"),
        ({"last": "everything"}, "the stages are download, import"),
        ({"first": "mix", "last": "filter"}, "nothing would run"),
        ({"first": "dedup"}, "download is not finished"),
        ({"rebuild": "clusters"}, "did you mean `cluster`"),
    ],
)
def test_bounds_that_cannot_be_are_refused_before_anything_starts(
    calls: Calls, document: dict[str, Any], bounds: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run.run(config_of(document), **bounds)  # type: ignore[arg-type]
    assert calls == []


def test_from_refuses_a_gap(calls: Calls, document: dict[str, Any]) -> None:
    run.run(config_of(document), last="filter")
    with pytest.raises(UserError, match="--from cluster: dedup is not finished"):
        run.run(config_of(document), first="cluster")


def test_rebuild_makes_the_stage_and_all_after_it_again_and_none_before(calls: Calls, document: dict[str, Any]) -> None:
    run.run(config_of(document))
    calls.clear()
    outcomes = run.run(config_of(document), rebuild="embed")
    assert [name for name, rebuilt, _ in calls if rebuilt] == [
        "embed", "cluster", "retrieve", "mix", "manifest", "report",
    ]  # fmt: skip
    assert [outcome.stage for outcome in outcomes if outcome.skipped] == [
        "import",
        "download",
        "import",
        "filter",
        "dedup",
    ]


def test_stage_left_out_is_not_run(calls: Calls, document: dict[str, Any]) -> None:
    run.run(config_of(document | {"cluster": None, "retrieve": None}))
    assert {"cluster", "retrieve", "balance"}.isdisjoint(name for name, _, _ in calls)


def test_run_yaml_holds_the_configuration_with_absolute_paths(
    calls: Calls, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document["run"] = "run"
    document["sources"][1]["urls"] = "urls.txt"
    run.run(config_of(document))
    stored = configuration.load(str(tmp_path / "run" / "run.yaml"))
    assert stored.run == str(tmp_path / "run")
    assert stored.sources[1].urls == str(tmp_path / "urls.txt")
    assert stored == preflight.resolve(config_of(document))


def test_changed_configuration_keeps_the_former_and_names_the_keys(
    calls: Calls, document: dict[str, Any], tmp_path: Path
) -> None:
    run.run(config_of(document))
    first = (tmp_path / "run" / "run.yaml").read_bytes()
    said: list[str] = []
    events = Events(None, lambda event: said.append(str(event.get("text", ""))))
    changed = config_of(document | {"resources": {"workers": 1}})
    run.run(changed, events=events)
    run.run(changed, events=events)
    assert (tmp_path / "run" / "history" / "run-0000.yaml").read_bytes() == first
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["resources"]["workers"] == 1
    assert len(list((tmp_path / "run" / "history").iterdir())) == 1
    assert any("resources.workers: was None, now 1" in text for text in said)


def test_source_that_the_configuration_no_longer_lists_is_named(
    calls: Calls, document: dict[str, Any], tmp_path: Path
) -> None:
    run.run(config_of(document))
    known = {"kind": "folder", "origin": "x", "rows": 1, "digest": "0", "stage": "import", "generation": 0}
    entry = {"number": 0, "name": "seed:fish", **known}
    (tmp_path / "run" / "sources.json").write_text(json.dumps([entry]))
    said: list[str] = []
    run.run(config_of(document), events=Events(None, lambda event: said.append(str(event.get("text", "")))))
    assert any("also holds seed:fish" in text for text in said)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d, t: d["sources"][1].update(urls=str(t / "nothing.txt")), "no such file"),
        (lambda d, t: d["sources"][0].update(folder=str(t / "nowhere")), "no such folder"),
        (lambda d, t: d["sources"][0].update(folder=str(t / "urls.txt")), "a file, where a folder"),
        (lambda d, t: (t / "urls.txt").write_text(""), "an empty file"),
        (lambda d, t: (t / "seeds" / "a.jpg").unlink(), "an empty folder"),
        (lambda d, t: d["sources"][1].update(urls=str(t / "*.csv")), "no file matches"),
        (lambda d, t: d.update(sources=[]), "none given"),
        (lambda d, t: d.update(sources=d["sources"][:1]), "no pool among them"),
        (lambda d, t: d["sources"].append(d["sources"][0]), "stands there 2 times"),
        (lambda d, t: (t / "run").write_text("x"), "is a file, where the folder of the run"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_starts(
    calls: Calls, document: dict[str, Any], tmp_path: Path, change: Callable[..., Any], sentence: str
) -> None:
    change(document, tmp_path)
    with pytest.raises(UserError, match=sentence):
        run.run(config_of(document))
    assert calls == []


def test_second_driver_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    calls: Calls, document: dict[str, Any]
) -> None:
    code = "import sys; from pipelines import lock; lock.acquire(sys.argv[1]); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, document["run"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"worked on by process {holder.pid}") as refused:
            run.run(config_of(document))
        assert refused.value.exit_code == 1 and calls == []
        assert lock.is_held(document["run"])
        holder.kill()
        holder.wait()
    assert not lock.is_held(document["run"])
    assert run.run(config_of(document))


def test_lock_on_an_object_store_is_renewed_and_counts_as_left_behind_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = f"memory://lock-{os.getpid()}"
    with lock.hold(root):
        assert lock.is_held(root) and lock.holder(root)["pid"] == os.getpid()
        monkeypatch.setattr(lock, "_held", {})
        with pytest.raises(UserError, match="is being worked on"):
            lock.acquire(root)
        monkeypatch.setattr(lock, "STALE_S", -1.0)
        with lock.hold(root):
            pass
    assert not lock.is_held(root)
