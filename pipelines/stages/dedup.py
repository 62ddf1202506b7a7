"""Dedup: near-duplicate components of the pool, then what the reference sets discard of what is left.

Two graphs. The search (its own folder `dedup-search`) joins the pool above `store_threshold` and keeps the maximum
spanning forest, so that a higher threshold is a re-read: `--rebuild` makes the tables again and keeps a search that
covers what is asked. The relative graph (kept pool images, seeds that are not exempt, reference images) belongs to one
self threshold and is joined again with it. A later generation joins its new images with themselves and all older ones;
rows written before stay as they are.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from curation import storage
from curation.errors import UserError
from pipelines.context import Context, MadeOtherwiseError, Outcome, StageConfig
from pipelines.run_directory import Generation, RunDirectory, StageDirectory

if TYPE_CHECKING:
    import numpy as np

    from curation.duplicates.forest import Nodes
    from curation.duplicates.join import JoinOptions, Spread
    from curation.duplicates.members import Members
    from curation.duplicates.relative import Decontamination, RelativeJoin
    from curation.duplicates.scratch import Scratch
    from pipelines.duplicate_inputs import Inputs, Rows

NAME = "dedup"
REVISION = 1
SEARCH = "dedup-search"
SEARCH_REVISION = 1
LIBRARIES = ("faiss-cpu", "numpy")
SWEEP = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
ASKED_WRONGLY = 2
SELF_FOREST, RELATIVE_FOREST = "self_forest", "relative_forest"


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
        None, ge=1, description="keep at most so many edges per image, as the paper does (64); a k cuts groups apart"
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
    searching = _Search.open(context, config, inputs, extra, has_references)
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
            _forget(generation, context.stage(NAME))
            searching.take_back(started=True)
        raise


def _deduplicate(
    context: Context, config: DedupConfig, generation: Generation, searching: "_Search", embeddings: str | None
) -> Outcome:
    from pipelines import duplicate_inputs

    known = (
        duplicate_inputs.from_folders(embeddings, config.against, config.representative)
        if embeddings is not None
        else duplicate_inputs.from_run(context, generation, config.representative)
    )
    if known.note:
        context.events.emit("message", NAME, text=known.note)
    return _Dedup(context, config, generation, known, searching).run()


def _forget(generation: Generation | None, directory: StageDirectory) -> None:
    """Take back a first generation that bad input stopped, so that the mended input is not refused as a change."""
    if generation is not None and generation.number == 0 and not generation.complete:
        fs, scratch = storage.filesystem(generation.file("scratch"))
        if fs.exists(scratch):
            fs.rm(scratch, recursive=True)
        directory.clear()


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


def _spread(context: Context, stage: str) -> "Spread":
    """The context's `spread`, telling the progress display how far each round of tasks is."""

    def run(
        function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]], *, shared: Any = None
    ) -> Iterable[tuple[str, Any]]:
        listed = list(calls)
        if not listed:
            return
        what = function.__name__.replace("_", " ")
        context.events.emit("parts", stage, total=len(listed), done=0, note=what)
        for done, (name, result) in enumerate(context.spread(function, listed, shared=shared), 1):
            context.events.emit("part", stage, part=name, rows=0, done=done, total=len(listed), note=what)
            yield name, result

    return run


def _scratch(generation: Generation, context: Context, members: "Members") -> "Scratch":
    """Scratch of a generation: beside its parts, or in the temporary folder where the run is on an object store."""
    from curation.duplicates.scratch import Scratch

    digest = generation.fingerprint.digest
    inside = storage.is_local(generation.directory)
    folder = generation.file("scratch") if inside else f"{tempfile.gettempdir()}/curate-{digest[:24]}"
    scratch = Scratch(storage.filesystem(folder)[1])
    # How work is cut is part of the key: the fingerprint says which vectors, these say which task has which.
    pieces = [[piece.rows, piece.fresh] for piece in members.pieces]
    key = {"fingerprint": digest, "memory": context.resources.memory_bytes, "pieces": pieces}
    scratch.prepare(key)
    return scratch


def _put_forest(generation: Generation, folder: str, forest: "np.ndarray", nodes: "Nodes") -> None:
    from curation.duplicates.forest import chunked, to_table

    for number, rows in enumerate(chunked(forest)):
        generation.put_file(f"{folder}/part-{number:05d}.parquet", storage.table_bytes(to_table(rows, nodes)))


def _read_forest(paths: Sequence[str], nodes: "Nodes") -> "np.ndarray":
    """The forest in these EDGES files, without ends that are no nodes any more."""
    import numpy as np
    import pyarrow.parquet as pq

    from curation.duplicates.forest import EDGE, from_table
    from curation.vectors import open_parquet

    parts = [from_table(pq.read_table(open_parquet(path)), nodes) for path in paths]
    return np.concatenate([np.empty(0, EDGE), *parts])


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


@dataclass
class _Search:
    """The self join in its own folder: its fingerprint holds how far down the forest goes, not the threshold."""

    context: Context
    generation: Generation | None
    """The generation to make; None: the search is there."""
    lowest: float
    recall: float
    recall_threshold: float
    max_edges: int | None

    @classmethod
    def open(
        cls, context: Context, config: DedupConfig, inputs: Sequence[str], extra: Mapping[str, Any], references: bool
    ) -> "_Search":
        """Take up the search that is there if it covers what is asked; `--rebuild` replaces one that does not."""
        inside = replace(context, run=RunDirectory(context.run.root), out=None, rebuild=False)
        options: dict[str, Any] = {
            "store_threshold": config.lowest(references),
            "recall": config.recall,
            "recall_threshold": config.threshold,
            "max_edges": config.max_edges,
        }
        there = inside.stage(SEARCH).all_generations()
        if there and _covers(there[-1].fingerprint.options, options):
            options = {name: there[-1].fingerprint.options[name] for name in options}
        digests = {name: value for name, value in extra.items() if not name.startswith("against ")}

        def begin() -> Generation | None:
            return inside.begin_rows(SEARCH, SEARCH_REVISION, options, inputs, LIBRARIES, digests)

        try:
            generation = begin()
        except MadeOtherwiseError:
            if not context.rebuild:
                raise
            inside.stage(SEARCH).clear()
            generation = begin()
        return cls(
            inside,
            generation,
            options["store_threshold"],
            options["recall"],
            options["recall_threshold"],
            options["max_edges"],
        )

    def take_back(self, started: bool) -> None:
        """Remove a first generation that was opened in vain. started: also one with work in its scratch."""
        if self.generation is not None and (started or not storage.exists(self.generation.file("scratch"))):
            _forget(self.generation, self.context.stage(SEARCH))

    def run(self, members: "Members", nodes: "Nodes") -> tuple["np.ndarray", dict[str, Any]]:
        """The forest of the pool above the stored threshold, and the report of the search that made it."""
        from curation.duplicates.forest import ForestMerger
        from curation.duplicates.join import self_join

        earlier = self.context.stage(SEARCH).generations()
        if self.generation is None:
            report = json.loads(storage.read_bytes(earlier[-1].file("recall.json")))
            return _read_forest(earlier[-1].part_paths, nodes), report
        options = self._join_options()
        scratch = _scratch(self.generation, self.context, members)
        thresholds = [t for t in SWEEP if t >= self.lowest]
        found = self_join(members, nodes.ids[0], options, scratch, _spread(self.context, SEARCH), thresholds)
        merger = ForestMerger(nodes.count)
        merger.add(found.forest)
        if earlier:
            merger.add(_read_forest(earlier[-1].part_paths, nodes))
        forest = merger.result()
        self._write(forest, nodes, found.report)
        scratch.remove()
        return forest, found.report

    def _join_options(self) -> "JoinOptions":
        from curation.duplicates.join import JoinOptions

        return JoinOptions(
            self.lowest,
            self.recall,
            self.recall_threshold,
            self.context.seed,
            "self",
            self.max_edges,
            self.context.resources.memory_bytes,
        )

    def _write(self, forest: "np.ndarray", nodes: "Nodes", report: Mapping[str, Any]) -> None:
        from curation.duplicates.forest import chunked, to_table

        assert self.generation is not None
        generation = self.generation
        generation.put_file("recall.json", _json(report))
        generation.parts = [
            generation.writer.write(f"part-{number:05d}", to_table(rows, nodes))
            for number, rows in enumerate(chunked(forest))
        ]
        keys = ("method", "vectors", "fresh", "recall", "recall_low", "recall_high")
        self.context.finish(generation, {"edges": len(forest)} | {key: report[key] for key in keys})


def _covers(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return bool(
        have.get("store_threshold", 1) <= wanted["store_threshold"]
        and have.get("recall", 0) >= wanted["recall"]
        and have.get("recall_threshold", 1) <= wanted["recall_threshold"]
        and have.get("max_edges") == wanted["max_edges"]
    )


@dataclass
class _Dedup:
    """One generation of the stage, from the inputs to the tables."""

    context: Context
    config: DedupConfig
    generation: Generation
    inputs: "Inputs"
    searching: _Search

    def run(self) -> Outcome:
        import numpy as np

        from curation.duplicates import chains, components, forest, members
        from pipelines import duplicate_inputs, duplicate_tables

        config, inputs = self.config, self.inputs
        spread = _spread(self.context, NAME)
        ids, places = duplicate_inputs.ranked(inputs.pool)
        nodes = forest.Nodes((ids,))
        rows_at_once = members.max_piece_rows(self.context.resources.memory_bytes, inputs.dimension)
        pool = inputs.members(inputs.pool, places, 0, len(ids), rows_at_once)
        self_forest, search_report = self.searching.run(pool, nodes)
        scratch = _scratch(self.generation, self.context, pool)

        labels = components.components(self_forest, len(ids), config.threshold)
        place = np.arange(len(ids)) if places is None else places.astype(np.int64)
        fresh = np.zeros(len(ids), bool)
        fresh[place] = self._fresh(inputs.pool)
        stays, bridged = self._representatives(pool, labels, fresh, place, ids, scratch)
        relative = self._relative(stays[place], scratch, rows_at_once)

        _put_forest(self.generation, SELF_FOREST, self_forest, nodes)
        if inputs.reference_names:
            _put_forest(self.generation, RELATIVE_FOREST, relative.join.forest, relative.nodes)
        sweep = self._sweep(self_forest, len(ids), relative)
        self.generation.put_file("thresholds.json", _json(sweep))
        self.generation.put_file("recall.json", _json(_recall_document(search_report, relative.join.report)))
        self.generation.put_file("bridged.json", _json(bridged[:1000]))
        largest = chains.largest_components(self_forest, labels, stays, pool, nodes, config.threshold, spread)
        self.generation.put_file("components.json", _json(largest))
        self.generation.put_file("references.json", _json(relative.decided.sets))

        nearest, similarity = forest.nearest(self_forest, len(ids))
        dropped = relative.decided.by_component if config.drop == "component" else relative.decided.direct
        hits = relative.join.hits
        copies, originals = inputs.copies
        scratch.put(
            "decisions",
            {
                "ids": ids,
                "labels": labels,
                "stays": stays,
                "nearest": nearest,
                "similarity": similarity,
                "relative_ids": relative.nodes.ids[0],
                "relative_labels": relative.decided.labels[: len(relative.nodes.ids[0])],
                "dropped": dropped,
                "hit_nodes": hits["node"],
                "hit_spaces": relative.nodes.space(hits["reference"]),
                "hit_ids": relative.nodes.image_id(hits["reference"]),
                "hit_similarity": hits["similarity"],
                "copy_ids": copies,
                "copy_originals": originals,
            },
        )
        exempt = (
            frozenset(s.name for s in self.context.run.sources() if s.exempt) if inputs.parts[0].images else frozenset()
        )
        shared = duplicate_tables.Decisions(
            scratch, tuple(inputs.reference_names), exempt, bool(inputs.reference_names)
        )
        tasks = [(part.name, part) for part in inputs.parts if part.fresh]
        self.context.map_parts(self.generation, tasks, duplicate_tables.write_part, shared=shared)
        outcome = self.context.finish(
            self.generation, self._summary(labels, stays, fresh, relative, search_report, len(bridged), largest)
        )
        scratch.remove()
        return outcome

    def _fresh(self, rows: "Rows") -> "np.ndarray":
        """(n,) bool: rows of this generation, in the order of `rows`."""
        import numpy as np

        parts = [np.full(len(i), self.inputs.parts[p].fresh) for p, i in zip(rows.parts, rows.ids, strict=True)]
        return np.concatenate([np.empty(0, bool), *parts])

    def _representatives(
        self,
        pool: "Members",
        labels: "np.ndarray",
        fresh: "np.ndarray",
        place: "np.ndarray",
        ids: "np.ndarray",
        scratch: "Scratch",
    ) -> tuple["np.ndarray", list[dict[str, Any]]]:
        """((n,) bool who stays by the self graph, the older components that new images joined to one).

        Representatives that an earlier generation chose stay; new images choose only where there is none.
        """
        import numpy as np

        from curation.duplicates import components, medoid

        before = self._earlier_representatives(ids)
        if self.config.representative == "medoid":
            chosen = medoid.medoids(
                pool, labels, scratch, _spread(self.context, NAME), self.context.resources.memory_bytes
            )
        elif self.inputs.value is not None:
            value = np.empty(len(ids), self.inputs.value.dtype)
            value[place] = self.inputs.value
            chosen = components.best_members(labels, value)
        else:
            chosen = components.earliest_members(labels)
        count = np.bincount(labels[before], minlength=len(ids))
        stays = before | (chosen & (count[labels] == 0) & fresh)
        olds = np.flatnonzero(before & (count[labels] > 1))
        groups: dict[int, list[int]] = {}
        for node in olds.tolist():
            groups.setdefault(int(ids[labels[node]]), []).append(int(ids[node]))
        return stays, [{"component_id": key, "representatives": value} for key, value in sorted(groups.items())]

    def _earlier(self) -> list[Generation]:
        return [g for g in self.context.stage(NAME).generations() if g.number < self.generation.number]

    def _earlier_representatives(self, ids: "np.ndarray") -> "np.ndarray":
        import numpy as np
        import pyarrow.parquet as pq

        from curation.vectors import open_parquet

        found = np.zeros(len(ids), bool)
        for path in (path for generation in self._earlier() for path in generation.part_paths):
            table = pq.read_table(open_parquet(path), columns=["image_id", "reason"])
            reason = table["reason"].to_numpy(zero_copy_only=False)
            mine = table["image_id"].to_numpy()[(reason == "kept") | (reason == "reference")]
            at = np.minimum(np.searchsorted(ids, mine), max(0, len(ids) - 1))
            if len(ids):
                found[at[ids[at] == mine]] = True
        return found

    def _relative(self, stays: "np.ndarray", scratch: "Scratch", rows_at_once: int) -> "_Relative":
        """The relative graph. stays: (pool rows,) bool in the order of the inputs."""
        import numpy as np

        from curation.duplicates import forest, relative
        from curation.duplicates.join import JoinOptions
        from curation.duplicates.scratch import Scratch
        from pipelines import duplicate_inputs

        config, inputs = self.config, self.inputs
        images = duplicate_inputs.merged(inputs.pool.where(stays), inputs.seeds)
        ids, places = duplicate_inputs.ranked(images)
        ranked = [duplicate_inputs.ranked(rows) for rows in inputs.references]
        nodes = forest.Nodes((ids, *(i for i, _ in ranked)))
        offsets = nodes.offsets
        if nodes.count == len(ids):
            joined = relative.empty_relative()
        else:
            joined = relative.relative_join(
                inputs.members(images, places, 0, nodes.count, rows_at_once),
                inputs.reference_members([p for _, p in ranked], offsets, rows_at_once),
                ids,
                offsets,
                JoinOptions(
                    config.against_threshold,
                    config.recall,
                    None,
                    self.context.seed,
                    "relative",
                    config.max_edges,
                    self.context.resources.memory_bytes,
                ),
                Scratch(f"{scratch.directory}/relative"),
                _spread(self.context, NAME),
                [t for t in SWEEP if t >= config.against_threshold],
            )
        earlier = self._earlier()
        if earlier:
            stored = [p for p in sorted(earlier[-1].files) if p.startswith(f"{RELATIVE_FOREST}/")]
            merger = forest.ForestMerger(nodes.count)
            merger.add(joined.forest)
            merger.add(_read_forest([earlier[-1].file(p) for p in stored], nodes))
            joined = replace(joined, forest=merger.result())
        place = np.arange(len(ids)) if places is None else places.astype(np.int64)
        fresh = np.zeros(len(ids), bool)
        fresh[place] = self._fresh(images)
        decided = relative.decontaminate(
            joined.forest, joined.hits, joined.references_hit, offsets, inputs.reference_names, config.against_threshold
        )
        is_seed = np.isin(ids, inputs.seeds.all_ids())
        return _Relative(nodes, joined, decided, fresh, is_seed)

    def _sweep(self, self_forest: "np.ndarray", count: int, relative: "_Relative") -> dict[str, Any]:
        """What other thresholds would give, re-read from the forests."""
        from curation.duplicates import components
        from curation.duplicates.relative import decontaminate

        found: dict[str, Any] = {
            "self": components.sweep(self_forest, count, [t for t in SWEEP if t >= self.searching.lowest]),
            "relative": [],
        }
        for threshold in (t for t in SWEEP if t >= self.config.against_threshold and self.inputs.reference_names):
            join = relative.join
            other = decontaminate(
                join.forest,
                join.hits,
                join.references_hit,
                relative.nodes.offsets,
                self.inputs.reference_names,
                threshold,
            )
            found["relative"].append(
                {
                    "threshold": threshold,
                    "component": int(other.by_component.sum()),
                    "direct": int(other.direct.sum()),
                    "largest": other.largest,
                }
            )
        return found

    def _summary(
        self,
        labels: "np.ndarray",
        stays: "np.ndarray",
        fresh: "np.ndarray",
        relative: "_Relative",
        report: Mapping[str, Any],
        bridged: int,
        largest: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        config, decided, generation = self.config, relative.decided, self.generation
        dropped = decided.by_component if config.drop == "component" else decided.direct
        counts = {name: int(generation.total(name)) for name in ("kept", "self", "reference", "exact", "hash")}
        found: dict[str, Any] = {
            "images": int(fresh.sum()),
            "components": int((labels == _range(labels)).sum()),
            "largest_component": largest[0]["images"] if largest else min(1, len(labels)),
            "kept_by_self": int((stays & fresh).sum()),
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
        }
        if relative.join.report.get("method") == "cells":
            found["relative_recall"] = round(relative.join.report["recall"], 5)
        if self.generation.number:
            found["older_components_bridged"] = bridged
            found["older_images_now_reached"] = int((dropped & ~relative.fresh & ~self._was_dropped(relative)).sum())
        return found

    def _was_dropped(self, relative: "_Relative") -> "np.ndarray":
        """(images,) bool: rows that an earlier generation wrote as `reference`."""
        import numpy as np
        import pyarrow.parquet as pq

        from curation.vectors import open_parquet

        ids = relative.nodes.ids[0]
        found = np.zeros(len(ids), bool)
        for path in (path for generation in self._earlier() for path in generation.part_paths):
            table = pq.read_table(open_parquet(path), columns=["image_id", "reason"])
            mine = table["image_id"].to_numpy()[table["reason"].to_numpy(zero_copy_only=False) == "reference"]
            found |= np.isin(ids, mine)
        return found


@dataclass
class _Relative:
    """The relative graph of one generation: nodes, edges, decisions."""

    nodes: "Nodes"
    join: "RelativeJoin"
    decided: "Decontamination"
    fresh: "np.ndarray"
    """(images,) bool: of this generation."""
    is_seed: "np.ndarray"


def _range(labels: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return np.arange(len(labels), dtype=labels.dtype)


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
