"""Manifest: what the stages found out about each image of the mix, in one row; and the data card.

RUN/manifest/gen-NNNN/part-*.parquet, one part per range of about ROWS_PER_RANGE rows of the filter's table, named after
the first filter part of the range, rows in id order throughout; `manifest.json`, the data card, beside them.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import hidden, parquet, storage
from curation.audit import tables
from curation.audit.scans import id_range, stream
from curation.errors import UserError
from curation.manifest import card_bytes, cut_ranges, join_range, range_counts, rows_of, seed_set_figures
from curation.schemas import MANIFEST
from pipelines.context import Context, Outcome, StageConfig
from pipelines.description import (
    configuration_of,
    current_parts,
    described_models,
    described_retrievals,
    described_sources,
    described_stages,
    reference_figures,
    run_counts,
    side_files,
)
from pipelines.run_directory import Generation, PartRecord, PartWriter, RunDirectory
from pipelines.stages.mix import HIDDEN

NAME = "manifest"
REVISION = 1
CARD = "manifest.json"
ROWS_PER_RANGE = 1 << 17
FOOTERS_PER_TASK = 1024
INPUTS = ("mix", "filter", "dedup", "cluster", "retrieve")
ID_END = 1 << 64


class ManifestConfig(StageConfig):
    """Options of `curate manifest`."""


def execute(context: Context, config: ManifestConfig) -> Outcome:
    """Join the tables of the run for the images of its mix, and write the card."""
    run = context.run
    for needed in ("mix", "filter"):
        if not run.stage(needed).generations():
            raise UserError(
                f"{run.path(needed)}: no finished {needed} to make a manifest of; "
                f"run `curate {needed} {run.root}` first"
            )
    out = hidden.hidden_ids(run.root)
    description = {"configuration": configuration_of(run), "sources": described_sources(run)}
    generation = context.begin_snapshot(
        NAME,
        REVISION,
        config.fingerprint_options(),
        inputs=INPUTS,
        renewed_by={HIDDEN: hidden.digest(out)},
        extra_inputs={"run.yaml and sources.json": storage.sha256(json.dumps(description, sort_keys=True).encode())},
    )
    if generation is None:
        return context.skipped(NAME)
    paths = {stage: current_parts(run, stage) for stage in INPUTS}
    context.map_parts(generation, _tasks(context, paths), _join_part, shared=out)
    card = data_card(run, generation, description)
    generation.put_file(CARD, card_bytes(card))
    return context.finish(
        generation,
        {
            "images": card["manifest"]["rows"],
            "nominal": card["manifest"]["nominal"],
            "parts": len(generation.parts),
            "card": CARD,
        },
    )


def _tasks(context: Context, paths: dict[str, list[str]]) -> list[tuple[str, Any]]:
    """One task per range of ids: the range, and per table the parts whose ids reach into it."""
    every = sorted({path for group in paths.values() for path in group})
    chunks = [every[i : i + FOOTERS_PER_TASK] for i in range(0, len(every), FOOTERS_PER_TASK)]
    calls = ((f"{i:08d}", (chunk,)) for i, chunk in enumerate(chunks))
    footers = {path: footer for _, found in context.spread(_footers, calls) for path, footer in found.items()}
    images = sorted((footers[path][0], path.rsplit("/", 1)[-1], path) for path in paths["filter"] if footers[path][2])
    lows = [low for low, _, _ in images]
    cuts = cut_ranges(lows, [footers[path][2] for _, _, path in images], ROWS_PER_RANGE)
    tasks = []
    for position, cut in enumerate(cuts):
        low = lows[cut] if position else 0
        high = lows[cuts[position + 1]] if position + 1 < len(cuts) else ID_END
        inside = {
            stage: [p for p in group if footers[p][2] and footers[p][0] < high and footers[p][1] >= low]
            for stage, group in paths.items()
        }
        tasks.append((images[cut][1].removesuffix(".parquet"), (low, high, inside)))
    return tasks


def _footers(paths: Sequence[str], _shared: Any) -> dict[str, tuple[int, int, int]]:
    """Smallest id, largest id and rows of each file, by its footer."""
    found = {}
    for path in paths:
        file = parquet.open_file(path)
        low, high = id_range(file)
        rows = file.metadata.num_rows
        found[path] = (0 if low is None else low, ID_END - 1 if high is None else high, rows)
    return found


def _join_part(writer: PartWriter, name: str, task: Any, out: np.ndarray) -> PartRecord:
    low, high, paths = task
    inside = pc.field("image_id") >= pa.scalar(low, pa.uint64())
    if high < ID_END:
        inside &= pc.field("image_id") < pa.scalar(high, pa.uint64())
    mix = _read(paths["mix"], None, inside)
    mix = None if mix is None else hidden.hide(mix, out)
    if mix is None or not mix.num_rows:
        return writer.write(name, MANIFEST.empty_table())
    mine = inside & pc.field("image_id").isin(mix["image_id"].combine_chunks())
    image_columns = [n for n in MANIFEST.names if n in parquet.schema(paths["filter"][0]).names]
    images = _read(paths["filter"], [*image_columns, "status"], mine)
    if images is None:
        images = pa.table({"image_id": pa.array([], pa.uint64()), "status": pa.array([], pa.string())})
    table = join_range(
        images,
        mix,
        _read(paths["dedup"], ["image_id", "component_id"], mine),
        _read(paths["cluster"], None, mine),
        _read(paths["retrieve"], None, mine),
    )
    return writer.write(name, table, counts=range_counts(table, mix))


def _read(paths: Sequence[str], columns: list[str] | None, where: Any) -> pa.Table | None:
    if not paths:
        return None
    tables_read = list(stream(paths, columns, where))
    return pa.concat_tables(tables_read) if tables_read else None


def data_card(run: RunDirectory, generation: Generation, description: dict[str, Any]) -> dict[str, Any]:
    """Everything about the dataset that is not a row: manifest.json."""
    counts = run_counts(run, generation.part_paths)
    dedup = side_files(run, "dedup")
    reference_sets = reference_figures(run)
    seed_sets = seed_set_figures(
        counts["retrieve"] or [],
        rows_of(tables.seed_set_counts(generation.part_paths)),
        description["sources"],
        described_retrievals(run),
    )
    rows = sum(part.rows for part in generation.parts)
    brought = {key for part in generation.parts for key in part.counts if key.startswith("brought_by ")}
    expected = {
        s["as"]: s["images"]
        for s in (description["configuration"] or {}).get("sources", [])
        if s.get("images") is not None
    }
    return {
        "manifest": {
            "rows": rows,
            "nominal": int(generation.total("nominal")),
            "weight": generation.total("weight"),
            "bytes": int(generation.total("bytes")),
            "brought_by": {key.removeprefix("brought_by "): int(generation.total(key)) for key in sorted(brought)},
            "parts": [{"name": p.name, "rows": p.rows, "sha256": p.sha256} for p in generation.parts],
        },
        "configuration": description["configuration"],
        "sources": description["sources"],
        "licences": {s["name"]: s["licence"] for s in description["sources"]},
        "exempt_seed_sets": sorted(s["name"].split(":", 1)[1] for s in description["sources"] if s["exempt"]),
        "counts": counts,
        "seed_sets": seed_sets,
        "decontamination": {
            "recall": dedup.get("recall"),
            "reference_sets": reference_sets,
            "by_rule": dedup.get("references"),
            "thresholds": dedup.get("thresholds"),
        },
        "planned": {
            "sources": [
                {"source": s["name"], "planned": expected[s["name"]], "actual": s["rows"]}
                for s in description["sources"]
                if s["name"] in expected
            ],
            "retrieved": {
                s["seed_set"]: {"planned": s["planned"], "actual": sum(s["retrieved"].values())} for s in seed_sets
            },
        },
        "models": described_models(run),
        "stages": described_stages(run),
        "fingerprint": generation.fingerprint.digest,
    }
