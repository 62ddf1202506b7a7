"""Mix: seed sets as they are, retrieved and balanced images, one row per image with its weight (curation/mixing.py).

The image ids are cut into ranges of at most about a million images; a range is one task and one part, so that the
parts are sorted by image_id and no process holds all rows.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from curation import hidden, mixing
from curation.blocklist import REASON
from curation.errors import UserError
from curation.schemas import SOURCE_SHIFT
from pipelines.context import Context, Outcome, StageConfig
from pipelines.embedded import read_columns, source_number
from pipelines.run_directory import Generation, PartRecord, PartWriter

NAME = "mix"
REVISION = 1
LIBRARIES = ("numpy",)
HIDDEN = "hidden"
"""Of the fingerprint: another list of hidden images makes the next generation."""
INPUTS = ["filter", "dedup", "retrieve", "balance"]
BUCKET_SHIFT = 17
"""Ids are counted in buckets of 2^17; whole buckets make a part."""
PART_ROWS = 1_000_000


class MixConfig(StageConfig):
    """Options of `curate mix`."""

    as_is: list[str] = Field(["all"], description="seed sets that enter as they are: all, none, or their names")
    weight: Literal["unique", "nominal"] = Field(
        "unique", description="unique: every image 1; nominal: times it was brought (the paper's count)"
    )
    shares: dict[str, float] | None = Field(
        None, description="parts of 1 by seed, retrieve, balance or full names (retrieve:birds): weights that give them"
    )

    @field_validator("as_is", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        return [] if value == ["none"] else value

    @model_validator(mode="after")
    def _one_weighting(self) -> "MixConfig":
        if self.shares is not None and self.weight == "nominal":
            raise ValueError("weight: nominal and shares exclude each other; give one of them")
        return self


@dataclass(frozen=True)
class Input:
    """One table part that brings images. kind: seed, retrieve or balance; low, high: its smallest and largest id."""

    kind: Literal["seed", "retrieve", "balance"]
    path: str
    low: int = 0
    high: int = 0


@dataclass(frozen=True)
class Plan:
    """What all tasks share. names: the sources of the mix; seeds: source number -> index in names."""

    names: list[str]
    seeds: Mapping[int, int]
    exempt: frozenset[int]
    dedup: list[Input]
    inputs: list[Input]
    hidden: np.ndarray
    """(n,) uint64, sorted: images that were forgotten or that an auditor dropped; nothing brings them."""


@dataclass(frozen=True)
class Weighting:
    """How weights are made: by `groups` of sources when shares are asked for."""

    weight: Literal["unique", "nominal"]
    group_of: np.ndarray | None = None
    per_group: np.ndarray | None = None


def execute(context: Context, config: MixConfig) -> Outcome:
    """Mix what the run's seed sets, `retrieve` and `balance` bring. Raises UserError if that is nothing."""
    plan = _plan(context, config)
    _refuse_shares_of_nothing(config, plan)
    renewed_by = {HIDDEN: hidden.digest(plan.hidden)}
    generation = context.begin_snapshot(
        NAME, REVISION, config.fingerprint_options(), INPUTS, LIBRARIES, renewed_by=renewed_by
    )
    if generation is None:
        return context.skipped(NAME)
    plan, ranges = _ranges(context, plan)
    weighting = _weighting(context, config, plan, ranges)
    tasks = [(f"part-{index:06d}", bounds) for index, bounds in enumerate(ranges)]
    context.map_parts(generation, tasks, _mix_part, shared=(plan, weighting))
    return context.finish(generation, _summary(config, context, plan, generation))


def _plan(context: Context, config: MixConfig) -> Plan:
    seeds = [source for source in context.run.sources() if source.role == "seed"]
    labels = [source.label for source in seeds]
    for name in config.as_is:
        if name != "all" and name not in labels:
            close = difflib.get_close_matches(name, labels, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(labels) or 'none'}"
            raise UserError(f"mix.as_is: no seed set `{name}`; {hint}")
    chosen = [source for source in seeds if "all" in config.as_is or source.label in config.as_is]
    names = list(dict.fromkeys(source.name for source in chosen))
    index = {name: i for i, name in enumerate(names)}
    numbers = {source.number for source in chosen}
    inputs = [Input("seed", path) for path in _parts_of(context, "filter", numbers)]
    retrieved = _newest(context, "retrieve")
    if retrieved is not None:
        names += [f"retrieve:{name}" for name in retrieved.summary["seed_sets"]]
        inputs += [Input("retrieve", path) for path in retrieved.part_paths]
    balanced = _newest(context, "balance")
    if balanced is not None:
        names.append("balance")
        inputs += [Input("balance", path) for path in balanced.part_paths]
    if not names:
        raise UserError(
            "mix: nothing to mix: no seed set enters as it is, and neither `curate retrieve` nor `curate balance` "
            "has run; run one of them first"
        )
    dedup = [Input("seed", path) for path in _parts_of(context, "dedup", numbers)]
    exempt = frozenset(source.number for source in chosen if source.exempt)
    seeds_of = {source.number: index[source.name] for source in chosen}
    return Plan(names, seeds_of, exempt, dedup, inputs, hidden.hidden_ids(context.run.root))


def _parts_of(context: Context, stage: str, sources: set[int]) -> list[str]:
    """The parts that hold rows of these sources."""
    return [
        generation.writer.path(part.name)
        for generation in context.run.stage(stage).generations()
        for part in generation.parts
        if source_number(part.name) in sources
    ]


def _newest(context: Context, stage: str) -> Generation | None:
    generations = context.run.stage(stage).generations()
    return generations[-1] if generations else None


def _refuse_shares_of_nothing(config: MixConfig, plan: Plan) -> None:
    if config.shares is not None:
        mixing.share_groups(plan.names, config.shares)


# ---- ranges of ids --------------------------------------------------------------------------------------------------


def _ranges(context: Context, plan: Plan) -> tuple[Plan, list[tuple[int, int]]]:
    """The plan with the bounds of its parts, and the ranges [low, high) of ids that become parts."""
    counts: dict[int, int] = {}
    dedup = [one for _, one in _measured(context, plan.dedup, plan)]
    inputs = []
    for found, one in _measured(context, plan.inputs, plan):
        inputs.append(one)
        for bucket, rows in zip(*found, strict=True):
            counts[int(bucket)] = counts.get(int(bucket), 0) + int(rows)
    ranges: list[tuple[int, int]] = []
    rows = PART_ROWS
    for bucket in sorted(counts):
        # An id is brought at most as often as rows say, and a bucket has so many ids at most.
        images = min(counts[bucket], 1 << BUCKET_SHIFT)
        low, high = bucket << BUCKET_SHIFT, (bucket + 1) << BUCKET_SHIFT
        if rows + images > PART_ROWS:
            ranges.append((low, high))
            rows = images
        else:
            ranges[-1] = (ranges[-1][0], high)
            rows += images
    return replace(plan, dedup=_with_rows(dedup), inputs=_with_rows(inputs)), ranges


def _with_rows(inputs: Sequence[Input]) -> list[Input]:
    return [one for one in inputs if one.high >= one.low]


def _measured(
    context: Context, inputs: Sequence[Input], plan: Plan
) -> list[tuple[tuple[np.ndarray, np.ndarray], Input]]:
    """((buckets, rows in each), the input with its bounds) of each input, in their order."""
    calls = ((str(i), (one, frozenset(plan.seeds))) for i, one in enumerate(inputs))
    found = dict(context.spread(_measure, calls))
    return [found[str(i)] for i in range(len(inputs))]


def _measure(one: Input, seeds: frozenset[int], _: None) -> tuple[tuple[np.ndarray, np.ndarray], Input]:
    ids = read_columns(one.path, ["image_id"])[0]
    if one.kind == "seed":
        ids = ids[np.isin(ids >> np.uint64(SOURCE_SHIFT), np.array(sorted(seeds), np.uint64))]
    if not len(ids):
        return (np.empty(0, np.uint64), np.empty(0, np.int64)), Input(one.kind, one.path, 0, -1)
    buckets, rows = np.unique(ids >> np.uint64(BUCKET_SHIFT), return_counts=True)
    return (buckets, rows), Input(one.kind, one.path, int(ids.min()), int(ids.max()))


# ---- one range ------------------------------------------------------------------------------------------------------


def _brought(plan: Plan, bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(image_id, source index) of every time a source brings an image of the range [low, high)."""
    low, high = bounds
    ids: list[np.ndarray] = [np.empty(0, np.uint64)]
    kinds: list[np.ndarray] = [np.empty(0, np.int64)]
    index = {name: i for i, name in enumerate(plan.names)}
    rejected = _rejected(plan, bounds)
    for one in plan.inputs:
        if one.high < low or one.low >= high:
            continue
        if one.kind == "seed":
            found, status = read_columns(one.path, ["image_id", "status"])
            number = (found >> np.uint64(SOURCE_SHIFT)).astype(np.int64)
            source = np.array([plan.seeds.get(int(n), -1) for n in np.unique(number)])
            kind = source[np.searchsorted(np.unique(number), number)]
            fits = (kind >= 0) & (status == "ok") & ~np.isin(found, rejected)
        elif one.kind == "retrieve":
            found, seed_sets = read_columns(one.path, ["image_id", "seed_set"])
            labels, place = np.unique(seed_sets.astype(str), return_inverse=True)
            kind = np.array([index[f"retrieve:{label}"] for label in labels], np.int64)[place]
            fits = np.ones(len(found), bool)
        else:
            (found,) = read_columns(one.path, ["image_id"])
            kind = np.full(len(found), index["balance"])
            fits = np.ones(len(found), bool)
        fits &= (found >= np.uint64(low)) & (found < np.uint64(high)) & ~hidden.is_hidden(found, plan.hidden)
        ids.append(found[fits])
        kinds.append(kind[fits])
    return np.concatenate(ids), np.concatenate(kinds)


def _rejected(plan: Plan, bounds: tuple[int, int]) -> np.ndarray:
    """Seed images of the range that dedup does not keep; those of exempt sets only as copies of forgotten images."""
    found = [np.empty(0, np.uint64)]
    for one in plan.dedup:
        if one.high < bounds[0] or one.low >= bounds[1]:
            continue
        ids, kept, reason = read_columns(one.path, ["image_id", "kept", "reason"])
        exempt = np.isin(ids >> np.uint64(SOURCE_SHIFT), np.array(sorted(plan.exempt), np.uint64))
        found.append(ids[~kept.astype(bool) & (~exempt | (reason == REASON))])
    return np.concatenate(found)


def _mix_part(writer: PartWriter, name: str, bounds: tuple[int, int], shared: tuple[Plan, Weighting]) -> PartRecord:
    plan, weighting = shared
    ids, starts, rows = mixing.merge_sources(*_brought(plan, bounds))
    nominal = mixing.nominal_counts(starts, rows)
    if weighting.group_of is not None and weighting.per_group is not None:
        members = mixing.group_members(starts, rows, weighting.group_of, len(weighting.per_group))
        weights = (members * weighting.per_group).sum(axis=1)
    else:
        weights = nominal.astype(np.float64) if weighting.weight == "nominal" else np.ones(len(ids))
    counts: dict[str, float] = {"images": len(ids), "nominal": int(nominal.sum()), "weight": float(weights.sum())}
    images = np.bincount(rows[:, 0], minlength=len(plan.names))
    times = np.bincount(rows[:, 0], weights=rows[:, 1], minlength=len(plan.names))
    for index, source in enumerate(plan.names):
        counts[f"images {source}"] = int(images[index])
        counts[f"nominal {source}"] = int(times[index])
    return writer.write(name, mixing.mix_table(ids, starts, rows, plan.names, weights), counts=counts)


def _weighting(context: Context, config: MixConfig, plan: Plan, ranges: Sequence[tuple[int, int]]) -> Weighting:
    if config.shares is None:
        return Weighting(config.weight)
    # What brings images is known only now: a source that brings none takes no share.
    calls = [(str(i), (bounds,)) for i, bounds in enumerate(ranges)]
    per_source = np.zeros(len(plan.names), np.int64)
    for _, found in context.spread(_count_sources, calls, shared=plan):
        per_source += found
    bringing = [name for name, images in zip(plan.names, per_source, strict=True) if images]
    _, groups = mixing.share_groups(bringing, config.shares)
    group_of = np.array([_group(name, groups) for name in plan.names], np.int64)
    per_group, images = np.zeros(len(groups), np.int64), 0
    for _, (members, count) in context.spread(_count_groups, calls, shared=(plan, group_of, len(groups))):
        per_group += members
        images += count
    shares = [config.shares[group] for group in groups]
    return Weighting(config.weight, group_of, mixing.group_weights(shares, per_group.tolist(), images))


def _group(name: str, groups: Sequence[str]) -> int:
    key = name if name in groups else name.split(":", 1)[0]
    return groups.index(key) if key in groups else 0


def _count_sources(bounds: tuple[int, int], plan: Plan) -> np.ndarray:
    _, kinds = _brought(plan, bounds)
    return np.bincount(kinds, minlength=len(plan.names))


def _count_groups(bounds: tuple[int, int], shared: tuple[Plan, np.ndarray, int]) -> tuple[np.ndarray, int]:
    plan, group_of, groups = shared
    ids, starts, rows = mixing.merge_sources(*_brought(plan, bounds))
    return mixing.group_members(starts, rows, group_of, groups).sum(axis=0), len(ids)


def _summary(config: MixConfig, context: Context, plan: Plan, generation: Generation) -> dict[str, Any]:
    images = int(generation.total("images"))
    exempt = sorted(s.label for s in context.run.sources() if s.number in plan.exempt)
    return {
        "images": images,
        "nominal": int(generation.total("nominal")),
        "weighting": "shares" if config.shares is not None else config.weight,
        "mean_weight": round(generation.total("weight") / images, 9) if images else 0.0,
        "sources": {
            name: {
                "images": int(generation.total(f"images {name}")),
                "nominal": int(generation.total(f"nominal {name}")),
            }
            for name in plan.names
        },
        "as_is_without_checks": exempt,
    }
