"""Measures `curate add` against a full run, from download to manifest, on the demo's web.

    python -m benchmarks.add_run --out benchmarks/results/curate-add.json

The demo's URL list is cut in two by the hash of each URL: `curate run` with 95 %, then `curate add` with the other
5 %, both against the demo's web server (`python -m demo --set-up` makes the web). CPU seconds are those of the command
and of all it starts, Ray included: this process is made the parent of whatever loses its own (Linux).
"""

import argparse
import ctypes
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import machine

PR_SET_CHILD_SUBREAPER = 36


def measured(command: list[str]) -> dict[str, Any]:
    """CPU seconds and wall seconds of a command and of everything it leaves behind. Raises where it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wall = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    while True:  # Ray's processes, which end after the command
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(spent, 1), "wall_seconds": round(wall, 1), "peak_bytes_of_one": after.ru_maxrss * 1024}


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
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:  # the server is not this process's child, so that all children can be waited for
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        assert server.stdout is not None
        if server.stdout.readline().strip() != "ready":
            os._exit(1)
        found = {
            "run": measured([curate, "run", str(config), "--json"]),
            "add": measured([curate, "add", str(arguments.work / "run"), str(new), "--json"]),
        }
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
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert server.stdin is not None
    server.stdin.close()
    server.wait(10)
    shutil.rmtree(arguments.work, ignore_errors=True)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
