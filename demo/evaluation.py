"""Marks a finished run against the truth about the demo's web: what was found, missed, and joined wrongly.

Only `truth.parquet` and the run's own tables (`curation/schemas.py`) are read. Each promise becomes a check.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import thresholds
from curation.schemas import SOURCE_SHIFT
from demo.plant import FAULTS, SEED_SETS
from pipelines.run_directory import RunDirectory

PROMISED_SHARE = 0.95
"""Of the resized and recompressed copies together, but for those whose original a threshold of the filter dropped."""
SHARING = 0.005
"""Of the originals may share a component with another original."""
LIFT = 3.0
"""Precision of retrieval over the share of the class in the pool."""
LISTED = 12
ORDER = (
    "download",
    "import",
    "score",
    "filter",
    "dedup-search",
    "dedup",
    "embed",
    "cluster",
    "retrieve",
    "balance",
    "mix",
)
"""Of the stages in the summary; those that are not here come after."""


@dataclass(frozen=True)
class Check:
    """A promise and whether it was kept; `kept` None: this run cannot tell."""

    promise: str
    found: str
    kept: bool | None


@dataclass(frozen=True)
class Section:
    """A table for the terminal and the report."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: list[list[Any]]


@dataclass
class Marks:
    """The evaluation."""

    sections: list[Section] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.kept is not False for check in self.checks)


@dataclass(frozen=True)
class Image:
    """What the run says about one row of the URL list."""

    id: int
    status: str
    error: str
    duplicate_of: int | None
    component: int | None
    kept: bool
    reason: str


class Run:
    """A finished run's tables beside the truth."""

    def __init__(self, root: Path, truth: pa.Table) -> None:
        self.directory = RunDirectory(str(root))
        self.truth = truth.to_pylist()
        sources = self.directory.sources()
        (self.pool,) = [s.number for s in sources if s.role == "pool"]
        self.seed_labels = {s.name.split(":", 1)[1]: s.number for s in sources if s.role == "seed"}
        decided = self.table("filter", ["image_id", "status", "error", "duplicate_of"])
        found = self.table("dedup", ["image_id", "component_id", "kept", "reason"])
        verdicts = {row["image_id"]: row for row in found.to_pylist()}
        self.images: dict[int, Image] = {}
        for row in decided.to_pylist():
            verdict = verdicts.get(row["image_id"], {})
            self.images[row["image_id"]] = Image(
                row["image_id"],
                row["status"],
                row["error"] or "",
                row["duplicate_of"],
                verdict.get("component_id"),
                bool(verdict.get("kept", False)),
                verdict.get("reason", ""),
            )
        self.by_row = {
            image.id & ((1 << SOURCE_SHIFT) - 1): image
            for image in self.images.values()
            if image.id >> SOURCE_SHIFT == self.pool
        }
        self.by_sha = {t["sha256"]: t for t in self.truth if t["kind"] in ("original", "other")}
        self.members: dict[int, list[int]] = defaultdict(list)
        for image in self.images.values():
            if image.component is not None:
                self.members[image.component].append(image.id)

    def table(self, stage: str, columns: Sequence[str]) -> pa.Table:
        paths = self.directory.stage(stage).part_paths()
        return pa.concat_tables([pq.read_table(path, columns=list(columns)) for path in paths])

    def image(self, truth: Mapping[str, Any]) -> Image:
        return self.by_row[truth["row"]]

    def component(self, image: Image) -> int | None:
        """Of an image; one that the filter dropped as a repeat of another is where that one is."""
        steps = 0
        while image.component is None and image.duplicate_of is not None and steps < 64:
            image, steps = self.images[image.duplicate_of], steps + 1
        return image.component

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [t for t in self.truth if t["kind"] == kind]

    def name(self, image_id: int) -> str:
        """Readable: the picture's file, and what was done to it."""
        if image_id >> SOURCE_SHIFT != self.pool:
            return f"{image_id >> SOURCE_SHIFT}:{image_id & ((1 << SOURCE_SHIFT) - 1)}"
        truth = self.truth[image_id & ((1 << SOURCE_SHIFT) - 1)]
        return PurePosixPath(truth["path"]).name + (f" ({truth['copy']} {truth['kind']})" if truth["copy"] else "")

    def joins(self) -> dict[int, list[tuple[int, str]]]:
        """Neighbours of an image and what joins them: the stored maximum spanning forest, and the filter's repeats."""
        found: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for path in _parquet_below(self.directory.path("dedup"), "self_forest"):
            edges = pq.read_table(path, columns=["low", "high", "similarity"])
            for low, high, similarity in zip(*(edges[c].to_pylist() for c in edges.column_names), strict=True):
                found[low].append((high, f"{similarity:.3f}"))
                found[high].append((low, f"{similarity:.3f}"))
        for image in self.images.values():
            if image.duplicate_of is not None:
                how = image.error or image.status
                found[image.id].append((image.duplicate_of, how))
                found[image.duplicate_of].append((image.id, how))
        return found


def evaluate(root: Path, folder: Path, planted: Mapping[str, Any], *, exact_search: bool) -> Marks:
    """Mark the run in `root` against `folder`/truth.parquet. exact_search: the originals were chosen by it (SSCD)."""
    run = Run(root, pq.read_table(folder / "truth.parquet"))
    marks = Marks(numbers={"planted": dict(planted)})
    _faults(run, marks)
    _copies(run, marks, exact_search)
    _originals(run, marks, exact_search)
    _leaks(run, marks, exact_search)
    _retrieval(run, marks)
    return marks


def _faults(run: Run, marks: Marks) -> None:
    rows = []
    wrong = 0
    for kind, (_, status, error) in FAULTS.items():
        listed = run.of(kind)
        if not listed:
            continue
        got = Counter((run.image(t).status, run.image(t).error.split(":", 1)[0]) for t in listed)
        as_good = {(status, name) for name in error.split("|")}
        right = sum(got[outcome] for outcome in as_good)
        wrong += len(listed) - right
        others = ", ".join(f"{n} {s} {e}".strip() for (s, e), n in got.most_common() if (s, e) not in as_good)
        rows.append([kind, len(listed), f"{status} {error}".strip(), right, others])
    marks.sections.append(
        Section(
            "What was wrong with this web",
            "Rows of the URL list that bring no usable image, what should become of them, and what did.",
            ("kind", "rows", "should be", "were", "others"),
            rows,
        )
    )
    marks.numbers["faults"] = {row[0]: {"rows": row[1], "as expected": row[3]} for row in rows}
    total = sum(row[1] for row in rows)
    marks.checks.append(Check("every fault of the web ends as it should", f"{total - wrong} of {total}", wrong == 0))


def _copies(run: Run, marks: Marks, promised: bool) -> None:
    counts: dict[str, list[int]] = {}
    missed: list[str] = []
    lost: list[str] = []
    excused: Counter[str] = Counter()
    for truth in run.of("copy"):
        kind = truth["copy"]
        planted, usable, found = counts.setdefault(kind, [0, 0, 0])
        original, copy = run.image(run.by_sha[truth["of"]]), run.image(truth)
        there = run.component(original), run.component(copy)
        counts[kind] = [planted + 1, usable + (None not in there), found + (None not in there and there[0] == there[1])]
        if None in there:
            lost.append(
                f"{run.name(copy.id)}: {copy.status} {copy.error}; original: {original.status} {original.error}"
            )
            excused[kind] += original.status == "dropped" and original.error in thresholds.REASONS
        elif there[0] != there[1]:
            missed.append(run.name(copy.id))
    rows = [
        [kind, planted, usable, found, usable - found, _share(found, usable)]
        for kind, (planted, usable, found) in counts.items()
    ]
    text = "A copy is found when it is in its original's component; usable when it and its original passed the filters."
    if lost:
        text += f" Not usable: {'; '.join(lost[:LISTED])}."
    if missed:
        text += f" Missed: {', '.join(missed[:LISTED])}{' …' if len(missed) > LISTED else ''}."
    columns = ("copies", "planted", "usable", "found", "missed", "share found")
    marks.sections.append(Section("Planted copies", text, columns, rows))
    marks.numbers["copies"] = {k: dict(zip(("planted", "usable", "found"), v, strict=True)) for k, v in counts.items()}
    if not promised:
        return
    exact = counts.get("exact", [0, 0, 0])
    asked = exact[0] - excused["exact"]
    marks.checks.append(Check("every exact copy is found", f"{exact[2]} of {asked}", exact[2] == asked))
    near = [sum(counts.get(k, [0, 0, 0])[i] for k in ("resized", "recompressed")) for i in range(3)]
    near[0] -= excused["resized"] + excused["recompressed"]
    kept = near[2] >= PROMISED_SHARE * near[0]
    marks.checks.append(
        Check("at least 95 % of resized and recompressed copies are found", f"{near[2]} of {near[0]}", kept)
    )


def _originals(run: Run, marks: Marks, promised: bool) -> None:
    groups: dict[int, list[int]] = defaultdict(list)
    for truth in run.of("original"):
        image = run.image(truth)
        component = run.component(image)
        if component is not None:
            groups[component].append(image.id)
    alive = sum(len(group) for group in groups.values())
    shared = [sorted(group) for group in groups.values() if len(group) > 1]
    sharing = sum(len(group) for group in shared)
    joins = run.joins()
    rows = [
        [run.name(group[0]), run.name(other), _chain(run, joins, group[0], other)]
        for group in shared
        for other in group[1:]
    ]
    text = (
        f"{alive:,} originals, chosen before copies were planted so that no chain of pairs above the threshold joined "
        f"any two; {sharing} ({_share(sharing, alive)}) share a component with another afterwards. Each with the chain "
        "that joins it, from the stored forest."
    )
    marks.sections.append(Section("Originals joined with another original", text, ("original", "other", "chain"), rows))
    sizes = Counter(len(m) for m in run.members.values())
    largest = max(sizes, default=0)
    marks.numbers["originals"] = {"originals": alive, "sharing": sharing, "largest component": largest}
    if promised:
        kept = sharing <= SHARING * alive
        marks.checks.append(Check("at most 0.5 % of the originals share a component", f"{sharing} of {alive:,}", kept))
        marks.checks.append(Check("at least 1,000 originals", f"{alive:,}", alive >= 1000 or None))


def _chain(run: Run, joins: Mapping[int, list[tuple[int, str]]], start: int, end: int) -> str:
    """`a —0.710— b —duplicate_pca_hash— c`: the shortest path over what joins images."""
    came: dict[int, tuple[int, str]] = {start: (start, "")}
    queue = deque([start])
    while queue and end not in came:
        node = queue.popleft()
        for neighbour, how in joins.get(node, []):
            if neighbour not in came:
                came[neighbour] = (node, how)
                queue.append(neighbour)
    if end not in came:
        return "nothing stored joins them"
    path, node = [], end
    while node != start:
        before, how = came[node]
        path.append(f"—{how}— {run.name(node)}")
        node = before
    return " ".join([run.name(start), *reversed(path)])


def _leaks(run: Run, marks: Marks, promised: bool) -> None:
    counts: dict[str, list[int]] = {}
    stayed: list[str] = []
    for truth in run.of("leak"):
        image = run.image(truth)
        planted, removed = counts.setdefault(truth["copy"], [0, 0])
        component = run.component(image)
        gone = component is None or not any(run.images[i].kept for i in run.members[component])
        counts[truth["copy"]] = [planted + 1, removed + gone]
        if not gone:
            stayed.append(run.name(image.id))
    if not counts:
        return
    rows: list[list[Any]] = [
        [kind, planted, removed, _share(removed, planted)] for kind, (planted, removed) in counts.items()
    ]
    natural = [t for t in run.truth if t["label"] == "word" and t["kind"] in ("original", "other")]
    gone = sum(1 for t in natural if run.image(t).reason == "reference")
    if natural:
        rows.append(["same pictures in another package*", len(natural), gone, _share(gone, len(natural))])
    removed = [i for i in run.images.values() if i.reason == "reference"]
    text = (
        "Copies of evaluation images hidden in the pool. "
        f"In all, {len(removed):,} pool images were removed with the evaluation sets' components."
    )
    if natural:
        text += " * gcompris' vocabulary pictures: many, not all, are the evaluation set's; not promised."
    if stayed:
        text += f" Stayed: {', '.join(stayed[:LISTED])}."
    marks.sections.append(Section("Planted leaks", text, ("leaks", "planted", "removed", "share"), rows))
    marks.numbers["leaks"] = {k: {"planted": p, "removed": r} for k, (p, r) in counts.items()}
    marks.numbers["leaks"]["pool images removed in all"] = len(removed)
    kinds = ("exact", "resized", "recompressed")
    planted_in_all, removed_in_all = (sum(counts.get(k, [0, 0])[i] for k in kinds) for i in range(2))
    if promised:
        found = f"{removed_in_all} of {planted_in_all}"
        kept = removed_in_all == planted_in_all
        marks.checks.append(Check("all exact, resized and recompressed leaks are removed", found, kept))


def _retrieval(run: Run, marks: Marks) -> None:
    labels = {run.image(t).id: t["label"] for t in run.truth}
    retrieved: dict[str, set[int]] = defaultdict(set)
    modes: dict[str, str] = {}
    if run.directory.stage("retrieve").generations():
        for row in run.table("retrieve", ["image_id", "seed_set", "mode"]).to_pylist():
            retrieved[row["seed_set"]].add(row["image_id"])
            modes[row["seed_set"]] = row["mode"]
    kept = [image for image in run.by_row.values() if image.kept and image.status == "ok"]
    share = Counter(labels[image.id] for image in kept)
    rows = []
    for seed_set in SEED_SETS:
        if seed_set.name not in run.seed_labels:
            continue
        drawn = retrieved.get(seed_set.name, set())
        right = sum(labels.get(i) == seed_set.label for i in drawn)
        kin, base = share[seed_set.label], share[seed_set.label] / max(1, len(kept))
        precision = right / len(drawn) if drawn else 0.0
        rows.append(
            [
                seed_set.name,
                modes.get(seed_set.name, "-"),
                len(drawn),
                right,
                f"{precision:.1%}",
                f"{base:.1%}",
                _share(right, kin),
            ]
        )
        marks.numbers.setdefault("retrieval", {})[seed_set.name] = {
            "retrieved": len(drawn),
            "of the class": right,
            "precision": precision,
            "share in pool": base,
            "kin in pool": kin,
        }
        marks.checks.append(
            Check(
                f"retrieval for {seed_set.name}: precision at least {LIFT:g} times the share in the pool",
                f"{precision:.1%} against {base:.1%}",
                bool(drawn) and precision >= LIFT * base,
            )
        )
    text = (
        "Distinct pool images that each seed set drew, and how many of them the packages label as of its class. "
        "What a package does not label as such counts as wrong."
    )
    columns = ("seed set", "mode", "retrieved", "of the class", "precision", "share in the pool", "kin found")
    marks.sections.append(Section("Retrieval against the packages' labels", text, columns, rows))


def stage_section(root: Path) -> Section:
    """Rows and seconds of each stage, from the run's own records."""
    rows = []
    total = 0.0
    for path in sorted(root.rglob("_stage.json")):
        stage = path.parent.relative_to(root).as_posix()
        document = json.loads(path.read_text())
        generations = [g for g in document["generations"] if g["complete"]]
        seconds = sum(json.loads(p.read_text())["seconds"] for p in path.parent.glob("_timings*.json"))
        total += seconds
        parts = sum(part["rows"] for g in generations for part in g["parts"])
        summary: Counter[str] = Counter()
        for generation in generations:
            summary.update(
                {k: v for k, v in generation["summary"].items() if isinstance(v, int) and not isinstance(v, bool)}
            )
        counts = ", ".join(
            f"{name.replace('_', ' ')} {value:,}" for name, value in list(summary.items())[:6] if name != "rows"
        )
        rows.append([stage, parts, counts, round(seconds, 1)])
    order = {name: position for position, name in enumerate(ORDER)}
    rows.sort(key=lambda row: (order.get(row[0].split("/")[0], 99), row[0]))
    rows.append(["all", "", "", round(total, 1)])
    return Section(
        "Stages", "Rows written and seconds taken by each stage.", ("stage", "rows", "counts", "seconds"), rows
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _parquet_below(folder: str, name: str) -> Iterable[Path]:
    return sorted(p for p in Path(folder).rglob("*.parquet") if name in p.parts[-2] or p.stem.startswith(name))
