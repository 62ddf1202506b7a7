"""The mix stage against a dictionary over all that the run's stages say."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curation.errors import UserError
from curation.schemas import MIX
from pipelines import cluster as ray_cluster
from pipelines.context import Context
from pipelines.stages import balance, cluster, mix, retrieve
from pipelines.stages.balance import BalanceConfig
from pipelines.stages.cluster import ClusterConfig
from pipelines.stages.mix import MixConfig
from pipelines.stages.retrieve import RetrieveConfig
from tests.pipelines.selection_runs import (
    BIRDS,
    CARS,
    WEB,
    add_dedup,
    add_filter,
    contents,
    ids_of,
    in_place,
    make_run,
    tables,
)

BIRDS_DROPPED, BIRDS_REJECTED = ids_of(BIRDS)[3], ids_of(BIRDS)[5]
CARS_REJECTED = ids_of(CARS)[2]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


def selected(folder: Path, reason: str = "self") -> Context:
    """Filtered (one bird dropped), deduplicated (one bird and one of the exempt cars rejected), selected."""
    context = make_run(folder)
    add_filter(context, [int(BIRDS_DROPPED)])
    add_dedup(context, [int(BIRDS_REJECTED), int(CARS_REJECTED)], reason)
    cluster.execute(context, ClusterConfig(levels=[25, 6]))  # type: ignore[call-arg]
    retrieve.execute(context, RetrieveConfig(mode="sample"))  # type: ignore[call-arg]
    balance.execute(context, BalanceConfig(target=100))  # type: ignore[call-arg]
    return context


def naive(context: Context, as_is: tuple[str, ...] = ("birds", "cars")) -> dict[int, Counter[str]]:
    brought: dict[int, Counter[str]] = {}
    seeds = {"birds": set(ids_of(BIRDS)) - {BIRDS_DROPPED, BIRDS_REJECTED}, "cars": set(ids_of(CARS))}
    for name in as_is:
        for image in seeds[name]:
            brought.setdefault(int(image), Counter())[f"seed:{name}"] += 1
    for row in tables(context, "retrieve").to_pylist():
        brought.setdefault(row["image_id"], Counter())[f"retrieve:{row['seed_set']}"] += 1
    for image in tables(context, "balance")["image_id"].to_pylist():
        brought.setdefault(image, Counter())["balance"] += 1
    return brought


def test_every_image_is_one_row_with_its_sources_and_nominal_count(tmp_path: Path) -> None:
    context = selected(tmp_path)
    outcome = mix.execute(context, MixConfig())
    table, expected = tables(context, "mix"), naive(context)
    assert table.schema.equals(MIX)
    assert table["image_id"].to_pylist() == sorted(expected)
    for row in table.to_pylist():
        assert sorted(row["sources"]) == sorted(expected[row["image_id"]])
        assert row["nominal"] == expected[row["image_id"]].total()
        assert row["weight"] == 1
    assert outcome.summary["images"] == len(expected)
    assert outcome.summary["nominal"] == sum(c.total() for c in expected.values())
    assert outcome.summary["sources"]["seed:birds"] == {"images": 22, "nominal": 22}
    assert outcome.summary["sources"]["seed:cars"]["images"] == 9
    assert outcome.summary["as_is_without_checks"] == ["cars"]
    assert mix.execute(context, MixConfig()).skipped


def test_a_copy_of_a_forgotten_image_stays_out_of_an_exempt_seed_set(tmp_path: Path) -> None:
    context = selected(tmp_path, reason="forgotten")
    mix.execute(context, MixConfig())
    expected = naive(context)
    assert expected.pop(int(CARS_REJECTED)) == {"seed:cars": 1}
    assert tables(context, "mix")["image_id"].to_pylist() == sorted(expected)


def test_nominal_weights_are_the_times_an_image_was_brought(tmp_path: Path) -> None:
    context = selected(tmp_path)
    mix.execute(context, MixConfig(weight="nominal", as_is=["cars"]))
    table = tables(context, "mix")
    expected = naive(context, ("cars",))
    assert dict(zip(table["image_id"].to_pylist(), table["weight"].to_pylist(), strict=True)) == {
        image: count.total() for image, count in expected.items()
    }


def test_shares_decide_the_expected_draws(tmp_path: Path) -> None:
    context = selected(tmp_path)
    shares = {"seed": 0.3, "retrieve:birds": 0.1, "retrieve": 0.4, "balance": 0.2}
    mix.execute(context, MixConfig(shares=shares))
    rows, expected = tables(context, "mix").to_pylist(), naive(context)
    group = {"seed:birds": "seed", "seed:cars": "seed", "retrieve:cars": "retrieve"}
    sizes: Counter[str] = Counter()
    for counts in expected.values():
        sizes.update({group.get(source, source) for source in counts})
    for row in rows:
        groups = {group.get(source, source) for source in expected[row["image_id"]]}
        assert row["weight"] == pytest.approx(sum(shares[g] / sizes[g] for g in groups) * len(rows), rel=1e-6)
    assert np.mean([row["weight"] for row in rows]) == pytest.approx(1)


def test_parts_are_ranges_of_ids_whose_cut_does_not_change_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = selected(tmp_path / "whole")
    mix.execute(whole, MixConfig())
    monkeypatch.setattr(mix, "BUCKET_SHIFT", 5)
    monkeypatch.setattr(mix, "PART_ROWS", 64)
    cut = selected(tmp_path / "cut")
    mix.execute(cut, MixConfig())
    parts = cut.run.stage("mix").generations()[0].parts
    assert len(parts) > 3
    assert all(part.rows <= 64 for part in parts)
    assert tables(cut, "mix").equals(tables(whole, "mix"))


def test_equal_bytes_on_two_workers_and_on_none(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = selected(tmp_path / "here"), selected(tmp_path / "ray")
    config = MixConfig(shares={"seed": 0.3, "retrieve": 0.5, "balance": 0.2})
    mix.execute(here, config)
    monkeypatch.undo()
    mix.execute(there, config)
    assert contents(str(tmp_path / "here")) == contents(str(tmp_path / "ray"))


def test_retrieved_images_alone(tmp_path: Path) -> None:
    context = make_run(tmp_path)
    retrieve.execute(context, RetrieveConfig(mode="sample"))  # type: ignore[call-arg]
    mix.execute(context, MixConfig(as_is="none"))  # type: ignore[arg-type]
    drawn = set(tables(context, "retrieve")["image_id"].to_pylist())
    assert tables(context, "mix")["image_id"].to_pylist() == sorted(drawn)
    assert np.isin(np.array(sorted(drawn), np.uint64), ids_of(WEB)).all()


def test_impossible_mixes_are_one_sentence(tmp_path: Path) -> None:
    context = make_run(tmp_path)
    with pytest.raises(UserError, match="nothing to mix"):
        mix.execute(context, MixConfig(as_is=[]))
    with pytest.raises(UserError, match=r"mix\.as_is: no seed set `bird`; did you mean `birds`"):
        mix.execute(context, MixConfig(as_is=["bird"]))
    with pytest.raises(UserError, match=r"mix\.shares: no share for seed:birds"):
        mix.execute(context, MixConfig(shares={"balance": 1.0}))
    with pytest.raises(ValueError, match="exclude each other"):
        MixConfig(weight="nominal", shares={"seed": 1.0})
    assert not (tmp_path / "mix").exists()
