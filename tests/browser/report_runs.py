"""Reports to look at: of a small run made here, and of the demo's run where it is."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.schemas import centroids_schema
from pipelines.context import Context
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest, report
from tests.pipelines.synthetic_run import LEAVES, build
from tests.pipelines.test_report import set_thresholds

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo-run"


class Here(Context):
    """Without Ray: what would be tasks is done in this process."""

    def spread(self, function: Any, calls: Iterable[tuple[str, Any]], *, shared: Any = None, **_: Any) -> Any:
        return ((name, function(*arguments, shared)) for name, arguments in calls)


def small(folder: Path, **options: Any) -> Path:
    """A synthetic run with a manifest, centroids and a report; returns its folder."""
    made = build(folder, **options)
    set_thresholds(made)
    with_centroids(made.run)
    manifest.execute(Here(run=made.run), manifest.ManifestConfig())
    report.execute(Here(run=made.run), report.ReportConfig())
    return folder


def demo(folder: Path) -> Path:
    """The demo's run with a report made now beside it: its tables are linked, not copied."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in DEMO.iterdir():
        if path.name not in ("report", "events.jsonl", ".lock"):
            (folder / path.name).symlink_to(path.resolve())
    report.execute(replace(Here(run=RunDirectory(str(folder))), rebuild=True), report.ReportConfig())
    return folder


def with_centroids(run: RunDirectory) -> None:
    stage = run.stage("cluster")
    (generation,) = stage.all_generations()
    rng = np.random.default_rng(0)
    for level, count in ((1, LEAVES), (2, LEAVES // 2)):
        rows = [
            {"cluster": c, "parent": c // 2 if level == 1 else None, "size": 5 + c, "centroid": rng.normal(size=16)}
            for c in range(count)
        ]
        table = pa.Table.from_pylist(rows, schema=centroids_schema(16))
        generation.put_file(f"centroids/level-{level}.parquet", storage.table_bytes(table))
    stage.save(generation)
