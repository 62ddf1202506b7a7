"""`curate add`: what is refused before anything is fetched, what is told, drift against numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from curation import hierarchy
from curation.errors import UserError
from curation.vectors import embeddings_table
from pipelines import add, cluster, configuration, run
from pipelines.configuration import RunConfig, SourceConfig
from pipelines.context import Context, Outcome
from pipelines.run_directory import RunDirectory
from pipelines.stages import cluster as clustering
from pipelines.stages.cluster import ClusterConfig
from tests.pipelines import selection_runs as runs
from tests.pipelines.synthetic_run import finish

STAGES = ("import", "filter", "dedup-search", "dedup", "embed/mobilenet_v2", "cluster", "retrieve", "mix", "manifest")


def ids_table(ids: list[int]) -> pa.Table:
    return pa.table({"image_id": pa.array(ids, pa.uint64())})


@pytest.fixture
def finished(tmp_path: Path) -> RunConfig:
    """A run whose stages are all complete, with one pool folder and one seed set."""
    for name in ("pool", "seeds", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"x")
    sources = [
        {"as": "pool", "folder": str(tmp_path / "pool")},
        {"as": "seed:birds", "folder": str(tmp_path / "seeds")},
    ]
    config = RunConfig.model_validate({"run": str(tmp_path / "run"), "sources": sources})
    directory = RunDirectory(config.run)
    for stage in (*STAGES, "score", "report"):
        finish(directory, stage, {"part-000-000000": ids_table([1, 2, 3])})
    Path(config.run, "run.yaml").write_text(configuration.dump(config))
    return config


def pool(path: Path | str, role: str = "pool") -> SourceConfig:
    return SourceConfig.model_validate({"as": role, "folder": str(path)})


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, finished: RunConfig) -> list[tuple[RunConfig, str | None]]:
    """In place of the stages: each writes a second generation; the manifest loses image 1 and gains 4 and 5."""
    called: list[tuple[RunConfig, str | None]] = []

    def carried_out(config: RunConfig, *, rebuild: str | None = None, events: Any = None) -> list[Outcome]:
        called.append((config, rebuild))
        Path(config.run, "run.yaml").write_text(configuration.dump(config))
        directory = RunDirectory(config.run)
        if len(directory.stage("manifest").generations()) == 1:
            for stage in STAGES:
                files = {"bridged.json": json.dumps([{"component_id": 1, "representatives": [1, 2]}]).encode()}
                more = {"files": files} if stage == "dedup" else {}
                finish(directory, stage, {"part-002-000000": ids_table([2, 3, 4, 5])}, **more)
        return []

    monkeypatch.setattr(run, "run", carried_out)
    monkeypatch.setattr(add, "drift", lambda _context, before: [{"level": before}])
    return called


def test_source_is_appended_and_the_second_call_goes_on_with_it(
    tmp_path: Path, finished: RunConfig, stages: list[tuple[RunConfig, str | None]]
) -> None:
    first = add.add(finished.run, [pool(tmp_path / "more")])
    again = add.add(finished.run, [pool(tmp_path / "more")], re_elect=True)
    for config, _ in stages:
        assert [s.origin[1] for s in config.sources] == [str(tmp_path / n) for n in ("pool", "seeds", "more")]
    assert [rebuild for _, rebuild in stages] == [None, "dedup"]
    assert first.manifest == again.manifest == {"before": 3, "now": 4, "gained": 2, "lost": 1}
    assert first.bridged == [{"component_id": 1, "representatives": [1, 2]}]
    assert first.sources == ["pool:more"] and first.drift == [{"level": 1}] and again.drift == [{"level": 0}]
    kept = json.loads(Path(finished.run, "added", "pool-more.json").read_text())
    assert kept["before"]["dedup"] == 1 and kept["manifest"]["gained"] == 2


def test_interrupted_addition_tells_of_all_that_was_added(
    tmp_path: Path, finished: RunConfig, stages: list[tuple[RunConfig, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.run

    def dies(*arguments: Any, **more: Any) -> list[Outcome]:
        whole(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        add.add(finished.run, [pool(tmp_path / "more")])
    monkeypatch.setattr(run, "run", whole)
    assert add.add(finished.run, [pool(tmp_path / "more")]).manifest["gained"] == 2


def test_what_cannot_be_added_is_refused_before_anything_is_fetched(
    tmp_path: Path, finished: RunConfig, stages: list[tuple[RunConfig, str | None]]
) -> None:
    def refused(sources: list[SourceConfig], sentence: str, folder: str = finished.run) -> None:
        with pytest.raises(UserError, match=sentence):
            add.add(folder, sources)
        assert not stages
        if folder == finished.run:
            assert len(yaml.safe_load(Path(folder, "run.yaml").read_text())["sources"]) == 2

    refused([pool(tmp_path / "more")], "no run.yaml", str(tmp_path / "nothing"))
    refused([pool(tmp_path / "more", "seed:birds")], "name of its own with --as seed:NAME")
    options = {"store_threshold": 0.6}
    path = Path(finished.run, "dedup-search", "_stage.json")
    document = json.loads(path.read_text())
    document["generations"][0]["fingerprint"]["options"] = options
    path.write_text(json.dumps(document))
    refused([pool(tmp_path / "more", "reference:test")], "no reference set so far .* 0.45 is needed")
    Path(finished.run, "mix", "_stage.json").unlink()
    refused([pool(tmp_path / "more")], "mix is not finished; `curate run .*` first")


def test_drift_is_that_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "start", lambda *_: None)
    monkeypatch.setattr(cluster, "spread", runs.in_place)
    context = runs.make_run(tmp_path, (runs.WEB,))
    clustering.execute(context, ClusterConfig(levels=[12, 3], iterations=5))
    assert add.drift(context, 1) == []
    finish(context.run, runs.EMBED, runs.embed_parts([runs.MORE]), metadata=runs.METADATA)
    clustering.execute(Context(context.run), ClusterConfig(levels=[12, 3], iterations=5))
    built, _, _ = hierarchy.read_hierarchy(context.run.stage("cluster").generations()[0].directory)
    told = add.drift(context, 1)
    assert [one["level"] for one in told] == [1, 2]
    vectors, paths = [], []
    for number, source in enumerate((runs.WEB, runs.MORE)):
        table = embeddings_table(runs.ids_of(source), runs.vectors_of(source))["embedding"].combine_chunks()
        vectors.append(table.flatten().to_numpy(zero_copy_only=False).reshape(-1, runs.DIMENSION).astype(np.float64))
        paths.append(runs.tables(context, "cluster", number))
    for level, one in enumerate(told):
        shares, means = [], []
        for rows, table in zip(vectors, paths, strict=True):
            mine = table[f"cluster_{level + 1}"].to_numpy()
            shares.append(np.bincount(mine, minlength=one["clusters"]) / len(mine))
            means.append(np.linalg.norm(rows - built.centroids[level][mine], axis=1).mean())
        assert [one["mean_distance_older"], one["mean_distance_new"]] == pytest.approx(means, abs=2e-6)
        assert one["moved"] == pytest.approx(np.abs(shares[1] - shares[0]).sum() / 2, abs=1e-6)
        most = one["clusters_most_changed"][0]
        assert abs(most["share_new"] - most["share_older"]) == pytest.approx(np.abs(shares[1] - shares[0]).max())


def test_common_ids_of_two_manifests_are_counted_part_by_part(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sets, paths = [], []
    for name in ("one", "other"):
        directory = RunDirectory(str(tmp_path / name))
        ids = np.unique(random.integers(0, 500, 300))
        cuts = np.sort(random.integers(0, len(ids), 5))
        parts = {f"part-{k:06d}": ids_table(part.tolist()) for k, part in enumerate(np.split(ids, cuts))}
        finish(directory, "manifest", parts)
        sets.append(set(ids.tolist()))
        paths.append(directory.stage("manifest").part_paths())
    assert add._common(*paths) == len(sets[0] & sets[1])


def test_sources_that_are_listed_already_are_not_listed_again() -> None:
    config = RunConfig.model_validate({"run": "/run", "sources": [{"as": "pool:a", "folder": "/x"}]})
    assert add.with_sources(config, [pool("/x", "pool:a")]) == (config, False)
    grown, fresh = add.with_sources(config, [pool("/y", "pool:b"), pool("/z")])
    assert fresh and [s.role for s in grown.sources] == ["pool:a", "pool:b", "pool"]
