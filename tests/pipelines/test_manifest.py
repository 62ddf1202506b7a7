"""The manifest of a run whose contents are known."""

import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from curation.schemas import MANIFEST
from pipelines.context import Context
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest
from tests.pipelines.synthetic_run import SyntheticRun, build


def make(made: SyntheticRun, **more: object) -> tuple[list[dict], dict]:
    manifest.execute(Context(run=made.run, **more), manifest.ManifestConfig())
    generation = made.run.stage("manifest").generations()[-1]
    rows = [row for path in generation.part_paths for row in pq.read_table(path).to_pylist()]
    return rows, json.loads(Path(generation.file("manifest.json")).read_bytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[SyntheticRun, list[dict], dict]:
    made = build(tmp_path_factory.mktemp("run"))
    patch = pytest.MonkeyPatch()
    patch.setattr(manifest, "ROWS_PER_RANGE", 16)
    rows, card = make(made)
    patch.undo()
    return made, rows, card


def test_one_row_per_image_of_the_mix_in_id_order(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    made, rows, card = whole
    assert [row["image_id"] for row in rows] == made.in_mix
    assert len(card["manifest"]["parts"]) > 2
    assert card["manifest"]["rows"] == len(rows)


def test_rows_hold_what_the_stages_found(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    made, rows, _ = whole
    filtered = {r["image_id"]: r for p in made.run.stage("filter").part_paths() for r in pq.read_table(p).to_pylist()}
    for row in rows:
        image = filtered[row["image_id"]]
        assert all(row[name] == image[name] for name in MANIFEST.names if name in image and name != "faces")
        wanted = [
            {"seed_set": s, "seed_id": seed, "mode": "sample", "rank": rank, "similarity": pytest.approx(similarity)}
            for i, s, seed, rank, similarity in sorted(made.retrievals, key=lambda r: (-r[4], r[1], r[2]))
            if i == row["image_id"]
        ]
        assert row["retrieved_by"] == wanted
        pool = row["image_id"] >> 40 == 0
        assert row["clusters"] == ([row["image_id"] % 4, row["image_id"] % 4 // 2] if pool else None)
        assert row["component_id"] == (row["image_id"] if pool else None)


def test_locations_are_relative_to_the_run(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    made, rows, _ = whole
    from curation.locations import read_ranges

    places = [(row["shard"], row["offset"], row["length"]) for row in rows]
    assert all(not shard.startswith("/") for shard, _, _ in places)
    assert all(isinstance(data, bytes) and data[:2] == b"\xff\xd8" for data in read_ranges(made.run.root, places))


def test_card_counts_what_each_seed_set_brought(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    made, _, card = whole
    for entry in card["seed_sets"]:
        mine = [r[0] for r in made.retrievals if r[1] == entry["seed_set"]]
        others = {r[0] for r in made.retrievals if r[1] != entry["seed_set"]}
        assert entry["nominal"] == len(mine)
        assert entry["unique"] == len(set(mine))
        assert entry["colliding"] == sum(mine.count(image) > 1 for image in set(mine))
        assert entry["shared"] == len(set(mine) & others)
        assert entry["planned"] == 5 * 4 and entry["retrieve"] == {"mode": "sample", "seeds": 5, "neighbours": 4}
    assert card["exempt_seed_sets"] == ["animals"]
    assert card["licences"]["seed:flowers"] == "CC0-1.0"
    assert card["models"]["mobilenet_v2"]["name"] == "mobilenet_v2"
    assert card["decontamination"]["recall"]["recall"] == 0.995


def test_funnel_of_the_card_adds_up(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    _, rows, card = whole
    steps = card["counts"]["funnel"]["pool"]
    assert steps[0]["step"] == "listed" and steps[0]["images"] == 40
    for before, step in itertools.pairwise(steps):
        assert before["images"] - sum(entry["images"] for entry in step["lost"]) == step["images"]
    assert steps[-1]["images"] == sum(row["image_id"] >> 40 == 0 for row in rows)
    lost = {entry["reason"]: entry["images"] for step in steps for entry in step["lost"]}
    assert lost["failed: http_404"] == 4 and lost["solid colour"] == 4
    assert lost["near copy of another"] == 4 and lost["evaluation match"] == 8


def test_card_names_no_place_or_time(whole: tuple[SyntheticRun, list[dict], dict]) -> None:
    made, _, card = whole
    text = json.dumps(card)
    assert made.run.root not in text and "/somewhere" not in text
    assert "seconds" not in text and "finished" not in text and 'host"' not in text


def test_equal_runs_in_other_places_give_equal_bytes(tmp_path: Path, ray_session: None) -> None:
    found = []
    for name in ("a", "b"):
        made = build(tmp_path / name, pool=20)
        make(made)
        generation = made.run.stage("manifest").generations()[-1]
        found.append([Path(p).read_bytes() for p in [*generation.part_paths, generation.file("manifest.json")]])
    assert found[0] == found[1]


def test_a_second_call_does_nothing_and_new_inputs_make_a_new_generation(tmp_path: Path, ray_session: None) -> None:
    made = build(tmp_path, pool=20)
    context = Context(run=made.run)
    assert not manifest.execute(context, manifest.ManifestConfig()).skipped
    assert manifest.execute(context, manifest.ManifestConfig()).skipped
    build_mix_again(made)
    outcome = manifest.execute(Context(run=made.run), manifest.ManifestConfig())
    assert not outcome.skipped and outcome.rows == 1


def build_mix_again(made: SyntheticRun) -> None:
    import pyarrow as pa

    from curation.schemas import MIX
    from tests.pipelines.synthetic_run import finish

    row = {"image_id": made.in_mix[0], "sources": ["balance"], "nominal": 1, "weight": 1.0}
    finish(made.run, "mix", {"part-000000": pa.Table.from_pylist([row], schema=MIX)}, ["retrieve"])


def test_optional_stages_may_be_absent(tmp_path: Path, ray_session: None) -> None:
    made = build(tmp_path, pool=20, optional=False)
    rows, card = make(made)
    assert [row["image_id"] for row in rows] == made.in_mix
    assert all(row["clusters"] is None and row["retrieved_by"] == [] for row in rows)
    assert card["counts"]["dedup"] is None and card["decontamination"]["reference_sets"] == []


def test_without_a_mix_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished mix"):
        manifest.execute(Context(run=RunDirectory(str(tmp_path))), manifest.ManifestConfig())
