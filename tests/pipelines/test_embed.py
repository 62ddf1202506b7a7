"""Embed: who gets a vector, that each model's vectors are its own, what happens to an unreadable image, resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import vectors
from curation.errors import UserError
from curation.schemas import DUPLICATES, IMAGES, image_id
from embeddings.decoding import DecodeLimits
from embeddings.models import registry
from pipelines.context import Context
from pipelines.events import Events
from pipelines.run_directory import RunDirectory
from pipelines.stages import embed
from pipelines.stages.embed import EmbedConfig, Part, PartEmbedder, Reading, prepare_part
from tests.embeddings.pictures import encoded, scene
from tests.pipelines.image_runs import pass_in_this_process

MODEL = "sscd_distilled"
SOURCES = ("pool:web", "seed:birds", "reference:test")


def images_of(run: Path, source: int, count: int) -> list[dict[str, Any]]:
    """Rows of IMAGES whose bytes lie one after the other in a shard of the run. The third image is no image."""
    files = [encoded(scene(100 * source + k, (90, 70)), "JPEG" if k % 2 else "PNG") for k in range(count)]
    files[2] = b"<html>not found</html>"
    shard = f"shards/{source:03d}.bin"
    (run / "shards").mkdir(parents=True, exist_ok=True)
    (run / shard).write_bytes(b"".join(files))
    offsets = np.cumsum([0, *(len(file) for file in files)])
    return [
        {
            "image_id": image_id(source, k),
            "source": SOURCES[source],
            "shard": shard,
            "offset": int(offsets[k]),
            "length": len(files[k]),
            "status": "dropped" if k == 4 else "ok",
        }
        for k in range(count)
    ]


def filtered(run: Path) -> Context:
    """A run whose filter stage holds one part per source, and whose dedup discards the pool's second image."""
    context = Context(RunDirectory(str(run)), events=Events(None))
    for stage in ("filter", "dedup"):
        generation = context.begin_rows(stage, 1, {}, inputs=[])
        assert generation is not None
        for source in range(3):
            rows = images_of(run, source, 6)
            if stage == "filter":
                table = pa.Table.from_pylist(rows, schema=IMAGES)
            elif source == 0:
                discarded = {1}
                decisions = [
                    {
                        "image_id": row["image_id"],
                        "component_id": row["image_id"],
                        "kept": k not in discarded,
                        "reason": "self" if k in discarded else "kept",
                    }
                    for k, row in enumerate(rows)
                ]
                table = pa.Table.from_pylist(decisions, schema=DUPLICATES)
            else:
                continue
            generation.parts.append(generation.writer.write(f"part-{source:03d}-000000", table))
        context.finish(generation, {})
    return context


def expected_vectors(run: Path, source: int, rows: list[int], model: registry.ImageModel) -> np.ndarray:
    """Each image decoded and embedded on its own."""
    from embeddings.decoding import decode

    made = []
    for row in [images_of(run, source, 6)[k] for k in rows]:
        data = (run / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
        made.append(registry.embed_rows(model, model.prepare(decode(data))[None])[0])
    table = vectors.embeddings_table(np.arange(len(made), dtype=np.uint64), np.stack(made))
    return np.asarray(table["embedding"].combine_chunks().flatten()).reshape(len(made), -1)


def test_run_embeds_kept_pool_images_and_seeds_with_every_model_in_one_pass(tmp_path: Path, ray_session: None) -> None:
    context = filtered(tmp_path)
    config = EmbedConfig(models=[MODEL, "sscd"])
    outcome = embed.execute(context, config)
    assert not outcome.skipped and outcome.rows == 2 * 7
    for name in config.models:
        stage = context.run.stage(f"embed/{name}")
        assert [Path(path).name for path in stage.part_paths()] == [f"part-00{k}-000000.parquet" for k in range(3)]
        opened = vectors.open_files(stage.part_paths())
        assert json.loads(opened.model or "") == registry.identity(name)
        assert opened.all_ids().tolist() == [image_id(0, k) for k in (0, 3, 5)] + [image_id(1, k) for k in (0, 1, 3, 5)]
        summary = stage.generations()[-1].summary
        assert summary == {"images": 9, "vectors": 7, "unreadable": 2, "reasons": {"not_an_image": 2}}
        listed = pq.read_table(f"{stage.directory}/gen-0000/unreadable/part-000-000000.parquet").to_pylist()
        assert listed == [{"image_id": image_id(0, 2), "reason": "not_an_image"}]
    part = vectors.open_files(context.run.stage(f"embed/{MODEL}").part_paths())
    _, stored = part.read(part.partitions[0])
    np.testing.assert_array_equal(stored, expected_vectors(tmp_path, 0, [0, 3, 5], registry.load(MODEL, "cpu")))
    again = embed.execute(context, config)
    assert again.skipped


def test_unreadable_locations_and_dead_vectors_are_reasons(tmp_path: Path) -> None:
    rows = images_of(tmp_path, 0, 6)
    rows[0]["shard"] = "shards/gone.bin"
    rows[1]["offset"] = 1 << 30
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES), tmp_path / "part.parquet")
    reading = Reading(str(tmp_path), (MODEL,), DecodeLimits())
    decoded = prepare_part(Part(str(tmp_path / "part.parquet")), reading)
    assert decoded["ids"].tolist() == [3, 5]
    assert decoded["unreadable"] == [(0, "unreadable"), (1, "unreadable"), (2, "not_an_image")]

    class Dead:
        identity, dimension, batch_size = {"name": "dead"}, 4, 8

        def embed(self, batch: np.ndarray) -> np.ndarray:
            return np.array([[1, 0, 0, 0], [0, 0, 0, 0]] + [[np.nan] * 4] * 6, np.float32)

    context = Context(RunDirectory(str(tmp_path / "run")), events=Events(None))
    generation = context.begin_rows("embed/dead", 1, {}, inputs=[])
    assert generation is not None
    record = embed.write_vectors(
        generation.writer,
        "part-0",
        Dead(),
        decoded["ids"],
        decoded["prepared-0"],
        decoded["unreadable"],  # type: ignore[arg-type]
    )
    assert record.rows == 1
    assert record.counts == {
        "images": 5,
        "unreadable": 4,
        "unreadable.not_an_image": 1,
        "unreadable.no_vector": 1,
        "unreadable.unreadable": 2,
    }


def test_part_without_images_is_an_empty_part(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(images_of(tmp_path, 2, 6), schema=IMAGES), tmp_path / "part.parquet")
    decoded = prepare_part(Part(str(tmp_path / "part.parquet")), Reading(str(tmp_path), (MODEL,), DecodeLimits()))
    context = Context(RunDirectory(str(tmp_path / "run")), events=Events(None))
    generation = context.begin_rows("embed/x", 1, {}, inputs=[])
    assert generation is not None
    (record,) = PartEmbedder((MODEL,), [generation.writer], "cpu")("part-0", decoded)
    assert (record.rows, record.files, record.counts) == (0, {}, {"images": 0, "unreadable": 0})


def test_new_generations_are_embedded_alone_and_other_settings_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []

    def local_pass(context: Context, generations: Any, tasks: Any, **arguments: Any) -> None:
        passes.append([name for name, _ in tasks])
        pass_in_this_process(context, generations, tasks, **arguments)

    monkeypatch.setattr(embed, "image_pass", local_pass)
    context = filtered(tmp_path)
    config = EmbedConfig(models=[MODEL])
    embed.execute(context, config)
    added = context.begin_keyed("filter", 1, {}, {"source": 3})
    assert added is not None
    rows = [{**row, "image_id": row["image_id"] + image_id(3, 0)} for row in images_of(tmp_path, 0, 6)]
    added.parts.append(added.writer.write("part-003-000000", pa.Table.from_pylist(rows, schema=IMAGES)))
    context.finish(added, {})
    again = embed.execute(Context(RunDirectory(str(tmp_path)), events=Events(None)), config)
    assert again.rows == 4
    assert passes == [[f"part-00{k}-000000" for k in range(3)], ["part-003-000000"]]
    with pytest.raises(UserError, match="max_pixels: was 100000000, now 5000"):
        embed.execute(context, EmbedConfig(models=[MODEL], max_pixels=5000))


def test_folder_of_tables_is_embedded_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "image_pass", pass_in_this_process)
    rows = [{k: row[k] for k in ("image_id", "shard", "offset", "length")} for row in images_of(tmp_path, 0, 6)]
    schema = pa.schema([IMAGES.field(name) for name in ("image_id", "shard", "offset", "length")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "mine.parquet")
    out = str(tmp_path / "out")
    outcome = embed.execute(
        Context(RunDirectory(out), events=Events(None), out=out), EmbedConfig(models=[MODEL]), images=str(tmp_path)
    )
    assert outcome.rows == 5
    assert vectors.open_folder(out).all_ids().tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["nonsense"], "model `nonsense` is unknown"),
        (["checkpoint:a/x", "checkpoint:b/x"], "share the folder"),
    ],
)
def test_bad_models_stop_before_anything_is_opened(tmp_path: Path, models: list[str], words: str) -> None:
    context = filtered(tmp_path)
    with pytest.raises(UserError, match=words):
        embed.execute(context, EmbedConfig(models=models))
    assert not (tmp_path / "embed").exists()


def test_run_without_a_filter_stage_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `curate filter` first"):
        embed.execute(Context(RunDirectory(str(tmp_path)), events=Events(None)), EmbedConfig(models=[MODEL]))
