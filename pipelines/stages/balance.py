"""Balance: a sample of the pool spread evenly over the hierarchy of clusters, exactly as many images as asked for."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import balance, hierarchy, order
from curation.errors import UserError
from curation.hierarchy import Hierarchy
from curation.schemas import BALANCE
from pipelines import embedded
from pipelines.context import Context, Outcome, StageConfig
from pipelines.run_directory import Generation

NAME = "balance"
REVISION = 1
LIBRARIES = ("numpy",)
PART_ROWS = 1_000_000


class BalanceConfig(StageConfig):
    """Options of `curate balance`."""

    target: int = Field(ge=1, description="images to take; all of them if there are fewer")
    leaves: Literal["random", "nearest"] = Field(
        "random", description="which images of a leaf cluster: random (hash order), or those nearest its centroid"
    )
    concepts: int | None = Field(
        None,
        ge=1,
        description="concepts the sample is to be even over; a warning where there are fewer leaf clusters than these",
        json_schema_extra={"affects_output": False},
    )


def execute(context: Context, config: BalanceConfig, *, clusters: str | None = None) -> Outcome:
    """Sample the clusters of a run, or of the plain folder `clusters`."""
    inputs: list[str] = []
    extra: dict[str, Any] = {}
    if clusters is not None:
        folder, paths = clusters, embedded.cluster_paths(clusters)
        extra = {"clusters": embedded.files_digest([*paths, *hierarchy.level_paths(clusters)])}
    else:
        inputs = ["cluster"]
        generations = context.run.stage("cluster").generations()
        if not generations:
            raise UserError(f"{context.run.path('cluster')}: no clusters; run `curate cluster` first")
        folder = generations[-1].directory
        paths = [path for generation in generations for path in generation.part_paths]
    built, _, _ = hierarchy.read_hierarchy(folder)
    generation = context.begin_snapshot(NAME, REVISION, config.fingerprint_options(), inputs, LIBRARIES, extra)
    if generation is None:
        return context.skipped(NAME)
    with embedded.bad_input_taken_back(context, generation):
        return _balance(context, config, generation, built, paths)


def _balance(
    context: Context, config: BalanceConfig, generation: Generation, built: Hierarchy, paths: Sequence[str]
) -> Outcome:
    sizes = built.sizes(embedded.leaf_sizes(context, paths, built.levels[0]))
    images = int(sizes[0].sum())
    if config.target > images:
        text = f"target {config.target:,} is more than the {images:,} clustered images: all of them are taken"
        context.events.emit("warning", NAME, text=text)
    leaf_clusters = int((sizes[0] > 0).sum())
    if config.concepts is not None and leaf_clusters < config.concepts:
        text = (
            f"{leaf_clusters:,} leaf clusters hold images, and {config.concepts:,} concepts cannot be even over fewer "
            "clusters than there are of them: cluster with more leaves (cluster.levels)"
        )
        context.events.emit("warning", NAME, text=text)
    wanted = balance.leaf_targets(sizes, built.parents, config.target, context.seed)
    taken = order.FirstPerGroup(wanted)
    calls = ((path, (path, config.leaves, context.seed)) for path in paths)
    for _, found in context.spread(_first_of_part, calls, shared=wanted):
        taken.add(*found)
    leaves, _, ids, ranks = taken.result()
    # The sampler goes round the leaves: every prefix of `rank` is as balanced as it can be.
    position = np.empty(len(ids), np.int64)
    position[np.lexsort((order.hash_keys(ids, context.seed, "balance rounds"), ranks))] = np.arange(len(ids))
    by_id = np.argsort(ids)
    generation.parts = []
    for index, start in enumerate(range(0, len(ids), PART_ROWS)):
        rows = by_id[start : start + PART_ROWS]
        columns = [pa.array(ids[rows]), pa.array(position[rows]), pa.array(leaves[rows], pa.int32())]
        table = pa.Table.from_arrays(columns, schema=BALANCE)
        generation.parts.append(generation.writer.write(f"part-{index:06d}", table))
    return context.finish(generation, _summary(config, built, wanted, sizes))


def _summary(
    config: BalanceConfig, built: Hierarchy, wanted: np.ndarray, sizes: Sequence[np.ndarray]
) -> dict[str, Any]:
    """effective_clusters: exp(entropy) of the images over the clusters of each level, leaf first."""
    leaf_clusters = int((sizes[0] > 0).sum())
    return {
        "target": config.target,
        "images": int(wanted.sum()),
        "pool": int(sizes[0].sum()),
        "leaf_clusters": leaf_clusters,
        "concepts_above_leaf_clusters": config.concepts is not None and leaf_clusters < config.concepts,
        "leaf_clusters_used": int((wanted > 0).sum()),
        "effective_clusters_pool": [round(hierarchy.effective_number(level), 3) for level in sizes],
        "effective_clusters": [round(hierarchy.effective_number(level), 3) for level in built.sizes(wanted)],
    }


def _first_of_part(path: str, leaves: str, seed: int, wanted: np.ndarray) -> Sequence[np.ndarray]:
    """(leaf, key, image_id) of what one part can give."""
    ids, groups, distances = embedded.read_columns(path, ["image_id", "cluster_1", "distance"])
    keys = balance.member_keys(ids, distances, leaves, seed)
    rows, _ = order.first_per_group(groups, keys, ids, wanted)
    return groups[rows], keys[rows], ids[rows]
