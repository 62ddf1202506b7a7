"""Guards against chains and later generations of `dedup`, through the stage, against naive versions."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import storage, vectors
from curation.duplicates import join, planning
from curation.duplicates.components import components
from curation.duplicates.forest import Nodes
from curation.duplicates.tasks import JoinOptions
from curation.schemas import image_id
from pipelines import duplicate_forests
from pipelines.run_directory import RunDirectory
from tests.pipelines.test_dedup import (
    DIMENSION,
    Images,
    Reversed,
    dedup,
    everything,
    interrupt,
    labels_of,
    near,
    plain,
    planted,
    rows_in,
    stored,
    unit,
    write_folder,
)


def chain(steps: int, cosine: float, random: np.random.Generator) -> np.ndarray:
    """Vectors each of which is a copy of the one before, the ends strangers."""
    x = [unit(random.standard_normal(DIMENSION))]
    for _ in range(steps - 1):
        x.append(near(x[-1], cosine, random))
    return np.array(x)


def test_members_of_a_star_are_above_the_threshold_to_the_one_that_stays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([planted(200), chain(40, 0.75, random)])
    folder = write_folder(tmp_path / "e", x, width=random.integers(1, 9, 240), height=np.ones(240, int))
    one = plain(tmp_path / "one", folder)
    for rule in ("resolution", "medoid"):
        outcome = plain(tmp_path / rule, folder, split="star", representative=rule)
        rows = {r["image_id"]: r for r in rows_in(outcome.out)}
        keeper = {r["component_id"]: r["image_id"] for r in rows.values() if r["kept"]}
        assert len(keeper) == outcome.summary["kept"] > one.summary["kept"]
        assert outcome.summary["components_by_stars"] == outcome.summary["kept"] - one.summary["kept"]
        values = stored(x)
        for row in rows.values():
            stay = keeper[row["component_id"]]
            pair = vectors.similarity(values[[row["image_id"]]], values[[stay]])[0]
            assert row["image_id"] == stay or pair > np.float32(0.6)
        assert outcome.summary["not_above_threshold_to_representative"] == 0.0
    assert one.summary["not_above_threshold_to_representative"] > 0.1


def test_components_are_cut_until_they_fit_and_what_was_cut_is_told(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    links = chain(30, 0.8, random)
    x = np.concatenate([unit(random.standard_normal((50, DIMENSION))), links, np.repeat(links[:1], 20, axis=0)])
    folder = write_folder(tmp_path / "e", x)
    outcome = plain(tmp_path / "out", folder, max_component=10)
    label = np.array([r["component_id"] for r in rows_in(outcome.out)])
    sizes = np.bincount(label)
    equal = np.flatnonzero(sizes > 10)
    assert [sizes[k] for k in equal] == [21], "equal images stay together"
    told = json.loads(Path(outcome.out, "components.json").read_text())["cut"]
    (one,) = told
    assert one["component_id"] == 50 and one["images"] == 50 and one["uncut"] and one["largest"] == 21
    assert one["pieces"] == len(np.unique(label[50:]))
    at = labels_of(stored(x), one["cut_at"])
    assert np.sort(np.bincount(at))[-2] <= 10
    assert (outcome.summary["components_cut"], outcome.summary["components_too_large"]) == (1, 1)


def test_what_is_sampled_of_a_large_component_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curation.duplicates import chains

    monkeypatch.setattr(chains, "MEMBERS_COMPARED", 10)
    x = np.concatenate([chain(30, 0.8, np.random.default_rng(2)), chain(5, 0.8, np.random.default_rng(3))])
    outcome = plain(tmp_path / "out", write_folder(tmp_path / "e", x))
    large, small = json.loads(Path(outcome.out, "components.json").read_text())["largest"]
    assert (large["sampled"], large["members_compared"]) == (True, 10)
    assert (small["sampled"], small["members_compared"]) == (False, 5)
    assert outcome.summary["least_similarity"] == min(large["least_similarity"], small["least_similarity"])


# ---- later generations -----------------------------------------------------------------------------------------------


def in_run(root: Path, x: np.ndarray, cuts: list[int], **options: Any) -> tuple[Images, list[dict[str, Any]]]:
    """A pool in several generations, deduplicated after each: (run, summaries)."""
    images = Images(RunDirectory(str(root)))
    summaries = []
    for number, rows in enumerate(np.split(np.arange(len(x)), cuts)):
        images.source(f"pool:web{number}", len(rows))
        parts = {
            f"part-{number:03d}-{k:06d}": [
                {"image_id": image_id(number, int(i - rows[0])), "source": f"pool:web{number}", "vector": x[i]}
                for i in part
            ]
            for k, part in enumerate(np.array_split(rows, 2))
        }
        images.generation(parts)
        summaries.append(images.dedup(**options).summary)
    return images, summaries


def forest_of(images: Images) -> list[Any]:
    paths = images.run.stage("dedup-search").generations()[-1].part_paths
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("options", [{}, {"max_edges": 2}, {"max_edges": 1, "store_threshold": 0.5}])
def test_generations_end_with_the_forest_of_one_search_over_everything(tmp_path: Path, options: Any) -> None:
    x = planted(300)[np.random.default_rng(4).permutation(300)]
    grown, _ = in_run(tmp_path / "grown", x, [200, 260], **options)
    forest = forest_of(grown)
    (tmp_path / "grown" / "dedup-search" / "_stage.json").unlink()
    dedup.execute(Reversed(run=grown.run, rebuild=True), dedup.DedupConfig(**options))
    assert forest_of(grown) == forest


def test_bridged_components_are_told_by_the_generation_that_bridges_them(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    x = unit(random.standard_normal((40, DIMENSION)))
    x[20] = unit(x[0] + x[1])
    images, summaries = in_run(tmp_path, x, [20, 30])
    assert [s.get("older_components_bridged") for s in summaries] == [None, 1, 0]
    rows = images.rows()
    assert rows[image_id(0, 0)]["kept"] and rows[image_id(0, 1)]["kept"] and not rows[image_id(1, 0)]["kept"]


@pytest.mark.parametrize("options", [{"split": "star"}, {"max_component": 4}, {"split": "star", "max_component": 6}])
def test_with_guards_older_representatives_stay_and_every_new_group_has_one(tmp_path: Path, options: Any) -> None:
    random = np.random.default_rng(6)
    x = np.concatenate([chain(20, 0.75, random), unit(random.standard_normal((20, DIMENSION))), chain(20, 0.8, random)])
    x = x[random.permutation(60)]
    images, _ = in_run(tmp_path, x, [40], **options)
    rows = images.rows()
    first = [
        r
        for g in images.run.stage("dedup").generations()[:1]
        for p in g.part_paths
        for r in pq.read_table(p).to_pylist()
    ]
    assert all(rows[r["image_id"]] == r for r in first)
    keepers = [r["image_id"] for r in rows.values() if r["kept"]]
    for row in rows.values():
        if not row["kept"] and options.get("split") == "star":
            mine = np.repeat(images.vectors[row["image_id"]][None], len(keepers), axis=0)
            assert (vectors.similarity(mine, np.array([images.vectors[k] for k in keepers])) > np.float32(0.6)).any()
    groups: dict[int, list[bool]] = {}
    for row in (r for r in rows.values() if r["component_id"] >= image_id(1, 0)):
        groups.setdefault(row["component_id"], []).append(row["kept"])
    assert groups and all(sum(kept) == 1 for kept in groups.values()), "a component of new images alone has one"


def components_of(images: Images) -> list[list[int]]:
    """Labels at every threshold of the sweep."""
    ids = np.array(sorted(images.vectors), np.uint64)
    paths = images.run.stage("dedup-search").generations()[-1].part_paths
    forest = duplicate_forests.StoredForest(tuple(paths), Nodes((ids,)))
    return [components(forest, len(ids), t).tolist() for t in duplicate_forests.SWEEP if t >= 0.6]


def test_generations_through_cells_have_the_components_of_one_search_in_the_same_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicate_forests, "JoinOptions", partial(JoinOptions, exact_multiply_adds=0))
    monkeypatch.setattr(planning, "PRODUCT_NANOSECONDS", 1e9)  # cells, whatever they cost
    x = planted(1000)[np.random.default_rng(4).permutation(1000)]
    grown, summaries = in_run(tmp_path / "grown", x, [800, 930], recall=0.8)
    assert [s["search"] for s in summaries] == ["cells"] * 3
    labels = components_of(grown)
    search = grown.run.stage("dedup-search").generations()
    data = [storage.read_bytes(g.file(duplicate_forests.CELLS)) for g in search]
    assert data[0] == data[1] == data[2], "every generation hands the cells on"
    cells = join.Cells.from_bytes(data[0])
    monkeypatch.setattr(duplicate_forests, "stored_cells", lambda _earlier, _name: {"cells": cells})
    (tmp_path / "grown" / "dedup-search" / "_stage.json").unlink()
    dedup.execute(Reversed(run=grown.run, rebuild=True), dedup.DedupConfig(recall=0.8))
    assert len(grown.run.stage("dedup-search").generations()) == 1 and components_of(grown) == labels
    monkeypatch.undo()
    (tmp_path / "grown" / "dedup-search" / "_stage.json").unlink()
    dedup.execute(Reversed(run=grown.run, rebuild=True), dedup.DedupConfig(recall=0.8))
    assert components_of(grown) != labels, "the cells do miss pairs here"


class Forwards(Reversed):
    """Tasks in their order."""

    def spread(self, function: Any, calls: Any, **more: Any) -> Any:
        return super().spread(function, list(calls)[::-1], **more)


def test_assignments_are_files_of_the_generation_that_later_ones_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicate_forests, "JoinOptions", partial(JoinOptions, exact_multiply_adds=0))
    monkeypatch.setattr(planning, "PRODUCT_NANOSECONDS", 1e9)  # cells, whatever they cost
    x = planted(1000)[np.random.default_rng(4).permutation(1000)]
    rows: list[int] = []
    assign = join.Cells.assign
    monkeypatch.setattr(join.Cells, "assign", lambda cells, v: (rows.append(len(v)), assign(cells, v))[1])
    grown, _ = in_run(tmp_path / "grown", x, [800, 930], recall=0.8)
    assert sum(rows) <= 1000, "each image once"
    search = grown.run.stage("dedup-search").generations()
    for number, generation in enumerate(search):
        (name,) = [name for name in generation.files if name.startswith("cells/")]
        assert name == f"cells/{number:04d}-00000.npz"
        data = storage.read_bytes(generation.file(name))
        assert generation.files[name] == {"bytes": len(data), "sha256": storage.sha256(data)}
    # The same in another order of tasks, and where what the first generation kept is gone.
    monkeypatch.setattr("tests.pipelines.test_dedup.Reversed", Forwards)
    (tmp_path / "other").mkdir()
    in_run(tmp_path / "other", x, [800, 930], recall=0.8)
    assert everything(str(tmp_path / "other" / "dedup-search")) == everything(str(tmp_path / "grown" / "dedup-search"))
    forest = forest_of(grown)
    shutil.rmtree(f"{search[0].directory}/cells")
    for stage in ("dedup", "dedup-search"):
        interrupt(tmp_path / "grown" / stage, 0)
    rows.clear()
    dedup.execute(Reversed(run=grown.run), dedup.DedupConfig(recall=0.8))
    assert forest_of(grown) == forest and sum(rows) > 700
    files = grown.run.stage("dedup-search").generations()[-1].files
    assert {"cells/0000-00000.npz", "cells/0002-00000.npz"} <= set(files), "made again, kept again"
