"""The retrieve stage against a naive search over the whole pool."""

import json
from pathlib import Path

import numpy as np
import pytest

from curation import storage
from curation.errors import UserError
from curation.order import hash_keys
from curation.schemas import RETRIEVAL
from pipelines import cluster as ray_cluster
from pipelines import retrieve_inputs, retrieve_sample
from pipelines.context import Context
from pipelines.stages import cluster, retrieve
from pipelines.stages.cluster import ClusterConfig
from pipelines.stages.retrieve import RetrieveConfig, SeedSetConfig
from tests.pipelines.selection_runs import (
    BIRDS,
    CARS,
    EMBED,
    METADATA,
    MORE,
    WEB,
    concepts_of,
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


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def config(**options: object) -> RetrieveConfig:
    return RetrieveConfig(**options)  # type: ignore[arg-type]


def similarities(seeds: int, pool: int) -> np.ndarray:
    """By the definition, of the stored float16 vectors."""
    left = vectors_of(seeds).astype(np.float16).astype(np.float64)
    right = vectors_of(pool).astype(np.float16).astype(np.float64)
    return (left @ right.T).astype(np.float32)


def rows_of(context: Context, seed_set: str) -> list[dict[str, object]]:
    return [row for row in tables(context, "retrieve").to_pylist() if row["seed_set"] == seed_set]


def report(context: Context) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(
        storage.read_bytes(context.stage("retrieve").generations()[-1].file("seed_sets.json"))
    )
    return found


def naive_sample(seeds: int, pool: int, count: int) -> list[tuple[int, int, int]]:
    found, ids, seed_ids = similarities(seeds, pool), ids_of(pool), ids_of(seeds)
    return sorted(
        (int(ids[i]), int(seed_ids[s]), rank)
        for s in range(len(found))
        for rank, i in enumerate(sorted(range(len(ids)), key=lambda i, s=s: (-found[s, i], ids[i]))[:count])
    )


def test_sample_mode_draws_the_nearest_pool_images_of_every_seed(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path)
    outcome = retrieve.execute(
        context,
        config(mode="sample", neighbours=3, seed_sets={"cars": SeedSetConfig(neighbours=5)}),  # type: ignore[call-arg]
    )
    assert tables(context, "retrieve").schema.equals(RETRIEVAL)
    for name, source, count in (("birds", BIRDS, 3), ("cars", CARS, 5)):
        rows = rows_of(context, name)
        assert [(r["image_id"], r["seed_id"], r["rank"]) for r in rows] == naive_sample(source, WEB, count)
        assert {(r["mode"], r["cluster_id"]) for r in rows} == {("sample", None)}
        exact = similarities(source, WEB)
        places = {int(i): place for place, i in enumerate(ids_of(WEB))}
        for row in rows:
            assert row["similarity"] == exact[int(row["seed_id"]) & 0xFFFF, places[row["image_id"]]]  # type: ignore[call-overload]
    drawn = [r["image_id"] for r in rows_of(context, "birds")]
    assert report(context)["birds"] == {
        "mode": "sample",
        "seeds": 24,
        "neighbours": 3,
        "nominal": 72,
        "unique": len(set(drawn)),
        "colliding": sum(drawn.count(i) > 1 for i in set(drawn)),
        "rows": 72,
    }
    assert outcome.summary["rows"] == 72 + 45
    concept = concepts_of(WEB, 500)[[int(i) & 0xFFFF for i in drawn]]  # type: ignore[call-overload]
    assert np.isin(concept, [8, 9]).mean() > 0.9
    assert retrieve.execute(context, config(mode="sample", neighbours=3, seed_sets={"cars": {"neighbours": 5}})).skipped


def test_the_policies_leave_one_row_per_image(tmp_path: Path, no_ray: None) -> None:
    for policy, rows in (("unique", None), ("next_best", 72)):
        context = make_run(tmp_path / policy)
        retrieve.execute(context, config(mode="sample", neighbours=3, collisions=policy))
        drawn = [r["image_id"] for r in rows_of(context, "birds")]
        assert len(drawn) == len(set(drawn)) == (rows or report(context)["birds"]["unique"])
        assert report(context)["birds"]["nominal"] == 72


def clustered(folder: Path) -> Context:
    context = make_run(folder)
    cluster.execute(context, ClusterConfig(levels=[12]))  # type: ignore[call-arg]
    return context


def naive_clusters(context: Context, seeds: int, name: str, per_cluster: int, cap: int) -> dict[int, tuple[int, int]]:
    """image -> (cluster, rank), by the rule, with loops."""
    from curation import hierarchy

    built, _, _ = hierarchy.read_hierarchy(context.run.stage("cluster").generations()[0].directory)
    vectors = vectors_of(seeds).astype(np.float16).astype(np.float64)
    nearest = ((vectors[:, None] - built.centroids[0][None]) ** 2).sum(-1).argmin(axis=1)
    table = tables(context, "cluster")
    members: dict[int, list[int]] = {}
    for image, leaf in zip(table["image_id"].to_pylist(), table["cluster_1"].to_pylist(), strict=True):
        if (nearest == leaf).sum() > 3:
            members.setdefault(leaf, []).append(image)
    keys = {i: int(hash_keys(np.array([i], np.uint64), 0, f"retrieve {name}")[0]) for m in members.values() for i in m}
    ranked = {
        image: (leaf, rank)
        for leaf, mine in members.items()
        for rank, image in enumerate(sorted(mine, key=keys.__getitem__)[:per_cluster])
    }
    kept = sorted(ranked, key=lambda image: (ranked[image][1], keys[image]))[:cap]
    return {image: ranked[image] for image in kept}


@pytest.mark.parametrize(("per_cluster", "cap"), [(10_000, 1_000_000), (6, 1_000_000), (10, 13)])
def test_cluster_mode_takes_images_in_hash_order_from_clusters_with_more_than_three_seeds(
    tmp_path: Path, no_ray: None, per_cluster: int, cap: int
) -> None:
    context = clustered(tmp_path)
    retrieve.execute(context, config(per_cluster=per_cluster, cap=cap))
    for name, source in (("birds", BIRDS), ("cars", CARS)):
        rows = rows_of(context, name)
        expected = naive_clusters(context, source, name, per_cluster, cap)
        assert {r["image_id"]: (r["cluster_id"], r["rank"]) for r in rows} == expected
        assert [r["image_id"] for r in rows] == sorted(expected)
        exact, places = similarities(source, WEB), {int(i): p for p, i in enumerate(ids_of(WEB))}
        for row in rows:
            found = exact[int(row["seed_id"]) & 0xFFFF, places[row["image_id"]]]  # type: ignore[call-overload]
            assert row["similarity"] == pytest.approx(found, abs=1e-7)
        said = report(context)[name]
        assert said["rows"] == said["nominal"] == said["unique"] == len(rows)
        assert said["clusters"] == len(said["chosen"])  # type: ignore[arg-type]
        assert sum(c["seeds"] for c in said["chosen"]) == said["seeds_in_clusters"]  # type: ignore[attr-defined]
        assert sum(c["images"] for c in said["chosen"]) == len(rows)  # type: ignore[attr-defined]


def test_auto_goes_by_cluster_below_a_million_seeds_and_by_sample_above(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve_inputs, "SAMPLE_ABOVE", 9)
    context = clustered(tmp_path)
    retrieve.execute(context, config(min_seeds=1))
    assert {name: said["mode"] for name, said in report(context).items()} == {"birds": "sample", "cars": "cluster"}


def test_a_set_with_mode_none_draws_nothing(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path)
    retrieve.execute(context, config(mode="sample", seed_sets={"cars": {"mode": "none"}}))
    assert rows_of(context, "cars") == []
    assert report(context)["cars"] == {"mode": "none", "seeds": 9}


def test_equal_bytes_on_two_workers_on_none_and_whatever_arrives_first(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(seed_sets={"birds": {"mode": "sample"}}, collisions="next_best", min_seeds=2)
    monkeypatch.setattr(retrieve_sample, "TASK_ROWS", 130)
    monkeypatch.setattr(retrieve_sample, "SLAB_VALUES", 130 * 16)
    with monkeypatch.context() as here:
        here.setattr(ray_cluster, "spread", in_place)
        for name in ("ray", "here"):
            clustered(tmp_path / name)
        retrieve.execute(make_context(tmp_path / "here"), options)
    monkeypatch.setattr(retrieve_sample, "TASK_ROWS", 100_000)
    monkeypatch.setattr(retrieve_sample, "SLAB_VALUES", 200 * 16)
    retrieve.execute(make_context(tmp_path / "ray"), options)
    assert contents(str(tmp_path / "here")) == contents(str(tmp_path / "ray"))


def make_context(folder: Path) -> Context:
    from pipelines.run_directory import RunDirectory

    return Context(RunDirectory(str(folder)))


def test_new_pool_images_give_a_new_snapshot(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path)
    retrieve.execute(context, config(mode="sample"))
    finish(context.run, EMBED, embed_parts([MORE]), metadata=METADATA)
    outcome = retrieve.execute(context, config(mode="sample"))
    assert not outcome.skipped
    drawn = tables(context, "retrieve", 1)["image_id"].to_numpy()
    assert np.isin(drawn, ids_of(MORE)).any()
    assert outcome.rows == (24 + 9) * 4


def test_plain_folders_by_sample_and_by_cluster(tmp_path: Path, no_ray: None) -> None:
    pool, seeds = plain_folder(tmp_path / "pool", WEB), plain_folder(tmp_path / "seeds", BIRDS, parts=2)
    cluster.execute(plain_context(tmp_path / "clusters"), ClusterConfig(levels=[12]), embeddings=pool)  # type: ignore[call-arg]
    context = plain_context(tmp_path / "sample")
    retrieve.execute(context, config(mode="sample"), embeddings=pool, seeds={"a": seeds})
    found = [(r["image_id"], r["seed_id"], r["rank"]) for r in rows_of(context, "a")]
    assert found == naive_sample(BIRDS, WEB, 4)
    context = plain_context(tmp_path / "cluster")
    retrieve.execute(
        context, config(per_cluster=5), embeddings=pool, seeds={"a": seeds}, clusters=str(tmp_path / "clusters")
    )
    assert 0 < len(rows_of(context, "a")) <= 5 * report(context)["a"]["clusters"]  # type: ignore[operator]


def test_user_errors_are_one_sentence(tmp_path: Path, no_ray: None) -> None:
    pool, seeds = plain_folder(tmp_path / "pool", WEB), plain_folder(tmp_path / "seeds", BIRDS)
    other = plain_folder(tmp_path / "other", MORE)
    wide = plain_folder(tmp_path / "wide", BIRDS, vectors=np.eye(24)[:, :20] + 0.1)
    clusters = str(tmp_path / "clusters")
    cluster.execute(plain_context(tmp_path / "clusters"), ClusterConfig(levels=[12]), embeddings=other)  # type: ignore[call-arg]

    def attempt(sentence: str, **inputs: object) -> None:
        with pytest.raises(UserError, match=sentence):
            retrieve.execute(
                plain_context(tmp_path / "out"),
                config(**inputs.pop("options", {})),  # type: ignore[arg-type]
                **({"embeddings": pool, "seeds": {"a": seeds}} | inputs),  # type: ignore[arg-type]
            )
        assert not (tmp_path / "out").exists()

    attempt("goes by cluster: give --clusters DIR")
    attempt("holds clusters of another pool than", clusters=clusters)
    attempt("holds no \\*.parquet; give a folder that `curate cluster` wrote", clusters=str(tmp_path))
    attempt("no column `cluster_1`; give a folder that `curate cluster` wrote", clusters=other)
    attempt("vectors of 20 dimensions, .* of 16: embed both with one model", seeds={"a": wide})
    attempt("does not exist", seeds={"a": str(tmp_path / "absent")})
    attempt("no such seed set; did you mean `a`", options={"seed_sets": {"aa": {"mode": "sample"}}})
    context = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no clusters; run `curate cluster` first, or use mode sample"):
        retrieve.execute(context, config())
    cluster.execute(context, ClusterConfig(levels=[12]))  # type: ignore[call-arg]
    finish(context.run, EMBED, embed_parts([MORE]), metadata=METADATA)
    with pytest.raises(UserError, match="lacks the newest images; run `curate cluster` first"):
        retrieve.execute(context, config())


def test_a_run_without_seed_sets_retrieves_nothing_and_says_so(tmp_path: Path, no_ray: None) -> None:
    context = make_run(tmp_path, (WEB,))
    said: list[object] = []
    context.events.listener = lambda event: said.append(event.get("text"))
    assert retrieve.execute(context, config(mode="sample")).rows == 0
    assert "seed set birds (0 seeds, mode sample) drew nothing" in said
