"""The cluster stage: exact sizes, nearest leaves, equal bytes on any workers, later images on the same centroids."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import hierarchy
from curation.errors import UserError
from curation.schemas import centroids_schema, clusters_schema
from pipelines import cluster as ray_cluster
from pipelines.stages import cluster
from pipelines.stages.cluster import ClusterConfig
from tests.pipelines.selection_runs import (
    BIRDS,
    CARS,
    DIMENSION,
    EMBED,
    METADATA,
    MORE,
    WEB,
    contents,
    embed_parts,
    ids_of,
    in_place,
    make_run,
    plain_context,
    plain_folder,
    tables,
    vectors_of,
)
from tests.pipelines.synthetic_run import finish

CONFIG = ClusterConfig(levels=[30, 6])  # type: ignore[call-arg]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def test_kept_pool_images_go_to_their_nearest_leaf_and_sizes_are_exact(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path, (WEB, MORE, BIRDS, CARS))
    outcome = cluster.execute(context, CONFIG)
    table = tables(context, "cluster")
    assert table.schema.equals(clusters_schema(2))
    assert table["image_id"].to_pylist() == [*ids_of(WEB).tolist(), *ids_of(MORE).tolist()]
    generation = context.run.stage("cluster").generations()[0]
    assert [part.name for part in generation.parts] == sorted(embed_parts((WEB, MORE)))
    built, sizes, model = hierarchy.read_hierarchy(generation.directory)
    assert model == METADATA["curate.model"]
    vectors = np.concatenate([vectors_of(WEB), vectors_of(MORE)]).astype(np.float16).astype(np.float64)
    exact = np.sqrt(((vectors[:, None] - built.centroids[0][None]) ** 2).sum(-1))
    leaves = table["cluster_1"].to_numpy()
    assert np.allclose(table["distance"].to_numpy(), exact.min(axis=1), atol=1e-3)
    assert np.array_equal(table["cluster_2"].to_numpy(), built.parents[0][leaves])
    assert np.array_equal(sizes[0], np.bincount(leaves, minlength=30))
    assert np.array_equal(sizes[1], np.bincount(table["cluster_2"].to_numpy(), minlength=6))
    assert pq.read_schema(generation.file("centroids/level-1.parquet")).equals(centroids_schema(DIMENSION))
    assert outcome.summary["images"] == 700
    assert outcome.summary["empty_clusters"] == 0
    assert cluster.execute(context, CONFIG).skipped


def test_equal_bytes_on_two_workers_on_none_and_whatever_arrives_first(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "BLOCK_ROWS", 60)
    config = ClusterConfig(levels=[12, 4], points_per_centroid=15, iterations=6, resample_steps=[1, 2])  # type: ignore[call-arg]
    cluster.execute(make_run(tmp_path / "ray"), config)
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    outcome = cluster.execute(make_run(tmp_path / "here"), config)
    assert outcome.summary["sample"] == 180
    assert contents(str(tmp_path / "ray")) == contents(str(tmp_path / "here"))
    assert not (tmp_path / "here/cluster/gen-0000/scratch").exists()


def test_an_interrupted_stage_goes_on_from_its_centroids_to_the_same_bytes(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.execute(make_run(tmp_path / "whole"), CONFIG)
    assign = cluster._assign_part

    def dies(writer, name, part, shared):  # type: ignore[no-untyped-def]
        if name.endswith("2"):
            raise KeyboardInterrupt
        return assign(writer, name, part, shared)

    context = make_run(tmp_path / "broken")
    monkeypatch.setattr(cluster, "_assign_part", dies)
    with pytest.raises(KeyboardInterrupt):
        cluster.execute(context, CONFIG)
    monkeypatch.setattr(cluster, "_assign_part", assign)
    monkeypatch.setattr(cluster, "_sample", lambda *_: pytest.fail("trained again"))
    cluster.execute(make_run_again(tmp_path / "broken"), CONFIG)
    assert contents(str(tmp_path / "whole")) == contents(str(tmp_path / "broken"))


@pytest.mark.parametrize("dies_at", [1, 4])
def test_a_stage_killed_in_training_goes_on_at_its_last_step_to_the_same_bytes(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    monkeypatch.setattr(cluster, "BLOCK_ROWS", 120)
    config = ClusterConfig(levels=[80, 10], iterations=8)  # type: ignore[call-arg]
    told: list[int] = []

    def listen(event: dict[str, object]) -> None:
        if event.get("purpose") == "cluster 1":
            told.append(int(str(event["step"])))
            if len(told) == dies_at + 1 and stops:
                raise KeyboardInterrupt

    stops = False
    whole = make_run(tmp_path / "whole")
    whole.events.listener = listen
    cluster.execute(whole, config)
    steps = list(told)
    assert steps[:6] == [0, 1, 2, 3, 4, 5]
    told.clear()
    stops = True
    broken = make_run(tmp_path / "broken")
    broken.events.listener = listen
    with pytest.raises(KeyboardInterrupt):
        cluster.execute(broken, config)
    stops = False
    again = make_run_again(tmp_path / "broken")
    again.events.listener = listen
    cluster.execute(again, config)
    assert told == [*range(dies_at + 1), *steps[dies_at:]]
    assert contents(str(tmp_path / "whole")) == contents(str(tmp_path / "broken"))


def test_centroids_that_no_worker_can_hold_are_one_sentence(tmp_path: Path, no_ray: None) -> None:
    assert cluster.task_bytes(1000, 512) < 1 << 30
    assert cluster.task_bytes(100_000, 1280) < 4 << 30
    context = make_run(tmp_path)
    context.resources.memory_per_worker = "128MiB"
    with pytest.raises(
        UserError, match=r"20 clusters of 16 dimensions take .* GiB in every worker, and resources\.mem"
    ):
        cluster.execute(context, ClusterConfig(levels=[20]))  # type: ignore[call-arg]
    context.resources.memory_per_worker = "4GiB"
    assert cluster.execute(context, ClusterConfig(levels=[20])).rows == 500  # type: ignore[call-arg]


def make_run_again(folder: Path):  # type: ignore[no-untyped-def]
    from pipelines.context import Context
    from pipelines.run_directory import RunDirectory

    return Context(RunDirectory(str(folder)))


def test_later_images_go_to_the_stored_centroids(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path)
    cluster.execute(context, CONFIG)
    before, sizes_before, _ = hierarchy.read_hierarchy(context.run.stage("cluster").generations()[0].directory)
    finish(context.run, EMBED, embed_parts([MORE]), metadata=METADATA)
    outcome = cluster.execute(context, CONFIG)
    assert outcome.rows == 200
    after, sizes, _ = hierarchy.read_hierarchy(context.run.stage("cluster").generations()[1].directory)
    assert all(np.array_equal(a, b) for a, b in zip(before.centroids, after.centroids, strict=True))
    leaves = tables(context, "cluster", 1)["cluster_1"].to_numpy()
    assert np.array_equal(sizes[0], sizes_before[0] + np.bincount(leaves, minlength=30))
    assert sizes[1].sum() == 700


def test_plain_parquet_becomes_parts_in_the_folder(tmp_path: Path, no_ray: None) -> None:
    pool = plain_folder(tmp_path / "pool", WEB)
    context = plain_context(tmp_path / "out")
    cluster.execute(context, ClusterConfig(levels=[20]), embeddings=pool)  # type: ignore[call-arg]
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert parts == ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet"]
    assert tables(context, "cluster")["image_id"].to_pylist() == ids_of(WEB).tolist()


def test_more_clusters_than_images_is_one_sentence_and_leaves_no_trace(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path)
    with pytest.raises(UserError, match=r"cluster\.levels: 501 clusters of 500 images in .*embed/mobilenet_v2"):
        cluster.execute(context, ClusterConfig(levels=[501]))  # type: ignore[call-arg]
    assert cluster.execute(context, ClusterConfig(levels=[500])).rows == 500  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"levels": [10, 10]}, "fewer clusters than the one before"),
        ({"levels": [0]}, "at least 1 cluster"),
        ({"levels": []}, "at least 1 item"),
        ({"levels": [9, 3], "resample_steps": [1]}, "1 values for 2 levels"),
        ({"levels": [9, 3], "resample_size": [1, 0]}, "below 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, list[int]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ClusterConfig(**options)  # type: ignore[arg-type]


def test_without_embeddings_the_sentence_says_what_to_run(tmp_path: Path) -> None:
    context = make_run(tmp_path)
    with pytest.raises(UserError, match=r"no embeddings of sscd \(there is mobilenet_v2\); run `curate embed` first"):
        cluster.execute(context, ClusterConfig(model="sscd"))  # type: ignore[call-arg]
    with pytest.raises(UserError, match="run `curate embed` first"):
        cluster.execute(plain_context(tmp_path / "nothing"), ClusterConfig())  # type: ignore[call-arg]
    finish(context.run, "embed/sscd", embed_parts([WEB]))
    with pytest.raises(UserError, match=r"holds mobilenet_v2, sscd: choose one with --model"):
        cluster.execute(context, ClusterConfig())  # type: ignore[call-arg]
