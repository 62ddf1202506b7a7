"""Dedup: near-duplicate components of the pool, then what the reference sets discard of what is left.

Two graphs. The search (`pipelines/duplicate_forests.py`, its own folder `dedup-search`) joins the pool above
`store_threshold` and keeps the maximum spanning forest, so that a higher threshold is a re-read: `--rebuild` makes the
tables again and keeps a search that covers what is asked. The relative graph (`pipelines/duplicate_relative.py`)
belongs to one self threshold and is joined again with it. A later generation joins its new images with themselves and
all older ones; rows written before stay as they are.

Memory of the driver, per pool image: the union-find (4 B), which becomes the labels; at times two more arrays of 4 B
(sizes, the first of each component); flags (4 B). Ids (8 B), places in files (4 B; nodes 4 B more where parts are not
in id order), the number representatives are chosen by (8 B) and the nearest neighbours (8 B) lie in files that the
kernel pages. Per kept image, where there are reference sets: ids and places again in such files, labels and flags
(7 B). Forests are read file by file, but while a later generation's is merged (12 B an edge, three times), with
`max_component`, and in the relative graph (12 B an edge). Measured in all: `benchmarks/dedup_driver.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from curation.errors import UserError
from pipelines.context import Context, Outcome, StageConfig
from pipelines.run_directory import Generation

if TYPE_CHECKING:
    import numpy as np

    from curation.duplicates.forest import Nodes
    from curation.duplicates.scratch import Scratch
    from pipelines.duplicate_choice import Choice
    from pipelines.duplicate_forests import Search, StoredForest
    from pipelines.duplicate_forgotten import Joints
    from pipelines.duplicate_inputs import Inputs
    from pipelines.duplicate_relative import Relative

NAME = "dedup"
REVISION = 4
LIBRARIES = ("faiss-cpu", "numpy")
ASKED_WRONGLY = 2
SELF_FOREST = "self_forest"
SEARCH = "dedup-search"


class DedupConfig(StageConfig):
    """Options of `curate dedup`."""

    threshold: float = Field(0.6, gt=0, lt=1, description="cosine above which two pool images are copies")
    against_threshold: float = Field(
        0.45, gt=0, lt=1, description="cosine above which an image is a copy of a reference image"
    )
    drop: Literal["component", "direct"] = Field(
        "component",
        description="discard components that hold a reference image whole (the paper's rule), or direct hits only",
    )
    representative: str = Field(
        "resolution",
        pattern=r"^(resolution|earliest|medoid|column:.+)$",
        description="which image of a component stays: resolution, earliest, medoid or column:NAME (largest value)",
    )
    recall: float = Field(
        0.99, gt=0, le=1, description="share of the true pairs above `threshold` to find; decides how far to search"
    )
    store_threshold: float | None = Field(
        None, gt=0, lt=1, description="keep the forest down to this cosine; default: the lowest threshold in use"
    )
    max_edges: int | None = Field(
        None,
        ge=1,
        description="keep at most so many edges per image, as the paper does (64); a k cuts groups apart, and makes "
        "each later generation search everything again",
    )
    split: Literal["none", "star"] = Field(
        "none",
        description="star: members must be above `threshold` to their representative; others elect anew",
    )
    max_component: int | None = Field(
        None, ge=2, description="cut components of more images at higher thresholds until they fit"
    )
    against: list[str] = Field(
        default_factory=list,
        description="reference sets for --embeddings: [NAME=]DIR; in a run, import them --as reference:NAME",
        json_schema_extra={"affects_output": False},
    )

    @field_validator("representative")
    @classmethod
    def _stripped(cls, value: str) -> str:
        return value.strip()

    @model_validator(mode="after")
    def _stored_below(self) -> "DedupConfig":
        if self.store_threshold is not None and self.store_threshold > self.threshold:
            raise ValueError(f"store_threshold {self.store_threshold} is above threshold {self.threshold}")
        return self

    def lowest(self, has_references: bool) -> float:
        """Where the stored forest of the pool begins."""
        if self.store_threshold is not None:
            return self.store_threshold
        return min(self.threshold, self.against_threshold) if has_references else self.threshold


def execute(context: Context, config: DedupConfig, *, embeddings: str | None = None) -> Outcome:
    """Deduplicate the pool of a run, or the plain folder `embeddings` against the folders `config.against`."""
    inputs, extra, has_references = _inputs(context, config, embeddings)
    from pipelines.duplicate_forests import Search, forget

    searching = Search.open(context, config, inputs, extra, has_references)
    try:
        generation = context.begin_rows(
            NAME, REVISION, _options(config, has_references, searching.lowest), inputs, LIBRARIES, extra
        )
    except UserError:
        searching.take_back(started=False)
        raise
    if generation is None:
        return context.skipped(NAME)
    try:
        return _deduplicate(context, config, generation, searching, embeddings)
    except UserError as error:
        if error.exit_code == ASKED_WRONGLY:
            forget(generation, context.stage(NAME))
            searching.take_back(started=True)
        raise


def _deduplicate(
    context: Context, config: DedupConfig, generation: Generation, searching: "Search", embeddings: str | None
) -> Outcome:
    from pipelines import duplicate_inputs
    from pipelines.columns import empty_in

    empty = empty_in(generation.directory)
    known = (
        duplicate_inputs.from_folders(embeddings, config.against, config.representative, empty)
        if embeddings is not None
        else duplicate_inputs.from_run(context, generation, config.representative, empty)
    )
    if known.note:
        context.events.emit("message", NAME, text=known.note)
    return _Dedup(context, config, generation, known, searching).run()


def _inputs(context: Context, config: DedupConfig, embeddings: str | None) -> tuple[list[str], dict[str, Any], bool]:
    """(names of input stages, digests of further inputs, whether there are reference images)."""
    if embeddings is None:
        if config.against:
            raise UserError("--against goes with --embeddings; in a run, `curate import DIR --as reference:NAME` first")
        return ["filter", "score"], {}, any(s.role == "reference" for s in context.run.sources())
    from curation import vectors
    from pipelines import embedded
    from pipelines.duplicate_inputs import reference_name

    opened, _ = embedded.folder_parts(embeddings)
    extra = {"embeddings": embedded.files_digest(p.path for p in opened.partitions)}
    for entry in config.against:
        name, path = reference_name(entry)
        other = vectors.open_folder(path)
        vectors.refuse_other_model(opened, other, embeddings, path)
        extra[f"against {name}"] = embedded.files_digest(p.path for p in other.partitions)
    return [], extra, bool(config.against)


def _options(config: DedupConfig, has_references: bool, lowest: float) -> dict[str, Any]:
    """What decides the tables. Options that only the relative graph reads count only where there is one."""
    options = config.fingerprint_options() | {"store_threshold": lowest}
    if not has_references:
        for name in ("against_threshold", "drop"):
            options.pop(name)
    return options


@dataclass
class _Dedup:
    """One generation of the stage, from the inputs to the tables."""

    context: Context
    config: DedupConfig
    generation: Generation
    inputs: "Inputs"
    searching: "Search"

    def run(self) -> Outcome:
        import numpy as np

        from curation import hidden
        from curation.duplicates import chains, components, forest, members
        from pipelines import duplicate_forgotten, duplicate_inputs
        from pipelines.columns import empty_in
        from pipelines.duplicate_choice import BRIDGED, BRIDGED_LISTED, choose
        from pipelines.duplicate_forests import SWEEP, json_bytes, put_forest, scratch_of, spread_of
        from pipelines.duplicate_relative import FOREST, join_relative

        config, memory_bytes = self.config, self.context.resources.memory_bytes
        most = members.max_piece_rows(memory_bytes, self.inputs.dimension)
        forgotten = self._keep_copies_of_forgotten_out(most)
        inputs = self.inputs
        joints = duplicate_forgotten.joints_of(self.context.run.root, self._searched())
        ids, places = duplicate_forgotten.with_joints(*duplicate_inputs.ranked(inputs.pool), joints.of(0))
        joint = joints.among(ids)
        nodes = forest.Nodes((ids,))
        search_report = self.searching.run(inputs, places, nodes, most)
        self_forest = self.searching.forest(nodes)
        pool = inputs.members(inputs.pool, places, 0, len(ids), most)
        scratch, spread = scratch_of(self.generation, self.context, pool), spread_of(self.context, NAME)
        earlier = [g for g in self.context.stage(NAME).generations() if g.number < self.generation.number]

        place = slice(None) if places is None else places
        fresh = np.zeros(len(ids), bool)
        fresh[place] = inputs.fresh(inputs.pool)
        value = inputs.value
        if value is not None and places is not None:
            value = empty_in(self.generation.directory)(len(ids), value.dtype.str)
            value[:] = -np.inf
            value[place] = inputs.value
        gone = joint & hidden.is_hidden(ids, hidden.forgotten_representatives(self.context.run.root))
        choice = choose(config, pool, self_forest, fresh, value, earlier, scratch, spread, memory_bytes, joint, gone)
        relative = join_relative(
            self.context, config, self.generation, inputs, choice.stays[place], earlier, scratch, most
        )

        put = self.generation.put_file
        put_forest(self.generation, SELF_FOREST, self_forest, nodes)
        if inputs.reference_names:
            put_forest(self.generation, FOREST, forest.chunked(relative.join.forest), relative.nodes)
        sweep = {
            "self": components.sweep(self_forest, len(ids), [t for t in SWEEP if t >= self.searching.lowest]),
            "relative": relative.sweep(inputs.reference_names, config.against_threshold),
        }
        put("thresholds.json", json_bytes(sweep))
        put("recall.json", json_bytes(_recall_document(search_report, relative.join.report)))
        put(BRIDGED, json_bytes(choice.bridged[:BRIDGED_LISTED]))
        told = chains.report(
            choice.links, choice.labels, choice.stays, pool, nodes, config.threshold, spread, joints=joint
        )
        told["cut"] = choice.cuts[: chains.COMPONENTS]
        put("components.json", json_bytes(told))
        put("references.json", json_bytes(relative.decided.sets))
        self._tables(nodes, choice, relative, scratch, self_forest, forgotten, joints)
        kept_out = int(self.generation.total("forgotten"))
        if kept_out:
            text = f"{kept_out:,} images are copies of forgotten ones (cosine above {config.threshold}): kept out"
            self.context.events.emit("message", NAME, text=text)
        outcome = self.context.finish(
            self.generation, self._summary(choice, fresh, relative, search_report, told, earlier)
        )
        scratch.remove()
        self._apart().remove()
        return outcome

    def _searched(self) -> list[str]:
        """The forest of the search that is there, from before this generation or already with it."""
        generations = self.searching.context.stage(SEARCH).generations()
        return generations[-1].part_paths if generations else []

    def _apart(self) -> "Scratch":
        """Scratch of what comes before the search."""
        from curation.duplicates.scratch import Scratch
        from pipelines.duplicate_forests import scratch_folder

        return Scratch(f"{scratch_folder(self.generation, self.context)}-forgotten")

    def _keep_copies_of_forgotten_out(self, most: int) -> "np.ndarray":
        """Take later copies of forgotten images out of the inputs; their ids, ascending."""
        import numpy as np

        from curation.duplicates.tasks import JoinOptions
        from pipelines import duplicate_forgotten
        from pipelines.columns import empty_in
        from pipelines.duplicate_forests import spread_of

        if self.inputs.parts and self.inputs.parts[0].images is None:
            return np.empty(0, np.uint64)
        earlier = [g for g in self.context.stage(NAME).generations() if g.number < self.generation.number]
        options = JoinOptions(self.config.threshold, memory_bytes=self.context.resources.memory_bytes)
        scratch, spread = self._apart(), spread_of(self.context, NAME)
        scratch.prepare({"fingerprint": self.generation.fingerprint.digest})
        run, empty = self.context.run.root, empty_in(self.generation.directory)
        self.inputs, out = duplicate_forgotten.without_copies(
            run, self.inputs, earlier, options, scratch, spread, most, empty
        )
        return out

    def _tables(
        self,
        nodes: "Nodes",
        choice: "Choice",
        relative: "Relative",
        scratch: "Scratch",
        self_forest: "StoredForest",
        forgotten: "np.ndarray",
        joints: "Joints",
    ) -> None:
        """Leave the decisions where the workers find them, and write the rows of this generation's parts."""
        from curation.duplicates import forest
        from pipelines import duplicate_tables
        from pipelines.columns import empty_in

        inputs = self.inputs
        joint = joints.among(nodes.ids[0])
        named = (rows[~joint[rows["low"]] & ~joint[rows["high"]]] for rows in self_forest)
        nearest, similarity = forest.nearest(named, nodes.count, empty_in(self.generation.directory))
        hits = relative.join.hits
        copies, originals = inputs.copies
        scratch.put(
            "decisions",
            {
                "ids": nodes.ids[0],
                "labels": choice.labels,
                "stays": choice.stays,
                "nearest": nearest,
                "similarity": similarity,
                "relative_ids": relative.nodes.ids[0],
                "relative_labels": relative.decided.labels[: len(relative.nodes.ids[0])],
                "dropped": self._dropped(relative),
                "hit_nodes": hits["node"],
                "hit_spaces": relative.nodes.space(hits["reference"]),
                "hit_ids": relative.nodes.image_id(hits["reference"]),
                "hit_similarity": hits["similarity"],
                "copy_ids": copies,
                "copy_originals": originals,
                "forgotten": forgotten,
            },
        )
        exempt = (
            frozenset(s.name for s in self.context.run.sources() if s.exempt) if inputs.parts[0].images else frozenset()
        )
        names = tuple(inputs.reference_names)
        shared = duplicate_tables.Decisions(scratch, names, exempt, bool(names))
        tasks = [(part.name, part) for part in inputs.parts if part.fresh]
        self.context.map_parts(self.generation, tasks, duplicate_tables.write_part, shared=shared)

    def _dropped(self, relative: "Relative") -> "np.ndarray":
        """(images,) bool: discarded by the rule that is asked for."""
        decided = relative.decided
        return decided.by_component if self.config.drop == "component" else decided.direct

    def _summary(
        self,
        choice: "Choice",
        fresh: "np.ndarray",
        relative: "Relative",
        report: Mapping[str, Any],
        told: Mapping[str, Any],
        earlier: Sequence[Generation],
    ) -> dict[str, Any]:
        from curation.duplicates.components import earliest_members
        from pipelines.duplicate_choice import earlier_images

        config, decided, generation = self.config, relative.decided, self.generation
        dropped, largest = self._dropped(relative), told["largest"]
        counts = {name: int(generation.total(name)) for name in ("kept", "self", "reference", "exact", "hash")}
        found: dict[str, Any] = {
            "images": int(fresh.sum()),
            "components": int(earliest_members(choice.labels).sum()),
            "largest_component": largest[0]["images"] if largest else min(1, len(fresh)),
            "kept_by_self": int((choice.stays & fresh).sum()),
            **counts,
            "seeds": int((relative.is_seed & relative.fresh).sum()),
            "seeds_discarded": int((dropped & relative.is_seed & relative.fresh).sum()),
            "discarded_by_component": int((decided.by_component & relative.fresh).sum()),
            "discarded_by_direct_hit": int((decided.direct & relative.fresh).sum()),
            "largest_discarded_component": decided.largest,
            "drop": config.drop,
            "representative": "earliest" if self.inputs.note else config.representative,
            "threshold": config.threshold,
            "against_threshold": config.against_threshold,
            "store_threshold": self.searching.lowest,
            "search": report["method"],
            "recall": round(report["recall"], 5),
            "recall_low": round(report["recall_low"], 5),
            "recall_high": round(report["recall_high"], 5),
            "reference_sets": decided.sets,
            "least_similarity": min((one["least_similarity"] for one in largest), default=None),
            "not_above_threshold_to_representative": told["members"]["not_above_threshold_to_representative"],
        }
        if config.max_component is not None:
            found["components_cut"] = sum(one["pieces"] > 1 for one in choice.cuts)
            found["components_too_large"] = sum(one["uncut"] for one in choice.cuts)
        if config.split == "star":
            found["components_by_stars"] = choice.stars
        if relative.join.report.get("method") == "cells":
            found["relative_recall"] = round(relative.join.report["recall"], 5)
        if generation.total("forgotten"):
            found["forgotten"] = int(generation.total("forgotten"))
        if earlier:
            found["older_components_bridged"] = len(choice.bridged)
            known = earlier_images(earlier, relative.nodes.ids[0], ["reference"])
            there = ~relative.joints.among(relative.nodes.ids[0])
            found["older_images_now_reached"] = int((dropped & ~relative.fresh & ~known & there).sum())
        return found


def _recall_document(self_report: Mapping[str, Any], relative_report: Mapping[str, Any]) -> dict[str, Any]:
    """recall.json: the recall of the self search on top, both searches in full below."""
    return {
        "recall": self_report["recall"],
        "low": self_report["recall_low"],
        "high": self_report["recall_high"],
        "sampled": self_report.get("pairs_measured"),
        "self": dict(self_report),
        "relative": dict(relative_report),
    }
