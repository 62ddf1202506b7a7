"""The relative graph of one generation of dedup: kept pool images, seeds that are not exempt, reference images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.duplicates import relative
from curation.duplicates.forest import ForestMerger, Nodes
from curation.duplicates.relative import Decontamination, RelativeJoin, decontaminate
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions
from pipelines import duplicate_inputs
from pipelines.columns import empty_in
from pipelines.context import Context
from pipelines.duplicate_forests import SWEEP, forest_paths, put_cells, side_forest, spread_of, stored_cells
from pipelines.duplicate_forgotten import Joints, joints_of, with_joints
from pipelines.duplicate_inputs import Inputs
from pipelines.run_directory import Generation

if TYPE_CHECKING:
    from pipelines.stages.dedup import DedupConfig

FOREST = "relative_forest"
CELLS = "relative-cells.bin"


@dataclass
class Relative:
    """The relative graph of one generation: nodes, edges, decisions."""

    nodes: Nodes
    join: RelativeJoin
    decided: Decontamination
    fresh: np.ndarray
    """(images,) bool: of this generation."""
    is_seed: np.ndarray
    joints: Joints
    """Forgotten images in the forest of the generation before."""

    def sweep(self, names: Sequence[str], lowest: float) -> list[dict[str, Any]]:
        """What other thresholds would discard, re-read from the forest."""
        found = []
        for threshold in (t for t in SWEEP if t >= lowest and names):
            join = self.join
            other = decontaminate(join.forest, join.hits, join.references_hit, self.nodes.offsets, names, threshold)
            found.append(
                {
                    "threshold": threshold,
                    "component": int(other.by_component.sum()),
                    "direct": int(other.direct.sum()),
                    "largest": other.largest,
                }
            )
        return found


def join_relative(
    context: Context,
    config: "DedupConfig",
    generation: Generation,
    inputs: Inputs,
    stays: np.ndarray,
    earlier: Sequence[Generation],
    scratch: Scratch,
    most: int,
) -> Relative:
    """Join, merge with the forest of the generation before, decide. stays: (pool rows,) bool in their order."""
    empty = empty_in(generation.directory)
    images = duplicate_inputs.merged(inputs.pool.where(stays, empty), inputs.seeds, empty)
    joints = joints_of(context.run.root, forest_paths(earlier[-1], FOREST) if earlier else ())
    ids, places = with_joints(*duplicate_inputs.ranked(images), joints.of(0))
    ranked = [
        with_joints(*duplicate_inputs.ranked(rows), joints.of(space)) for space, rows in enumerate(inputs.references, 1)
    ]
    nodes = Nodes((ids, *(i for i, _ in ranked)))
    offsets = nodes.offsets
    # A forest does not say which edges a bound per image left out: with one, everything is joined again.
    again = config.max_edges is not None
    compared = inputs.generations if again else None
    if not any(rows.count for rows in inputs.references):
        joined = relative.empty_relative()
    else:
        joined = relative.relative_join(
            inputs.members(images, places, 0, nodes.count, most, compared),
            inputs.reference_members([p for _, p in ranked], offsets, most, compared),
            ids,
            offsets,
            JoinOptions(
                config.against_threshold,
                config.recall,
                None,
                context.seed,
                "relative",
                config.max_edges,
                context.resources.memory_bytes,
            ),
            Scratch(f"{scratch.directory}/relative"),
            spread_of(context, generation.fingerprint.stage),
            [t for t in SWEEP if t >= config.against_threshold],
            **stored_cells(earlier, CELLS),
        )
        put_cells(generation, CELLS, joined.cells, earlier)
    if earlier and not again:
        merger = ForestMerger(nodes.count)
        merger.add(joined.forest)
        for rows in side_forest(earlier[-1], FOREST, nodes):
            merger.add(rows)
        joined = replace(joined, forest=merger.result())
    fresh = np.zeros(len(ids), bool)
    fresh[slice(None) if places is None else places] = inputs.fresh(images)
    decided = decontaminate(
        joined.forest, joined.hits, joined.references_hit, offsets, inputs.reference_names, config.against_threshold
    )
    is_seed = np.zeros(len(ids), bool)
    is_seed[np.searchsorted(ids, inputs.seeds.all_ids())] = True
    return Relative(nodes, joined, decided, fresh, is_seed, joints)
