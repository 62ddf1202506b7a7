"""Two runs side by side, against sets in memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation.schemas import MANIFEST
from pipelines import decisions
from pipelines.decisions import Decision
from pipelines.run_directory import RunDirectory
from pipelines.server.comparing import Comparison
from tests.pipelines.synthetic_run import SyntheticRun, finish
from tests.server.test_index import rows_of


def with_manifest(root: str, made: SyntheticRun, leave_out: set[int], new_ids: bool = False) -> RunDirectory:
    """A manifest of the mix without some images, as the stage writes it."""
    run = RunDirectory(root)
    mix = {row["image_id"]: row for row in rows_of(made, "mix")}
    clusters = {row["image_id"]: row for row in rows_of(made, "cluster")}
    rows = []
    for row in rows_of(made, "filter"):
        number = row["image_id"]
        if number not in mix or number in leave_out:
            continue
        given = {name: row.get(name) for name in MANIFEST.names} | {"sources": mix[number]["sources"], "weight": 1.0}
        leaf = clusters.get(number)
        given |= {"retrieved_by": [], "clusters": [leaf["cluster_1"], leaf["cluster_2"]] if leaf else []}
        if new_ids:
            given["image_id"] = number + (7 << 40)
        rows.append(given)
    finish(run, "manifest", {"part-000000": pa.Table.from_pylist(rows, schema=MANIFEST)})
    return run


@pytest.fixture
def two(copied: Any, made: SyntheticRun) -> tuple[Any, Any]:
    """(client of a run compared with another, ids that only the first or the other has)."""
    other = copied("other")
    entered, left = set(made.in_mix[2:5]), set(made.in_mix[7:9])
    with_manifest(other.served.run.root, made, leave_out=entered)
    other.served.close()
    client = copied("run", compare=other.served.run.root)
    with_manifest(client.served.run.root, made, leave_out=left)
    return client, (entered, left)


def test_what_entered_and_left_is_told_by_source_and_cluster(two: Any, made: SyntheticRun) -> None:
    client, (entered, left) = two
    document = client.get("/api/comparison").json()
    assert (document["entered"], document["left"]) == (3, 2) and document["stayed"] == len(made.in_mix) - 5
    sources = {row["image_id"]: row["sources"] for row in rows_of(made, "mix")}
    leaves = {row["image_id"]: row["cluster_1"] for row in rows_of(made, "cluster")}
    for side, ids in (("entered", entered), ("left", left)):
        rows = client.get(f"/api/comparison/{side}").json()
        assert {row["image_id"] for row in rows["entries"]} == ids and rows["total"] == len(ids)
        counted = Counter(source for image in ids for source in sources[image])
        assert {e["name"]: e["images"] for e in document[f"{side}_by_source"]} == counted
        by_cluster = Counter(leaves[image] for image in ids if image in leaves)
        assert {e["name"]: e["images"] for e in document[f"{side}_by_cluster"]} == by_cluster
        assert client.get(f"/compare/{side}").status_code == 200
    assert "3 entered" in client.get("/compare").text
    image = min(left)
    assert client.get(f"/compare/left/{image}/thumbnail").headers["content-type"] == "image/webp"
    assert client.get(f"/compare/left/{max(made.in_mix)}/thumbnail").status_code == 404
    client.served.close()


def test_a_decision_makes_an_image_leave(two: Any) -> None:
    client, (entered, _) = two
    assert client.get("/api/comparison").json()["entered"] == 3
    answer = client.post("/api/decisions", json={"action": "drop", "scope": "image", "target": str(min(entered))})
    assert answer.status_code == 201 and client.get("/api/comparison").json()["entered"] == 2
    client.served.close()


def test_runs_of_other_sources_are_compared_by_bytes(copied: Any, made: SyntheticRun, tmp_path: Path) -> None:
    one, two = copied("one"), copied("two")
    run = with_manifest(one.served.run.root, made, leave_out=set(made.in_mix[:2]))
    other = with_manifest(two.served.run.root, made, leave_out=set(), new_ids=True)
    sources = Path(other.root) / "sources.json"
    sources.write_text(sources.read_text().replace('"d0"', '"another"'))
    document = Comparison.make(run, other, str(tmp_path / "index")).document
    assert document["by"].startswith("sha256") and (document["entered"], document["left"]) == (0, 2)
    one.served.close(), two.served.close()


def test_a_run_without_a_manifest_is_one_sentence(copied: Any, made: SyntheticRun) -> None:
    client = copied("run", compare=made.run.root)
    assert client.get("/api/comparison").status_code == 409 and "no manifest" in client.get("/compare").text
    decisions.write(
        client.served.run.root, Decision("note", "host", "h", "a", "n"), pa.array([], pa.uint64()).to_numpy()
    )
    client.served.close()


def test_no_other_run_is_one_sentence(client: Any) -> None:
    assert client.get("/compare").status_code == 409 and "--compare" in client.get("/api/comparison").json()["detail"]
