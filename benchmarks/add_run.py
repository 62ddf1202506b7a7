"""Measures `curate add` against a full run, from download to manifest, on the demo's web.

    python -m benchmarks.add_run --out benchmarks/results/curate-add.json

The demo's URL list is cut in two by the hash of each URL: `curate run` with 95 %, then `curate add` with the other
5 %, both against the demo's web server (`python -m demo --set-up` makes the web). CPU seconds are those of the command
and of all it starts, Ray included, sampled twice a second: Ray's workers are not waited for by what a parent counts.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import machine
from benchmarks.download_load import Watch

START = "start"


def measured(command: list[str], run: Path) -> dict[str, Any]:
    """CPU seconds, also by stage of `run`, and wall seconds of a command and of everything it starts.

    Raises where it fails.
    """
    began, clock = time.monotonic(), time.time()
    # As other programs run: Ray gives its workers niceness 15 otherwise.
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_worker_niceness": "0"},
    )
    watch = Watch(process.pid)
    _, said = process.communicate()
    wall, found = time.monotonic() - began, watch.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{said[-2000:]}")
    lines = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    return {
        "cpu_seconds": found["cpu_s"],
        "wall_seconds": round(wall, 1),
        "peak_mib": found["memory_mib"]["most"],
        "cpu_by_stage": by_stage(watch.spent, [event for event in lines if event["time"] >= clock]),
    }


def by_stage(spent: Sequence[tuple[float, float]], events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of each stage, of the start before the first, and of what lies between stages.

    spent: (time, CPU seconds until then), as sampled: interpolated at the moments of the events. A stage that begins
    within another takes over until it ends.
    """
    times, sums = zip(*spent, strict=True)
    found: dict[str, float] = {}
    name, before, running = START, 0.0, list[str]()
    for event in [*(e for e in events if e["event"] in ("stage_start", "stage_end")), None]:
        until = float(np.interp(event["time"], times, sums)) if event else sums[-1]
        found[name] = found.get(name, 0.0) + until - before
        before = until
        if event and event["event"] == "stage_start":
            running.append(event["stage"])
        elif event and event["stage"] in running:
            running.remove(event["stage"])
        name = running[-1] if running else "between and after"
    return {name: round(cpu, 1) for name, cpu in found.items()}


def is_new(url: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big") < share * 2**64


def prepare(web: Path, work: Path, share: float) -> tuple[Path, Path, dict[str, int]]:
    """(configuration of the first run, list of the new URLs, how many there are)."""
    table = pq.read_table(web / "urls.parquet")
    new = pa.array([is_new(url, share) for url in table["url"].to_pylist()])
    old_list, new_list = work / "old.parquet", work / "new.parquet"
    pq.write_table(table.filter(pc.invert(new)), old_list)
    pq.write_table(table.filter(new), new_list)
    document = yaml.safe_load((web / "demo.yaml").read_text())
    document["run"] = str(work / "run")
    for source in document["sources"]:
        if "urls" in source:
            source["urls"] = str(old_list)
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    count = sum(new.to_pylist())
    return path, new_list, {"urls": len(table), "new": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--web", type=Path, default=Path("demo-web"))
    parser.add_argument("--work", type=Path, default=Path(".cache/add-run"))
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    config, new, counts = prepare(arguments.web, arguments.work.absolute(), arguments.share)
    curate = str(Path(sys.executable).parent / "curate")
    server = subprocess.Popen(
        [sys.executable, "-m", "demo.web", str(arguments.web)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        if server.stdout.readline().strip() != "ready":
            raise SystemExit("the web server did not start")
        found = {
            "run": measured([curate, "run", str(config), "--json"], arguments.work / "run"),
            "add": measured([curate, "add", str(arguments.work / "run"), str(new), "--json"], arguments.work / "run"),
        }
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(10)
    document = {
        "command": "python -m benchmarks.add_run",
        "share": arguments.share,
        **counts,
        **found,
        "add_over_run_cpu": round(found["add"]["cpu_seconds"] / found["run"]["cpu_seconds"], 4),
        "add_over_run_wall": round(found["add"]["wall_seconds"] / found["run"]["wall_seconds"], 4),
        "machine": machine.facts(),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(found | {"add_over_run_cpu": document["add_over_run_cpu"]}))
    shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()
