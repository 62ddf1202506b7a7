"""Decisions from the scores: who goes, for what reason, and whose duplicate it is."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.errors import UserError
from curation.schemas import IMAGES, image_id
from embeddings import hashes
from embeddings.models import registry
from pipelines import duplicate_search, shuffle
from pipelines.context import Context, Outcome
from pipelines.run_directory import RunDirectory
from pipelines.stages import filter as filter_stage
from pipelines.stages import score
from pipelines.stages.filter import FilterConfig
from tests.pipelines.image_runs import bring, encoded, pass_in_this_process, picture

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.skipif(not registry.offline_models(), reason="no copy model is installed"),
]
MODEL = "sscd_distilled" if "sscd_distilled" in registry.offline_models() else "mobilenet_v2"


@pytest.fixture(autouse=True)
def scored_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about decisions; test_score.py runs the pass over the pixels on Ray."""
    monkeypatch.setattr(score, "image_pass", pass_in_this_process)


def run_filter(root: Path, rebuild: bool = False, **options: Any) -> Outcome:
    config = FilterConfig(**{"copy_model": MODEL, "nsfw": False, "faces": False, **options})
    return filter_stage.execute(Context(RunDirectory(str(root)), rebuild=rebuild), config)


def decisions(root: Path) -> dict[int, tuple[str, str | None, int | None]]:
    found = {}
    for path in RunDirectory(str(root)).stage("filter").part_paths():
        table = pq.read_table(path)
        assert table.schema.names == IMAGES.names
        for row in table.to_pylist():
            found[row["image_id"]] = (row["status"], row["error"], row["duplicate_of"])
    return found


def contents(root: Path, stage: str = "filter") -> dict[str, bytes]:
    files = (path for path in (root / stage).rglob("*") if path.is_file() and "_timings" not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def as_bmp(data: bytes) -> bytes:
    """Other bytes, the same pixels."""
    return encoded(Image.open(io.BytesIO(data)), "BMP")


def solid() -> bytes:
    return encoded(Image.new("RGB", (90, 90), (200, 10, 10)), "PNG")


def test_every_kind_of_drop_keeps_its_row_and_its_reason(tmp_path: Path) -> None:
    same = picture(0)
    pool = [same, picture(1), same, as_bmp(same), picture(2, 60, 90), picture(3, 300, 80), solid(), b"", as_bmp(same)]
    bring(tmp_path, "pool:web", pool, rows_per_part=3)
    bring(tmp_path, "seed:animals", [same, solid()])
    bring(tmp_path, "seed:exempt", [solid()], exempt=True)
    bring(tmp_path, "reference:eval", [solid(), same])
    outcome = run_filter(tmp_path)
    assert decisions(tmp_path) == {
        0: ("ok", None, None),
        1: ("ok", None, None),
        2: ("dropped", "duplicate_bytes", 0),
        3: ("dropped", "duplicate_pixels", 0),
        4: ("dropped", "too_small", None),
        5: ("dropped", "aspect_ratio", None),
        6: ("dropped", "solid_colour", None),
        7: ("failed", "decode: empty", None),
        8: ("dropped", "duplicate_bytes", 0),
        image_id(1, 0): ("ok", None, None),
        image_id(1, 1): ("dropped", "solid_colour", None),
        image_id(2, 0): ("ok", None, None),
        image_id(3, 0): ("ok", None, None),
        image_id(3, 1): ("ok", None, None),
    }
    assert outcome.summary == {
        "rows": 14, "ok": 6, "dropped": 7, "dropped: aspect_ratio": 1, "dropped: duplicate_bytes": 2,
        "dropped: duplicate_pixels": 1, "dropped: solid_colour": 2, "dropped: too_small": 1, "failed": 1,
        "ok: pool": 2, "ok: reference": 2, "ok: seed": 2,
    }  # fmt: skip
    assert not (tmp_path / "filter/gen-0000" / filter_stage.SCRATCH).exists()


def test_another_threshold_repeats_the_decision_alone(tmp_path: Path) -> None:
    bring(tmp_path, "pool:web", [picture(0), picture(1, 60, 90)])
    run_filter(tmp_path)
    assert run_filter(tmp_path).skipped
    scored = contents(tmp_path, "score")
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in scored}
    with pytest.raises(UserError, match=r"options\.min_side: was 64, now 32.*--rebuild"):
        run_filter(tmp_path, min_side=32)
    assert not run_filter(tmp_path, min_side=32, rebuild=True).skipped
    assert [status for status, _, _ in decisions(tmp_path).values()] == ["ok", "ok"]
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in scored} == times
    with pytest.raises(UserError, match=r"options\.face_side: was 480, now 512"):
        run_filter(tmp_path, min_side=32, face_side=512)
    run_filter(tmp_path, min_side=32, face_side=512, rebuild=True)
    assert contents(tmp_path, "score") != scored


def test_a_copy_of_an_image_that_earlier_generations_kept_goes(tmp_path: Path) -> None:
    bring(tmp_path, "pool:late", [None, None, picture(5)])
    bring(tmp_path, "pool:web", [picture(0), picture(1)])
    run_filter(tmp_path)
    before = contents(tmp_path)
    bring(
        tmp_path, "pool:late", [as_bmp(picture(0)), picture(7)], suffix="-r1"
    )  # a retry: ids smaller than the original's
    bring(tmp_path, "pool:more", [picture(1), picture(7)])
    run_filter(tmp_path)
    found = decisions(tmp_path)
    assert found[0] == ("dropped", "duplicate_pixels", image_id(1, 0))
    assert found[1] == ("ok", None, None)
    assert found[image_id(2, 0)] == ("dropped", "duplicate_bytes", image_id(1, 1))
    assert found[image_id(2, 1)] == ("dropped", "duplicate_bytes", 1)
    after = contents(tmp_path)
    assert all(after[path] == data for path, data in before.items() if path.endswith(".parquet"))


def test_hash_copies_go_and_interrupted_or_in_many_buckets_the_bytes_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "LEAST_IMAGES", hashes.COMPONENTS)
    originals = [picture(n, 64, 64) for n in range(hashes.LEAST_IMAGES)]
    smaller = [
        encoded(Image.open(io.BytesIO(data)).resize((80, 80), Image.Resampling.BICUBIC), "PNG")
        for data in originals[:12]
    ]
    root = tmp_path / "whole"
    bring(root, "pool:web", [*originals, *smaller], rows_per_part=20)
    run_filter(root, pca_hash_distance=6)
    drops = {image: of for image, (_, error, of) in decisions(root).items() if error == "duplicate_pca_hash"}
    table = pq.read_table(sorted((root / "score/gen-0000").glob("*.parquet")))
    codes = dict(zip(table["image_id"].to_pylist(), table["pca_hash"].to_pylist(), strict=True))
    stays: list[int] = []
    expected = {}
    for image in sorted(codes):
        near = [kept for kept in stays if (codes[kept] ^ codes[image]).bit_count() <= 6]
        if near:
            expected[image] = near[0]
        else:
            stays.append(image)
    assert drops == expected and len([image for image in drops if image >= len(originals)]) >= 10
    bytes_of = contents(root)

    shutil.copytree(root, tmp_path / "cut")
    document = json.loads((tmp_path / "cut/filter/_stage.json").read_text())
    document["generations"][0] |= {"complete": False, "parts": []}
    (tmp_path / "cut/filter/_stage.json").write_text(json.dumps(document))
    (tmp_path / "cut/filter/gen-0000/part-000-000002.parquet").unlink()
    monkeypatch.setattr(shuffle, "bucket_count", lambda rows: 8)
    monkeypatch.setattr(duplicate_search, "PARTS_PER_TASK", 1)
    run_filter(tmp_path / "cut", pca_hash_distance=6)
    assert contents(tmp_path / "cut") == bytes_of

    run_filter(root, pca_hash_distance=-1, rebuild=True)
    assert all(error != "duplicate_pca_hash" for _, error, _ in decisions(root).values())


def test_an_empty_run_has_nothing_to_filter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in this run yet"):
        run_filter(tmp_path)


def test_options_belong_to_the_decision_or_to_the_pass_and_to_one_only() -> None:
    config = FilterConfig()
    decide, compute = set(config.decision_options()), set(config.scoring().fingerprint_options())
    assert decide == {"min_side", "aspect_ratio", "solid_colour", "nsfw_threshold", "pca_hash_distance"}
    assert not decide & compute and "erase_originals" not in compute


@pytest.mark.parametrize(
    ("field", "value"), [("nsfw_threshold", 1.6), ("min_side", 0), ("pca_hash_distance", 16), ("aspect_ratio", np.nan)]
)
def test_a_threshold_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        FilterConfig(**{field: value})
