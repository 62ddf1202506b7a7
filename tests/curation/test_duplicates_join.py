"""The join against exact float64 search: cells, tiles, big groups, thresholds, later generations."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import products, vectors
from curation.duplicates import components as comp
from curation.duplicates import forest as f
from curation.duplicates import recall as recalls
from curation.duplicates.join import CellTask, JoinOptions, _by_cells, _plan, cell_tasks, self_join, serial
from curation.duplicates.members import Members, Piece, bundled, file_pieces, max_piece_rows, rank, whole_set
from curation.duplicates.scratch import Scratch


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def planted(n: int = 2000, d: int = 64, seed: int = 0) -> np.ndarray:
    """(n, d) float16: a quarter copies at cosines .5 to .99, 150 identical vectors, a chain."""
    random = np.random.default_rng(seed)
    x = unit(random.standard_normal((n, d)))
    copies = random.permutation(n)[: n // 4]
    source = random.integers(0, n, len(copies))
    cosine = random.uniform(0.5, 0.99, len(copies))[:, None]
    x[copies] = unit(cosine * x[source] + np.sqrt(1 - cosine**2) * x[copies])
    x[random.permutation(n)[:150]] = x[7]
    for k in range(1, 12):
        x[100 + k] = unit((x[100 + k - 1] * 0.75 + x[100 + k] * 0.5)[None])[0]
    return x.astype(np.float16)


def write(folder: Path, x: np.ndarray, ids: np.ndarray | None = None, parts: int = 3) -> vectors.VectorSet:
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(len(x), dtype=np.uint64) if ids is None else ids
    for k, rows in enumerate(np.array_split(np.arange(len(x)), parts)):
        kind = pa.float16() if x.dtype == np.float16 else pa.float32()
        column = pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel(), kind), x.shape[1])
        pq.write_table(
            pa.table({"image_id": ids[rows], "embedding": column}), folder / f"{k}.parquet", row_group_size=400
        )
    return vectors.open_folder(str(folder))


def members_of(folder: Path, x: np.ndarray, parts: int = 3) -> Members:
    known = write(folder, x, parts=parts)
    return Members(tuple(whole_set(known, 500)), x.shape[1], x.dtype == np.float16, len(x))


def oracle(x: np.ndarray, threshold: float) -> np.ndarray:
    """Every pair above a threshold, by float64 products of everything."""
    similarity = (x.astype(np.float64) @ x.astype(np.float64).T).astype(np.float32)
    low, high = np.nonzero(np.triu(similarity, 1) > np.float32(threshold))
    return f.edges(low, high, similarity[low, high])


IDS = np.arange(1 << 16, dtype=np.uint64)


def test_exact_join_is_the_forest_of_all_pairs_in_float64(tmp_path: Path) -> None:
    x = planted()
    result = self_join(members_of(tmp_path / "e", x), IDS, JoinOptions(0.45), Scratch(str(tmp_path / "s")))
    assert result.report["method"] == "exact" and result.report["recall"] == 1.0
    assert result.forest.tobytes() == f.maximum_spanning_forest(oracle(x, 0.45)).tobytes()


def test_cells_that_visit_everything_find_everything(tmp_path: Path) -> None:
    x = planted()
    options = JoinOptions(0.45, recall=1.0, exact_multiply_adds=0)
    members = members_of(tmp_path / "e", x)

    scratch = Scratch(str(tmp_path / "s"))

    plan = _plan(members, IDS[: len(x)], options, scratch, serial)
    plan = replace(plan, visits=len(plan.centroids))
    forest = _by_cells(members, plan, options, scratch, serial)
    assert forest.tobytes() == f.maximum_spanning_forest(oracle(x, 0.45)).tobytes()


def test_cells_find_planted_components_at_the_recall_asked_for(tmp_path: Path) -> None:
    x = planted(5000)
    options = JoinOptions(0.6, recall=0.95, exact_multiply_adds=0)
    result = self_join(
        members_of(tmp_path / "e", x), IDS[:5000], options, Scratch(str(tmp_path / "s")), thresholds=[0.6, 0.8]
    )
    truth = oracle(x, 0.6)
    report = result.report
    assert report["method"] == "cells" and report["visits"] < report["cells"]
    assert report["recall_low"] <= report["recall"] <= report["recall_high"] and report["recall"] > 0.9
    labels = comp.components(result.forest, 5000, 0.6)
    together = labels[truth["low"]] == labels[truth["high"]]
    assert together.mean() > 0.93
    values = {(e["low"], e["high"]): e["similarity"] for e in truth}
    assert all(values[e["low"], e["high"]] == e["similarity"] for e in result.forest), "every edge is true to the bit"
    group = np.flatnonzero((x == x[7]).all(axis=1))
    assert len(group) >= 140 and len(set(labels[group].tolist())) == 1, "150 identical vectors stay one component"
    assert [r["threshold"] for r in report["by_threshold"]] == [0.6, 0.8]


def test_pair_exactly_at_the_threshold_is_not_joined(tmp_path: Path) -> None:
    x = np.zeros((4, 8), np.float16)
    x[0, 0] = x[2, 4] = x[3, 5] = 1
    x[1, :4] = 0.5
    members = members_of(tmp_path / "e", x, parts=1)
    for threshold, edges in ((0.5, 0), (float(np.nextafter(np.float32(0.5), np.float32(0))), 1)):
        result = self_join(members, IDS, JoinOptions(threshold), Scratch(str(tmp_path / f"s{edges}")))
        assert len(result.forest) == edges


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_similarity_has_the_bits_of_the_definition(stored: type) -> None:
    x = planted(400).astype(stored)
    rows, columns = np.nonzero(np.ones((400, 400), bool))
    wide = x.astype(np.float32)
    got = products.defined(wide, wide, rows, columns, half=stored is np.float16)
    assert got.tobytes() == vectors.similarity(x[rows], x[columns]).tobytes()


def test_torch_nominates_the_pairs_that_numpy_does() -> None:
    x = planted(700).astype(np.float32)
    starts = np.arange(1, 701)
    one = [np.concatenate(parts) for parts in zip(*products.nominate(x, x, 0.6, starts), strict=True)]
    other = [np.concatenate(parts) for parts in zip(*((i, j) for i, j in _torch(x, starts)), strict=True)]
    truth = oracle(planted(700), 0.6)
    pairs = set(zip(*one, strict=True))
    assert set(zip(truth["low"].tolist(), truth["high"].tolist(), strict=True)) <= pairs
    assert len(pairs ^ set(zip(*other, strict=True))) <= 2


def _torch(x: np.ndarray, starts: np.ndarray):
    bound = 0.6 - products.margin(x.shape[1])
    yield products._above_torch(x, x, bound, starts, "cpu")


@pytest.mark.parametrize("budget", [7e11, 0])
def test_later_generation_joins_new_rows_with_old_and_new_and_merges_to_the_whole(
    tmp_path: Path, budget: float
) -> None:
    x = planted(2400)
    known = write(tmp_path / "e", x, parts=4)
    options = JoinOptions(0.5, recall=1.0, exact_multiply_adds=budget)
    forests = []
    for generation, (seen, fresh) in enumerate(((range(2), range(2)), (range(4), range(2, 4)))):
        pieces: list[Piece] = []
        for k in seen:
            part = known.partitions[k]
            nodes = np.arange(part.first_row, part.first_row + part.rows, dtype=np.uint32)
            pieces += file_pieces(part.path, nodes, None, k in fresh, 500)
        members = Members(tuple(pieces), 64, True, len(x))
        result = self_join(members, IDS[: len(x)], options, Scratch(str(tmp_path / f"s{generation}")))
        ends = np.concatenate([result.forest["low"], result.forest["high"]])
        assert generation == 0 or not (result.forest["high"] < 1200).any(), "no pair of two old images"
        assert generation == 1 or ends.max() < 1200
        forests.append(result.forest)
    merged = f.maximum_spanning_forest(np.concatenate(forests))
    truth = f.maximum_spanning_forest(oracle(x, 0.5))
    if budget:
        assert merged.tobytes() == truth.tobytes()
    else:
        found = set(merged.tolist()) & set(truth.tolist())
        assert len(found) > 0.97 * len(truth)


def test_forest_does_not_depend_on_how_the_work_is_cut(tmp_path: Path) -> None:
    x = planted(3000, 32)
    ids = IDS[:3000]
    base = JoinOptions(0.6, recall=0.9, exact_multiply_adds=0)
    whole = self_join(members_of(tmp_path / "e", x), ids, base, Scratch(str(tmp_path / "a")))
    assert whole.report["method"] == "cells"
    small = Scratch(str(tmp_path / "b"))
    import curation.duplicates.join as module

    before = module.TASK_PAIRS, module.EDGES_HELD
    try:
        module.TASK_PAIRS, module.EDGES_HELD = 5_000, 50
        again = self_join(members_of(tmp_path / "e2", x, parts=5), ids, base, small)
    finally:
        module.TASK_PAIRS, module.EDGES_HELD = before
    assert again.forest.tobytes() == whole.forest.tobytes()
    assert len(small.groups("forest")) > len(Scratch(str(tmp_path / "a")).groups("forest"))


def test_interrupted_join_does_only_what_is_missing(tmp_path: Path) -> None:
    x = planted(2000)
    members, options = members_of(tmp_path / "e", x), JoinOptions(0.6, recall=0.9, exact_multiply_adds=0)
    scratch = Scratch(str(tmp_path / "s"))
    scratch.prepare({"a": 1})
    whole = self_join(members, IDS[:2000], options, scratch)
    for name in scratch.groups("forest")[:1] + scratch.groups("cells")[-1:]:
        path = os.path.join(scratch.directory, name)
        for file in os.listdir(path):
            os.unlink(os.path.join(path, file))
        os.rmdir(path)
    scratch.prepare({"a": 1})
    ran = []

    def counting(function, calls, *, shared=None):
        for name, arguments in calls:
            ran.append(name)
            yield name, function(*arguments, shared)

    again = self_join(members, IDS[:2000], options, scratch, counting)
    assert again.forest.tobytes() == whole.forest.tobytes() and len(ran) == 2
    scratch.prepare({"a": 2})
    assert not scratch.groups("forest"), "another plan starts anew"


def test_max_edges_keeps_the_best_of_each_image_and_cuts_big_groups(tmp_path: Path) -> None:
    x = planted(1500)
    members = members_of(tmp_path / "e", x)
    result = self_join(members, IDS, JoinOptions(0.45, max_edges=3), Scratch(str(tmp_path / "s")))
    expected = f.maximum_spanning_forest(f.prune(oracle(x, 0.45), 3))
    assert result.forest.tobytes() == expected.tobytes()


def test_measured_recall_is_the_share_of_true_pairs_compared(tmp_path: Path) -> None:
    pairs = np.zeros(10, recalls.SAMPLE_PAIR)
    pairs["query"] = [1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    pairs["similarity"], pairs["weight"] = 0.7, 1
    pairs["visits"] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 40]
    assert recalls.choose_visits(pairs, 0.6, 0.85, 100) == 9
    assert recalls.choose_visits(pairs, 0.6, 1.0, 100) == 40
    assert recalls.choose_visits(pairs, 0.8, 0.9, 100) == 16, "nothing to learn from"
    got = recalls.measured(pairs, pairs["visits"] <= 9, 0.6, 20)
    assert got["recall"] == 0.9 and got["pairs"] == 10 and got["low"] < 0.9 < got["high"] < 1
    low, high = recalls.wilson(0.99, 1000)
    assert (round(low, 4), round(high, 4)) == (0.9817, 0.9946)


def test_big_cells_are_sliced_and_small_ones_bundled() -> None:
    sizes = np.zeros((4, 6), np.int64)
    sizes[1] = [10, 10, 60_000, 10, 0, 10]
    sizes[3] = [5, 5, 20_000, 5, 0, 5]
    tasks = cell_tasks(sizes, 512, 4 << 30)
    assert tasks[0] == CellTask(0, 2, tile_rows=tasks[0].tile_rows) and tasks[-1].first == 3
    slices = [t for t in tasks if t.first == 2]
    assert len(slices) > 5 and slices[0].begin == 0 and slices[-1].stop == 80_000
    assert all(a.stop == b.begin for a, b in itertools.pairwise(slices))


def test_pieces_are_cut_between_row_groups_and_cover_every_row(tmp_path: Path) -> None:
    known = write(tmp_path, planted(1000, 16), parts=1)
    positions = np.arange(0, 1000, 3)
    pieces = file_pieces(known.partitions[0].path, positions.astype(np.uint32), positions, True, 450)
    bundles = bundled(pieces, 300)
    assert 1 < len(bundles) < 3
    assert (np.concatenate([b.numbers() for b in bundles]) == positions).all()
    assert (np.concatenate([b.read(16)[1] for b in bundles]) == planted(1000, 16)[positions]).all()
    assert len(pieces) == 3 and sum(p.rows for p in pieces) == len(positions)
    read = np.concatenate([p.read(16)[1] for p in pieces])
    assert (read == planted(1000, 16)[positions]).all()
    assert max_piece_rows(1 << 30, 512) * 512 * 4 < 1 << 28
    ids, order = rank(np.array([4, 9, 2], np.uint64))
    assert ids.tolist() == [2, 4, 9] and order is not None and order.tolist() == [1, 2, 0]
