"""Whole runs whose processes are killed at random moments, resumed until they end, and compared with an untouched run.

`python -m benchmarks.chaos --kills 50` draws from --seed when to kill (any moment of any stage, or of the start of a
command) and whom: the driver (`curate run`), a Ray worker, the raylet or one of the agents that it dies with, the
server of the cluster's state, or all of them at once as a machine that loses its power. The same command is then
given again. Every table, shard and data card of a run that has ended is compared with that of a run that nobody
touched: rows lost, rows twice, bytes different. The pool is downloaded from a web on loopback, with URLs that fail;
seeds and evaluation set are imported. Writes benchmarks/results/chaos.json.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import machine
from benchmarks.chaos_kills import HUNG_S, VICTIMS, Kill, Plan, carried_out, drawn, ended_within, events, spans_of
from tests.e2e import pictures

RESULT = Path(__file__).parent / "results" / "chaos.json"
PER_RUN = 10
"""Kills meant for one run: it then ends, and the next begins."""
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

    def whole(self) -> "Whole":
        """An untouched run."""
        began, clock = time.monotonic(), time.time()
        process = start(self.config("whole"))
        if process.wait():
            raise RuntimeError(log_of(self.config("whole"))[-3000:])
        return Whole(
            results(self.root / "whole"), time.monotonic() - began, spans_of(events(self.root / "whole"), clock)
        )

    def carry_out(self, kills: int, whole: "Whole", ended: Callable[[], None] = lambda: None) -> None:
        """Kill so often, over as many runs as that takes; each is brought to its end."""
        choice = random.Random(f"{self.seed}:{len(self.ends)}")
        left = kills
        while left:
            victims = choice.choices(list(VICTIMS), list(VICTIMS.values()), k=min(left, PER_RUN))
            left -= self.one_run(drawn(choice, victims, list(whole.spans)), choice, whole)
            ended()

    def one_run(self, plans: Sequence[Plan], choice: random.Random, whole: "Whole") -> int:
        """One run from its start to its end, killed as planned. Returns how often it was."""
        name = f"run-{len(self.ends):03d}"
        config, began = self.config(name), time.monotonic()
        left, kills = list(plans), list[Kill]()
        while self.one_command(name, config, left, kills, choice, whole) != 0:
            pass
        found = results(self.root / name)
        lost, twice = compare_rows(whole.files, found)
        different = sorted(p for p in whole.files.keys() | found.keys() if whole.files.get(p) != found.get(p))
        rubbish = sorted(str(p.relative_to(self.root / name)) for p in (self.root / name).rglob(".*.tmp"))
        self.ends.append(Ended(kills, lost, twice, different, rubbish, round(time.monotonic() - began, 1)))
        return len(kills)

    def one_command(
        self, name: str, config: Path, left: list[Plan], kills: list[Kill], choice: random.Random, whole: "Whole"
    ) -> int | None:
        """One `curate run`, until it ends or is ended; plans are used up, kills are added.

        Returns its exit code, None if it hung.
        """
        seen, began = len(events(self.root / name)), time.monotonic()
        process = start(config)
        struck: Kill | None = None
        try:
            while left and (struck is None or struck.victim == "worker"):
                kill = carried_out(
                    left[0], process, self.root / name, seen=seen, began=began, spans=whole.spans, choice=choice
                )
                if kill is None:
                    break
                struck = kill
                kills.append(kill)
                del left[0]
            code = process.wait() if ended_within(process, HUNG_S) else None
            if struck is not None:
                struck.exit_code = code
                if code != -signal.SIGKILL:
                    struck.said = "hung" if code is None else last_line(config)
            elif code != 0:
                raise RuntimeError(f"{name} failed untouched: {log_of(config)[-3000:]}")
            return code
        finally:
            end_group(process)


@dataclass(frozen=True)
class Whole:
    """The untouched run: its results, seconds, and those of each stage and of the start, in their order."""

    files: dict[str, bytes]
    seconds: float
    spans: dict[str, float]


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
    with open(config.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


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


def document(chaos: Chaos, whole: Whole, cpu_s: float) -> dict[str, Any]:
    """The figures."""
    kills = [kill for end in chaos.ends for kill in end.kills]
    return {
        "command": "python -m benchmarks.chaos " + " ".join(sys.argv[1:]),
        "machine": machine.facts(),
        "versions": machine.versions(["ray", "pyarrow", "numpy", "faiss-cpu", "img2dataset"]),
        "untouched": {
            "seconds": round(whole.seconds, 1),
            "files": len(whole.files),
            "bytes": sum(map(len, whole.files.values())),
        },
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
            whole = chaos.whole()
            sys.stdout.write(f"an untouched run takes {whole.seconds:.1f} s\n")

            def store() -> None:
                used = os.times()
                found = document(chaos, whole, before["cpu_seconds"] + used.children_user + used.children_system)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n")
                shown = {key: value for key, value in found.items() if key not in ("ends", "machine")}
                sys.stdout.write(json.dumps(shown) + "\n")
                sys.stdout.flush()

            chaos.carry_out(left, whole, store)
    return int(any(end.rows_lost or end.rows_twice or end.files_different for end in chaos.ends))


if __name__ == "__main__":
    raise SystemExit(main())
