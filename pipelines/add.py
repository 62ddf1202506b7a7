"""New images for a run that is finished: `curate add RUN URLS`.

The source is appended to the run's configuration and the stages run again. Each takes what is new: the download or
import, the pass over the pixels, the filter, the join of the new images with themselves and all older ones, their
embedding and their assignment to the clusters that are there; the manifest follows as a new generation. Older
representatives stay, unless `re_elect` makes everything from dedup on again from the stored forest. What was added,
which older components new images bridge, and how far the clusters drift is told, and kept in RUN/added/.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from curation import hierarchy, storage, vectors
from curation.errors import UserError
from curation.order import take_hashed
from pipelines import catalog, configuration, embedded, preflight
from pipelines import run as driver
from pipelines.configuration import RunConfig, SourceConfig
from pipelines.context import Context, Outcome
from pipelines.events import Events
from pipelines.run_directory import Generation, RunDirectory
from pipelines.sources import source_name

ADDED = "added"
BEFORE_DEDUP = ("download", "import", "score", "filter", "dedup-search")
DRIFT_ROWS = 200_000
"""Vectors of older and of new images each, in whole parts first in hash order, that mean distances are taken over."""
CLUSTERS_LISTED = 20


@dataclass
class Added:
    """What an addition brought."""

    run: str
    sources: list[str]
    outcomes: list[Outcome]
    images: dict[str, int]
    """Rows of the new generations by stage and what became of them."""
    manifest: dict[str, int]
    """Images of the dataset before and after, and how many of those before are in it no more."""
    re_elected: bool = False
    """Whether all from dedup on was made again: those counts are of the whole pool."""
    bridged: list[dict[str, Any]] = field(default_factory=list)
    """Older components that new images joined: their representatives all stay."""
    drift: list[dict[str, Any]] = field(default_factory=list)
    """Per level, leaf first."""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def add(
    run: str,
    sources: Sequence[SourceConfig],
    *,
    resources: dict[str, Any] | None = None,
    re_elect: bool = False,
    events: Events | None = None,
) -> Added:
    """Add sources to a finished run. The same call again goes on where it was stopped.

    Raises UserError for what is no run, is not finished, or cannot take the source.
    """
    config = stored(run)
    if resources:
        merged = config.resources.model_dump() | resources
        config = config.model_copy(update={"resources": type(config.resources).model_validate(merged)})
    directory = RunDirectory(config.run)
    grown, fresh = with_sources(config, sources)
    names = [source_name(source.role, source.origin[1]) for source in sources]
    before = _numbers(directory)
    if fresh:
        check_finished(directory, config)
        check_reference(directory, config, sources)
        _record(directory, names, {"before": before})
    else:
        before = _recorded(directory, names, before)
    older = before
    if re_elect:
        # From dedup on nothing is older: what is counted is the whole pool.
        older = {folder: count for folder, count in before.items() if folder in BEFORE_DEDUP or folder == "manifest"}
    outcomes = driver.run(grown, rebuild="dedup" if re_elect else None, events=events)
    context = Context(run=directory, seed=config.seed, resources=config.resources, events=events or Events(None))
    found = Added(config.run, names, outcomes, _images(directory, older), _manifest(directory, older), re_elect)
    found.bridged = _bridged(directory, older)
    found.drift = drift(context, older.get("cluster", 0))
    told = {key: value for key, value in found.document().items() if key not in ("run", "outcomes")}
    _record(directory, names, {"before": before} | told)
    return found


def stored(run: str) -> RunConfig:
    """The configuration of a run. Raises UserError where there is none."""
    path = storage.join(run, "run.yaml")
    if not storage.exists(path):
        raise UserError(f"{run}: no run.yaml in it; `curate add` extends a run that `curate run` made")
    config = configuration.load(path)
    # The folder may have been moved since: what is named on the command line is meant.
    return config.model_copy(update={"run": preflight.absolute(run)})


def with_sources(config: RunConfig, sources: Sequence[SourceConfig]) -> tuple[RunConfig, bool]:
    """(the configuration with these sources behind its own, whether one of them is new)."""
    asked = preflight.resolve(config.model_copy(update={"sources": list(sources)})).sources
    known = {source_name(s.role, s.origin[1]): s for s in preflight.resolve(config).sources}
    fresh = []
    for source in asked:
        name = source_name(source.role, source.origin[1])
        if name not in known:
            fresh.append(source)
            known[name] = source
        elif known[name].origin != source.origin:
            raise UserError(
                f"{name} is {known[name].origin[1]} in {config.run}: give {source.origin[1]} a name of its own "
                f"with --as {name.split(':')[0]}:NAME"
            )
    return config.model_copy(update={"sources": [*config.sources, *fresh]}), bool(fresh)


def check_finished(directory: RunDirectory, config: RunConfig) -> None:
    """A later generation begins where all of the earlier ones are whole."""
    for stage in driver.enabled(config):
        if not driver.is_complete(directory, stage.name):
            raise UserError(
                f"{directory.root}: {stage.name} is not finished; `curate run {directory.root}` first, then add"
            )


def check_reference(directory: RunDirectory, config: RunConfig, sources: Sequence[SourceConfig]) -> None:
    """A first reference set needs a forest that goes down to its threshold: known before anything is fetched."""
    if not any(s.role.startswith("reference") for s in sources):
        return
    searches = directory.stage("dedup-search").generations()
    lowest = config.dedup.lowest(True)
    if searches and searches[-1].fingerprint.options["store_threshold"] > lowest:
        raise UserError(
            f"{directory.root} has no reference set so far and its search keeps pairs above "
            f"{searches[-1].fingerprint.options['store_threshold']} only, where {lowest} is needed: list the set in "
            f"{directory.path('run.yaml')} and `curate run {directory.root} --rebuild dedup`"
        )


# ---- what was there before ------------------------------------------------------------------------------------------


def _numbers(directory: RunDirectory) -> dict[str, int]:
    """Complete generations per stage folder."""
    return {folder: len(directory.stage(folder).generations()) for folder in _folders(directory)}


def _folders(directory: RunDirectory) -> Iterator[str]:
    from pipelines import status

    for stage in catalog.STAGES:
        for folder in stage.folders:
            yield from status.folders(directory, folder)


def _record(directory: RunDirectory, names: Sequence[str], document: dict[str, Any]) -> None:
    """RUN/added/NAMES.json: at first what was there before, in the end all that is told."""
    storage.write_whole(_path(directory, names), (json.dumps(document, indent=1) + "\n").encode())


def _recorded(directory: RunDirectory, names: Sequence[str], otherwise: dict[str, int]) -> dict[str, int]:
    """What was there before the first call, where this one goes on after an interruption."""
    path = _path(directory, names)
    if not storage.exists(path):
        return otherwise
    found: dict[str, int] = json.loads(storage.read_bytes(path))["before"]
    return found


def _path(directory: RunDirectory, names: Sequence[str]) -> str:
    return directory.path(ADDED, f"{'+'.join(name.replace(':', '-') for name in names)}.json")


# ---- what was added -------------------------------------------------------------------------------------------------


def _new(directory: RunDirectory, folder: str, before: dict[str, int]) -> list[Generation]:
    return [g for g in directory.stage(folder).generations() if g.number >= before.get(folder, 0)]


def _images(directory: RunDirectory, before: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for stage in ("download", "import"):
        for generation in _new(directory, stage, before):
            _count(found, "listed", sum(part.rows for part in generation.parts))
            _count(found, "fetched", int(generation.total("ok")))
    for generation in _new(directory, "filter", before):
        _count(found, "filtered_out", int(generation.total("dropped")))
    for generation in _new(directory, "dedup", before):
        for reason in ("kept", "self", "reference", "exact", "hash"):
            _count(found, f"dedup_{reason}", int(generation.total(reason)))
    for generation in _new(directory, "cluster", before):
        _count(found, "assigned_to_clusters", sum(part.rows for part in generation.parts))
    return found


def _count(found: dict[str, int], name: str, value: int) -> None:
    found[name] = found.get(name, 0) + value


def _manifest(directory: RunDirectory, before: dict[str, int]) -> dict[str, int]:
    """Rows of the manifest before and now, and how many images it gained and lost (a snapshot replaces the other)."""
    generations = directory.stage("manifest").generations()
    if not generations:
        return {}
    now = generations[-1]
    older = [g for g in generations if g.number < before.get("manifest", 0)]
    rows = sum(part.rows for part in now.parts)
    was = sum(part.rows for part in older[-1].parts) if older else 0
    both = _common(older[-1].part_paths, now.part_paths) if older else 0
    return {"before": was, "now": rows, "gained": rows - both, "lost": was - both}


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many ids two manifests share: their parts are in id order, and are read one at a time."""
    streams = [iter(one), iter(other)]
    held = [np.empty(0, np.uint64), np.empty(0, np.uint64)]
    found = 0
    while True:
        for side, stream in enumerate(streams):
            while not len(held[side]):
                path = next(stream, None)
                if path is None:
                    return found
                (held[side],) = embedded.read_columns(path, ["image_id"])
        end = min(held[0][-1], held[1][-1])
        cuts = [int(np.searchsorted(ids, end, side="right")) for ids in held]
        found += len(np.intersect1d(held[0][: cuts[0]], held[1][: cuts[1]], assume_unique=True))
        held = [ids[cut:] for ids, cut in zip(held, cuts, strict=True)]


def _bridged(directory: RunDirectory, before: dict[str, int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for generation in _new(directory, "dedup", before):
        if "bridged.json" in generation.files:
            found += json.loads(storage.read_bytes(generation.file("bridged.json")))
    return found


# ---- drift ----------------------------------------------------------------------------------------------------------


def drift(context: Context, before: int) -> list[dict[str, Any]]:
    """How new images lie in the clusters that older ones made; before: how many generations of clusters are older.

    Per level, leaf first: mean distance to the centroid of older and of new images (over a sample of each), the share
    of new images that would have to move to be spread as the older ones are (total variation distance), and the
    clusters whose share differs most.
    """
    generations = context.run.stage("cluster").generations()
    older, newer = generations[:before], generations[before:]
    rows = sum(part.rows for g in newer for part in g.parts)
    if not older or not rows:
        return []
    built, _, _ = hierarchy.read_hierarchy(generations[-1].directory)
    stage = next(iter(generations[0].consumed))
    counts = [
        embedded.leaf_sizes(context, [p for g in some for p in g.part_paths], built.levels[0])
        for some in (older, newer)
    ]
    means = [_mean_distances(context, stage, some, built) for some in (older, newer)]
    found = []
    for level, (old, new) in enumerate(zip(built.sizes(counts[0]), built.sizes(counts[1]), strict=True)):
        share = [c / max(1, c.sum()) for c in (old, new)]
        difference = share[1] - share[0]
        most = np.argsort(-np.abs(difference), kind="stable")[:CLUSTERS_LISTED]
        found.append(
            {
                "level": level + 1,
                "clusters": len(old),
                "mean_distance_older": means[0][level],
                "mean_distance_new": means[1][level],
                "moved": round(float(np.abs(difference).sum() / 2), 6),
                "clusters_most_changed": [
                    {"cluster": int(c), "share_older": float(share[0][c]), "share_new": float(share[1][c])}
                    for c in most.tolist()
                ],
            }
        )
    return found


def _mean_distances(
    context: Context, stage: str, generations: Sequence[Generation], built: hierarchy.Hierarchy
) -> list[float]:
    """Mean distance to the centroid of each level, over parts first in hash order that hold DRIFT_ROWS or all rows."""
    where = {p.name: g.writer.path(p.name) for g in context.run.stage(stage).generations() for p in g.parts}
    parts = [(p.name, g.writer.path(p.name), p.rows) for g in generations for p in g.parts if p.rows]
    order = take_hashed(np.arange(len(parts), dtype=np.uint64), len(parts), context.seed, "drift")
    filled = np.cumsum([parts[k][2] for k in order.tolist()])
    taken = order[: int(np.searchsorted(filled, DRIFT_ROWS)) + 1]
    calls = [(parts[k][0], (where[parts[k][0]], parts[k][1])) for k in sorted(taken.tolist())]
    sums, rows = np.zeros(len(built.levels)), 0
    found = dict(context.spread(_distances, calls, shared=built))
    for name, _ in calls:
        sums += found[name][0]
        rows += found[name][1]
    return [round(float(v), 6) for v in sums / max(1, rows)]


def _distances(path: str, clusters: str, built: hierarchy.Hierarchy) -> tuple[np.ndarray, int]:
    """((levels,) float64 sums of distances, rows) of one part."""
    ids, rows = vectors.read_vectors(path, built.dimension)
    known, leaves = embedded.read_columns(clusters, ["image_id", "cluster_1"])
    place = np.searchsorted(ids, known)
    wide = rows[place].astype(np.float32)
    levels = built.path(leaves)
    sums = [
        float(np.linalg.norm((wide - built.centroids[k][at]).astype(np.float64), axis=1).sum())
        for k, at in enumerate(levels)
    ]
    return np.array(sums), len(known)
