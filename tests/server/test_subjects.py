"""The figures of the server's pages are those of the report and of the notebook, over the same run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import audit
from curation.audit.score_tables import SCORES
from curation.audit.sections.clusters import seed_entropy
from curation.audit.sections.decontamination import THRESHOLDS
from curation.audit.sections.duplicates import similarity_edges
from pipelines.run_directory import RunDirectory
from pipelines.server.subjects import duplicates, filters
from tests.browser.report_runs import with_centroids
from tests.pipelines.synthetic_run import SyntheticRun, build
from tests.pipelines.test_report import set_thresholds
from tests.server.conftest import client_of
from tests.server.test_index import rows_of
from tests.server.test_pages import Page

DESCRIBED = {"component_id": 2, "images": 2, "least_similar": [2, 3], "least_similarity": 0.9, "chain": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    """With thresholds, centroids, and the summaries that the stages of a real run write."""
    made = build(tmp_path_factory.mktemp("subjects") / "run", pool=60)
    set_thresholds(made)
    with_centroids(made.run)
    put(made.run, "dedup", {"components.json": [DESCRIBED], "thresholds.json": SWEEP, "references.json": [REFERENCE]})
    put(
        made.run, "retrieve", {"seed_sets.json": {"flowers": FLOWERS, "animals": {"mode": "cluster", "chosen": CHOSEN}}}
    )
    return made


DROP = {"action": "drop", "scope": "image", "author": "tester"}
SWEEP = {
    "self": [{"threshold": 0.5, "components": 9, "components_of_several": 1234, "largest": 77, "duplicates": 5678}],
    "relative": [{"threshold": 0.5, "component": 4321, "direct": 3210, "largest": 99}],
}
REFERENCE = {
    "reference_set": "evaluation",
    "images": 4,
    "images_hit": 3,
    "direct": 6,
    "component": 12,
    "largest_component": 2,
}
FLOWERS = {"mode": "sample", "seeds": 5, "neighbours": 4, "nominal": 20, "unique": 17, "colliding": 3}
CHOSEN = [{"cluster": 1, "seeds": 4, "images": 11}]


def put(run: RunDirectory, stage: str, files: dict[str, Any]) -> None:
    directory = run.stage(stage)
    (generation,) = directory.all_generations()
    for name, document in files.items():
        generation.put_file(name, json.dumps(document).encode())
    directory.save(generation)


@pytest.fixture(scope="module")
def client(whole: SyntheticRun) -> Any:
    found = client_of(whole.run.root)
    yield found
    found.served.close()


@pytest.fixture(scope="module")
def run(whole: SyntheticRun) -> audit.RunTables:
    return audit.open_run(whole.run.root)


def text_of(client: Any, path: str) -> str:
    answer = client.get(path)
    assert answer.status_code == 200
    return Page(answer.text).text


def test_histograms_are_those_of_the_report(client: Any, run: audit.RunTables) -> None:
    index = client.served.index
    for score in SCORES:
        if score.name in index.orders:
            wanted = audit.scores(run, score.name)["images"].to_pylist()
            assert index.histogram(score.name, score.edges).tolist() == wanted and sum(wanted)
    wanted = audit.similarities(run)["images"].to_pylist()
    assert index.histogram("similarity", similarity_edges(run)).tolist() == wanted and sum(wanted)


def test_images_around_a_threshold_lie_on_its_two_sides(client: Any, whole: SyntheticRun) -> None:
    page = filters.page(client.served, client.served.index)
    section = next(s for s in page["sections"] if s["title"].startswith("NSFW"))
    scores = {r["image_id"]: r["nsfw"] for r in rows_of(whole, "filter") if r["nsfw"] is not None}
    sides = {words.split(",")[0]: [int(image["image_id"]) for image in images] for words, images in section["groups"]}
    assert sides["dropped"] == sorted(i for i in scores if scores[i] > 0.7)[:6]
    assert set(sides["pass"]) <= {i for i in scores if scores[i] <= 0.7} and len(sides["pass"]) == 6
    assert "Dropped where the score is above 0.7" in text_of(client, "/filters")


@pytest.mark.parametrize("threshold", [0.8, float(np.float32(0.8)), 0.05, 0.9])
def test_an_image_at_the_threshold_is_on_the_side_where_the_filter_puts_it(
    client: Any, whole: SyntheticRun, threshold: float
) -> None:
    scores = [r["nsfw"] for r in rows_of(whole, "filter") if r["nsfw"] is not None]
    stages = client.served.stages
    before = dict(stages.options["filter"])
    stages.options["filter"].update(nsfw_threshold=threshold, solid_colour=26.0)  # some images have a contrast of 26
    try:
        page = filters.page(client.served, client.served.index)
    finally:
        stages.options["filter"].update(before)
    nsfw = next(s for s in page["sections"] if s["title"].startswith("NSFW"))
    shown = {words.split(",")[0]: len(images) for words, images in nsfw["groups"]}
    sides = {"dropped": sum(s > threshold for s in scores), "pass": sum(s <= threshold for s in scores)}
    assert shown == {side: min(6, count) for side, count in sides.items() if count}
    contrast = next(s for s in page["sections"] if s["title"].startswith("Contrast"))
    notes = {words.split(",")[0]: [float(i["note"]) for i in images] for words, images in contrast["groups"]}
    assert min(notes["pass"]) == 26 and max(notes["dropped"]) == 25


def test_sides_and_their_ratio_are_those_that_the_filters_look_at(client: Any, whole: SyntheticRun) -> None:
    index = client.served.index
    rows = {r["image_id"]: (r["width"], r["height"]) for r in rows_of(whole, "filter") if r["width"]}
    for name, of in (("min_side", min), ("aspect_ratio", lambda sides: max(sides) / min(sides))):
        found = {int(r["image_id"]): r["score"] for r in index.scored(name, 0.0, None, 1000).images}
        assert found == pytest.approx({image: of(sides) for image, sides in rows.items()})


def test_components_have_their_least_similar_pair_and_what_the_stage_says(client: Any) -> None:
    text = text_of(client, "/component/2")
    assert "The least similar pair, 0.900" in text
    pairs, chain = duplicates.component(client.served, client.served.index, 2)
    assert [int(image["image_id"]) for image in pairs[0]["pairs"][0]] == [2, 3] and chain == []
    first = text_of(client, "/duplicates")
    assert "5,678" in first and "1,234" in first and "Measured recall of the join: 0.9950" in first
    assert "Just above the threshold" in first and "Just below it" not in first  # every stored pair has 0.9


def test_least_similar_pair_of_a_small_component_is_that_of_all_its_pairs() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(9, 8)).astype(np.float32)
    ids = np.arange(9, dtype=np.uint64) * 3

    class Rows:
        def find(self, key: int) -> tuple[int, int]:
            return (2, 9) if key == 5 else (0, 0)

        @property
        def rows(self) -> Any:
            return self

        def read(self, start: int, stop: int) -> np.ndarray:
            return np.arange(start, stop, dtype=np.uint32) if self is groups else ids[start:stop]

    class Space:
        def vector(self, row: int) -> np.ndarray | None:
            return None if row == 4 else vectors[row]

    class Index:
        groups: dict[str, Any]
        spaces: dict[str, Any]
        ids: Any

        def shown(self, rows: np.ndarray) -> np.ndarray:
            return rows[rows != 8]  # hidden

    groups, index = Rows(), Index()
    index.groups, index.spaces, index.ids = {"component": groups}, {"copies": Space()}, Rows()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [2, 3, 5, 6, 7]
    cosine, low, high = min((float(unit[a] @ unit[b]), a, b) for a in rows for b in rows if a < b)
    found, least = duplicates._least(index, 5)  # type: ignore[arg-type]
    assert sorted(found) == [3 * low, 3 * high] and least == pytest.approx(cosine, abs=1e-5)
    assert duplicates._least(index, 6) == ((), 0.0)  # type: ignore[arg-type]


def test_matches_at_other_thresholds_are_those_of_the_report(client: Any, run: audit.RunTables) -> None:
    hits = audit.reference_hits(run, THRESHOLDS).to_pylist()
    held = client.get("/api/run").json()["references"]
    assert [(r["name"], r["images"], r["dropped"], r["above"]) for r in held] == [
        (r["reference_set"], r["images"], r["dropped"], r["at"]) for r in hits
    ]
    assert held[0]["above"][0] == 6 and held[0]["above"][-1] == 0
    text = text_of(client, "/decontamination")
    assert "4,321" in text and "3,210" in text and "> 0.95" in text
    page = Page(client.get("/reference/evaluation").text)
    pairs = [a["href"] for a in page.all("a") if a.get("class") == "frame"]
    direct = {
        r["image_id"]: r["references"][0]["reference_id"] for r in rows_of_run(run, "duplicates") if r["references"]
    }
    assert pairs == [f"/image/{i}" for image in sorted(direct) for i in (image, direct[image])]


def rows_of_run(run: audit.RunTables, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for path in getattr(run, name) for row in pq.ParquetFile(path).read().to_pylist()]


def test_clusters_are_as_even_and_as_pure_as_the_report_says(
    client: Any, run: audit.RunTables, whole: SyntheticRun
) -> None:
    document = client.get("/api/run").json()
    wanted = audit.purity(run)
    assert document["levels"][0]["purity"] == wanted and wanted["purity"] == 1.0  # labels follow the clusters here
    assert 0.5 <= document["levels"][1]["purity"]["purity"] < 1.0
    for row in audit.balance(run).to_pylist():
        if row["of"] == "pool":
            even = document["evenness"][row["level"].removeprefix("cluster_")]["pool"]
            for name in ("clusters", "effective", "entropy", "gini"):
                assert even[name] == pytest.approx(row[name])
    labels = {r["image_id"]: r["label"] for r in rows_of(whole, "filter")}
    sizes = Counter(labels[r["image_id"]] for r in rows_of(whole, "cluster"))
    assert sizes["class-0"] != sizes["class-1"]
    text = text_of(client, "/clusters")
    assert "Where the seed sets draw" in text and "purity 1.00 (class-" in text
    one = client.get("/api/clusters/1/2").json()
    assert one["labels"] == [{"name": "class-2", "images": one["images"]}] and one["labelled"] == one["images"]
    above = client.get("/api/clusters/2/0").json()["labels"]
    assert [entry["name"] for entry in above] == sorted(["class-0", "class-1"], key=lambda n: -sizes[n])
    assert {entry["name"]: entry["images"] for entry in above} == {n: sizes[n] for n in ("class-0", "class-1")}
    assert client.get("/api/clusters/1/99").status_code == 404


def test_entropy_of_the_seed_sets_is_that_of_what_they_drew(client: Any, whole: SyntheticRun) -> None:
    leaf = {r["image_id"]: r["cluster_1"] for r in rows_of(whole, "cluster")}
    drawn: dict[int, dict[str, int]] = {}
    for image, seed_set in sorted({(image, seed_set) for image, seed_set, *_ in whole.retrievals}):
        counts = drawn.setdefault(leaf[image], {})
        counts[seed_set] = counts.get(seed_set, 0) + 1
    assert client.get("/api/run").json()["seed_entropy"] == seed_entropy(drawn, 4)


def test_places_on_the_map_are_those_of_the_notebook(client: Any, run: audit.RunTables) -> None:
    for level in (1, 2):
        wanted = {r["cluster"]: (r["x"], r["y"]) for r in audit.clusters(run, level).to_pylist()}
        for row in client.get(f"/api/clusters/{level}").json()["entries"]:
            assert (row["x"], row["y"]) == pytest.approx(wanted[row["cluster"]], abs=1e-5)
            assert row["parent"] == (row["cluster"] // 2 if level == 1 else None)
    page = Page(client.get("/clusters").text)
    marks = {a["href"] for a in page.all("a") if a.get("aria-label", "").startswith("cluster ")}
    assert marks == {f"/cluster/1/{c}" for c in range(4)}


def test_a_cluster_leads_up_and_down(client: Any, whole: SyntheticRun) -> None:
    leaves = Counter(r["cluster_1"] for r in rows_of(whole, "cluster") if r["cluster_2"] == 1)
    page = Page(client.get("/cluster/2/1").text)
    links = [a["href"] for a in page.all("a") if (a.get("href") or "").startswith("/cluster/1/")]
    assert links == [f"/cluster/1/{c}" for c, _ in sorted(leaves.items(), key=lambda item: (-item[1], item[0]))]
    listed = Page(client.get("/clusters?level=1&inside=1").text)
    assert [a["href"] for a in listed.all("a") if (a.get("href") or "").startswith("/cluster/1/")] == links
    assert "0 clusters" in text_of(client, "/clusters?level=1&inside=99")
    below = Page(client.get("/cluster/1/3").text)
    assert "/cluster/2/1" in [a["href"] for a in below.all("a")]
    assert text_of(client, "/cluster/1/3").count("Farthest from the centroid") == 0  # the list shows all of so few


def test_curves_of_a_seed_set_are_those_of_the_notebook(client: Any, run: audit.RunTables) -> None:
    wanted = [r for r in audit.similarity_by_rank(run).to_pylist() if r["seed_set"] == "flowers"]
    found = client.get("/api/seed-sets/flowers").json()["curves"]["sample"]
    assert [found[n] for n in ("rank", "low", "median", "high")] == [
        [r[n] for r in wanted] for n in ("rank", "low", "median", "high")
    ]
    assert client.get("/api/seed-sets/none").status_code == 404
    rows = {r["seed_set"]: r for r in client.get("/api/seed-sets").json()["entries"]}
    assert (rows["flowers"]["nominal"], rows["flowers"]["unique"], rows["flowers"]["colliding"]) == (20, 17, 3)
    text = text_of(client, "/retrieval?seed_set=flowers")
    assert "Nominal 20" in text and "Colliding 3" in text and "Similarity by rank" in text
    assert "Nominal 20 retrievals" in text_of(client, "/retrieval?seed_set=animals")  # counted: the stage says nothing
    assert "Cluster mode" in text_of(client, "/retrieval?seed_set=animals")
    assert "Clusters chosen, and why" in text_of(client, "/retrieval?seed_set=animals")


def test_overview_says_what_the_report_would_say(client: Any, whole: SyntheticRun) -> None:
    text = text_of(client, "/")
    assert "One component holds" in text and "sources state no licence" in text
    assert client.get("/api/card").status_code == 404 and "Data card" not in text
    lost = Counter((r["status"], r["source"]) for r in rows_of(whole, "filter"))
    assert f"{lost['dropped', 'pool:web']} solid colour" in text


def test_hidden_images_are_in_no_figure_that_names_images(whole: SyntheticRun, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "run"
    shutil.copytree(whole.run.root, root)
    client = client_of(root)
    nearest = client.get("/api/clusters/1/1/members?limit=1").json()["images"][0]["image_id"]
    mark = f'href="/api/images/{nearest}/thumbnail"'
    assert mark in client.get("/clusters").text  # in the map
    assert client.post("/api/decisions", json={**DROP, "target": str(nearest)}).status_code == 201
    assert mark not in client.get("/clusters").text
    assert client.post("/api/decisions", json={**DROP, "target": "3"}).status_code == 201
    for path in ("/component/2", "/duplicates", "/scores/similarity?value=0.5"):
        assert "/image/3" not in {a.get("href") for a in Page(client.get(path).text).all("a")}, path
    assert "The least similar pair" not in text_of(client, "/component/2")
    client.served.close()
