"""Whole runs whose processes are killed at random times, resumed until they end, and compared with an untouched run.

`python -m benchmarks.chaos --kills 50` draws from --seed when to kill (anywhere in a run, from the start of its
processes on) and whom: the driver (`curate run`), a Ray worker, the raylet, or all of them at once as a machine that
loses its power. The same command is then given again. Every table, shard and data card of a run that has ended is
compared with that of a run that nobody touched: rows lost, rows twice, bytes different. The pool is downloaded from a
web on loopback, with URLs that fail; seeds and evaluation set are imported. Writes benchmarks/results/chaos.json.
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import machine
from tests.e2e import pictures

RESULT = Path(__file__).parent / "results" / "chaos.json"
VICTIMS = {"driver": 3, "worker": 4, "raylet": 2, "machine": 1}
"""Whom to kill, and how often of ten. machine: driver, raylet and workers in one moment."""
HUNG_S = 240.0
"""A driver that does not end for so long after its raylet was killed has hung."""
CONFIG = """
run: {run}
seed: 5
sources:
  - {{as: "pool:web", urls: {root}/urls.parquet}}
  - {{as: "seed:even", folder: {root}/seeds-even}}
  - {{as: "reference:evaluation", folder: {root}/evaluation}}
download: {{shard_rows: {shard_rows}, attempts: 1, timeout_s: 5, requests_per_host: 32, allow_hosts: ["127.0.0.1"]}}
filter: {{copy_model: sscd_distilled, faces: false, nsfw: false}}
dedup: {{threshold: 0.8, against_threshold: 0.85}}
embed: {{models: [sscd_distilled]}}
cluster: {{levels: [6, 2]}}
retrieve: {{mode: sample, neighbours: 3}}
balance: {{target: 12}}
resources: {{workers: {workers}}}
"""


@dataclass
class Kill:
    """One kill. after_s: since the start of the command. stage: the last one that had begun by the events."""

    victim: str
    after_s: float
    stage: str | None
    exit_code: int | None = None
    said: str = ""


@dataclass
class Ended:
    """A run that came to its end, against the untouched one."""

    kills: list[Kill]
    rows_lost: int
    rows_twice: int
    files_different: list[str]
    left_behind: list[str]
    seconds: float


@dataclass
class Chaos:
    """The programme of kills. root: folder with the web and the sources; runs lie beside them."""

    root: Path
    seed: int
    workers: int = 2
    shard_rows: int = 8
    ends: list[Ended] = field(default_factory=list)

    def config(self, name: str) -> Path:
        """The configuration of the run `name`."""
        path = self.root / f"{name}.yaml"
        values = {"run": self.root / name, "root": self.root, "workers": self.workers, "shard_rows": self.shard_rows}
        path.write_text(CONFIG.format(**values))
        return path

    def whole(self) -> tuple[dict[str, bytes], float]:
        """An untouched run: its results and how long it took."""
        began = time.monotonic()
        process = start(self.config("whole"))
        if process.wait():
            raise RuntimeError(log_of(self.config("whole"))[-3000:])
        return results(self.root / "whole"), time.monotonic() - began

    def carry_out(
        self, kills: int, expected: dict[str, bytes], seconds: float, ended: Callable[[], None] = lambda: None
    ) -> None:
        """Kill so often, over as many runs as that takes; the last one is brought to its end.

        seconds: a command is struck within so many of its start, or since its last worker was killed.
        """
        choice = random.Random(self.seed)
        left = kills
        while left:
            left -= self.one_run(f"run-{len(self.ends):03d}", choice, left, expected, seconds)
            ended()

    def one_run(self, name: str, choice: random.Random, most: int, expected: dict[str, bytes], seconds: float) -> int:
        """One run from its start to its end, killed at most `most` times. Returns how often it was."""
        config, began = self.config(name), time.monotonic()
        kills: list[Kill] = []
        while self.one_command(name, config, choice, kills, most, seconds) != 0:
            pass
        found = results(self.root / name)
        lost, twice = compare_rows(expected, found)
        different = sorted(p for p in expected.keys() | found.keys() if expected.get(p) != found.get(p))
        rubbish = sorted(str(p.relative_to(self.root / name)) for p in (self.root / name).rglob(".*.tmp"))
        self.ends.append(Ended(kills, lost, twice, different, rubbish, round(time.monotonic() - began, 1)))
        return len(kills)

    def one_command(
        self, name: str, config: Path, choice: random.Random, kills: list[Kill], most: int, seconds: float
    ) -> int | None:
        """One `curate run`, until it ends or is ended; kills are added. Returns its exit code, None if it hung."""
        process, began = start(config), time.monotonic()
        struck: Kill | None = None
        try:
            while len(kills) < most and not ended_within(process, choice.uniform(0, seconds)):
                victim = choice.choices(list(VICTIMS), list(VICTIMS.values()))[0]
                found = strike(process, victim, choice, self.root / name, time.monotonic() - began)
                if found is not None:
                    kills.append(found)
                    struck = found
                    if victim != "worker":
                        break
            code = process.wait(HUNG_S) if ended_within(process, HUNG_S) else None
            if struck is not None:
                struck.exit_code = code
                if code != -signal.SIGKILL:
                    struck.said = "hung" if code is None else last_line(config)
            elif code != 0:
                raise RuntimeError(f"{name} failed untouched: {log_of(config)[-3000:]}")
            return code
        finally:
            end_group(process)


def prepare(root: Path, originals: int) -> None:
    """Pictures in folders, and the list of URLs of the pool, some of which do not exist or are listed twice."""
    pictures.pool_with_copies(root / "pool", originals)
    pictures.folder(root / "seeds-even", 6, family=0, first=500)
    pictures.folder(root / "evaluation", 8, family=2, first=700)
    pictures.picture(700, family=2).resize((128, 96)).save(root / "pool" / "leak-700.jpg", quality=88)


def write_urls(root: Path, port: int) -> None:
    """The list of URLs for the web at `port`."""
    urls = [f"http://127.0.0.1:{port}/pool/{path.name}" for path in sorted((root / "pool").iterdir())]
    urls += [f"http://127.0.0.1:{port}/pool/gone-{number}.jpg" for number in range(5)] + urls[:2]
    pq.write_table(pa.table({"url": urls}), root / "urls.parquet")


@contextmanager
def web(root: Path) -> Iterator[int]:
    """Serve `root` on loopback; yields the port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # killed clients hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def start(config: Path) -> subprocess.Popen[bytes]:
    """`curate run` in a session of its own, its output in a file beside the configuration."""
    command = [sys.executable, "-m", "cli.main", "run", str(config), "--json"]
    patient = {**os.environ, "RAY_raylet_start_wait_time_s": "300"}  # a busy machine is no fault of the run
    with open(config.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=patient)


def strike(
    process: subprocess.Popen[bytes], victim: str, choice: random.Random, run: Path, after_s: float
) -> Kill | None:
    """Kill -9. None if there is no such process, or the driver has ended."""
    family = [(p, name) for p in children_of(process.pid) if (name := title_of(p)) is not None]
    targets = {
        "driver": [psutil.Process(process.pid)] if process.poll() is None else [],
        "worker": [p for p, name in family if name.startswith("ray::")],
        "raylet": [p for p, name in family if "/raylet" in name.split(" ")[0]],
    }
    stage = last_stage(run)
    if victim == "machine":
        if process.poll() is not None:
            return None
        os.killpg(process.pid, signal.SIGKILL)
        return Kill(victim, round(after_s, 2), stage)
    if not targets[victim]:
        return None
    try:
        choice.choice(targets[victim]).kill()
    except psutil.Error:
        return None
    return Kill(victim, round(after_s, 2), stage)


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def title_of(process: psutil.Process) -> str | None:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return None


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a run half a second after its driver ended: the next one starts among its orphans."""
    threading.Timer(0.5, _kill_group, [process.pid]).start()


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def log_of(config: Path) -> str:
    return config.with_suffix(".log").read_text(errors="replace")


def last_line(config: Path) -> str:
    """The last line of a run's output that is not Ray's."""
    lines = [line.strip() for line in log_of(config).splitlines() if line.strip() and line[0] not in "[(\x1b \t"]
    return lines[-1][:300] if lines else ""


def last_stage(run: Path) -> str | None:
    """The stage that began last, by RUN/events.jsonl."""
    try:
        lines = (run / "events.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:  # cut by the kill
            continue
        if event.get("event") == "stage_start":
            return str(event["stage"])
    return None


def results(run: Path) -> dict[str, bytes]:
    """Everything a run promises to reproduce: tables, shards, data card."""
    kept = [*run.rglob("*.parquet"), *run.rglob("*.tar"), *run.rglob("manifest.json")]
    return {str(p.relative_to(run)): p.read_bytes() for p in kept if not p.name.startswith(".")}


def compare_rows(expected: dict[str, bytes], found: dict[str, bytes]) -> tuple[int, int]:
    """Rows of the untouched run that are missing, and rows that are there too often, by folder and image id."""
    lost = twice = 0
    wanted, there = ids_by_folder(expected), ids_by_folder(found)
    for folder in wanted.keys() | there.keys():
        lost += (wanted.get(folder, Counter()) - there.get(folder, Counter())).total()
        twice += (there.get(folder, Counter()) - wanted.get(folder, Counter())).total()
    return lost, twice


def ids_by_folder(files: dict[str, bytes]) -> dict[str, Counter[int]]:
    """How often each image_id stands in the tables of a folder."""
    found: dict[str, Counter[int]] = {}
    for path, data in files.items():
        if path.endswith(".parquet"):
            file = pq.ParquetFile(pa.BufferReader(data))
            if "image_id" in file.schema_arrow.names:
                ids = file.read(columns=["image_id"])["image_id"].to_pylist()
                found.setdefault(path.rsplit("/", 1)[0], Counter()).update(ids)
    return found


def document(chaos: Chaos, seconds: float, expected: dict[str, bytes], cpu_s: float) -> dict[str, Any]:
    """The figures."""
    kills = [kill for end in chaos.ends for kill in end.kills]
    return {
        "command": "python -m benchmarks.chaos " + " ".join(sys.argv[1:]),
        "machine": machine.facts(),
        "versions": machine.versions(["ray", "pyarrow", "numpy", "faiss-cpu", "img2dataset"]),
        "untouched": {"seconds": round(seconds, 1), "files": len(expected), "bytes": sum(map(len, expected.values()))},
        "kills": len(kills),
        "runs": len(chaos.ends),
        "rows_lost": sum(end.rows_lost for end in chaos.ends),
        "rows_twice": sum(end.rows_twice for end in chaos.ends),
        "files_different": sum(len(end.files_different) for end in chaos.ends),
        "left_behind": sum(len(end.left_behind) for end in chaos.ends),
        "hung": sum(kill.said == "hung" for kill in kills),
        "by_victim": dict(sorted(Counter(kill.victim for kill in kills).items())),
        "by_stage": dict(sorted(Counter(kill.stage or "before the first" for kill in kills).items())),
        "exit_codes": dict(
            sorted(Counter(f"{kill.victim} {kill.exit_code}" for kill in kills if kill.exit_code is not None).items())
        ),
        "cpu_seconds": round(cpu_s, 1),
        "ends": [{**vars(end), "kills": [vars(kill) for kill in end.kills]} for end in chaos.ends],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--originals", type=int, default=64, help="pictures of the pool; a quarter has three copies")
    parser.add_argument(
        "--within", type=float, default=0.4, help="share of the untouched run's time in which a command is struck"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--add", action="store_true", help="to the runs that --out holds, until they have --kills")
    given = parser.parse_args()
    before = json.loads(given.out.read_text()) if given.add else {"ends": [], "cpu_seconds": 0.0}
    earlier = [Ended(**{**end, "kills": [Kill(**kill) for kill in end["kills"]]}) for end in before["ends"]]
    left = given.kills - sum(len(end.kills) for end in earlier)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder)
        prepare(root, given.originals)
        with web(root) as port:
            write_urls(root, port)
            chaos = Chaos(root, given.seed, ends=earlier)
            expected, seconds = chaos.whole()
            sys.stdout.write(f"an untouched run takes {seconds:.1f} s\n")

            def store() -> None:
                used = os.times()
                found = document(
                    chaos, seconds, expected, before["cpu_seconds"] + used.children_user + used.children_system
                )
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n")
                shown = {key: value for key, value in found.items() if key not in ("ends", "machine")}
                sys.stdout.write(json.dumps(shown) + "\n")
                sys.stdout.flush()

            chaos.carry_out(left, expected, given.within * seconds, store)
    return int(any(end.rows_lost or end.rows_twice or end.files_different for end in chaos.ends))


if __name__ == "__main__":
    raise SystemExit(main())
