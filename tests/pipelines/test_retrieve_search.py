"""Sample mode by cells and codes in the stage: recall, equal bytes, what a kill leaves, input that is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import seed_plan
from curation.errors import UserError
from curation.order import FirstPerGroup
from curation.vectors import embeddings_table
from pipelines import cluster as ray_cluster
from pipelines import retrieve_cluster, retrieve_sample
from pipelines.context import Context, Resources
from pipelines.run_directory import RunDirectory
from pipelines.stages import cluster, retrieve
from pipelines.stages.cluster import ClusterConfig
from pipelines.stages.retrieve import RetrieveConfig
from tests.pipelines.selection_runs import contents, in_place, plain_context, tables

DIMENSION = 64


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def folder(path: Path, rows: np.ndarray, first: int, parts: int = 1) -> str:
    path.mkdir(parents=True)
    ids = np.arange(first, first + len(rows), dtype=np.uint64)
    for index, (i, r) in enumerate(zip(np.array_split(ids, parts), np.array_split(rows, parts), strict=True)):
        pq.write_table(embeddings_table(i, r), path / f"part-{index:06d}.parquet", row_group_size=300)
    return str(path)


def inputs(path: Path) -> dict[str, Any]:
    """A pool of 3000 images in 15 topics, and two seed sets near them."""
    random = np.random.default_rng(0)
    topics = random.standard_normal((15, DIMENSION))
    pool = unit(topics[random.integers(0, 15, 3000)] + random.standard_normal((3000, DIMENSION)))
    seeds = unit(pool[:600] + unit(random.standard_normal((600, DIMENSION))))
    return {
        "embeddings": folder(path / "pool", pool, 0, parts=2),
        "seeds": {"a": folder(path / "a", seeds[:400], 1 << 40), "b": folder(path / "b", seeds[400:], 1 << 41)},
    }


def config(**options: Any) -> RetrieveConfig:
    return RetrieveConfig(mode="sample", **options)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pools are searched as large ones are, in several tasks."""
    monkeypatch.setattr(seed_plan, "FEW_SEEDS", 1)
    monkeypatch.setattr(seed_plan, "FEW_ROWS", 1)
    monkeypatch.setattr(seed_plan, "FEW_PAIRS", 1)
    monkeypatch.setattr(seed_plan, "exact_cost", lambda *_: np.inf)
    monkeypatch.setattr(retrieve_sample, "SLAB_VALUES", 1024 * DIMENSION)
    monkeypatch.setattr(retrieve_sample, "TASK_ROWS", 1024)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def pairs(context: Context) -> set[tuple[int, int]]:
    table = tables(context, "retrieve")
    return set(zip(table["seed_id"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def test_two_seed_sets_in_one_pass_find_the_share_asked_for_and_say_so(
    tmp_path: Path, no_ray: None, searched: None
) -> None:
    given = inputs(tmp_path)
    fast, exact = plain_context(tmp_path / "fast"), plain_context(tmp_path / "exact")
    outcome = retrieve.execute(fast, config(recall=0.95), **given)
    assert retrieve.execute(exact, config(recall=1), **given).summary["search"] == {"search": "exact"}
    found = outcome.summary["search"]
    assert found["search"] == "cells and codes"
    assert found["recall"]["neighbours"] == 4 * found["recall"]["seeds"]
    assert found["recall"]["low"] <= found["recall"]["measured"] <= found["recall"]["high"]
    truth = pairs(exact)
    assert len(truth) == 600 * 4
    share = len(pairs(fast) & truth) / len(truth)
    assert share > 0.94
    assert abs(share - found["recall"]["measured"]) < 0.04
    assert not (tmp_path / "fast" / "scratch").exists()


def test_equal_bytes_on_two_workers_and_on_none(
    tmp_path: Path, ray_session: None, searched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    with monkeypatch.context() as here:
        here.setattr(ray_cluster, "spread", in_place)
        retrieve.execute(plain_context(tmp_path / "here"), config(), **given)
    retrieve.execute(plain_context(tmp_path / "ray"), config(), **given)
    assert contents(str(tmp_path / "here")) == contents(str(tmp_path / "ray"))


def test_a_killed_search_keeps_its_finished_tasks_and_ends_with_the_same_bytes(
    tmp_path: Path, no_ray: None, searched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    retrieve.execute(plain_context(tmp_path / "whole"), config(), **given)
    done: list[str] = []

    def killed(function: Any, calls: Any, *, shared: Any = None, **_: Any) -> Iterator[tuple[str, Any]]:
        for name, arguments in calls:
            if len(done) == 3:
                raise KeyboardInterrupt
            if function.__name__ == "_keep":
                done.append(name)
            yield name, function(*arguments, shared)

    with monkeypatch.context() as during:
        during.setattr(ray_cluster, "spread", killed)
        with pytest.raises(KeyboardInterrupt):
            retrieve.execute(plain_context(tmp_path / "killed"), config(), **given)
    again: list[str] = []

    def counting(function: Any, calls: Any, *, shared: Any = None, **_: Any) -> Iterator[tuple[str, Any]]:
        asked = list(calls)
        again.extend(name for name, _ in asked if function.__name__ == "_keep")
        yield from in_place(function, asked, shared=shared)

    monkeypatch.setattr(ray_cluster, "spread", counting)
    retrieve.execute(plain_context(tmp_path / "killed"), config(), **given)
    assert done
    assert not set(done) & set(again)
    assert contents(str(tmp_path / "killed")) == contents(str(tmp_path / "whole"))


def test_files_larger_than_a_task_are_cut_between_row_groups(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    retrieve.execute(plain_context(tmp_path / "one"), config(), **given)
    monkeypatch.setattr(retrieve_sample, "SLAB_VALUES", 1)
    monkeypatch.setattr(retrieve_sample, "BLOCK_ROWS", 300)
    retrieve.execute(plain_context(tmp_path / "many"), config(), **given)
    assert contents(str(tmp_path / "one")) == contents(str(tmp_path / "many"))


def test_more_neighbours_than_images_draw_all_images(tmp_path: Path, no_ray: None) -> None:
    rows = unit(np.random.default_rng(0).standard_normal((5, DIMENSION)))
    context = plain_context(tmp_path / "out")
    given = {"embeddings": folder(tmp_path / "pool", rows, 0), "seeds": {"a": folder(tmp_path / "a", rows[:2], 99)}}
    assert retrieve.execute(context, config(neighbours=50), **given).rows == 10


def test_all_equal_vectors_draw_the_smallest_ids(tmp_path: Path, no_ray: None, searched: None) -> None:
    rows = np.repeat(unit(np.ones((1, DIMENSION))), 600, axis=0)
    given = {"embeddings": folder(tmp_path / "pool", rows, 0), "seeds": {"a": folder(tmp_path / "a", rows, 1000)}}
    for recall in (0.99, 1):
        context = plain_context(tmp_path / f"out-{recall}")
        retrieve.execute(context, config(recall=recall), **given)
        assert {image for _, image in pairs(context)} == {0, 1, 2, 3}


def test_wrong_vectors_and_too_little_memory_are_refused_in_one_sentence(tmp_path: Path, no_ray: None) -> None:
    given = inputs(tmp_path)
    bad = np.full((3, DIMENSION), np.nan)
    nan = folder(tmp_path / "nan", bad, 1 << 42)
    with pytest.raises(UserError, match=r"has NaN or infinite values .3 such rows.; leave them out"):
        retrieve.execute(plain_context(tmp_path / "out"), config(), **(given | {"seeds": {"a": nan}}))
    assert not contents(str(tmp_path / "out"))
    small = Context(RunDirectory("x"), out=str(tmp_path / "small"), resources=Resources(memory_per_worker="64MiB"))  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"memory_per_worker: 64MiB is too little to search vectors of 64 dimensions"):
        retrieve.execute(small, config(neighbours=3000), **given)


def test_cluster_mode_holds_no_more_than_the_cap_and_draws_the_same(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    clusters = str(tmp_path / "clusters")
    cluster.execute(
        plain_context(tmp_path / "clusters"),
        ClusterConfig(levels=[15]),  # type: ignore[call-arg]
        embeddings=given["embeddings"],
    )
    held: list[int] = []
    original = FirstPerGroup.result

    def result(self: Any) -> Any:
        found = original(self)
        held.append(len(found[2]))
        return found

    monkeypatch.setattr(FirstPerGroup, "result", result)
    context = plain_context(tmp_path / "out")
    options = RetrieveConfig(mode="cluster", cap=40)  # type: ignore[call-arg]
    outcome = retrieve.execute(context, options, **given, clusters=clusters)
    assert all(said["rows"] == 40 for said in outcome.summary["seed_sets"].values())
    assert max(held) < 40 + 15
    assert all(said["before_cap"] > 40 for said in outcome.summary["seed_sets"].values())


def test_seeds_of_clusters_go_out_in_batches_that_fit_and_draw_the_same(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(tmp_path)
    clusters = str(tmp_path / "clusters")
    config_of = ClusterConfig(levels=[15])  # type: ignore[call-arg]
    cluster.execute(plain_context(tmp_path / "clusters"), config_of, embeddings=given["embeddings"])
    options = RetrieveConfig(mode="cluster", cap=400)  # type: ignore[call-arg]
    whole, parts = plain_context(tmp_path / "whole"), plain_context(tmp_path / "parts")
    retrieve.execute(whole, options, **given, clusters=clusters)
    sent: list[int] = []
    original = retrieve_cluster._nearest_seeds

    def counting(context: Any, generation: Any, given_inputs: Any, members: Any, prefix: str) -> Any:
        sent.append(sum(len(one.seeds) for one in members.values()))
        return original(context, generation, given_inputs, members, prefix)

    split = retrieve_cluster.leaf_batches
    monkeypatch.setattr(retrieve_cluster, "_nearest_seeds", counting)
    monkeypatch.setattr(retrieve_cluster, "leaf_batches", lambda seeds, _: split(seeds, 150))
    retrieve.execute(parts, options, **given, clusters=clusters)
    assert len(sent) > 3 and max(sent) <= 150
    assert contents(str(tmp_path / "whole")) == contents(str(tmp_path / "parts"))


def test_batches_of_leaves_hold_what_fits_or_one_leaf() -> None:
    seeds = np.array([0, 5, 5, 0, 30, 1, 1, 0])
    batches = retrieve_cluster.leaf_batches(seeds, 10)
    assert batches == [(0, 4), (4, 5), (5, 8)]
