"""What a run hides is not trained on, packed or evaluated: by the index, at its making and at every start."""

import json
import logging
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.schemas import DECISIONS
from tests.training.data.manifests import picture, small, write_manifest
from training.data.batches import batches
from training.data.config import DataConfig
from training.data.index import open_index
from training.data.packing import PackConfig, pack
from training.data.sampling import members_of
from training.evaluation.labelled import read_labelled

IMAGES = 24


def run_of(root: str | Path) -> str:
    """A run with a finished manifest of 24 images, ids 100 to 123; labels and seed sets by parity."""
    labels = [f"class-{i % 2}" for i in range(IMAGES)]
    sources = [[f"seed:{'even' if i % 2 == 0 else 'odd'}"] for i in range(IMAGES)]
    folder = f"{root}/manifest/gen-0000"
    fs, inner = fsspec.core.url_to_fs(str(root))
    write_manifest(folder, [picture(i) for i in range(IMAGES)], label=labels, sources=sources)
    for shard in fs.glob(f"{inner}/manifest/gen-0000/*.tar"):
        fs.copy(shard, f"{inner}/{shard.rsplit('/', 1)[-1]}")
    parts = sorted(
        p.rsplit("/", 1)[-1].removesuffix(".parquet") for p in fs.glob(f"{inner}/manifest/gen-0000/*.parquet")
    )
    stage = {"generations": [{"generation": 0, "complete": True, "parts": [{"name": name} for name in parts]}]}
    fs.pipe_file(f"{inner}/manifest/_stage.json", json.dumps(stage).encode())
    return str(root)


def forget(run: str, *ids: int) -> None:
    fs, inner = fsspec.core.url_to_fs(run)
    fs.makedirs(f"{inner}/forgotten", exist_ok=True)
    number = len(fs.ls(f"{inner}/forgotten"))
    with fs.open(f"{inner}/forgotten/{number:04d}.parquet", "wb") as file:
        pq.write_table(pa.table({"image_id": pa.array(ids, pa.uint64())}), file)


@pytest.mark.parametrize("place", ["disk", "memory://hidden-run"])
def test_the_index_leaves_out_what_was_forgotten_or_dropped_even_if_it_was_made_before(
    place: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run" if place == "disk" else place)
    assert len(open_index(run, str(tmp_path / "index"))) == IMAGES
    forget(run, 101, 119)
    index = open_index(run, str(tmp_path / "index"))
    left = [i for i in range(100, 100 + IMAGES) if i not in (101, 119)]
    assert index.rows["image_id"].tolist() == left
    rows = [
        {"image_id": 103, "action": "drop", "scope": "image", "target": "103", "author": "a", "made_at": 1, "note": ""}
    ]
    fs, inner = fsspec.core.url_to_fs(run)
    fs.makedirs(f"{inner}/decisions", exist_ok=True)
    with fs.open(f"{inner}/decisions/0.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=DECISIONS), file)
    assert 103 not in open_index(run, str(tmp_path / "index")).rows["image_id"]
    part = f"{run}/manifest/gen-0000/part-000000.parquet"
    assert open_index(part, str(tmp_path / "index")).rows["image_id"].tolist() == [100, 102, *range(104, 110)]


def test_groups_and_labels_keep_to_the_rows_that_are_left(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    forget(run, 100, 107, 121)
    index = open_index(run, str(tmp_path / "index"))
    members = members_of(index, "seed_set", 1)
    for number, name in enumerate(members.names):
        rows = members.rows[members.starts[number] : members.starts[number + 1]]
        assert set(index.rows["image_id"][rows] % 2) == {0 if name == "even" else 1}, "rows of another group"
    labelled = read_labelled(run, index_folder=str(tmp_path / "index"))
    assert len(labelled) == IMAGES - 3
    np.testing.assert_array_equal(labelled.labels, labelled.image_ids % 2)


def test_a_pack_knows_its_run_and_the_run_its_packs(tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run"), str(tmp_path / "packed")
    pack(PackConfig(run, out, index_folder=str(tmp_path / "index")))
    assert json.loads((tmp_path / "run" / "packed.json").read_text()) == {"packed": [out]}
    assert len(open_index(out, str(tmp_path / "index"))) == IMAGES
    forget(run, 110)
    assert 110 not in open_index(out, str(tmp_path / "index")).rows["image_id"]


def test_a_training_says_what_it_leaves_out_and_when_its_order_may_be_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path / "run")
    config: DataConfig = small(run, tmp_path)
    options = {"seed": 0, "global_batch": 4, "group_size": 2, "patch_size": 14}
    with caplog.at_level(logging.INFO):
        batches(config, **options)  # type: ignore[arg-type]
        assert not caplog.messages
        forget(run, 104, 105)
        made = batches(config, **options)  # type: ignore[arg-type]
        seen = {int(i) for _ in range(12) for i in next(made).image_ids}
        assert not seen & {104, 105} and len(seen) > 15
        assert len(caplog.messages) == 1 and "2 images are hidden" in caplog.messages[0]
        batches(config, first_step=7, **options)  # type: ignore[arg-type]
        assert "from step 7 in the order of the 22 that are left" in caplog.messages[-1]
