"""Calibrates the cost model of `curate run --plan` at 100,000 vectors and checks its predictions at 1,000,000.

    python -m benchmarks.plan --out benchmarks/results/plan-calibration.json                               calibrate
    python -m benchmarks.plan --parts --check cluster tables --out benchmarks/results/plan-calibration.json     check
    python -m benchmarks.plan --parts --out benchmarks/results/plan-calibration.json               compare once more

The CPU time of a step divided by the units that `pipelines/costs.py` counts for it is its rate; `pipelines/hardware.py`
holds these rates. One process, one thread, the median of several runs. Steps run as functions on arrays and files, with
neither Ray nor the stages around them. At 1,000,000 the join and retrieval are taken from the results of their own
benchmarks (`join-*-1000000.json`, `retrieve*.json`); clusters and tables are measured here.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np

from benchmarks import data, plan_tables, retrieve
from curation import clusters, nearest, seed_calibration, seed_search, sketch, vectors
from curation.duplicates.cells import Cells
from curation.duplicates.join import self_join
from curation.duplicates.members import Members, bundled, max_piece_rows, whole_set
from curation.duplicates.recall import CHOICE_QUERIES
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, serial
from curation.halves import widen
from pipelines import costs
from pipelines.costs import Meetings, Term

RESULTS = Path(__file__).parent / "results"
DIMENSION = 512
MEMORY = 3 << 30
CLUSTERS, STEPS, PER_CENTROID = 1000, 10, 256
SEEDS, NEIGHBOURS = 10_000, 4
SLAB = 131_072
ALLOWED = 0.3

Rates = dict[str, list[float]]


def per_unit(terms: list[Term], seconds: dict[str, float]) -> dict[str, float]:
    """Nanoseconds per unit of every term whose rate is a key of `seconds`."""
    return {term.rate: max(0.0, seconds[term.rate]) / term.units * 1e9 for term in terms if term.rate in seconds}


# ---- the join --------------------------------------------------------------------------------------------------------


def join(kind: str, made: data.Data) -> dict[str, Any]:
    """One join: its rates and what it compares."""
    known = vectors.open_folder(made.vectors)
    options = JoinOptions(0.6, 0.99, memory_bytes=MEMORY, exact_multiply_adds=0)
    most = max_piece_rows(MEMORY, known.dimension)
    members = Members(bundled(whole_set(known, most), most), known.dimension, True, known.rows)
    steps: dict[str, float] = {}

    def timed(function, calls, *, shared=None):  # type: ignore[no-untyped-def]
        for call in calls:
            begin = time.process_time()
            results = list(serial(function, [call], shared=shared))
            steps[function.__name__] = steps.get(function.__name__, 0.0) + time.process_time() - begin
            yield from results

    scratch = tempfile.mkdtemp()
    try:
        begin = time.process_time()
        result = self_join(members, np.arange(known.rows, dtype=np.uint64), options, Scratch(scratch), timed, [])
        total = time.process_time() - begin
    finally:
        shutil.rmtree(scratch)
    report, cells = result.report, result.cells
    assert cells is not None
    meetings = Meetings(report["share_compared"], report["visits"], CHOICE_QUERIES + report["queries"])
    stored = made.load()
    begin = time.process_time()
    for _ in cells.scores(stored):
        pass
    scores = time.process_time() - begin
    scanning = scans(cells, stored)
    steps["driver"] = total - sum(steps.values())
    scanned = scanning["scan"] + scanning["open"]
    seconds = {
        "store": steps["store_piece"],
        "train": steps["train_cells"],
        "truth": steps["search_queries"],
        "assign": scores,
        "visit": steps["assign_piece"] - scores,
        f"scan_{kind}": scanning["scan"],
        "open": scanning["open"],
        "choose": steps["driver"],
        "verify": steps["join_cells"] - scanned,
    }
    terms = costs.join(known.rows, known.dimension, MEMORY, kind, meetings)
    return {
        "cpu_seconds": round(total, 2),
        "cpu_seconds_by_step": {name: round(value, 2) for name, value in steps.items()},
        "report": {k: report[k] for k in ("share_compared", "visits", "queries", "recall", "recall_low", "cells")},
        "rates": per_unit(terms, seconds),
        "meetings": vars(meetings),
    }


def scans(cells: Cells, stored: np.ndarray) -> dict[str, float]:
    """CPU seconds of the scans of all cells, split into what pairs cost and what a visit costs, by least squares."""
    assert cells.rule is not None
    rule = cells.rule
    homes, visiting, visited, bits = cells.assign(stored)
    by_home, by_visit = np.argsort(homes, kind="stable"), np.argsort(visited, kind="stable")
    home_starts = np.searchsorted(homes[by_home], np.arange(len(cells) + 1))
    visit_starts = np.searchsorted(visited[by_visit], np.arange(len(cells) + 1))
    rows = []
    for cell in range(len(cells)):
        tile = bits[by_home[home_starts[cell] : home_starts[cell + 1]]]
        coming = bits[visiting[by_visit[visit_starts[cell] : visit_starts[cell + 1]]]]
        if not len(tile):
            continue
        begin = time.process_time()
        for queries, starts in ((tile, np.arange(1, len(tile) + 1)), (coming, np.zeros(len(coming), np.int64))):
            for _ in sketch.scan(queries, tile, starts, rule.first_words, (rule.cuts[0], *2 * rule.cuts[1:])):
                pass
        spent = time.process_time() - begin
        rows.append((len(tile) * (len(tile) / 2 + len(coming)), len(tile) + len(coming), spent))
    pairs, queries_, spent_ = np.array(rows).T
    weight = 1 / np.sqrt(np.maximum(spent_, 1e-6))
    (per_pair, per_query), *_ = np.linalg.lstsq(
        np.stack([pairs * weight, queries_ * weight], axis=1), spent_ * weight, rcond=None
    )
    per_pair, per_query = max(per_pair, 0.0), max(per_query, 0.0)
    fitted = per_pair * pairs.sum() + per_query * queries_.sum()
    scale = spent_.sum() / fitted
    return {"scan": per_pair * pairs.sum() * scale, "open": per_query * queries_.sum() * scale}


# ---- clusters --------------------------------------------------------------------------------------------------------


class Clock:
    """A `Watch` that notes when the seeds were drawn."""

    def __init__(self) -> None:
        self.seeded = 0.0

    def found(self, purpose: str) -> None:
        return None

    def keep(self, purpose: str, progress: clusters.Progress) -> None:
        if progress.step == 0:
            self.seeded = time.process_time()

    def tell(self, purpose: str, step: int, objective: float, empty: int) -> None:
        return


def cluster(stored: np.ndarray) -> dict[str, Any]:
    """k-means on the sample that the stage would take, then the assignment of all."""
    sample = stored[: PER_CENTROID * CLUSTERS]
    blocks = tuple(sample[start : start + 65_536] for start in range(0, len(sample), 65_536))
    clock, begin = Clock(), time.process_time()
    found = clusters.kmeans(
        clusters.ArrayPoints(blocks), CLUSTERS, seed=0, purpose="plan", iterations=STEPS, watch=clock
    )
    trained = time.process_time()
    nearest.nearest_centroid(stored, found.centroids)
    done = time.process_time()
    terms = costs.cluster(len(stored), DIMENSION, [CLUSTERS], found.iterations, PER_CENTROID)
    seconds = {"seeding": clock.seeded - begin, "lloyd": trained - clock.seeded, "product": done - trained}
    return {
        "cpu_seconds": round(done - begin, 2),
        "cpu_seconds_by_step": {name: round(value, 2) for name, value in seconds.items()},
        "iterations": found.iterations,
        "rates": per_unit(terms, seconds),
    }


# ---- retrieval -------------------------------------------------------------------------------------------------------


def retrieval(folder: str) -> dict[str, Any]:
    """Calibration and search of a pool for SEEDS seeds."""
    begin = time.process_time()
    seeds = retrieve.seeds_of(folder)
    parts = list(retrieve.pool_parts(folder))
    reading = time.process_time() - begin
    pool = np.concatenate([rows for _, rows in parts])
    sample = widen(pool[:: max(1, len(pool) // seed_calibration.SAMPLE_ROWS)][: seed_calibration.SAMPLE_ROWS])
    tuning = widen(seeds[: seed_calibration.TUNING_SEEDS])
    options = {"rows": len(pool), "seeds": len(seeds), "recall": 0.99, "seed": 0}
    begin = time.process_time()
    plan = seed_calibration.calibrate(sample, tuning, NEIGHBOURS, **options)  # type: ignore[arg-type]
    tune = time.process_time() - begin
    best = seed_search.SeedBlock(plan, seeds, NEIGHBOURS)
    passes, coded = [], 0.0
    for number in range(2):
        # The second time each seed has near neighbours, as it has after the first stretch of a large pool.
        ids = np.arange(len(pool), dtype=np.uint64) + np.uint64(number * len(pool))
        seconds_of_pass = 0.0
        for start in range(0, len(pool), SLAB):
            begin = time.process_time()
            stretch = seed_search.Stretch.of(plan, ids[start : start + SLAB], pool[start : start + SLAB])
            coded += (time.process_time() - begin) / 2
            begin = time.process_time()
            best.add(stretch)
            seconds_of_pass += time.process_time() - begin
        passes.append(seconds_of_pass)
    search = coded + passes[0]
    terms = costs.retrieve(len(pool), DIMENSION, len(seeds), 0, 0, plan.share)
    scanned = sum(t.units for t in terms if t.rate == "scan_code" and "scanned" in t.step)
    assigned = sum(t.units for t in terms if t.rate == "scan_code" and "cells" in t.step) * passes[1] / scanned
    seconds = {
        "tune": tune,
        "code": reading + coded - assigned,
        "warm": max(passes[0] - passes[1], 0.0),
        "scan_code": passes[1],
    }
    return {
        "cpu_seconds": round(reading + tune + search, 2),
        "cpu_seconds_by_step": {k: round(v, 2) for k, v in {"read": reading, **seconds, "search": search}.items()},
        "share_scanned": plan.share,
        "passing": plan.passing,
        "rates": per_unit([t for t in terms if t.rate != "scan_code" or "scanned" in t.step], seconds),
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


def spent(function: Callable[..., Any], *arguments: Any) -> float:
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def terms_of_tables(rows: int) -> dict[str, list[Term]]:
    return {
        "balance": costs.balance(rows, rows // plan_tables.TAKEN, plan_tables.PART_ROWS),
        "mix": costs.mix(rows),
        "manifest": costs.manifest(rows),
    }


def tables(rows: int, repeats: int) -> dict[str, float]:
    """Median CPU seconds of balance, mix and manifest over `rows` rows."""
    made = plan_tables.manifest_inputs()
    calls: dict[str, tuple[Any, ...]] = {
        "balance": (plan_tables.run_balance, plan_tables.balance_inputs(rows)),
        "mix": (plan_tables.run_mix, plan_tables.mix_inputs(rows)),
        "manifest": (plan_tables.run_manifest, made, rows),
    }
    return {name: float(np.median([spent(*call) for _ in range(repeats)])) for name, call in calls.items()}


# ---- all of it -------------------------------------------------------------------------------------------------------


PARTS = ("join", "cluster", "retrieve", "tables")


def calibrate(document: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> None:
    """The runs of the parts asked for, and from all runs there are the rates, medians, and what is compared."""
    runs: dict[str, Any] = document.setdefault("runs", {})
    laws = [kind for kind in ("hard", "easy") if kind == "hard" or data.EASY_BASE.exists()]
    made = {kind: data.make(kind, folder / kind, arguments.vectors) for kind in laws}
    if "join" in arguments.parts:
        join("hard", data.make("hard", folder / "warm", 40_000))
        for kind in laws:
            runs[f"join-{kind}"] = [told(join(kind, made[kind])) for _ in range(arguments.repeats)]
    if "cluster" in arguments.parts:
        stored = made["hard"].load()
        cluster(stored[:20_000])
        runs["cluster"] = [told(cluster(stored)) for _ in range(arguments.repeats)]
    if "retrieve" in arguments.parts:
        pool = str(folder / "pool")
        if not Path(pool, "seeds").exists():
            retrieve.make(pool, arguments.vectors, SEEDS, DIMENSION, 300, 0)
        found = [told(retrieval(pool)) for _ in range(arguments.repeats + 1)]
        runs["retrieve"] = found[1:]  # the first compiles
    if "tables" in arguments.parts:
        tables(1000, 1)
        seconds = tables(arguments.vectors, 3 * arguments.repeats)  # hundredths of a second each
        rates = {}
        for name, terms in terms_of_tables(arguments.vectors).items():
            rates[terms[0].rate] = seconds[name] / sum(term.units for term in terms) * 1e9
        runs["tables"] = [{"cpu_seconds_by_step": seconds, "rates": rates}]


def told(run: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(run), flush=True)
    return run


def summary(runs: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(nanoseconds by rate, what joins and searches compare), medians to three digits."""
    collected: Rates = {}
    for name in ("join-hard", "join-easy", "cluster", "retrieve", "tables"):
        for run in runs.get(name, []):
            for rate, value in run["rates"].items():
                collected.setdefault(rate, []).append(value)
    driver = json.loads((RESULTS / "dedup_driver.json").read_text())
    collected["driver"] = [driver["driver"]["driver_cpu_seconds"] / driver["arguments"]["images"] * 1e9]
    facts: Rates = {"share_scanned": [run["share_scanned"] for run in runs.get("retrieve", [])]}
    for kind in ("hard", "easy"):
        found = [run["meetings"] for run in runs.get(f"join-{kind}", [])]
        facts |= {f"share_{kind}": [m["share"] for m in found], f"visits_{kind}": [m["visits"] for m in found]}
        facts[f"queries_{kind}"] = [m["queries"] for m in found]

    def medians(values: Rates) -> dict[str, float]:
        return {name: float(f"{np.median(each):.3g}") for name, each in values.items() if each}

    return medians(collected), medians(facts)


def predicted(terms: list[Term], rates: dict[str, float]) -> float:
    return costs.seconds(terms, rates)


def checks(document: dict[str, Any], vectors_: int) -> list[dict[str, Any]]:
    """Predicted beside measured at `vectors_`, for every stage that was measured there."""
    rates, facts = document["rates_nanoseconds"], document["facts"]
    rows: list[dict[str, Any]] = []

    def row(stage: str, terms: list[Term], measured: float, source: str, runs: int = 1) -> None:
        value = predicted(terms, rates)
        rows.append(
            {
                "stage": stage,
                "vectors": vectors_,
                "predicted_cpu_seconds": round(value, 2),
                "measured_cpu_seconds": round(measured, 2),
                "error": round(value / measured - 1, 3),
                "within_30_percent": abs(value / measured - 1) <= ALLOWED,
                "measured_in": source,
                "runs": runs,
                "predicted_by_step": {t.step: round(t.seconds(rates), 2) for t in terms},
            }
        )

    for kind in ("hard", "easy"):
        path = RESULTS / f"join-{kind}-{vectors_}.json"
        if path.exists() and f"share_{kind}" in facts:
            other = json.loads(path.read_text())
            memory = int(other.get("arguments", {}).get("memory_gib", 3) * 2**30)
            meetings = Meetings.of(kind, facts)
            row(
                f"dedup-search, {kind}",
                costs.join(vectors_, DIMENSION, memory, kind, meetings),
                other["cpu_seconds"],
                path.name,
            )
            rows[-1]["measured_by_step"] = other.get("cpu_seconds_by_step")
            report = other["report"]
            known = Meetings(report["share_compared"], report["visits"], CHOICE_QUERIES + report["queries"])
            row(
                f"dedup-search, {kind}, told what this run compares",
                costs.join(vectors_, DIMENSION, memory, kind, known),
                other["cpu_seconds"],
                path.name,
            )
    for path in sorted(RESULTS.glob("retrieve*.json")):
        other = json.loads(path.read_text())
        asked, own = other["arguments"], other["methods"]["curate retrieve"]
        if asked["vectors"] == vectors_ and asked["dimension"] == DIMENSION:
            terms = costs.retrieve(vectors_, DIMENSION, asked["seeds"], 0, 0, facts["share_scanned"])
            row("retrieve, sample mode", terms, own["cpu_seconds"], path.name)
    for stage, found in document.get("measured", {}).items():
        clustered = costs.cluster(vectors_, DIMENSION, [CLUSTERS], STEPS, PER_CENTROID)
        terms = (terms_of_tables(vectors_) | {"cluster": clustered})[stage]
        row(stage, terms, float(np.median(found)), "this file", len(found))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--check-vectors", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="what to calibrate; others stay in OUT"
    )
    parser.add_argument("--folder", help="where the made vectors lie or go; default: a temporary folder")
    parser.add_argument("--check", nargs="*", choices=["cluster", "tables"], default=[], help="to measure as well")
    parser.add_argument("--check-folder", help="hard vectors made by benchmarks.data, for --check")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    import faiss  # noqa: F401

    out = Path(arguments.out)
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    document |= {
        "program": "benchmarks/plan.py",
        "arguments": {
            "vectors": arguments.vectors,
            "check_vectors": arguments.check_vectors,
            "repeats": arguments.repeats,
            "dimension": DIMENSION,
            "clusters": CLUSTERS,
            "steps": STEPS,
            "points_per_centroid": PER_CENTROID,
            "seeds": SEEDS,
            "neighbours": NEIGHBOURS,
            "memory_bytes": MEMORY,
        },
        "machine": machine.facts(),
        "versions": machine.versions(("numpy", "numba", "faiss-cpu", "pyarrow")),
    }
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.parts:
            calibrate(document, arguments, Path(arguments.folder or temporary))
        document["rates_nanoseconds"], document["facts"] = summary(document["runs"])
        measured: dict[str, list[float]] = document.setdefault("measured", {})
        if "cluster" in arguments.check:
            made = data.make("hard", arguments.check_folder or f"{temporary}/check", arguments.check_vectors)
            stored = made.load()
            measured["cluster"] = [told(cluster(stored))["cpu_seconds"] for _ in range(arguments.repeats)]
        if "tables" in arguments.check:
            found = [tables(arguments.check_vectors, 1) for _ in range(arguments.repeats)]
            measured |= {name: [round(run[name], 2) for run in found] for name in found[0]}
    document["checks"] = checks(document, arguments.check_vectors)
    # Beyond that only the join was measured.
    beyond = {"measured": {}} | {key: document[key] for key in ("rates_nanoseconds", "facts")}
    document["checks"] += checks(beyond, 2 * arguments.check_vectors)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for entry in document["checks"]:
        print(f"{entry['stage']}: {entry['predicted_cpu_seconds']} predicted, {entry['measured_cpu_seconds']} measured")


if __name__ == "__main__":
    main()
