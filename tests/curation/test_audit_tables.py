"""Figures of the audit's pages and notebook against naive ones: measures, scores, clusters, curves, frequent keys."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.audit import cluster_tables, measures, retrieval_tables, scans, score_tables, tables
from curation.audit.overview import warnings
from curation.audit.run_tables import RunTables
from curation.audit.sections import SAMPLING, Sampling, balance, clusters
from curation.schemas import DUPLICATES, IMAGES, RETRIEVAL, centroids_schema, clusters_schema
from tests.curation.test_audit import image, write

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=30)


@given(COUNTS)
def test_gini_is_the_mean_difference_of_all_pairs(counts: list[int]) -> None:
    total = sum(counts)
    wanted = sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * total) if total else 0.0
    assert measures.gini(np.array(counts)) == pytest.approx(wanted)


@given(COUNTS, st.integers(1, 9))
def test_entropy_is_that_of_the_shares_and_knows_no_scale(counts: list[int], times: int) -> None:
    shares = [c / sum(counts) for c in counts if c]
    wanted = -sum(p * np.log2(p) for p in shares)
    assert measures.entropy(np.array(counts)) == pytest.approx(wanted, abs=1e-12)
    assert measures.entropy(np.array(counts) * times) == pytest.approx(wanted, abs=1e-12)
    assert measures.effective(np.ones(len(counts))) == pytest.approx(len(counts))


@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40), (3, 3), (1, 4)])
def test_plane_keeps_what_the_two_largest_singular_values_keep(n: int, d: int) -> None:
    points = np.random.default_rng(n).normal(size=(n, d))
    found = measures.plane(points, np.ones(n))
    left, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    wanted = (left * values)[:, :2]
    distances = np.linalg.norm(found[:, None] - found[None], axis=2)
    assert np.allclose(distances, np.linalg.norm(wanted[:, None] - wanted[None], axis=2))
    assert np.array_equal(found, measures.plane(points, np.ones(n)))


def test_discs_are_moved_apart_and_stay_inside() -> None:
    places = np.repeat([[50.0, 50.0]], 12, axis=0)
    radii = np.full(12, 10.0)
    found = measures.spread_out(places, radii, 300, 200)
    distance = np.linalg.norm(found[:, None] - found[None], axis=2) + 1e9 * np.eye(12)
    assert distance.min() > 18 and (found >= 10).all() and (found <= [290, 190]).all()


def test_the_most_frequent_keys_are_found_while_few_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hosts = [f"h{i}" for i in rng.integers(0, 400, 3000)] + ["big"] * 500 + ["large"] * 300
    rng.shuffle(hosts)
    path = write(tmp_path, "part", [image(i, url=f"http://{h}/x") for i, h in enumerate(hosts)], IMAGES)
    exact = Counter(hosts)
    found, uncertain = scans.top_counts([([path], None)], {"host": scans.host()}, 2)
    assert found.to_pylist() == [{"host": h, "images": n} for h, n in exact.most_common(2)] and uncertain == 0
    monkeypatch.setattr(scans, "COUNTED_GROUPS", 64)
    monkeypatch.setattr(scans, "BATCH_ROWS", 256)
    found, uncertain = scans.top_counts([([path], None)], {"host": scans.host()}, 2)
    assert uncertain > 0
    for row in found.to_pylist():
        assert exact[row["host"]] - uncertain <= row["images"] <= exact[row["host"]]
    assert [row["host"] for row in found.to_pylist()] == ["big", "large"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1, width=32)), min_size=1, max_size=60), st.integers(1, 4))
def test_images_around_a_threshold_are_the_nearest_on_either_side(
    tmp_path_factory: pytest.TempPathFactory, values: list[float | None], each: int
) -> None:
    path = write(tmp_path_factory.mktemp("s"), "part", [image(i, nsfw=v) for i, v in enumerate(values)], IMAGES)
    hidden = np.array([0], np.uint64)
    found = score_tables.score_figures([path], {"nsfw": 0.5}, each, hidden)["nsfw"]
    known = {i: v for i, v in enumerate(values) if v is not None}
    assert found["counts"].sum() == len(known)
    for side in (False, True):
        mine = [v for i, v in known.items() if (v > 0.5) is side and i != 0]
        shown = [row["value"] for row in found["around"] if row["dropped_side"] is side]
        assert sorted(abs(v - 0.5) for v in shown) == sorted(abs(v - 0.5) for v in mine)[:each]
    assert 0 not in [row["image_id"] for row in found["around"]]


def test_pairs_at_the_threshold_lie_on_their_side_and_come_once(tmp_path: Path) -> None:
    similarities = [0.5, 0.56, 0.59, 0.6, 0.62, 0.64, 0.7]
    rows = []
    for n, similarity in enumerate(similarities):
        for i, other in ((2 * n, 2 * n + 1), (2 * n + 1, 2 * n)):
            row = {"image_id": i, "component_id": i, "kept": True, "reason": "kept"}
            rows.append(row | {"nearest_id": other, "similarity": similarity})
    path = write(tmp_path, "part", rows, DUPLICATES)
    found = tables.nearest_pairs([path], 0.6, 0.05, 9)
    assert [(round(r["similarity"], 2), r["above"]) for r in found] == [
        (0.64, True),
        (0.62, True),
        (0.6, False),
        (0.59, False),
        (0.56, False),
    ]
    assert len(tables.nearest_pairs([path], 0.6, 0.05, 1)) == 2
    hidden = np.array([8], np.uint64)  # one of the pair of 0.62
    assert 0.62 not in [round(r["similarity"], 2) for r in tables.nearest_pairs([path], 0.6, 0.05, 9, hidden)]


def clustered(folder: Path, leaves: list[int], distances: list[float] | None = None) -> str:
    rows = [
        {"image_id": i, "cluster_1": c, "cluster_2": c // 3, "distance": distances[i] if distances else i / 100}
        for i, c in enumerate(leaves)
    ]
    path = folder / "clusters.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=clusters_schema(2)), path)
    return str(path)


def test_members_are_the_nearest_and_the_farthest_and_none_is_shown_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    leaves, distances = rng.integers(0, 4, 200).tolist(), rng.random(200).astype(np.float32).tolist()
    path = clustered(tmp_path, leaves, distances)
    hidden = np.array([int(np.argmin(distances))], np.uint64)
    found = cluster_tables.cluster_members([path], [1, 2], 3, 0, hidden)
    assert len({row["image_id"] for row in found}) == len(found) == 2 * 9
    for leaf in (1, 2):
        mine = sorted((d, i) for i, (c, d) in enumerate(zip(leaves, distances, strict=True)) if c == leaf)
        mine = [i for _, i in mine if i != hidden[0]]
        by_choice = defaultdict(list)
        for row in found:
            if row["cluster"] == leaf:
                by_choice[row["choice"]].append(row["image_id"])
        assert by_choice["nearest"] == mine[:3] and by_choice["farthest"] == mine[::-1][:3]
        assert len(by_choice["random"]) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=60))
def test_purity_is_the_share_of_the_commonest_label(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, str | None]]
) -> None:
    folder = tmp_path_factory.mktemp("p")
    images = write(folder, "images", [image(i, label=label) for i, (_, label) in enumerate(drawn)], IMAGES)
    path = clustered(folder, [c for c, _ in drawn])
    counts, share = cluster_tables.labels_by_cluster([images], [path])
    by_leaf: dict[int, Counter] = defaultdict(Counter)
    for c, label in drawn:
        if label:
            by_leaf[c][label] += 1
    assert share == 1.0
    assert {(r["cluster"], r["label"]): r["images"] for r in counts.to_pylist()} == {
        (c, label): n for c, some in by_leaf.items() for label, n in some.items()
    }
    total = sum(sum(c.values()) for c in by_leaf.values())
    found = cluster_tables.purity(counts)
    if not total:
        assert found["purity"] is None
        return
    assert found["purity"] == pytest.approx(sum(max(c.values()) for c in by_leaf.values()) / total)
    coarse: dict[int, Counter] = defaultdict(Counter)
    for c, some in by_leaf.items():
        coarse[c // 3] += some
    group_of = np.arange(6) // 3
    wanted = sum(max(c.values()) for c in coarse.values()) / total
    assert cluster_tables.purity(counts, group_of)["purity"] == pytest.approx(wanted)


def test_a_sample_of_labels_gives_about_the_same_purity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    leaves = rng.integers(0, 5, 4000)
    labels = np.where(rng.random(4000) < 0.7, leaves, rng.integers(0, 5, 4000))
    rows = [image(i, label=f"l{v}") for i, v in enumerate(labels.tolist())]
    images, path = write(tmp_path, "images", rows, IMAGES), clustered(tmp_path, leaves.tolist())
    whole = cluster_tables.purity(cluster_tables.labels_by_cluster([images], [path])[0])["purity"]
    monkeypatch.setattr(cluster_tables, "LABELLED", 1000)
    counts, share = cluster_tables.labels_by_cluster([images], [path])
    assert share == 0.25 and 800 < pc.sum(counts["images"]).as_py() < 1200
    assert cluster_tables.purity(counts)["purity"] == pytest.approx(whole, abs=0.05)


def test_centroids_are_the_largest_and_only_those_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [
        {"cluster": c, "parent": c % 3, "size": s, "centroid": rng.normal(size=4).tolist()}
        for c, s in enumerate([5, 0, 9, 7, 1, 3])
    ]
    path = tmp_path / "level-1.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=centroids_schema(4)), path)
    assert cluster_tables.centroids(str(path), limit=3)["cluster"].to_pylist() == [0, 2, 3]
    some = cluster_tables.centroids(str(path), [0])
    assert some["cluster"].to_pylist() == [0, 3]
    wanted = np.array([rows[0]["centroid"], rows[3]["centroid"]], np.float32)
    assert np.array_equal(cluster_tables.centroid_vectors(some), wanted)


def test_curves_are_the_quantiles_of_the_similarities_by_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = [
        {"image_id": 7, "seed_set": s, "seed_id": seed, "mode": "sample", "rank": r, "similarity": v}
        for s in ("a", "b\x00c")
        for seed in range(101)
        for r, v in enumerate(sorted(rng.uniform(-0.2, 0.9, 3).tolist(), reverse=True))
    ]
    found = retrieval_tables.similarities([write(tmp_path, "part", rows, RETRIEVAL)])
    assert set(found) == {("a", "sample"), ("b\x00c", "sample")}
    ranks, quantiles = found["a", "sample"].curve()
    assert ranks.tolist() == [0, 1, 2]
    for rank in range(3):
        values = np.array([r["similarity"] for r in rows if r["seed_set"] == "a" and r["rank"] == rank])
        wanted = np.quantile(values, retrieval_tables.QUANTILES, method="inverted_cdf")
        assert np.abs(quantiles[rank] - wanted).max() <= 0.0026


def test_leaves_shown_are_the_largest_the_most_drawn_and_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Sampling(leaves=5, largest_leaves=2, drawn_leaves=2, random_leaves=2)
    monkeypatch.setattr(clusters, "SAMPLING", small)
    paths = np.stack([np.arange(20), np.arange(20) // 5], axis=1)
    drawn = {3: {"a": 5}, 4: {"a": 1, "b": 9}, 18: {"a": 100}, 7: {"b": 2}}
    labels = pa.table({"cluster": pa.array([], pa.int32()), "label": [], "images": []})
    tree = clusters.Tree(paths, np.arange(20) + 1, drawn, labels)
    found = clusters.choose_leaves(tree)
    assert list(found)[:4] == [19, 18, 4, 3] and len(found) == 6
    assert clusters.seed_entropy(drawn, 20)[1]["entropy"] == pytest.approx(measures.entropy(np.array([9, 2])))


def test_shares_before_and_after_count_each_image_once(tmp_path: Path) -> None:
    path = clustered(tmp_path, [0, 0, 0, 1, 4, 4])
    taken = pa.table({"image_id": pa.array([0, 3, 4], pa.uint64()), "cluster_id": pa.array([0, 1, 9], pa.int32())})
    pq.write_table(taken, tmp_path / "balance.parquet")
    run = RunTables(clusters=[path], balance=[str(tmp_path / "balance.parquet")])
    found = balance.cluster_counts(run)
    assert found["cluster_1"]["pool"].tolist() == [3, 1, 2]
    assert found["cluster_1"]["balanced sample"].tolist() == [1, 1, 0]  # 9 is no leaf of the run
    assert found["cluster_2"]["pool"].tolist() == [4, 2]


def nothing_unusual() -> dict:
    duplicates = {
        "largest": 2,
        "reasons": [{"kept": True, "reason": "kept", "images": 1000}],
        "recall": {"exact": False, "value": 0.995, "low": 0.992, "high": 1.0, "asked": 0.99},
        "shown": [],
    }
    failures = {"reasons": [], "hosts": [{"host": "h", "images": 5, "rows": 1000}]}
    decontamination = {"dropped": 3, "direct": 3, "chains": 0, "largest": None}
    leaf = {"clusters": 50, "share": 0.05, "largest": 50.0}
    row = {"seed_set": "s", "href": None, "planned": 100, "nominal": 100, "unique": 90}
    return {
        "failures": failures,
        "duplicates": duplicates,
        "decontamination": decontamination,
        "clusters": {"levels": [leaf]},
        "retrieval": {"rows": [row]},
    }


def warned(shown: dict) -> str:
    kept = {"source_number": 0, "kept": True, "reason": "kept", "images": 1000}
    counts = {"fetched": [{"images": 1000}], "dedup": [kept], "funnel": {}}
    return " / ".join(w.words for w in warnings(RunTables(), counts, {"manifest": {}}, shown))


def test_an_ordinary_run_is_not_warned_of() -> None:
    assert warned(nothing_unusual()) == ""


@pytest.mark.parametrize(
    ("page", "change", "words"),
    [
        ("failures", {"reasons": [{"status": "failed", "images": 150}]}, "15.0% of the rows listed"),
        ("failures", {"reasons": [{"status": "transient", "images": 20}]}, "20 rows failed for now"),
        ("failures", {"hosts": [{"host": "h", "images": 90, "rows": 100}]}, "lost over half of their rows"),
        ("duplicates", {"largest": 40}, "One component holds 4.0% of the pool (40 images)"),
        (
            "duplicates",
            {"recall": {"exact": False, "value": 0.97, "low": 0.96, "high": 0.98, "asked": 0.99}},
            "97.00% of the pairs, below the 99% asked for",
        ),
        (
            "duplicates",
            {"recall": {"exact": False, "value": 0.992, "low": 0.98, "high": 1.0, "asked": 0.99}},
            "its interval begins at 98.00%",
        ),
        ("duplicates", {"shown": [{"far": 0.9, "images": 30}]}, "most members are not similar"),
        ("decontamination", {"dropped": 100, "direct": 100}, "The evaluation sets took 9.1%"),
        ("decontamination", {"direct": 1, "chains": 2}, "2 images went by chains"),
        ("clusters", {"levels": [{"clusters": 50, "share": 0.3, "largest": 300.0}]}, "One leaf cluster holds 30.0%"),
        (
            "retrieval",
            {"rows": [{"seed_set": "s", "href": None, "planned": 100, "nominal": 70, "unique": 10}]},
            "brought 70% of what was planned / Seeds of s draw the same images",
        ),
    ],
)
def test_what_stands_out_is_warned_of(page: str, change: dict, words: str) -> None:
    shown = nothing_unusual()
    shown[page] |= change
    assert words in warned(shown)


def test_pages_state_no_more_than_they_show() -> None:
    assert SAMPLING.largest_leaves + SAMPLING.drawn_leaves + SAMPLING.random_leaves <= SAMPLING.leaves
