"""Decisions: stored as one file a batch, resolved to images, applied by the server at once and by every reader."""

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import hidden
from curation.errors import UserError
from curation.schemas import DECISIONS
from pipelines import decisions
from pipelines.decisions import Decision
from pipelines.description import current_parts
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest
from tests.browser.report_runs import Here
from tests.pipelines.synthetic_run import SyntheticRun
from tests.server.test_index import rows_of


@pytest.fixture
def client(copied: Any) -> Any:
    found = copied()
    yield found
    found.served.close()


def decide(client: Any, action: str, scope: str, target: Any, **more: Any) -> Any:
    asked = {"action": action, "scope": scope, "target": str(target), **more}
    answer = client.post("/api/decisions", json=asked)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_every_scope_covers_the_images_that_the_tables_name(client: Any, made: SyntheticRun) -> None:
    hosts = [row["image_id"] for row in rows_of(made, "filter") if (row["url"] or "").startswith("http://host-1.")]
    clusters = [row["image_id"] for row in rows_of(made, "cluster") if row["cluster_2"] == 1]
    component = [row["image_id"] for row in rows_of(made, "dedup") if row["component_id"] == 2]
    for scope, target, covered in (
        ("image", 0, [0]),
        ("component", 2, component),
        ("component", 0, [0]),
        ("cluster", "2:1", clusters),
        ("host", "HOST-1.example", hosts),
    ):
        made_at = datetime.now(UTC)
        told = decide(client, "drop", scope, target, note="because")
        table = pq.ParquetFile(f"{client.served.run.root}/decisions/{told['batch']}").read()
        assert table.schema.equals(DECISIONS, check_metadata=False)
        assert table["image_id"].to_pylist() == sorted(covered) and told["images"] == len(covered)
        first = table.to_pylist()[0]
        assert (first["author"], first["scope"], first["note"]) == ("tester", scope, "because")
        assert abs((first["made_at"] - made_at).total_seconds()) < 60


def test_what_is_dropped_is_gone_at_once_and_comes_back_when_kept(client: Any) -> None:
    assert client.get("/api/images/4").status_code == 200
    assert decide(client, "drop", "image", 4)["hidden"] == 1
    for path in (
        "/api/images/4",
        "/api/images/4/bytes",
        "/api/images/4/thumbnail",
        "/image/4",
        "/api/images/4/similar",
    ):
        assert client.get(path).status_code == 410, path
    assert 4 not in [row["image_id"] for row in client.get("/api/images").json()["images"]]
    assert 4 not in [row["image_id"] for row in client.get("/api/images/0/similar?count=50").json()["images"]]
    assert 'value="keep"' in client.get("/image/4").text
    decide(client, "keep", "image", 4)
    assert client.get("/api/images/4").status_code == 200


def test_last_decision_counts_whatever_its_scope(client: Any) -> None:
    decide(client, "drop", "host", "host-1.example")
    decide(client, "keep", "image", 4)  # one of that host
    assert client.get("/api/images/4").status_code == 200 and client.get("/api/images/1").status_code == 410
    decide(client, "note", "image", 4, note="only a remark")
    decide(client, "note", "host", "host-1.example", note="a remark on all")
    assert client.get("/api/images/4").status_code == 200 and client.get("/api/images/1").status_code == 410


def manifest_rows(run: RunDirectory) -> dict[int, dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in current_parts(run, "manifest")]
    return {row["image_id"]: row for table in tables for row in table.to_pylist()}


def decide_on_what_is_in_the_mix(client: Any, made: SyntheticRun) -> set[int]:
    """One image, one cluster of which an image is kept again, and one host: the images that shall go."""
    image, kept = (i for i in made.in_mix if i >> 40 == 0 and i in (10, 14))
    cluster = {row["image_id"] for row in rows_of(made, "cluster") if row["cluster_1"] == 2}
    host = {row["image_id"] for row in rows_of(made, "filter") if (row["url"] or "").startswith("http://host-0.")}
    decide(client, "drop", "image", image)
    decide(client, "drop", "host", "host-0.example")
    decide(client, "drop", "cluster", "1:2")
    decide(client, "keep", "image", kept)
    decide(client, "note", "image", kept, note="a fine one")
    gone = ({image} | cluster | host) - {kept}
    assert kept in cluster and 0 < len(gone & set(made.in_mix)) < len(made.in_mix)
    return gone


def check_manifest(run: RunDirectory, before: dict[int, Any], made: SyntheticRun, gone: set[int]) -> None:
    after = manifest_rows(run)
    assert sorted(before) == made.in_mix
    assert after == {image: row for image, row in before.items() if image not in gone}
    card = json.loads(Path(run.stage("manifest").generations()[-1].file("manifest.json")).read_text())
    assert card["manifest"]["rows"] == len(after)


def test_manifest_leaves_out_what_was_dropped_through_the_api(client: Any, made: SyntheticRun) -> None:
    run = client.served.run
    manifest.execute(Here(run=run), manifest.ManifestConfig())
    before = manifest_rows(run)
    gone = decide_on_what_is_in_the_mix(client, made)
    manifest.execute(Here(run=run), manifest.ManifestConfig())
    check_manifest(run, before, made, gone)


@pytest.mark.long
def test_curate_manifest_applies_what_was_decided_through_the_api(client: Any, made: SyntheticRun) -> None:
    run = client.served.run
    command = [sys.executable, "-m", "cli.main", "manifest", run.root]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    before = manifest_rows(run)
    gone = decide_on_what_is_in_the_mix(client, made)
    told = subprocess.run(command, check=True, capture_output=True, timeout=300, text=True)
    assert "Traceback" not in told.stderr
    check_manifest(run, before, made, gone)


def test_another_process_decides_and_this_server_follows(client: Any) -> None:
    decisions.write(client.served.run.root, Decision("drop", "image", "6", "other"), np.array([6], np.uint64))
    client.served._looked = 0.0  # as if the moment between two looks had gone by
    assert client.get("/api/images/6").status_code == 410


def test_forgotten_images_cannot_be_kept(client: Any) -> None:
    import pyarrow as pa

    folder = Path(client.served.run.root) / "forgotten"
    folder.mkdir()
    pq.write_table(pa.table({"image_id": pa.array([4, 10], pa.uint64())}), folder / "list.parquet")
    client.served._looked = 0.0
    assert client.get("/api/images/4").status_code == 410
    assert client.post("/api/decisions", json={"action": "keep", "scope": "image", "target": "4"}).status_code == 422
    assert client.get("/api/images/4").status_code == 410


def test_decisions_made_at_once_are_all_stored(client: Any) -> None:
    threads = [
        threading.Thread(target=decide, args=(client, "drop", "image", image)) for image in (0, 1, 4, 10, 11, 12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hidden.dropped_ids(client.served.run.root).tolist() == [0, 1, 4, 10, 11, 12]
    entries = client.get("/api/decisions").json()
    assert entries["total"] == 6 and {e["target"] for e in entries["entries"]} == {"0", "1", "4", "10", "11", "12"}


def test_form_of_the_page_decides_and_goes_back(client: Any) -> None:
    form = {
        "action": "drop",
        "scope": "cluster",
        "target": "1:2",
        "author": "Ana",
        "note": "watermarks",
        "back": "/clusters",
    }
    answer = client.post("/decide", data=form, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/clusters")
    text = client.get("/decisions").text
    assert "Ana" in text and "watermarks" in text and "cluster 1:2" in text
    for back in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"):
        answer = client.post("/decide", data={**form, "back": back}, follow_redirects=False)
        assert answer.headers["location"] == "/decisions"


@pytest.mark.parametrize(
    ("scope", "target"),
    [
        *(("image", target) for target in ("x", "-1", "9" * 30, "123456", "1" + "0" * 300)),
        *(("cluster", target) for target in ("1", "x:y", "1:99999")),
        ("host", "no.such.host"),
        ("component", "²"),
    ],
)
def test_a_decision_on_nothing_is_refused(client: Any, scope: str, target: str) -> None:
    answer = client.post("/api/decisions", json={"action": "drop", "scope": scope, "target": target, "author": "a"})
    assert answer.status_code == 422 and not (Path(client.served.run.root) / "decisions").exists()


def test_fields_that_are_wrong_are_refused(tmp_path: Path) -> None:
    one = np.array([1], np.uint64)
    for decision in (
        Decision("erase", "image", "1", "a"),
        Decision("drop", "world", "1", "a"),
        Decision("drop", "image", "1", " "),
        Decision("drop", "image", "1", "a" * 101),
        Decision("drop", "image", "1", "a", "n" * 2001),
        Decision("note", "image", "1", "a"),
    ):
        with pytest.raises(UserError):
            decisions.write(str(tmp_path), decision, one)
    with pytest.raises(UserError, match="no image"):
        decisions.write(str(tmp_path), Decision("drop", "image", "1", "a"), np.empty(0, np.uint64))


def test_a_damaged_batch_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    name = decisions.write(str(tmp_path), Decision("drop", "image", "1", "a\ud800"), np.array([1], np.uint64))
    (tmp_path / "decisions" / "00-torn.parquet").write_bytes(b"PAR1")
    found, total = decisions.listed(str(tmp_path))
    assert total == 2 and found[0]["batch"] == name and "not readable" in found[1]["error"]
