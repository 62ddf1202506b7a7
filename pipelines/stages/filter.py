"""Filter: which images stay. `curate filter` runs the pass over the pixels (`score`), then decides from its tables.

Thresholds come first; among what passes them, exact duplicates and then PCA hashes are looked for in the pool (a
seed that repeats a pool image is no drop). In every group the image of an earlier generation stays, else the one
of smallest id. Dropped images keep their row with the reason in `error`. Another threshold repeats the decision alone.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation import blocklist, exact
from curation.schemas import IMAGES
from curation.thresholds import Thresholds
from pipelines import shuffle
from pipelines.context import Context, MadeOtherwiseError, Outcome
from pipelines.duplicate_search import Deciding, DuplicateSearch
from pipelines.duplicate_search import reasons as why_dropped
from pipelines.image_parts import read_images, role
from pipelines.run_directory import Generation, PartRecord, PartWriter
from pipelines.stages import score

NAME = "filter"
REVISION = 1
SCRATCH = "_scratch"


class FilterConfig(score.ScoreConfig):
    """Options of `curate filter`: those named here only decide, those of ScoreConfig need a new pass over pixels."""

    min_side: int | None = Field(
        64,
        ge=1,
        description="shorter side in pixels below which an image is dropped (DataComp's basic filter asks for 200)",
    )
    aspect_ratio: float | None = Field(
        3.0,
        ge=1,
        description="longer side over shorter side above which an image is dropped (3: DataComp's basic filter)",
    )
    solid_colour: float | None = Field(
        1.0,
        ge=0,
        le=128,
        description="standard deviation of the 32x32 luminance (0-128) below which an image is dropped",
    )
    nsfw_threshold: float | None = Field(
        0.8,
        ge=0,
        le=1,
        description="NSFW probability above which an image is dropped (0.8: what open_nsfw's authors call high)",
    )
    pca_hash_distance: int = Field(
        2,
        ge=-1,
        le=15,
        description="bits of 64 in which PCA hashes of two copies may differ; -1: not compared. On 1,500 mixed images "
        "2 finds 92-100 % of resized and recompressed copies and drops 0.07 % wrongly; 4 finds 99 % and drops 0.7 % "
        "(docs/filter.md)",
    )

    def decision_options(self) -> dict[str, Any]:
        """The options that need no new scores: the fingerprint of `filter`."""
        options = self.fingerprint_options()
        return {name: options[name] for name in options if name not in score.ScoreConfig.model_fields}

    def scoring(self) -> score.ScoreConfig:
        """The options of the pass over the pixels."""
        fields = score.ScoreConfig.model_fields
        return score.ScoreConfig.model_validate({name: getattr(self, name) for name in fields})

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.min_side, self.aspect_ratio, self.solid_colour, self.nsfw_threshold)


def execute(context: Context, config: FilterConfig) -> Outcome:
    """Score what was brought in, then decide. Raises UserError if nothing was brought in."""
    _score(context, config)
    generation = context.begin_rows(NAME, REVISION, config.decision_options(), [score.NAME], libraries=("numpy",))
    if generation is None:
        return context.skipped(NAME)
    scratch = generation.file(SCRATCH)
    shuffle.remove(scratch)
    deciding = Deciding(
        thresholds=config.thresholds,
        exempt=frozenset(source.name for source in context.run.sources() if source.exempt),
        scratch=scratch,
        distance=config.pca_hash_distance,
        blocked=blocklist.load(context.run.root),
    )
    names, paths, rows = [], [], 0
    for record, taken in _parts(context, generation):
        names.append(record.name)
        paths.append(taken.writer.path(record.name))
        rows += record.rows
    found = DuplicateSearch(context, generation.number, deciding)
    drops = found.search(paths, rows)
    tasks = [(name, (path, found.of_part(path, drops))) for name, path in zip(names, paths, strict=True)]
    context.map_parts(generation, tasks, decide_part, shared=deciding)
    shuffle.remove(scratch)
    return context.finish(generation, _summary(generation))


def _parts(context: Context, generation: Generation) -> list[tuple[PartRecord, Generation]]:
    """The parts of score that this generation takes, in the order of image ids."""
    taken = [g for g in context.run.stage(score.NAME).generations() if g.number in generation.consumed[score.NAME]]
    return sorted(((record, g) for g in taken for record in g.parts), key=lambda found: found[0].name)


def _score(context: Context, config: FilterConfig) -> None:
    """`--rebuild` makes the decision again; scores are made again only where their own options or inputs differ."""
    if not context.rebuild:
        score.execute(context, config.scoring())
        return
    try:
        score.execute(dataclasses.replace(context, rebuild=False, _started={}), config.scoring())
    except MadeOtherwiseError:
        score.execute(context, config.scoring())


def decide_part(writer: PartWriter, name: str, task: tuple[str, np.ndarray], deciding: Deciding) -> PartRecord:
    """The part with its final status. task: (path in score, (n,) exact.DROP that holds all of its own)."""
    path, drops = task
    table = read_images(path)
    reasons = why_dropped(table, deciding)
    status, error, duplicate_of = (table[column].to_pylist() for column in ("status", "error", "duplicate_of"))
    for row in np.flatnonzero(reasons != "").tolist():
        status[row], error[row] = "dropped", reasons[row]
    ids = table["image_id"].to_numpy()
    place = {int(image): row for row, image in enumerate(ids)}
    for image, original, reason in drops.tolist():
        if image in place:
            row = place[image]
            status[row], error[row], duplicate_of[row] = "dropped", exact.REASONS[reason], original
    changed: Mapping[str, list[Any]] = {"status": status, "error": error, "duplicate_of": duplicate_of}
    arrays = [pa.array(changed[f.name], f.type) if f.name in changed else table[f.name] for f in IMAGES]
    decided = pa.table(arrays, schema=IMAGES)
    return writer.write(name, decided, counts=_counts(decided))


def _counts(table: pa.Table) -> dict[str, float]:
    status, error, source = (table[name].to_pylist() for name in ("status", "error", "source"))
    counts: Counter[str] = Counter(rows=table.num_rows)
    for state, reason, name in zip(status, error, source, strict=True):
        counts[state] += 1
        if state == "dropped":
            counts[f"dropped: {reason}"] += 1
        elif state == "ok":
            counts[f"ok: {role(name)}"] += 1
    return dict(counts)


def _summary(generation: Generation) -> dict[str, Any]:
    """Counts by status; of the dropped by reason, of the rest by role."""
    totals: Counter[str] = Counter()
    for record in generation.parts:
        totals.update({name: int(value) for name, value in record.counts.items()})
    return {"rows": totals.pop("rows", 0), "ok": totals.pop("ok", 0), **dict(sorted(totals.items()))}
