"""Measures `curate download` against img2dataset alone, on the same list and the same web, and what each check costs.

    python -m benchmarks.download_load --urls 100000 --rounds 1 --out benchmarks/results/download-load.json

The web (download_web.py) is one process on loopback with many addresses and mixed faults; both programs ask with two
processes of 64 threads, one try per URL, bytes stored as served, sha256 computed, in turns. The per-host limit of
`curate` lies above what the web is asked for, robots.txt is asked once per host and kept. Checks are turned off one at
a time by replacing functions, which no option of `curate` can do.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from benchmarks import machine
from benchmarks.download_web import SHARES

HOSTS = 40
WORKERS, THREADS, TIMEOUT_S = 2, 64, 5


@contextlib.contextmanager
def web(port: int) -> Iterator[psutil.Process]:
    """The web in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.download_web", str(port), str(HOSTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"port {port} of loopback cannot be used; give another with --port")
    try:
        yield psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def write_list(path: Path, count: int, port: int) -> dict[str, int]:
    """The list, kinds spread by a hash of the row; returns how many there are of each."""
    kinds, bounds = list(SHARES), []
    total = 0.0
    for share in SHARES.values():
        total += share
        bounds.append(total)
    counted = dict.fromkeys(kinds, 0)
    with path.open("w") as file:
        for row in range(count):
            drawn = int.from_bytes(hashlib.blake2b(str(row).encode(), digest_size=8).digest(), "little") / 2**64
            kind = kinds[next((i for i, bound in enumerate(bounds) if drawn < bound), 0)]
            counted[kind] += 1
            file.write(f"http://127.0.0.{row % HOSTS + 1}:{port}/{kind}/{row}.jpg\n")
    return counted


def curate(listed: Path, folder: Path, port: int) -> list[str]:
    """The command of ours."""
    allowed = ",".join(f"127.0.0.{host}:{port}" for host in range(1, HOSTS + 1))
    options = {
        "--as": "pool:web",
        "--out": str(folder),
        "--allow-hosts": allowed,
        "--threads": THREADS,
        "--workers": WORKERS,
        "--timeout-s": TIMEOUT_S,
        "--attempts": 1,
        "--requests-per-host": 512,
    }
    return [
        sys.executable,
        "-m",
        "cli.main",
        "download",
        str(listed),
        *(str(x) for pair in options.items() for x in pair),
    ]


def img2dataset(listed: Path, folder: Path) -> list[str]:
    """Its own command with what makes it fastest: no resizing, no re-encoding."""
    options = {
        "url_list": listed,
        "output_folder": folder,
        "input_format": "txt",
        "output_format": "webdataset",
        "processes_count": WORKERS,
        "thread_count": THREADS,
        "timeout": TIMEOUT_S,
        "retries": 0,
        "resize_mode": "no",
        "skip_reencode": True,
        "number_sample_per_shard": 1000,
        "compute_hash": "sha256",
        "extract_exif": False,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-c", "from img2dataset import main; main()", *arguments]


class Watch:
    """CPU seconds and memory of a process and everything that it started, sampled."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.cpu: dict[int, float] = {}
        self.series: list[tuple[float, int, int]] = []
        self.spent: list[tuple[float, float]] = [(time.time(), 0.0)]
        """(time of the clock, CPU seconds until then)."""
        self.began = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(0.5):
            workers, everything = 0, 0
            with contextlib.suppress(psutil.Error):
                for process in [self.root, *self.root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        times = process.cpu_times()
                        self.cpu[process.pid] = times.user + times.system
                        private = process.memory_info().rss - process.memory_info().shared
                        everything += private
                        if "map_part" in (line := " ".join(process.cmdline())) or "_spread" in line or "ray::" in line:
                            workers += private
            self.spent.append((time.time(), sum(self.cpu.values())))
            self.series.append((round(time.monotonic() - self.began, 1), workers, everything))

    def close(self) -> dict[str, Any]:
        self.over.set()
        self.thread.join()
        half = [entry for entry in self.series if entry[0] > self.series[-1][0] * 0.25] if self.series else []
        middle = [e[2] for e in half[: len(half) // 3]]
        last = [e[2] for e in half[-(len(half) // 3) :]]
        step = max(1, len(self.series) // 40)
        return {
            "cpu_s": round(sum(self.cpu.values()), 1),
            "memory_mib": {
                "most": max((e[2] for e in self.series), default=0) >> 20,
                "second_quarter": sum(middle) // max(1, len(middle)) >> 20,
                "last_quarter": sum(last) // max(1, len(last)) >> 20,
            },
            "memory_series": [[t, a >> 20, b >> 20] for t, a, b in self.series[::step]],
        }


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds of a command, and what it brought."""
    log = folder.with_suffix(".log")
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        watch = Watch(process.pid)
        code = process.wait()
    found = {"seconds": round(time.monotonic() - began, 1), **watch.close()}
    if code != 0:
        raise SystemExit(f"{command[:4]} ended with {code}: {log.read_text()[-2000:]}")
    return found


def brought(folder: Path) -> dict[str, int]:
    """Images by tables of either program."""
    import pyarrow.dataset as ds

    ours = folder / "download"
    files = [str(p) for p in (ours.rglob("part-*.parquet") if ours.exists() else folder.glob("*.parquet"))]
    statuses = ds.dataset(files).to_table(columns=["status"])["status"].value_counts().to_pylist()
    return {str(entry["values"]): int(entry["counts"]) for entry in statuses}


def compare(options: argparse.Namespace, scratch: Path, keep: Callable[[dict[str, Any]], None]) -> None:
    """Both programs in turns, the order changing. keep(found) after each run: they are long."""
    listed = scratch / "urls.txt"
    kinds = write_list(listed, options.urls, options.port)
    runs: dict[str, list[dict[str, Any]]] = {"curate": [], "img2dataset": []}
    with web(options.port) as server:
        for turn in range(options.rounds):
            for name in ("curate", "img2dataset") if turn % 2 == 0 else ("img2dataset", "curate"):
                folder = scratch / f"{name}-{turn}"
                before = server.cpu_times()
                command = curate(listed, folder, options.port) if name == "curate" else img2dataset(listed, folder)
                found = run(command, folder)
                after = server.cpu_times()
                found["web_cpu_s"] = round(after.user + after.system - before.user - before.system, 1)
                found |= {"rows": brought(folder), "load_average": round(os.getloadavg()[0], 1)}
                found["urls_per_s"] = round(options.urls / found["seconds"], 1)
                runs[name].append(found)
                shown = {k: v for k, v in found.items() if k != "memory_series"}
                print(name, json.dumps(shown), flush=True)
                shutil.rmtree(folder, ignore_errors=True)
                keep(_ratios(options.urls, kinds, runs))


def _ratios(urls: int, kinds: dict[str, int], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"urls": urls, "kinds": kinds, "runs": runs}
    whole = min(len(entries) for entries in runs.values())
    for what, measure, over in (("throughput", "seconds", "img2dataset"), ("cpu", "cpu_s", "curate")):
        under = "curate" if over == "img2dataset" else "img2dataset"
        sums = {name: sum(entry[measure] for entry in entries[:whole]) for name, entries in runs.items()}
        found[f"{what}_ratio"] = round(sums[over] / sums[under], 3) if whole else None
    return found


def checks() -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Each check, as what takes its place."""
    from embeddings import decoding
    from pipelines.download import addresses, connection, opener, politeness, robots, shard

    class Unbounded(connection._DeadlineReader):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return self.sock.recv_into(buffer)

    def unhashed(data: bytes = b"") -> Any:
        return mock.Mock(digest=lambda: bytes(32), hexdigest=lambda: "0" * 64)

    places = {}

    def unresolved(self: Any, target: Any, seconds: float) -> Any:
        import socket

        return places.setdefault(target.host, [(socket.AF_INET, (target.host, target.port))])

    patch = mock.patch.object
    return {
        "everything on": contextlib.nullcontext,
        "names resolved and addresses checked": lambda: patch(opener.Opener, "_resolve", unresolved),
        "robots.txt": lambda: patch(robots.RobotsCache, "check", lambda *_: 0.0),
        "X-Robots-Tag": lambda: patch(opener, "forbidden_directive", lambda *_: None),
        "requests per host bounded": lambda: patch(politeness.HostGate, "slot", lambda *_: contextlib.nullcontext()),
        "total time and size of a body": lambda: patch(connection, "_DeadlineReader", Unbounded),
        "blocked and opted-out lists": lambda: patch(opener.Opener, "_check_lists", lambda *_: None),
        "size and format from the header": lambda: patch(
            decoding.Decoder, "probe", lambda *_: decoding.ImageHeader("JPEG", 448, 336)
        ),
        "sha256 of what is stored": lambda: patch(shard.hashlib, "sha256", unhashed),
        "URL taken apart": lambda: patch(addresses, "parse", _loose_parse(addresses)),
    }


def _loose_parse(addresses: Any) -> Callable[[str], Any]:
    from urllib.parse import urlsplit

    def parse(url: str) -> Any:
        parts = urlsplit(url)
        return addresses.Target(parts.scheme, parts.hostname, parts.port or 80, parts.path or "/")

    return parse


def costs(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """CPU seconds of one process over the same URLs, all checks on and each one off, interleaved and repeated."""
    listed = scratch / "few.txt"
    write_list(listed, options.check_urls, options.port)
    urls = [url for url in listed.read_text().split() if "/never/" not in url and "/slow/" not in url]
    spent: dict[str, list[float]] = {name: [] for name in checks()}
    with web(options.port):
        for turn in range(options.check_rounds + 1):
            for name, replaced in checks().items():
                with replaced():
                    found = _one_shard(urls, options.port)
                if turn:  # the first fills caches
                    spent[name].append(found)
    best = {name: min(values) for name, values in spent.items()}
    everything = best.pop("everything on")
    return {
        "urls": len(urls),
        "rounds": options.check_rounds,
        "cpu_us_per_url": round(everything / len(urls) * 1e6, 1),
        "cost_us_per_url": {name: round((everything - value) / len(urls) * 1e6, 1) for name, value in best.items()},
        "share": {name: round(1 - value / everything, 4) for name, value in best.items()},
        "all_seconds": {name: [round(v, 3) for v in values] for name, values in spent.items()},
    }


def _one_shard(urls: list[str], port: int) -> float:
    import pyarrow as pa

    from pipelines import pieces
    from pipelines.download import opener, shard

    rules = shard.ShardRules(
        fetch=opener.FetchRules(
            timeout_s=TIMEOUT_S, attempts=1, allow_hosts=tuple(f"127.0.0.{h}:{port}" for h in range(1, HOSTS + 1))
        ),
        token=f"benchmark-{os.getpid()}",
        threads=THREADS,
        requests_per_host=512,
        seconds_between_requests=0.0,
        host_wait_s=60.0,
        max_side=None,
        folder="download/gen-0000",
        opted_out=__import__("numpy").empty(0, "u8"),
    )
    nothing = pa.nulls(len(urls), pa.string())
    piece = pa.Table.from_arrays(
        [
            pa.array(range(len(urls)), pa.uint64()),
            pa.array(urls),
            *[nothing] * 4,
            pa.nulls(len(urls), pa.uint64()),
        ],
        schema=pieces.PIECE,
    )
    start = time.process_time()
    collected, refused = shard.fetch(piece, rules)
    shard.assemble(piece, collected, refused, "pool:web", "x.tar")
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--check-urls", type=int, default=4000)
    parser.add_argument("--check-rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8871)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"setting": {"hosts": HOSTS, "workers": WORKERS, "threads": THREADS, "tries": 1}}
    if options.out is not None and options.out.exists():
        found |= json.loads(options.out.read_text())
    found["versions"] = machine.versions(["img2dataset", "ray", "pyarrow", "pillow", "opencv-python-headless"])
    found["machine"] = machine.facts()

    def keep(name: str, part: dict[str, Any]) -> None:
        found[name] = part
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="curate-load-") as name:
        if options.check_rounds:
            keep("checks", costs(options, Path(name)))
            print(json.dumps(found["checks"], indent=1), flush=True)
        if options.rounds:
            compare(options, Path(name), lambda part: keep(f"comparison-{options.urls}", part))
            part = found[f"comparison-{options.urls}"]
            print(f"throughput {part['throughput_ratio']} x, CPU {part['cpu_ratio']} x")


if __name__ == "__main__":
    main()
