"""Retrieve: the pool images that the seed sets draw, by nearest neighbours or by cluster (curation/retrieval.py).

What a seed set drew, chose and collided with stands in `seed_sets.json` beside the parts; part-SSS holds the rows of
seed set number SSS, sorted by image_id.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.schemas import RETRIEVAL
from pipelines import embedded
from pipelines.context import Context, Outcome
from pipelines.retrieve_cluster import clustered
from pipelines.retrieve_inputs import (
    SAMPLE_ABOVE,
    Inputs,
    RetrieveConfig,
    Retrieved,
    SeedSet,
    SeedSetConfig,
    plain_inputs,
    run_inputs,
)
from pipelines.retrieve_sample import sampled
from pipelines.run_directory import Generation

__all__ = ["NAME", "REVISION", "SAMPLE_ABOVE", "RetrieveConfig", "SeedSetConfig", "execute"]

NAME = "retrieve"
REVISION = 5
LIBRARIES = ("faiss-cpu", "numba", "numpy")
PART_ROWS = 1_000_000


def execute(
    context: Context,
    config: RetrieveConfig,
    *,
    embeddings: str | None = None,
    seeds: Mapping[str, str] | None = None,
    clusters: str | None = None,
) -> Outcome:
    """Retrieve for the seed sets of a run, or for the plain folders `seeds` (by name) from the pool `embeddings`."""
    if embeddings is not None:
        inputs = plain_inputs(context, config, embeddings, seeds or {}, clusters)
    else:
        inputs = run_inputs(context, config)
    options = config.fingerprint_options()
    options["model"] = inputs.stages[0] if inputs.stages else None
    generation = context.begin_snapshot(NAME, REVISION, options, inputs.stages, LIBRARIES, inputs.extra)
    if generation is None:
        return context.skipped(NAME)
    if not inputs.sets:
        context.events.emit("warning", NAME, text="the run has no seed sets: nothing is retrieved")
    with embedded.bad_input_taken_back(context, generation):
        drawn, search = sampled(context, generation, config, inputs)
        outcome = _write(context, generation, inputs, drawn | clustered(context, generation, inputs), search)
    embedded.remove_scratch(generation)
    return outcome


def _write(
    context: Context, generation: Generation, inputs: Inputs, found: Mapping[str, Retrieved], search: Mapping[str, Any]
) -> Outcome:
    generation.parts = []
    report: dict[str, Any] = {}
    drawn = [np.empty(0, np.uint64)]
    for s in inputs.sets:
        one = found.get(s.name)
        report[s.name] = {"mode": s.mode, "seeds": s.seeds}
        if one is None:
            continue
        for index, start in enumerate(range(0, len(one.draws), PART_ROWS)):
            table = _table(s, one, slice(start, start + PART_ROWS))
            generation.parts.append(generation.writer.write(f"part-{s.number:03d}-{index:06d}", table))
        report[s.name] |= {**one.counts, "rows": len(one.draws)}
        drawn.append(np.unique(one.draws.image_id))
        if not len(one.draws):
            context.events.emit(
                "warning", NAME, text=f"seed set {s.name} ({s.seeds:,} seeds, mode {s.mode}) drew nothing"
            )
    everything, times = np.unique(np.concatenate(drawn), return_counts=True)
    document = {
        name: counts | ({"chosen": found[name].chosen} if name in found and found[name].chosen else {})
        for name, counts in report.items()
    }
    generation.put_file("seed_sets.json", (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    summary = {
        "rows": sum(len(one.draws) for one in found.values()),
        "images": len(everything),
        "images_of_several_sets": int((times > 1).sum()),
        "seed_sets": report,
    }
    if search:
        summary["search"] = dict(search)
    return context.finish(generation, summary)


def _table(seed_set: SeedSet, one: Retrieved, rows: slice) -> pa.Table:
    draws = one.draws
    count = len(draws.image_id[rows])
    clusters = pa.nulls(count, pa.int32()) if one.clusters is None else pa.array(one.clusters[rows], pa.int32())
    columns = [
        pa.array(draws.image_id[rows], pa.uint64()),
        pa.array([seed_set.name] * count, pa.string()),
        pa.array(draws.seed_id[rows], pa.uint64()),
        pa.array([seed_set.mode] * count, pa.string()),
        pa.array(draws.rank[rows], pa.int32()),
        pa.array(draws.similarity[rows], pa.float32()),
        clusters,
    ]
    return pa.Table.from_arrays(columns, schema=RETRIEVAL)
