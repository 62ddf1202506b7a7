"""What the index finds, against the run's Parquet read whole."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.vectors import embeddings_table
from pipelines.run_directory import RunDirectory
from pipelines.server import building, vectors
from pipelines.server.columns import ColumnWriter
from pipelines.server.opened import Opened
from pipelines.server.vectors import Space
from tests.pipelines.synthetic_run import SyntheticRun, finish
from tests.server.conftest import client_of


def rows_of(made: SyntheticRun, stage: str) -> list[dict[str, Any]]:
    paths = made.run.stage(stage).part_paths()
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


@pytest.fixture(scope="module")
def index(client: Any) -> Opened:
    return client.served.index  # type: ignore[no-any-return]


def walked(index: Opened, filters: dict[str, Any], limit: int = 7) -> list[int]:
    """All pages of a list."""
    found: list[int] = []
    after = None
    while True:
        page = index.listed(filters, after, limit)
        assert len(page.images) <= limit
        found += [int(row["image_id"]) for row in page.images]
        after = page.after
        if after is None:
            return found


def test_every_image_is_there_with_what_all_stages_say(made: SyntheticRun, index: Opened) -> None:
    images = {row["image_id"]: row for row in rows_of(made, "filter")}
    duplicates = {row["image_id"]: row for row in rows_of(made, "dedup")}
    clusters = {row["image_id"]: row for row in rows_of(made, "cluster")}
    assert walked(index, {}) == sorted(images)
    for row in index.some(images):
        wanted = images[row["image_id"]]
        assert all(row[name] == wanted[name] for name in wanted)
        for other, names in (
            (duplicates, ("component_id", "kept")),
            (clusters, ("cluster_1", "cluster_2", "distance")),
        ):
            for name in names:
                assert row[name] == other.get(row["image_id"], {}).get(name)
        assert (row["weight"] is not None) == (row["image_id"] in made.in_mix)


def test_filters_agree_with_the_tables(made: SyntheticRun, index: Opened) -> None:
    images = rows_of(made, "filter")
    hosts = {row["image_id"]: (row["url"] or "").removeprefix("http://").split("/")[0] for row in images}
    reasons = {row["image_id"]: row["reason"] for row in rows_of(made, "dedup")}
    leaves = {row["image_id"]: row["cluster_1"] for row in rows_of(made, "cluster")}
    wanted = [
        ({"host": "host-1.example"}, lambda i: hosts[i["image_id"]] == "host-1.example"),
        ({"status": "failed"}, lambda i: i["status"] == "failed"),
        ({"error": "http_404"}, lambda i: (i["error"] or "").startswith("http_404")),
        (
            {"source": "seed:flowers", "label": "class-2"},
            lambda i: i["source"] == "seed:flowers" and i["label"] == "class-2",
        ),
        ({"outcome": "self"}, lambda i: reasons.get(i["image_id"]) == "self"),
        (
            {"host": "host-2.example", "status": "ok", "cluster_1": 3},
            lambda i: hosts[i["image_id"]] == "host-2.example" and leaves.get(i["image_id"]) == 3,
        ),
        ({"url": images[3]["url"]}, lambda i: i["url"] == images[3]["url"]),
        ({"words": "PICTURE 17"}, lambda i: (i["caption"] or "") == "picture 17"),
        ({"words": "no such words"}, lambda i: False),
        ({"words": "..."}, lambda i: False),
    ]
    for filters, holds in wanted:
        assert walked(index, filters) == sorted(i["image_id"] for i in images if holds(i)), filters


def test_hidden_images_are_in_no_list(made: SyntheticRun, index: Opened) -> None:
    hidden = np.array(sorted(made.usable)[::3], np.uint64)
    index.hide(hidden)
    try:
        everything = sorted(row["image_id"] for row in rows_of(made, "filter"))
        assert walked(index, {}, 5) == [i for i in everything if i not in set(hidden.tolist())]
        assert not set(walked(index, {"status": "ok"}, 3)) & set(hidden.tolist())
        assert index.image(int(hidden[0])) is None and index.is_dropped(int(hidden[0]))
        seeds = {seed for _, _, seed, _, _ in made.retrievals}
        drawn = {int(r["image_id"]) for seed in seeds for r in index.retrieved("seed", seed, 0, 50)[0]}
        assert not drawn & set(hidden.tolist())
    finally:
        index.hide(np.empty(0, np.uint64))


def test_hashes_find_their_images_alone(made: SyntheticRun, index: Opened) -> None:
    images = [row for row in rows_of(made, "filter") if row["sha256"]]
    for row in images[:5]:
        same = sorted(i["image_id"] for i in images if i["sha256"] == row["sha256"])
        assert [i["image_id"] for i in index.by_hash(row["sha256"].hex(), 50)] == same
        assert row["image_id"] in [i["image_id"] for i in index.by_hash(f"{row['pca_hash']:016x}", 50)]
    assert index.by_hash("0" * 64, 50) == [] and index.by_hash("not hexadecimal", 50) == []


def test_members_of_a_cluster_come_by_distance(made: SyntheticRun, index: Opened) -> None:
    members = sorted((r["distance"], r["image_id"]) for r in rows_of(made, "cluster") if r["cluster_1"] == 2)
    found = [index.ranked("near", 2, start, 4).images for start in range(0, len(members), 4)]
    assert [row["image_id"] for page in found for row in page] == [image for _, image in members]
    assert index.ranked("near", 2, 0, 3, backwards=True).images[0]["distance"] == members[-1][0]


def test_scores_are_listed_from_a_value_both_ways_and_counted(made: SyntheticRun, index: Opened) -> None:
    scores = sorted(row["contrast"] for row in rows_of(made, "filter") if row["contrast"] is not None)
    up = [row["score"] for row in index.scored("contrast", 30.0, None, 500).images]
    down = [row["score"] for row in index.scored("contrast", 30.0, None, 500, backwards=True).images]
    assert up == [s for s in scores if s >= 30.0] and down == [s for s in scores[::-1] if s < 30.0]
    edges = np.linspace(10, 60, 11)
    wanted = np.histogram(np.clip(scores, 10, 60), edges)[0]
    assert index.histogram("contrast", edges).tolist() == wanted.tolist() and wanted.sum() == len(scores)


def test_lists_say_how_large_groups_are(made: SyntheticRun, index: Opened) -> None:
    sizes: dict[int, int] = {}
    for row in rows_of(made, "dedup"):
        sizes[row["component_id"]] = sizes.get(row["component_id"], 0) + 1
    several = {component: size for component, size in sizes.items() if size > 1}
    assert {r["component_id"]: r["images"] for r in index.rows("components", 0, 1000)} == several
    assert {r["host"]: r["images"] for r in index.rows("hosts", 0, 100)} == {f"host-{i}.example": 20 for i in range(3)}
    assert sum(r["images"] for r in index.rows("clusters_1", 0, 100)) == len(rows_of(made, "cluster"))
    drawn = {r["seed_set"]: r["nominal"] for r in index.document["seed_sets"]}
    assert sum(drawn.values()) == len(made.retrievals)


def test_a_retry_replaces_the_row_it_tried_again(tmp_path: Path, made: SyntheticRun) -> None:
    root = tmp_path / "run"
    shutil.copytree(made.run.root, root)
    run = RunDirectory(str(root))
    before = rows_of(made, "filter")
    failed = next(row for row in before if row["status"] == "failed")
    mended = pa.Table.from_pylist(
        [failed | {"status": "ok", "error": None}], schema=pq.read_schema(made.run.stage("filter").part_paths()[0])
    )
    finish(run, "filter", {"part-000-000000-r1": mended})
    index = Opened(building.build(run, str(tmp_path / "index")))
    row = index.image(failed["image_id"])
    assert row is not None and row["status"] == "ok" and len(index.ids) == len(before)


def test_an_index_of_a_former_state_is_made_again_and_the_old_one_goes(tmp_path: Path, made: SyntheticRun) -> None:
    root = tmp_path / "run"
    shutil.copytree(made.run.root, root)
    run = RunDirectory(str(root))
    folder = building.index_root(run, None)
    first = building.find(run, folder)
    assert first is not None
    finish(run, "mix", {"part-000000": pq.ParquetFile(made.run.stage("mix").part_paths()[0]).read().slice(0, 2)})
    assert building.find(run, folder) is None
    client = client_of(root)
    assert client.get("/api/images?brought=balance").status_code == 200
    second = building.find(run, folder)
    assert second is not None and second != first and not Path(first).exists()
    assert sum(s["chosen"] for s in client.get("/api/run").json()["steps"]) == 2
    client.served.close()


def space_of(folder: Path, stored: np.ndarray) -> tuple[Space, dict[str, Any]]:
    """An index of these vectors alone; image i has the id 10 * i."""
    ids = np.arange(len(stored), dtype=np.uint64) * 10
    writer = ColumnWriter(str(folder / "ids"), np.uint64, ordered=True)
    writer.append(ids)
    writer.close()
    pq.write_table(embeddings_table(ids, stored), folder / "part.parquet")
    made = vectors.build([str(folder / "part.parquet")], str(folder / "ids"), str(folder / "vectors" / "space"))
    assert made is not None
    return Space(str(folder / "vectors" / "space")), made


def test_similar_images_are_those_of_exact_search_when_all_cells_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    stored = random.normal(size=(600, 24))
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    space, made = space_of(tmp_path, stored)
    found = total = 0
    for row in range(0, 600, 50):
        exact = np.argsort(-(stored @ stored[row]), kind="stable")[:10]
        rows, cosines = space.search(stored[row].astype(np.float32), 10, probes=made["cells"])
        assert rows[0] == row and abs(cosines[0] - 1) < 0.01 and (np.diff(cosines) <= 0).all()
        found += len(set(exact) & set(rows.tolist()))
        total += 10
    assert found / total > 0.95  # one byte per dimension may turn the order of nearly equal ones
    assert np.abs(space.vector(7) - stored[7]).max() < 0.01  # type: ignore[operator]


def test_measured_recall_is_that_of_the_cells_that_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    centres = random.normal(size=(30, 32))
    stored = np.repeat(centres, 200, axis=0) + 0.6 * random.normal(size=(6000, 32))
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    space, made = space_of(tmp_path, stored)
    assert made["cells"] > 1 and made["probes"] <= made["cells"]
    hits = total = 0
    for row in range(0, 6000, 60):
        exact = np.argsort(-(stored @ stored[row]))[1:11]
        rows, _ = space.search(stored[row].astype(np.float32), 11)
        hits += len(set(exact) & set(rows.tolist()))
        total += 10
    assert abs(hits / total - made["recall"]) < 0.05 and made["recall"] > 0.85


def test_long_vectors_are_rotated_to_fewer_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    stored = random.normal(size=(700, 20)) @ random.normal(size=(20, 600))
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    space, made = space_of(tmp_path, stored)
    assert made["bytes_per_vector"] == vectors.CODED < made["dimension"] == 600
    rows, _ = space.search(stored[5].astype(np.float32), 5, probes=made["cells"])
    assert rows[0] == 5 and len(set(np.argsort(-(stored @ stored[5]))[:5]) & set(rows.tolist())) >= 4
