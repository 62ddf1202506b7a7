"""The balance stage: exactly the target, the rule's leaves, prefixes as balanced as the whole."""

from pathlib import Path

import numpy as np
import pytest

from curation import balance as rule
from curation import hierarchy
from curation.errors import UserError
from curation.schemas import BALANCE
from pipelines import cluster as ray_cluster
from pipelines.context import Context
from pipelines.stages import balance, cluster
from pipelines.stages.balance import BalanceConfig
from pipelines.stages.cluster import ClusterConfig
from tests.pipelines.selection_runs import WEB, contents, in_place, make_run, plain_context, plain_folder, tables


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def clustered(folder: Path) -> Context:
    context = make_run(folder)
    cluster.execute(context, ClusterConfig(levels=[25, 6]))  # type: ignore[call-arg]
    return context


@pytest.mark.parametrize("leaves", ["random", "nearest"])
def test_every_leaf_gives_what_the_hierarchy_says(tmp_path: Path, leaves: str) -> None:
    context = clustered(tmp_path)
    outcome = balance.execute(context, BalanceConfig(target=123, leaves=leaves))  # type: ignore[arg-type]
    table, images = tables(context, "balance"), tables(context, "cluster")
    assert table.schema.equals(BALANCE)
    assert table.num_rows == len(set(table["image_id"].to_pylist())) == outcome.rows == 123
    assert table["image_id"].to_pylist() == sorted(table["image_id"].to_pylist())
    assert sorted(table["rank"].to_pylist()) == list(range(123))
    built, sizes, _ = hierarchy.read_hierarchy(context.run.stage("cluster").generations()[0].directory)
    wanted = rule.leaf_targets(sizes, built.parents, 123, 0)
    taken = table["cluster_id"].to_numpy()
    assert np.array_equal(np.bincount(taken, minlength=25), wanted)
    leaf = dict(zip(images["image_id"].to_pylist(), images["cluster_1"].to_pylist(), strict=True))
    assert [leaf[i] for i in table["image_id"].to_pylist()] == taken.tolist()
    if leaves == "nearest":
        chosen = np.isin(images["image_id"].to_numpy(), table["image_id"].to_numpy())
        distance, labels = images["distance"].to_numpy(), images["cluster_1"].to_numpy()
        for one in np.flatnonzero((wanted > 0) & (wanted < sizes[0])):
            assert distance[chosen & (labels == one)].max() <= distance[~chosen & (labels == one)].min()
    by_rank = taken[np.argsort(table["rank"].to_numpy())]
    assert len(set(by_rank[: (wanted > 0).sum()].tolist())) == (wanted > 0).sum()
    levels = outcome.summary["effective_clusters"], outcome.summary["effective_clusters_pool"]
    assert levels[0][-1] > levels[1][-1]


def test_a_target_above_the_pool_takes_all_and_warns(tmp_path: Path) -> None:
    context = clustered(tmp_path)
    said: list[object] = []
    context.events.listener = lambda event: said.append(event.get("text"))
    assert balance.execute(context, BalanceConfig(target=10_000)).rows == 500  # type: ignore[call-arg]
    assert "target 10,000 is more than the 500 clustered images: all of them are taken" in said


@pytest.mark.parametrize(("concepts", "warned"), [(None, False), (25, False), (26, True)])
def test_fewer_leaf_clusters_than_concepts_are_warned_of(tmp_path: Path, concepts: int | None, warned: bool) -> None:
    context = clustered(tmp_path)
    said: list[str] = []
    context.events.listener = lambda event: said.append(str(event.get("text")))
    outcome = balance.execute(context, BalanceConfig(target=50, concepts=concepts))  # type: ignore[call-arg]
    assert outcome.summary["leaf_clusters"] == 25
    assert outcome.summary["concepts_above_leaf_clusters"] is warned
    sentence = "25 leaf clusters hold images, and 26 concepts cannot be even over fewer clusters"
    assert any(sentence in text for text in said) is warned


def test_a_plain_folder_gives_the_same_bytes_in_any_order_of_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = plain_folder(tmp_path / "pool", WEB)
    cluster.execute(plain_context(tmp_path / "clusters"), ClusterConfig(levels=[25, 6]), embeddings=pool)  # type: ignore[call-arg]
    config = BalanceConfig(target=77, leaves="nearest")
    balance.execute(plain_context(tmp_path / "a"), config, clusters=str(tmp_path / "clusters"))
    monkeypatch.setattr(
        ray_cluster, "spread", lambda *arguments, **options: iter(list(in_place(*arguments, **options))[::-1])
    )
    balance.execute(plain_context(tmp_path / "b"), config, clusters=str(tmp_path / "clusters"))
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))
    assert balance.execute(plain_context(tmp_path / "a"), config, clusters=str(tmp_path / "clusters")).skipped


def test_without_clusters_the_sentence_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no clusters; run `curate cluster` first"):
        balance.execute(make_run(tmp_path), BalanceConfig(target=5))  # type: ignore[call-arg]
    with pytest.raises(UserError, match="does not exist; give a folder that `curate cluster` wrote"):
        balance.execute(
            plain_context(tmp_path / "o"),
            BalanceConfig(target=5),
            clusters=str(tmp_path / "absent"),  # type: ignore[call-arg]
        )
