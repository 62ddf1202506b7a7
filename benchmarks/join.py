"""Measures the near-duplicate join: CPU seconds by step, memory, recall against an oracle of its own, and exact's cost.

    python -m benchmarks.join --kind hard --vectors 1000000 --folder /tmp/hard-1000000 \
        --out benchmarks/results/join-hard-1000000.json

Vectors: `benchmarks.data`. One process, one thread. The exact join is measured on blocks in the same process, before
and after, and extrapolated to the symmetric half of all pairs. The join's own recall is compared with
`benchmarks.truth`, which shares nothing with it but the definition of similarity.
"""

# The number of threads is set before numpy is imported.
# ruff: noqa: E402
import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np

from benchmarks import data, truth
from curation import products, vectors
from curation.duplicates.cells import Cells
from curation.duplicates.components import components, sweep
from curation.duplicates.join import self_join
from curation.duplicates.members import Members, bundled, max_piece_rows, whole_set
from curation.duplicates.recall import SAMPLE_PAIR, described, nominated
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, serial

THRESHOLDS = (0.6, 0.7, 0.8, 0.9)
MEASURING = ("search_queries",)
"""Steps that only measure recall and choose the visits."""
BLOCK = 8192


def run(made: data.Data, arguments: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """The join, timed; the oracle afterwards."""
    known = vectors.open_folder(made.vectors)
    options = JoinOptions(
        arguments.threshold, arguments.recall, memory_bytes=int(arguments.memory_gib * 2**30), exact_multiply_adds=0
    )
    most = max_piece_rows(options.memory_bytes, known.dimension)
    members = Members(bundled(whole_set(known, most), most), known.dimension, True, known.rows)
    exact_before = exact_seconds(made)
    machine.forget_peak()
    steps: dict[str, float] = {}
    longest: dict[str, float] = {}

    def timed(function, calls, *, shared=None):  # type: ignore[no-untyped-def]
        for call in calls:
            begin = time.process_time()
            results = list(serial(function, [call], shared=shared))
            spent = time.process_time() - begin
            steps[function.__name__] = steps.get(function.__name__, 0.0) + spent
            longest[function.__name__] = max(longest.get(function.__name__, 0.0), spent)
            yield from results

    wall, cpu = time.perf_counter(), time.process_time()
    ids = np.arange(known.rows, dtype=np.uint64)
    result = self_join(members, ids, options, Scratch(scratch), timed, THRESHOLDS)
    labels = components(result.forest, known.rows, options.threshold)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = machine.peak_bytes()
    begin = time.process_time()
    counts = sweep(result.forest, known.rows, THRESHOLDS)
    sweep_seconds = time.process_time() - begin
    steps["driver"] = cpu - sum(steps.values())
    exact = (exact_before + exact_seconds(made)) / 2
    measuring = sum(steps.get(name, 0.0) for name in MEASURING)
    return {
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "cpu_seconds_by_step": {name: round(seconds, 2) for name, seconds in steps.items()},
        "longest_task_cpu_seconds": {name: round(seconds, 2) for name, seconds in longest.items()},
        "cpu_seconds_without_measuring": round(cpu - measuring, 2),
        "peak_bytes": peak,
        "exact_cpu_seconds": round(exact, 1),
        "exact_is": f"extrapolated from blocks of {BLOCK} x {BLOCK} rows, before and after the join",
        "ratio_to_exact": round(exact / cpu, 2),
        "ratio_to_exact_without_measuring": round(exact / (cpu - measuring), 2),
        "forest_edges": len(result.forest),
        "removed": int((labels != np.arange(len(labels), dtype=labels.dtype)).sum()),
        "sweep_cpu_seconds": round(sweep_seconds, 3),
        "sweep": counts,
        "rule": None if result.cells is None else vars(result.cells.rule),
        "report": result.report,
        "oracle": oracle(made, options.threshold, result.cells, labels) if arguments.oracle else None,
    }


def exact_seconds(made: data.Data) -> float:
    """CPU seconds of comparing the symmetric half of all pairs, from one block of products and its decisions."""
    known = vectors.open_folder(made.vectors)
    parts: list[np.ndarray] = []
    for _, _, block in known.blocks():
        parts.append(block)
        if sum(map(len, parts)) >= 2 * BLOCK:
            break
    rows = np.concatenate(parts)[: 2 * BLOCK].astype(np.float32)
    one, other = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    starts = np.zeros(len(one), np.int64)
    list(products.pairs_above(one[:64], other[:64], 0.6, starts[:64], half=True))
    begin = time.process_time()
    for _ in products.pairs_above(one, other, 0.6, starts, half=True):
        pass
    spent = time.process_time() - begin
    return spent * (made.count * (made.count - 1) / 2) / (len(one) * len(other))


def oracle(made: data.Data, threshold: float, cells: Cells | None, labels: np.ndarray) -> dict[str, Any]:
    """Recall on exact pairs of other queries, and the share of them that are in one component."""
    sample = truth.sample_of(made, threshold)
    one, other = sample.ends()
    together = labels[one] == labels[other]
    document: dict[str, Any] = {"in_one_component": truth.recall(sample, together)}
    if cells is None or cells.rule is None:
        return document | {"recall": truth.recall(sample, np.ones(len(one), bool))}
    rows, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    left, right = place[: len(one)], place[len(one) :]
    known = vectors.open_folder(made.vectors)
    held = np.empty((len(rows), known.dimension), np.float16)
    for partition, _, block in known.blocks():
        inside = (rows >= partition.first_row) & (rows < partition.first_row + partition.rows)
        held[inside] = block[rows[inside] - partition.first_row]
    pairs = np.zeros(len(left), SAMPLE_PAIR)
    for k in range(0, len(left), BLOCK):
        part = slice(k, k + BLOCK)
        pairs[part] = described(pairs[part], held, held, left[part], right[part], cells)
    found = nominated(pairs, cells.rule) | (held[left] == held[right]).all(axis=1)
    return document | {"recall": truth.recall(sample, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="hard", choices=sorted(data.KINDS))
    parser.add_argument("--vectors", type=int, default=125_000)
    parser.add_argument("--folder", required=True, help="of the vectors, made if it does not hold them")
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--memory-gib", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-oracle", dest="oracle", action="store_false")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    made = data.make(arguments.kind, arguments.folder, arguments.vectors, seed=arguments.seed)
    scratch = tempfile.mkdtemp(prefix="join-", dir=Path(arguments.folder).parent)
    try:
        figures = run(made, arguments, f"{scratch}/scratch")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    document = {
        "program": "benchmarks/join.py",
        "kind": arguments.kind,
        "vectors": arguments.vectors,
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("out", "folder")},
        "data": made.parameters,
        "machine": machine.facts(),
        "versions": machine.versions(("numpy", "numba", "faiss-cpu", "pyarrow")),
    } | figures
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: document[k] for k in ("cpu_seconds", "ratio_to_exact", "cpu_seconds_by_step")}))


if __name__ == "__main__":
    main()
