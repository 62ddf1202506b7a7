"""The join against exact float64 search: cells, tiles, big groups, thresholds, later generations."""

import hashlib
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import products, vectors
from curation.duplicates import cell_join, kept, planning, tasks
from curation.duplicates import components as comp
from curation.duplicates import forest as f
from curation.duplicates import recall as recalls
from curation.duplicates.cell_join import CellTask, cell_tasks, join_by_cells
from curation.duplicates.cells import EXPONENTS, Cells, Rule, train
from curation.duplicates.join import JoinResult, self_join
from curation.duplicates.kept import Kept
from curation.duplicates.members import Members, Piece, bundled, file_pieces, max_piece_rows, rank, whole_set
from curation.duplicates.planning import find_plan
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, serial
from curation.errors import UserError


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


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall measured on a tenth of the queries: what these tests promise does not depend on how many."""
    for name, count in (("CHOICE_QUERIES", 256), ("MEASURE_QUERIES", 256), ("QUERIES_WITH_COPIES", 256)):
        monkeypatch.setattr(recalls, name, count)
    monkeypatch.setattr(recalls, "MOST_QUERIES", 1024)
    # Every one of the 84 rules tried is costed on the meetings of so many rows; an eighth of them meet all.
    monkeypatch.setattr(planning, "MEETING", 512)


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

    cells = train(20, 0, x, 0.45).with_rule(Rule(0.0, 3.0, 2, (128, 512)))
    find_plan(members, IDS[: len(x)], options, scratch, serial, cells)
    forest = join_by_cells(members, cells, options, scratch, serial)
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
        old = result.forest[result.forest["high"] < 1200]
        assert generation == 0 or (old["similarity"] > 0.999).all(), "no pair of two old images but equals of a new one"
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
    x = planted(3000, 128)
    ids = IDS[:3000]
    base = JoinOptions(0.6, recall=0.9, exact_multiply_adds=0)
    whole = self_join(members_of(tmp_path / "e", x), ids, base, Scratch(str(tmp_path / "a")))
    assert whole.report["method"] == "cells"
    small = Scratch(str(tmp_path / "b"))
    module = cell_join

    before = module.TASK_PAIRS, tasks.EDGES_HELD
    try:
        module.TASK_PAIRS, tasks.EDGES_HELD = 5_000, 50
        again = self_join(members_of(tmp_path / "e2", x, parts=5), ids, base, small)
    finally:
        module.TASK_PAIRS, tasks.EDGES_HELD = before
    assert again.forest.tobytes() == whole.forest.tobytes()
    assert len(small.groups("forest")) > len(Scratch(str(tmp_path / "a")).groups("forest"))


def test_interrupted_join_does_only_what_is_missing(tmp_path: Path) -> None:
    x = planted(2000, 256)
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


@dataclass(frozen=True)
class Grown:
    """A pool of two generations, joined through cells one after the other."""

    root: Path
    x: np.ndarray
    options: JoinOptions

    def join(
        self, name: str, generation: int, rows: np.ndarray, cells: Cells | None = None, keep: Kept | None = None
    ) -> JoinResult:
        """The join of some rows; those from 2,000 on are the second generation."""
        known = vectors.open_folder(str(self.root / "e"))
        pieces: list[Piece] = []
        for part in known.partitions:
            inside = rows[(rows >= part.first_row) & (rows < part.first_row + part.rows)]
            for k in (0, 1):
                mine = inside[(inside >= 2000) == (k == 1)]
                if len(mine) and k <= generation:
                    pieces += file_pieces(
                        part.path, mine.astype(np.uint32), mine - part.first_row, k == generation, 500, k
                    )
        members = Members(bundled(pieces, 700), self.x.shape[1], True, len(self.x))
        scratch = Scratch(str(self.root / name))
        return self_join(members, IDS[: len(self.x)], self.options, scratch, cells=cells, keep=keep)


def grown(root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Grown, JoinResult, Kept]:
    """(the pool, the join of its first generation, what a join of the second may use)."""
    monkeypatch.setattr(planning, "PRODUCT_NANOSECONDS", 1e9)  # cells, whatever they cost
    x = planted(2600)
    write(root / "e", x, parts=4)
    pool = Grown(root, x, JoinOptions(0.5, **{"recall": 0.9, "exact_multiply_adds": 0} | options))
    first = pool.join("s0", 0, np.arange(2600), keep=Kept(str(root / "gen-0")))
    return pool, first, Kept(str(root / "gen-1"), {n.removesuffix(".npz"): f"{root}/gen-0/{n}" for n in first.kept})


def assigned_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of vectors that are assigned to cells from here on."""
    seen: list[int] = []
    inner = Cells.assign

    def counted(cells: Cells, rows: np.ndarray) -> Any:
        seen.append(len(rows))
        return inner(cells, rows)

    monkeypatch.setattr(Cells, "assign", counted)
    return seen


def test_what_was_assigned_before_is_not_assigned_again_and_the_forest_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, first, keep = grown(tmp_path, monkeypatch)
    every = np.arange(2600)
    assert len(first.kept) > 2 and {p.name for p in (tmp_path / "gen-0").iterdir()} == set(first.kept)
    for name, record in first.kept.items():
        data = (tmp_path / "gen-0" / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    without = pool.join("without", 1, every, first.cells)
    seen = assigned_anew(monkeypatch)
    found = pool.join("with", 1, every, first.cells, keep)
    assert 0 < sum(seen) <= 600, "only new rows"
    assert found.forest.tobytes() == without.forest.tobytes() and found.report == without.report and not without.kept
    assert set(found.kept) == {p.name for p in (tmp_path / "gen-1").iterdir()}
    assert all(name.startswith("0001-") for name in found.kept), "what was taken over is not written again"


def test_kept_assignments_that_are_lost_damaged_or_of_something_else_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, first, keep = grown(tmp_path, monkeypatch)
    names = sorted(first.kept)
    (tmp_path / "gen-0" / names[0]).unlink()
    damaged = tmp_path / "gen-0" / names[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    # Rows that went: their bundle holds others now, and those behind it may.
    some = np.setdiff1d(np.arange(2600), [1700, 1701])
    without = pool.join("without", 1, some, first.cells)
    seen = assigned_anew(monkeypatch)
    found = pool.join("with", 1, some, first.cells, keep)
    assert found.forest.tobytes() == without.forest.tobytes()
    assert {names[0], names[1]} < set(found.kept) and 600 < sum(seen) < 2598
    # Cells that are not those of the files.
    other = train(30, 1, pool.x, 0.5).with_rule(first.cells.rule)  # type: ignore[union-attr]
    seen.clear()
    again = pool.join("other", 1, np.arange(2600), other, keep)
    assert sum(seen) > 2000
    assert again.forest.tobytes() == pool.join("other without", 1, np.arange(2600), other).forest.tobytes()


def test_kept_files_lie_on_any_filesystem_and_are_equal_for_equal_arrays() -> None:
    arrays = {"rows": np.arange(9, dtype=np.uint32), "sketches": np.ones((9, 8), np.uint64)}
    one, two = (kept.write(f"memory://kept/{name}.npz", "key", arrays) for name in "ab")
    assert one == two
    back = kept.read("memory://kept/a.npz", "key")
    assert back is not None and all((back[name] == arrays[name]).all() for name in arrays)
    assert kept.read("memory://kept/a.npz", "other") is None and kept.read("memory://kept/c.npz", "key") is None


def test_recall_of_new_rows_is_measured_against_a_sample_of_the_old_ones_that_stands_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, first, keep = grown(tmp_path, monkeypatch)
    every = np.arange(2600)
    whole = pool.join("all", 1, every, first.cells, keep)
    monkeypatch.setattr(planning, "MEASURED_ROWS", 1)  # twice as many as are new then: 1,200 of 2,000
    sampled = pool.join("sampled", 1, every, first.cells, keep)
    assert sampled.forest.tobytes() == whole.forest.tobytes()
    drawn = [len(np.load(path)) for path in (tmp_path / "sampled" / "rows").glob("*/sampled.npy")]
    assert 900 < sum(drawn) < 1300
    assert abs(sampled.report["pairs_measured"] / whole.report["pairs_measured"] - 1) < 0.35
    assert abs(sampled.report["recall"] - whole.report["recall"]) < 0.05


def test_interrupted_join_tells_of_all_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, first, _ = grown(tmp_path, monkeypatch)
    for name in sorted((tmp_path / "s0" / "cells").iterdir())[1:]:
        shutil.rmtree(name)
    again = pool.join("s0", 0, np.arange(2600), keep=Kept(str(tmp_path / "gen-0")))
    assert again.kept == first.kept and again.forest.tobytes() == first.forest.tobytes()


@pytest.mark.parametrize("options", [{"exact_multiply_adds": 1e12}, {"max_edges": 3}])
def test_joins_that_no_later_one_can_use_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    _, first, _ = grown(tmp_path, monkeypatch, **options)
    assert not first.kept and not (tmp_path / "gen-0").exists()


def test_bundles_of_a_generation_stay_the_same_when_others_come(tmp_path: Path) -> None:
    def piece(generation: int, part: int) -> Piece:
        return Piece(f"{part}", None, None, 0, 100 + part, generation == 1, generation)

    old, new = [piece(0, k) for k in range(40)], [piece(1, k) for k in range(25)]
    mixed = [p for pair in itertools.zip_longest(old, new) for p in pair if p is not None]
    alone = {b.name: b.pieces for b in bundled(old, 700)}
    together = {b.name: b.pieces for b in bundled(mixed, 700)}
    assert len(alone) > 5 and alone.items() <= together.items()
    assert sorted(p.path for b in together.values() for p in b) == sorted(p.path for p in mixed)


def test_max_edges_keeps_the_best_of_each_image_and_cuts_big_groups(tmp_path: Path) -> None:
    x = planted(1500)
    members = members_of(tmp_path / "e", x)
    result = self_join(members, IDS, JoinOptions(0.45, max_edges=3), Scratch(str(tmp_path / "s")))
    expected = f.maximum_spanning_forest(f.prune(oracle(x, 0.45), 3))
    assert result.forest.tobytes() == expected.tobytes()


def sample_pairs(gaps: list[float]) -> np.ndarray:
    pairs = np.zeros(len(gaps), recalls.SAMPLE_PAIR)
    pairs["query"] = np.arange(len(gaps))
    pairs["similarity"], pairs["weight"], pairs["first"], pairs["distance"] = 0.7, 1, 40, 200
    pairs["gap"] = np.array(gaps, np.float32)[:, None]
    return pairs


def test_measured_recall_is_the_share_of_true_pairs_nominated() -> None:
    pairs = sample_pairs([-1, -1, 0.01, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.4])
    pairs["query"] = [1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    found = recalls.nominated(pairs, Rule(0.0, 0.06, 2, (40, 200)))
    assert found.sum() == 9
    got = recalls.measured(pairs, found, 0.6, 20)
    assert got["recall"] == 0.9 and got["pairs"] == 10 and got["low"] < 0.9 < got["high"] <= 1
    assert got["queries_with_pairs"] == 9
    assert not recalls.nominated(pairs, Rule(0.0, 1.0, 2, (39, 200))).any()
    assert not recalls.nominated(pairs, Rule(0.0, 1.0, 2, (40, 199))).any()
    low, high = recalls.wilson(0.99, 1000)
    assert (round(low, 4), round(high, 4)) == (0.9817, 0.9946)


def test_bootstrap_interval_holds_the_true_recall_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        sizes = random.zipf(2.5, 400).clip(max=50)
        pairs = sample_pairs([0.0] * int(sizes.sum()))
        pairs["query"] = np.repeat(np.arange(400), sizes)
        got = recalls.measured(pairs, random.random(len(pairs)) < 0.97, 0.6, 400)
        held += got["low"] <= 0.97 <= got["high"]
    assert 180 <= held <= 198


def test_chosen_rule_is_the_cheapest_that_reaches_the_recall_on_its_sample() -> None:
    x = planted(3000)
    cells = train(64, 0, x, 0.6)
    background = recalls.Background.of(cells, x[:200], x[:1000])
    random = np.random.default_rng(1)
    pairs = sample_pairs(np.sort(random.exponential(0.03, 500)).tolist())
    chosen = recalls.choose(pairs, 0.6, 0.9, background)
    assert chosen is not None
    found = recalls.nominated(pairs, chosen.rule)
    assert 0.9 <= found.mean() <= 0.93
    dearer = recalls.choose(pairs, 0.6, 0.99, background)
    assert dearer is not None and dearer.rule.reach > chosen.rule.reach
    imagined = recalls.imagined(x[:200], 0.6, cells)
    unlearnt = recalls.choose(imagined, 0.6, 0.9, background)
    assert unlearnt is not None and unlearnt.rule.reach > 0, "where the sample has no copies"


def test_gap_is_the_reach_at_which_one_end_visits_the_home_of_the_other() -> None:
    x = planted(800)
    cells = train(40, 0, x, 0.6)
    left, right = x[:200], x[200:400]
    gaps = cells.gaps(left, right)
    for k, exponent in enumerate(EXPONENTS):
        for reach in (0.02, 0.1, 0.3):
            visiting = cells.with_rule(Rule(exponent, reach, 2, (128, 512)))
            goes = []
            for rows in (left, right):
                homes, visitors, visited, _ = visiting.assign(rows)
                mask = np.zeros((len(rows), 40), bool)
                mask[visitors, visited] = True
                mask[np.arange(len(rows)), homes] = True
                goes.append((homes, mask))
            (home, mask), (other_home, other_mask) = goes
            place = np.arange(200)
            meet = mask[place, other_home] | other_mask[place, home]
            assert (meet == (gaps[:, k] <= np.float32(reach))).mean() > 0.99, "but for roundings at the edge"


def test_assignment_of_a_vector_does_not_depend_on_its_company() -> None:
    x = planted(2500)
    cells = train(50, 0, x, 0.6).with_rule(Rule(0.01, 0.1, 2, (128, 512)))
    order = np.random.default_rng(0).permutation(len(x))
    homes, rows, visited, bits = cells.assign(x)
    again, other_rows, other_visited, other_bits = cells.assign(x[order])
    assert (again == homes[order]).all() and (other_bits == bits[order]).mean() > 0.999
    one = set(zip(rows.tolist(), visited.tolist(), strict=True))
    assert {(int(order[r]), int(c)) for r, c in zip(other_rows, other_visited, strict=True)} == one


def test_cells_come_back_from_bytes_as_they_were() -> None:
    cells = train(16, 0, planted(400), 0.6).with_rule(Rule(0.01, 0.25, 3, (77, 160), 16))
    again = Cells.from_bytes(cells.to_bytes())
    assert again.rule == cells.rule and again.to_bytes() == cells.to_bytes()


def test_equal_vectors_take_part_once_and_stay_together(tmp_path: Path) -> None:
    x = np.repeat(planted(200, 64)[:40], 50, axis=0)
    options = JoinOptions(0.6, exact_multiply_adds=0)
    result = self_join(members_of(tmp_path / "e", x), IDS[:2000], options, Scratch(str(tmp_path / "s")))
    exact = f.maximum_spanning_forest(oracle(x, 0.6))
    assert (comp.components(result.forest, 2000, 0.6) == comp.components(exact, 2000, 0.6)).all()
    again = self_join(members_of(tmp_path / "e2", x, parts=7), IDS[:2000], options, Scratch(str(tmp_path / "s2")))
    assert again.forest.tobytes() == result.forest.tobytes(), "wherever the equal ones lie"


def test_all_equal_vectors_are_one_component_without_comparing_them_all(tmp_path: Path) -> None:
    x = np.repeat(planted(200, 64)[:1], 12_000, axis=0)
    options = JoinOptions(0.6, exact_multiply_adds=0)
    result = self_join(members_of(tmp_path / "e", x), IDS[:12_000], options, Scratch(str(tmp_path / "s")))
    assert result.report["method"] == "cells"
    assert (result.forest["low"] == 0).all() and len(result.forest) == 11_999


def test_vectors_that_are_nearly_all_alike_stop_the_join_with_a_sentence(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = unit(np.ones((1, 64)) / 8 + 0.02 * random.standard_normal((9000, 64))).astype(np.float16)
    with pytest.raises(UserError, match="do not tell images apart"):
        options = JoinOptions(0.6, exact_multiply_adds=0)
        self_join(members_of(tmp_path / "e", x), IDS[:9000], options, Scratch(str(tmp_path / "s")))


def test_big_cells_are_sliced_and_small_ones_bundled() -> None:
    sizes = np.zeros((4, 6), np.int64)
    sizes[1] = [10, 10, 60_000, 10, 0, 10]
    sizes[3] = [5, 5, 20_000, 5, 0, 5]
    bundles = cell_tasks(sizes, 4 << 30)
    assert bundles[0] == CellTask(0, 2, tile_rows=bundles[0].tile_rows) and bundles[-1].first == 3
    slices = [t for t in bundles if t.first == 2]
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
