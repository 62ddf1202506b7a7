"""Measures the join of 5 % new vectors against a join of everything.

    python -m benchmarks.add --count 200000 --folder /tmp/hard --out benchmarks/results/add-hard-200k.json

Four joins, each in a process of its own, on one thread: of the older vectors (which trains the cells, and keeps what it
assigned), of the new ones with themselves and the older ones in those cells, of everything in those cells, and of
everything from nothing. The forests of the first two together must have the components of the third; how far these
agree with the fourth is told. The second and the last are repeated by turns and their medians compared: CPU seconds
differ by a fifth with what else the machine runs. `start` among the tasks is what a process needs to begin: libraries
are imported and compiled code is loaded.
"""

# ruff: noqa: E402
import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np

from benchmarks import data

THRESHOLD = 0.6


def pieces(vectors: str, old: int, kind: str, memory_bytes: int) -> Any:
    """Members of a join. kind: `old` rows alone, `new` ones fresh beside the old, or `all` fresh."""
    from curation.duplicates.members import Members, bundled, file_pieces, max_piece_rows
    from curation.vectors import open_folder

    known = open_folder(vectors)
    most = max_piece_rows(memory_bytes, known.dimension)
    found = []
    for part in known.partitions:
        rows = np.arange(part.rows)
        for fresh in (False, True):
            mine = rows[(rows + part.first_row >= old) == fresh]
            if len(mine) and not (kind == "old" and fresh):
                nodes = (mine + part.first_row).astype(np.uint32)
                found += file_pieces(part.path, nodes, mine, fresh or kind != "new", most, int(fresh))
    return Members(bundled(found, most), known.dimension, known.dtype == "halffloat", known.rows)


def joined(vectors: str, old: int, kind: str, recall: float, folder: str, cells: str | None) -> dict[str, Any]:
    """One join; its forest and cells are left in the folder, and assignments as a run keeps them."""
    phases = machine.Phases()
    with phases("start"):
        from curation import sketch
        from curation.duplicates.cells import Cells
        from curation.duplicates.join import self_join
        from curation.duplicates.kept import SUFFIX, Kept
        from curation.duplicates.scratch import Scratch
        from curation.duplicates.tasks import JoinOptions
        from curation.vectors import open_folder, read_vectors

        known = open_folder(vectors)
        _, few = read_vectors(known.partitions[0].path, known.dimension, first=1)
        sketch.sketches(few)

    def spread(function: Any, calls: Any, *, shared: Any = None) -> Any:
        for name, arguments in calls:
            with phases(function.__name__):
                result = function(*arguments, shared)
            yield name, result

    options = JoinOptions(THRESHOLD, recall=recall, exact_multiply_adds=0, memory_bytes=3 << 30)
    members = pieces(vectors, old, kind, options.memory_bytes)
    given = None if cells is None else Cells.from_bytes(Path(cells).read_bytes())
    ids = np.arange(members.count, dtype=np.uint64)
    name = kind if cells else f"{kind}-own"
    older = Path(folder, "old-own")
    keep = Kept(f"{folder}/{name}", {p.stem: str(p) for p in older.glob(f"*{SUFFIX}")} if kind == "new" else {})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = self_join(members, ids, options, Scratch(f"{scratch}/s"), spread, cells=given, keep=keep)
    np.save(f"{folder}/{name}.npy", found.forest)
    if found.cells is not None:
        Path(folder, f"{name}.cells").write_bytes(found.cells.to_bytes())
    return {
        "report": found.report,
        "kept_bytes": sum(record["bytes"] for record in found.kept.values()),
        "cpu_seconds_by_task": phases.document()["cpu_seconds_by_phase"],
    }


def agreement(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """How far two labellings by smallest member agree."""
    nodes = np.arange(len(one))
    pairs = np.unique(np.stack([one, other]), axis=1)
    whole = [np.bincount(pairs[k], minlength=len(one)) for k in (0, 1)]
    same = (whole[0][one] == 1) & (whole[1][other] == 1)
    return {
        "images_in_equal_components": int(same.sum()),
        "share": round(float(same.mean()), 6),
        "removed": [int((labels != nodes).sum()) for labels in (one, other)],
        "removed_by_both": int(((one != nodes) & (other != nodes)).sum()),
    }


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median CPU seconds, with those of all."""
    ordered = sorted(runs, key=lambda run: run["cpu_seconds"])
    return ordered[(len(ordered) - 1) // 2] | {"cpu_seconds_of_runs": [round(run["cpu_seconds"], 2) for run in runs]}


def after_start(run: dict[str, Any]) -> float:
    """CPU seconds of a join in a process that has begun."""
    return float(run["cpu_seconds"] - run["cpu_seconds_by_task"]["start"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="hard")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--new", type=float, default=0.05)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", required=True, help="where the vectors are, or are made")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    made = data.make(arguments.kind, arguments.folder, arguments.count)
    old = round(arguments.count * (1 - arguments.new))
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/old-own.cells"
        steps = {"older": ("old", None), "all": ("all", kept), "added": ("new", kept), "from_nothing": ("all", None)}
        for name in [*steps, *list(steps)[2:] * (arguments.repeats - 1)]:
            kind, cells = steps[name]
            result, cost = machine.measured(joined, made.vectors, old, kind, arguments.recall, folder, cells)
            runs.setdefault(name, []).append(result | asdict(cost))
            print(name, round(cost.cpu_seconds, 1), flush=True)
        from curation.duplicates.components import components
        from curation.duplicates.forest import ForestMerger

        forests = {name: np.load(f"{folder}/{name}.npy") for name in ("old-own", "new", "all", "all-own")}
    found = {name: median(same) for name, same in runs.items()}
    merger = ForestMerger(made.count)
    merger.add(forests["old-own"])
    merger.add(forests["new"])
    grown = components(merger.result(), made.count, THRESHOLD)
    whole = components(forests["all"], made.count, THRESHOLD)
    document = {
        "program": "benchmarks/add.py",
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")},
        "data": made.parameters,
        "machine": machine.facts(),
        "versions": machine.versions(["numpy", "numba", "faiss-cpu", "pyarrow"]),
        "joins": found,
        "added_over_from_nothing_cpu": round(found["added"]["cpu_seconds"] / found["from_nothing"]["cpu_seconds"], 4),
        "added_over_from_nothing_cpu_after_start": round(
            after_start(found["added"]) / after_start(found["from_nothing"]), 4
        ),
        "added_over_all_in_the_same_cells_cpu": round(found["added"]["cpu_seconds"] / found["all"]["cpu_seconds"], 4),
        "equal_components_as_all_in_the_same_cells": bool((grown == whole).all()),
        "agreement_with_from_nothing": agreement(grown, components(forests["all-own"], made.count, THRESHOLD)),
    }
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in list(document)[-5:]}, indent=1))


if __name__ == "__main__":
    main()
