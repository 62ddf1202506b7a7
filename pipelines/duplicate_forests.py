"""The self join of dedup in a folder of its own, and forests on disk.

The fingerprint of the search holds how far down its forest goes, not the threshold that the tables are cut at, so that
another threshold is a re-read. A later generation joins its new images with themselves and all older ones, in the
cells of the first (`cells.bin`): the forest is that of one search over everything in those cells.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from curation import parquet, storage
from curation.duplicates import join
from curation.duplicates.forest import ForestMerger, Nodes, chunked, from_table, to_table
from curation.duplicates.kept import SUFFIX, Kept
from curation.duplicates.members import Members
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, Spread
from pipelines import cluster
from pipelines.context import Context, MadeOtherwiseError
from pipelines.run_directory import Generation, RunDirectory, StageDirectory

if TYPE_CHECKING:
    import numpy as np

    from pipelines.duplicate_inputs import Inputs
    from pipelines.stages.dedup import DedupConfig

SEARCH = "dedup-search"
SEARCH_REVISION = 4
LIBRARIES = ("faiss-cpu", "numpy")
SWEEP = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
CELLS = "cells.bin"
KEPT = "cells"


@dataclass(frozen=True)
class StoredForest:
    """A forest in EDGES files, read file by file: iterating gives (m,) EDGE, together in the forest's order."""

    paths: tuple[str, ...]
    nodes: Nodes

    def __iter__(self) -> Iterator["np.ndarray"]:
        for path in self.paths:
            yield from_table(parquet.read_table(path), self.nodes)


@dataclass
class Search:
    """The self join of one generation of dedup, to be made or there already."""

    context: Context
    generation: Generation | None
    """The generation to make; None: the search is there."""
    lowest: float
    recall: float
    recall_threshold: float
    max_edges: int | None

    @classmethod
    def open(
        cls, context: Context, config: "DedupConfig", inputs: Sequence[str], extra: Mapping[str, Any], references: bool
    ) -> "Search":
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
            forget(self.generation, self.context.stage(SEARCH))

    def run(self, inputs: "Inputs", places: "np.ndarray | None", nodes: Nodes, most: int) -> dict[str, Any]:
        """Make the search if it is not there; the report of the one that made the newest forest.

        nodes: the pool. places: (pool rows,) their nodes. most: rows of a piece.
        """
        earlier = self.context.stage(SEARCH).generations()
        if self.generation is None:
            report: dict[str, Any] = json.loads(storage.read_bytes(earlier[-1].file("recall.json")))
            return report
        # A forest does not say which edges a bound per image left out: with one, everything is searched again.
        again = self.max_edges is not None
        fresh = inputs.generations if again or not earlier else self.generation.consumed["filter"]
        members = inputs.members(inputs.pool, places, 0, nodes.count, most, fresh)
        scratch = scratch_of(self.generation, self.context, members)
        thresholds = [t for t in SWEEP if t >= self.lowest]
        found = join.self_join(
            members,
            nodes.ids[0],
            self._options(),
            scratch,
            spread_of(self.context, SEARCH),
            thresholds,
            **stored_cells(earlier, CELLS),
            **self._keeping(earlier),
        )
        merger = ForestMerger(nodes.count)
        merger.add(found.forest)
        if earlier and not again:
            for rows in StoredForest(tuple(earlier[-1].part_paths), nodes):
                merger.add(rows)
        put_cells(self.generation, CELLS, getattr(found, "cells", None), earlier)
        self.generation.files |= {f"{KEPT}/{name}": dict(record) for name, record in found.kept.items()}
        self._write(merger.result(), nodes, found.report)
        scratch.remove()
        return found.report

    def forest(self, nodes: Nodes) -> StoredForest:
        """The forest of the pool above the stored threshold, after `run`."""
        return StoredForest(tuple(self.context.stage(SEARCH).generations()[-1].part_paths), nodes)

    def _keeping(self, earlier: Sequence[Generation]) -> dict[str, Any]:
        """The argument `keep` of the join, where another generation can come after this one."""
        assert self.generation is not None
        if "filter" not in self.generation.consumed or self.max_edges is not None:
            return {}
        known = {
            name.removeprefix(f"{KEPT}/").removesuffix(SUFFIX): generation.file(name)
            for generation in earlier
            for name in generation.files
            if name.startswith(f"{KEPT}/")
        }
        return {"keep": Kept(self.generation.file(KEPT), known)}

    def _options(self) -> JoinOptions:
        return JoinOptions(
            self.lowest,
            self.recall,
            self.recall_threshold,
            self.context.seed,
            "self",
            self.max_edges,
            self.context.resources.memory_bytes,
        )

    def _write(self, forest: "np.ndarray", nodes: Nodes, report: Mapping[str, Any]) -> None:
        assert self.generation is not None
        generation = self.generation
        generation.put_file("recall.json", json_bytes(report))
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


def stored_cells(earlier: Sequence[Generation], name: str) -> dict[str, Any]:
    """The argument `cells` of a join: those that an earlier generation stored, if one did."""
    if not earlier or name not in earlier[-1].files:
        return {}
    return {"cells": join.Cells.from_bytes(storage.read_bytes(earlier[-1].file(name)))}  # type: ignore[attr-defined]


def put_cells(generation: Generation, name: str, cells: Any, earlier: Sequence[Generation]) -> None:
    """Store the cells of a join; a join that needed none hands on those of before."""
    if cells is not None:
        generation.put_file(name, cells.to_bytes())
    elif earlier and name in earlier[-1].files:
        generation.put_file(name, storage.read_bytes(earlier[-1].file(name)))


def put_forest(generation: Generation, folder: str, forest: Iterable["np.ndarray"], nodes: Nodes) -> None:
    """Write a forest beside the parts of a generation. forest: its pieces in order."""
    for number, rows in enumerate(forest):
        generation.put_file(f"{folder}/part-{number:05d}.parquet", storage.table_bytes(to_table(rows, nodes)))


def side_forest(generation: Generation, folder: str, nodes: Nodes) -> StoredForest:
    """A forest that `put_forest` wrote."""
    return StoredForest(tuple(forest_paths(generation, folder)), nodes)


def forest_paths(generation: Generation, folder: str) -> list[str]:
    """The files of a forest that `put_forest` wrote."""
    return [generation.file(name) for name in sorted(generation.files) if name.startswith(f"{folder}/")]


def spread_of(context: Context, stage: str) -> Spread:
    """The context's `spread`, telling the progress display how far each round of tasks is."""

    def run(
        function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]], *, shared: Any = None
    ) -> Iterable[tuple[str, Any]]:
        listed = list(calls)
        if not listed:
            return
        what = function.__name__.strip("_").replace("_", " ")
        context.events.emit("parts", stage, total=len(listed), done=0, note=what)
        for done, (name, result) in enumerate(context.spread(function, listed, shared=shared), 1):
            context.events.emit("part", stage, part=name, rows=0, done=done, total=len(listed), note=what)
            yield name, result

    return run


def scratch_folder(generation: Generation, context: Context) -> str:
    """Where the scratch of a generation lies: beside its parts; where the run is on an object store in
    `resources.scratch`, or in the temporary folder of this machine. Raises UserError where a machine of the cluster
    does not see it."""
    if storage.is_local(generation.directory):
        folder = generation.file("scratch")
    else:
        digest = generation.fingerprint.digest
        folder = f"{context.resources.scratch or tempfile.gettempdir()}/curate-{digest[:24]}"
        if context.resources.ray_address is not None:
            context.start()
            cluster.require_seen(os.path.dirname(folder), "resources.scratch")
    return storage.filesystem(folder)[1]


def scratch_of(generation: Generation, context: Context, members: Members) -> Scratch:
    """Scratch of a generation; what was left in it of other work is removed."""
    scratch = Scratch(scratch_folder(generation, context))
    digest = generation.fingerprint.digest
    # How work is cut is part of the key: the fingerprint says which vectors, these say which task has which.
    pieces = [[piece.rows, piece.fresh] for piece in members.pieces]
    key = {"fingerprint": digest, "memory": context.resources.memory_bytes, "pieces": pieces}
    scratch.prepare(key)
    return scratch


def forget(generation: Generation | None, directory: StageDirectory) -> None:
    """Take back a first generation that bad input stopped, so that the mended input is not refused as a change."""
    if generation is not None and generation.number == 0 and not generation.complete:
        storage.remove_folder(generation.file("scratch"))
        directory.clear()


def json_bytes(document: Any) -> bytes:
    """A small document as a stage writes it."""
    return (json.dumps(document, indent=1) + "\n").encode()
