"""Embed: the semantic embedding of the pool images that dedup kept, and of the seeds. Reads filter and dedup.

Each image is decoded once for all models; `embed/MODEL` is a stage of its own per model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation import parquet, storage
from curation.errors import UserError
from curation.locations import read_ranges
from curation.schemas import ID
from curation.vectors import embeddings_table
from embeddings.decoding import DecodeError, DecodeLimits, worker_decoder
from embeddings.models import registry
from pipelines import cluster
from pipelines.context import Context, Outcome, StageConfig
from pipelines.embedded import files_digest
from pipelines.image_parts import role
from pipelines.image_pass import image_pass
from pipelines.run_directory import Generation, PartRecord, PartWriter

NAME = "embed"
REVISION = 1
COLUMNS = ("image_id", "source", "shard", "offset", "length", "status", "stored_sha256")
UNREADABLE = pa.schema([ID, pa.field("reason", pa.string(), nullable=False)])


class EmbedConfig(StageConfig):
    """Options of `curate embed`."""

    models: list[str] = Field(
        ["mobilenet_v2"],
        min_length=1,
        description="models to embed with: mobilenet_v2, sscd, sscd:FILE, open_clip:ARCH/PRETRAINED, timm:NAME, "
        "checkpoint:FOLDER",
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are not decoded and count as unreadable")


@dataclass(frozen=True)
class Part:
    """One part to embed: a table of images, and the parts of dedup that say which of them stay."""

    path: str
    decisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What all parts share. root: where relative locations lie."""

    root: str
    models: tuple[str, ...]
    limits: DecodeLimits


def execute(context: Context, config: EmbedConfig, *, images: str | None = None) -> Outcome:
    """Embed what is new in a run, or the images of the plain folder `images`.

    Raises UserError before anything is computed for a model that is not to be had.
    """
    models = list(dict.fromkeys(config.models))
    _refuse_shared_folders(models)
    for name in models:
        registry.check(name)
    device = _device(context, models)
    if images is not None:
        return _embed_folder(context, config, models, images, device)
    inputs = ["filter"] + (["dedup"] if context.run.stage("dedup").all_generations() else [])
    if not context.run.stage("filter").generations():
        raise UserError(f"{context.run.path('filter')}: nothing is filtered yet; run `curate filter` first")
    opened = {}
    for name in models:
        generation = _begin(context, f"{NAME}/{registry.slug(name)}", name, config, device, inputs, {})
        if generation is not None:
            opened[name] = generation
    for names in _groups_with_equal_input(opened):
        together = [opened[name] for name in names]
        tasks = _run_tasks(context, together[0])
        _embed(context, config, names, together, tasks, context.run.root, device)
        for generation in together:
            context.finish(generation, _summary(generation))
    outcomes = [context.skipped(f"{NAME}/{registry.slug(name)}") for name in models]
    return _together(context, outcomes, fresh=set(opened), models=models)


def _embed_folder(context: Context, config: EmbedConfig, models: list[str], images: str, device: str) -> Outcome:
    if len(models) > 1:
        raise UserError(f"--out holds the vectors of one model, {len(models)} were given: {', '.join(models)}")
    paths = storage.list_files(images, ".parquet")
    if not paths:
        raise UserError(
            f"{images}: holds no *.parquet; give a folder of tables with image_id, shard, offset and length"
        )
    for path in paths:
        _check_columns(path)
    extra = {"images": files_digest(paths)}
    generation = _begin(context, NAME, models[0], config, device, [], extra)
    if generation is None:
        return context.skipped(NAME)
    stems = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in paths]
    keep = all(stem.startswith("part-") for stem in stems)
    tasks = [
        (stem if keep else f"part-{index:06d}", Part(path))
        for index, (stem, path) in enumerate(zip(stems, paths, strict=True))
    ]
    _embed(context, config, models, [generation], tasks, _root_of(images), device)
    return context.finish(generation, _summary(generation))


def _begin(
    context: Context,
    stage: str,
    model: str,
    config: EmbedConfig,
    device: str,
    inputs: list[str],
    extra: Mapping[str, Any],
) -> Generation | None:
    options = {"model": registry.identity(model), "max_pixels": config.max_pixels, "device": device}
    return context.begin_rows(
        stage, REVISION, options, inputs=inputs, libraries=registry.libraries(model), extra_inputs=extra
    )


def _embed(
    context: Context,
    config: EmbedConfig,
    models: Sequence[str],
    generations: Sequence[Generation],
    tasks: Sequence[tuple[str, Part]],
    root: str,
    device: str,
) -> None:
    on_gpu = device != "cpu"
    image_pass(
        context,
        generations,
        tasks,
        decode=prepare_part,
        shared=Reading(root, tuple(models), DecodeLimits(max_pixels=config.max_pixels)),
        model=PartEmbedder,
        model_arguments={
            "models": tuple(models),
            "writers": [generation.writer for generation in generations],
            "device": "cuda" if on_gpu else "cpu",
        },
        num_gpus=1 if on_gpu else 0,
    )


def prepare_part(part: Part, reading: Reading) -> dict[str, Any]:
    """Read and decode a part's images once, and prepare them for every model. Runs on the decode workers.

    Returns `ids` (n,) uint64 of the images decoded, one (n, h, w, 3) uint8 array per distinct preparation,
    `unreadable` as (id, reason) pairs.
    """
    rows = rows_to_embed(part)
    ids = rows["image_id"].to_numpy()
    places = list(zip(rows["shard"].to_pylist(), rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True))
    preparations = list(dict.fromkeys(registry.preparation(name) for name in reading.models))
    prepared = [np.empty((len(ids), *one.shape), np.uint8) for one in preparations]
    decoder = worker_decoder(reading.limits)
    kept: list[int] = []
    unreadable: list[tuple[int, str]] = []
    digests = rows["stored_sha256"].to_pylist() if "stored_sha256" in rows.column_names else None
    for image_id, data in zip(ids, read_ranges(reading.root, places, digests), strict=True):
        try:
            if isinstance(data, OSError):
                raise DecodeError("unreadable")
            pixels = decoder.decode(data)
        except DecodeError as error:
            unreadable.append((int(image_id), error.reason))
            continue
        for array, one in zip(prepared, preparations, strict=True):
            array[len(kept)] = one(pixels)
        kept.append(int(image_id))
    return {
        "ids": np.array(kept, np.uint64),
        "unreadable": unreadable,
        **{f"prepared-{index}": array[: len(kept)] for index, array in enumerate(prepared)},
    }


def rows_to_embed(part: Part) -> pa.Table:
    """The rows of a table of images that get a vector: status ok, no reference image, not discarded by dedup."""
    with parquet.open_file(part.path) as file, parquet.named(part.path):
        there = file.schema_arrow.names
        table = file.read(columns=[name for name in COLUMNS if name in there], use_threads=False)
    if "status" in there:
        table = table.filter(pc.equal(table["status"], "ok"))
    if "source" in there:
        table = table.filter(
            pa.array([role(source) != "reference" for source in table["source"].to_pylist()], pa.bool_())
        )
    for path in part.decisions:
        decisions = parquet.read_table(path, ["image_id", "kept"])
        discarded = decisions.filter(pc.invert(decisions["kept"]))["image_id"]
        table = table.filter(pc.invert(pc.is_in(table["image_id"], value_set=discarded.combine_chunks())))
    return table


class PartEmbedder:
    """The actor: all models loaded, one part of each written per call."""

    def __init__(self, models: Sequence[str], writers: Sequence[PartWriter], device: str) -> None:
        preparations = list(dict.fromkeys(registry.preparation(name) for name in models))
        self._prepared = [f"prepared-{preparations.index(registry.preparation(name))}" for name in models]
        self._models = [registry.load(name, device if registry.uses_gpu(name) else "cpu") for name in models]
        self._writers = list(writers)

    def __call__(self, name: str, decoded: Mapping[str, Any]) -> list[PartRecord]:
        return [
            write_vectors(writer, name, model, decoded["ids"], decoded[prepared], decoded["unreadable"])
            for writer, model, prepared in zip(self._writers, self._models, self._prepared, strict=True)
        ]


def write_vectors(
    writer: PartWriter,
    name: str,
    model: registry.ImageModel,
    ids: np.ndarray,
    prepared: np.ndarray,
    unreadable: Sequence[tuple[int, str]],
) -> PartRecord:
    """Embed and write one part. A vector that is zero or not finite is left out too, as `no_vector`."""
    vectors = registry.embed_rows(model, prepared)
    sums = np.einsum("nd,nd->n", vectors.astype(np.float64), vectors.astype(np.float64))
    usable = np.isfinite(sums) & (sums > 0)
    left_out = sorted([*unreadable, *((int(i), "no_vector") for i in ids[~usable])])
    counts: dict[str, float] = {"images": len(ids) + len(unreadable), "unreadable": len(left_out)}
    for _, reason in left_out:
        counts[f"unreadable.{reason}"] = counts.get(f"unreadable.{reason}", 0) + 1
    files = {}
    if left_out:
        table = pa.Table.from_pylist([{"image_id": i, "reason": reason} for i, reason in left_out], schema=UNREADABLE)
        files[f"unreadable/{name}.parquet"] = storage.table_bytes(table)
    return writer.write(
        name,
        embeddings_table(ids[usable], vectors[usable]),
        files=files,
        counts=counts,
        metadata=registry.metadata(model.identity),
    )


def _run_tasks(context: Context, generation: Generation) -> list[tuple[str, Part]]:
    """The filter parts that this generation takes, each with the parts of dedup that decide on its images."""
    taken = {
        stage: [g for g in context.run.stage(stage).generations() if g.number in numbers]
        for stage, numbers in generation.consumed.items()
    }
    decisions = {
        record.name: one.writer.path(record.name)
        for one in context.run.stage("dedup").generations()
        for record in one.parts
        if "dedup" in taken
    }
    parts = [(record.name, one.writer.path(record.name)) for one in taken["filter"] for record in one.parts]
    by_name = any(name in decisions for name, _ in parts)
    everything = tuple(decisions.values())
    return sorted(
        (name, Part(path, ((decisions[name],) if name in decisions else ()) if by_name else everything))
        for name, path in parts
    )


def _groups_with_equal_input(opened: Mapping[str, Generation]) -> list[list[str]]:
    """Models whose generations take the same input are embedded in one pass."""
    groups: dict[str, list[str]] = {}
    for name, generation in opened.items():
        groups.setdefault(json.dumps(generation.consumed, sort_keys=True), []).append(name)
    return list(groups.values())


def _summary(generation: Generation) -> dict[str, Any]:
    rows = sum(part.rows for part in generation.parts)
    reasons = sorted({count for part in generation.parts for count in part.counts if count.startswith("unreadable.")})
    return {
        "images": int(generation.total("images")),
        "vectors": rows,
        "unreadable": int(generation.total("unreadable")),
        "reasons": {reason.removeprefix("unreadable."): int(generation.total(reason)) for reason in reasons},
    }


def _together(context: Context, outcomes: list[Outcome], fresh: set[str], models: list[str]) -> Outcome:
    if len(outcomes) == 1:
        (only,) = outcomes
        return Outcome(only.stage, not fresh, only.rows, only.summary, only.out)
    summary = {name: outcome.summary for name, outcome in zip(models, outcomes, strict=True)}
    return Outcome(NAME, not fresh, sum(o.rows for o in outcomes), summary, context.run.path(NAME))


def _refuse_shared_folders(models: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for name in models:
        other = folders.setdefault(registry.slug(name), name)
        if other != name:
            raise UserError(
                f"embed.models: {other} and {name} would share the folder {registry.slug(name)}; rename one"
            )


def _device(context: Context, models: Sequence[str]) -> str:
    """`cpu`, or the GPU's name: it decides the last bits, so it is part of the fingerprint."""
    if not any(registry.uses_gpu(name) for name in models):
        return "cpu"
    if context.resources.ray_address:
        cluster.start(context.resources.ray_address, context.resources.workers)
        return cluster.gpu_name() or "cpu"
    if registry.best_device() == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(0))


def _check_columns(path: str) -> None:
    names = parquet.schema(path).names
    missing = [name for name in ("image_id", "shard", "offset", "length") if name not in names]
    if missing:
        raise UserError(
            f"{path}: no column `{missing[0]}` (it has {', '.join(names)}); see the table `images` in the docs"
        )


def _root_of(folder: str) -> str:
    """Relative locations lie in the run, if `folder` is a stage's generation, else in the folder itself."""
    folder = folder.rstrip("/")
    parent = folder.rpartition("/")[0]
    if folder.rpartition("/")[2].startswith("gen-") and storage.exists(storage.join(parent, "_stage.json")):
        return parent.rpartition("/")[0]
    return folder
