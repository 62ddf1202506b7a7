"""New images through `curate add`: the older tables keep every byte, and what is new is in the next generations."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.pictures import folder, picture, write_config


def curate(*arguments: str | Path) -> dict[str, object]:
    command = [str(Path(sys.executable).parent / "curate"), *map(str, arguments), "--workers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_new_images_enter_as_a_generation_and_older_tables_keep_every_byte(tmp_path: Path) -> None:
    run = tmp_path / "run"
    curate("run", write_config(tmp_path, run))
    stages = ("import", "score", "filter", "dedup-search", "dedup", "embed/mobilenet_v2", "cluster")
    before = {p: p.read_bytes() for stage in stages for p in (run / stage / "gen-0000").rglob("*.parquet")}
    assert before
    folder(tmp_path / "new", 8, family=1, first=900)
    for number in (0, 4):
        picture(number, family=number % 2).resize((120, 90)).save(tmp_path / "new" / f"copy-{number}.jpg", quality=88)
    added = curate("add", run, "--folder", tmp_path / "new", "--as", "pool:new")
    assert added["sources"] == ["pool:new"]
    images = added["images"]
    assert isinstance(images, dict)
    assert (images["fetched"], images["dedup_self"], images["assigned_to_clusters"]) == (10, 2, images["dedup_kept"])
    assert all(p.read_bytes() == data for p, data in before.items())
    newest = sorted((run / "manifest").glob("gen-*"))[-1]
    manifest = pq.read_table(next(newest.glob("part-*.parquet")))
    assert newest.name == "gen-0001" and any(i >> 40 == 4 for i in manifest["image_id"].to_pylist())
    again = curate("add", run, "--folder", tmp_path / "new", "--as", "pool:new")
    assert all(outcome["skipped"] for outcome in again["outcomes"])  # type: ignore[attr-defined]
    assert again["manifest"] == added["manifest"]
